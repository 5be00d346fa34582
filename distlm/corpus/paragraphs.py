"""Paragraphs that several documents hold stay in the first of them, in the corpus' order, and leave the others.

Three rounds of tasks, none of which needs all paragraphs at once; `partitions` and the rows of each are in the corpus' order:

    found[p] = by_range(paragraph_hashes(texts[p], min_chars), ranges)      # a task for each partition
    lost[r] = repeats([found[p][r] for p in partitions])                    # a task for each range of hashes
    documents = shorten(texts[p], [lost[r][p] for r in ranges])             # a task for each partition

The number of ranges and the cut into partitions change no document. Paragraphs are told apart by 64 bits of XXH3: among a billion of them
the odds that any two different ones share a hash are 3 %, and what would be lost is one paragraph.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import xxhash

PARAGRAPH = np.dtype([("hash", "<u8"), ("row", "<u4"), ("index", "<u4")])
"""A paragraph: the hash of its text, the row of its document in the partition, and its number in the document."""
Paragraphs = npt.NDArray[np.void]
Numbers: TypeAlias = npt.NDArray[np.int64]
NONE: Numbers = np.zeros(0, np.int64)
REASON = "duplicate_paragraphs"
BREAK = "\n\n"


@dataclass(frozen=True)
class Shortened:
    """A document without the paragraphs that another keeps, and the UTF-8 bytes that went with them."""

    text: str
    bytes: int
    taken: int
    pieces: int
    """How many paragraphs, or lines, went."""
    reason: str = ""
    """Where no text is left; then `taken` is all of it."""


def paragraph_hashes(texts: Iterable[str], min_chars: int) -> Paragraphs:
    """The paragraphs of a partition that have at least `min_chars` characters, in the order of the text: PARAGRAPH[paragraphs].

    A paragraph is what stands between two or more line feeds, without white space at its ends.
    """
    found = [(xxhash.xxh3_64_intdigest(paragraph.encode()), row, index)
             for row, text in enumerate(texts) if len(text) >= min_chars
             for index, piece in enumerate(text.split(BREAK)) if len(piece) >= min_chars and len(paragraph := piece.strip()) >= min_chars]
    return np.array(found, PARAGRAPH)


def text_hashes(texts: Iterable[str]) -> Paragraphs:
    """Whole texts as paragraphs: PARAGRAPH[documents]."""
    return np.fromiter(((xxhash.xxh3_64_intdigest(text.encode()), row, 0) for row, text in enumerate(texts)), PARAGRAPH)


def by_range(found: Paragraphs, ranges: int) -> list[Paragraphs]:
    """The paragraphs of each of `ranges` equal ranges of hashes, still in the order of the text."""
    number = (found["hash"] >> np.uint64(32)) * np.uint64(ranges) >> np.uint64(32)
    order = np.argsort(number, kind="stable")
    return np.split(found[order], np.searchsorted(number[order], np.arange(1, ranges, dtype=np.uint64)))


def document_numbers(parts: Sequence[Paragraphs]) -> npt.NDArray[np.uint64]:
    """Of every paragraph, its document's number: partition and row, ascending in the corpus' order."""
    partitions = np.repeat(np.arange(len(parts), dtype=np.uint64) << np.uint64(32), [len(part) for part in parts])
    return partitions | np.concatenate([part["row"] for part in parts])


def keepers(parts: Sequence[Paragraphs], preferred: Numbers = NONE) -> npt.NDArray[np.uint64]:
    """Of every paragraph of one range, the number of the first document that holds it; `preferred` ones come before all others. Takes
    some 60 bytes a paragraph."""
    found, document = np.concatenate([part["hash"] for part in parts]), document_numbers(parts)
    order = np.lexsort((document, ~np.isin(document, preferred.astype(np.uint64)), found))
    begins = np.flatnonzero(np.diff(found[order], prepend=~found[order[:1]]))
    keeper = np.empty_like(document)
    keeper[order] = np.repeat(document[order[begins]], np.diff(begins, append=len(found)))
    return keeper


def repeats(parts: Sequence[Paragraphs], preferred: Numbers = NONE) -> list[Paragraphs]:
    """Of one range's paragraphs, given by partition: those that an earlier document holds as well, by partition.

    A document that is the first to hold a paragraph keeps every copy of it; `preferred` ones come before all others.
    """
    if not parts:
        return []
    lost = document_numbers(parts) != keepers(parts, preferred)
    return [part[mask] for part, mask in zip(parts, np.split(lost, np.cumsum([len(part) for part in parts])[:-1]), strict=True)]


def _with_lost(texts: Iterable[str], lost: Sequence[Paragraphs]) -> Iterator[tuple[str, set[int]]]:
    """Every text of a partition with the numbers of its paragraphs that are in `lost`, over all ranges."""
    everything = np.concatenate(lost) if lost else np.zeros(0, PARAGRAPH)
    everything = everything[np.argsort(everything["row"], kind="stable")]
    bounds = iter(np.flatnonzero(np.diff(everything["row"], prepend=-1, append=-1)).tolist())
    begin, end = next(bounds, 0), next(bounds, 0)
    for row, text in enumerate(texts):
        if begin == end or everything["row"][begin] != row:
            yield text, set()
            continue
        yield text, set(everything["index"][begin:end].tolist())
        begin, end = end, next(bounds, end)


def shorten(texts: Iterable[str], lost: Sequence[Paragraphs]) -> Iterator[Shortened]:
    """Every document of a partition without what `repeats` found there, over all ranges."""
    return without(texts, lost, drop_paragraphs, REASON)


def without(texts: Iterable[str], lost: Sequence[Paragraphs], drop_pieces: Callable[[str, set[int]], str],
            reason: str) -> Iterator[Shortened]:
    """Every document of a partition without its pieces that are in `lost`, over all ranges; `reason`: of those of which nothing is left."""
    for text, drop in _with_lost(texts, lost):
        size = num_bytes(text)
        left = drop_pieces(text, drop) if drop else text
        after = num_bytes(left)
        yield Shortened(left, after, size - after, len(drop), "" if left or not drop else reason)


def drop_paragraphs(text: str, drop: set[int]) -> str:
    """The text without the paragraphs of these numbers and the line feeds before each; the rest stays as it is.

    Nothing where only white space would be left. Where the first or the last paragraph goes, so do the line feeds at that end.
    """
    pieces = text.split(BREAK)
    kept = [index for index, piece in enumerate(pieces) if piece and not piece.isspace() and index not in drop]
    if not kept:
        return ""
    left = BREAK.join(piece for index, piece in enumerate(pieces) if index not in drop)
    if min(drop, default=kept[0]) < kept[0]:
        left = left.lstrip("\n")
    return left.rstrip("\n") if max(drop, default=0) > kept[-1] else left


def num_bytes(text: str) -> int:
    """Of the text in UTF-8."""
    return len(text) if text.isascii() else len(text.encode())
