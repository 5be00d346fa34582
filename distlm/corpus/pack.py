"""The last task: tokens to shards of windows.

The documents of a split follow each other in order, each with its end token. A window is context + 1 tokens and begins with the last
token of the one before, so that every token but the first is predicted once. What is left at the end and fills no window is counted.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash

from distlm.corpus.manifest import Shard
from distlm.storage import replacing


@dataclass(frozen=True)
class PackTask:
    """The windows `first` to `first + windows` of a split."""

    folder: Path
    file: str
    """The shard, relative to the folder."""
    parts: list[tuple[Path, int, int]]
    """Where the split's tokens lie, in order: (path without ending, number of the first token, tokens)."""
    first: int
    windows: int
    context: int
    dtype: str


def num_windows(tokens: int, context: int) -> tuple[int, int]:
    """(windows, tokens that are dropped) of a stream of tokens."""
    windows = max(0, tokens - 1) // context
    return windows, tokens - windows * context - 1 if windows else tokens


def write_shard(task: PackTask) -> Shard:
    """Write one shard to a folder that exists. Raises StorageError."""
    begin, end = task.first * task.context, (task.first + task.windows) * task.context + 1
    tokens, starts = [], []
    for path, offset, length in task.parts:
        if offset < end and offset + length > begin:
            low, high = max(begin, offset), min(end, offset + length)
            tokens.append(np.load(f"{path}.npy", mmap_mode="r")[low - offset:high - offset])
            starts.append(np.load(f"{path}-starts.npy") + offset)
    data = shard_bytes(np.concatenate(tokens), np.concatenate(starts) - begin, task.windows, task.context, task.dtype)
    with replacing(task.folder / task.file) as partial, open(partial, "wb") as file:
        file.write(data)
    return Shard(task.file, task.windows, len(data), xxhash.xxh3_64(data).hexdigest())


def shard_bytes(tokens: npt.NDArray[Any], starts: npt.NDArray[np.int64], windows: int, context: int, dtype: str) -> bytes:
    """The Arrow IPC file of `tokens: dtype[windows * context + 1]`, whose documents begin at the places `starts`, ascending."""
    assert len(tokens) == windows * context + 1, (len(tokens), windows, context)
    rows = np.lib.stride_tricks.sliding_window_view(tokens, context + 1)[::context]
    edges = np.arange(windows, dtype=np.int64) * context
    low, high = np.searchsorted(starts, edges, "left"), np.searchsorted(starts, edges + context, "right")
    counts = high - low                                    # a document that begins with a window's last token begins in the next too
    offsets = np.concatenate([[0], np.cumsum(counts)])
    places = starts[np.arange(offsets[-1]) + np.repeat(low - offsets[:-1], counts)] - np.repeat(edges, counts)
    batch = pa.record_batch({
        "tokens": pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(rows).reshape(-1).astype(dtype)), context + 1),
        "starts": pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), pa.array(places.astype(np.int32)))})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return sink.getvalue().to_pybytes()
