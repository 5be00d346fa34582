"""What a look into a corpus must show."""

import json
import random
import shutil
from pathlib import Path

import pytest

from distlm.corpus.diff import diff
from distlm.corpus.inspect import documents, find, summary, windows
from distlm.corpus.report import write_report
from distlm.corpus.split import content_hash
from distlm.corpus.verify import verify
from distlm.errors import CorpusError, InputError
from tests.corpus.made import DOCS, STEPS, Doc, make
from tests.train.ranks import make_corpus


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


def test_a_look_at_a_damaged_tokenizer_or_a_changed_list_is_an_error_of_one_line(corpus: Path) -> None:
    (corpus / "tokenizer" / "tokenizer.json").write_text("{")
    for look in (lambda: windows(corpus), lambda: documents(corpus, ["one"]), lambda: find(corpus, "fox")):
        with pytest.raises(CorpusError, match=r"^[^\n]*tokenizer.json: cannot be read: [^\n]*; restore it from a copy[^\n]*$"):
            look()
    for name, key in (("inputs.json", "sources"), ("manifest.json", "context")):
        told = json.loads((corpus / name).read_text())
        (corpus / name).write_text(json.dumps({**told, key: [] if key == "sources" else "x"}))
        for see in (summary, write_report, lambda path: diff(path, path)):
            with pytest.raises(CorpusError, match=f"{name}: its hash is not that of what it says: it has been changed"):
                see(corpus)
