"""What a look into a corpus must show, and that no damage of one stays unseen."""

import random
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from distlm.corpus.inspect import diff, documents, find, summary, windows
from distlm.corpus.manifest import verify
from distlm.corpus.split import content_hash
from distlm.errors import CorpusError, InputError
from tests.corpus.made import Doc, make, step
from tests.train.ranks import make_corpus

STEPS = [step("read", (9, 900), (8, 850), malformed=(1, 30), markup=(0, 20)),
         step("filter", (8, 850), (3, 400), short=(2, 250), long=(1, 150), odd=(1, 20), bare=(1, 30))]
DOCS = [Doc("The quick brown fox jumps over the lazy dog.", id="fox", record=3, meta={"url": "https://example.com", "n": 1}),
        Doc("größer 你好 🤷🏽 end", id="wide", source="data/b.txt", split="val"), Doc("a", id="one"), Doc("", id="none"),
        Doc("Twice upon a time, a fox sat here and read for a long while, longer than a window is.", id="fox", record=4,
            reasons=("short", "odd")), Doc("val " * 12, id="v", split="val"), Doc("The end of it all, which fills no window", id="last")]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return make(tmp_path / "c", DOCS, steps=STEPS)


def test_a_summary_says_what_there_is_and_what_became_of_the_rest(corpus: Path) -> None:
    rows = dict(summary(corpus))
    assert rows["documents"] == "7" and rows["corpus"] == "c" and rows["tokenizer"] == "bytes, 260 tokens, uint16, end 0"
    assert rows["split train"].startswith("5 documents, 170 bytes, 175 tokens, 10 windows in 3 shards, 14 tokens fill none")
    assert rows["step filter"] == "8 → 3 documents, 850 → 400 bytes; 2 short, 1 bare, 1 long, 1 others"
    assert rows["step read"] == "9 → 8 documents, 900 → 850 bytes; 1 malformed"
    assert rows["source data"] == "2 files, 100 bytes, auto, xxh3 00"


@pytest.mark.parametrize("context", [8, 16, 64])
@pytest.mark.parametrize("shard_windows", [1, 3, 100])
def test_a_document_is_found_by_its_id_or_hash_with_its_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, context: int,
                                                             shard_windows: int) -> None:
    monkeypatch.setattr("distlm.corpus.inspect.BATCH_ROWS", 3)
    corpus = make(tmp_path / "c", DOCS, context=context, shard_windows=shard_windows)
    windows = verify(corpus).splits["train"].windows
    found = documents(corpus, [*{doc.id for doc in DOCS}])
    assert [(doc.id, doc.source, doc.record, doc.split, doc.meta, tuple(doc.reasons)) for doc in found] == \
        [(doc.id, doc.source, doc.record, doc.split, doc.meta, doc.reasons) for doc in DOCS]
    end = {"train": windows * context + 1, "val": verify(corpus).splits["val"].windows * context + 1}
    place = {"train": 0, "val": 0}
    for one, doc in zip(found, DOCS, strict=True):
        place[doc.split] += len(doc.text.encode()) + 1
        assert one.whole == (place[doc.split] <= end[doc.split])
        there = len(doc.text.encode()) - max(0, place[doc.split] - 1 - end[doc.split])
        assert one.text == doc.text.encode()[:max(0, there)].decode(errors="replace")
    assert not found[-1].whole
    [one] = documents(corpus, [content_hash(DOCS[1].text.encode()).hex()])
    assert one.id == "wide" and one.text == (DOCS[1].text if one.whole else one.text)


def test_an_id_that_no_document_has_is_an_error_that_names_the_nearest(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"id or hash lasst; did you mean last\?"):
        documents(corpus, ["fox", "lasst"])
    with pytest.raises(InputError, match=r"has no documents\.parquet"):
        documents(make_corpus(tmp_path / "old"), ["fox"])
    other = make(tmp_path / "other", [Doc(doc.text + "!", split=doc.split) for doc in DOCS])
    shutil.copyfile(corpus / "documents.parquet", other / "documents.parquet")
    with pytest.raises(CorpusError, match="is of another corpus"):
        documents(other, ["fox"])


def test_windows_are_decoded_with_the_corpus_own_tokenizer(corpus: Path, tmp_path: Path) -> None:
    whole = "".join(doc.text + "<|endoftext|>" for doc in DOCS if doc.split == "train")
    found = windows(corpus, first=2, count=5)
    assert [(window.split, window.number) for window in found] == [("train", number) for number in range(2, 7)]
    assert found[0].text == "he lazy dog.<|endoftext|>a<|endoftext|><|endoftext|>T" and found[0].starts == [13, 15, 16]
    assert all(window.text in whole for window in found)
    assert len(windows(corpus, "val", 0, 100)) == verify(corpus).splits["val"].windows
    given = make_corpus(tmp_path / "given")
    assert windows(given, "val", 6, 3)[0].text.startswith("t0 t54 ")
    for split, first, message in (("test", 0, "no split 'test'; it has train, val"), ("train", 48, "numbered from 0 to 47"),
                                  ("train", -1, "no window -1")):
        with pytest.raises(InputError, match=message):
            windows(given, split, first)


def test_a_text_is_found_also_over_the_ends_of_windows_and_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(0)
    texts = ["".join(rng.choice("abc é你") for _ in range(rng.randrange(1, 60))) for _ in range(60)]
    corpus = make(tmp_path / "c", [Doc(text, split="val" if i % 5 == 0 else "train") for i, text in enumerate(texts)], context=8)
    monkeypatch.setattr("distlm.corpus.inspect.CHUNK_TOKENS", 40)
    manifest = verify(corpus)
    for needle in ("a", "é你", "ab", "你你", "c<|endoftext|>b", texts[7], "abcabcabc"):
        expected = []
        for split in ("train", "val"):
            stream = "".join(text + "\0" for i, text in enumerate(texts) if (i % 5 == 0) == (split == "val")).encode()
            stream = stream[:manifest.splits[split].windows * 8 + 1]
            at, key = 0, needle.replace("<|endoftext|>", "\0").encode()
            while (at := stream.find(key, at)) >= 0:
                expected.append((split, min(at // 8, manifest.splits[split].windows - 1)))
                at += len(key)
        matches = find(corpus, needle, limit=1000)
        assert [(match.split, match.window) for match in matches] == expected
        assert all(needle in match.excerpt for match in matches)
        assert find(corpus, needle, limit=2) == matches[:2]


def test_the_last_token_is_searched_too(tmp_path: Path) -> None:
    corpus = make(tmp_path / "c", [Doc("x" * 13 + "END")], context=8)
    assert [match.window for match in find(corpus, "END<|endoftext|>")] == [1]


def test_an_excerpt_shows_what_is_around(corpus: Path) -> None:
    [one, two] = find(corpus, " fox ")
    assert one.excerpt == "The quick brown fox jumps over the lazy dog.<|endoftext|>a<|endoftext|>" + one.excerpt[71:]
    assert (one.window, two.window) == (0, 4) and two.excerpt.startswith("…") and two.excerpt.endswith("…")
    assert find(corpus, "FOX") == []
    with pytest.raises(InputError, match="empty text"):
        find(corpus, "")


def test_a_look_never_shows_a_damaged_shard(corpus: Path) -> None:
    shard = corpus / "train" / "00001.arrow"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    assert len(windows(corpus, first=0, count=4)) == 4
    for look in (lambda: windows(corpus, first=4), lambda: find(corpus, "zzz"), lambda: documents(corpus, ["last"])):
        with pytest.raises(CorpusError, match="the shard is damaged"):
            look()


def test_verify_finds_a_changed_byte_in_any_shard_and_in_the_tokenizer(corpus: Path) -> None:
    files = [*corpus.glob("train/*"), *corpus.glob("val/*"), *corpus.glob("tokenizer/*")]
    assert len(files) > 5
    rng = random.Random(0)
    for file in files:
        data = file.read_bytes()
        for place in [0, len(data) - 1, *(rng.randrange(len(data)) for _ in range(20))]:
            file.write_bytes(data[:place] + bytes([data[place] ^ (1 << rng.randrange(8))]) + data[place + 1:])
            with pytest.raises(CorpusError):
                verify(corpus)
        for cut in (data[:-1], data + b"\0"):
            file.write_bytes(cut)
            with pytest.raises(CorpusError):
                verify(corpus)
        file.write_bytes(data)
    verify(corpus)


def test_equal_corpora_do_not_differ_whatever_their_names(corpus: Path, tmp_path: Path) -> None:
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


def test_a_diff_of_a_corpus_from_before_there_were_origins_says_so(corpus: Path, tmp_path: Path) -> None:
    old = make(tmp_path / "old", DOCS)
    pq.write_table(pq.read_table(old / "documents.parquet").drop_columns(["text_hash", "origin"]), old / "documents.parquet")
    with pytest.raises(InputError, match=r"documents\.parquet has no text_hash and no origin; an earlier distlm"):
        diff(corpus, old)
