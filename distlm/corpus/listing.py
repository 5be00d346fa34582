"""The documents of a corpus without their text: `documents.parquet`, and what each source has in each split.

Both are made from the lists that the encoding tasks write, one for each partition.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from distlm.corpus.accounts import account
from distlm.corpus.split import HASH_BYTES
from distlm.errors import CorpusError, InputError
from distlm.storage import replacing

if TYPE_CHECKING:
    from distlm.corpus.manifest import Manifest

FILE = "documents.parquet"
DOCUMENTS = pa.schema([("hash", pa.binary(HASH_BYTES)), ("text_hash", pa.binary(HASH_BYTES)), ("origin", pa.int32()),
                       ("source", pa.string()), ("record", pa.int64()), ("id", pa.string()), ("meta", pa.string()), ("split", pa.string()),
                       ("bytes", pa.int64()), ("tokens", pa.int64()), ("reasons", pa.list_(pa.string())),
                       ("part", pa.int32())])
"""The columns of documents.parquet. `hash`: of the document as it was cleaned, which decides its split; `text_hash`: the same of what is
left of it without boilerplate and repeated paragraphs. `origin`: the place of its source in the `sources` of inputs.json, which tells
files of one name apart; `source`: the name of its file. `part`: of a conversation that was split, which of its parts
this is, from 1; else 0."""
ROW_GROUP = 1 << 16


def write_documents(path: Path, lists: Sequence[Path], files: Sequence[str], origins: Sequence[int], firsts: Sequence[int]) -> None:
    """Write every document that was kept, in order. `files`: the names of files or ranges of them by number; `origins`: of each; `firsts`:
    of each the number of its first record in the file. The bytes depend neither on the partitions nor on the ranges."""
    names, places, before = pa.array(files, pa.string()), pa.array(origins, pa.int32()), pa.array(firsts, pa.int64())
    waiting: list[pa.Table] = []
    with replacing(path) as partial, pq.ParquetWriter(partial, DOCUMENTS, compression="zstd") as writer:
        for one in lists:
            table = _read(one).drop_columns("origin")      # the place in the spec
            table = table.append_column("source", names.take(table["file"])).append_column("origin", places.take(table["file"]))
            table = table.set_column(table.schema.get_field_index("record"), "record", pc.add(table["record"], before.take(table["file"])))
            waiting.append(table.select(DOCUMENTS.names))
            while sum(map(len, waiting)) >= ROW_GROUP:
                together = pa.concat_tables(waiting)
                writer.write_table(together.slice(0, ROW_GROUP).combine_chunks(), row_group_size=ROW_GROUP)
                waiting = [together.slice(ROW_GROUP)]
        writer.write_table(pa.concat_tables(waiting).combine_chunks(), row_group_size=ROW_GROUP)


def open_documents(corpus: Path) -> pq.ParquetFile:
    """The list of a corpus. Raises InputError where there is none, CorpusError for one that cannot be read."""
    path = corpus / FILE
    if not path.is_file():
        raise InputError(f"the corpus has no {FILE}", where=str(corpus), remedy="prepare it again to look up documents")
    try:
        return pq.ParquetFile(path)
    except (OSError, pa.ArrowException) as error:
        raise CorpusError(f"cannot be read: {error}", where=str(path), remedy="prepare the corpus again") from None


def tells_sources(manifest: "Manifest") -> bool:
    """Whether it is known of which source each document of a corpus is."""
    return bool(manifest.sources) and (manifest.path / FILE).is_file()


def read_origins(corpus: Path, split: str) -> NDArray[np.int32]:
    """int32[documents]: of each document of a split, by its number, the place of its source in inputs.json. Raises what `open_documents`
    raises."""
    batches = open_documents(corpus).iter_batches(ROW_GROUP, columns=["split", "origin"])
    found = [batch["origin"].filter(pc.equal(batch["split"], split)).to_numpy() for batch in batches]
    return np.concatenate([np.zeros(0, np.int32), *found])


def count_sources(lists: Sequence[Path], sources: int, splits: Sequence[str]) -> dict[int, dict[str, dict[str, int]]]:
    """Of each source by its place in the spec, what of its documents is in each split: documents, bytes and tokens."""
    counts = {i: {name: {**account(), "tokens": 0} for name in splits} for i in range(sources)}
    for one in lists:
        groups = _read(one).group_by(["origin", "split"])
        for row in groups.aggregate([("bytes", "count"), ("bytes", "sum"), ("tokens", "sum")]).to_pylist():
            count = counts[row["origin"]][row["split"]]
            for unit, found in (("documents", "bytes_count"), ("bytes", "bytes_sum"), ("tokens", "tokens_sum")):
                count[unit] += row[found]
    return counts


def _read(path: Path) -> pa.Table:
    with pa.memory_map(str(path)) as file:
        return pa.ipc.open_file(file).read_all()
