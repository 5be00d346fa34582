"""A partition of documents, in order: an Arrow file of small batches, which stages read whole, a batch at a time, or at a place."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy.typing as npt
import pyarrow as pa

from distlm.storage import replacing

BATCH_ROWS = 256


def write_partition(path: Path, documents: pa.Table) -> None:
    """Put documents in order where the next task finds them. Raises StorageError."""
    with replacing(path) as partial, pa.OSFile(partial, "wb") as file, pa.ipc.new_file(file, documents.schema) as writer:
        writer.write_table(documents, max_chunksize=BATCH_ROWS)


def batches(path: Path) -> Iterator[pa.RecordBatch]:
    """Memory-mapped, one after the other."""
    with pa.memory_map(str(path)) as file:
        reader = pa.ipc.open_file(file)
        for number in range(reader.num_record_batches):
            yield reader.get_batch(number)


def read_rows(path: Path, *columns: str) -> Iterator[tuple[Any, ...]]:
    """The values of every document in these columns."""
    for batch in batches(path):
        yield from zip(*(batch[name].to_pylist() for name in columns), strict=True)


def read_row(path: Path, row: int, *columns: str) -> dict[str, Any]:
    """One document."""
    with pa.memory_map(str(path)) as file:
        batch, place = divmod(row, BATCH_ROWS)
        found: dict[str, Any] = pa.ipc.open_file(file).get_batch(batch).select(list(columns)).slice(place, 1).to_pylist()[0]
        return found


def read_column(path: Path, name: str) -> npt.NDArray[Any]:
    with pa.memory_map(str(path)) as file:
        return pa.ipc.open_file(file).read_all()[name].to_numpy()


def num_documents(path: Path) -> int:
    with pa.memory_map(str(path)) as file:
        return int(pa.ipc.open_file(file).count_rows())
