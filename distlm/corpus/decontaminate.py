"""Which documents hold a part of an evaluation text: runs of words that both share, as Brown et al. 2020 (appendix C) look for them.

    evaluations = Evaluations.read(spec.decontaminate)     # a task takes it along, pickled
    found = Found()                                        # in a task; those of several tasks are merged
    counts = evaluations.hits_each(texts, found)           # [{}, {"mmlu": 3}, ...]
    evaluations.report(found)                              # {"mmlu": {"texts": 14042, ..., "found": 1, "documents": 1}}

A word is a run of letters, marks and digits in lower case, without invisible characters; scripts that write no spaces have one word per
character. Words and runs of words are 64-bit hashes: words are those between the changes of a character's class, looked up for all of many
documents together.
"""

import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import regex
import xxhash
from numpy.typing import NDArray

from distlm.corpus.files import TextFile, find_files
from distlm.corpus.order import hash64
from distlm.corpus.read import Reader
from distlm.errors import InputError
from distlm.spec.curate import Decontaminate
from distlm.spec.load import nearest
from distlm.spec.prepare import Source

MIN_WORDS = 8
"""An evaluation text of fewer words says too little: it is skipped, and counted."""
MAX_TEXT_BYTES = 100_000_000
RECORDS = ("json", "jsonl", "parquet")
"""The formats that have fields: a file of another is read once, however many fields count."""
NO_PAGES = ("http_status", "no_main_text")
"""Why records of any archive are no texts: errors and redirects, and pages of links alone."""
BATCH_CHARS = 1 << 19
LETTER, ALONE, INVISIBLE = 1, 2, 3
WORD_CHARACTER = regex.compile(r"[\p{L}\p{M}\p{N}]+")
WITHOUT_SPACES = regex.compile(r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]+")
UNSEEN = regex.compile(r"[\p{Cf}\p{Default_Ignorable_Code_Point}]+")
"""What no reader sees and any writer may put into a word: soft hyphens, zero-width spaces and joiners, variation selectors."""
STEP = np.uint64(0x9E3779B97F4A7C15)
MASKS = np.array([(1 << 8 * count) - 1 for count in range(9)], np.uint64)
"""The first bytes of a little-endian word of eight."""
SMALLEST_SIEVE = 16

Hashes = NDArray[np.uint64]


@dataclass
class Found:
    """What the documents of a task have shown. Those of several tasks add up, in any order."""

    documents: defaultdict[str, int] = field(default_factory=lambda: defaultdict(int))
    """By set, the documents with a hit."""
    ngrams: defaultdict[str, set[int]] = field(default_factory=lambda: defaultdict(set))
    """By set, its n-grams that were met."""

    def merge(self, other: "Found") -> None:
        for name, count in other.documents.items():
            self.documents[name] += count
        for name, ngrams in other.ngrams.items():
            self.ngrams[name] |= ngrams

    def __reduce__(self) -> Any:                           # a lambda is not pickled
        return _found, (dict(self.documents), {name: np.fromiter(sorted(ngrams), np.uint64) for name, ngrams in self.ngrams.items()})


def _found(documents: dict[str, int], ngrams: dict[str, Hashes]) -> Found:
    found = Found()
    found.documents.update(documents)
    found.ngrams.update({name: set(hashes.tolist()) for name, hashes in ngrams.items()})
    return found


@dataclass(frozen=True)
class EvaluationSet:
    """One evaluation set's n-grams."""

    texts: int
    skipped: int
    """Texts of too few words."""
    ngrams: Hashes
    """Sorted, each once."""
    rows: NDArray[np.int32]
    """With `owners`, pairs of an n-gram's place in `ngrams` and a text's number: an n-gram may stand in several texts."""
    owners: NDArray[np.int32]

    def contains(self, hashes: Hashes) -> NDArray[np.bool_]:
        places = np.minimum(np.searchsorted(self.ngrams, hashes), len(self.ngrams) - 1)
        return np.asarray(self.ngrams[places] == hashes)

    def texts_with(self, ngrams: set[int]) -> int:
        """How many texts have one of these n-grams."""
        met = np.isin(self.ngrams, np.fromiter(ngrams, np.uint64, len(ngrams)))
        return len(np.unique(self.owners[met[self.rows]]))


@dataclass(frozen=True)
class Evaluations:
    """The n-grams of all evaluation sets."""

    lengths: tuple[int, ...]
    """How many words the n-grams have, ascending: one length, and those of texts that are shorter than it."""
    sets: dict[str, EvaluationSet]
    """In the order of their names."""

    @staticmethod
    def read(rules: Decontaminate) -> "Evaluations":
        """The same as before where no file has changed since: a job is checked before its work begins, and again when it does.

        Raises InputError for a set that is missing, that cannot be read whole, or in which no text is long enough."""
        return _evaluations(tuple(_named(name, rules) for name in sorted(rules.against)), rules.text_keys, rules.ngram_words)

    def hits(self, text: str) -> dict[str, int]:
        """By set, how many n-grams of the document are in the set; sets without a hit are left out."""
        return self.hits_each([text])[0]

    def hits_each(self, texts: Sequence[str], found: Found | None = None) -> list[dict[str, int]]:
        """`hits` of many documents, which is faster for short ones. `found` keeps what the report needs."""
        counts: list[dict[str, int]] = [{} for _ in texts]
        for numbers in _batches(texts):
            self._look(texts, numbers, counts, found)
        return [dict(sorted(each.items())) for each in counts]

    def hash(self) -> str:
        """A hash of all that decides what is found."""
        digest = xxhash.xxh3_128(repr(self.lengths).encode())
        for name, one in self.sets.items():
            digest.update(f"{name} {one.texts} {one.skipped} {len(one.ngrams)} ".encode())
            digest.update(one.ngrams.tobytes())
        return str(digest.hexdigest())

    def report(self, found: Found) -> dict[str, dict[str, int]]:
        """By set: its texts, those that were skipped as too short, its n-grams, the texts of which the corpus held a part, and the
        documents that held one."""
        return {name: {"texts": one.texts, "skipped": one.skipped, "ngrams": len(one.ngrams),
                       "found": one.texts_with(found.ngrams.get(name, set())), "documents": found.documents.get(name, 0)}
                for name, one in self.sets.items()}

    def _look(self, texts: Sequence[str], numbers: list[int], counts: list[dict[str, int]], found: Found | None) -> None:
        words, document = _word_hashes([texts[i] for i in numbers])
        sieve, shift = self._sieve
        for length, hashes in _ngram_hashes(words, self.lengths).items():
            likely = np.flatnonzero(sieve[hashes >> shift])
            first, last = (np.searchsorted(document, likely + place, "right") for place in (0, length - 1))
            likely, first = likely[first == last], first[first == last]
            for name, one in self.sets.items():
                hit = one.contains(hashes[likely])
                if not hit.any():
                    continue
                owners, positions = np.unique(first[hit], return_counts=True)
                for owner, count in zip(owners.tolist(), positions.tolist(), strict=True):
                    mine = counts[numbers[owner]]
                    if found is not None:
                        found.documents[name] += name not in mine
                    mine[name] = mine.get(name, 0) + count
                if found is not None:
                    found.ngrams[name].update(hashes[likely[hit]].tolist())

    @cached_property
    def _sieve(self) -> tuple[NDArray[np.bool_], np.uint64]:
        """By the first bits of a hash, whether any n-gram has them: what keeps the search away from nearly all of a document."""
        bits = max(SMALLEST_SIEVE, int(sum(len(one.ngrams) for one in self.sets.values())).bit_length() + 3)
        sieve, shift = np.zeros(1 << bits, np.bool_), np.uint64(64 - bits)
        for one in self.sets.values():
            sieve[one.ngrams >> shift] = True
        return sieve, shift

    def __getstate__(self) -> dict[str, Any]:
        return {"lengths": self.lengths, "sets": self.sets}


@dataclass(frozen=True)
class _Named:
    """A set by its name, where an error about it is, and its files as they are now."""

    name: str
    where: str
    files: tuple[TextFile, ...]


def _named(name: str, rules: Decontaminate) -> _Named:
    where = f"decontaminate.against.{name}: {rules.against[name]}"
    try:
        return _Named(name, where, tuple(find_files([Source(path=rules.against[name])])))
    except InputError as error:
        raise InputError(error.message, where=where, remedy=error.remedy) from None


@lru_cache(maxsize=1)
def _evaluations(named: tuple[_Named, ...], text_keys: tuple[str, ...], ngram_words: int) -> Evaluations:
    sets, lengths, least = {}, set[int](), min(MIN_WORDS, ngram_words)
    for one in named:
        ngrams, owners, texts, skipped = [], [], 0, 0
        for words in _words_of_each(_texts(one, text_keys)):
            texts += 1
            if len(words) < least:
                skipped += 1
                continue
            length = min(len(words), ngram_words)
            lengths.add(length)
            ngrams.append(_ngram_hashes(words, (length,))[length])
            owners.append(np.full(len(ngrams[-1]), texts - 1, np.int64))
        if not ngrams:
            raise InputError(f"none of {texts:,} texts has {least} words or more", where=one.where,
                             remedy="name the file with the evaluation's texts, or leave this set out")
        unique, rows = np.unique(np.concatenate(ngrams), return_inverse=True)
        pairs = np.unique(rows.reshape(-1).astype(np.int64) * texts + np.concatenate(owners))
        sets[one.name] = EvaluationSet(texts, skipped, unique, (pairs // texts).astype(np.int32), (pairs % texts).astype(np.int32))
    return Evaluations(tuple(sorted(lengths)), sets)


def _texts(named: _Named, text_keys: tuple[str, ...]) -> list[str]:
    """Every text of a set. Those of equal records in other files count again."""
    texts: list[str] = []
    records, keys, has_key = 0, list[str](), False
    for key in text_keys:
        for file in named.files if key == text_keys[0] else [file for file in named.files if file.format in RECORDS]:
            reader = Reader(replace(file, text_key=key), MAX_TEXT_BYTES)
            for record in reader.records():
                if file.format == "json" and not reader.objects and key != text_keys[0]:
                    break                                  # it has not this field, and was read as a text
                records += record.documents
                if not record.reason and record.documents:
                    texts.append(record.text)
                elif record.reason and record.reason not in ("missing_field", *(NO_PAGES if file.format == "warc" else ())):
                    raise InputError(f"record {record.number} is {record.reason}: {record.detail}", where=f"{named.where}: {file.name}",
                                     remedy="mend the file: what cannot be read cannot be looked for")
            keys = keys or reader.keys
            has_key = has_key or file.format not in RECORDS or bool(reader.with_key)
    if records and not has_key:
        near = next((near for key in text_keys if (near := nearest(key, keys))), None)
        raise InputError(f"no record has the field {' or '.join(map(repr, text_keys))}; the first has {', '.join(keys) or 'none'}",
                         where=named.where,
                         remedy=f"did you mean {near}?" if near else "set decontaminate.text_keys to the fields that count")
    if not texts:
        raise InputError("there is no text in it", where=named.where, remedy="name the file with the evaluation's texts")
    return texts


def _batches(texts: Sequence[str]) -> Iterator[list[int]]:
    """The numbers of texts that are looked at together: of bounded size, and either all ASCII or not."""
    for plain in (True, False):
        batch, size = list[int](), 0
        for i, text in enumerate(texts):
            if text.isascii() == plain:
                batch.append(i)
                size += len(text)
                if size >= BATCH_CHARS:
                    yield batch
                    batch, size = [], 0
        if batch:
            yield batch


def _words_of_each(texts: Sequence[str]) -> Iterator[Hashes]:
    """The word hashes of every text, in the order of the texts."""
    for first in range(0, len(texts), 256):
        words, edges = _word_hashes(texts[first:first + 256])
        yield from np.split(words, edges)


def _word_hashes(texts: Sequence[str]) -> tuple[Hashes, NDArray[np.int64]]:
    """The hashes of the words of all texts, uint64[words], and the number of the first word of every text but the first.

    Words are hashed as UTF-8 bytes, eight at a time, so that a word has one hash in whatever text it stands.
    """
    normal = [(text if text.isascii() else unicodedata.normalize("NFKC", text)).lower() for text in texts]
    data = "\n".join(normal).encode("utf-8", "surrogatepass")
    if len(data) == sum(map(len, normal)) + len(normal) - 1:
        codes: NDArray[Any] = np.frombuffer(data, np.uint8)
    else:
        codes = np.frombuffer("\n".join(normal).encode("utf-32-le", "surrogatepass"), np.uint32)
    kinds = np.zeros(len(codes) + 2, np.uint8)
    kinds[1:-1] = _kinds()[codes]
    if codes.dtype != np.uint8 and (kinds == INVISIBLE).any():
        return _word_hashes([UNSEEN.sub("", text) for text in texts])
    begins, ends = kinds[1:] != kinds[:-1], kinds[1:] != kinds[:-1]
    if codes.dtype != np.uint8:                            # a character that stands alone begins and ends a word
        begins, ends = begins | (kinds[1:] == ALONE), ends | (kinds[:-1] == ALONE)
    starts = np.flatnonzero(begins & (kinds[1:] != 0))
    stops = np.flatnonzero(ends & (kinds[:-1] != 0))
    edges = np.cumsum([len(text) + 1 for text in normal[:-1]], dtype=np.int64)
    firsts = np.searchsorted(starts, edges)
    if codes.dtype != np.uint8:                            # from characters to bytes
        sizes = np.ones(len(codes), np.uint8)
        for limit in (0x80, 0x800, 0x10000):
            sizes += codes >= limit
        offsets = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
        starts, stops = offsets[starts], offsets[stops]
    padded = np.frombuffer(data + bytes(8), np.uint8)
    eights = np.lib.stride_tricks.as_strided(padded[:8].view("<u8"), (len(data) + 1,), (1,), writeable=False)
    lengths = stops - starts
    hashes = hash64(eights[starts] & MASKS[np.minimum(lengths, 8)])
    longer, place = np.flatnonzero(lengths > 8), 8
    while len(longer):
        more = eights[starts[longer] + place] & MASKS[np.minimum(lengths[longer] - place, 8)]
        hashes[longer] = hash64(hashes[longer] * STEP + more)
        place += 8
        longer = longer[lengths[longer] > place]
    return hashes, firsts


def _ngram_hashes(words: Hashes, lengths: tuple[int, ...]) -> dict[int, Hashes]:
    """By length, the hash of the n-gram that begins at each word: uint64[max(0, words - length + 1)]."""
    sums = {1: words}

    def total(length: int) -> Hashes:
        """A run's words times falling powers of STEP: that of two halves, and of one word more for an odd length."""
        if length not in sums:
            half, odd = divmod(length, 2)
            part, count = total(half), max(0, len(words) - 2 * half + 1)
            both = part[:count] * np.uint64(pow(int(STEP), half, 1 << 64)) + part[half:half + count]
            sums[length] = both[:-1] * STEP + words[length - 1:] if odd else both
        return sums[length]

    return {length: hash64(total(length) + np.uint64(length)) for length in lengths}


@lru_cache(maxsize=1)
def _kinds() -> NDArray[np.uint8]:
    """uint8[0x110000]: what every character is: no part of a word, LETTER, ALONE, or INVISIBLE."""
    everything = "".join(chr(code) if not 0xD800 <= code < 0xE000 else " " for code in range(0x110000))
    kinds = np.zeros(0x110000, np.uint8)
    for match in WORD_CHARACTER.finditer(everything):
        kinds[match.start():match.end()] = LETTER
    for match in WITHOUT_SPACES.finditer(everything):
        inside = kinds[match.start():match.end()]
        inside[inside > 0] = ALONE
    for match in UNSEEN.finditer(everything):
        kinds[match.start():match.end()] = INVISIBLE
    return kinds
