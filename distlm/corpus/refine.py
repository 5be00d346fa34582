"""What is known over the whole corpus, applied to one partition: near-duplicates go, then paragraphs that an earlier document holds.

Paragraphs are looked for in what is left of the documents, in three rounds: every partition's, by ranges of their hashes; each range's
repeats; every partition without them. Near-duplicates go first, so that no paragraph is kept by a document that goes.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from distlm.corpus.accounts import SAMPLE_CHARS, Account, Samples, Step, add
from distlm.corpus.dedup import count_splits, write_partition
from distlm.corpus.fuzzy import Dropped
from distlm.corpus.paragraphs import REASON, by_range, paragraph_hashes, repeats, shorten
from distlm.corpus.split import SplitRule
from distlm.storage import replacing


@dataclass(frozen=True)
class RefineTask:
    """A partition of documents in order, and what is to go from it."""

    partition: int
    documents: Path
    dropped: Dropped
    """Its near-duplicates."""
    rule: SplitRule
    output: Path


@dataclass
class RefineResult:
    """What is left. The step `split` takes in what this step gives out."""

    step: Step
    splits: dict[str, Account] = field(default_factory=dict)
    next_val: bytes = b""
    samples: Samples = field(default_factory=Samples)
    """Of near-duplicates: partition and row, those of the document that is kept, similarity."""


def refine_partition(task: RefineTask) -> RefineResult:
    """Write what is left of the partition. Raises StorageError."""
    result = RefineResult(Step("fuzzy"))
    with pa.memory_map(str(task.documents)) as file:
        table = pa.ipc.open_file(file).read_all()
        sizes = pc.binary_length(table["text"]).to_numpy().astype(np.int64)
        gone = task.dropped
        add(result.step.taken, len(table), int(sizes.sum()))
        result.step.reject("near_duplicate", len(gone.rows), int(sizes[gone.rows].sum()))
        for i, row in enumerate(gone.rows.tolist()):
            if not result.samples.add("near_duplicate", {
                    "place": (task.partition, row), "same_as": (int(gone.keeper_partitions[i]), int(gone.keeper_rows[i])),
                    "similarity": round(float(gone.similarities[i]), 4), "bytes": int(sizes[row]),
                    "text": table["text"][row].as_py()[:SAMPLE_CHARS]}):
                break
        left = np.setdiff1d(np.arange(len(table)), gone.rows, assume_unique=True)
        add(result.step.given, len(left), int(sizes[left].sum()))
        table, sizes = table.take(pa.array(left)), sizes[left]
        write_partition(task.output, table)
        result.splits, result.next_val = count_splits(table["hash"].to_pylist(), sizes.tolist(), task.rule)
    return result


@dataclass(frozen=True)
class HashTask:
    """A partition whose paragraphs of `min_chars` and more are to be hashed."""

    partition: int
    documents: Path
    min_chars: int
    ranges: int
    scratch: Path


def hash_paragraphs(task: HashTask) -> int:
    """Write the partition's paragraphs by ranges of their hashes, and return how many there are. Raises StorageError."""
    found = by_range(paragraph_hashes(_texts(task.documents), task.min_chars), task.ranges)
    for number, part in enumerate(found):
        _save(task.scratch, "paragraphs", task.partition, number, part)
    return sum(map(len, found))


@dataclass(frozen=True)
class RepeatTask:
    """One range of hashes, over all partitions."""

    range: int
    partitions: int
    scratch: Path


def find_repeats(task: RepeatTask) -> int:
    """Write, by partition, the paragraphs that an earlier document holds, and return how many there are. Raises StorageError."""
    lost = repeats([_load(task.scratch, "paragraphs", partition, task.range) for partition in range(task.partitions)])
    for partition, part in enumerate(lost):
        _save(task.scratch, "repeats", partition, task.range, part)
    return sum(map(len, lost))


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
    result = RefineResult(Step("paragraphs"))
    lost = [_load(task.scratch, "repeats", task.partition, number) for number in range(task.ranges)]
    with pa.memory_map(str(task.documents)) as file:
        table = pa.ipc.open_file(file).read_all()
        texts, kept, sizes = list[str](), list[int](), list[int]()
        for row, one in enumerate(shorten(_texts(task.documents), lost)):
            add(result.step.taken, 1, one.bytes + one.taken)
            result.step.reject(REASON if one.reason else "repeated_paragraphs", int(bool(one.reason)), one.taken)
            if one.reason:
                result.samples.add(REASON, {"place": (task.partition, row), "bytes": one.taken,
                                            "text": table["text"][row].as_py()[:SAMPLE_CHARS]})
                continue
            add(result.step.given, 1, one.bytes)
            texts.append(one.text)
            kept.append(row)
            sizes.append(one.bytes)
        left = table.take(pa.array(kept, pa.int64()))
        left = left.set_column(left.schema.get_field_index("text"), "text", pa.array(texts, pa.large_string()))
        write_partition(task.output, left)
    result.splits, result.next_val = count_splits(left["hash"].to_pylist(), sizes, task.rule)
    return result


def _texts(path: Path) -> Iterator[str]:
    with pa.memory_map(str(path)) as file:
        reader = pa.ipc.open_file(file)
        for number in range(reader.num_record_batches):
            yield from reader.get_batch(number)["text"].to_pylist()


def _save(scratch: Path, what: str, partition: int, number: int, found: npt.NDArray[np.void]) -> None:
    with replacing(scratch / f"{what}-{partition:04d}-{number:04d}.npy") as partial, open(partial, "wb") as file:
        np.save(file, found)


def _load(scratch: Path, what: str, partition: int, number: int) -> npt.NDArray[np.void]:
    return np.load(scratch / f"{what}-{partition:04d}-{number:04d}.npy")
