"""The second task: bring one partition of the documents into order, and drop those whose text was there before.

Equal texts have equal order keys, so they meet in one partition, side by side: nothing is shared between tasks, and no copy survives.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from distlm.corpus.accounts import SAMPLE_CHARS, Account, Samples, Step, account, add
from distlm.corpus.clusters import MAX_CLUSTERS, MAX_MEMBERS, excerpt
from distlm.corpus.documents import SCHEMA
from distlm.corpus.labels import labels_in
from distlm.corpus.split import SplitRule, first_held_out
from distlm.spec.prepare import Labels
from distlm.storage import replacing

BATCH_ROWS = 256
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
    table = pa.Table.from_batches(batches, SCHEMA).combine_chunks()
    sizes = pc.binary_length(table["text"]).to_pylist()
    keys, hashes = table["key"].to_pylist(), table["hash"].to_pylist()
    places = list(zip(table["file"].to_pylist(), table["record"].to_pylist(), strict=True))
    kept: list[int] = []
    copies = defaultdict[int, list[int]](list)             # by the row of the one that is kept
    origins = table["origin"].to_pylist()
    for row in sorted(range(len(keys)), key=lambda row: (keys[row], task.ranks[origins[row]], places[row])):
        add(result.dedup.taken, 1, sizes[row])
        if task.dedup and kept and hashes[kept[-1]] == hashes[row]:
            others = _other_labels(table, row, kept[-1], task.labels) if task.labels else ""
            reason = OTHER_LABEL if others else DUPLICATE
            result.dedup.reject(reason, 1, sizes[row])
            copies[kept[-1]].append(row)
            result.samples.add(reason, {"key": keys[row].hex(), "place": places[row], "same_as": places[kept[-1]], "bytes": sizes[row],
                                        "text": table["text"][row].as_py()[:SAMPLE_CHARS], **({"detail": others} if others else {})})
            continue
        kept.append(row)
        add(result.dedup.given, 1, sizes[row])
    for row, equal in sorted(copies.items(), key=lambda item: -len(item[1]))[:MAX_CLUSTERS]:
        members = [(*places[one], table["id"][one].as_py()) for one in [row, *equal[:MAX_MEMBERS - 1]]]
        result.clusters.append({"key": keys[row], "documents": len(equal) + 1, "bytes": sizes[row], "members": members,
                                "text": excerpt(table["text"][row].as_py())})
    left = table.select(KEPT).take(pa.array(kept, pa.int64()))
    result.splits, result.next_val = count_splits(left, [sizes[row] for row in kept], task.rule)
    write_partition(task.output, left)
    return result


def _other_labels(table: pa.Table, row: int, kept: int, rules: Labels) -> str:
    """What tells the labels of a document from those of the one that is kept in its place; "" where they are the same."""
    own, others = (sorted(labels_in(table["meta"][one].as_py(), rules)) for one in (row, kept))
    return "" if own == others else f"labelled {', '.join(own) or 'nothing'}, and what is kept {', '.join(others) or 'nothing'}"


def count_splits(documents: pa.Table, sizes: Sequence[int], rule: SplitRule) -> tuple[dict[str, Account], bytes]:
    """(documents and bytes by split, the hash of the training document that would be held out first)."""
    splits = {name: account() for name in rule.names}
    places = list(zip(documents["hash"].to_pylist(), documents["origin"].to_pylist(), strict=True))
    for (content, origin), size in zip(places, sizes, strict=True):
        add(splits[rule.of(content, origin)], 1, size)
    return splits, first_held_out(places, rule)


def write_partition(path: Path, documents: pa.Table) -> None:
    """Put documents in order where the next task finds them. Raises StorageError."""
    with replacing(path) as partial, pa.OSFile(partial, "wb") as file, pa.ipc.new_file(file, documents.schema) as writer:
        writer.write_table(documents, max_chunksize=BATCH_ROWS)


def _batch(path: Path, number: int) -> pa.RecordBatch:
    with pa.memory_map(str(path)) as file:
        return pa.ipc.open_file(file).get_batch(number)


def read_row(path: Path, row: int, *columns: str) -> dict[str, Any]:
    """A document of a partition."""
    with pa.memory_map(str(path)) as file:
        batch, place = divmod(row, BATCH_ROWS)
        found: dict[str, Any] = pa.ipc.open_file(file).get_batch(batch).select(list(columns)).slice(place, 1).to_pylist()[0]
        return found


def read_column(path: Path, name: str) -> npt.NDArray[Any]:
    with pa.memory_map(str(path)) as file:
        return pa.ipc.open_file(file).read_all()[name].to_numpy()
