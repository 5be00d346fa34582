"""The rules of MassiveText: Rae et al. 2021, "Scaling Language Models: Methods, Analysis & Insights from Training Gopher".

The stop words are English ones. Where the paper leaves a choice: white space counts nowhere as a character of an n-gram; an n-gram
that occurs once repeats nothing; of duplicates the first copy is not one.
"""

import re
from collections.abc import Iterator

import numpy as np
import regex

from distlm.corpus.filters.text import Text, duplicates, share

# Section A.1.1, "Quality filtering"
MIN_WORDS, MAX_WORDS = 50, 100_000
MIN_MEAN_WORD_CHARS, MAX_MEAN_WORD_CHARS = 3, 10
MAX_SYMBOLS_PER_WORD = 0.1
"""Of hash signs, and of ellipses."""
MAX_BULLET_LINES = 0.9
MAX_ELLIPSIS_LINES = 0.3
MIN_WORDS_WITH_LETTER = 0.8
MIN_STOP_WORDS = 2
STOP_WORDS = ("the", "be", "to", "of", "and", "that", "have", "with")

# Table A1, "Repetition removal"
MAX_DUPLICATE_LINES = MAX_DUPLICATE_PARAGRAPHS = 0.30
MAX_DUPLICATE_LINE_CHARS = MAX_DUPLICATE_PARAGRAPH_CHARS = 0.20
MAX_TOP_NGRAM_CHARS = {2: 0.20, 3: 0.18, 4: 0.16}
MAX_DUPLICATE_NGRAM_CHARS = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}

BULLETS = re.compile("[•‣⁃◦▪■●*–-]")
ELLIPSES = ("...", "…")
STOP_WORD_FORMS = tuple((word, word.capitalize(), word.upper()) for word in STOP_WORDS)
LETTER = regex.compile(r"\p{L}")


def gopher_quality(text: Text) -> Iterator[str]:
    """Section A.1.1. Punctuation that stands alone is a word too."""
    words, lines = len(text.words), len(text.lines)
    if words < MIN_WORDS:
        yield "gopher_few_words"
    if words > MAX_WORDS:
        yield "gopher_many_words"
    if words:
        mean = text.word_chars / words
        if mean < MIN_MEAN_WORD_CHARS:
            yield "gopher_short_words"
        if mean > MAX_MEAN_WORD_CHARS:
            yield "gopher_long_words"
        if text.text.count("#") / words > MAX_SYMBOLS_PER_WORD:
            yield "gopher_hash_signs"
        ellipses = sum(map(text.text.count, ELLIPSES))
        if ellipses / words > MAX_SYMBOLS_PER_WORD:
            yield "gopher_ellipses"
        if len(BULLETS.findall("".join([line[0] for line in text.lines]))) / lines > MAX_BULLET_LINES:
            yield "gopher_bullet_lines"
        if ellipses and sum([line.endswith(ELLIPSES) for line in text.lines]) / lines > MAX_ELLIPSIS_LINES:
            yield "gopher_ellipsis_lines"
        if _words_with_letter(text) / words < MIN_WORDS_WITH_LETTER:
            yield "gopher_words_without_letters"
    if sum(any(form in text.vocabulary for form in forms) for forms in STOP_WORD_FORMS) < MIN_STOP_WORDS:
        yield "gopher_few_stop_words"


def gopher_repetition(text: Text) -> Iterator[str]:
    """Table A1."""
    lines, chars = duplicates(text.lines)
    if share(lines, len(text.lines)) > MAX_DUPLICATE_LINES:
        yield "gopher_duplicate_lines"
    if share(chars, text.line_chars) > MAX_DUPLICATE_LINE_CHARS:
        yield "gopher_duplicate_line_characters"
    paragraphs, chars = duplicates(text.paragraphs)
    if share(paragraphs, len(text.paragraphs)) > MAX_DUPLICATE_PARAGRAPHS:
        yield "gopher_duplicate_paragraphs"
    if share(chars, sum(map(len, text.paragraphs))) > MAX_DUPLICATE_PARAGRAPH_CHARS:
        yield "gopher_duplicate_paragraph_characters"
    for n, places, ids in text.repeated_ngrams(max(MAX_DUPLICATE_NGRAM_CHARS)):
        if not len(places):
            return
        if n in MAX_TOP_NGRAM_CHARS:
            counts = np.bincount(ids)[ids]
            top = ids[counts.argmax()]                     # of those that are equally frequent, the one that comes first
            if text.covered_chars(places[ids == top], n) / text.word_chars > MAX_TOP_NGRAM_CHARS[n]:
                yield f"gopher_top_{n}_gram"
        else:
            first = np.empty(int(ids.max()) + 1, np.int32)
            first[ids[::-1]] = places[::-1]                # the last that is written stays
            if text.covered_chars(places[places != first[ids]], n) / text.word_chars > MAX_DUPLICATE_NGRAM_CHARS[n]:
                yield f"gopher_duplicate_{n}_gram"


def _words_with_letter(text: Text) -> int:
    has = np.fromiter((word.isalpha() or LETTER.search(word) is not None for word in text.vocabulary), bool, len(text.vocabulary))
    return int(has[text.codes].sum())
