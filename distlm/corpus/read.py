"""From paths to records: which files the sources name, and what text stands in them.

A file is read as a stream, whatever it holds: no line and no document is ever in memory beyond its limit, and one bad record, or a
file that breaks off, is a rejected record beside the good ones.
"""

import contextlib
import glob
import gzip
import json
import os
import sysconfig
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
import zstandard

from distlm.errors import InputError
from distlm.spec.load import nearest
from distlm.spec.prepare import Source

SKIPPED_FOLDERS = {"__pycache__"}
SKIPPED_STDLIB = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
"""The tests of the standard library are 60 % of its bytes, and much of them is data."""
CHUNK = 1 << 20
MAX_KEYS = 20


@dataclass(frozen=True)
class TextFile:
    """A file to be read."""

    path: str
    name: str
    """How the manifest calls it: the last part of the source's path, and what is below. The same on every host."""
    format: str
    """text, jsonl or parquet."""
    text_key: str
    source: int
    """The source it belongs to, by its place in the spec."""
    bytes: int


@dataclass(frozen=True)
class Record:
    """What may become a document. Either `text` or `reason` is given."""

    number: int
    """From 0, in its file."""
    bytes: int
    """What it takes in the file, decompressed; for parquet, in the column."""
    text: str = ""
    reason: str = ""
    """not_utf8, malformed, missing_field, not_text, too_long, corrupt or unreadable."""
    detail: str = ""
    documents: int = 1
    """0 where bytes stand for no document, such as a blank line between two."""


def find_files(sources: list[Source]) -> list[TextFile]:
    """Every file that the sources name, in an order that does not depend on theirs. Raises InputError for one that names none."""
    found = [file for i, source in enumerate(sources) for file in _find(i, source)]
    return sorted(found, key=lambda file: (file.name, file.bytes, file.path, file.format, file.text_key))


def source_name(source: Source) -> str:
    """What the manifest calls a source."""
    return source.path if source.path == "stdlib" else _base(source.path)[0].name


def _base(text: str) -> tuple[Path, bool]:
    """The path, or the deepest folder of a glob before its first pattern; and whether it is a glob."""
    path = Path(os.path.abspath(os.path.expanduser(text)))
    if path.exists() or not glob.has_magic(text):
        return path, False
    parts = path.parts
    first = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    return Path(*parts[:first]), True


def _find(index: int, source: Source) -> Iterator[TextFile]:
    where = f"sources.{index}.path: {source.path}"
    if "://" in source.path:
        raise InputError("object stores are not supported yet", where=where, remedy="name a file or folder that every node sees")
    if source.path == "stdlib":
        base, is_glob = Path(sysconfig.get_path("stdlib")), False
        paths = [path for path in _walk(base, SKIPPED_STDLIB) if path.suffix == ".py"]
    else:
        base, is_glob = _base(source.path)
        pattern = os.path.abspath(os.path.expanduser(source.path))
        matches = [Path(match) for match in glob.glob(pattern, recursive=True)] if is_glob else [base]
        if not is_glob and not base.exists():
            raise InputError("there is no such file or folder", where=where, remedy=_nearest(base))
        paths = sorted({path for match in matches for path in (_walk(match, SKIPPED_FOLDERS) if match.is_dir() else [match])})
    if not paths:
        raise InputError("no file matches" if is_glob else "the folder holds no file", where=where,
                         remedy=_nearest(base) if is_glob else "hidden files and __pycache__ are passed over; name another folder")
    name = source_name(source)
    for path in paths:
        below = "" if path == base else "/" + path.relative_to(base).as_posix()
        size = path.stat().st_size if path.is_file() else 0    # a broken link or a pipe is rejected when it is read
        yield TextFile(str(path), name + below, _format(path, source), source.text_key, index, size)


def _walk(folder: Path, skipped: set[str]) -> Iterator[Path]:
    for root, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if name not in skipped and not name.startswith("."))
        for name in sorted(files):
            if not name.startswith("."):
                yield Path(root, name)


def _format(path: Path, source: Source) -> str:
    if source.format != "auto":
        return source.format
    ending = Path(path.stem if path.suffix in (".gz", ".zst") else path.name).suffix.lower()
    return {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}.get(ending, "text")


def _nearest(path: Path) -> str:
    """A remedy that names what is most alike beside the path that does not exist."""
    folder = path.parent
    while not folder.is_dir():
        path, folder = folder, folder.parent
    near = nearest(path.name, ["stdlib", *(item.name for item in folder.iterdir())])
    return f"did you mean {near if near == 'stdlib' else folder / near}?" if near else "paths are taken relative to where the job starts"


@dataclass
class Reader:
    """Reads one file. The figures are complete when `records` has come to its end."""

    file: TextFile
    max_document_bytes: int
    raw_bytes: int = 0
    """Bytes on disk."""
    stream_bytes: int = 0
    """Bytes of all records together, counted as they come off the stream."""
    objects: int = 0
    """JSON objects or rows, and how many of them have the field."""
    with_key: int = 0
    keys: list[str] = field(default_factory=list)
    """The fields of the first object, or the columns."""
    digest: Any = field(default_factory=xxhash.xxh3_64)

    def records(self) -> Iterator[Record]:
        """Every record, good or rejected. Does not raise for what a file may hold."""
        taken = number = 0
        try:
            for record in {"text": self._text, "jsonl": self._jsonl, "parquet": self._parquet}[self.file.format]():
                taken, number = taken + record.bytes, record.number + 1
                yield record
        except (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
            yield Record(number, self.stream_bytes - taken, reason="corrupt", detail=f"breaks off: {error}")
        except OSError as error:
            yield Record(number, self.stream_bytes - taken, reason="unreadable", detail=error.strerror or str(error))
        with contextlib.suppress(OSError):                 # what a broken stream left unread belongs to the file's hash
            for _ in self._raw(self.raw_bytes):
                pass

    def _raw(self, start: int = 0, chunk: int = CHUNK) -> Iterator[bytes]:
        if not os.path.isfile(self.file.path):
            raise OSError("no such file, or not a regular one")
        with open(self.file.path, "rb") as file:
            file.seek(start)
            while block := file.read(chunk):
                self.raw_bytes += len(block)
                self.digest.update(block)
                yield block

    def _stream(self) -> Iterator[bytes]:
        """The file's bytes, decompressed, in blocks of bounded size."""
        ending = Path(self.file.path).suffix
        for block in _gunzip(self._raw()) if ending == ".gz" else _unzstd(self._raw(chunk=4096)) if ending == ".zst" else self._raw():
            self.stream_bytes += len(block)
            yield block

    def _text(self) -> Iterator[Record]:
        blocks, size = [], 0
        for block in self._stream():
            size += len(block)
            if size <= self.max_document_bytes:
                blocks.append(block)
            else:
                blocks.clear()
        if size > self.max_document_bytes:
            yield Record(0, size, reason="too_long", detail=f"{size} bytes")
            return
        yield _decoded(0, size, b"".join(blocks))

    def _jsonl(self) -> Iterator[Record]:
        limit = 2 * self.max_document_bytes + 65536        # escapes and other fields make a line longer than its text
        for number, (line, size) in enumerate(_lines(self._stream(), limit)):
            if line is None:
                yield Record(number, size, reason="too_long", detail=f"a line of {size} bytes")
            elif not line.strip():
                yield Record(number, size, documents=0)
            else:
                yield self._object(number, size, line)

    def _object(self, number: int, size: int, line: bytes) -> Record:
        try:
            value = json.loads(line.removeprefix(b"\xef\xbb\xbf").decode())
        except UnicodeDecodeError as error:
            return Record(number, size, reason="not_utf8", detail=f"byte {error.start}: {error.reason}")
        except (ValueError, RecursionError) as error:
            return Record(number, size, reason="malformed", detail=str(error))
        if not isinstance(value, dict):
            return Record(number, size, reason="malformed", detail=f"a {type(value).__name__}, not an object")
        self.objects += 1
        self.keys = self.keys or sorted(value)[:MAX_KEYS]
        if value.get(self.file.text_key) is None:
            return Record(number, size, reason="missing_field", detail=f"no {self.file.text_key!r}")
        self.with_key += 1
        return self._checked(number, size, value[self.file.text_key])

    def _checked(self, number: int, size: int, text: Any) -> Record:
        if isinstance(text, bytes):
            return _decoded(number, size, text) if len(text) <= self.max_document_bytes else \
                Record(number, size, reason="too_long", detail=f"{len(text)} bytes")
        if not isinstance(text, str):
            return Record(number, size, reason="not_text", detail=f"{self.file.text_key!r} is a {type(text).__name__}")
        try:
            length = len(text.encode())
        except UnicodeEncodeError as error:                # a lone surrogate, "\ud800", is no text
            return Record(number, size, reason="not_utf8", detail=f"character {error.start}: {error.reason}")
        if length > self.max_document_bytes:
            return Record(number, size, reason="too_long", detail=f"{length} bytes")
        return Record(number, size, text)

    def _parquet(self) -> Iterator[Record]:
        for _ in self._raw():
            pass
        number = rows = 0
        try:
            with pq.ParquetFile(self.file.path) as file:
                self.keys, rows = file.schema_arrow.names[:MAX_KEYS], file.metadata.num_rows
                self.objects = rows
                if self.file.text_key not in file.schema_arrow.names:
                    yield from (Record(i, 0, reason="missing_field", detail=f"no column {self.file.text_key!r}") for i in range(rows))
                    return
                for batch in file.iter_batches(batch_size=256, columns=[self.file.text_key]):
                    for value in batch.column(0):
                        yield self._row(number, value.as_py())
                        number += 1
        except (pa.ArrowException, OSError) as error:      # whatever is left of the file
            yield Record(number, 0, reason="corrupt", detail=str(error).split("\n")[0], documents=max(1, rows - number))

    def _row(self, number: int, value: Any) -> Record:
        if value is None:
            return Record(number, 0, reason="missing_field", detail=f"no {self.file.text_key!r}")
        self.with_key += 1
        size = len(value) if isinstance(value, bytes) else len(value.encode()) if isinstance(value, str) else 0
        self.stream_bytes += size
        return self._checked(number, size, value)


def _decoded(number: int, size: int, data: bytes) -> Record:
    try:
        return Record(number, size, data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return Record(number, size, reason="not_utf8", detail=f"byte {error.start}: {error.reason}")


def _lines(blocks: Iterator[bytes], limit: int) -> Iterator[tuple[bytes | None, int]]:
    """(line, bytes with its line feed); None for a line longer than `limit` bytes, which is never held."""
    pending, passed = b"", 0
    for block in blocks:
        start = 0
        while (end := block.find(b"\n", start)) >= 0:
            size = passed + len(pending) + end + 1 - start
            yield None if size > limit else pending + block[start:end], size
            pending, passed, start = b"", 0, end + 1
        pending += block[start:]
        if passed + len(pending) > limit:
            pending, passed = b"", passed + len(pending)
    if passed or pending:
        yield None if passed else pending, passed + len(pending)


def _gunzip(blocks: Iterator[bytes]) -> Iterator[bytes]:
    """Raises zlib.error or EOFError for damaged data. A file may hold several members."""
    member, data = zlib.decompressobj(31), b""
    begun = False
    for block in blocks:
        data = block
        while data:
            if member.eof:
                member, begun = zlib.decompressobj(31), False
                data = data.lstrip(b"\0")                  # padding between members is allowed
                continue
            begun = True
            text = member.decompress(data, CHUNK)
            data = member.unused_data if member.eof else member.unconsumed_tail
            if text:
                yield text
    if begun and not member.eof:
        raise EOFError("the gzip data ends before its end mark")


def _unzstd(blocks: Iterator[bytes]) -> Iterator[bytes]:
    """Raises ZstdError or EOFError for damaged data. Small blocks in bound what comes out: a block grows 32,768 times at most."""
    frame, begun = zstandard.ZstdDecompressor().decompressobj(), False
    for block in blocks:
        data = block
        while data:
            if frame.eof:
                frame = zstandard.ZstdDecompressor().decompressobj()
            begun = True
            text = frame.decompress(data)
            data = frame.unused_data if frame.eof else b""
            if text:
                yield text
    if begun and not frame.eof:
        raise EOFError("the zstd data ends before its end mark")
