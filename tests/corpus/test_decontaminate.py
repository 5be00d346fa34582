"""Documents that hold a part of an evaluation text are found, whatever is around it, and no others."""

import json
import pickle
import random
import time
import unicodedata
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distlm.corpus import decontaminate
from distlm.corpus.decontaminate import Evaluations, Found
from distlm.corpus.read import Reader
from distlm.errors import InputError
from distlm.spec.curate import Decontaminate

TEXT = "Which of these rivers, rising in the Alps, flows through five countries and ends in the Black Sea?"
WORDS = TEXT.split()
"""18 words: six n-grams of 13."""
LONG = " ".join(f"w{i}" for i in range(40))


def read(folder: Path, texts: list[str], **rules: int) -> Evaluations:
    path = folder / "set.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return Evaluations.read(Decontaminate(against={"rivers": str(path)}, **rules))  # type: ignore[arg-type]


@pytest.fixture
def evaluations(tmp_path: Path) -> Evaluations:
    return read(tmp_path, [TEXT, LONG])


def padding(seed: int, words: int = 500) -> str:
    return " ".join(random.Random(seed).choices([f"p{i}" for i in range(2000)], k=words))


@pytest.mark.parametrize("words", [13, 15, 18])
def test_a_part_of_an_evaluation_text_is_found_wherever_it_stands_and_each_position_counts(evaluations: Evaluations, words: int) -> None:
    planted = " ".join(WORDS[-words:])
    for document in (planted, f"{planted} {padding(1)}", f"{padding(1)}\n{planted}\n{padding(2)}", f"{padding(1)} {planted}"):
        assert evaluations.hits(document) == {"rivers": words - 12}


@pytest.mark.parametrize("change", [
    str.upper, lambda text: text.replace(" ", "\n\t- "), lambda text: text.replace(",", ""), lambda text: "**" + text.replace(" ", "_"),
    lambda text: text.replace(" ", "\u00a0"), lambda text: text.replace(" ", " — ") + "…", lambda text: f"«{text}»你好"])
def test_case_punctuation_and_white_space_hide_nothing(evaluations: Evaluations, change: object) -> None:
    assert callable(change)
    assert evaluations.hits(f"{padding(1)}. {change(' '.join(WORDS))} {padding(2)}") == {"rivers": 6}


@pytest.mark.parametrize("sign", ["\u00ad", "\u200b", "\u200d", "\u2060", "\ufeff", "\u034f", "\ufe0f", "\u202e", "\U000e0041", "\u115f"])
def test_invisible_characters_hide_nothing(evaluations: Evaluations, tmp_path: Path, sign: str) -> None:
    words = [word[:2] + sign + word[2:] if i % 3 == 0 else word + sign if i % 5 == 0 else word for i, word in enumerate(WORDS)]
    assert evaluations.hits_each([f"{padding(1)} {' '.join(words)}", "Ä", TEXT + sign]) == [{"rivers": 6}, {}, {"rivers": 6}]
    assert read(tmp_path, [" ".join(words)]).hits(TEXT) == {"rivers": 6}
    assert evaluations.hits(f"{sign} {sign}") == {}


def test_twelve_of_thirteen_words_are_no_hit(evaluations: Evaluations) -> None:
    for first in range(len(WORDS) - 12):
        assert evaluations.hits(f"{padding(1)} {' '.join(WORDS[first:first + 12])} {padding(2)}") == {}
        run = WORDS[first:first + 13]
        for changed in range(13):
            assert evaluations.hits(" ".join(run[:changed] + ["other"] + run[changed + 1:])) == {}
            assert evaluations.hits(" ".join(run[:changed] + run[changed + 1:])) == {}
    assert evaluations.hits("") == evaluations.hits(" \n") == evaluations.hits("word") == {}


def test_look_alikes_are_no_hit(evaluations: Evaluations, tmp_path: Path) -> None:
    alike = [" ".join(sorted(WORDS)), " ".join(reversed(WORDS)), TEXT.replace(" ", ""), TEXT.replace("the", "t he"),
             TEXT.replace("in", "im"), TEXT.replace("e", "é"),
             " ".join(word + "s" for word in WORDS), LONG.replace("w", "w0"), LONG.replace(" ", "1 ")]
    assert [evaluations.hits(other) for other in alike] == [{}] * len(alike)
    assert read(tmp_path, ["कि " * 13]).hits("की " * 13) == {}
    for seed in range(20):
        shuffled = WORDS[:]
        random.Random(seed).shuffle(shuffled)
        assert evaluations.hits(" ".join(shuffled)) == {}


def test_two_documents_are_never_read_as_one(evaluations: Evaluations) -> None:
    texts = [" ".join(WORDS[:9]), " ".join(WORDS[9:]), "", LONG, padding(3) + " é", TEXT.upper(), "Ü " + TEXT]
    expected = [{}, {}, {}, {"rivers": 28}, {}, {"rivers": 6}, {"rivers": 6}]
    assert evaluations.hits_each(texts) == [evaluations.hits(text) for text in texts] == expected
    assert evaluations.hits_each([]) == []


def test_long_words_count_whole(tmp_path: Path) -> None:
    words = [f"internationalisation{'x' * i}{i}" for i in range(13)]
    evaluations = read(tmp_path, [" ".join(words)])
    assert evaluations.hits(" ".join(words)) == {"rivers": 1}
    for place in range(len(words[3])):
        assert evaluations.hits(" ".join([*words[:3], words[3][:place] + "q" + words[3][place + 1:], *words[4:]])) == {}


@pytest.mark.parametrize("text", [
    "Ёлка стоит в углу большой комнаты, и на ней горят огни, красные и синие, всю ночь.",
    "Größe, Straße, Äpfel: drei Wörter, die in jedem Übungsbuch für die fünfte Klasse stehen müssen.",
    "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता और समानता प्राप्त है।",
    "人人生而自由,在尊严和权利上一律平等。他们赋有理性和良心", "ประเทศไทยเป็นราชอาณาจักรในเอเชียตะวันออกเฉียงใต้"])
def test_every_script_is_found_in_every_normal_form(tmp_path: Path, text: str) -> None:
    evaluations = read(tmp_path, [text])
    for form in ("NFC", "NFD", "NFKC"):
        document = f"{padding(1)}; {unicodedata.normalize(form, text)} {padding(2)}"
        assert evaluations.hits(document)["rivers"] >= 1
        assert evaluations.hits(document.upper())["rivers"] >= 1
    if " " not in text:                                    # words that nothing divides, between others
        assert evaluations.hits(f"世界ไทย{text}ไทย世界") == evaluations.hits(text)


def test_a_short_text_counts_as_one_ngram_of_all_its_words_and_a_shorter_one_is_skipped(tmp_path: Path) -> None:
    short, shorter = "Name the longest river of all South America.", "What is the capital of France?"
    evaluations = read(tmp_path, [short, shorter, TEXT, "w " * 13])
    assert evaluations.lengths == (8, 13)
    assert evaluations.hits(f"{padding(1)} {short} {padding(2)}") == {"rivers": 1}
    assert evaluations.hits(short.removesuffix("America.")) == evaluations.hits(shorter) == {}
    assert evaluations.report(Found())["rivers"] == {"texts": 4, "skipped": 1, "ngrams": 8, "found": 0, "documents": 0}
    five = read(tmp_path, [shorter, "only four words here"], ngram_words=5)
    assert five.report(Found())["rivers"]["skipped"] == 1
    assert five.hits(f"Q: {shorter}") == {"rivers": 2}


def test_a_report_counts_documents_and_the_texts_of_which_a_part_was_met(tmp_path: Path) -> None:
    for name, texts in {"a": [LONG, TEXT, "v" + LONG.replace(" ", " v")], "b": [LONG + " more", LONG]}.items():
        (tmp_path / name).mkdir()
        for i, text in enumerate(texts):
            (tmp_path / name / f"{i}.txt").write_text(text)
    evaluations = Evaluations.read(Decontaminate(against={"b": str(tmp_path / "b"), "a": str(tmp_path / "a")}))
    documents = [LONG, padding(1), " ".join(WORDS[3:]) + " é", padding(2) + " " + LONG, " ".join(LONG.split()[5:20])]
    parts = [Found(), Found()]
    counts = evaluations.hits_each(documents[:2], parts[0]) + evaluations.hits_each(documents[2:], parts[1])
    assert counts == [{"a": 28, "b": 28}, {}, {"a": 3}, {"a": 28, "b": 28}, {"a": 3, "b": 3}]
    expected = {"a": {"texts": 3, "skipped": 0, "ngrams": 28 + 6 + 28, "found": 2, "documents": 4},
                "b": {"texts": 2, "skipped": 0, "ngrams": 29, "found": 2, "documents": 3}}
    for order in (parts, parts[::-1]):
        whole = Found()
        for part in order:
            whole.merge(pickle.loads(pickle.dumps(part)))
        assert evaluations.report(whole) == expected


def test_neither_the_order_of_texts_nor_of_sets_nor_their_format_matters(tmp_path: Path) -> None:
    texts = [padding(i, 60) for i in range(50)]
    made = []
    for order in (texts, texts[::-1]):
        path = tmp_path / f"{len(made)}.parquet"
        pq.write_table(pa.table({"text": order}), path)
        made.append(Evaluations.read(Decontaminate(against={"z": str(path), "rivers": str(path)})))
    made.append(read(tmp_path, texts))
    for other in made[1:]:
        np.testing.assert_array_equal(other.sets["rivers"].ngrams, made[0].sets["rivers"].ngrams)
    assert made[0].hash() == made[1].hash()
    assert len({made[0].hash(), made[2].hash(), read(tmp_path, texts[1:]).hash(), read(tmp_path, texts, ngram_words=12).hash()}) == 4
    assert list(made[0].sets) == ["rivers", "z"]
    assert made[0].hits(texts[7]) == {"rivers": 48, "z": 48}


def test_it_travels_to_tasks_and_stays_small(evaluations: Evaluations, tmp_path: Path) -> None:
    evaluations.hits(LONG)                                 # what it has worked out for itself stays here
    assert len(pickle.dumps(evaluations)) < 4000
    assert pickle.loads(pickle.dumps(evaluations)).hits(LONG) == {"rivers": 28}
    many = read(tmp_path, [padding(i, 60) for i in range(500)])
    assert len(pickle.dumps(many)) < 20 * len(many.sets["rivers"].ngrams)


def test_several_fields_count_where_the_spec_names_them(tmp_path: Path) -> None:
    path = tmp_path / "qa.jsonl"
    path.write_text(json.dumps({"question": TEXT, "answer": LONG}) + "\n" + json.dumps({"question": padding(1, 20)}) + "\n")
    against = {"qa": str(path)}
    assert Evaluations.read(Decontaminate(against=against, text_keys=("question",))).hits(LONG) == {}
    both = Evaluations.read(Decontaminate(against=against, text_keys=("question", "answer")))
    assert both.hits(LONG) == {"qa": 28} and both.sets["qa"].texts == 3
    array = tmp_path / "qa.json"
    array.write_text(f"[{', '.join(path.read_text().splitlines())}]")
    assert Evaluations.read(Decontaminate(against={"qa": str(array)}, text_keys=("question", "answer"))).hash() == both.hash()


def test_evaluation_texts_are_read_once_as_long_as_their_files_stay_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read_files = list[str]()
    monkeypatch.setattr(decontaminate, "Reader", lambda file, limit: read_files.append(file.name) or Reader(file, limit))
    against = {"rivers": str(tmp_path / "set.jsonl")}
    assert read(tmp_path, [TEXT]) is Evaluations.read(Decontaminate(against=against))
    assert read_files == ["set.jsonl"]
    assert read(tmp_path, [TEXT, LONG]).hits(LONG) and len(read_files) == 2, "the file has changed"
    assert Evaluations.read(Decontaminate(against=against, ngram_words=12)) and len(read_files) == 3, "the rules have"


def test_a_set_of_files_without_fields_is_read_once_however_many_fields_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trafilatura", exc_type=ImportError)
    (tmp_path / "a.html").write_text(f"<html><body><main><p>{LONG}</p></main></body></html>")
    assert Evaluations.read(Decontaminate(against={"rivers": str(tmp_path)})).hits(LONG)
    (tmp_path / "b.txt").write_text(LONG)
    (tmp_path / "c.jsonl").write_text(json.dumps({"question": LONG, "answer": TEXT}))
    read_files = list[str]()
    monkeypatch.setattr(decontaminate, "Reader", lambda file, limit: read_files.append(Path(file.name).name) or Reader(file, limit))
    found = Evaluations.read(Decontaminate(against={"rivers": str(tmp_path)}, text_keys=("question", "answer")))
    assert read_files == ["a.html", "b.txt", "c.jsonl", "c.jsonl"] and found.sets["rivers"].texts == 4


@pytest.mark.parametrize(("content", "keys", "expected"), [
    (None, ("text",), "no such file"), ("", ("text",), "no text in it"),
    ('{"text": "too few words"}\n', ("text",), "none of 1 texts has 8"),
    ('{"body": "x"}\n', ("text", "bodi"), r"no record has the field 'text' or 'bodi'; the first has body; did you mean body\?"),
    ('{"text": "x"\n', ("text",), "record 0 is malformed"), ('{"text": ["x"]}\n', ("text",), "record 0 is not_text")])
def test_a_set_that_cannot_be_read_whole_is_an_error_before_any_work(tmp_path: Path, content: str | None, keys: tuple[str, ...],
                                                                    expected: str) -> None:
    if content is not None:
        (tmp_path / "set.jsonl").write_text(content)
    with pytest.raises(InputError, match=expected) as caught:
        Evaluations.read(Decontaminate(against={"mmlu": str(tmp_path / "set.jsonl")}, text_keys=keys))
    assert "decontaminate.against.mmlu" in str(caught.value)


def test_a_set_of_an_archive_is_its_pages_and_one_without_a_page_is_an_error(tmp_path: Path) -> None:
    pytest.importorskip("trafilatura", exc_type=ImportError)
    pytest.importorskip("warcio")

    def answer(status: str, body: str) -> str:
        block = f"HTTP/1.1 {status}\r\nContent-Type: text/html; charset=utf-8\r\n\r\n{body}"
        return ("WARC/1.0\r\nWARC-Type: response\r\nContent-Type: application/http; msgtype=response\r\n"
                f"WARC-Record-ID: <urn:uuid:1>\r\nContent-Length: {len(block)}\r\n\r\n{block}\r\n\r\n")

    page = f"<html><body><main><p>{LONG}</p></main></body></html>"
    others = answer("404 Not Found", "gone") + answer("200 OK", "<html></html>")
    path, rules = tmp_path / "set.warc", Decontaminate(against={"pages": str(tmp_path / "set.warc")})
    path.write_text(answer("200 OK", page) + others)
    found = Evaluations.read(rules)
    assert found.sets["pages"].texts == 1 and found.hits(LONG)
    path.write_text(others)
    with pytest.raises(InputError, match="there is no text in it"):
        Evaluations.read(rules)
    path.write_text(answer("200 OK", page) + answer("200 OK", page)[:-50])
    with pytest.raises(InputError, match="record 1 is"):
        Evaluations.read(rules)


def test_it_keeps_up_with_reading(tmp_path: Path) -> None:
    """A floor far below what it does, so that a loop over words in Python is noticed."""
    evaluations = read(tmp_path, [padding(i, 60) for i in range(200)])
    texts = [padding(1000 + i, 1000) for i in range(300)]
    evaluations.hits_each(texts[:50])
    began = time.process_time()
    evaluations.hits_each(texts)
    assert sum(map(len, texts)) / (time.process_time() - began) > 12e6
