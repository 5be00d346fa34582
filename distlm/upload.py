"""The working directory of a submitted job, as one zip: what git would keep, never `.git`, virtual environments, run folders or keys."""

import os
import stat
import subprocess
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

from distlm.errors import InputError

LIMIT_BYTES = 100 << 20
"""Ray's job API takes no more; counted here before compression."""
LEFT_OUT = (".git", ".hg", ".svn", "__pycache__", "node_modules", ".mypy_cache", ".ruff_cache", ".pytest_cache", ".tox")


def pack(folder: Path, archive: Path, storage_root: Path, extra: Mapping[str, str] | None = None) -> list[str]:
    """Write the files of `folder`, and `extra` ones by name, to `archive`. Equal files give equal bytes. Returns the folders that stayed
    behind though they might be wanted, each with the reason.

    Raises InputError above LIMIT_BYTES, naming the largest entries.
    """
    left_out: list[str] = []
    found = {path: path.stat().st_size for path in files(folder, storage_root, left_out)}
    total = sum(found.values())
    if total > LIMIT_BYTES:
        sizes: Counter[str] = Counter()
        for path, size in found.items():
            parts = path.relative_to(folder).parts
            sizes[parts[0] + ("/" if len(parts) > 1 else "")] += size
        largest = ", ".join(f"{name} {size / 2**20:,.0f} MiB" for name, size in sizes.most_common(4))
        raise InputError(f"{total / 2**20:,.0f} MiB are more than the {LIMIT_BYTES >> 20} MiB that a job may carry: {largest}",
                         where=str(folder), remedy="list data in .gitignore or keep it elsewhere, and name it by its path")
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as packed:
        def put(name: str, data: bytes, mode: int) -> None:
            entry = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
            entry.external_attr = mode << 16
            entry.compress_type = zipfile.ZIP_DEFLATED
            packed.writestr(entry, data)

        for path in sorted(found):
            put(path.relative_to(folder).as_posix(), path.read_bytes(), path.stat().st_mode)
        for name, text in (extra or {}).items():
            put(name, text.encode(), 0o100644)
    return left_out


def files(folder: Path, storage_root: Path, left_out: list[str] | None = None) -> Iterator[Path]:
    """The files below `folder` that a job takes along; what git ignores is left out where there is git. Into `left_out` go the folders that
    stay behind though git would keep them, but for what nobody expects to go."""
    kept = _git_files(folder)
    known = None if kept is None else kept | {parent for path in kept for parent in path.parents}
    for base, folders, names in os.walk(folder):
        reasons = {name: _left_out(Path(base) / name, storage_root) for name in sorted(folders)}
        folders[:] = [name for name, why in reasons.items() if why is None]
        if left_out is not None:
            left_out += [f"{(Path(base) / name).relative_to(folder).as_posix()}/ ({why})" for name, why in reasons.items()
                         if why and (known is None or Path(base) / name in known)]
        for name in sorted(names):
            path = Path(base) / name
            if path.is_file() and (kept is None or path in kept) and not _secret(path):
                yield path


def _left_out(folder: Path, storage_root: Path) -> str | None:
    """Why a folder stays behind, empty where nobody needs to be told; None for one that goes along."""
    if folder.name in LEFT_OUT or folder == storage_root or any((folder / name).exists() for name in ("pyvenv.cfg", "conda-meta")):
        return ""
    if folder.is_symlink():
        return "a link"
    return next((f"holds {name}" for name in ("events.jsonl", "cluster.json") if (folder / name).exists()), None)


def _secret(path: Path) -> bool:
    """A key of an endpoint or a cluster's token, or the file by which a worktree or a submodule finds its `.git`, which is not there."""
    return path.name == ".git" or (path.name in ("token", "api_key") and not stat.S_IMODE(path.stat().st_mode) & 0o077)


def _git_files(folder: Path) -> set[Path] | None:
    try:
        output = subprocess.run(["git", "-C", str(folder), "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
                                capture_output=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return {folder / os.fsdecode(name) for name in output.split(b"\0") if name}
