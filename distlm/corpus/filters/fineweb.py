"""The rules that FineWeb adds: Penedo et al. 2024, "The FineWeb Datasets: Decanting the Web for the Finest Text Data at Scale",
with the thresholds of datatrove's FineWebQualityFilter, which made the data. Lines are those that are not blank.
"""

from collections.abc import Iterator

import numpy as np
import regex

from distlm.corpus.filters.text import Text, duplicates, share

MIN_PUNCTUATED_LINES = 0.12
MAX_SHORT_LINES = 0.67
SHORT_LINE_CHARS = 30
MAX_DUPLICATE_CHARS = 0.01
"""datatrove's; the paper's text has 0.1."""

MAX_NEWLINES_PER_WORD = 0.3
"""datatrove's alone: a list has few words in a line."""

TERMINAL = regex.compile(r"""[\p{Sentence_Terminal}"'”’]""")
"""Ends of sentences in all scripts, and closing quotation marks."""


def fineweb(text: Text) -> Iterator[str]:
    """Lines that end in punctuation, short lines, characters in lines that were there before, line feeds by words."""
    if share(len(TERMINAL.findall(text.last_chars)), len(text.lines)) < MIN_PUNCTUATED_LINES:
        yield "fineweb_line_punctuation"
    lengths = np.fromiter(map(len, text.lines), np.int64, len(text.lines))
    if share(int((lengths <= SHORT_LINE_CHARS).sum()), len(text.lines)) > MAX_SHORT_LINES:
        yield "fineweb_short_lines"
    if share(duplicates(text.lines)[1], text.line_chars) > MAX_DUPLICATE_CHARS:
        yield "fineweb_duplicate_characters"
    if text.text.count("\n") > MAX_NEWLINES_PER_WORD * len(text.words):
        yield "fineweb_list_ratio"
