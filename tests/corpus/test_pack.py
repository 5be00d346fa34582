import random
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from distlm.corpus.pack import PackTask, num_windows, shard_bytes, write_shard
from distlm.errors import StorageError


def windows_of(data: bytes) -> tuple[list[list[int]], list[list[int]]]:
    reader = pa.ipc.open_file(pa.BufferReader(data))
    assert reader.num_record_batches == 1
    batch = reader.get_batch(0)
    return batch["tokens"].to_pylist(), batch["starts"].to_pylist()


@pytest.mark.parametrize("seed", range(20))
def test_every_token_but_the_first_is_predicted_once_and_every_start_is_where_it_was(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    context, shard_windows = rng.choice([1, 2, 5, 8]), rng.choice([1, 3, 100])
    documents = [[rng.randrange(70_000) for _ in range(rng.choice([1, 2, 3, 30]))] for _ in range(rng.randrange(4, 40))]
    parts, offset = [], 0
    while documents[sum(len(part) for part in parts):]:
        rest = documents[sum(len(part) for part in parts):]
        parts.append(rest[:rng.randrange(0, 10)])
    files = []
    for i, part in enumerate(parts):                       # a part may be empty
        lengths = np.array([len(document) for document in part], np.int64)
        np.save(tmp_path / f"p{i}.npy", np.array([token for document in part for token in document], np.uint32))
        np.save(tmp_path / f"p{i}-starts.npy", np.cumsum(lengths) - lengths)
        files.append((tmp_path / f"p{i}", offset, int(lengths.sum())))
        offset += int(lengths.sum())
    (tmp_path / "train").mkdir()
    tokens = [token for document in documents for token in document]
    starts = {sum(len(document) for document in documents[:i]) for i in range(len(documents))}
    windows, dropped = num_windows(len(tokens), context)
    assert len(tokens) == (windows * context + 1 if windows else 0) + dropped and dropped <= context

    seen: list[list[int]] = []
    for first in range(0, windows, shard_windows):
        task = PackTask(tmp_path, "train/0.arrow", files, first, min(shard_windows, windows - first), context, "uint32")
        shard = write_shard(task)
        rows, places = windows_of((tmp_path / shard.file).read_bytes())
        assert len(rows) == shard.windows
        for i, row_places in enumerate(places, first):
            assert row_places == [p for p in range(context + 1) if i * context + p in starts]
        seen += rows
    assert [row[:-1] for row in seen] == [tokens[i * context:(i + 1) * context] for i in range(windows)]
    assert [row[-1] for row in seen] == [tokens[(i + 1) * context] for i in range(windows)]


def test_a_shard_is_as_the_contract_says_it_is() -> None:
    data = shard_bytes(np.arange(9, dtype=np.uint16), np.array([0, 4]), 2, 4, "uint16")
    schema = pa.ipc.open_file(pa.BufferReader(data)).schema
    assert schema.field("tokens").type == pa.list_(pa.uint16(), 5)
    assert schema.field("starts").type == pa.list_(pa.int32())
    assert windows_of(data) == ([[0, 1, 2, 3, 4], [4, 5, 6, 7, 8]], [[0, 4], [0]])


def test_a_shard_that_the_disk_has_no_room_for_is_a_storage_error(tmp_path: Path) -> None:
    np.save(tmp_path / "p.npy", np.zeros(50_001, np.uint16))
    np.save(tmp_path / "p-starts.npy", np.zeros(1, np.int64))
    (tmp_path / "train").mkdir()
    program = f"""
import resource
from pathlib import Path
from distlm.corpus.pack import PackTask, write_shard
from distlm.errors import StorageError
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, {resource.RLIM_INFINITY}))
folder = Path({str(tmp_path)!r})
try:
    write_shard(PackTask(folder, "train/0.arrow", [(folder / "p", 0, 50_001)], 0, 1000, 50, "uint16"))
except StorageError as error:
    print("StorageError", error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith("StorageError") and "0.arrow" in done.stdout, done
    assert StorageError.exit_code == 4
