"""A document as the filters see it: its words, lines and paragraphs, made once and only when a rule asks for them.

Words are what white space separates (`str.split`), punctuation included: datatrove splits with spaCy's tokenizer instead, which takes
most of its time and makes `end.` two words. Scripts that do not separate words, such as Chinese, have few and long ones here.
"""

from collections.abc import Iterator
from functools import cached_property

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray


class Text:
    """A document's text and path, and views of it."""

    def __init__(self, text: str, path: str = "") -> None:
        self.text, self.path = text, path

    @cached_property
    def words(self) -> list[str]:
        return self.text.split()

    @cached_property
    def vocabulary(self) -> dict[str, int]:
        """Each word's number, in the order of the first appearances."""
        return {word: number for number, word in enumerate(dict.fromkeys(self.words))}

    @cached_property
    def codes(self) -> NDArray[np.int32]:
        """int32[words]: the words' numbers."""
        return np.fromiter(map(self.vocabulary.__getitem__, self.words), np.int32, len(self.words))

    @cached_property
    def offsets(self) -> NDArray[np.int64]:
        """int64[words + 1]: the characters of the words before each word; the last is that of all words."""
        lengths = np.fromiter(map(len, self.vocabulary), np.int64, len(self.vocabulary))
        return np.concatenate([[0], np.cumsum(lengths[self.codes])])

    @property
    def word_chars(self) -> int:
        """Characters that are not white space."""
        return int(self.offsets[-1])

    @cached_property
    def lines(self) -> list[str]:
        """Those that are not blank, without white space at their ends."""
        return [line for line in map(str.strip, self._unix.split("\n")) if line]

    @cached_property
    def paragraphs(self) -> list[str]:
        """What empty lines separate, without white space at the ends."""
        return [part for part in map(str.strip, self._unix.split("\n\n")) if part]

    @cached_property
    def line_chars(self) -> int:
        return sum(map(len, self.lines))

    @cached_property
    def last_chars(self) -> str:
        """Every line's last character."""
        return "".join([line[-1] for line in self.lines])

    @property
    def _unix(self) -> str:
        return self.text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in self.text else self.text

    def repeated_ngrams(self, longest: int) -> Iterator[tuple[int, NDArray[np.int32], NDArray[np.int32]]]:
        """(n, places, ids), both int32, for n = 2, 3, ... longest: the places of all n-grams that occur more than once, ascending, and
        for each a number that equal n-grams share. Exact: nothing is hashed to fewer bits."""
        places, ids = _repeated(np.arange(len(self.codes), dtype=np.int32), self.codes)
        for n in range(2, longest + 1):
            if len(places):                                # an n-gram repeats only where both (n-1)-grams in it do
                both = np.flatnonzero(np.diff(places) == 1)
                ends = self.codes[places[both] + n - 1]
                keys = ids[both] * np.int64(len(self.vocabulary)) + ends
                places, ids = _repeated(places[both], _numbered(keys))
            yield n, places, ids

    def covered_chars(self, places: NDArray[np.int32], n: int) -> int:
        """Characters of the words in the n-grams at `places`, ascending: each once, though n-grams overlap."""
        ends = np.minimum(places + n, np.append(places[1:], np.int32(len(self.codes))))
        return int((self.offsets[ends] - self.offsets[places]).sum())


def duplicates(parts: list[str]) -> tuple[int, int]:
    """(parts that were there before, their characters)."""
    unique = set(parts)
    return len(parts) - len(unique), sum(map(len, parts)) - sum(map(len, unique)) if len(unique) < len(parts) else 0


def share(part: float, whole: float) -> float:
    """0 of nothing."""
    return part / whole if whole else 0.0


def _numbered(keys: NDArray[np.int64]) -> NDArray[np.int32]:
    """Numbers below len(keys), equal where the keys are. Linear in time, which np.unique is not."""
    return pa.array(keys).dictionary_encode().indices.to_numpy()


def _repeated(places: NDArray[np.int32], ids: NDArray[np.int32]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    again = np.bincount(ids)[ids] > 1
    return places[again], ids[again]
