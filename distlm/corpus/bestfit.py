"""Best-fit packing: no document that fits a window is cut (Ding et al. 2024, "Fewer Truncations Improve Language Modeling",
arXiv:2404.10830).

A longer document is cut as contiguous windows cut: each piece begins with the last token of the one before, so that every token of a
document but its first is predicted once. All but its last piece fill a window; that one, and every other document, goes by
best-fit-decreasing to where it leaves the least room, and the end token fills what room is left.

Documents are packed by groups of consecutive ones, a shard each: memory is bounded by `shard_windows`, groups are packed in parallel,
and the order of the corpus stays that of the groups. Inside a shard, windows are shuffled: those that were opened first hold the
longest documents, and the first windows of a split are what evaluation takes.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash

from distlm.corpus.manifest import Shard
from distlm.corpus.order import permutation
from distlm.storage import replacing

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Group:
    """Consecutive documents of a split: the first one's number, and where their tokens begin and end among the split's."""

    first_document: int
    begin: int
    end: int


@dataclass(frozen=True)
class BestFitTask:
    """A group that becomes a shard."""

    folder: Path
    file: str
    """The shard, relative to the folder."""
    parts: list[tuple[Path, int, int]]
    """Where the split's tokens lie, in order: (path without ending, number of the first token, tokens)."""
    group: Group
    context: int
    dtype: str
    eos_id: int
    conversations: bool = False
    """Whether the tokens have beside them which give loss."""
    pairs: bool = False
    """Whether two documents in a row, which fit a window together, have one of their own."""
    labels: tuple[str, ...] = ()
    """The labels of all documents by their numbers: each document, which fits a window, has one of its own."""


@dataclass(frozen=True)
class Packed:
    """A shard, and what its windows hold beside each document's tokens once."""

    shard: Shard
    padding_tokens: int
    repeated_tokens: int
    """The first ones of pieces that carry on a document."""


def groups(parts: list[tuple[Path, int, int]], target_tokens: int) -> Iterator[Group]:
    """Groups of documents that end with the first one that brings them to `target_tokens`; the last may be smaller. One part's
    documents are held at a time."""
    number = begin = first = 0
    for path, offset, length in parts:
        starts = np.load(f"{path}-starts.npy", mmap_mode="r")
        ends = offset + np.append(starts[1:], length) if len(starts) else starts
        done = 0
        while (at := done + int(np.searchsorted(ends[done:], begin + target_tokens))) < len(ends):
            done = at + 1
            yield Group(first, begin, int(ends[at]))
            first, begin = number + done, int(ends[at])
        number += len(ends)
    if number > first:
        yield Group(first, begin, sum(length for _, _, length in parts))


def document_groups(parts: list[tuple[Path, int, int]], documents: int) -> Iterator[Group]:
    """Groups of so many documents; the last may be smaller."""
    starts = np.concatenate([np.zeros(0, np.int64), *(np.load(f"{path}-starts.npy") + offset for path, offset, _ in parts)])
    edges = np.append(starts, sum(length for _, _, length in parts))
    for first in range(0, len(starts), documents):
        yield Group(first, int(edges[first]), int(edges[min(first + documents, len(starts))]))


def write_best_fit(task: BestFitTask) -> Packed:
    """Write one shard to a folder that exists. Raises StorageError."""
    begin, end = task.group.begin, task.group.end
    tokens, starts, loss = [np.zeros(0, task.dtype)], [np.zeros(0, np.int64)], [np.zeros(0, np.bool_)]
    labels, numbers = list[list[int]](), {name: number for number, name in enumerate(task.labels)}
    for path, offset, length in task.parts:
        if offset < end and offset + length > begin:
            found = np.load(f"{path}-starts.npy", mmap_mode="r") + offset
            here = (found >= begin) & (found < end)
            starts.append(found[here] - begin)
            mine = slice(max(begin, offset) - offset, min(end, offset + length) - offset)
            tokens.append(np.load(f"{path}.npy", mmap_mode="r")[mine])
            if task.conversations:
                loss.append(np.load(f"{path}-loss.npy", mmap_mode="r")[mine])
            if task.labels:
                names = json.loads(Path(f"{path}-labels.json").read_bytes())
                labels += [sorted(numbers[name] for name in names[i]) for i in np.flatnonzero(here)]
    data, windows, repeated = best_fit_bytes(np.concatenate(tokens), np.concatenate(starts), task.group.first_document, task.context,
                                             task.dtype, task.eos_id, np.concatenate(loss) if task.conversations else None,
                                             labels if task.labels else None, task.pairs)
    with replacing(task.folder / task.file) as partial, open(partial, "wb") as file:
        file.write(data)
    shard = Shard(task.file, windows, len(data), xxhash.xxh3_64(data).hexdigest())
    return Packed(shard, windows * (task.context + 1) - (end - begin) - repeated, repeated)


def best_fit_bytes(tokens: npt.NDArray[Any], starts: Ints, first_document: int, context: int, dtype: str,
                   padding: int, loss: npt.NDArray[np.bool_] | None = None,
                   labels: list[list[int]] | None = None, pairs: bool = False) -> tuple[bytes, int, int]:
    """(an Arrow IPC file, its windows, its repeated tokens) of `tokens: dtype[n]`, whose documents begin at the places `starts`.
    loss: bool[n], where not all tokens give it. labels: of each document, which then has a window of its own; with `pairs` every two
    documents have."""
    document, offset, length = pieces(np.diff(np.append(starts, len(tokens))), context)
    packed = labels is None and not pairs
    window = best_fit(length, context + 1) if packed else np.arange(len(length)) // (1 + pairs)
    windows = int(window.max(initial=-1)) + 1
    window = permutation(windows, 0, 0, first_document)[window] if packed else window
    order = np.argsort(window, kind="stable")              # inside a window, pieces stay in the order of the corpus
    window, document, offset, length = window[order], document[order], offset[order], length[order]
    counts = np.bincount(window, minlength=windows)
    filled = np.bincount(window, length, windows).astype(np.int64)
    place = np.cumsum(length) - length - np.repeat(np.cumsum(filled) - filled, counts)
    rows = np.full((windows, context + 1), padding, dtype)
    gives = np.zeros((windows, context + 1) if loss is not None else 0, np.bool_)
    for row, at, source, size in zip(window.tolist(), place.tolist(), (starts[document] + offset).tolist(), length.tolist(), strict=True):
        rows[row, at:at + size] = tokens[source:source + size]
        if loss is not None:
            gives[row, at:at + size] = loss[source:source + size]
    beside = {} if loss is None else {"loss": pa.FixedSizeListArray.from_arrays(pa.array(gives.reshape(-1)), context + 1)}
    if labels is not None:
        beside["labels"] = pa.array(labels, pa.list_(pa.int32()))
    offsets = pa.array(np.concatenate([[0], np.cumsum(counts)]).astype(np.int32))
    batch = pa.record_batch({
        "tokens": pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), context + 1),
        "starts": pa.ListArray.from_arrays(offsets, pa.array(place.astype(np.int32))),
        "documents": pa.ListArray.from_arrays(offsets, pa.array(document + first_document)),
        "offsets": pa.ListArray.from_arrays(offsets, pa.array(offset)), "filled": pa.array(filled.astype(np.int32)), **beside})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return sink.getvalue().to_pybytes(), windows, int((offset > 0).sum())


def pieces(lengths: Ints, context: int) -> tuple[Ints, Ints, Ints]:
    """(number of the document, place of the first token in it, length) of each piece, in order. lengths: int64[documents]."""
    counts = np.maximum(1, -(-(lengths - 1) // context))
    document = np.repeat(np.arange(len(lengths)), counts)
    offset = (np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)) * context
    return document, offset, np.minimum(context + 1, lengths[document] - offset)


def best_fit(lengths: Ints, capacity: int) -> Ints:
    """int64[n]: the window of each piece, none of which is longer than `capacity`. The longest come first, equal ones in their order;
    each goes to the window with the least room that it fits, of equal ones the last that came to that room, else to a new one.

    A segment tree over the amounts of room, each node the largest amount below it that some window has, finds that one in
    log2(capacity) steps (Ding et al., section 3.2)."""
    size = 1 << capacity.bit_length()
    tree, rooms = [0] * (2 * size), [list[int]() for _ in range(capacity)]
    windows = 0

    def update(room: int) -> None:
        node = size + room
        tree[node] = room if rooms[room] else 0
        while node > 1:
            node //= 2
            tree[node] = tree[2 * node + 1] or tree[2 * node]

    found = np.empty(len(lengths), np.int64)
    order = np.argsort(-lengths, kind="stable")
    for piece, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        if tree[1] < length:
            window, room, windows = windows, capacity, windows + 1
        else:
            node = 1
            while node < size:
                node = 2 * node if tree[2 * node] >= length else 2 * node + 1
            room = node - size
            window = rooms[room].pop()
            if not rooms[room]:
                update(room)
        found[piece] = window
        if left := room - length:
            rooms[left].append(window)
            if len(rooms[left]) == 1:
                update(left)
    return found
