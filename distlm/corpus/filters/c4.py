"""The rules of C4: Raffel et al. 2020, "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer", section 2.2.

The paper drops lines, and then documents of which too little is left. Here the document alone is judged: the lines that would survive
are counted, and the text stays as it is. Sentences are counted by their ends, so that abbreviations count as ends too; the list of bad
words is not applied. The rules are for English.
"""

import re
from collections.abc import Iterator

from distlm.corpus.filters.text import Text

MIN_WORDS_OF_LINE = 3
MIN_SENTENCES = 5
MAX_WORD_CHARS = 1000
"""Of the published code, tensorflow_datasets' c4_utils, as are the policies and citations."""

TERMINAL = (".", "!", "?", '"', "'", "”", "’")
ELLIPSES = ("...", "…")
CITATION = re.compile(r"\[\d*\]|\[edit\]|\[citation needed\]")
UNWANTED = re.compile("javascript|terms of use|privacy policy|cookie policy|uses cookies|use of cookies|use cookies", re.IGNORECASE)
LOREM_IPSUM = re.compile("lorem ipsum", re.IGNORECASE)
SENTENCE_END = re.compile(r"""[.!?]["'”’)\]]*(?=\s|\Z)|["'”’](?=\n|\Z)""")
"""A line may end with a quotation mark alone, and then ends a sentence."""


def c4(text: Text) -> Iterator[str]:
    """Section 2.2, in the order of the paper's list but for what rejects a document at once, which comes first."""
    if "{" in text.text:
        yield "c4_curly_bracket"
    if LOREM_IPSUM.search(text.text):
        yield "c4_lorem_ipsum"
    lines = text.lines
    if "[" in text.text:
        lines = [CITATION.sub("", line).rstrip() if "[" in line else line for line in lines]
    ended = [line for line in lines if line.endswith(TERMINAL) and not line.endswith(ELLIPSES)]
    if not ended:
        yield "c4_no_terminal_punctuation"
    kept = [line for line in ended if len(line.split(None, MIN_WORDS_OF_LINE - 1)) >= MIN_WORDS_OF_LINE and not _is_unwanted(line)]
    if sum(1 for _ in SENTENCE_END.finditer("\n".join(kept))) < MIN_SENTENCES:
        yield "c4_few_sentences"


def _is_unwanted(line: str) -> bool:
    return UNWANTED.search(line) is not None or (len(line) > MAX_WORD_CHARS and max(map(len, line.split())) > MAX_WORD_CHARS)
