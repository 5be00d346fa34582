import bz2
import gzip
import lzma
import os
import resource
import tracemalloc
import zlib
from collections.abc import Callable, Iterator

import pytest
import zstandard

from distlm.corpus.decompress import ENDINGS, ERRORS, decompress

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor(write_checksum=True).compress, ".bz2": bz2.compress,
    ".xz": lambda data: lzma.compress(data, preset=0)}
each = pytest.mark.parametrize("ending", ENDINGS)


def cut(data: bytes, size: int = 1 << 20) -> Iterator[bytes]:
    for start in range(0, len(data), size):
        yield data[start:start + size]


def read(ending: str, data: bytes, size: int = 1 << 20) -> tuple[bytes, bool]:
    """What can be read, and whether that is all."""
    blocks = []
    try:
        for block in decompress(ending, cut(data, size)):
            blocks.append(block)
    except ERRORS:
        return b"".join(blocks), False
    return b"".join(blocks), True


def zeros(ending: str, megabytes: int) -> bytes:
    """A bomb: as many zeros, compressed piece by piece."""
    if ending == ".gz":
        return gzip.compress(bytes(1 << 20), compresslevel=9) * megabytes
    packer = {".zst": lambda: zstandard.ZstdCompressor().compressobj(), ".bz2": bz2.BZ2Compressor,
              ".xz": lambda: lzma.LZMACompressor(preset=0)}[ending]()
    return b"".join(packer.compress(bytes(1 << 20)) for _ in range(megabytes)) + packer.flush()


@each
@pytest.mark.parametrize("size", [1, 7, 1 << 20])
def test_several_members_an_empty_one_among_them_are_read_whole_however_the_file_comes_in_pieces(ending: str, size: int) -> None:
    texts = [os.urandom(9_000), b"", b"line\n" * 5_000]
    assert read(ending, b"".join(COMPRESS[ending](text) for text in texts), size) == (b"".join(texts), True)
    assert read(ending, b"", size) == (b"", True)


@each
def test_damaged_data_is_an_error_after_what_stands_before_it(ending: str) -> None:
    text = os.urandom(2_000_000)
    data = COMPRESS[ending](text)
    found, whole = read(ending, data[:len(data) * 2 // 3])
    assert not whole
    assert text.startswith(found)
    assert len(found) > 200_000
    assert read(ending, data[:-1]) == (text, False)                                  # the end mark is part of the file
    assert read(ending, data + b"no compressed data") == (text, False)
    assert read(ending, b"nonsense") == (b"", False)
    changed = bytearray(data)
    changed[-3000] ^= 255
    assert not read(ending, bytes(changed))[1]


@pytest.mark.parametrize(("ending", "padding"), [(".gz", 5), (".xz", 4)])
def test_zeros_between_members_are_padding(ending: str, padding: int) -> None:
    one = COMPRESS[ending](b"text")
    assert read(ending, one + bytes(padding) + one + bytes(padding)) == (b"texttext", True)


@each
def test_a_bomb_is_never_in_memory_beyond_a_few_megabytes(ending: str) -> None:
    """Neither where Python allocates (blocks) nor where the libraries do (the process)."""
    megabytes = 200 if ending in (".gz", ".zst") else 80
    data = zeros(ending, megabytes)
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tracemalloc.start()
    size = sum(len(block) for block in decompress(ending, cut(data)))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert size == megabytes << 20
    assert peak < 10_000_000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - resident < 32_000     # KB


def test_the_worst_zstd_frame_is_bounded_too() -> None:
    """Blocks that each repeat one byte 128 KiB long take four bytes: 1 MB of them would be 34 GB."""
    block = ((128 << 10) << 3 | 1 << 1).to_bytes(3, "little") + b"x"
    header = b"\x28\xb5\x2f\xfd\x00\x38"                                              # a window of 128 KiB, no size, no checksum
    tracemalloc.start()
    size = 0
    for text in decompress(".zst", [header + block * 250_000]):
        size += len(text)
        if size > 100_000_000:
            break
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert 100_000_000 < size < 120_000_000
    assert peak < 10_000_000


def test_an_xz_file_that_asks_for_a_gigabyte_is_refused() -> None:
    filters = [{"id": lzma.FILTER_LZMA2, "dict_size": 1 << 20}]
    data = bytearray(lzma.compress(b"text" * 1000, filters=filters))
    assert data[12:17] == b"\x02\x00\x21\x01\x10"                                    # the block's header: LZMA2, 2^20 bytes
    data[16] = 36                                                                    # 2^30
    data[20:24] = zlib.crc32(bytes(data[12:20])).to_bytes(4, "little")
    with pytest.raises(lzma.LZMAError, match="limit"):
        b"".join(decompress(".xz", [bytes(data)]))


def test_other_endings_are_read_as_they_are() -> None:
    assert list(decompress(".txt", [b"one", b"two"])) == [b"one", b"two"]
