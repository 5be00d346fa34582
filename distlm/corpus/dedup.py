"""The second task: bring one partition of the documents into order, and drop those whose text was there before.

Equal texts have equal order keys, so they meet in one partition, side by side: nothing is shared between tasks, and no copy survives.
"""

from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from distlm.corpus.accounts import SAMPLE_CHARS, Account, Samples, Step, account, add
from distlm.corpus.documents import SCHEMA
from distlm.corpus.split import SplitRule, first_held_out
from distlm.storage import writing

BATCH_ROWS = 256


@dataclass(frozen=True)
class SortTask:
    """A partition, and the files that hold parts of it."""

    partition: int
    parts: list[Path]
    dedup: bool
    rule: SplitRule
    output: Path


@dataclass
class SortResult:
    """What is left of the partition. The step `split` takes in what `dedup` gives out."""

    dedup: Step = field(default_factory=lambda: Step("dedup"))
    splits: dict[str, Account] = field(default_factory=lambda: {"train": account(), "val": account()})
    samples: Samples = field(default_factory=Samples)
    """Of duplicates, in the order of the documents: (file, record) of the copy that is dropped and of the one that is kept."""
    next_val: bytes = b""
    """The hash of the training document that would be held out first."""


def sort_partition(task: SortTask) -> SortResult:
    """Write the partition's documents to `task.output`, in order. Raises StorageError."""
    result = SortResult()
    batches = [_batch(path, task.partition) for path in task.parts]
    table = pa.Table.from_batches(batches, SCHEMA).combine_chunks()
    sizes = pc.binary_length(table["text"]).to_pylist()
    keys, hashes = table["key"].to_pylist(), table["hash"].to_pylist()
    places = list(zip(table["file"].to_pylist(), table["record"].to_pylist(), strict=True))
    kept: list[int] = []
    for row in sorted(range(len(keys)), key=lambda row: (keys[row], places[row])):
        add(result.dedup.taken, 1, sizes[row])
        if task.dedup and kept and hashes[kept[-1]] == hashes[row]:
            result.dedup.reject("duplicate", 1, sizes[row])
            result.samples.add("duplicate", {"key": keys[row].hex(), "place": places[row], "same_as": places[kept[-1]],
                                             "bytes": sizes[row], "text": table["text"][row].as_py()[:SAMPLE_CHARS]})
            continue
        kept.append(row)
        add(result.dedup.given, 1, sizes[row])
        add(result.splits["val" if task.rule.is_val(hashes[row]) else "train"], 1, sizes[row])
    result.next_val = first_held_out(hashes[row] for row in kept if not task.rule.is_val(hashes[row]))
    documents = table.select(["hash", "text"]).take(pa.array(kept, pa.int64()))
    with writing(task.output), pa.OSFile(str(task.output), "wb") as file, pa.ipc.new_file(file, documents.schema) as writer:
        writer.write_table(documents, max_chunksize=BATCH_ROWS)
    return result


def _batch(path: Path, number: int) -> pa.RecordBatch:
    with pa.memory_map(str(path)) as file:
        return pa.ipc.open_file(file).get_batch(number)
