"""A parquet file, or a range of one, as rows of the columns that are asked for, of which few are in memory at a time.

    with opened("a.parquet") as columns:
        for row in columns.rows(["text", "meta.url"]): ...     # {"text": a scalar} where there is no meta.url
"""

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

BATCH_ROWS = 8
"""Rows that are decoded at a time: a few bytes of a file may stand for many long rows, which no figure in it tells."""
PAGE_BUFFER = 1 << 20
"""Bytes of a column that are read at a time, or a page of it: else all that a row group has of it, which may be most of the file."""


@contextlib.contextmanager
def opened(source: Any, begin: int = 0, end: int | None = None) -> Iterator["Columns"]:
    """Of the file at a path, or one that is open, the row groups that begin at a byte from `begin` on and before `end`. This, and what it
    gives, raises ArrowException, OSError, ValueError, LookupError or MemoryError for a damaged file."""
    with pq.ParquetFile(source, buffer_size=PAGE_BUFFER, pre_buffer=False) as file:
        schema = file.schema_arrow
        yield Columns(file, schema, [i for i in range(file.metadata.num_row_groups) if _is_within(file.metadata.row_group(i), begin, end)])


@dataclass(frozen=True)
class Columns:
    """The row groups of a file, by their numbers. A column is named by its name, or by those that lead to a field of it, with dots."""

    file: pq.ParquetFile
    schema: pa.Schema
    groups: list[int]

    @property
    def names(self) -> list[str]:
        return list(self.schema.names)

    @property
    def num_rows(self) -> int:
        return sum(self.file.metadata.row_group(i).num_rows for i in self.groups)

    def has(self, key: str) -> bool:
        if key in self.schema.names:
            return True
        first, *parts = key.split(".")
        kind = self.schema.types[self.schema.names.index(first)] if first in self.schema.names else None
        for part in parts:
            kind = kind.field(part).type if kind is not None and pa.types.is_struct(kind) and kind.get_field_index(part) >= 0 else None
        return kind is not None

    def rows(self, keys: Iterable[str]) -> Iterator[dict[str, Any]]:
        """The values of each row in those of the columns that there are, as scalars of Arrow."""
        found = [key for key in dict.fromkeys(keys) if self.has(key)]
        for batch in self.file.iter_batches(batch_size=BATCH_ROWS, row_groups=self.groups, columns=found):
            columns = {key: _column(batch, key) for key in found}
            for row in range(len(batch)):
                yield {key: column[row] for key, column in columns.items()}


def plain(value: Any) -> Any:
    """The value of a scalar; as text where Python has no such type."""
    try:
        return value.as_py()
    except UnicodeDecodeError:
        return value.as_buffer().to_pybytes() if isinstance(value, pa.BinaryScalar) else "not UTF-8"
    except (ValueError, ImportError, OverflowError):       # nanoseconds, or a year after 9999
        with contextlib.suppress(pa.ArrowException, UnicodeDecodeError):
            return value.cast(pa.string()).as_py()
        return f"a {value.type}"


def _is_within(group: pq.RowGroupMetaData, begin: int, end: int | None) -> bool:
    """Whether a row group begins in the range."""
    if not begin and end is None:
        return True
    column = group.column(0)
    pages = (column.data_page_offset, column.dictionary_page_offset)
    place = max(0, min(page for page in pages if page is not None))
    return begin <= place and (end is None or place < end)


def _column(batch: pa.RecordBatch, key: str) -> Any:
    names = batch.schema.names
    if key in names:
        return batch.column(names.index(key))
    first, *parts = key.split(".")
    return pc.struct_field(batch.column(names.index(first)), parts)
