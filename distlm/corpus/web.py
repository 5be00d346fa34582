"""Pages of the web: the bodies of HTTP responses, and the text of a page in whatever encoding it came."""

import contextlib
import re
import zlib
from importlib import import_module
from typing import Any

from distlm.errors import InputError

CHUNK = 1 << 20
BEYOND_ASCII = re.compile(r"[^\x00-\x7f]")
CHARSETS = re.compile(r"(windows-|cp|iso[-_]?8859-|koi8|gb|big5|euc|shift|sjis|x-sjis|mac|iso-2022-jp|utf)[\w-]*")
"""The encodings that a page may name; Python has others, which are none of a page's."""


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
