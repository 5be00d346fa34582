"""Sources in object stores, `s3://bucket/path` and `gs://bucket/path`, through pyarrow's clients.

    store, path, _ = parse("s3://bucket/crawl/*.jsonl.zst")
    base, is_glob, found = find(store, path, {"__pycache__"})
    for block in store.read(found[0].path): ...

Keys are as they are stored, not percent-encoded. Options follow a `?`: `?endpoint_override=127.0.0.1:9000&scheme=http&region=us-east-1`,
`?anonymous=true` for a public bucket. A client is made when the first source names a store, so that local files cost nothing of it.
"""

import fnmatch
import functools
import glob
import os
import re
import time
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

import pyarrow as pa

from distlm.corpus.web import CHUNK
from distlm.errors import InputError, StorageError
from distlm.spec.load import nearest

OPTIONS = ("endpoint_override", "scheme", "region", "anonymous")
RANGE = 8 << 20
"""Bytes of one request for a part of an object."""
CONNECT_S, SILENT_S, CLIENT_ATTEMPTS, GOOGLE_S = 5, 15, 3, 20
"""Seconds for a connection, seconds without a byte, attempts at each request; of Google's client, the seconds of all attempts."""
ATTEMPTS, WAIT_S = 3, 0.25
"""At a part of an object, above the client's own. pyarrow loses the answer of a request for fewer bytes than the error's text has, so
that its client cannot tell a store that is busy from one that refuses, and gives up at once."""
DENIED = re.compile(r"ACCESS_DENIED|PERMISSION_DENIED|UNAUTHENTICATED|ACCESS_?KEY|SIGNATURE|(EXPIRED|INVALID)_?TOKEN|status 40[13]|"
                    "credentials|to authenticate", re.I)
UNREACHABLE = re.compile(r"NETWORK_CONNECTION|UNAVAILABLE|REQUEST_TIMEOUT|DEADLINE_EXCEEDED|curl", re.I)


@dataclass(frozen=True)
class Object:
    """What a listing says of an object."""

    path: str
    """bucket/key."""
    bytes: int
    modified: int
    """Nanoseconds since 1970; the store has whole seconds or thousandths."""


@dataclass(frozen=True)
class Store:
    """Where buckets are. It goes along with tasks, so that all nodes read from the same place, and holds no secret: each node finds its
    credentials as the store's own tools do, in the environment, in files at home or by the machine's role."""

    kind: str
    """s3 or gs."""
    endpoint: str = ""
    """host:port; empty for Amazon's or Google's own."""
    protocol: str = "https"
    region: str = ""
    anonymous: bool = False

    def uri(self, path: str) -> str:
        """How an object is called in messages and records."""
        return f"{self.kind}://{path}" + (f" at {self.endpoint}" if self.endpoint else "")

    @property
    def client(self) -> Any:
        return _client(self)

    def info(self, path: str) -> Any:
        """pyarrow's FileInfo: a file, a directory, or not found. Raises StorageError."""
        with _Asking(self, path):
            return self.client.get_file_info(path)

    def entries(self, path: str, below: bool) -> list[Any]:
        """FileInfos of a folder's entries, with `below` of all that is under it; none for a folder or a bucket that does not exist.
        Raises StorageError."""
        from pyarrow.fs import FileSelector

        with _Asking(self, path):
            try:
                return list(self.client.get_file_info(FileSelector(path, allow_not_found=True, recursive=below)))
            except OSError as error:
                if isinstance(error, FileNotFoundError) or "NO_SUCH_BUCKET" in str(error):
                    return []
                raise

    def read(self, path: str, start: int = 0, retried: Callable[[], None] = lambda: None) -> Iterator[bytes]:
        """An object's bytes from `start` on, RANGE of them at a time in memory. A connection that breaks is taken up again where it broke.
        Raises OSError for an object that is not there or that no client can name, StorageError for any other failure."""
        if {"", ".", ".."} & set(path.split("/")):
            raise OSError("a key with an empty part, . or .. cannot be read")     # the client would name another object
        file: Any = None
        state, position, failures, size = None, start, 0, 0
        while True:
            try:
                if file is None:
                    file = self.client.open_input_file(path)
                    size, before = file.size(), state
                    state = (size, file.metadata())        # the ETag is in it
                    if before not in (None, state):
                        raise StorageError("the object was changed while it was read", where=self.uri(path), remedy="go on with --resume")
                    if 0 < position < size:
                        file.seek(position)
                if position >= size:
                    return
                block = file.read(min(RANGE, size - position))
                if not block:
                    raise OSError(f"{size - position} bytes are missing at its end")
            except (OSError, pa.ArrowException) as error:
                if file is None and isinstance(error, FileNotFoundError):
                    raise FileNotFoundError(2, "No such file or directory") from None
                failures += 1
                if failures == ATTEMPTS or (file is None and DENIED.search(str(error))):
                    raise _failure(self, path, error) from None
                retried()
                time.sleep(WAIT_S * 4**(failures - 1))
                file = None                                # to be opened anew, which tells whether it is still there and the same
                continue
            position, failures = position + len(block), 0
            yield from (block[i:i + CHUNK] for i in range(0, len(block), CHUNK))
            if position >= size and position - start > RANGE:
                file = None                                # of an object in several parts, all must be of one version


class _Asking:
    """What the client raises in the block, as a StorageError of one line."""

    def __init__(self, store: Store, path: str) -> None:
        self.store, self.path = store, path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, OSError | pa.ArrowException):
            raise _failure(self.store, self.path, error) from None


def _failure(store: Store, path: str, error: BaseException) -> StorageError:
    text = " ".join(str(error).split())[:300].rstrip(". ")
    own = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, ~/.aws" if store.kind == "s3" else "GOOGLE_APPLICATION_CREDENTIALS"
    if DENIED.search(text):
        message, remedy = "access is denied, or there are no credentials", \
            f"every node needs {own} or a role of its machine; add ?anonymous=true for a public bucket"
    elif UNREACHABLE.search(text):
        name = "AWS_ENDPOINT_URL" if store.kind == "s3" else "STORAGE_EMULATOR_HOST"
        message, remedy = "the store cannot be reached", f"check the network, and {name} or ?endpoint_override=host:port&scheme=http"
    else:
        message, remedy = "the store has failed", "try again; --resume goes on where a job stopped"
    return StorageError(f"{message}: {text}", where=store.uri(path), remedy=remedy)


@functools.lru_cache
def _client(store: Store) -> Any:
    from pyarrow import fs

    given = {"endpoint_override": store.endpoint, "scheme": store.protocol} if store.endpoint else {}
    try:
        if store.kind == "gs":
            return fs.GcsFileSystem(anonymous=store.anonymous, retry_time_limit=timedelta(seconds=GOOGLE_S), **given)
        return fs.S3FileSystem(anonymous=store.anonymous, region=store.region or None, connect_timeout=CONNECT_S, request_timeout=SILENT_S,
                               retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=CLIENT_ATTEMPTS), **given)
    except ImportError as error:
        raise InputError(str(error), where=f"{store.kind}://", remedy="install pyarrow's own wheel: pip install pyarrow") from None
    except (OSError, pa.ArrowException) as error:
        raise _failure(store, "", error) from None


def parse(text: str, where: str = "") -> tuple[Store, str, bool]:
    """The store of a source, bucket/key or bucket/pattern, and whether a slash at the end says that it is a folder. Raises InputError."""
    def wrong(message: str, remedy: str) -> InputError:
        return InputError(message, where=where, remedy=remedy)

    kind, _, rest = text.partition("://")
    if kind not in ("s3", "gs"):
        raise wrong(f"there is no way to read {kind}://", "s3://, gs:// and paths that every node sees work")
    asked = re.search(r"\?([A-Za-z_]+=[^/?]*)$", rest)     # any other `?` is a glob's
    options = dict(urllib.parse.parse_qsl(asked.group(1), keep_blank_values=True)) if asked else {}
    for name in options:
        if name not in OPTIONS:
            near = nearest(name, list(OPTIONS))
            raise wrong(f"there is no option {name}", f"did you mean {near}?" if near else f"the options are {', '.join(OPTIONS)}")
    for name, values in (("scheme", ("http", "https")), ("anonymous", ("true", "false"))):
        if options.get(name, values[0]) not in values:
            raise wrong(f"{name}={options[name]} is none of {', '.join(values)}", f"give {name}={values[0]} or {name}={values[1]}")
    path = rest[:asked.start()] if asked else rest
    bucket, _, key = path.rstrip("/").partition("/")
    if not bucket or glob.has_magic(bucket) or "@" in bucket:
        raise wrong("credentials do not belong into a path" if "@" in bucket else "it names no bucket",
                    "give them by the environment; ?anonymous=true goes without" if "@" in bucket else f"write {kind}://bucket/path")
    if key and {"", ".", ".."} & set(key.split("/")):
        raise wrong("a key with an empty part, . or .. cannot be read", "name the folder above it, or copy the object")
    names = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL") if kind == "s3" else ("STORAGE_EMULATOR_HOST",)
    by_environment = next((os.environ[name] for name in names if os.environ.get(name)), "")     # which pyarrow does not look at
    protocol, _, endpoint = (options.get("endpoint_override") or by_environment).rstrip("/").rpartition("://")
    emulated = kind == "gs" and not options.get("endpoint_override") and bool(endpoint)
    store = Store(kind, endpoint, options.get("scheme") or protocol or ("http" if emulated else "https"),
                  options.get("region") or _region(kind, endpoint), options.get("anonymous", "true" if emulated else "false") == "true")
    return store, path.rstrip("/"), path.endswith("/")


def _region(kind: str, endpoint: str) -> str:
    """The environment's; for an endpoint of one's own the default, for which the client would otherwise ask the network first."""
    named = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    return (named or ("us-east-1" if endpoint else "")) if kind == "s3" else ""


def located(store: Store, path: str, where: str) -> Store:
    """The store with the bucket's own region where none is given: Amazon answers in no other. Raises InputError, StorageError."""
    if store.kind != "s3" or store.region:
        return store
    from pyarrow.fs import resolve_s3_region

    bucket = path.split("/")[0]
    try:
        with _Asking(store, bucket):
            return replace(store, region=resolve_s3_region(bucket))
    except StorageError as error:
        if "not found" in error.message or "NO_SUCH_BUCKET" in error.message:
            raise _no_bucket(bucket, where) from None
        raise


def find(store: Store, path: str, is_folder: bool, skipped: set[str], where: str) -> tuple[str, bool, list[Object]]:
    """The folder or object that names begin with, whether the path is a glob, and the objects, in order. Raises InputError for a path that
    is not there, StorageError. Patterns match as those of local files do, and a listing is asked for once."""
    is_glob = glob.has_magic(path)
    info = store.info(path)
    if info.type.name == "NotFound" and is_glob:
        parts = path.split("/")
        first = next(i for i, part in enumerate(parts) if glob.has_magic(part))
        base = _Folder(store, "/".join(parts[:first]))
        found = {item.path: item for match in base.match(parts[first:])
                 for item in (match.walk(skipped) if isinstance(match, _Folder) else [match])}
        if not found:
            _check_bucket(store, path, where)
            raise InputError("no object matches", where=where, remedy=base.alike(parts[first]) or _alike(store, base.path))
        return base.path, True, [found[key] for key in sorted(found)]
    if info.type.name == "NotFound":
        _check_bucket(store, path, where)
        raise InputError("there is no such object or folder", where=where, remedy=_alike(store, path))
    if info.type.name == "File" and not is_folder:
        return path, False, [_object(info)]
    return path, False, sorted(_Folder(store, path).walk(skipped), key=lambda item: item.path)


def _check_bucket(store: Store, path: str, where: str) -> None:
    bucket = path.split("/")[0]
    if store.info(bucket).type.name == "NotFound":
        raise _no_bucket(bucket, where)


def _no_bucket(bucket: str, where: str) -> InputError:
    return InputError(f"there is no such bucket: {bucket}", where=where, remedy="check its name, and the endpoint")


def _alike(store: Store, path: str) -> str:
    """A remedy that names what is most alike beside what does not exist. Google's store would have to list all below."""
    while "/" in path and store.kind == "s3":
        folder, _, name = path.rpartition("/")
        beside = _Folder(store, folder)
        beside.load(below=False)
        if remedy := beside.alike(name):
            return remedy
        path = folder
    return "check the path"


def _object(info: Any) -> Object:
    return Object(info.path, info.size, info.mtime_ns or 0)


@dataclass
class _Folder:
    """What is below a prefix. It is listed when it is asked for, once."""

    store: Store
    path: str
    files: dict[str, Object] = field(default_factory=dict)
    folders: dict[str, "_Folder"] = field(default_factory=dict)
    listed: bool = False

    def load(self, below: bool) -> None:
        """Fill in one level, or all `below`. In Google's store always all: pyarrow shows no folders there that are but a part of keys."""
        below = below or self.store.kind == "gs"
        if self.listed:
            for folder in self.folders.values() if below else ():
                folder.load(below)
            return
        for info in self.store.entries(self.path, below):
            *parents, name = info.path[len(self.path) + 1:].split("/")
            folder = self
            for part in parents:
                folder = folder._child(part, below)
            if info.type.name == "File":
                folder.files[name] = _object(info)
            elif name and not below:                       # one below would be listed as if it were this one
                folder._child(name, below)
        self.listed = True

    def alike(self, name: str) -> str:
        """A remedy for a name that is not among those listed; empty where there are none."""
        near, path = nearest(name, [*self.folders, *self.files]), f"{self.store.kind}://{self.path}"
        return f"did you mean {path}/{near}?" if near else f"{path} has no such name" if self.folders or self.files else ""

    def _child(self, name: str, listed: bool) -> "_Folder":
        if name not in self.folders:
            self.folders[name] = _Folder(self.store, f"{self.path}/{name}", listed=listed)
        return self.folders[name]

    def walk(self, skipped: set[str]) -> Iterator[Object]:
        """All objects, but for hidden ones and folders to be skipped."""
        self.load(below=True)
        yield from (file for name, file in self.files.items() if not name.startswith("."))
        for name, folder in self.folders.items():
            if name not in skipped and not name.startswith("."):
                yield from folder.walk(skipped)

    def match(self, pattern: list[str]) -> Iterator["_Folder | Object"]:
        """What glob.glob finds, `recursive`. What it finds twice comes twice."""
        first, *rest = pattern
        if first == "**":
            self.load(below=True)
            yield from self.match(rest) if rest else [self]
            for name, folder in self.folders.items():
                if not name.startswith("."):
                    yield from folder.match(pattern)
            if not rest:
                yield from (file for name, file in self.files.items() if not name.startswith("."))
            return
        self.load(below=False)
        for name, folder in self.folders.items():
            if _matches(name, first):
                yield from folder.match(rest) if rest else [folder]
        if not rest:
            yield from (file for name, file in self.files.items() if _matches(name, first))


def _matches(name: str, pattern: str) -> bool:
    if not glob.has_magic(pattern):
        return name == pattern
    return bool(name) and fnmatch.fnmatchcase(name, pattern) and (pattern.startswith(".") or not name.startswith("."))
