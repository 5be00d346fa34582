import bz2
import functools
import gzip
import io
import json
import lzma
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from distlm.corpus import stores
from distlm.corpus.files import TextFile, find_files
from distlm.corpus.manifest import read_manifest
from distlm.corpus.read import Reader
from distlm.errors import InputError, StorageError
from distlm.spec.prepare import Source
from tests.corpus.buckets import Buckets, Request
from tests.corpus.conftest import document
from tests.records import Records

Run = Callable[..., dict[str, Any]]
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "us", "AWS_SECRET_ACCESS_KEY": "secret"}


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the user's own, and no waiting."""
    for name in list(os.environ):
        if name.startswith(("AWS_", "STORAGE_EMULATOR")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setattr(stores, "WAIT_S", 0.01)


@pytest.fixture
def buckets() -> Iterator[Buckets]:
    with Buckets({"data": {}}) as buckets:
        yield buckets


def upload(buckets: Buckets, folder: Path, prefix: str) -> None:
    buckets.objects["data"].update({f"{prefix}/{path.relative_to(folder).as_posix()}": path.read_bytes()
                                    for path in sorted(folder.rglob("*")) if path.is_file()})


def find(buckets: Buckets, path: str, kind: str = "s3", **keys: Any) -> list[TextFile]:
    query = buckets.query if kind == "s3" else buckets.query.replace("region=us-east-1&", "")
    return find_files([Source(path=f"{kind}://{path}?{query}", **keys)])


def read(file: TextFile, limit: int = 1 << 20) -> tuple[list[str], Reader]:
    """Of each record the text, or the reason."""
    reader = Reader(file, limit)
    return [record.reason or record.text for record in reader.records()], reader


TREE = ("a.txt", "b.jsonl", ".hidden", "deep/a.txt", "deep/b.txt.gz", "deep/er/c.txt", "deep/.git/x.txt", "deep/__pycache__/y.txt",
        "other/er/a.txt", "[odd]/a.txt", "other/sp ace 100%.txt", "q?/a=b.txt", "année/ü.txt")
PATTERNS = ("", "/", "deep", "deep/a.txt", "*", "*.txt", "**", "**/*.txt", "**/er/*", "*/er", "*/*.txt", "deep/**", "?.txt", "[ab].*",
            "[!a].*", ".*", "deep/.*/*", "deep/__pycache__/*", "[[]odd]/*", "[odd]", "q?/a=b.txt", "d*/**/c.txt", "**/.git/*", "*/",
            "**/__pycache__", "other/sp ace 100%.txt", "ann*/*", "**/**/a.txt", "*e*/*er*")


@pytest.mark.parametrize("kind", ["s3", pytest.param("gs", marks=pytest.mark.slow)])
def test_a_bucket_gives_the_same_names_as_a_local_folder_for_every_pattern(tmp_path: Path, buckets: Buckets, kind: str) -> None:
    for name in TREE:
        (tmp_path / "texts" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "texts" / name).write_text(name)
    upload(buckets, tmp_path / "texts", "some/texts")
    buckets.objects["data"]["some/texts/marker/"] = b""    # as consoles leave where a folder was made
    buckets.page = 3
    for pattern in PATTERNS:
        tail = "/" + pattern if pattern not in ("", "/") else pattern
        local = find_files([Source(path=f"{tmp_path}/texts{tail}")])
        found = find(buckets, f"data/some/texts{tail}", kind)
        assert [(file.name, file.bytes, file.format) for file in found] == [(file.name, file.bytes, file.format) for file in local], pattern
        assert local
    whole = find(buckets, "data", kind)
    assert {file.name.split("/")[0] for file in whole} == {"data"} and len(whole) == len(TREE) - 3


def test_a_listing_is_asked_for_once_and_no_deeper_than_the_pattern_goes(buckets: Buckets) -> None:
    buckets.objects["data"] = {f"crawl/{i}/{j}.txt": b"x" for i in range(5) for j in range(5)} | {"crawl/a.txt": b""}

    def listings(path: str) -> list[tuple[str, bool]]:
        buckets.requests.clear()
        find(buckets, path)
        return [(request.query.get("prefix", ""), "delimiter" in request.query) for request in buckets.requests
                if request.is_listing and request.method == "GET" and request.query["max-keys"] != "1"]

    assert listings("data/crawl") == [("crawl/", False)]
    assert listings("data/crawl/**/*.txt") == [("crawl/", False)]
    assert listings("data/crawl/*.txt") == [("crawl/", True)]
    assert listings("data/crawl/[34]/*.txt") == [("crawl/", True), ("crawl/3/", True), ("crawl/4/", True)]
    assert listings("data/crawl/a.txt") == []


def every_format(folder: Path) -> None:
    """Documents in each format and each compression, good and bad."""
    folder.mkdir()
    lines = "".join(json.dumps({"text": document(i), "id": i}) + "\n" for i in range(12)).encode()
    pages = [f"<html><body><article><h1>Page {i}</h1>" + f"<p>{document(i)} and more of the same, so that it is a text.</p>" * 3
             + "</article></body></html>" for i in range(3)]
    files = {"a.txt": document(30).encode(), "code.py": document(31).encode(), "bad.txt": b"\xff\xfe",
             "empty.txt": b"", "a.jsonl.gz": gzip.compress(lines), "b.jsonl.zst": zstandard.compress(lines + b"{broken\n"),
             "c.jsonl.bz2": bz2.compress(lines), "d.ndjson.xz": lzma.compress(lines), "e.jsonl": lines,
             "cut.jsonl.gz": gzip.compress(lines)[:-9], "page.html": pages[0].encode(), "torn.parquet": b"PAR1 not really"}
    for name, data in files.items():
        (folder / name).write_bytes(data)
    table = pa.table({"text": [document(i) for i in range(40, 60)], "more": ["x" * 100] * 20})
    pq.write_table(table, folder / "t.parquet", row_group_size=7)
    from warcio.statusandheaders import StatusAndHeaders
    from warcio.warcwriter import WARCWriter

    buffer = io.BytesIO()
    writer = WARCWriter(buffer, gzip=True)
    for i, page in enumerate(pages[1:]):
        headers = StatusAndHeaders("200 OK", [("Content-Type", "text/html; charset=utf-8")], protocol="HTTP/1.0")
        writer.write_record(writer.create_warc_record(f"http://x/{i}", "response", payload=io.BytesIO(page.encode()), http_headers=headers))
    (folder / "w.warc.gz").write_bytes(buffer.getvalue())


@pytest.mark.parametrize("kind", ["s3", pytest.param("gs", marks=pytest.mark.slow)])
def test_equal_bytes_give_an_equal_corpus_from_a_folder_and_from_a_bucket(run: Run, tmp_path: Path, buckets: Buckets, kind: str,
                                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trafilatura", exc_type=ImportError)
    every_format(tmp_path / "texts")
    upload(buckets, tmp_path / "texts", "some/texts")
    local = Path(run(tmp_path / "texts", "local", workers=2)[""])
    if kind == "gs":
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", buckets.address)
    remote = Path(run([f"s3://data/some/texts?{buckets.query}" if kind == "s3" else "gs://data/some/texts"], "remote", workers=2)[""])
    files = {str(path.relative_to(local)) for path in local.rglob("*") if path.is_file()}
    assert files == {str(path.relative_to(remote)) for path in remote.rglob("*") if path.is_file()} and "manifest.json" in files
    assert [name for name in sorted(files) if (local / name).read_bytes() != (remote / name).read_bytes()] == []
    assert {"not_utf8", "malformed", "corrupt", "too_short", "duplicate"} <= {path.stem for path in (remote / "rejects").iterdir()}
    for key, data in buckets.objects["data"].items():      # each byte comes once
        ranges = [request.range for request in buckets.reads(key) if request.range] if kind == "s3" else []
        assert kind == "gs" or sum((last or 0) + 1 - first for first, last in ranges) == len(data), key


def test_an_object_is_read_in_parts_of_bounded_size_each_once(buckets: Buckets) -> None:
    buckets.objects["data"]["a.jsonl"] = b'{"text": "%s"}\n' % (b"x" * 999) * 30_000
    (file,) = find(buckets, "data/a.jsonl")
    found, reader = read(file)
    assert len(found) == 30_000 and reader.raw.num_bytes == file.bytes == len(buckets.objects["data"]["a.jsonl"]) > 3 * stores.RANGE
    ranges = [request.range for request in buckets.reads("a.jsonl")]
    assert ranges == [(first, min(first + stores.RANGE, file.bytes) - 1) for first in range(0, file.bytes, stores.RANGE)]


def faulty(at: int, times: int, fault: Any, method: str = "GET") -> tuple[Callable[[Request], Any], list[Request]]:
    """A fault of the reads that begin at `at`, so many times, and those that it hit."""
    hit: list[Request] = []

    def choose(request: Request) -> Any:
        if request.key and request.method == method and len(hit) < times and (request.range or (0,))[0] == at:
            hit.append(request)
            return fault
        return None

    return choose, hit


@pytest.mark.parametrize(("fault", "times"), [("cut", 1), (503, 1), (500, 2)])
def test_a_connection_that_breaks_is_taken_up_where_it_broke(buckets: Buckets, monkeypatch: pytest.MonkeyPatch, fault: Any,
                                                             times: int) -> None:
    monkeypatch.setattr(stores, "CLIENT_ATTEMPTS", 1)      # the client itself would do it for large parts
    monkeypatch.setattr(stores, "RANGE", 1 << 16)
    data = b"".join(b'{"text": "%d"}\n' % i for i in range(6_000))
    buckets.objects["data"] |= {"a.jsonl": data, "small.txt": b"small"}
    assert len(data) > stores.RANGE
    for at, key in ((stores.RANGE, "a.jsonl"), (0, "small.txt")):
        buckets.requests.clear()
        (file,) = find(buckets, f"data/{key}")
        buckets.fault, hit = faulty(at, times, fault)
        found, reader = read(file)
        assert len(hit) == times == reader.raw.retries
        assert found == ([str(i) for i in range(6_000)] if key == "a.jsonl" else ["small"])
        assert reader.raw.num_bytes == file.bytes
        assert sum(request.range == (0, stores.RANGE - 1) for request in buckets.reads(key)) == (key == "a.jsonl")


@pytest.mark.parametrize(("fault", "expected"), [("cut", "cannot be reached"), (503, "has failed"), (403, "access is denied")])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl.gz", "a.warc", "a.parquet"])
def test_a_store_that_keeps_failing_fails_the_job_and_is_no_short_file(buckets: Buckets, monkeypatch: pytest.MonkeyPatch, name: str,
                                                                       fault: Any, expected: str) -> None:
    monkeypatch.setattr(stores, "CLIENT_ATTEMPTS", 1)
    buckets.objects["data"][name] = gzip.compress(b'{"text": "x"}\n')
    (file,) = find(buckets, f"data/{name}")
    buckets.fault = lambda request: fault if fault == 403 or request.method == "GET" else None
    with pytest.raises(StorageError, match=rf"^s3://data/{name} at {buckets.address}: ") as caught:
        read(file)
    assert caught.value.exit_code == 4 and "\n" not in str(caught.value)
    if fault != 503:                                       # of which pyarrow does not give the text away
        assert expected in str(caught.value)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet"])
def test_an_object_that_vanishes_is_a_reject_that_is_counted(buckets: Buckets, name: str) -> None:
    buckets.objects["data"][name] = b"{}"
    (file,) = find(buckets, f"data/{name}")
    del buckets.objects["data"][name]
    assert read(file)[0] == ["unreadable"]
    buckets.objects["data"][name] = b"{}"                  # between the question for its size and that for its bytes
    vanished: list[Request] = []

    def vanish(request: Request) -> Any:
        if request.method == "GET" and request.key:
            vanished.append(request)
            buckets.objects["data"].pop(name, None)

    buckets.fault = vanish
    assert read(file)[0] == ["unreadable"] and vanished


@pytest.mark.parametrize("change", ["shorter", "longer", "as long"])
def test_an_object_that_is_changed_while_it_is_read_fails_the_job(buckets: Buckets, monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    monkeypatch.setattr(stores, "RANGE", 1 << 16)
    data = b'{"text": "one"}\n' * 6_000
    buckets.objects["data"]["a.jsonl"] = data
    (file,) = find(buckets, "data/a.jsonl")
    other = {"shorter": data[:16_000], "longer": data * 2, "as long": data.replace(b"one", b"two")}[change]

    def overwrite(request: Request) -> Any:
        if request.range and request.range[0]:
            buckets.objects["data"]["a.jsonl"] = other

    buckets.fault = overwrite
    with pytest.raises(StorageError, match="was changed while it was read; go on with --resume"):
        read(file)


def test_keys_that_the_client_would_take_for_others_are_rejects(buckets: Buckets) -> None:
    buckets.objects["data"] = {"in//a.txt": b"x", "in/../b.txt": b"x", "b.txt": b"not this", "in/./c.txt": b"x", "in/ok.txt": b"ok"}
    found = find(buckets, "data/in")
    assert sorted(read(file)[0][0] for file in found) == ["ok", "unreadable"]        # . and .. are hidden
    assert read(replace(found[0], path="data/in/../b.txt"))[0] == ["unreadable"]


@pytest.mark.parametrize(("path", "expected"), [
    ("s3://data/text", "no such object or folder; did you mean s3://data/texts?"),
    ("s3://data/texts/b.txt", "did you mean s3://data/texts/a.txt?"),
    ("s3://data/txts/a.txt", "no such object or folder; did you mean s3://data/texts?"),
    ("s3://data/texts/*.csv", "no object matches; s3://data/texts has no such name"),
    ("s3://data/tests/*.csv", "no object matches; did you mean s3://data/texts?"),
    ("s3://data/only", "the folder holds no file; hidden files and __pycache__ are passed over"),
    ("s3://dat/texts", "no such bucket: dat;"), ("s3://dat", "no such bucket: dat;"), ("s3://dat/*.txt", "no such bucket: dat;"),
    ("gs://dat/texts", "no such bucket: dat;"), ("gs://data/text", "no such object or folder"), ("gs://data/*.csv", "no object matches"),
    ("hdfs://data/x", "there is no way to read hdfs://; s3://, gs:// and paths that every node sees work"),
    ("s3:///x", "names no bucket"), ("s3://da*/x", "names no bucket"), ("s3://key:secret@data/x", "credentials do not belong into a path"),
    ("s3://data/a//b", "an empty part"), ("s3://data/a/../b", "an empty part")])
def test_a_source_that_names_nothing_is_found_before_work(buckets: Buckets, path: str, expected: str) -> None:
    buckets.objects["data"] = {"texts/a.txt": b"x", "only/.hidden": b""}
    with pytest.raises(InputError) as caught:
        find(buckets, path.partition("://")[2], path.partition("://")[0])
    assert expected in str(caught.value) and str(caught.value).startswith(f"sources.0.path: {path}?") and "\n" not in str(caught.value)


@pytest.mark.parametrize(("query", "expected"), [
    ("endpont_override=x:1", "no option endpont_override; did you mean endpoint_override?"), ("secret_key=x", "no option secret_key"),
    ("scheme=ftp", "scheme=ftp is none of http, https"), ("anonymous=1", "anonymous=1 is none of true, false")])
def test_options_that_are_not_known_are_refused(query: str, expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        stores.parse(f"s3://data/x?{query}")


def test_credentials_and_the_endpoint_come_from_the_environment(buckets: Buckets, monkeypatch: pytest.MonkeyPatch) -> None:
    buckets.objects["data"]["a.txt"], buckets.keys = b"x", ("us",)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{buckets.address}")
    with pytest.raises(StorageError, match=r"access is denied, or there are no credentials: .*node needs AWS_ACCESS_KEY_ID") as caught:
        find_files([Source(path="s3://data/a.txt")])
    assert caught.value.exit_code == 4
    stores._client.cache_clear()
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    (file,) = find_files([Source(path="s3://data/a.txt")])
    assert read(file)[0] == ["x"]
    carried = pickle.dumps(file)
    assert len(carried) < 500 and b"secret" not in carried and buckets.address.encode() in carried


@pytest.mark.parametrize("kind", ["s3", "gs"])
def test_an_endpoint_that_is_not_there_is_told_soon(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    with Buckets({}) as gone:
        path = f"{kind}://data/x?endpoint_override={gone.address}&scheme=http&anonymous=true"
    monkeypatch.setattr(stores, "GOOGLE_S", 1)
    with pytest.raises(StorageError, match=r"the store cannot be reached: .*check the network") as caught:
        find_files([Source(path=path)])
    assert caught.value.exit_code == 4 and "\n" not in str(caught.value)


def test_a_store_that_says_nothing_is_given_up(buckets: Buckets, monkeypatch: pytest.MonkeyPatch) -> None:
    silence = threading.Event()
    buckets.fault = lambda request: silence
    monkeypatch.setattr(stores, "SILENT_S", 1)
    monkeypatch.setattr(stores, "CLIENT_ATTEMPTS", 1)
    with pytest.raises(StorageError, match="the store cannot be reached"):
        find(buckets, "data/x")
    silence.set()


def test_a_job_that_a_store_failed_goes_on_when_it_is_back(run: Run, texts: Path, buckets: Buckets) -> None:
    (texts / "tiny.txt").write_text("tiny")                # of fewer bytes than the text of an error
    upload(buckets, texts, "texts")
    source, shown = f"s3://data/texts?{buckets.query}", Records()
    buckets.fault = lambda request: 403 if request.key == "texts/more.jsonl" and request.method == "GET" else None
    with pytest.raises(StorageError, match=r"s3://data/texts/more.jsonl"):
        run([source])
    hit: list[Request] = []

    def busy(request: Request) -> Any:
        if request.key == "texts/tiny.txt" and request.method == "GET" and not hit:
            hit.append(request)
            return 503
        return None

    buckets.fault = busy
    result = run([source], progress=shown)
    assert hit and "1 read of a store failed and was taken up again" in shown.text
    assert result["documents"] == 51


@pytest.mark.slow
def test_a_corpus_is_kept_while_its_objects_are_as_they_were_and_when_the_store_is_away(run: Run, texts: Path, buckets: Buckets) -> None:
    upload(buckets, texts, "texts")
    source, shown = f"s3://data/texts?{buckets.query}", Records()
    first = run([source])
    buckets.modified["texts/00.txt"] = 5                   # uploaded again, the same
    assert run([source], progress=shown)["manifest_hash"] == first["manifest_hash"] and "nothing to do" in shown.text
    buckets.fault = lambda request: 403 if request.key == "texts/01.txt" else None
    with pytest.raises(StorageError):
        run([source])
    assert read_manifest(first[""])
    buckets.fault = lambda request: None
    buckets.objects["data"]["texts/00.txt"] = buckets.objects["data"]["texts/00.txt"].replace(b"word", b"WORD")
    assert run([source])["manifest_hash"] != first["manifest_hash"]


def test_a_copy_of_a_parquet_object_that_finds_no_room_fails_the_job(buckets: Buckets, monkeypatch: pytest.MonkeyPatch) -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("there is no /dev/full")
    buckets.objects["data"]["a.parquet"] = b"x" * 100
    (file,) = find(buckets, "data/a.parquet")
    monkeypatch.setattr("distlm.corpus.raw.tempfile.TemporaryFile", functools.partial(open, "/dev/full", "wb"))
    with pytest.raises(StorageError, match=r"the copy of s3://data/a.parquet .*: cannot write: No space left on device; .*TMPDIR"):
        read(file)


def test_local_files_make_no_client_and_a_process_that_had_one_ends_in_silence(tmp_path: Path, texts: Path, buckets: Buckets) -> None:
    spec = tmp_path / "a.yaml"
    spec.write_text(f"kind: prepare\nname: a\nsources: [{texts}]\n")
    refuse = "from distlm.corpus import stores\ndef refuse(*a): raise SystemExit('a client was made')\nstores._client = refuse\n"
    planned = subprocess.run([sys.executable, "-c", f"{refuse}from distlm.cli import main\nmain()", "plan", str(spec)], capture_output=True,
                             text=True, env={**os.environ, "DISTLM_STORAGE": str(tmp_path)})
    assert (planned.returncode, planned.stderr) == (0, "") and "41" in planned.stdout
    upload(buckets, texts, "texts")
    for kind in ("s3", "gs"):
        query = f"endpoint_override={buckets.address}&scheme=http&anonymous=true"
        code = ("from distlm.corpus.files import find_files\nfrom distlm.corpus.read import Reader\n"
                f"from distlm.spec.prepare import Source\nfiles = find_files([Source(path='{kind}://data/texts?{query}')])\n"
                "print(sum(len(list(Reader(file, 10**6).records())) for file in files))")
        ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert (ended.returncode, ended.stdout, ended.stderr) == (0, "60\n", "")
