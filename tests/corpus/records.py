"""Records as tests read them from files, and pages to read."""

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import xxhash
import zstandard

from distlm.corpus.files import find_files
from distlm.corpus.read import Reader, Record
from distlm.spec.prepare import Source

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor(write_checksum=True).compress, ".bz2": bz2.compress,
    ".xz": lambda data: lzma.compress(data, preset=0)}
STORY = ["A paragraph of a story that is told with so many words that it is taken for the text of its page.",
         "A second one follows it, which says no more than the first, in other words, and about as many."]
MENU = b"<nav><a href=/>Home</a> <a href=/shop>Shop</a></nav>"


def read(path: Path, limit: int = 10_000_000, **source: Any) -> tuple[list[Record], Reader]:
    """Every record; the file's hash and the accounts hold whatever it is."""
    (file,) = find_files([Source(path=str(path), **source)])
    reader = Reader(file, limit)
    records = list(reader.records())
    assert sum(record.bytes for record in records) == reader.stream_bytes
    assert reader.raw.num_bytes == path.stat().st_size
    assert reader.raw.digest.hexdigest() == xxhash.xxh3_64(path.read_bytes()).hexdigest()
    return records, reader


def reasons(records: list[Record]) -> list[str]:
    return [record.reason or record.text for record in records if record.documents]


def lines(*values: Any) -> bytes:
    return b"".join(value if isinstance(value, bytes) else json.dumps(value).encode() + b"\n" for value in values)


def page(*paragraphs: str, head: str = "", encoding: str = "utf-8") -> bytes:
    text = "".join(f"<p>{paragraph}</p>" for paragraph in paragraphs or STORY)
    before, after = f"<html><head>{head}<title>T</title></head><body>", "<footer>Imprint</footer></body></html>"
    return (before + MENU.decode() + f"<article><h1>A title</h1>{text}</article>" + after).encode(encoding)
