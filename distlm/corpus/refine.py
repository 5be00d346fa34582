"""What is known over the whole corpus, applied to one partition: near-duplicates go, then boilerplate and what is alike without it, then
paragraphs that an earlier document holds and what is alike without them.

Lines and paragraphs are looked for in what is left of the documents, in three rounds: every partition's, by ranges of their hashes; each
range's repeats; every partition without them. Near-duplicates go first, so that no paragraph is kept by a document that goes, and no line
is boilerplate because a document has copies; what only lines or paragraphs had made different goes after these. So do evaluation texts
that a line or a paragraph had cut.
"""

import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from distlm.corpus.accounts import SAMPLE_CHARS, Account, Samples, Step, add
from distlm.corpus.boilerplate import LINES, Frequent, frequent, line_hashes, strip
from distlm.corpus.decontaminate import Found
from distlm.corpus.dedup import count_splits
from distlm.corpus.fuzzy import Dropped
from distlm.corpus.paragraphs import (
    NONE,
    Numbers,
    Paragraphs,
    Shortened,
    by_range,
    document_numbers,
    keepers,
    paragraph_hashes,
    repeats,
    shorten,
    text_hashes,
)
from distlm.corpus.partitions import read_rows, write_partition
from distlm.corpus.split import SplitRule, document_hash
from distlm.spec.curate import Boilerplate
from distlm.storage import replacing

REPEATED = "repeated_paragraphs"
"""Of bytes that leave documents that stay."""
WAITING_CHARS = 1 << 20


@dataclass(frozen=True)
class RefineTask:
    """A partition of documents in order, and what is to go from it."""

    partition: int
    documents: Path
    dropped: Dropped
    """Its near-duplicates, or what is equal to an earlier document."""
    rule: SplitRule
    output: Path
    step: str
    reason: str


@dataclass
class RefineResult:
    """What is left. The step `split` takes in what this step gives out."""

    step: Step
    splits: dict[str, Account] = field(default_factory=dict)
    next_val: bytes = b""
    samples: Samples = field(default_factory=Samples)
    """Partition and row; of near-duplicates also those of the document that is kept, and the similarity."""
    found: Found = field(default_factory=Found)
    """What the documents shared with evaluation texts."""


def refine_partition(task: RefineTask) -> RefineResult:
    """Write what is left of the partition. Raises StorageError."""
    result = RefineResult(Step(task.step))
    with pa.memory_map(str(task.documents)) as file:
        table = pa.ipc.open_file(file).read_all()
        sizes = pc.binary_length(table["text"]).to_numpy().astype(np.int64)
        gone = task.dropped
        add(result.step.taken, len(table), int(sizes.sum()))
        result.step.reject(task.reason, len(gone.rows), int(sizes[gone.rows].sum()))
        for i, row in enumerate(gone.rows.tolist()):
            if not result.samples.add(task.reason, {
                    "place": (task.partition, row), "same_as": (int(gone.keeper_partitions[i]), int(gone.keeper_rows[i])),
                    "similarity": round(float(gone.similarities[i]), 4), "bytes": int(sizes[row]),
                    "text": table["text"][row].as_py()[:SAMPLE_CHARS]}):
                break
        _keep(result, table, sizes, gone.rows, task.rule, task.output)
    return result


@dataclass(frozen=True)
class LookTask:
    """A partition of documents in order, and the evaluation texts that must not be in it."""

    partition: int
    documents: Path
    evaluations: Path
    """A pickle of Evaluations."""
    rule: SplitRule
    output: Path
    step: str
    without: str
    """What has gone from the documents, as their reasons name it."""


def decontaminate_partition(task: LookTask) -> RefineResult:
    """Write the partition without the documents that hold a part of an evaluation text now that they are shorter: those that are as they
    were have been looked at. Raises StorageError."""
    result, evaluations = RefineResult(Step(task.step)), pickle.loads(task.evaluations.read_bytes())
    with pa.memory_map(str(task.documents)) as file:
        table = pa.ipc.open_file(file).read_all()
        sizes = pc.binary_length(table["text"]).to_numpy().astype(np.int64)
        add(result.step.taken, len(table), int(sizes.sum()))
        gone = list[int]()
        for rows, texts in _changed(task.documents):
            for row, text, hits in zip(rows, texts, evaluations.hits_each(texts, result.found), strict=True):
                if hits:
                    gone.append(row)
                    reason = f"contaminated_{min(hits)}_{task.without}"
                    result.step.reject(reason, 1, int(sizes[row]))
                    result.samples.add(reason, {"place": (task.partition, row), "bytes": int(sizes[row]), "text": text[:SAMPLE_CHARS]})
        _keep(result, table, sizes, np.array(gone, np.int64), task.rule, task.output)
    return result


def _changed(path: Path) -> Iterator[tuple[list[int], list[str]]]:
    """The rows and texts of documents that are no longer as they were when they were cleaned, some at a time."""
    rows, texts, size = list[int](), list[str](), 0
    for row, (text, turns, cleaned) in enumerate(read_rows(path, "text", "turns", "hash")):
        if document_hash(text, turns) != cleaned:
            rows.append(row)
            texts.append(text)
            size += len(text)
            if size >= WAITING_CHARS:
                yield rows, texts
                rows, texts, size = [], [], 0
    if rows:
        yield rows, texts


def _keep(result: RefineResult, table: pa.Table, sizes: npt.NDArray[np.int64], gone: npt.NDArray[np.int64], rule: SplitRule,
          output: Path) -> None:
    """Write the rows that do not go, and count them."""
    left = np.setdiff1d(np.arange(len(table)), gone, assume_unique=True)
    add(result.step.given, len(left), int(sizes[left].sum()))
    table, sizes = table.take(pa.array(left)), sizes[left]
    write_partition(output, table)
    result.splits, result.next_val = count_splits(table, sizes.tolist(), rule)


@dataclass(frozen=True)
class HashTask:
    """A partition of which something is to be hashed: its paragraphs of so many characters, its lines by these rules, or whole texts."""

    partition: int
    documents: Path
    of: int | Boilerplate | None
    let_alone: tuple[int, ...]
    """Sources that are passed over."""
    ranges: int
    scratch: Path


def hash_pieces(task: HashTask) -> tuple[int, int]:
    """Write the partition's hashes by their ranges, and return of how many documents, and how many there are. Raises StorageError."""
    documents = 0

    def counted() -> Iterator[str]:
        nonlocal documents
        for text, origin in read_rows(task.documents, "text", "origin"):
            documents += origin not in task.let_alone
            yield "" if origin in task.let_alone else text

    texts = counted()
    found = line_hashes(texts, task.of) if isinstance(task.of, Boilerplate) else \
        paragraph_hashes(texts, task.of) if task.of else text_hashes(texts)
    for number, part in enumerate(by_range(found, task.ranges)):
        _save(task.scratch, "hashes", task.partition, number, part)
    return documents, len(found)


@dataclass(frozen=True)
class RepeatTask:
    """One range of hashes, over all partitions."""

    range: int
    partitions: int
    scratch: Path
    least: int = 2
    """Documents that hold a line of boilerplate."""
    preferred: Numbers = field(default_factory=lambda: NONE)
    """The numbers of documents that come before all others, ascending."""


def find_repeats(task: RepeatTask) -> int:
    """Write, by partition, the paragraphs that an earlier document holds, and return how many there are. Raises StorageError."""
    lost = repeats(_of_range(task), task.preferred)
    for partition, part in enumerate(lost):
        _save(task.scratch, "repeats", partition, task.range, part)
    return sum(map(len, lost))


def find_frequent(task: RepeatTask) -> Frequent:
    """Write, by partition, the lines that are boilerplate, and return what else is known of them. Raises StorageError."""
    found = frequent(_of_range(task), task.least)
    for partition, part in enumerate(found.lines):
        _save(task.scratch, "repeats", partition, task.range, part)
    return replace(found, lines=[])


def find_equal(task: RepeatTask) -> list[Dropped]:
    """The documents of each partition that an earlier one is equal to."""
    parts = _of_range(task)
    keeper, number = keepers(parts, task.preferred).astype(np.int64), document_numbers(parts).astype(np.int64)
    return [Dropped(number[one] & 0xFFFFFFFF, keeper[one] >> 32, keeper[one] & 0xFFFFFFFF, np.zeros(len(one), np.int64), np.ones(len(one)))
            for i in range(len(parts)) for one in [np.flatnonzero((number != keeper) & (number >> 32 == i))]]


def _of_range(task: RepeatTask) -> list[Paragraphs]:
    return [_load(task.scratch, "hashes", partition, task.range) for partition in range(task.partitions)]


@dataclass(frozen=True)
class ShortenTask:
    """A partition of documents in order, and where what is left of them goes."""

    partition: int
    documents: Path
    ranges: int
    rule: SplitRule
    scratch: Path
    output: Path


def shorten_partition(task: ShortenTask) -> RefineResult:
    """Write the documents without the paragraphs that an earlier one holds. Raises StorageError."""
    return _shortened(task, "paragraphs", shorten, REPEATED)


def strip_partition(task: ShortenTask) -> RefineResult:
    """Write the documents without boilerplate. Raises StorageError."""
    return _shortened(task, "boilerplate", strip, LINES)


def _shortened(task: ShortenTask, name: str, edit: Callable[[Iterable[str], Sequence[Paragraphs]], Iterator[Shortened]],
               taken: str) -> RefineResult:
    result = RefineResult(Step(name))
    lost = [_load(task.scratch, "repeats", task.partition, number) for number in range(task.ranges)]
    with pa.memory_map(str(task.documents)) as file:
        table = pa.ipc.open_file(file).read_all()
        texts, kept, sizes = list[str](), list[int](), list[int]()
        for row, one in enumerate(edit(_texts(task.documents), lost)):
            add(result.step.taken, 1, one.bytes + one.taken)
            result.step.reject(one.reason or taken, int(bool(one.reason)), one.taken)
            if one.reason:
                result.samples.add(one.reason, {"place": (task.partition, row), "bytes": one.taken,
                                                "text": table["text"][row].as_py()[:SAMPLE_CHARS]})
                continue
            add(result.step.given, 1, one.bytes)
            texts.append(one.text)
            kept.append(row)
            sizes.append(one.bytes)
        left = table.take(pa.array(kept, pa.int64()))
        left = left.set_column(left.schema.get_field_index("text"), "text", pa.array(texts, pa.large_string()))
        write_partition(task.output, left)
    result.splits, result.next_val = count_splits(left, sizes, task.rule)
    return result


def _texts(path: Path) -> Iterator[str]:
    return (text for text, in read_rows(path, "text"))


def _save(scratch: Path, what: str, partition: int, number: int, found: npt.NDArray[np.void]) -> None:
    with replacing(scratch / f"{what}-{partition:04d}-{number:04d}.npy") as partial, open(partial, "wb") as file:
        np.save(file, found)


def _load(scratch: Path, what: str, partition: int, number: int) -> npt.NDArray[np.void]:
    return np.load(scratch / f"{what}-{partition:04d}-{number:04d}.npy")
