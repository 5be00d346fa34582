"""What a comparison of two corpora must show."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from distlm.corpus.diff import diff
from distlm.corpus.split import content_hash
from distlm.errors import InputError
from tests.corpus.made import DOCS, STEPS, Doc, make, step


def test_equal_corpora_do_not_differ_whatever_their_names(tmp_path: Path) -> None:
    corpus = make(tmp_path / "c", DOCS, steps=STEPS)
    differences = diff(corpus, make(tmp_path / "d", DOCS, steps=STEPS))
    assert differences.same_windows and differences.rows() == [] and differences.values == [] and differences.moved == 0
    assert {side: only.documents for side, only in differences.only.items()} == {"a": 0, "b": 0}
    assert diff(corpus, make(tmp_path / "e", DOCS, steps=STEPS, with_documents=False)).only == {}


def test_a_diff_says_what_differs_with_the_reasons_first(tmp_path: Path) -> None:
    one = make(tmp_path / "a", DOCS, steps=STEPS, parameters={"clean": {"min_chars": 1, "redact": []}, "context": 16})
    other = make(tmp_path / "b", DOCS[1:], steps=[STEPS[0], step("filter", (8, 850), (2, 300), short=(3, 350), long=(1, 150), odd=(2, 50))],
                 parameters={"clean": {"min_chars": 20, "redact": ["email"]}, "context": 16, "filter": {}}, code="0.2.0",
                 sources=[{"name": "data", "format": "auto", "text_key": "text", "files": 2, "bytes": 90, "xxh3": "01"},
                          {"name": "data", "format": "auto", "text_key": "text", "files": 1, "bytes": 7, "xxh3": "02"}])
    differences = diff(one, other)
    assert not differences.same_windows
    assert differences.values[:6] == [
        ("code", "", "0.1.0", "0.2.0"), ("parameters", "clean.min_chars", 1, 20), ("parameters", "clean.redact", [], ["email"]),
        ("parameters", "filter", None, {}), ("sources", "data", "2 files, 100 bytes, auto, xxh3 00", "2 files, 90 bytes, auto, xxh3 01"),
        ("sources", "data (2)", None, "1 files, 7 bytes, auto, xxh3 02")]
    assert list(dict.fromkeys(part for part, *_ in differences.values)) == ["code", "parameters", "sources", "steps", "splits"]
    steps = {key: (a, b) for part, key, a, b in differences.values if part == "steps"}
    assert steps == {"filter.out": ("3 documents, 400 bytes", "2 documents, 300 bytes"),
                     "filter.rejected.bare": ("1 documents, 30 bytes", None),
                     "filter.rejected.odd": ("1 documents, 20 bytes", "2 documents, 50 bytes"),
                     "filter.rejected.short": ("2 documents, 250 bytes", "3 documents, 350 bytes")}
    assert ("splits", "train.documents", 5, 4) in differences.values
    assert ("parameters", "clean.redact", "[]", '["email"]') in differences.rows()


def test_a_diff_says_which_documents_one_corpus_has_alone_and_why(tmp_path: Path) -> None:
    both = [Doc(f"text {i}", record=i, id=str(i)) for i in range(40)]
    one = make(tmp_path / "a", [*both, Doc("moves", record=99), *(Doc(f"gone {i}", "data/c.txt", i, f"g{i}") for i in range(12)),
                                Doc("dropped", record=50), Doc("before", record=60)])
    other = make(tmp_path / "b", [*both[::-1], Doc("moves", record=99, split="val"), Doc("after", record=60), *both[:3]])
    differences = diff(one, other)
    a, b = differences.only["a"], differences.only["b"]
    assert (a.documents, a.changed, a.no_file, a.not_kept, a.bytes) == (14, 1, 12, 1, 87)
    assert (b.documents, b.changed, b.no_file, b.not_kept, b.bytes) == (1, 1, 0, 0, 5)
    assert differences.moved == 1 and ("in another split", "documents", "1", "1") in differences.rows()
    assert [(row["source"], row["record"], row["id"]) for row in a.first] == [("data/c.txt", i, f"g{i}") for i in range(10)]
    assert b.first == [{"hash": content_hash(b"after").hex(), "origin": 0, "source": "data/a.jsonl", "record": 60, "id": "", "bytes": 5}]


def test_a_diff_tells_files_of_one_name_apart_and_texts_of_one_length(tmp_path: Path) -> None:
    """The sources of one name are paired by their files, wherever they stand."""
    sources = [{"name": "data", "format": "auto", "text_key": "text", "files": 1, "bytes": 9, "xxh3": xxh3} for xxh3 in ("00", "01", "02")]
    shortened = [Doc(f"Left {i}.", record=3, origin=i, cleaned="Left 0. Left 1.") for i in (0, 1)]
    one = make(tmp_path / "a", [Doc("of the second"), Doc("of the first", record=1, origin=1), Doc("there", "data/z", origin=1),
                                shortened[0]], sources=[sources[1], sources[0]])
    other = make(tmp_path / "b", [Doc("of another"), Doc("of the second", origin=1), Doc("here", "data/z", origin=1),
                                  shortened[1]], sources=[sources[2], sources[1]])
    for only in diff(one, other).only.values():
        assert (only.documents, only.changed, only.no_file, only.not_kept) == (3, 1, 1, 1)


def test_a_diff_of_a_corpus_from_before_there_were_origins_says_so(tmp_path: Path) -> None:
    corpus = make(tmp_path / "c", DOCS, steps=STEPS)
    old = make(tmp_path / "old", DOCS)
    pq.write_table(pq.read_table(old / "documents.parquet").drop_columns(["text_hash", "origin"]), old / "documents.parquet")
    with pytest.raises(InputError, match=r"documents\.parquet has no text_hash and no origin; an earlier distlm"):
        diff(corpus, old)
