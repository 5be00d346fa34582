import gzip
import json
import os
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash
import zstandard

from distlm.corpus.read import Reader, Record, find_files
from distlm.errors import InputError
from distlm.spec.prepare import Source


def read(path: Path, limit: int = 10_000_000, **source: Any) -> tuple[list[Record], Reader]:
    """Every record; the file's hash and the accounts hold whatever it is."""
    (file,) = find_files([Source(path=str(path), **source)])
    reader = Reader(file, limit)
    records = list(reader.records())
    assert sum(record.bytes for record in records) == reader.stream_bytes
    assert reader.raw_bytes == path.stat().st_size
    assert reader.digest.hexdigest() == xxhash.xxh3_64(path.read_bytes()).hexdigest()
    return records, reader


def reasons(records: list[Record]) -> list[str]:
    return [record.reason or record.text for record in records if record.documents]


def lines(*values: Any) -> bytes:
    return b"".join(value if isinstance(value, bytes) else json.dumps(value).encode() + b"\n" for value in values)


def test_bad_lines_are_rejected_beside_the_good_ones_that_surround_them(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + lines({"text": "one"}, b"{broken\n", {"other": 1}, b'{"text": "\xff"}\n', {"text": 5}, b"\n", [1],
                                             b'{"text": "\\ud800"}\n', b"[" * 100_000 + b"\n", {"text": None}, {"text": "two\r\n\0"},
                                             b'{"text": "last, without a line feed"}'))
    records, reader = read(path)
    assert reasons(records) == ["one", "malformed", "missing_field", "not_utf8", "not_text", "malformed", "not_utf8", "malformed",
                                "missing_field", "two\r\n\0", "last, without a line feed"]
    assert [record.number for record in records] == list(range(12))
    assert (reader.objects, reader.with_key, reader.keys) == (7, 5, ["text"])


def test_a_line_of_50_mb_is_rejected_and_never_held(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(lines({"text": "before"}) + b'{"text": "')
        for _ in range(50):
            file.write(b"x" * 1_000_000)
        file.write(b'"}\n' + lines({"text": "after"}))
    tracemalloc.start()
    records, _ = read(path, limit=1_000_000)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert reasons(records) == ["before", "too_long", "after"]
    assert records[1].bytes == 50_000_013
    assert peak < 16_000_000


@pytest.mark.parametrize("format", ["text", "jsonl"])
def test_a_document_is_too_long_by_the_bytes_of_its_text(tmp_path: Path, format: str) -> None:
    for length, expected in ((100, "é" * 50), (102, "too_long")):
        path = tmp_path / f"{length}"
        path.write_bytes("é".encode() * (length // 2) if format == "text" else lines({"text": "é" * (length // 2)}))
        records, _ = read(path, limit=100, format=format)
        assert reasons(records) == [expected]


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_compressed_files_of_several_members_are_read_whole(tmp_path: Path, ending: str) -> None:
    compress = gzip.compress if ending == ".gz" else zstandard.ZstdCompressor().compress
    path = tmp_path / f"a.jsonl{ending}"
    values = [{"text": os.urandom(20_000).hex()} for _ in range(4)]
    path.write_bytes(compress(lines(*values[:2])) + compress(b"") + compress(lines(*values[2:])))
    records, _ = read(path)
    assert reasons(records) == [value["text"] for value in values]


@pytest.mark.parametrize("ending", [".gz", ".zst"])
@pytest.mark.parametrize("damage", ["cut", "changed", "nonsense", "trailing"])
def test_a_corrupt_compressed_file_is_one_reject_after_what_could_be_read(tmp_path: Path, ending: str, damage: str) -> None:
    compress = gzip.compress if ending == ".gz" else zstandard.ZstdCompressor(write_checksum=True).compress
    data = bytearray(compress(lines(*({"text": os.urandom(100_000).hex()} for _ in range(30)))))
    path = tmp_path / f"a.jsonl{ending}"
    if damage == "cut":
        data = data[:len(data) * 2 // 3]
    elif damage == "changed":
        data[-3000] ^= 255
    elif damage == "trailing":
        data += b"no compressed data"
    path.write_bytes(b"nonsense" if damage == "nonsense" else data)
    records, _ = read(path)
    assert [record.reason for record in records if record.reason] == ["corrupt"]
    assert records[-1].reason == "corrupt"
    assert len(records) > {"cut": 10, "changed": 10, "nonsense": 0, "trailing": 30}[damage]


def test_parquet_rows_without_text_are_rejected_and_a_damaged_file_too(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"body": ["one", None, "x" * 200, "two"], "n": [1, 2, 3, 4]}), path)
    records, _ = read(path, limit=100, text_key="body")
    assert reasons(records) == ["one", "missing_field", "too_long", "two"]
    records, _ = read(path, text_key="n")
    assert reasons(records) == ["not_text"] * 4
    records, reader = read(path, text_key="txt")
    assert (reasons(records), reader.objects, reader.with_key, reader.keys) == (["missing_field"] * 4, 4, 0, ["body", "n"])
    path.write_bytes(path.read_bytes()[:-6])
    records, _ = read(path)
    assert reasons(records) == ["corrupt"]


def test_text_files_are_one_document_each_and_bytes_that_are_no_utf8_are_rejected(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhello\n")
    (tmp_path / "b.md").write_bytes("héllo".encode("latin-1"))
    (tmp_path / "c.unknown").write_bytes(b"")
    assert [reasons(read(tmp_path / name)[0]) for name in ("a.txt", "b.md", "c.unknown")] == [["hello\n"], ["not_utf8"], [""]]


@pytest.mark.parametrize("format", ["text", "jsonl", "parquet"])
def test_a_file_that_vanishes_a_broken_link_and_a_pipe_are_rejects(tmp_path: Path, format: str) -> None:
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "b.txt").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "c.txt")
    files = find_files([Source(path=str(tmp_path), format=format)])  # type: ignore[arg-type]
    (tmp_path / "a.txt").unlink()
    assert [reasons(list(Reader(file, 100).records())) for file in files] == [["unreadable"]] * 3


def test_names_do_not_tell_where_the_files_are_nor_in_which_order_they_were_given(tmp_path: Path) -> None:
    for host in ("here", "there"):
        for name in ("data/b.txt", "data/sub/a.jsonl", "data/.git/x", "data/__pycache__/y.pyc", "other/c.txt"):
            (tmp_path / host / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / host / name).write_text("x")
    sources = [Source(path=str(tmp_path / "here" / part)) for part in ("data", "other/*.txt")]
    elsewhere = [Source(path=str(tmp_path / "there" / part)) for part in ("other/*.txt", "data")]
    names = [[(file.name, file.format) for file in find_files(given)] for given in (sources, elsewhere)]
    assert names[0] == names[1] == [("data/b.txt", "text"), ("data/sub/a.jsonl", "jsonl"), ("other/c.txt", "text")]


def test_stdlib_is_the_sources_of_the_running_interpreter_without_tests() -> None:
    files = find_files([Source(path="stdlib")])
    names = [file.name for file in files]
    assert "stdlib/json/decoder.py" in names
    assert 400 < len(files) < 1200
    assert not [name for name in names if {"test", "site-packages", "__pycache__"} & set(name.split("/")) or not name.endswith(".py")]
    assert Counter(names).most_common(1)[0][1] == 1


@pytest.mark.parametrize(("path", "expected"), [
    ("dat", "did you mean .*data"), ("stdlb", "did you mean stdlib"), ("data/*.csv", "no file matches"), ("empty", "holds no file"),
    ("s3://bucket/x", "not supported yet"), ("nowhere/at/all", "no such file")])
def test_a_source_that_names_nothing_is_found_before_work(tmp_path: Path, path: str, expected: str) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=expected) as caught:
        find_files([Source(path=path if "://" in path else str(tmp_path / path))])
    assert "sources.0.path" in str(caught.value)
