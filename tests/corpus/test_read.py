import datetime
import gzip
import json
import os
import random
import sys
import tarfile
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash

from distlm.corpus import raw
from distlm.corpus.decompress import ENDINGS
from distlm.corpus.files import find_files, ranges
from distlm.corpus.read import Reader, Record
from distlm.errors import InputError
from distlm.spec.prepare import Source
from tests.corpus.records import COMPRESS, STORY, lines, page, read, reasons


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


def in_ranges(path: Path, size: int, limit: int = 10_000_000) -> tuple[list[Record], list[Reader]]:
    """The records of the file as ranges of it give them, numbered as in the whole; each range reads and hashes its own bytes alone."""
    (file,) = find_files([Source(path=str(path))])
    data, found, readers = path.read_bytes(), list[Record](), list[Reader]()
    for part in ranges(file, size):
        reader = Reader(part, limit)
        first = len(found)
        found += [record._replace(number=first + record.number) for record in reader.records()]
        own = data[part.begin:part.end]
        assert reader.num_records == len(found) - first
        assert (reader.raw.num_bytes, reader.raw.digest.hexdigest()) == (len(own), xxhash.xxh3_64_hexdigest(own)) and part.bytes == len(own)
        assert sum(record.bytes for record in found[first:]) == reader.stream_bytes
        readers.append(reader)
    return found, readers


@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n", b"\n\n", "ä".encode()])
def test_a_file_of_lines_gives_the_same_records_in_ranges_of_any_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: bytes) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + lines({"text": "one"}) + b'{"text": "two"}\r\n\n' + '{"text": "日本語 🤷🏽 ä"}\n'.encode()
                     + b'\r\n\n\n{broken\n{"other": 1}\n{"text": "\xff"}\n' + b'{"text": "long ' + b"x" * 70_000 + b'"}\n'
                     + b'{"text": "' + b"y" * 150 + b'"}\n{"text": "last"}' + end)
    whole, reader = read(path, limit=100)
    assert Counter(record.reason for record in whole)["too_long"] == 2
    for chunk in (1 << 20, 7):
        monkeypatch.setattr(raw, "CHUNK", chunk)
        for size in (*range(3, 40), 64, 1000, 70_000, path.stat().st_size - 1, path.stat().st_size) if chunk > 7 else (29, 64, 5000):
            if size < 40:                                  # many ranges without a line: only about the ends of lines
                path.write_bytes(path.read_bytes().replace(b"x" * 70_000, b"x" * 120))
                whole, reader = read(path, limit=100)
            found, readers = in_ranges(path, size, limit=100)
            assert found == whole
            assert sum(one.objects for one in readers) == reader.objects and len(readers) == -(-path.stat().st_size // size)
    assert in_ranges(path, 10**9)[0] == read(path)[0]


def test_a_line_that_fills_ranges_is_read_once(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "' + b"x" * 5_000_000 + b'"}\n' + lines({"text": "after"}))
    found, readers = in_ranges(path, 1_000_000)
    assert [len(record.text) for record in found] == [5_000_000, 5]
    assert [one.stream_bytes > 0 for one in readers] == [True, False, False, False, False, True]


def test_row_groups_are_read_in_ranges_each_once(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    texts = [None if i % 7 == 0 else f"text {i} " * (i % 5) for i in range(300)]
    pq.write_table(pa.table({"id": range(300), "text": texts}), path, row_group_size=11)
    whole, reader = read(path)
    edge = pq.ParquetFile(path).metadata.row_group(1).column(0).dictionary_page_offset
    for size in (edge, 100, 1000, 4096, path.stat().st_size - 1, 10**9):
        found, readers = in_ranges(path, size)
        assert found == whole and sum(one.objects for one in readers) == reader.objects == 300
    assert sum(one.num_records > 0 for one in in_ranges(path, 1000)[1]) > 3


def test_what_is_compressed_or_no_list_of_records_is_read_whole(tmp_path: Path) -> None:
    for name in ("a.txt", "a.json", "a.html", "a.jsonl.gz", "a.jsonl"):
        (tmp_path / name).write_bytes(b"x" * 100)
    assert {file.name.split("/")[-1]: len(ranges(file, 40)) for file in find_files([Source(path=str(tmp_path))])} == \
        {"a.txt": 1, "a.json": 1, "a.html": 1, "a.jsonl.gz": 1, "a.jsonl": 3}


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


@pytest.mark.parametrize("text", ["я" * 49_900, "\x01" * 99_900])
def test_a_text_within_the_limit_is_read_however_its_line_escapes_it(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}))
    assert reasons(read(tmp_path / "a.jsonl", limit=100_000)[0]) == [text]


@pytest.mark.parametrize("ending", ENDINGS)
def test_compressed_files_of_several_members_are_read_whole(tmp_path: Path, ending: str) -> None:
    compress = COMPRESS[ending]
    path = tmp_path / f"a.jsonl{ending}"
    values = [{"text": os.urandom(20_000).hex()} for _ in range(4)]
    path.write_bytes(compress(lines(*values[:2])) + compress(b"") + compress(lines(*values[2:])))
    records, _ = read(path)
    assert reasons(records) == [value["text"] for value in values]


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("damage", ["cut", "changed", "nonsense", "trailing"])
def test_a_corrupt_compressed_file_is_one_reject_after_what_could_be_read(tmp_path: Path, ending: str, damage: str) -> None:
    data = bytearray(COMPRESS[ending](lines(*({"text": os.urandom(50_000).hex()} for _ in range(30)))))
    path = tmp_path / f"a.jsonl{ending}"
    if damage == "cut":
        data = data[:len(data) * 2 // 3]
    elif damage == "changed":
        data[-3000] ^= 255
    elif damage == "trailing":
        data += b"no compressed data"
    path.write_bytes(b"nonsense" if damage == "nonsense" else data)
    records, _ = read(path)
    found = [record.reason for record in records if record.reason]
    if (ending, damage) == (".bz2", "changed"):            # which gives a block's bytes before it has seen that they are wrong
        found = [reason for reason in found if reason not in ("malformed", "not_utf8")]
    assert found == ["corrupt"]
    assert records[-1].reason == "corrupt"
    assert len(records) > {"cut": 10, "changed": 10, "nonsense": 0, "trailing": 30}[damage]


@pytest.mark.parametrize("format", ["text", "jsonl", "html", "warc"])
def test_a_bomb_is_too_long_or_no_document_and_never_held(tmp_path: Path, format: str) -> None:
    """200 MB of zeros take 200 KB of gzip."""
    if format in ("html", "warc"):
        pytest.importorskip("trafilatura", exc_type=ImportError)
    path = tmp_path / "a.gz"
    path.write_bytes(gzip.compress(bytes(1 << 20)) * 200)
    read(path, limit=1_000_000, format=format)                                       # what is imported is not what is measured
    tracemalloc.start()
    records, reader = read(path, limit=1_000_000, format=format)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert reasons(records) == ["malformed" if format == "warc" else "too_long"]
    assert reader.stream_bytes == records[0].bytes == 200 << 20
    assert peak < 14_000_000                               # a line may have 6.1 MB, and is copied when it grows


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_file_that_expands_without_measure_is_left_as_a_reject(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str) -> None:
    monkeypatch.setattr("distlm.corpus.decompress.FREE_BYTES", 1 << 20)
    monkeypatch.setattr("distlm.corpus.decompress.MAX_RATIO", 100)
    path = tmp_path / f"a.jsonl{ending}"
    texts = [os.urandom(50_000).hex() for _ in range(30)]
    path.write_bytes(COMPRESS[ending](lines(*({"text": text} for text in texts))))
    assert reasons(read(path)[0]) == texts                 # more bytes, but no bomb
    path.write_bytes(COMPRESS[ending](lines({"text": "first"}) + bytes(30_000_000)))
    records, reader = read(path, limit=1000)
    assert reasons(records) == ["first", "corrupt"] and "100 times" in records[-1].detail and reader.stream_bytes < 8_000_000


def test_rows_that_are_many_times_their_file_are_not_held_together(tmp_path: Path) -> None:
    """Of 256 equal texts of 2 MB a file holds one."""
    pq.write_table(pa.table({"text": ["x" * 2_000_000] * 256}), tmp_path / "a.parquet", compression="zstd")
    assert (tmp_path / "a.parquet").stat().st_size < 2000
    held, (file,) = 0, find_files([Source(path=str(tmp_path / "a.parquet"))])
    for record in Reader(file, 1_000_000).records():
        assert record.reason == "too_long"
        held = max(held, pa.total_allocated_bytes())
    assert held < 60_000_000


def test_a_row_group_is_read_by_its_pages(tmp_path: Path) -> None:
    """Many writers put a million rows into one, as pyarrow does: it may be larger than all memory."""
    draw = random.Random(0)
    pq.write_table(pa.table({"text": [draw.randbytes(1000).hex() for _ in range(20_000)]}), tmp_path / "a.parquet")
    assert pq.read_metadata(tmp_path / "a.parquet").num_row_groups == 1 and (tmp_path / "a.parquet").stat().st_size > 38_000_000
    (file,) = find_files([Source(path=str(tmp_path / "a.parquet"))])
    held = [pa.total_allocated_bytes() for _ in Reader(file, 1_000_000).records()]
    assert len(held) == 20_000 and max(held) < 12_000_000


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
    with tarfile.open(tmp_path / "d.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "a.txt")
    (tmp_path / "e.txt").write_bytes(b"x\0\0\0" * 2000 + b"\0")
    assert [reasons(read(tmp_path / name)[0])[0][:5] for name in ("a.txt", "b.md", "c.unknown", "d.tar.gz", "e.txt")] == [
        "hello", "not_u", "", "binar", "x\0\0\0x"]


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


def test_a_name_that_is_no_utf8_becomes_one_that_lists_can_hold(tmp_path: Path) -> None:
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/gr\xfc\xdfe.txt")).write_text("hello")
    (file,) = find_files([Source(path=str(tmp_path))])
    assert file.name.encode().endswith(b"/gr\\xfc\\xdfe.txt") and reasons(list(Reader(file, 100).records())) == ["hello"]


def test_stdlib_is_the_sources_of_the_running_interpreter_without_tests() -> None:
    files = find_files([Source(path="stdlib")])
    names = [file.name for file in files]
    assert "stdlib/json/decoder.py" in names
    assert 400 < len(files) < 1200
    assert not [name for name in names if {"test", "site-packages", "__pycache__"} & set(name.split("/")) or not name.endswith(".py")]
    assert Counter(names).most_common(1)[0][1] == 1


@pytest.mark.parametrize(("path", "expected"), [
    ("dat", "did you mean .*data"), ("stdlb", "did you mean stdlib"), ("data/*.csv", "no file matches"), ("empty", "holds no file"),
    ("hdfs://host/x", "no way to read hdfs://; s3://, gs:// and paths"), ("nowhere/at/all", "no such file"),
    ("a" * 5000, "no such file")])
def test_a_source_that_names_nothing_is_found_before_work(tmp_path: Path, path: str, expected: str) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=expected) as caught:
        find_files([Source(path=path if "://" in path else str(tmp_path / path))])
    assert "sources.0.path" in str(caught.value)


def test_dots_lead_into_nested_objects_unless_a_field_has_them_in_its_name(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines({"body": {"text": "nested", "n": 7}, "doc": {"id": 5}}, {"body.text": "plain", "body": {"text": "not this"}},
                           {"body": "no object"}, {"body": None}, {"body": {"text": None}}, {"body": {"text": ["no text"]}}))
    records, reader = read(path, text_key="body.text", id_key="doc.id", keep=("body.n",))
    assert reasons(records) == ["nested", "plain", "missing_field", "missing_field", "missing_field", "not_text"]
    assert (records[0].id, records[0].meta, reader.with_key) == ("5", {"body.n": 7}, 3)
    table = pa.table({"body": [{"text": "nested", "n": 7}, None, {"text": None, "n": 8}], "body.n": [1, 2, 3], "doc": [{"id": "x"}] * 3})
    pq.write_table(table, tmp_path / "a.parquet")
    records, reader = read(tmp_path / "a.parquet", text_key="body.text", id_key="doc.id", keep=("body.n",))
    assert reasons(records) == ["nested", "missing_field", "missing_field"]
    assert [(record.id, record.meta) for record in records] == [("x", {"body.n": n}) for n in (1, 2, 3)]
    assert reasons(read(tmp_path / "a.parquet", text_key="body.nothing")[0]) == ["missing_field"] * 3


@pytest.mark.parametrize("format", ["jsonl", "parquet"])
def test_ids_and_fields_that_are_kept_come_with_every_record_as_json_has_them(tmp_path: Path, format: str) -> None:
    rows = [{"id": 12, "text": "one", "url": "http://x", "score": 0.5, "tags": ["a", {"b": 1}]},
            {"id": None, "text": "two", "score": float("nan")},
            {"text": None, "url": "y"}]
    path = tmp_path / f"a.{format}"
    if format == "jsonl":
        path.write_bytes(lines(*rows))
    else:
        table = pa.table({"id": [12, None, None], "text": ["one", "two", None], "url": ["http://x", None, "y"],
                          "score": [0.5, float("nan"), None], "tags": [[{"b": 1}], None, None]})
        pq.write_table(table, path)
    records, _ = read(path, keep=("url", "score", "tags", "no such"))
    assert [record.id for record in records] == ["12", "", ""]
    tags = ["a", {"b": 1}] if format == "jsonl" else [{"b": 1}]
    assert [record.meta for record in records] == [{"url": "http://x", "score": 0.5, "tags": tags}, {"score": "nan"}, {"url": "y"}]
    records, _ = read(path, id_key="url")
    assert [(record.id, record.meta) for record in records] == [("http://x", {}), ("", {}), ("y", {})]


def test_whatever_is_kept_json_can_hold_it(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    deep: Any = "x"
    for _ in range(900):
        deep = [deep]
    path.write_bytes(lines({"id": {"a": 1}, "text": "one", "deep": deep, "half": "\ud800", "in": {"\udfff": ["\ud800", float("inf")]}}))
    (record,), _ = read(path, keep=("deep", "half", "in"))
    assert record.id == '{"a": 1}'
    assert record.meta == {"deep": "nested deeper than 64 levels", "half": "?", "in": {"?": ["?", "inf"]}}
    at, late = pa.array([1577836800000000001], pa.timestamp("ns")), pa.array([600_000_000_000], pa.timestamp("s"))
    table = pa.table({"text": ["one"], "at": at, "late": late, "day": [datetime.date(2020, 1, 2)], "raw": [b"\xff!"],
                      "span": [datetime.timedelta(1)], "kind": pa.array(["k"]).dictionary_encode(),
                      "pairs": pa.array([[("a", b"b")]], pa.map_(pa.string(), pa.binary()))})
    pq.write_table(table, tmp_path / "a.parquet")
    (record,), _ = read(tmp_path / "a.parquet", id_key="day", keep=tuple(table.column_names[1:]))
    assert record.id == "2020-01-02"
    assert record.meta == {"at": "2020-01-01 00:00:00.000000001", "late": "20983-03-30 10:40:00.000", "day": "2020-01-02",
                           "raw": "\ufffd!", "span": "1 day, 0:00:00", "kind": "k", "pairs": [["a", "b"]]}
    json.dumps(record.meta, allow_nan=False).encode()


def test_only_the_columns_that_are_needed_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    real = pq.ParquetFile.iter_batches
    monkeypatch.setattr(pq.ParquetFile, "iter_batches", lambda *args, **named: asked.append(named["columns"]) or real(*args, **named))
    names = ["text", "id", "url", "embedding"]
    pq.write_table(pa.table({name: ["x"] for name in names}), tmp_path / "a.parquet")
    read(tmp_path / "a.parquet", keep=("url", "nothing"))
    read(tmp_path / "a.parquet", id_key="url")
    assert asked == [["text", "id", "url"], ["text", "url"]]


def test_a_parquet_column_may_be_of_any_kind_of_text_and_what_is_none_is_rejected(tmp_path: Path) -> None:
    bad = pa.Array.from_buffers(pa.string(), 2, pa.array([b"\xff", b"ok"]).buffers())   # as other writers leave it
    for column in (bad, bad.cast(pa.binary(), safe=False)):
        pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
        assert reasons(read(tmp_path / "a.parquet")[0]) == ["not_utf8", "ok"]
    for kind in (pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())):
        pq.write_table(pa.table({"text": pa.array(["héllo", "x" * 11], pa.string()).cast(kind)}), tmp_path / "a.parquet")
        records, _ = read(tmp_path / "a.parquet", limit=10)
        assert reasons(records) == ["héllo", "too_long"]
        assert [record.bytes for record in records] == [6, 11]


def test_no_damage_to_a_parquet_file_stops_the_reading(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["one", "two", None] * 20, "body": [{"text": "x"}, None, {"text": None}] * 20}), path)
    data, dice = path.read_bytes(), random.Random(0)
    for _ in range(300):
        changed = bytearray(data)
        changed[dice.randrange(len(data))] = dice.randrange(256)
        path.write_bytes(changed)
        read(path, keep=("body",))


@pytest.mark.parametrize("ending", COMPRESS)
def test_a_page_is_its_main_text_whatever_it_is_compressed_with(tmp_path: Path, ending: str) -> None:
    pytest.importorskip("trafilatura", exc_type=ImportError)
    path = tmp_path / f"a.html{ending}"
    path.write_bytes(COMPRESS[ending](page()))
    (record,), _ = read(path)
    assert record.text.split("\n") == ["A title", *STORY]
    assert record.bytes == len(page()) > len(record.text)


def test_pages_without_text_too_long_or_malicious_are_rejects(tmp_path: Path) -> None:
    pytest.importorskip("trafilatura", exc_type=ImportError)
    for data, expected in ((b"", "no_main_text"), (b"<html><body></body></html>", "no_main_text"), (page() * 100, "too_long"),
                           (b"<div>" * 2_000, "no_main_text"), (b"\x81\x8d" + bytes(range(256)), None), (b"\0" * 500, "no_main_text")):
        (tmp_path / "a.htm").write_bytes(data)
        (record,), _ = read(tmp_path / "a.htm", limit=20_000)
        assert record.reason == expected or expected is None, data[:50]


@pytest.mark.parametrize(("encoding", "head"), [
    ("windows-1251", '<meta charset="windows-1251">'), ("koi8-r", '<meta http-equiv="Content-Type" content="text/html; charset=KOI8-R">'),
    ("utf-16", ""), ("utf-8-sig", ""), ("utf-8", '<meta charset="iso-8859-1">'), ("windows-1251", '<meta charset="unicode_escape">')])
def test_a_page_is_read_in_the_encoding_that_it_names_or_is_in(tmp_path: Path, encoding: str, head: str) -> None:
    pytest.importorskip("trafilatura", exc_type=ImportError)
    story = ["Все счастливые семьи похожи друг на друга, каждая несчастливая семья несчастлива по-своему, и так далее."] * 2
    (tmp_path / "a.html").write_bytes(page(*story, head=head, encoding=encoding))
    (record,), _ = read(tmp_path / "a.html")
    assert story[0] in record.text


@pytest.mark.parametrize("head", ["", '<meta charset="utf-8">', '<meta charset="shift_jis">'])
def test_one_bad_byte_in_a_page_does_not_turn_its_letters_into_others(tmp_path: Path, head: str) -> None:
    pytest.importorskip("trafilatura", exc_type=ImportError)
    story = ["Les élèves français ont été à l'école, où ils étudient l'été comme l'hiver, et leurs maîtres aussi."] * 4
    data = page(*story, head=head).replace(b"hiver", b"hi\xffver", 1)
    (tmp_path / "a.html").write_bytes(data[:-60])
    (record,), _ = read(tmp_path / "a.html")
    assert story[0].replace("hiver", "hi\ufffdver") in record.text
    assert story[1] in record.text
    (tmp_path / "a.html").write_bytes(page("One café in a page that names no encoding, among words of ASCII.", *STORY, encoding="latin-1"))
    assert "One café in" in read(tmp_path / "a.html")[0][0].text


@pytest.mark.parametrize("ending", [".gz", ".zst", ".bz2", ".xz"])
def test_an_ending_counts_in_capitals_too(tmp_path: Path, ending: str) -> None:
    (tmp_path / f"a.txt{ending.upper()}").write_bytes(COMPRESS[ending](b"a text"))
    (tmp_path / f"b.JSONL{ending.upper()}").write_bytes(COMPRESS[ending](lines({"text": "a line"})))
    assert reasons(read(tmp_path / f"a.txt{ending.upper()}")[0]) == ["a text"]
    assert reasons(read(tmp_path / f"b.JSONL{ending.upper()}")[0]) == ["a line"]


@pytest.mark.parametrize("indent", [None, 2])
def test_an_array_of_objects_with_the_text_field_is_records_and_other_json_is_a_text(tmp_path: Path, indent: int | None) -> None:
    path = tmp_path / "a.json"
    values = [{"text": "größer", "id": 7}, {"text": 5}, {"text": "], [{", "url": "x"}, {"body": "x"}]
    path.write_text("\ufeff \n" + json.dumps(values, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")
    records, reader = read(path, keep=("url",))
    assert reasons(records) == ["größer", "not_text", "], [{", "missing_field"] and (reader.objects, reader.with_key) == (4, 3)
    assert (records[0].id, records[2].meta, [record.number for record in records]) == ("7", {"url": "x"}, [0, 1, 2, 3])
    for text in ('[{"text": "a"}, 1]', '[{"body": "a"}, {"b": 1}]', '[{"text": "a"}', "[]", "[1]", '{"body": "a"}', '{"a": 1}\n',
                 "[" * 99_999, "no"):
        path.write_text(text)
        assert reasons(read(path)[0]) == [text]
    path.write_text(json.dumps(values))
    assert reasons(read(path, limit=20)[0]) == ["too_long"] and reasons(read(path, code=True)[0]) == [json.dumps(values)]


def test_json_of_an_object_a_line_or_of_one_with_the_text_field_is_records(tmp_path: Path) -> None:
    path = tmp_path / "a.json.gz"
    given = lines({"body": "x"}, {"text": "one", "id": 1}, b"\n", {"text": "two"}, b"{\n") * 2000
    path.write_bytes(gzip.compress(b"\xef\xbb\xbf" + given))
    records, reader = read(path, limit=100)
    assert reasons(records) == ["missing_field", "one", "two", "malformed"] * 2000 and (reader.objects, reader.with_key) == (6000, 4000)
    for text in (json.dumps({"text": "größer", "id": 7}, indent=2), '{"text": "größer", "id": 7}\n'):
        path.write_bytes(gzip.compress(text.encode()))
        (record,) = read(path)[0]
        assert (record.text, record.id) == ("größer", "7")


def test_the_format_is_told_by_the_ending_under_any_compression(tmp_path: Path) -> None:
    pytest.importorskip("trafilatura", exc_type=ImportError)
    pytest.importorskip("warcio")
    expected = {"a.html": "html", "a.HTM": "html", "a.html.zst": "html", "a.warc": "warc", "a.warc.gz": "warc", "a.jsonl.xz": "jsonl",
                "a.ndjson.bz2": "jsonl", "a.parquet": "parquet", "a.py": "text", "html": "text", "a.js": "text", "a.txt.gz": "text"}
    for name in expected:
        (tmp_path / name).write_bytes(b"")
    assert {Path(file.path).name: file.format for file in find_files([Source(path=str(tmp_path))])} == expected


@pytest.mark.parametrize(("format", "module"), [("html", "trafilatura"), ("warc", "trafilatura"), ("warc", "warcio")])
def test_what_is_not_installed_is_said_before_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str, module: str) -> None:
    if module == "warcio":
        pytest.importorskip("trafilatura", exc_type=ImportError)
    monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / f"a.{format}").write_bytes(b"")
    (tmp_path / "b.txt").write_bytes(b"")
    assert find_files([Source(path=str(tmp_path / "b.txt"))])
    with pytest.raises(InputError, match=rf"sources\.1\.format: .*{module}.*pip install distlm\[web\]"):
        find_files([Source(path=str(tmp_path / "b.txt")), Source(path=str(tmp_path / f"a.{format}"))])


def test_the_order_of_files_does_not_depend_on_the_order_of_sources(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("")
    sources = [Source(path=str(tmp_path / "a.jsonl"), **named)  # type: ignore[arg-type]
               for named in ({}, {"id_key": "b"}, {"id_key": "a"}, {"keep": ("url",)}, {"text_key": "body"}, {"format": "text"})]
    def seen(given: list[Source]) -> list[Any]:
        return [(file.format, file.text_key, file.id_key, file.keep) for file in find_files(given)]
    assert seen(sources) == seen(sources[::-1]) == seen(sources[3:] + sources[:3])
