"""Where jobs keep their files: one root, a folder per kind, a folder per name.

    root = Storage.find(spec.storage)
    root.corpus("stdlib"), root.run("py-10m"), root.sweep("lr"), root.evaluation("py"), root.endpoint("py"), root.pipeline("quickstart")
"""

import contextlib
import fcntl
import json
import os
import secrets
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distlm.errors import StorageError

NO_OBJECT_STORES = "object stores are not supported yet", "name a folder that every node sees, e.g. on NFS, Lustre or a mounted bucket"
FOLDERS = {"prepare": "corpora", "train": "runs", "tune": "sweeps", "average": "runs", "evaluate": "evaluations", "compress": "compressed",
           "serve": "endpoints", "pipeline": "pipelines"}


@dataclass(frozen=True)
class Storage:
    """A root that every node of the cluster sees."""

    root: Path

    @staticmethod
    def find(root: str | None = None) -> "Storage":
        """The root that is named, else $DISTLM_STORAGE, else ~/distlm. Raises StorageError for one that cannot be used."""
        text = root or os.environ.get("DISTLM_STORAGE") or "~/distlm"
        if "://" in text:
            raise StorageError(NO_OBJECT_STORES[0], where=f"storage: {text}", remedy=NO_OBJECT_STORES[1])
        return Storage(Path(os.path.abspath(Path(text).expanduser())))

    @staticmethod
    def given(storage: "str | Path | Storage | None", otherwise: str | None = None) -> "Storage":
        """What a caller has passed as storage, else the root `otherwise`, else the one that `find` finds."""
        return storage if isinstance(storage, Storage) else Storage.find(str(storage) if storage else otherwise)

    def folder(self, kind: str, name: str) -> Path:
        """The folder of a job. Raises StorageError for a name that would leave the root."""
        base = Path(os.path.abspath(self.root / FOLDERS[kind]))
        path = Path(os.path.normpath(base / name))
        if base not in path.parents:
            raise StorageError(f"{name!r} leads out of {base}", remedy="use a plain name")
        return path

    def corpus(self, name: str) -> Path:
        return self.folder("prepare", name)

    def run(self, name: str) -> Path:
        return self.folder("train", name)

    def sweep(self, name: str) -> Path:
        return self.folder("tune", name)

    def evaluation(self, name: str) -> Path:
        return self.folder("evaluate", name)

    def endpoint(self, name: str) -> Path:
        return self.folder("serve", name)

    def pipeline(self, name: str) -> Path:
        return self.folder("pipeline", name)


@contextlib.contextmanager
def writing(what: str | Path, remedy: str = "free space or name another storage root") -> Iterator[None]:
    """Turn an OSError of the block, a full disk first, into a StorageError that names `what`."""
    try:
        yield
    except OSError as error:
        raise StorageError(f"cannot write: {error.strerror or error}", where=str(what), remedy=remedy) from error


@contextlib.contextmanager
def locked(path: Path) -> Iterator[int]:
    """Hold the lock of a file, made where there is none, for the block; yields its handle. A process that dies lets go of it.

    On a file system without locks (some NFS and Lustre mounts) the block runs without.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield handle
    finally:
        os.close(handle)


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write a file whole or not at all: a temporary file beside it, flushed to disk, then renamed."""
    data = data.encode() if isinstance(data, str) else data
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise


def flush_folder(path: Path) -> None:
    """Flush to disk what a folder lists: a new file's bytes may be there and its name be gone after a power cut. Some file systems flush no
    folders; they are left as they are."""
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextlib.contextmanager
def replacing(path: Path | str) -> Iterator[str]:
    """A temporary path beside `path` to write to; the file takes its place, flushed to disk, when the block ends without an error.
    Raises StorageError for an OSError of the block."""
    handle, temporary = -1, f"{path}.{secrets.token_hex(4)}.partial"
    with writing(path):
        try:
            yield temporary
            handle = os.open(temporary, os.O_RDONLY)
            os.fsync(handle)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
        finally:
            if handle >= 0:
                os.close(handle)


def write_json(path: Path, value: Any) -> None:
    write_atomic(path, json.dumps(value, indent=2, sort_keys=False) + "\n")


def read_json(path: Path) -> Any:
    """Raises StorageError where the file is missing or not JSON."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise StorageError("there is no such file", where=str(path)) from None
    except (OSError, ValueError) as error:
        raise StorageError(f"cannot be read: {error}", where=str(path)) from None
