"""Which files the sources of a prepare job name."""

import glob
import os
import stat
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import xxhash

from distlm.corpus import stores
from distlm.corpus.decompress import ENDINGS
from distlm.corpus.trees import Licenses
from distlm.corpus.web import library
from distlm.errors import InputError
from distlm.spec.load import nearest
from distlm.spec.prepare import Source

RANGE_BYTES = 32 << 20
"""What one task reads of a file that can be read in ranges."""
SKIPPED_FOLDERS = {"__pycache__"}
SKIPPED_STDLIB = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
"""The tests of the standard library are 60 % of its bytes, and much of them is data."""


@dataclass(frozen=True)
class TextFile:
    """A file to be read."""

    path: str
    """Of an object in a store: bucket/key."""
    name: str
    """How the manifest calls it: the last part of the source's path, and what is below. The same on every host."""
    format: str
    """text, json, jsonl, parquet, html, warc or docstrings."""
    text_key: str
    source: int
    """The source it belongs to, by its place in the spec."""
    bytes: int
    modified: int = -1
    """Nanoseconds since 1970; -1 where there is no such file."""
    id_key: str | None = None
    keep: tuple[str, ...] = ()
    code: bool = False
    """Whether path, language and licence stay with the document."""
    license: str = ""
    """Of a file of code: what the tree says of it."""
    store: stores.Store | None = None
    """Where it is not a local file."""
    begin: int = 0
    """Of a range of the file: the place of its first byte, and of the first behind it, None for the end of the file. The lines and row
    groups that begin in a range are its own."""
    end: int | None = None

    @property
    def place(self) -> str:
        """How messages and records of this host call it."""
        return self.store.uri(self.path) if self.store else self.path


def ranges(file: TextFile, size: int = RANGE_BYTES) -> list[TextFile]:
    """The file in ranges of `size` bytes, which several tasks can read: jsonl and parquet, where it lies on disk and is not compressed. Of
    any other file, itself."""
    if file.format not in ("jsonl", "parquet") or file.store or Path(file.path).suffix.lower() in ENDINGS:
        return [file]
    begins = [*range(0, max(1, file.bytes), size)]
    ends = [*begins[1:], None]                             # the last takes in what has been added meanwhile
    return [replace(file, bytes=(end or file.bytes) - begin, begin=begin, end=end) for begin, end in zip(begins, ends, strict=True)]


def joint_xxh3(hashes: list[str]) -> str:
    """The hash of a file, by those of its ranges."""
    return hashes[0] if len(hashes) == 1 else xxhash.xxh3_64_hexdigest("".join(hashes).encode())


def grouped(files: list[TextFile], target_bytes: int, most: int) -> list[tuple[int, int]]:
    """Ranges of files of about `target_bytes`, of at most so many files."""
    groups, first, size = [], 0, 0
    for i, file in enumerate(files):
        size += file.bytes
        if size >= target_bytes or i + 1 - first >= most or i + 1 == len(files):
            groups.append((first, i + 1))
            first, size = i + 1, 0
    return groups


def find_files(sources: list[Source]) -> list[TextFile]:
    """Every file that the sources name, in an order that does not depend on theirs. Raises InputError for one that names none, and
    for html and warc where what reads them is not installed; StorageError for a store that cannot be read."""
    found = [file for i, source in enumerate(sources) for file in _find(i, source)]
    for file in {file.format: file for file in found}.values():
        if file.format in ("html", "warc"):
            library("trafilatura", file.format, file.source)
        if file.format == "warc":
            library("warcio", file.format, file.source)
    rules = [(source.model_dump_json(exclude={"path"}), source.path) for source in sources]
    return sorted(found, key=lambda file: (file.name, file.bytes, file.path, file.format, file.text_key, file.id_key or "", file.keep,
                                           rules[file.source]))


def _base(text: str) -> tuple[Path, bool]:
    """The path, or the deepest folder of a glob before its first pattern; and whether it is a glob."""
    path = Path(os.path.abspath(os.path.expanduser(text)))
    if os.path.exists(path) or not glob.has_magic(text):
        return path, False
    parts = path.parts
    first = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    return Path(*parts[:first]), True


def _find(index: int, source: Source) -> Iterator[TextFile]:
    where, store = f"sources.{index}.path: {source.path}", None
    if "://" in source.path:
        store, path, is_folder = stores.parse(source.path, where)
        store = stores.located(store, path, where)
        base, is_glob, objects = stores.find(store, path, is_folder, SKIPPED_FOLDERS, where)
        found = [(item.path, item.path[len(base):], item.bytes, item.modified) for item in objects]
    else:
        folder, is_glob, paths = _local(source.path, where)
        base = str(folder)
        found = [(str(path), "" if path == folder else "/" + path.relative_to(folder).as_posix(), *_facts(path)) for path in paths]
    if not found:
        raise InputError("no file matches" if is_glob else "the folder holds no file", where=where,
                         remedy=_nearest(Path(base)) if is_glob else "hidden files and __pycache__ are passed over; name another folder")
    name = source.path if source.path == "stdlib" else Path(base).name
    licenses = Licenses(Path(base), store)
    for path, below, size, modified in found:
        kind = _format(Path(path), source)
        code = source.code and kind == "text"
        named = os.fsencode(name + below).decode("utf-8", "backslashreplace")                # what is no UTF-8 no list can hold
        yield TextFile(path, named, kind, source.text_key, index, size, modified, source.id_key, source.keep, code,
                       licenses.of(Path(path)) if code else "", store)


def _local(text: str, where: str) -> tuple[Path, bool, list[Path]]:
    """The file or folder that names begin with, whether the path is a glob, and the files."""
    if text == "stdlib":
        base = Path(sysconfig.get_path("stdlib"))
        return base, False, [path for path in _walk(base, SKIPPED_STDLIB) if path.suffix == ".py"]
    base, is_glob = _base(text)
    pattern = os.path.abspath(os.path.expanduser(text))
    matches = [Path(match) for match in glob.glob(pattern, recursive=True)] if is_glob else [base]
    if not is_glob and not os.path.exists(base):
        raise InputError("there is no such file or folder", where=where, remedy=_nearest(base))
    return base, is_glob, sorted({path for match in matches for path in (_walk(match, SKIPPED_FOLDERS) if match.is_dir() else [match])})


def _facts(path: Path) -> tuple[int, int]:
    """Size and time of change. What is no file has no size: a broken link or a pipe is rejected when it is read."""
    try:
        found = path.stat()
    except OSError:
        return 0, -1
    return found.st_size if stat.S_ISREG(found.st_mode) else 0, found.st_mtime_ns


def _walk(folder: Path, skipped: set[str]) -> Iterator[Path]:
    for root, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if name not in skipped and not name.startswith("."))
        for name in sorted(files):
            if not name.startswith("."):
                yield Path(root, name)


def _format(path: Path, source: Source) -> str:
    if source.format != "auto":
        return source.format
    ending = Path(path.stem if path.suffix.lower() in ENDINGS else path.name).suffix.lower()
    if ending == ".json" and not source.code:
        return "json"
    return {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet", ".html": "html", ".htm": "html",
            ".warc": "warc", ".wet": "warc"}.get(ending, "text")


def _nearest(path: Path) -> str:
    """A remedy that names what is most alike beside the path that does not exist."""
    folder = path.parent
    while not os.path.isdir(folder):
        path, folder = folder, folder.parent
    near = nearest(path.name, ["stdlib", *(item.name for item in folder.iterdir())])
    return f"did you mean {near if near == 'stdlib' else folder / near}?" if near else "paths are taken relative to where the job starts"
