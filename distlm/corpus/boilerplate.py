"""Lines that many documents hold, such as notices, menus and footers, leave all of them.

Three rounds of tasks, as for `paragraphs`; `partitions` and the rows of each are in the corpus' order:

    found[p] = by_range(line_hashes(texts[p], rules), ranges)               # a task for each partition
    often[r] = frequent([found[p][r] for p in partitions], least)           # a task for each range of hashes
    documents = strip(texts[p], [often[r].lines[p] for r in ranges])        # a task for each partition

It is done over documents of which no two are equal, nor nearly so where near-duplicates are dropped: of a text that ten documents copy,
every line would be in ten documents. What was different by boilerplate alone is equal after it, and found by the hashes of whole texts.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import xxhash

from distlm.corpus.accounts import MAX_SAMPLES
from distlm.corpus.paragraphs import PARAGRAPH, Paragraphs, Shortened, document_numbers, without
from distlm.spec.curate import Boilerplate

REASON, LINES = "boilerplate", "boilerplate_lines"
"""Of documents that hold nothing else, and of bytes that leave documents that stay."""
WORD = re.compile(r"[^\W\d_]+")
CODE = re.compile(r"[{}=;\\<>_`$^~]|\w\(|\(\)|\w\[|\]\s*[,:]|::|->|/\*|\*/|\b(?:self|this)\.|"
                  r"^(?:[#@%*/+|\"']|--)|[\"'],?$|^from \S+ import\b|"
                  r"^(?:import|package|using|use|include|require|return|raise|throw|yield|assert|del|global|def|class|struct|enum|union|"
                  r"interface|impl|public|private|protected|static|export|const|let|var|function|func|fn|async|await|if|elif|else|for|while|"
                  r"switch|case|default|try|except|finally|catch|with|do|end|begin|then|fi|goto|typedef|extern|namespace|template|"
                  r"and|or|not|in|is)\b")
"""Signs and first words of lines of programs, of more languages than any document has: what may be code is let alone."""


@dataclass
class Frequent:
    """The lines of one range of hashes that are boilerplate."""

    lines: list[Paragraphs]
    """By partition: every copy."""
    distinct: int = 0
    first: list[tuple[int, int, int, int]] = field(default_factory=list)
    """Of the most frequent ones, these first: (minus its documents; partition, row and number of the line of its first copy)."""


def normal(line: str) -> str:
    """The line as it is compared: without white space at its ends, and with one space for any other."""
    return " ".join(line.split())


def line_hashes(texts: Iterable[str], rules: Boilerplate) -> Paragraphs:
    """The lines of a partition that may be boilerplate, in the order of the text: PARAGRAPH[lines]."""
    return np.fromiter(((xxhash.xxh3_64_intdigest(line.encode()), row, index) for row, text in enumerate(texts)
                        for index, piece in enumerate(text.split("\n")) if len(piece) >= rules.min_chars and
                        _may_be(line := normal(piece), rules)), PARAGRAPH)


def _may_be(line: str, rules: Boilerplate) -> bool:
    return rules.min_chars <= len(line) <= rules.max_chars and (rules.code or not CODE.search(line)) and \
        len(WORD.findall(line)) >= rules.min_words


def frequent(parts: Sequence[Paragraphs], least: int) -> Frequent:
    """Of one range's lines, given by partition: those that at least `least` documents hold. Takes some 60 bytes a line."""
    found, document = np.concatenate(parts), document_numbers(parts)
    if not len(found):
        return Frequent(list(parts))
    order = np.lexsort((document, found["hash"]))          # stable: a document's copies stay in their order
    hashes, document = found["hash"][order], document[order]
    is_new = np.concatenate([[True], hashes[1:] != hashes[:-1]])
    line = np.cumsum(is_new) - 1
    documents = np.bincount(line, is_new | np.concatenate([[True], document[1:] != document[:-1]])).astype(np.int64)
    often = np.zeros(len(found), bool)
    often[order] = (documents >= least)[line]
    lines, first = np.flatnonzero(documents >= least), np.flatnonzero(is_new)
    index = found["index"][order]
    lines = lines[np.lexsort((index[first[lines]], document[first[lines]], -documents[lines]))]
    shown = [(-int(documents[one]), int(document[first[one]]) >> 32, int(document[first[one]]) & 0xFFFFFFFF, int(index[first[one]]))
             for one in lines[:MAX_SAMPLES]]
    parted = np.split(often, np.cumsum([len(part) for part in parts])[:-1])
    return Frequent([part[mask] for part, mask in zip(parts, parted, strict=True)], len(lines), shown)


def strip(texts: Iterable[str], lost: Sequence[Paragraphs]) -> Iterator[Shortened]:
    """Every document of a partition without the lines that `frequent` found there, over all ranges."""
    return without(texts, lost, drop_lines, REASON)


def drop_lines(text: str, drop: set[int]) -> str:
    """The text without the lines of these numbers, and of the empty lines around each without those behind where one stands before it, or
    where the text begins. Nothing where only white space would be left."""
    left, dropped = list[str](), False
    for index, line in enumerate(text.split("\n")):
        if index in drop:
            dropped = True
        elif not dropped or line.strip() or (left and left[-1].strip()):
            left.append(line)
            dropped = False
    joined = "\n".join(left)
    return "" if joined.isspace() else joined
