"""Pages and archives of the web: a WARC's bytes as lines and blocks of bounded size, HTTP bodies, and the text of a page."""

import contextlib
import re
import zlib
from collections.abc import Iterator
from importlib import import_module
from typing import Any

from distlm.corpus.decompress import ERRORS
from distlm.errors import InputError

CHUNK = 1 << 20
HEAD_BYTES = 1 << 16
"""Of a WARC record's headers, and of the HTTP headers in it."""
BEYOND_ASCII = re.compile(r"[^\x00-\x7f]")
CHARSETS = re.compile(r"(windows-|cp|iso[-_]?8859-|koi8|gb|big5|euc|shift|sjis|x-sjis|mac|iso-2022-jp|utf)[\w-]*")
"""The encodings that a page may name; Python has others, which are none of a page's."""


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


def decoded_body(data: bytes, encoding: str, limit: int) -> bytes | None:
    """At most `limit` bytes of an HTTP body; None for an encoding that is not read. Raises ERRORS. Archives of decoded bodies that
    left the header as it was are common."""
    if encoding in ("", "identity"):
        return data
    if encoding in ("gzip", "x-gzip"):
        return data if data[:2] != b"\x1f\x8b" else zlib.decompressobj(31).decompress(data, limit)
    if encoding == "deflate":                              # with zlib's header, as RFC 9110 says, or without, as some servers do
        if data.lstrip()[:1] == b"<":
            return data
        with contextlib.suppress(zlib.error):
            return zlib.decompressobj(15).decompress(data, limit)
        return zlib.decompressobj(-15).decompress(data, limit)
    return data if data.lstrip()[:1] == b"<" else None


def page_text(data: bytes, charset: str) -> str | None:
    """A page as text: in UTF-8 where it is that, else in the encoding that its headers or it names, else in the likeliest. One bad byte
    among ten characters beyond ASCII becomes U+FFFD, as in a browser: a guess would turn them all into others."""
    named = re.search(rb"""<meta[^>]{0,200}?charset\s*=\s*["']?\s*([\w-]{1,40})""", data[:4096], re.IGNORECASE)
    names = ["utf-8-sig", charset, named.group(1).decode("ascii", "replace").lower() if named else ""]
    names = ["windows-1252" if name in ("iso-8859-1", "us-ascii", "ascii", "latin1") else name for name in names]     # as browsers read it
    names = [name for name in names if CHARSETS.fullmatch(name)]
    for name in names:
        with contextlib.suppress(LookupError, UnicodeError):
            return data.decode(name)
    for name in names:
        with contextlib.suppress(LookupError, UnicodeError):
            text = data.decode(name, "replace")
            if 11 * text.count("\ufffd") <= len(BEYOND_ASCII.findall(text)):
                return text
    for name in import_module("trafilatura.utils").detect_encoding(data[:CHUNK]):
        with contextlib.suppress(LookupError, UnicodeError):
            return data.decode(name)
    return None


def library(module: str, format: str, source: int) -> Any:
    """A module of the extra `web`. Raises InputError where it is not installed."""
    try:
        return import_module(module)
    except ImportError as error:
        raise InputError(f"reading {format} needs {module.split('.')[0]} ({error})".replace("\n", " "),
                         where=f"sources.{source}.format", remedy="pip install distlm[web]") from None
