"""Near-duplicates: documents of which most runs of words are the same.

    partitions ──sign──▶ signatures, band keys, shingles ──pair──▶ candidates ──confirm──▶ pairs ──clusters──▶ the rows to drop

A document is the set of its shingles, the runs of `ngram_words` words. MinHash (Broder 1997, "On the resemblance and containment of
documents") gives each a signature of `bands` x `rows` numbers, and two documents whose signatures agree in a band are candidates:
of Jaccard similarity s, with `probability(s, bands, rows)`. A candidate counts when the Jaccard similarity of the two sets themselves
(of 64-bit hashes) is `min_similarity` or more; that of conversations both without their system turns, which many share, and with them,
for these may say what each is about. Clusters are the connected components of what is confirmed, over the whole corpus, and
the first document of each in the corpus' order is kept.

    found = near_duplicates(partitions, spec.dedup.fuzzy, scratch, functools.partial(spread, workers=4))
    found.dropped[3].rows                                  # of partitions[3]

The split into train and validation looks at what is left: of every cluster that is one document, so no cluster straddles.

A document's number is its partition and its row, so that numbers ascend in the corpus' order however it is cut into partitions; all that
is decided is decided by their order and by the texts, not by the order in which tasks end.

What a task holds in memory: `sign_partition` the words of one document (about 100 bytes a word), a list of known words (40 MB), and of its
partition 8 x bands x rows + 48 x bands bytes a document (1.6 kB at 14 x 8); `pair_bucket` 2^20 band keys (60 MB) and their candidates (48
bytes each; at worst MAX_UNSURE a key), for all documents of one key have to meet; `confirm` 40 bytes for each candidate of its partition's
documents, and 64 MB of shingles; `clusters` about 100 bytes for each confirmed pair, of the whole corpus. The scratch folder takes 8 bytes
a word, twice that of conversations with a system turn, and 4 x bands x rows + 12 x bands + 16 bytes a document (632).
"""

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow.compute as pc
import regex
import xxhash
from numpy.typing import NDArray
from rensa import RMinHash

from distlm.corpus.conversations import without_system
from distlm.corpus.order import hash64
from distlm.corpus.partitions import batches, num_documents
from distlm.spec.curate import Fuzzy
from distlm.storage import replacing

Words: TypeAlias = NDArray[np.uint64]
Pairs: TypeAlias = NDArray[np.int64]
"""int64[n, 2]: numbers of documents, the earlier one first."""
Spread: TypeAlias = Callable[[Callable[[Any], Any], Sequence[Any]], Iterable[tuple[int, Any]]]

SEED = 20240517
CHUNK_BYTES = 1 << 20
BUCKET_KEYS = 1 << 20
CACHE_BYTES = 64 << 20
MAX_KNOWN_WORDS = 1 << 18
ALL_PAIRS = 8
"""Up to this many documents of one band key, all are compared with each other; of more, those whose signatures say so."""
BLOCK = 2048
MAX_UNSURE = 16
DEVIATIONS = 3.0
_SPACELESS = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
_SIGNS = r"%&*/@#\\\p{S}"
_MINUS = r"(?<!\w)[-!](?=[\w(])"
WORD = regex.compile(rf"[{_SPACELESS}]\p{{M}}*|[^\W{_SPACELESS}]+|[{_SIGNS}]+|{_MINUS}")
"""Scripts that put no space between words have a word for every character. A run of signs is a word: operators, a minus or a `!` before
what it belongs to, emoji; the punctuation and the dashes of sentences are not, in which copies of a text differ."""
ASCII_WORD = regex.compile(rf"\w+|[{_SIGNS.replace(chr(92) + 'p{S}', '$+<=>^`|~')}]+|{_MINUS}", regex.ASCII)


def probability(similarity: float, bands: int, rows: int) -> float:
    """That two documents of this Jaccard similarity agree in a band: 1 - (1 - s^rows)^bands."""
    return 1.0 - (1.0 - similarity ** rows) ** bands


def threshold(bands: int, rows: int) -> float:
    """The Jaccard similarity about which that probability rises most: (1 / bands)^(1 / rows)."""
    return float((1.0 / bands) ** (1.0 / rows))


def min_similarity(rules: Fuzzy) -> float:
    """The Jaccard similarity from which on candidates are near-duplicates."""
    return threshold(rules.bands, rules.rows) if rules.min_similarity is None else rules.min_similarity


@dataclass(frozen=True)
class SignTask:
    """A partition: an Arrow file with the columns `text` and, where conversations may be among the texts, `turns`."""

    partition: int
    path: Path
    rules: Fuzzy
    buckets: int
    scratch: Path


@dataclass(frozen=True)
class PairTask:
    """The band keys of one range, of all partitions."""

    bucket: int
    partitions: int
    rules: Fuzzy
    scratch: Path


@dataclass(frozen=True)
class ConfirmTask:
    """The candidates whose earlier document lies in one partition, of all buckets."""

    partition: int
    buckets: int
    rules: Fuzzy
    scratch: Path


@dataclass(frozen=True)
class Confirmed:
    """Pairs that are near-duplicates, and their Jaccard similarities: float64[n]."""

    candidates: int
    pairs: Pairs
    similarities: NDArray[np.float64]


@dataclass(frozen=True)
class Dropped:
    """The documents of one partition that go, by rows, ascending: int64[n] each, the similarity float64[n]."""

    rows: NDArray[np.int64]
    keeper_partitions: NDArray[np.int64]
    keeper_rows: NDArray[np.int64]
    clusters: NDArray[np.int64]
    """Numbers from 0 in the order of the keepers."""
    similarities: NDArray[np.float64]
    """To the document of the cluster that was found to be the most similar, not always the keeper."""


@dataclass(frozen=True)
class NearDuplicates:
    """What goes from every partition, and figures."""

    dropped: list[Dropped] = field(repr=False)
    documents: int
    """That were compared: those with a word."""
    candidates: int
    pairs: int
    """Candidates that were confirmed."""
    clusters: int
    largest: int
    """Documents of the largest cluster, the keeper among them."""


def near_duplicates(partitions: Sequence[Path], rules: Fuzzy, scratch: Path, run: Spread, preferred: NDArray[np.int64] | None = None) -> \
        NearDuplicates:
    """Find the near-duplicates of a corpus. `run(function, tasks)` yields (index, result) in any order, as `spread` does; `scratch` is
    a folder that exists, for these files alone. Of a cluster with documents of the numbers `preferred`, ascending, the first of these is
    kept. Raises StorageError."""
    buckets = max(1, -(-sum(map(num_documents, partitions)) * rules.bands // BUCKET_KEYS))
    signed = run(sign_partition, [SignTask(i, path, rules, buckets, scratch) for i, path in enumerate(partitions)])
    documents = sum(count for _, count in signed)
    for _ in run(pair_bucket, [PairTask(i, len(partitions), rules, scratch) for i in range(buckets)]):
        pass
    tasks = [ConfirmTask(i, buckets, rules, scratch) for i in range(len(partitions))]
    return clusters([result for _, result in run(confirm, tasks)], documents, len(partitions), preferred)


def sign_partition(task: SignTask) -> int:
    """Write the partition's shingles, signatures and band keys to the scratch folder. Returns its documents that have a word.

    A document of fewer words than a shingle has one shingle, of all its words; one without a word is like no other.
    """
    hashes = _WordHashes()
    permutations = task.rules.bands * task.rules.rows
    signatures, sizes = [np.empty((0, permutations), np.uint32)], [np.zeros((1, 2), np.int64)]
    bands = [np.empty((0, task.rules.bands), np.uint64)]
    with replacing(_file(task, "shingles")) as partial, open(partial, "wb") as file, \
            replacing(_file(task, "whole")) as partial_whole, open(partial_whole, "wb") as file_whole:
        for texts, turns in _chunks(task.path):
            said = list(map(without_system, texts, turns))
            flat, counts = shingles([hashes.of(text) for text in said], task.rules.ngram_words)
            whole, whole_counts = shingles([hashes.of(text if text != some else "") for text, some in zip(texts, said, strict=True)],
                                           task.rules.ngram_words)
            offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.uint64)
            digests = RMinHash.digest_matrix_from_flat_token_hashes(flat, offsets, permutations, SEED)
            signatures.append(np.asarray(digests.to_rows(), np.uint32).reshape(len(texts), permutations))
            bands.append(band_keys(signatures[-1], task.rules.bands))
            sizes.append(np.stack([counts, whole_counts], axis=1))
            flat.tofile(file)
            whole.tofile(file_whole)
    offsets = np.cumsum(np.concatenate(sizes), axis=0)
    with replacing(_file(task, "offsets")) as partial:
        offsets.tofile(partial)
    _save(task, "signatures", np.concatenate(signatures))
    rows = np.flatnonzero(np.diff(offsets[:, 0]))
    keys = np.concatenate(bands)[rows].reshape(-1)
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    _save(task, "keys", keys)
    _save(task, "rows", np.repeat(rows, task.rules.bands)[order].astype(np.uint32))
    _save(task, "bounds", np.append(np.searchsorted(keys, _edges(task.buckets)), len(keys)))
    return len(rows)


def shingles(documents: Sequence[Words], ngram_words: int) -> tuple[Words, NDArray[np.int64]]:
    """The sets of shingles of documents that are given as hashes of their words: (the hashes of the shingles, ascending and once within a
    document, one document after the other; how many each has)."""
    flat = np.concatenate([np.empty(0, np.uint64), *documents])
    factors = hash64(np.arange(1, ngram_words + 1, dtype=np.uint64)) | np.uint64(1)
    runs = np.zeros(max(0, len(flat) - ngram_words + 1), np.uint64)
    for i, factor in enumerate(factors):
        runs += flat[i:i + len(runs)] * factor
    runs = hash64(runs)
    sets: list[Words] = []
    start = 0
    for words in documents:
        if len(words) >= ngram_words:
            found = np.sort(runs[start:start + len(words) - ngram_words + 1])
            sets.append(found[np.concatenate([[True], found[1:] != found[:-1]])])
        else:
            sets.append(hash64(np.sum(words * factors[:len(words)], keepdims=True)) if len(words) else words)
        start += len(words)
    return np.concatenate([flat[:0], *sets]), np.asarray([len(found) for found in sets], np.int64)


def band_keys(signatures: NDArray[np.uint32], bands: int) -> Words:
    """uint64[documents, bands] of signatures uint32[documents, bands * rows]: equal where a band is."""
    values = signatures.reshape(len(signatures), bands, signatures.shape[1] // bands).astype(np.uint64)
    keys = np.broadcast_to(hash64(np.arange(1, bands + 1, dtype=np.uint64)), values.shape[:2])
    for row in range(values.shape[2]):
        keys = hash64(keys + values[:, :, row])
    return keys


def pair_bucket(task: PairTask) -> int:
    """Write the candidates of one range of band keys, ascending, and return how many there are.

    Of up to ALL_PAIRS documents of one key all pairs are candidates. Of more, `_family` chooses pairs that connect what is similar.
    """
    keys, numbers = _read_keys(task)
    order = np.lexsort((numbers, keys))
    keys, numbers = keys[order], numbers[order]
    starts = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]])) if len(keys) else np.empty(0, np.int64)
    sizes = np.diff(np.concatenate([starts, [len(keys)]]))
    found: list[Pairs] = []
    for size in np.unique(sizes[(sizes > 1) & (sizes <= ALL_PAIRS)]):
        members = numbers[starts[sizes == size][:, None] + np.arange(size)]
        found.append(np.stack([members[:, side] for side in np.triu_indices(size, 1)], axis=2).reshape(-1, 2))
    for start, size in zip(starts[sizes > ALL_PAIRS], sizes[sizes > ALL_PAIRS], strict=True):
        found += _family(task, numbers[start:start + size])
    pairs = _unique(np.concatenate([np.empty((0, 2), np.int64), *found]))
    _save(task, "pairs", pairs)
    _save(task, "bounds-of-pairs", np.searchsorted(pairs[:, 0], np.arange(task.partitions + 1) << 32))
    return len(pairs)


def _read_keys(task: PairTask) -> tuple[Words, NDArray[np.int64]]:
    keys, numbers = [np.empty(0, np.uint64)], [np.empty(0, np.int64)]
    for partition in range(task.partitions):
        low, high = _load(task.scratch, "bounds", partition)[task.bucket:task.bucket + 2]
        keys.append(_load(task.scratch, "keys", partition)[low:high])
        numbers.append(_load(task.scratch, "rows", partition)[low:high].astype(np.int64) + (partition << 32))
    return np.concatenate(keys), np.concatenate(numbers)


def _family(task: PairTask, numbers: NDArray[np.int64]) -> list[Pairs]:
    """Candidates among many documents of one key, by blocks; then among the first documents of each block's families, as long as that
    makes them half as many. What is similar across blocks while its families' first documents are not is left to the other bands."""
    found: list[Pairs] = []
    while True:
        leaders: list[int] = []
        for start in range(0, len(numbers), BLOCK):
            block = numbers[start:start + BLOCK]
            pairs, first = connect(_read_signatures(task.scratch, block), min_similarity(task.rules))
            found.append(block[pairs])
            leaders += block[first].tolist()
        if len(numbers) <= BLOCK or len(leaders) > len(numbers) // 2:
            return found
        numbers = np.asarray(leaders, np.int64)


def connect(signatures: NDArray[np.uint32], similarity: float) -> tuple[Pairs, NDArray[np.int64]]:
    """(pairs, first of each family) by the rows of signatures uint32[n, permutations]: a breadth-first search that leaves connected all
    that is similar, with far fewer than all pairs.

    A row is compared with all that no other has taken yet. Those whose estimate lies surely above `similarity` are its pairs, and it takes
    them: their turn is next. Of those that lie about it, the MAX_UNSURE closest are its pairs, and wait for their own turn. Sure is
    DEVIATIONS standard deviations of the estimate, sqrt(s (1 - s) / permutations).
    """
    margin = DEVIATIONS * float(np.sqrt(similarity * (1.0 - similarity) / signatures.shape[1]))
    low, high = similarity - margin, min(similarity + margin, 1.0)
    left = np.arange(len(signatures))
    queue: deque[int] = deque()
    first: list[int] = []
    found = [np.empty((0, 2), np.int64)]
    while len(left):
        if queue:
            row = queue.popleft()
        else:
            row, left = int(left[0]), left[1:]
            first.append(row)
        estimates = (signatures[left] == signatures[row]).mean(axis=1)
        sure = estimates >= high
        unsure = np.flatnonzero((estimates >= low) & ~sure)
        if len(unsure) > MAX_UNSURE:
            unsure = unsure[np.argsort(-estimates[unsure], kind="stable")[:MAX_UNSURE]]
        others = np.concatenate([left[sure], left[unsure]])
        found.append(np.sort(np.stack([np.full(len(others), row), others], axis=1), axis=1))
        queue += left[sure].tolist()
        left = left[~sure]
    return np.concatenate(found), np.asarray(first, np.int64)


def confirm(task: ConfirmTask) -> Confirmed:
    """Keep the candidates whose sets of shingles have the Jaccard similarity that is asked for, with system turns and without."""
    slices = [np.empty((0, 2), np.int64)]
    for bucket in range(task.buckets):
        low, high = _load(task.scratch, "bounds-of-pairs", bucket)[task.partition:task.partition + 2]
        slices.append(_load(task.scratch, "pairs", bucket)[low:high])
    pairs = _unique(np.concatenate(slices))
    similarities = np.zeros(len(pairs))
    least = min_similarity(task.rules)
    shingles_of = _Shingles(task.scratch)
    for i, (first, second) in enumerate(pairs.tolist()):
        (said, whole), (other_said, other_whole) = shingles_of[first], shingles_of[second]
        similarities[i] = jaccard(said, other_said)
        if whole is not said or other_whole is not other_said:
            similarities[i] = min(similarities[i], jaccard(whole, other_whole))
    kept = similarities >= least
    return Confirmed(len(pairs), pairs[kept], similarities[kept])


def jaccard(first: Words, second: Words) -> float:
    """Of two sets, given as arrays in which nothing stands twice."""
    both = np.sort(np.concatenate([first, second]))
    shared = int(np.count_nonzero(both[1:] == both[:-1]))
    return shared / (len(both) - shared)


def components(pairs: Pairs) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(documents that are in a pair, ascending; the first document of the component of each): int64[n] both.

    Every root with a pair to an earlier one is hung below the earliest of those, all at a time, and paths are cut short, until all pairs
    have one root.
    """
    documents, places = np.unique(pairs, return_inverse=True)
    first, second = places.reshape(-1, 2).T
    roots = np.arange(len(documents))
    while True:
        ends = roots[first], roots[second]
        if (ends[0] == ends[1]).all():
            return documents, documents[roots]
        np.minimum.at(roots, np.maximum(*ends), np.minimum(*ends))
        while (shorter := roots[roots]).tobytes() != roots.tobytes():
            roots = shorter


def clusters(confirmed: Sequence[Confirmed], documents: int, partitions: int, preferred: NDArray[np.int64] | None = None) -> NearDuplicates:
    """The components over all that is confirmed, and what is to go from each partition: all but the first document of each, or the first
    that is preferred."""
    pairs = np.concatenate([np.empty((0, 2), np.int64), *(result.pairs for result in confirmed)])
    members, keepers = components(pairs)
    if preferred is not None:
        first, cluster = np.unique(keepers, return_inverse=True)
        chosen = np.isin(members, preferred)
        first[cluster[chosen][::-1]] = members[chosen][::-1]          # the last that is written stays: the earliest
        keepers = first[cluster]
    closest = np.zeros(len(members))
    for end in (0, 1):
        np.maximum.at(closest, np.searchsorted(members, pairs[:, end]), np.concatenate([[], *(one.similarities for one in confirmed)]))
    kept, number, sizes = np.unique(keepers, return_inverse=True, return_counts=True)
    gone = np.flatnonzero(members != keepers)
    bounds = np.searchsorted(members[gone], np.arange(partitions + 1) << 32)
    dropped = [Dropped(members[one] & 0xFFFFFFFF, keepers[one] >> 32, keepers[one] & 0xFFFFFFFF, number[one], closest[one])
               for one in (gone[low:high] for low, high in itertools.pairwise(bounds))]
    return NearDuplicates(dropped, documents, sum(result.candidates for result in confirmed), len(pairs), len(kept),
                          int(sizes.max(initial=0)))


def merged(parts: Sequence[Dropped]) -> Dropped:
    """What goes from one partition, found in several parts."""
    whole = [np.concatenate([vars(part)[name] for part in parts]) for name in Dropped.__annotations__]
    order = np.argsort(whole[0])
    return Dropped(*(column[order] for column in whole))


class _WordHashes(dict[str, int]):
    """XXH3 of words, each computed once as long as it is known."""

    def __missing__(self, word: str) -> int:
        value = self[word] = xxhash.xxh3_64_intdigest(word.encode())
        return value

    def of(self, text: str) -> Words:
        """The hashes of a document's words, in lower case."""
        if len(self) > MAX_KNOWN_WORDS:
            self.clear()
        words = (ASCII_WORD if text.isascii() else WORD).findall(text.lower())
        return np.fromiter(map(self.__getitem__, words), np.uint64, len(words))


class _Shingles(dict[int, tuple[Words, Words]]):
    """Documents' sets of shingles from the scratch folder, those that were read last: without system turns, and of the whole."""

    def __init__(self, scratch: Path) -> None:
        self.scratch, self.bytes = scratch, 0

    def __missing__(self, number: int) -> tuple[Words, Words]:
        partition, row = number >> 32, number & 0xFFFFFFFF
        offsets = np.fromfile(self.scratch / f"fuzzy-offsets-{partition:05d}", np.int64, 4, offset=16 * row).reshape(2, 2)
        said, whole = (np.fromfile(self.scratch / f"fuzzy-{name}-{partition:05d}", np.uint64, high - low, offset=8 * low)
                       for name, (low, high) in zip(("shingles", "whole"), offsets.T.tolist(), strict=True))
        size = said.nbytes + whole.nbytes
        self.bytes += size
        if self.bytes > CACHE_BYTES:
            self.clear()
            self.bytes = size
        self[number] = said, whole if len(whole) else said
        return self[number]


def _chunks(path: Path) -> Iterator[tuple[list[str], list[str]]]:
    """The texts of a partition and whose is how much of each, about a megabyte at a time."""
    for batch in batches(path):
        texts = batch["text"]
        turns = batch["turns"].to_pylist()
        ends = np.cumsum(pc.binary_length(texts).to_numpy(zero_copy_only=False))
        start = 0
        while start < len(texts):
            begin = ends[start - 1] if start else 0
            stop = max(start + 1, int(np.searchsorted(ends, begin + CHUNK_BYTES, "right")))
            yield texts[start:stop].to_pylist(), turns[start:stop]
            start = stop


def _edges(buckets: int) -> Words:
    """uint64[buckets]: where the ranges of keys begin. Keys are hashes: equal ranges hold about equally many."""
    return np.asarray([(i << 64) // buckets for i in range(buckets)], np.uint64)


def _unique(pairs: Pairs) -> Pairs:
    pairs = pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]
    return pairs[np.concatenate([[True], (pairs[1:] != pairs[:-1]).any(axis=1)])] if len(pairs) else pairs


def _file(task: SignTask | PairTask, name: str) -> Path:
    return task.scratch / f"fuzzy-{name}-{task.partition if isinstance(task, SignTask) else task.bucket:05d}"


def _save(task: SignTask | PairTask, name: str, array: NDArray[Any]) -> None:
    with replacing(f"{_file(task, name)}.npy") as partial, open(partial, "wb") as file:
        np.save(file, array)


def _load(scratch: Path, name: str, number: int) -> NDArray[Any]:
    """An array that a task has saved, memory-mapped."""
    return np.load(scratch / f"fuzzy-{name}-{number:05d}.npy", mmap_mode="r")


def _read_signatures(scratch: Path, numbers: NDArray[np.int64]) -> NDArray[np.uint32]:
    """uint32[n, permutations] of documents, ascending."""
    partitions = numbers >> 32
    return np.concatenate([_load(scratch, "signatures", int(partition))[numbers[partitions == partition] & 0xFFFFFFFF]
                           for partition in np.unique(partitions)])
