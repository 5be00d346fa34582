"""Copies of a text, however many there are, and which of them is kept."""

import tracemalloc
from pathlib import Path

import pyarrow as pa

from distlm.corpus.dedup import SortTask, sort_partition
from distlm.corpus.documents import SCHEMA
from distlm.corpus.split import SplitRule, document_hash, order_key

TEXT = "The same page that a crawl has met again and again. " * 20


def write(path: Path, file: int, copies: int, origin: int = 0) -> Path:
    """A part with the text so many times, and once another."""
    texts = [TEXT] * copies + [f"from {file}"]
    hashes = {text: document_hash(text) for text in texts}
    columns = [[order_key(hashes[text], 0) for text in texts], [hashes[text] for text in texts], [file] * len(texts),
               [origin] * len(texts), list(range(len(texts))), [str(i) for i in range(len(texts))], [""] * len(texts),
               [[]] * len(texts), texts, [""] * len(texts)]
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer:
        writer.write_batch(pa.record_batch([pa.array(column, kind.type) for column, kind in zip(columns, SCHEMA, strict=True)],
                                           schema=SCHEMA))
    return path


def test_of_equal_texts_that_of_the_first_rank_file_and_record_is_kept_and_all_are_counted(tmp_path: Path) -> None:
    parts = [write(tmp_path / "a", 0, 3, origin=1), write(tmp_path / "b", 2, 2), write(tmp_path / "none", 4, 0, origin=1),
             write(tmp_path / "c", 1, 2)]
    result = sort_partition(SortTask(0, parts, True, SplitRule(0), (0, 1), tmp_path / "out"))
    size = len(TEXT)
    assert result.dedup.taken == {"documents": 11, "bytes": 7 * size + 24}
    assert (result.dedup.given, dict(result.dedup.rejected)) == ({"documents": 5, "bytes": size + 24},
                                                                  {"duplicate": {"documents": 6, "bytes": 6 * size}})
    [cluster] = result.clusters
    order = [(1, 0), (1, 1), (2, 0), (2, 1), (0, 0), (0, 1), (0, 2)]
    assert cluster["documents"] == 7 and [member[:2] for member in cluster["members"]] == order
    assert [(one["place"], one["same_as"]) for one in result.samples.kept["duplicate"]] == [(place, (1, 0)) for place in order[1:]]
    with pa.memory_map(str(tmp_path / "out")) as file:
        rows = pa.ipc.open_file(file).read_all().to_pylist()
    assert [row["text"] for row in rows] == sorted({row["text"] for row in rows}, key=lambda text: order_key(document_hash(text), 0))
    every = sort_partition(SortTask(0, parts, False, SplitRule(0), (0, 1), tmp_path / "out"))
    assert every.dedup.given == every.dedup.taken == result.dedup.taken and not every.dedup.rejected and not every.clusters


def test_what_copies_take_in_memory_is_a_few_numbers_each(tmp_path: Path) -> None:
    """They all meet in one partition: of a page that is there a million times not even the text of each is held."""
    parts, copies = [write(tmp_path / name, i, 20_000) for i, name in enumerate("ab")], 40_000
    before = pa.default_memory_pool()
    pa.set_memory_pool(pool := pa.proxy_memory_pool(before))
    tracemalloc.start()
    try:
        result = sort_partition(SortTask(0, parts, True, SplitRule(0), (0,), tmp_path / "out"))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
        pa.set_memory_pool(before)
    assert result.dedup.rejected["duplicate"]["documents"] == copies - 1
    assert peak < 150 * copies and (pool.max_memory() or 0) < copies * len(TEXT) / 20
