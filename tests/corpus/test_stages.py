"""Filters, decontamination, near-duplicates, boilerplate, repeated paragraphs inside a job: exact books, equal bytes however it ran."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from distlm.corpus import curate, spread
from distlm.corpus.diff import diff
from distlm.corpus.inspect import documents, find, windows
from distlm.corpus.manifest import read_manifest
from distlm.corpus.split import SplitRule, content_hash
from distlm.corpus.verify import verify
from distlm.errors import CorpusError, DistlmError, InputError
from tests.corpus.conftest import document, prepared
from tests.corpus.test_conversations import KEYS as CONVERSATIONS
from tests.corpus.test_conversations import records
from tests.corpus.test_filters import ENGLISH, GERMAN
from tests.records import Records

Run = Callable[..., dict[str, Any]]
KEYS: dict[str, Any] = {
    "clean": {"redact": ["email", "ip"], "whitespace": "trim", "boilerplate": {"max_chars": 60}},
    "filter": {"rules": ["gopher_repetition"], "min_words": 5},
    "dedup": {"fuzzy": {"ngram_words": 3}, "paragraphs": 40}, "split": {"val_fraction": 0.1}}
OWN: dict[str, Any] = {"clean": {"redact": [], "boilerplate": None}, "filter": {"min_words": 2}}
NOTICE = "This notice stands in many of the documents, and belongs to none."
FOOTER = "Find out more about these pages and their makers"
HIDDEN = "Of twenty words or some more this page is made, and its copy of quite the same ones, but for the very"
CORE = "Twelve words that only this text has, whatever else stands around it"


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents with near-duplicates, a paragraph that repeats, addresses, repetition, an evaluation text; ids and urls beside some."""
    root = tmp_path_factory.mktemp("stages")
    folder = root / "many"
    folder.mkdir()
    for i in range(40):
        (folder / f"{i:02}.txt").write_text(" ".join(f"{w}{(i * 31 + j * j) % 97}" for j in range(60) for w in ("w",))
                                           + f"\n{FOOTER}\n\n{NOTICE}\n")
    for i in range(10):                                    # one word of sixty differs
        words = (folder / f"{i:02}.txt").read_text().split("\n")[0].split(" ")
        words[30] = "other"
        (folder / f"near-{i}.txt").write_text(" ".join(words) + f"\n{FOOTER}\n\n{NOTICE}\n")
    (folder / "mail.txt").write_text("Write to someone.real@example-company.com about it, please, whenever it suits you.")
    (folder / "again.txt").write_text("the same line of words\n" * 50)
    (folder / "LICENSE").write_text("SPDX-License-Identifier: MIT")
    (folder / "other.txt").write_text("# SPDX-License-Identifier: GPL-3.0-only\nAnd what it is about, in some words.")
    (folder / "short.txt").write_text("too short")
    (folder / "footer.txt").write_text(f"{FOOTER}\n")
    (folder / "core.txt").write_text(CORE)
    (folder / "core-and-footer.txt").write_text(f"{FOOTER}\n\n{CORE}")
    (folder / "hidden.txt").write_text(f"{HIDDEN} last")
    (folder / "hidden-by-footer.txt").write_text(f"{HIDDEN} end\n{FOOTER}")
    (folder / "hidden-by-notice.txt").write_text(f"{HIDDEN} word\n\n{NOTICE}")
    lines = [{"text": document(i), "id": f"doc-{i}", "url": f"http://host/{i}"} for i in range(20)]
    (folder / "more.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "leak.txt").write_text("Before it. " + QUESTION + " And after it comes more text of another kind.")
    texts = [(folder / f"{i}.txt").read_text() for i in range(20, 23)]
    given = [texts[0], texts[1].replace("w", "v", 1), texts[2] + "\nOne line more\n",
             "Of its own, and with a word or two behind it."]
    (root / "z-given.jsonl").write_text("".join(json.dumps({"text": text, "id": f"given-{i}"}) + "\n" for i, text in enumerate(given)))
    weighed = [f"{FOOTER}\nThen write to nr{i}@weighed-company.com of number {i}" for i in range(30)]
    weighed += [text for i in range(8) for text in (f"pair{i} of", f"one{i}")]
    (root / "weighed.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in weighed))
    evaluation = root / "evaluation.jsonl"
    evaluation.write_text(json.dumps({"question": QUESTION}) + "\n")
    return folder


QUESTION = "Which of the seven rivers that cross the old northern province flows uphill in the month of a rainy spring?"


def keys(many: Path) -> dict[str, Any]:
    return {**KEYS, "decontaminate": {"against": {"rivers": str(many.parent / "evaluation.jsonl")}, "text_keys": ["question"]}}


def sources(many: Path) -> list[Any]:
    return [{"path": str(many / "*.txt"), "code": True, "filter": {"license": {"keep": ["MIT"]}}},
            {"path": str(many / "more.jsonl"), "keep": ["url"]},
            {"path": str(many.parent / "z-given.jsonl"), "split": "val"},
            {"path": str(many.parent / "weighed.jsonl"), "weight": 0.6, **OWN}]


@pytest.fixture(scope="module")
def shown() -> Records:
    """What is told while `whole` is made."""
    return Records()


@pytest.fixture(scope="module")
def whole(cluster: None, many: Path, shown: Records, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one worker makes of all sources by every stage. Tests read it."""
    return prepared(tmp_path_factory.mktemp("whole"), sources(many), progress=shown, workers=1, **keys(many))


def files_of(folder: str) -> dict[str, bytes]:
    made = ("manifest.json", "inputs.json", "documents.parquet", "sources.jsonl", "duplicates.jsonl", "train", "val", "tokenizer",
            "rejects")
    return {str(path.relative_to(folder)): path.read_bytes() for name in made for path in
            ([Path(folder, name)] if Path(folder, name).is_file() else sorted(Path(folder, name).rglob("*"))) if path.is_file()}


def test_every_step_keeps_its_books_and_tells_its_reasons(whole: dict[str, Any], shown: Records, many: Path) -> None:
    result, manifest = whole, verify(whole[""])
    steps = {step["name"]: step for step in manifest.data["steps"]}
    assert [*steps] == ["read", "clean", "sample", "filter", "decontaminate", "dedup", "fuzzy", "boilerplate", "decontaminate_stripped",
                        "dedup_stripped", "fuzzy_stripped", "paragraphs", "decontaminate_shortened", "dedup_shortened", "fuzzy_shortened",
                        "split", "tokenize"]
    lost = {name: {reason: account["documents"] for reason, account in step["rejected"].items()} for name, step in steps.items()}
    weighed = [json.loads(line)["text"] for line in (many.parent / "weighed.jsonl").read_text().splitlines()]
    kept = [text for text in weighed if int.from_bytes(content_hash(text.encode())[8:16], "big") < 0.6 * 2 ** 64]
    short = sum(text.startswith("one") for text in kept)
    assert lost["sample"] == {"sampled_out": 46 - len(kept)} and 20 < len(kept) < 35 and 0 < short < 8
    assert lost["filter"] == {"license": 1, "too_few_words": 1 + short, "gopher_duplicate_lines": 1}
    assert lost["decontaminate"] == {"contaminated_rivers": 1} and lost["fuzzy"] == {"near_duplicate": 12}
    assert lost["boilerplate"] == {"boilerplate": 1, "boilerplate_lines": 0}
    assert lost["dedup_stripped"] == {"duplicate_without_boilerplate": 1}
    assert lost["fuzzy_stripped"] == {"near_duplicate_without_boilerplate": 1}
    assert lost["fuzzy_shortened"] == {"near_duplicate_without_paragraphs": 1}
    assert steps["boilerplate"]["rejected"]["boilerplate_lines"]["bytes"] == 41 * len(f"\n{FOOTER}") + len(f"{FOOTER}\n\n")
    assert manifest.data["boilerplate"] == \
        {"min_documents": 10, "documents": steps["fuzzy"]["out"]["documents"] - len(kept) + short, "candidates": 65, "lines": 1}
    assert steps["paragraphs"]["rejected"]["repeated_paragraphs"]["documents"] == 0
    assert manifest.data["fuzzy"]["clusters"] == 12 and manifest.data["redactions"] == {"email": 1}
    assert manifest.data["decontamination"]["rivers"]["documents"] == 1 and manifest.data["decontamination"]["rivers"]["found"] == 1
    assert "0.924" in shown.text                           # 14 bands of 8 rows, at a similarity of 0.8
    assert {path.stem for path in Path(result[""], "rejects").iterdir()} == \
        {"license", "sampled_out", "too_few_words", "gopher_duplicate_lines", "contaminated_rivers", "near_duplicate", "boilerplate",
         "boilerplate_lines", "duplicate", "duplicate_without_boilerplate", "near_duplicate_without_boilerplate",
         "near_duplicate_without_paragraphs"}
    [sample, *_] = [json.loads(line) for line in Path(result[""], "rejects", "near_duplicate.jsonl").read_text().splitlines()]
    assert sample["source"] != sample["same_as"]["source"] and sample["similarity"] > 0.7
    [line] = [json.loads(line) for line in Path(result[""], "rejects", "boilerplate_lines.jsonl").read_text().splitlines()]
    assert (line["text"], line["detail"], line["bytes"]) == (FOOTER, "in 43 documents", len(FOOTER))
    [copy] = [json.loads(line) for line in Path(result[""], "rejects", "duplicate_without_boilerplate.jsonl").read_text().splitlines()]
    assert {copy["source"], copy["same_as"]["source"]} == {"many/core.txt", "many/core-and-footer.txt"}
    found = [json.loads(line) for line in Path(result[""], "duplicates.jsonl").read_text().splitlines()]
    assert Counter(one["step"] for one in found) == {"dedup": 1, "fuzzy": 5, "dedup_stripped": 1, "fuzzy_stripped": 1, "fuzzy_shortened": 1}
    (last,) = [one["members"] for one in found if one["step"] == "fuzzy_shortened"]
    assert {one["source"] for one in last} > {"many/hidden-by-notice.txt"} and all(HIDDEN[-50:] in one["text"] for one in last)
    assert last[0]["text"] != last[1]["text"] and last[1]["similarity"] > 0.7
    assert "in 43 documents" in Path(result[""], "report.html").read_text()
    held = {text: len(find(result[""], text, limit=100)) for text in ("@weighed-company.com", FOOTER, "@example-company.com")}
    assert held["@weighed-company.com"] == held[FOOTER] > 10 and not held["@example-company.com"]
    (own,) = [source for source in manifest.sources if source["name"] == "weighed.jsonl"]
    assert own["weight"] == 0.6 and {key: own[key] for key in OWN} == OWN


def test_documents_keep_their_ids_and_fields_in_the_order_of_the_corpus(whole: dict[str, Any]) -> None:
    result = whole
    table = pq.read_table(Path(result[""], "documents.parquet")).to_pylist()
    (more,) = [source["splits"] for source in read_manifest(result[""]).sources if source["name"] == "more.jsonl"]
    assert more["train"]["tokens"] > 0
    for split, count in more.items():
        mine = [row for row in table if (row["source"], row["split"]) == ("more.jsonl", split)]
        assert count == {"documents": len(mine), **{unit: sum(row[unit] for row in mine) for unit in ("bytes", "tokens")}}
    texts = {one.id: one.text for one in documents(result[""], [f"given-{i}" for i in range(4)])}
    given = {row["id"]: row for row in table if row["id"] in texts}
    assert {name: content_hash(text.encode()) for name, text in texts.items()} == {name: row["text_hash"] for name, row in given.items()}
    assert {row["hash"] == row["text_hash"] for row in given.values()} == {False, True}      # some have lost their footer
    assert len(table) == result["documents"] and sum(row["tokens"] for row in table) == result["tokens"]
    assert sum(row["bytes"] for row in table) == result["bytes"]
    known = {row["id"]: row for row in table if row["id"]}
    assert set(known) == {f"doc-{i}" for i in range(20)} | {f"given-{i}" for i in range(4)}
    own = [json.loads(row["meta"]) for row in table if row["source"] == "many/mail.txt"]
    assert own == [{"path": "many/mail.txt", "language": "", "license": "MIT"}]
    assert json.loads(known["doc-7"]["meta"]) == {"url": "http://host/7"}
    assert {row["split"] for row in table} == {"train", "val"} and known["doc-7"]["source"] == "more.jsonl"


def test_a_source_that_is_given_for_validation_stays_whole_and_what_is_like_it_is_not_trained_on(whole: dict[str, Any]) -> None:
    """Its documents come last by the names of their files; they are kept all the same, with the paragraphs that others hold."""
    result = whole
    rows = pq.read_table(Path(result[""], "documents.parquet")).to_pylist()
    given = {row["id"]: row for row in rows if row["source"] == "z-given.jsonl"}
    assert len(given) == 4 and {row["split"] for row in given.values()} == {"val"}
    assert not {row["source"] for row in rows} & {"many/20.txt", "many/21.txt", "many/22.txt"}
    assert {row["split"] for row in rows if row["source"] != "z-given.jsonl"} == {"train", "val"}
    held = [json.loads(line) for line in Path(result[""], "rejects", "near_duplicate.jsonl").read_text().splitlines()]
    assert {row["source"] for row in held if row["same_as"]["source"] == "z-given.jsonl"} == {"many/21.txt", "many/22.txt"}
    texts = {one.id: one.text for one in documents(result[""], list(given))}
    assert [NOTICE in text for text in texts.values()].count(True) == 1
    assert not any(NOTICE in window.text for window in windows(result[""], "train", 0, 10_000))


def test_no_path_of_this_host_is_in_the_manifest_and_the_list_of_documents_is_verified(
        whole: dict[str, Any], many: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(whole[""], tmp_path / "copy")
    file = copy / "documents.parquet"
    assert str(many.parent) not in (copy / "manifest.json").read_text()
    verify(copy)
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(CorpusError, match=r"documents\.parquet: the file has been changed"):
        verify(copy)


def test_what_is_annotated_stays_with_its_reasons(run: Run, many: Path) -> None:
    result = run(sources(many), filter={"rules": ["gopher_repetition"], "min_words": 5, "mode": "annotate"})
    manifest = read_manifest(result[""])
    rows = pq.read_table(Path(result[""], "documents.parquet")).to_pylist()
    few = [row["source"] for row in rows if row["reasons"] == ["too_few_words"]]
    assert manifest.data["annotated"]["too_few_words"] == len(few) and set(few) == {"many/short.txt", "weighed.jsonl"}
    assert {row["source"]: row["reasons"][0] for row in rows if row["reasons"]}["many/short.txt"] == "too_few_words"


def test_the_languages_that_the_filter_finds_are_counted_kept_or_not(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("py3langid")
    texts = [f"{text} {i}" for i in range(9) for text in (ENGLISH, GERMAN)[:1 + (i < 4)]] + ["short"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text, "lang": "ga"}) + "\n" for text in texts))
    made = run([{"path": str(tmp_path / "a.jsonl"), "keep": ["lang"]}], filter={"language": {"keep": ["en"]}, "min_words": 2})
    assert verify(made[""]).data["languages"] == {"de": {"documents": 4, "unwanted": 4}, "en": {"documents": 9, "unwanted": 0}}


@pytest.mark.parametrize("wrong, text", [
    ({"filter": {"function": "nowhere:judge"}}, "nowhere cannot be imported"),
    ({"decontaminate": {"against": {"rivers": "/nowhere"}}}, "no such file"),
    ({"filter": {"language": {"keep": ["en"], "model": "/nowhere.bin"}}}, "language.model")])
def test_what_is_not_there_is_found_before_any_work(wrong: dict[str, Any], text: str, run: Run, many: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=text):
        run(sources(many), **wrong)
    assert not (tmp_path / "store" / "corpora" / "words" / "rejects").exists()


def test_a_function_that_fails_names_the_document_and_ends_the_job(run: Run, many: Path, tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"filter\.function: os\.path:isabs: the function returned"):
        run(sources(many), filter={"function": "os.path:isabs"})
    assert not list((tmp_path / "store" / "corpora" / "words").glob(".scratch-*"))


@pytest.mark.parametrize("workers", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_the_bytes_are_equal_with_one_worker_and_several_and_on_other_partitions(
        workers: int, run: Run, whole: dict[str, Any], many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chats = tmp_path / "chats.jsonl"
    chats.write_text("".join(json.dumps(record) + "\n" for record in records()))
    said = [run(chats, "said", workers=1, **CONVERSATIONS)]
    monkeypatch.setattr(curate, "PARTITION_BYTES", 2500)   # more partitions, and more tasks to read
    monkeypatch.setattr(curate, "MAX_FILES_PER_TASK", 20)
    second = run(sources(many)[::-1], "several", workers=workers, **keys(many))
    said.append(run(chats, "said-again", workers=workers, **CONVERSATIONS))
    for results in ((whole, second), said):
        one, several = (files_of(result[""]) for result in results)
        assert {name for name in one if one[name] != several.get(name)} == set() and set(one) == set(several)


JOB = """
import json, sys
from pathlib import Path
import ray
from distlm.corpus.prepare import prepare
from distlm.progress import PlainProgress
from distlm.runs import RunFolder
from distlm.spec import load_spec
from distlm.storage import Storage
ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
spec, storage = load_spec(json.loads(sys.argv[1])).spec, Storage(Path(sys.argv[2]))
folder = RunFolder(storage.corpus(spec.name))
folder.path.mkdir(parents=True, exist_ok=True)
prepare(spec, folder, storage, PlainProgress())
"""


def test_a_job_that_is_killed_goes_on_where_it_was_and_makes_the_same_bytes(
        run: Run, whole: dict[str, Any], many: Path, tmp_path: Path) -> None:
    spec = {"kind": "prepare", "name": "words", "context": 16, "shard_windows": 32, "tokenizer": {"vocab_size": 300},
            "sources": sources(many), **keys(many)}
    process = subprocess.Popen([sys.executable, "-c", JOB, json.dumps(spec), str(tmp_path / "killed")], start_new_session=True,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, "RAY_ADDRESS": ""})
    corpus, deadline = tmp_path / "killed" / "corpora" / "words", time.monotonic() + 120
    try:
        while not list(corpus.glob(".scratch-*/fuzzy_stripped/sign_partition/*.pickle")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        os.killpg(process.pid, signal.SIGKILL)             # its Ray with it: the session is its own
        process.wait()
    assert not (corpus / "manifest.json").exists()
    shown = Records()
    again = run(sources(many), "killed", progress=shown, **keys(many))
    assert "read: " in shown.text and "parts are done already" in shown.text
    assert files_of(again[""]) == files_of(whole[""])


def test_what_is_equal_without_its_paragraphs_is_kept_once_and_a_shortened_text_has_changed(run: Run, tmp_path: Path) -> None:
    menu, lines = "Menu, home and about", [f"A paragraph of its own, number {i}, with some words in it." for i in range(6)]
    texts = tmp_path / "pages"
    texts.mkdir()
    for i, line in enumerate(lines):
        (texts / f"{i}.txt").write_text(f"{line}\n\nAnd a longer one of the same page, with words.")
        (texts / f"{i}-copy.txt").write_text(f"{menu}\n\n{line}")
    made = run(texts, dedup={"paragraphs": 30}, split={"val_fraction": 0.3}, context=8)
    steps = {step["name"]: step for step in verify(made[""]).data["steps"]}
    assert steps["dedup_shortened"]["rejected"]["duplicate_without_paragraphs"]["documents"] >= 1
    held = "".join(window.text for split in ("train", "val") for window in windows(made[""], split, 0, 10_000))
    assert held.count(menu) <= 1 + sum(line in held.split(menu, 1)[-1] for line in lines)
    whole = run(texts, "whole", split={"val_fraction": 0.3}, context=8)
    assert ("only in one", "changed") in [(part, key) for part, key, *_ in diff(made[""], whole[""]).rows()]


@pytest.mark.parametrize("keys", [{"clean": {"boilerplate": {"min_words": 0, "code": True}}, "dedup": "fuzzy"},
                                  {"dedup": {"fuzzy": {}, "paragraphs": 30}}])
def test_near_duplicates_that_lines_or_paragraphs_hide_do_not_straddle(run: Run, tmp_path: Path, keys: dict[str, Any]) -> None:
    """Pairs of which one word of 120 differs, on pages of two kinds, whose lines or paragraphs are more than half of each."""
    kinds = [[" ".join(f"{kind}{line}x{word}" for word in "abcdefghijkl") for line in range(12)] for kind in ("left", "right")]
    cores = [" ".join(f"core{i}n{word}" for word in range(120)) for i in range(20)]
    pages = {f"{i}-{side}": "\n\n".join([core.replace("n60", "other") if side else core, *kind])
             for i, core in enumerate(cores) for side, kind in enumerate(kinds)}
    (tmp_path / "pages.jsonl").write_text("".join(json.dumps({"id": name, "text": text}) + "\n" for name, text in pages.items()))
    splits = {name: SplitRule(0.4).of(content_hash(text.encode())) for name, text in pages.items()}
    assert len({i for i in range(20) if splits[f"{i}-0"] != splits[f"{i}-1"]}) > 5
    made = run(tmp_path / "pages.jsonl", split={"val_fraction": 0.4}, **keys)
    steps = {step["name"]: step["rejected"] for step in verify(made[""]).data["steps"]}
    assert not steps["fuzzy"]                              # they were hidden
    rows = {row["id"]: row for row in pq.read_table(Path(made[""], "documents.parquet")).to_pylist()}
    whole = {name.split("-")[0] for name, row in rows.items() if row["bytes"] == len(pages[name])}
    pairs = Counter(name.split("-")[0] for name in rows)
    assert len(pairs) == 20 and len(whole) <= 2            # the first of each kind keeps the paragraphs, and is unlike what has none
    assert {name for name, count in pairs.items() if count > 1} <= whole


def test_an_evaluation_text_that_a_line_or_a_paragraph_had_cut_is_found_when_that_has_gone(run: Run, tmp_path: Path) -> None:
    words, middle = QUESTION.split(), len(QUESTION.split()) // 2
    begin, end = " ".join(words[:middle]), " ".join(words[middle:])
    pages = [f"page{i} one two three\n{FOOTER}\nand four five{i}\n\nsix{i} seven eight" for i in range(12)]
    pages += [f"{NOTICE}\n\n{HIDDEN} paper{i}" for i in range(5)]
    lines = {"line": f"Of old.\n{begin}\n{FOOTER}\n{end}\nAnd on.", "paragraph": f"Of new. {begin}\n\n{NOTICE}\n\n{end}. So it is."}
    (tmp_path / "pages.jsonl").write_text("".join(json.dumps({"id": name, "text": text}) + "\n" for name, text in
                                                  [*lines.items(), *((f"{i}", page) for i, page in enumerate(pages))]))
    (tmp_path / "evaluation.jsonl").write_text(json.dumps({"text": QUESTION}) + "\n")
    made = run(tmp_path / "pages.jsonl", clean={"boilerplate": {}}, dedup={"paragraphs": 40}, context=8,
               decontaminate={"against": {"rivers": str(tmp_path / "evaluation.jsonl")}})
    data = verify(made[""]).data
    steps = {step["name"]: step["rejected"] for step in data["steps"]}
    assert not steps["decontaminate"]                      # they were cut
    assert steps["decontaminate_stripped"]["contaminated_rivers_without_boilerplate"]["documents"] == 1
    assert steps["decontaminate_shortened"]["contaminated_rivers_without_paragraphs"]["documents"] == 1
    assert (data["decontamination"]["rivers"]["documents"], data["decontamination"]["rivers"]["found"]) == (2, 1)
    assert not {"line", "paragraph"} & {row["id"] for row in pq.read_table(Path(made[""], "documents.parquet")).to_pylist()}
    (sample,) = map(json.loads, Path(made[""], "rejects", "contaminated_rivers_without_boilerplate.jsonl").read_text().splitlines())
    assert f"{begin}\n{end}" in sample["text"]


def test_a_worker_that_dies_changes_nothing(run: Run, texts: Path, tmp_path: Path) -> None:
    marker = tmp_path / "died"
    (texts / "deadly.txt").write_text(f"die once: {marker}\nand some more text")
    rules = {"filter": {"function": "tests.corpus.faults:die_once"}}
    made = run(texts, "died", **rules)
    assert marker.exists(), "nobody died"
    assert files_of(run(texts, "lived", **rules)[""]) == files_of(made[""]) and made["rejected"] == run(texts, "plain")["rejected"]


def test_a_document_that_kills_every_worker_ends_the_job_and_what_was_done_stays(
        run: Run, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spread, "MAX_RETRIES", 1)
    (texts / "deadly.txt").write_text("deadly")
    with pytest.raises(DistlmError, match=r"^stage read: a worker died 2 times at the same part: [^\n]*--resume goes on[^\n]*$") as caught:
        run(texts, filter={"function": "tests.corpus.faults:die"})
    corpus = tmp_path / "store" / "corpora" / "words"
    assert caught.value.cause == "worker_died" and not (corpus / "manifest.json").exists() and [*corpus.glob(".scratch-*")]


def test_a_source_that_vanishes_while_others_are_read_is_a_reject(run: Run, texts: Path) -> None:
    (texts / "a-first.txt").write_text(f"unlink: {texts / 'z-last.txt'}\nand some more text")
    (texts / "z-last.txt").write_text("It was here when the job began.")
    made = run(texts, filter={"function": "tests.corpus.faults:unlink"}, workers=1)
    assert made["rejected.unreadable"] == 1 and verify(made[""]).data["steps"][0]["rejected"]["unreadable"]["documents"] == 1


def test_a_test_split_takes_from_the_training_split_alone(run: Run, many: Path) -> None:
    two = run(sources(many), "two", split={"val_fraction": 0.2})
    three = run(sources(many), "three", split={"val_fraction": 0.2, "test_fraction": 0.3})
    found = [{row["hash"]: row["split"] for row in pq.read_table(Path(result[""], "documents.parquet")).to_pylist()}
             for result in (two, three)]
    changed = {(found[0][key], found[1][key]) for key in found[0] if found[0][key] != found[1][key]}
    assert changed == {("train", "test")} and three["test_windows"] > 0
    assert verify(three[""]).splits["test"].documents == sum(split == "test" for split in found[1].values())
