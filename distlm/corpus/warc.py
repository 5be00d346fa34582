"""A WARC or WET archive as a stream: the page or the text that each of its records gives, or why it gives none.

    for entry in entries(blocks, limit): ...
"""

import io
import re
from collections.abc import Iterator
from importlib import import_module
from typing import Any, NamedTuple

from distlm.corpus.decompress import ERRORS
from distlm.corpus.values import utf8
from distlm.corpus.web import CHUNK, decoded_body

HEAD_BYTES = 1 << 16
"""Of a record's headers, and of the HTTP headers in it."""


class Entry(NamedTuple):
    """What a record gives: `page`, `text`, a `reason` for neither, or no document."""

    size: int = 0
    """What it takes in the archive, decompressed, with the empty lines after it."""
    page: bytes | None = None
    charset: str = ""
    """That of the page's HTTP headers, if any."""
    text: bytes | None = None
    reason: str = ""
    detail: str = ""
    documents: int = 1
    """0 for a record that is no document, such as a request."""
    id: str = ""
    """Its WARC-Record-ID."""
    meta: dict[str, Any] = {}
    """Not to be changed. Its url and date, where it has them."""


def entries(blocks: Iterator[bytes], limit: int) -> Iterator[Entry]:
    """An entry for each record of the archive whose bytes come in `blocks`, decompressed; where none begins, all up to the next is
    malformed. No page and no text of more than `limit` bytes is held. Raises ERRORS or OSError where the archive breaks off. warcio is
    installed."""
    data, end = Data(blocks), 0
    line = data.next_line()
    while line:
        found = _entry(data, line, limit) if line.startswith(b"WARC/") else None
        line = data.next_line()
        if found is None:
            while line and not line.startswith(b"WARC/"):
                line = data.line()
            data.check(bool(line))
            found = Entry(reason="malformed", detail="no WARC record that says its length")
        size = data.position - len(line) - end
        yield found._replace(size=size)
        end += size
    data.check(bool(line))
    if data.position > end:
        yield Entry(data.position - end, documents=0)


def _entry(data: "Data", line: bytes, limit: int) -> Entry | None:
    """What the record that begins with `line` gives; None where nobody knows where it ends."""
    head = data.head(line)
    if head is None:
        return None
    headers = import_module("warcio.statusandheaders").StatusAndHeadersParser(["WARC/"]).parse(io.BytesIO(head))
    length = (headers.get_header("Content-Length") or "").strip()
    if not re.fullmatch("[0-9]{1,18}", length):
        return None
    left = int(length)
    kind = (headers.get_header("WARC-Type") or "").lower(), (headers.get_header("Content-Type") or "").lower()
    is_response = kind[0] == "response" and kind[1].startswith("application/http")
    is_text = kind[0] == "conversion" and kind[1].startswith("text/plain")                   # as WET files have them
    too_long = left > limit + HEAD_BYTES * is_response
    block = data.read(min(left, HEAD_BYTES) if too_long else left) if is_response or is_text else b""
    data.skip(left - len(block))
    if not is_response and not is_text:
        return Entry(documents=0)
    if is_response:
        found = _response(block, too_long, limit)
    else:
        found = Entry(reason="too_long", detail=f"{length} bytes") if too_long else Entry(text=block)
    facts = {"url": (headers.get_header("WARC-Target-URI") or "").strip("<>"), "date": headers.get_header("WARC-Date") or ""}
    meta = {key: utf8(fact) for key, fact in facts.items() if fact}
    return found._replace(id=utf8(headers.get_header("WARC-Record-ID") or ""), meta=meta)


def _response(block: bytes, too_long: bool, limit: int) -> Entry:
    """The page in an HTTP response, of which `block` is only the beginning where it is too long."""
    warc = import_module("warcio.statusandheaders")
    body = io.BytesIO(block)
    try:
        headers = warc.StatusAndHeadersParser(["HTTP/"]).parse(body)
    except (warc.StatusAndHeadersParserException, EOFError):
        return Entry(reason="malformed", detail="no HTTP response")
    kind, _, charset = (headers.get_header("Content-Type") or "").lower().partition("charset=")
    if kind.split(";")[0].strip() not in ("text/html", "application/xhtml+xml"):
        return Entry(documents=0)
    status = headers.statusline.partition(" ")[2].strip()                                    # behind the version
    if not re.match(r"2\d\d(?!\S)", status):
        return Entry(reason="http_status", detail=utf8(status[:200]) or "no status")
    longer = Entry(reason="too_long", detail=f"a page of over {limit} bytes")
    if too_long:
        return longer
    is_chunked = (headers.get_header("Transfer-Encoding") or "").lower() == "chunked"
    page = (import_module("warcio.bufferedreaders").ChunkedDataReader(body) if is_chunked else body).read()
    encoding = headers.get_header("Content-Encoding") or ""
    try:
        page = decoded_body(page, encoding.strip().lower(), limit + 1)
    except ERRORS as error:
        return Entry(reason="malformed", detail=f"Content-Encoding: {error}")
    if page is None:
        return Entry(reason="malformed", detail=f"Content-Encoding: {encoding} cannot be read"[:200])
    return longer if len(page) > limit else Entry(page=page, charset=charset.split(";")[0].strip(" \"'"))


class Data:
    """A stream's bytes as a file. It ends where the stream breaks off, so that what stands before is read; `check` raises the cause.
    No line is longer than HEAD_BYTES: a longer one comes in pieces."""

    def __init__(self, blocks: Iterator[bytes]) -> None:
        self.blocks, self.block, self.start, self.position = blocks, b"", 0, 0
        self.error: Exception | None = None

    def check(self, more: bool) -> None:
        """Raises what broke the stream, if it is at its end."""
        if self.error and not more:
            raise self.error

    def _fill(self) -> None:
        if self.start == len(self.block) and not self.error:
            self.block, self.start = b"", 0
            try:
                self.block = next(self.blocks, b"")
            except (*ERRORS, OSError) as error:
                self.error = error

    def _some(self, size: int) -> bytes:
        """At least one byte, at most `size`; nothing at the end."""
        self._fill()
        part = self.block[self.start:self.start + size]
        self.start, self.position = self.start + len(part), self.position + len(part)
        return part

    def line(self) -> bytes:
        parts, size = [], 0
        while size < HEAD_BYTES:
            self._fill()
            end = self.block.find(b"\n", self.start) + 1 or len(self.block)
            parts.append(self._some(min(end - self.start, HEAD_BYTES - size)))
            size += len(parts[-1])
            if not parts[-1] or parts[-1].endswith(b"\n"):
                break
        return b"".join(parts)

    def next_line(self) -> bytes:
        """The next line that is not empty; nothing at the end."""
        while (line := self.line()) and not line.strip():
            pass
        return line

    def head(self, line: bytes) -> bytes | None:
        """This line and those after it, up to an empty one; None for more than HEAD_BYTES, of which the rest is left unread. Raises
        EOFError, or what broke the stream."""
        lines, size = [line], len(line)
        while size <= HEAD_BYTES:
            line = self.line()
            self._more(line, "in the headers of a record")
            lines.append(line)
            size += len(line)
            if not line.strip():
                return b"".join(lines)
        return None

    def read(self, size: int) -> bytes:
        """Raises EOFError, or what broke the stream."""
        parts = []
        while size:
            parts.append(self._some(size))
            self._more(parts[-1], f"{size} bytes before a record's end")
            size -= len(parts[-1])
        return b"".join(parts)

    def skip(self, size: int) -> None:
        """Raises EOFError, or what broke the stream."""
        while size:
            size -= len(self.read(min(size, CHUNK)))

    def _more(self, part: bytes, where: str) -> None:
        self.check(bool(part))
        if not part:
            raise EOFError(f"the archive ends {where}")
