import gzip
import io
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import pytest

from distlm.corpus.files import find_files
from distlm.corpus.read import Reader
from distlm.spec.prepare import Source
from tests.corpus.records import COMPRESS, STORY, page, read, reasons


def response(body: bytes, length: int | None = None, kind: str = "text/html; charset=utf-8", http: str = "", **headers: str) -> bytes:
    block = f"HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\n{http}\r\n".encode() + body
    named = {"WARC-Type": "response", "Content-Type": "application/http; msgtype=response", "WARC-Record-ID": "<urn:uuid:1>",
             "WARC-Target-URI": "http://a.example/x", "WARC-Date": "2024-01-02T03:04:05Z", "Content-Length": str(length or len(block))}
    named |= {name.replace("_", "-"): value for name, value in headers.items()}
    return b"WARC/1.0\r\n" + "".join(f"{name}: {value}\r\n" for name, value in named.items()).encode() + b"\r\n" + block + b"\r\n\r\n"


INFO = b"WARC/1.0\r\nWARC-Type: warcinfo\r\nContent-Length: 5\r\n\r\nhello\r\n\r\n"


@pytest.mark.parametrize("ending", COMPRESS)
def test_an_archive_gives_its_responses_that_are_pages(tmp_path: Path, ending: str) -> None:
    """Compressed record by record, as archives are."""
    pytest.importorskip("trafilatura", exc_type=ImportError)
    pytest.importorskip("warcio")
    path = tmp_path / f"a.warc{ending}"
    parts = [INFO, response(page()), response(page(), WARC_Type="request"), response(b"{}", kind="application/json"),
             response(b"\0\0", Content_Type="text/dns"), response(b"<html></html>", kind="application/xhtml+xml")]
    path.write_bytes(b"".join(COMPRESS[ending](part) for part in parts))
    records, _ = read(path)
    assert [(record.number, record.documents, record.bytes) for record in records] == [
        (i, int(i in (1, 5)), len(part)) for i, part in enumerate(parts)]
    assert records[1].text.split("\n") == ["A title", *STORY]
    assert records[1].id == "<urn:uuid:1>"
    assert records[1].meta == {"url": "http://a.example/x", "date": "2024-01-02T03:04:05Z"}
    assert records[5].reason == "no_main_text"


def test_an_archive_that_warcio_writes_is_read(tmp_path: Path) -> None:
    pytest.importorskip("trafilatura", exc_type=ImportError)
    pytest.importorskip("warcio")
    from warcio.statusandheaders import StatusAndHeaders
    from warcio.warcwriter import WARCWriter
    with open(tmp_path / "a.warc.gz", "wb") as file:
        writer = WARCWriter(file, gzip=True)
        writer.write_record(writer.create_warcinfo_record("a.warc.gz", {"software": "test"}))
        for i in range(3):
            headers = StatusAndHeaders("200 OK", [("Content-Type", "text/html")], protocol="HTTP/1.0")
            payload = io.BytesIO(page(STORY[0], f"Page {i}."))
            writer.write_record(writer.create_warc_record(f"http://a.example/{i}", "response", payload=payload, http_headers=headers))
    records, _ = read(tmp_path / "a.warc.gz")
    assert [record.meta["url"][-1] + record.text[-2:] for record in records if record.documents] == ["00.", "11.", "22."]


@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize("damage", ["cut", "changed", "trailing"])
def test_a_damaged_archive_is_one_reject_beside_the_good_records(tmp_path: Path, ending: str, damage: str) -> None:
    pytest.importorskip("trafilatura", exc_type=ImportError)
    pytest.importorskip("warcio")
    parts = [COMPRESS[ending](part) for part in (INFO, response(page()), response(page()), response(page()))]
    if damage == "cut":
        parts[3] = parts[3][:100]
    elif damage == "changed":                              # what stands before the length, or the compressed data itself
        parts[2] = b"RUBBISH" + parts[2][7:]
    else:
        parts.append(b"no WARC record\n" * 3)
    path = tmp_path / f"a.warc{ending}"
    path.write_bytes(b"".join(parts))
    good = {"cut": 2, "changed": 2 if not ending else 1, "trailing": 3}[damage]
    records, _ = read(path)
    assert len([record for record in records if record.text]) == good
    assert len([record for record in records if record.reason]) == 1


def test_bad_records_of_an_archive_are_rejects_and_too_long_ones_are_not_held(tmp_path: Path) -> None:
    pytest.importorskip("trafilatura", exc_type=ImportError)
    pytest.importorskip("warcio")
    bomb, gzipped = gzip.compress(bytes(30_000_000)), "Content-Encoding: gzip\r\n"
    cases = [
        (response(page()), [""]),
        (response(page(), Content_Length="many"), ["malformed"]),
        (response(page(), Content_Length="-1"), ["malformed"]),
        (response(b"<p>" + b"x" * 3_000_000), ["too_long"]),
        (response(bytes(3_000_000), kind="image/png"), []),
        (response(page(), X_Long="y" * 3_000_000), ["malformed"]),
        (response(page())[:-4] + b"rubbish" * 400_000 + b"\r\n\r\n", ["", "malformed"]),
        (response(page()).replace(b"HTTP/1.1", b"SPDY/1.1"), ["malformed"]),
        (response(bomb, http=gzipped), ["too_long"]),
        (response(b"%x\r\n" % len(bomb) + bomb + b"\r\n0\r\n\r\n", http=gzipped + "Transfer-Encoding: chunked\r\n"), ["too_long"]),
        (response(b"\x1f\x8bno gzip", http=gzipped), ["malformed"]),
        (response(bomb, http="Content-Encoding: br\r\n"), ["malformed"]),
        (response(page()), [""])]
    path = tmp_path / "a.warc"
    path.write_bytes(b"".join(part for part, _ in cases))
    read(path, limit=100_000)                                                        # what is imported is not what is measured
    (file,) = find_files([Source(path=str(path))])
    tracemalloc.start()
    records = list(Reader(file, 100_000).records())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert [record.reason for record in records if record.documents] == [reason for _, found in cases for reason in found]
    assert peak < 5_000_000


def test_a_page_of_an_error_or_a_redirect_is_a_reject(tmp_path: Path) -> None:
    pytest.importorskip("trafilatura", exc_type=ImportError)
    pytest.importorskip("warcio")
    given = ["200 OK", "203 Non-Authoritative Information", "404 Not Found", "301 Moved Permanently", "503 Unavailable", "2000 Odd", ""]
    (tmp_path / "a.warc").write_bytes(b"".join(response(page()).replace(b"200 OK", status.encode()).replace(
        b"Content-Length: ", b"Content-Length: %d\r\nX-Was: " % (len(response(page()).split(b"\r\n\r\n", 1)[1]) - 4 - 6 + len(status)))
        for status in given))
    records, _ = read(tmp_path / "a.warc")
    assert [record.reason for record in records] == ["", ""] + ["http_status"] * 5
    assert records[2].detail == "404 Not Found" and records[2].id == "<urn:uuid:1>"


@pytest.mark.parametrize("name", ["a.warc.wet", "a.warc.wet.gz", "a.warc.WET.GZ"])
def test_the_texts_of_an_archive_of_texts_are_read_as_they_are(tmp_path: Path, name: str) -> None:
    pytest.importorskip("trafilatura", exc_type=ImportError)
    pytest.importorskip("warcio")

    def text(data: bytes, kind: bytes = b"text/plain") -> bytes:
        return b"WARC/1.0\r\nWARC-Type: conversion\r\nWARC-Target-URI: http://a.example/x\r\nContent-Type: %b\r\nContent-Length: %d\r\n" \
               b"\r\n%b\r\n\r\n" % (kind, len(data), data)
    data = INFO + text("Größe <b>\nund mehr".encode()) + text(b"%PDF", b"application/pdf")
    data += text(b"\xff") + text(b"x" * 101) + text(b"last")
    (tmp_path / name).write_bytes(gzip.compress(data) if name.lower().endswith("gz") else data)
    records, _ = read(tmp_path / name, limit=100)
    assert reasons(records) == ["Größe <b>\nund mehr", "not_utf8", "too_long", "last"]
    assert records[1].meta == {"url": "http://a.example/x"}


@pytest.mark.parametrize(("encoding", "body"), [
    ("gzip", gzip.compress), ("gzip", bytes), ("deflate", zlib.compress),
    ("deflate", lambda data: zlib.compress(data)[2:-4]), ("br", bytes), ("", bytes)])
@pytest.mark.parametrize("chunked", [False, True])
def test_the_encodings_of_http_are_undone_where_they_were_left(tmp_path: Path, encoding: str, body: Any, chunked: bool) -> None:
    pytest.importorskip("trafilatura", exc_type=ImportError)
    pytest.importorskip("warcio")
    data = body(page())
    if chunked:
        data = b"%x\r\n" % 20 + data[:20] + b"\r\n" + b"%x\r\n" % len(data[20:]) + data[20:] + b"\r\n0\r\n\r\n"
    http = (f"Content-Encoding: {encoding}\r\n" if encoding else "") + ("Transfer-Encoding: chunked\r\n" if chunked else "")
    (tmp_path / "a.warc").write_bytes(response(data, http=http))
    (record,), _ = read(tmp_path / "a.warc")
    assert record.text.split("\n") == ["A title", *STORY]
