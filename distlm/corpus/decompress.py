"""Compressed files as streams: whatever a file expands to, no more than a few megabytes of it are in memory at a time.

    for block in decompress(".gz", read_blocks(path)): ...

A file may hold several members. Damaged data raises one of ERRORS after everything that stands before the damage.
"""

import bz2
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import zstandard

ENDINGS = (".gz", ".zst", ".bz2", ".xz")
BLOCK = 1 << 20
XZ_MEMORY = 1 << 28
"""Bytes that a dictionary may take; `xz -9` needs 67 MB. A file that asks for more is damaged, or made to harm."""
ZSTD_SLICE = 128
"""Bytes that are given to zstd at a time. It has no limit for what comes out, and four bytes may stand for 128 KiB: 4 MiB at most."""


FREE_BYTES, MAX_RATIO = 1 << 30, 1000
"""Beyond so many bytes a file is made to harm if it expands to more than so many times what has been read of it. Text expands to 2 to 10
times its size, gzip at most to 1,032; bz2 to a million, and a megabyte of it would take an hour."""


class DamagedError(Exception):
    """Not what the file's ending says, or no longer; or made to harm."""


ERRORS = (DamagedError, EOFError, zlib.error, zstandard.ZstdError, lzma.LZMAError)


def decompress(ending: str, blocks: Iterable[bytes]) -> Iterator[bytes]:
    """What the blocks of a file hold, in blocks of bounded size; as it stands for an ending that is none of ENDINGS. Raises ERRORS, which
    more than MAX_RATIO times as many bytes are, too."""
    readers: dict[str, Callable[[Iterable[bytes]], Iterator[bytes]]] = {".gz": gunzip, ".zst": unzstd, ".bz2": bunzip, ".xz": unxz}
    return _bounded(readers[ending], blocks) if ending in readers else iter(blocks)


def _bounded(reader: Callable[[Iterable[bytes]], Iterator[bytes]], blocks: Iterable[bytes]) -> Iterator[bytes]:
    taken = given = 0

    def counted() -> Iterator[bytes]:
        nonlocal taken
        for block in blocks:
            taken += len(block)
            yield block

    for block in reader(counted()):
        yield block
        given += len(block)
        if given > max(FREE_BYTES, MAX_RATIO * taken):
            raise DamagedError(f"{taken:,} bytes expand to more than {MAX_RATIO:,} times as many, over {FREE_BYTES:,} in all")


def gunzip(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """Raises zlib.error or EOFError. Zeros between members are allowed, as padding."""
    member, begun = zlib.decompressobj(31), False
    for data in blocks:
        while data:
            if member.eof:
                member, begun = zlib.decompressobj(31), False
                data = data.lstrip(b"\0")
                continue
            begun = True
            text = member.decompress(data, BLOCK)
            data = member.unused_data if member.eof else member.unconsumed_tail
            if text:
                yield text
    if begun and not member.eof:
        raise EOFError("the gzip data ends before its end mark")


def bunzip(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """Raises DamagedError or EOFError."""
    return _members(blocks, bz2.BZ2Decompressor, "bz2")


def unxz(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """Raises lzma.LZMAError or EOFError. Zeros between streams are allowed, as padding."""
    return _members(blocks, lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=XZ_MEMORY), "xz", b"\0")


def _members(blocks: Iterable[bytes], new: Callable[[], Any], name: str, padding: bytes = b"") -> Iterator[bytes]:
    member, begun = new(), False
    for data in blocks:
        while data or not (member.eof or member.needs_input):
            if member.eof:
                member, begun = new(), False
                data = data.lstrip(padding) if padding else data
                continue
            begun = True
            try:
                text = member.decompress(data, BLOCK)
            except OSError as error:                       # which bz2 raises for its data, as if the disk were broken
                raise DamagedError(f"{name}: {error}") from None
            data = member.unused_data if member.eof else b""
            if text:
                yield text
    if begun and not member.eof:
        raise EOFError(f"the {name} data ends before its end mark")


def unzstd(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """Raises ZstdError or EOFError. The window that a frame asks for, 128 MiB at most, is allocated besides."""
    frame, begun = zstandard.ZstdDecompressor().decompressobj(), False
    for block in blocks:
        for start in range(0, len(block), ZSTD_SLICE):
            data = block[start:start + ZSTD_SLICE]
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
