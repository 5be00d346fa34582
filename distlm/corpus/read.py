"""From files to records: what text stands in each, whatever its format.

A file is read as a stream, whatever it holds: no line and no document is ever in memory beyond its limit, and one bad record, or a
file that breaks off, is a rejected record beside the good ones.
"""

import contextlib
import itertools
import json
import logging
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, NamedTuple

import pyarrow as pa

from distlm.corpus.columns import opened, plain
from distlm.corpus.conversations import ANSWERS, BESIDE, USER, Refused, Turns, joined, turns_of
from distlm.corpus.decompress import ERRORS
from distlm.corpus.docstrings import documented
from distlm.corpus.files import TextFile
from distlm.corpus.raw import Raw
from distlm.corpus.trees import language, tagged
from distlm.corpus.values import as_id, as_json, field_of, is_given
from distlm.corpus.warc import entries
from distlm.corpus.web import CHUNK, library, page_text
from distlm.spec.prepare import Conversations

MAX_KEYS = 20
BINARY, BINARY_CHARS = "\0" * 4, 8000
"""What says among so many characters that a file is no text but an archive or the like. A single NUL is a slip in a text."""
parse_json, raw_json = json.JSONDecoder().decode, json.JSONDecoder().raw_decode
BETWEEN = re.compile(r"[\s,]*")


class Record(NamedTuple):
    """What may become a document. Either `text` or `reason` is given. A tuple: millions of them are made."""

    number: int
    """From 0, in its file."""
    bytes: int
    """What it takes in the file, decompressed; for parquet, in the column of the text."""
    text: str = ""
    reason: str = ""
    """not_utf8, binary, malformed, missing_field, not_text, too_long, no_main_text, http_status, corrupt, unreadable, or why it is no
    conversation."""
    detail: str = ""
    documents: int = 1
    """0 where bytes stand for no document, such as a blank line between two."""
    id: str = ""
    """The source's own: the field that id_key names, or `id`; a WARC record's WARC-Record-ID."""
    meta: dict[str, Any] = {}
    """Not to be changed. The fields that the source keeps and the record has, as JSON has them; of a WARC record its url and date;
    of a file of code its path, language and license."""
    turns: Turns = ()
    """Of a conversation, whose `text` has what they say joined."""


@dataclass
class Reader:
    """Reads one file, or a range of one. The figures are complete when `records` has come to its end."""

    file: TextFile
    max_document_bytes: int
    conversations: Conversations | None = None
    """How records are conversations, if they are."""
    stream_bytes: int = 0
    """Bytes of all records together, counted as they come off the stream."""
    objects: int = 0
    """JSON objects or rows, and how many of them have the field, or all fields of a conversation."""
    with_key: int = 0
    num_records: int = 0
    """Good or rejected, and those that are no document."""
    keys: list[str] = field(default_factory=list)
    """The fields of the first object, or the columns."""
    raw: Raw = field(init=False)
    """The file's bytes, with their count and hash."""

    def __post_init__(self) -> None:
        self.raw = Raw(self.file)

    def records(self) -> Iterator[Record]:
        """Every record, good or rejected. Does not raise for what a file may hold; InputError where no reader of html is installed,
        StorageError for a store that does not give what it has."""
        formats = {"text": self._text, "json": self._json, "jsonl": self._jsonl, "parquet": self._parquet,
                   "html": self._html, "warc": self._warc, "docstrings": self._docstrings}
        taken = number = 0
        try:
            for record in formats[self.file.format]():
                taken, number = taken + record.bytes, record.number + 1
                self.num_records = record.number + max(1, record.documents)    # a broken parquet file is told once for all rows left
                yield record
        except ERRORS as error:
            self.num_records = number + 1
            yield Record(number, self.stream_bytes - taken, reason="corrupt", detail=f"breaks off: {error}")
        except OSError as error:
            self.num_records = number + 1
            yield Record(number, self.stream_bytes - taken, reason="unreadable", detail=error.strerror or str(error))
        with contextlib.suppress(OSError):                 # what a broken stream left unread belongs to the file's hash
            self.raw.hash_rest()

    def _stream(self) -> Iterator[bytes]:
        for block in self.raw.stream():
            self.stream_bytes += len(block)
            yield block

    def _whole(self, stream: Iterable[bytes] | None = None) -> tuple[bytes | None, int]:
        """The file, and its size; None for one over the limit, which is never held."""
        blocks, size = [], 0
        for block in stream or self._stream():
            size += len(block)
            if size <= self.max_document_bytes:
                blocks.append(block)
            else:
                blocks.clear()
        return (b"".join(blocks) if size <= self.max_document_bytes else None), size

    def _text(self) -> Iterator[Record]:
        data, size = self._whole()
        record = _too_long(0, size, size) if data is None else _decoded(0, size, data)
        if (place := record.text.find(BINARY, 0, BINARY_CHARS)) >= 0:
            record = Record(0, size, reason="binary", detail=f"NULs in a row at character {place}")
        if self.file.code:
            license = tagged(record.text) or self.file.license
            record = record._replace(meta={"path": self.file.name, "language": language(self.file.name), "license": license})
        yield record

    def _json(self) -> Iterator[Record]:
        """The records of an object a line; of an object that has the text field, or what makes a conversation; of an array of objects of
        which some have it. Any other JSON is one text, as settings are."""
        stream, limit = self._stream(), self._line_limit
        head = b""
        for block in stream:
            head += block
            if b"\n" in block or len(head) > limit:
                break
        line, _, rest = head.partition(b"\n")
        if isinstance(_parsed(line), dict) and rest.strip():                    # which no other JSON is
            yield from self._objects(itertools.chain([head], stream))
            return
        data, size = self._whole(itertools.chain([head], stream))
        if data is None:
            yield Record(0, size, reason="too_long", detail=f"{size} bytes; an array of records may be longer as jsonl")
            return
        record, found = _decoded(0, size, data), _parsed(data)
        values = found if isinstance(found, list) else [found]
        if not all(isinstance(value, dict) for value in values) or not any(map(self._is_record, values)):
            what = f"neither an object with {' and '.join(map(repr, self.wanted))} nor an array or lines of such"
            yield record._replace(text="", reason="malformed", detail=what) if self.conversations and not record.reason else record
            return
        if values is not found:
            yield self._value(0, size, values[0])
            return
        taken, position = 0, record.text.index("[") + 1
        for number, value in enumerate(values, 1):
            begin = BETWEEN.match(record.text, position)
            _, end = raw_json(record.text, begin.end() if begin else position)
            part = size - taken if number == len(values) else len(record.text[position:end].encode()) + (number == 1)
            yield self._value(number - 1, part, value)
            taken, position = taken + part, end

    def _docstrings(self) -> Iterator[Record]:
        """A record per documented function, and one that is no document for the rest of the file."""
        data, size = self._whole()
        whole = _too_long(0, size, size) if data is None else _decoded(0, size, data)
        try:
            found = [] if whole.reason else list(documented(whole.text))
        except ValueError as error:
            whole = whole._replace(text="", reason="malformed", detail=str(error)[:200])
        if whole.reason:
            yield whole
            return
        for number, one in enumerate(found):
            turns = ((USER, one.code), (ANSWERS, one.docstring))
            record = self._checked(number, one.bytes, joined(turns)[0], one.name, {})
            yield record if record.reason else record._replace(turns=turns)
        yield Record(len(found), size - sum(one.bytes for one in found), documents=0)

    def _html(self) -> Iterator[Record]:
        data, size = self._whole()
        yield _too_long(0, size, size) if data is None else self._page(0, size, data)

    def _page(self, number: int, size: int, data: bytes, charset: str = "", id: str = "", meta: dict[str, Any] | None = None) -> Record:
        """The record of a web page that came with this charset in its HTTP headers, if any."""
        extract = library("trafilatura", self.file.format, self.file.source).extract
        page, meta = page_text(data, charset), meta or {}
        if page is None:
            return Record(number, size, reason="not_utf8", detail="nor in the encoding that the page names", id=id, meta=meta)
        logging.getLogger("trafilatura").setLevel(logging.CRITICAL)   # a page that is none is counted here, not logged there
        try:
            text = extract(page, include_comments=False)
        except Exception as error:                         # whatever a page may do to a parser
            return Record(number, size, reason="malformed", detail=f"{type(error).__name__}: {error}"[:200], id=id, meta=meta)
        if len(page) > CHUNK:                              # its caches count lines, not their bytes
            import_module("trafilatura.meta").reset_caches()
        if not text:
            return Record(number, size, reason="no_main_text", detail=f"a page of {size} bytes", id=id, meta=meta)
        return self._checked(number, size, text, id, meta)

    def _is_record(self, value: Any) -> bool:
        return isinstance(value, dict) and all(field_of(value, key) is not None for key in self.wanted)

    def _jsonl(self) -> Iterator[Record]:
        return self._objects(self._stream())

    @property
    def _line_limit(self) -> int:
        """Bytes: an escape takes six for one, and there are other fields."""
        return 6 * self.max_document_bytes + 65536

    def _objects(self, stream: Iterable[bytes]) -> Iterator[Record]:
        """A record per line."""
        for number, (line, size) in enumerate(_lines(stream, self._line_limit)):
            if line is None:
                yield Record(number, size, reason="too_long", detail=f"a line of {size} bytes")
            elif not line or line.isspace():
                yield Record(number, size, documents=0)
            else:
                yield self._object(number, size, line)

    def _object(self, number: int, size: int, line: bytes) -> Record:
        try:
            value = parse_json(line.removeprefix(b"\xef\xbb\xbf").decode())
        except UnicodeDecodeError as error:
            return Record(number, size, reason="not_utf8", detail=f"byte {error.start}: {error.reason}")
        except (ValueError, RecursionError) as error:
            return Record(number, size, reason="malformed", detail=str(error))
        if not isinstance(value, dict):
            return Record(number, size, reason="malformed", detail=f"a {type(value).__name__}, not an object")
        return self._value(number, size, value)

    def _value(self, number: int, size: int, value: dict[str, Any]) -> Record:
        self.objects += 1
        file = self.file
        self.keys = self.keys or sorted(value)[:MAX_KEYS]
        id = as_id(field_of(value, file.id_key or "id"))
        meta = {key: as_json(kept) for key in file.keep if (kept := field_of(value, key)) is not None} if file.keep else {}
        lost = [key for key in self._beside if is_given(value.get(key))]
        return self._said(number, size, [field_of(value, key) for key in self.wanted], id, meta, lost)

    @property
    def wanted(self) -> tuple[str, ...]:
        """The fields or columns that make a document."""
        return self.conversations.keys if self.conversations else (self.file.text_key,)

    @property
    def _beside(self) -> tuple[str, ...]:
        """The fields or columns with which a record is no conversation that can be taken."""
        return BESIDE if self.conversations else ()

    def _said(self, number: int, size: int, values: list[Any], id: str, meta: dict[str, Any], lost: list[str]) -> Record:
        """The record of the values of the wanted fields, beside which it has those that would be lost."""
        if missing := [key for key, value in zip(self.wanted, values, strict=True) if value is None]:
            return Record(number, size, reason="missing_field", detail=f"no {missing[0]!r}", id=id, meta=meta)
        self.with_key += 1
        if not self.conversations:
            return self._checked(number, size, values[0], id, meta)
        if lost:
            return Record(number, size, reason="tools", detail=f"it has {lost[0]}, which would be lost", id=id, meta=meta)
        try:
            turns = turns_of(values, self.conversations)
        except Refused as refused:
            return Record(number, size, reason=refused.reason, detail=refused.detail, id=id, meta=meta)
        record = self._checked(number, size, joined(turns)[0], id, meta)
        return record if record.reason else record._replace(turns=turns)

    def _checked(self, number: int, size: int, text: Any, id: str, meta: dict[str, Any]) -> Record:
        if isinstance(text, bytes):
            return _too_long(number, size, len(text), id, meta) if len(text) > self.max_document_bytes else \
                _decoded(number, size, text, id, meta)
        if not isinstance(text, str):
            detail = f"{self.file.text_key!r} is a {type(text).__name__}"
            return Record(number, size, reason="not_text", detail=detail, id=id, meta=meta)
        try:
            length = len(text) if text.isascii() else len(text.encode())
        except UnicodeEncodeError as error:                # a lone surrogate, "\ud800", is no text
            return Record(number, size, reason="not_utf8", detail=f"character {error.start}: {error.reason}", id=id, meta=meta)
        if length > self.max_document_bytes:
            return _too_long(number, size, length, id, meta)
        return Record(number, size, text, id=id, meta=meta)

    def _parquet(self) -> Iterator[Record]:
        with self.raw.seekable() as source:
            yield from self._rows(source)

    def _rows(self, source: Any) -> Iterator[Record]:
        number = rows = 0
        try:
            with opened(source, self.file.begin, self.file.end) as columns:
                self.keys, self.objects = columns.names[:MAX_KEYS], columns.num_rows
                rows = columns.num_rows
                if missing := [key for key in self.wanted if not columns.has(key)]:
                    yield from (Record(i, 0, reason="missing_field", detail=f"no column {missing[0]!r}") for i in range(rows))
                    return
                id_key = self.file.id_key or "id"
                for row in columns.rows([*self.wanted, id_key, *self.file.keep, *self._beside]):
                    id = as_id(plain(row[id_key])) if id_key in row else ""
                    meta = {key: as_json(plain(row[key])) for key in self.file.keep if key in row}
                    lost = [key for key in self._beside if key in row and is_given(plain(row[key]))]
                    yield self._row(number, [row[key] for key in self.wanted], id,
                                    {key: value for key, value in meta.items() if value is not None}, lost)
                    number += 1
        except (pa.ArrowException, OSError, ValueError, LookupError, MemoryError) as error:      # whatever is left of the file
            yield Record(number, 0, reason="corrupt", detail=str(error).split("\n")[0], documents=max(1, rows - number))

    def _row(self, number: int, row: list[Any], id: str, meta: dict[str, Any], lost: list[str]) -> Record:
        if self.conversations:
            try:
                values = [value.as_py() for value in row]
            except UnicodeDecodeError as error:
                return Record(number, 0, reason="not_utf8", detail=f"byte {error.start}: {error.reason}", id=id, meta=meta)
            size = len(json.dumps(values, ensure_ascii=False, default=str).encode())     # columns do not tell what a row takes in them
            self.stream_bytes += size
            return self._said(number, size, values, id, meta, lost)
        value = row[0]
        if not value.is_valid:
            return Record(number, 0, reason="missing_field", detail=f"no {self.file.text_key!r}", id=id, meta=meta)
        self.with_key += 1
        if isinstance(value, pa.DictionaryScalar):
            value = value.value
        size = value.as_buffer().size if isinstance(value, pa.BinaryScalar) else 0      # which a string is, too
        self.stream_bytes += size
        if size > self.max_document_bytes:
            return _too_long(number, size, size, id, meta)
        try:
            return self._checked(number, size, value.as_py(), id, meta)
        except UnicodeDecodeError as error:
            return Record(number, size, reason="not_utf8", detail=f"byte {error.start}: {error.reason}", id=id, meta=meta)

    def _warc(self) -> Iterator[Record]:
        library("warcio", self.file.format, self.file.source)
        for number, one in enumerate(entries(self._stream(), self.max_document_bytes)):
            if one.page is not None:
                yield self._page(number, one.size, one.page, one.charset, one.id, one.meta)
            elif one.text is not None:
                yield _decoded(number, one.size, one.text, one.id, one.meta)
            else:
                yield Record(number, one.size, reason=one.reason, detail=one.detail, documents=one.documents, id=one.id, meta=one.meta)


def _too_long(number: int, size: int, length: int, id: str = "", meta: dict[str, Any] | None = None) -> Record:
    return Record(number, size, reason="too_long", detail=f"{length} bytes", id=id, meta=meta or {})


def _decoded(number: int, size: int, data: bytes, id: str = "", meta: dict[str, Any] | None = None) -> Record:
    try:
        return Record(number, size, data.decode("utf-8-sig"), id=id, meta=meta or {})
    except UnicodeDecodeError as error:
        return Record(number, size, reason="not_utf8", detail=f"byte {error.start}: {error.reason}", id=id, meta=meta or {})


def _parsed(data: bytes) -> Any:
    """The value of JSON; None for what is none."""
    try:
        return parse_json(data.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return None


def _lines(blocks: Iterable[bytes], limit: int) -> Iterator[tuple[bytes | None, int]]:
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
