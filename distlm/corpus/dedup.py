"""The second task: bring one partition of the documents into order, and drop those whose text was there before.

Equal texts have equal order keys, so they meet in one partition, side by side: nothing is shared between tasks, and no copy survives.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from distlm.corpus.accounts import MAX_SAMPLES, SAMPLE_CHARS, Account, Samples, Step, account, add
from distlm.corpus.clusters import MAX_CLUSTERS, MAX_MEMBERS, excerpt
from distlm.corpus.documents import SCHEMA
from distlm.corpus.labels import labels_in
from distlm.corpus.partitions import write_partition
from distlm.corpus.split import HASH_BYTES, SplitRule, first_held_out
from distlm.spec.prepare import Labels

Numbers = npt.NDArray[np.uint64]
DUPLICATE, OTHER_LABEL = "duplicate", "duplicate_other_label"
"""Why a document goes whose text another has: of documents with labels, the second where its labels are not those of the one that stays."""
KEPT = ["hash", "file", "origin", "record", "id", "meta", "reasons", "text", "turns"]
"""The columns of a partition of documents."""


@dataclass(frozen=True)
class SortTask:
    """A partition, and the files that hold parts of it."""

    partition: int
    parts: list[Path]
    dedup: bool
    rule: SplitRule
    ranks: tuple[int, ...]
    """Of each source, by its place in the spec: of equal documents that of the lowest is kept."""
    output: Path
    labels: Labels | None = None


@dataclass
class SortResult:
    """What is left of the partition. The step `split` takes in what `dedup` gives out."""

    dedup: Step = field(default_factory=lambda: Step("dedup"))
    splits: dict[str, Account] = field(default_factory=dict)
    samples: Samples = field(default_factory=Samples)
    """Of duplicates, in the order of the documents: (file, record) of the copy that is dropped and of the one that is kept."""
    next_val: bytes = b""
    """The hash of the training document that would be held out first."""
    clusters: list[dict[str, Any]] = field(default_factory=list)
    """The largest of equal documents, these first: key, documents, bytes of each, text, and the first members, (file, record, id), that
    which is kept before the others."""


def sort_partition(task: SortTask) -> SortResult:
    """Write the partition's documents to `task.output`, in order. Raises StorageError."""
    result = SortResult()
    batches = [_batch(path, task.partition) for path in task.parts]
    table = pa.Table.from_batches(batches, SCHEMA)         # on disk, but for what is taken of it: any number of copies may be here
    sizes = np.concatenate([np.zeros(0, np.int64), *(pc.binary_length(batch["text"]).to_numpy() for batch in batches)])
    ranks, file, record = np.array(task.ranks, np.int64)[table["origin"].to_numpy()], table["file"].to_numpy(), table["record"].to_numpy()
    order = np.lexsort((record, file, ranks, *_halves(table["key"])[::-1]))
    is_first = np.ones(len(order), bool)
    if task.dedup:
        high, low = (half[order] for half in _halves(table["hash"]))
        is_first[1:] = (high[1:] != high[:-1]) | (low[1:] != low[:-1])
    firsts = np.flatnonzero(is_first)
    kept, copies = order[firsts], np.diff(firsts, append=len(order))
    result.dedup.taken, result.dedup.given = account(len(order), int(sizes.sum())), account(len(kept), int(sizes[kept].sum()))

    def place(row: int) -> tuple[int, int]:
        return int(file[row]), int(record[row])

    def value(row: int, column: str) -> Any:
        return table[column][row].as_py()

    if task.labels is None:
        result.dedup.reject(DUPLICATE, len(order) - len(kept), int(sizes.sum() - sizes[kept].sum()))
    lost = np.flatnonzero(~is_first)
    for position in (lost if task.labels else lost[:MAX_SAMPLES]).tolist():
        row, keeper, reason, detail = int(order[position]), int(kept[np.searchsorted(firsts, position) - 1]), DUPLICATE, {}
        if task.labels and (others := _other_labels(value(row, "meta"), value(keeper, "meta"), task.labels)):
            reason, detail = OTHER_LABEL, {"detail": others}
        if task.labels:
            result.dedup.reject(reason, 1, int(sizes[row]))
        result.samples.add(reason, {"key": value(row, "key").hex(), "place": place(row), "same_as": place(keeper), "bytes": int(sizes[row]),
                                    "text": value(row, "text")[:SAMPLE_CHARS], **detail})
    for group in np.argsort(-copies, kind="stable")[:MAX_CLUSTERS].tolist():
        if copies[group] > 1:
            rows = order[firsts[group]:firsts[group] + min(copies[group], MAX_MEMBERS)].tolist()
            result.clusters.append({"key": value(rows[0], "key"), "documents": int(copies[group]), "bytes": int(sizes[rows[0]]),
                                    "members": [(*place(one), value(one, "id")) for one in rows],
                                    "text": excerpt(value(rows[0], "text"))})
    left = _taken(batches, kept)
    result.splits, result.next_val = count_splits(left, sizes[kept].tolist(), task.rule)
    write_partition(task.output, left)
    return result


def _halves(column: pa.ChunkedArray) -> tuple[Numbers, Numbers]:
    """Keys or hashes as two numbers each, which are ordered as the bytes are."""
    both = np.frombuffer(b"".join(memoryview(chunk.buffers()[1])[HASH_BYTES * chunk.offset:][:HASH_BYTES * len(chunk)]
                                  for chunk in column.chunks), ">u8").astype(np.uint64).reshape(-1, 2)
    return both[:, 0], both[:, 1]


def _taken(batches: Sequence[pa.RecordBatch], rows: npt.NDArray[np.int64]) -> pa.Table:
    """These rows of all batches together, in this order; nothing else is held, which taking from a table of several chunks would do."""
    ends = np.cumsum([len(batch) for batch in batches])
    source = np.searchsorted(ends, rows, "right")
    parts = [batch.select(KEPT).take(pa.array(rows[source == i] - (ends[i] - len(batch)))) for i, batch in enumerate(batches)]
    grouped = np.argsort(source, kind="stable")
    return pa.Table.from_batches(parts, pa.schema([SCHEMA.field(name) for name in KEPT])).combine_chunks().take(
        pa.array(np.argsort(grouped, kind="stable")))


def _other_labels(meta: str, kept: str, rules: Labels) -> str:
    """What tells the labels of a document from those of the one that is kept in its place; "" where they are the same."""
    own, others = (sorted(labels_in(one, rules)) for one in (meta, kept))
    return "" if own == others else f"labelled {', '.join(own) or 'nothing'}, and what is kept {', '.join(others) or 'nothing'}"


def count_splits(documents: pa.Table, sizes: Sequence[int], rule: SplitRule) -> tuple[dict[str, Account], bytes]:
    """(documents and bytes by split, the hash of the training document that would be held out first)."""
    splits = {name: account() for name in rule.names}
    places = list(zip(documents["hash"].to_pylist(), documents["origin"].to_pylist(), strict=True))
    for (content, origin), size in zip(places, sizes, strict=True):
        add(splits[rule.of(content, origin)], 1, size)
    return splits, first_held_out(places, rule)


def _batch(path: Path, number: int) -> pa.RecordBatch:
    with pa.memory_map(str(path)) as file:
        return pa.ipc.open_file(file).get_batch(number)
