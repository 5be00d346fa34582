"""Labels from records to windows: a document a window, each label where it belongs, each reject under its reason."""

import asyncio
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoTokenizer, BertTokenizerFast, RobertaTokenizerFast

from distlm.corpus.bpe import byte_characters
from distlm.corpus.conversations import Refused
from distlm.corpus.inspect import documents, summary
from distlm.corpus.labels import check_labels, labels_of, ordered
from distlm.corpus.manifest import read_manifest
from distlm.corpus.stream import Plan, Windows, local_steps, ordered_steps
from distlm.corpus.verify import verify
from distlm.errors import CorpusError, InputError, SpecError
from distlm.model.build import build_model, model_config
from distlm.model.encoder import lengths_of, read_frame
from distlm.model.export import export_model
from distlm.runs import RunFolder
from distlm.serve.api import classified_tokens
from distlm.serve.classifier import TorchClassifier
from distlm.spec.load import load_spec
from distlm.spec.prepare import Labels
from distlm.storage import Storage, write_json
from distlm.text.clean import common
from distlm.train.loop import export_lineage
from distlm.train.recipe import make_recipe
from tests.train.ranks import spec

Run = Callable[..., dict[str, Any]]
CONTEXT = 16
BYTES = {"tokenizer": {"train": "bytes"}, "context": CONTEXT, "split": {"val_fraction": 0.25}}


def records() -> list[dict[str, Any]]:
    good = [{"id": f"good-{i}", "text": f"{'even' if i % 2 == 0 else 'odd'} {i}", "kind": {"name": "even" if i % 2 == 0 else "odd"}}
            for i in range(60)]
    bad = [{"text": "no label 1"}, {"text": "no label 2", "kind": {"name": None}}, {"text": "no label 3", "kind": {"name": " "}},
           {"text": "a list", "kind": {"name": ["even"]}}, {"text": "a number", "kind": {"name": 1.5}},
           {"text": "even 0", "kind": {"name": "odd"}}, {"text": "even 2", "kind": {"name": " even "}},
           {"id": "long", "text": "x" * CONTEXT + "y", "kind": {"name": "odd"}},
           {"id": "just", "text": "x" * CONTEXT, "kind": {"name": "odd"}}]
    return good + bad


def write(path: Path, given: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in given))
    return path


def texts_and_labels(corpus: Path, split: str) -> list[tuple[str, list[str]]]:
    """Of every window: the text of the bytes before the first end token, and its labels by name."""
    manifest, windows = read_manifest(corpus), Windows(corpus, split)
    places = windows.first(len(windows))
    tokens, labels = windows.read(*places), windows.labels(*places)
    found = []
    for row, numbers in zip(tokens, labels, strict=True):
        end = row.tolist().index(manifest.eos_id)
        assert (row[end:] == manifest.eos_id).all(), "padded by the end token"
        chosen = np.flatnonzero(numbers) if manifest.multiple_labels else numbers
        found.append((bytes((row[:end] - 4).astype(np.uint8)).decode(), [manifest.labels[i] for i in chosen]))
    return found


def test_each_document_is_a_window_with_its_label(run: Run, tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", records())
    result = run(source, labels={"label_key": "kind.name"}, **BYTES)
    corpus = Path(result[""])
    manifest = verify(corpus)
    assert manifest.labels == ("even", "odd") and not manifest.multiple_labels
    lost = {"no_label": 3, "bad_label": 2, "duplicate": 1, "duplicate_other_label": 1, "longer_than_window": 1}
    assert {key: result[f"rejected.{key}"] for key in lost} == lost
    found = {split: texts_and_labels(corpus, split) for split in ("train", "val")}
    pairs = found["train"] + found["val"]
    assert sorted(pairs) == sorted([(one["text"], [one["kind"]["name"]]) for one in records()[:60]] + [("x" * CONTEXT, ["odd"])])
    told = manifest.data["labels"]
    for split, pairs in found.items():
        assert manifest.splits[split].windows == manifest.splits[split].documents == len(pairs)
        assert told[split] == Counter(name for _, names in pairs for name in names)
    assert told["cut_documents"] == 0 and min(told["val"].values()) > 0 and ("labels", "2: even") in [
        (name, text[:7]) for name, text in summary(corpus)]
    [shown] = documents(corpus, ["good-7"])
    assert shown.text == "odd 7" and shown.meta == {"kind.name": "odd"}
    [long], [other] = (list(map(json.loads, (corpus / "rejects" / f"{reason}.jsonl").read_text().splitlines()))
                       for reason in ("longer_than_window", "duplicate_other_label"))
    assert long["detail"] == "18 tokens, and a window holds 17"
    assert (other["detail"], other["record"], other["same_as"]["record"]) == ("labelled odd, and what is kept even", 65, 0)
    assert "labelled odd, and what is kept even" in (corpus / "report.html").read_text()


def test_the_stream_brings_labels_with_their_windows_in_any_division(run: Run, tmp_path: Path) -> None:
    corpus = Path(run(write(tmp_path / "a.jsonl", records()), labels={"label_key": "kind.name"}, shard_windows=7, **BYTES)[""])
    assert len(read_manifest(corpus).splits["train"].shards) > 3
    expected = dict(texts_and_labels(corpus, "train"))

    def rows(world: int, first: int = 0) -> Any:
        plan = Plan(str(corpus), 8, world, 9, 1, labelled=True)
        ranks = [ordered_steps(local_steps(plan, rank, first), plan, rank, first) for rank in range(world)]
        return np.stack([np.concatenate(step) for step in zip(*ranks, strict=True)])

    whole = rows(1)
    np.testing.assert_array_equal(rows(2), whole)
    np.testing.assert_array_equal(rows(1, 5), whole[5:])
    assert whole.shape == (9, 8, CONTEXT + 2)
    for row in whole.reshape(-1, CONTEXT + 2):
        text = bytes(byte - 4 for byte in row[:row.tolist().index(0)].tolist()).decode()
        assert expected[text] == [("even", "odd")[row[-1]]]


def test_documents_that_are_cut_are_counted_and_lists_are_many_labels(run: Run, tmp_path: Path) -> None:
    table = pa.table({"text": [f"text {i} {'x' * (20 if i < 3 else 0)}" for i in range(40)],
                      "tags": [[name for j, name in enumerate(("10", "9", "2")) if i >> j & 1] for i in range(40)]})
    pq.write_table(table, tmp_path / "b.parquet")
    result = run(tmp_path / "b.parquet", labels={"label_key": "tags", "multiple": True, "too_long": "cut"}, **BYTES)
    corpus = Path(result[""])
    manifest = verify(corpus)
    assert manifest.labels == ("2", "9", "10") and manifest.multiple_labels and manifest.data["labels"]["cut_documents"] == 3
    pairs = texts_and_labels(corpus, "train") + texts_and_labels(corpus, "val")
    expected = [(text[:CONTEXT], sorted(tags, key=int)) for text, tags in zip(*table.to_pydict().values(), strict=True)]
    assert sorted(pairs) == sorted(expected)


def test_a_corpus_that_nothing_can_be_learned_from_is_an_error(run: Run, tmp_path: Path) -> None:
    one = write(tmp_path / "one.jsonl", [{"text": f"text {i}", "label": "same"} for i in range(30)])
    with pytest.raises(CorpusError, match="words: every training document has the label same: there is nothing to tell apart"):
        run(one, labels={}, **BYTES)
    rare = write(tmp_path / "rare.jsonl", [{"text": f"text {i}", "label": f"label {i}"} for i in range(30)])
    with pytest.raises(CorpusError, match=r"no training document has the label label \d+ \(1\), .* of the val split.*val_fraction"):
        run(rare, labels={}, **BYTES)
    (tmp_path / "plain.txt").write_text("text")
    with pytest.raises(InputError, match=r"plain.txt is text, and labels are read from jsonl, json and parquet"):
        run(tmp_path / "plain.txt", labels={}, **BYTES)


def test_names_that_are_given_are_all_labels_in_their_order(run: Run, tmp_path: Path) -> None:
    result = run(write(tmp_path / "a.jsonl", records()), labels={"label_key": "kind.name", "names": ["odd", "never", 3]}, **BYTES)
    corpus = Path(result[""])
    manifest = verify(corpus)
    assert manifest.labels == ("odd", "never", "3") and result["rejected.unknown_label"] == 31 and result["rejected.bad_label"] == 2
    assert {name for split in ("train", "val") for _, [name] in texts_and_labels(corpus, split)} == {"odd"}
    assert [manifest.data["labels"][split]["never"] for split in ("train", "val")] == [0, 0]
    sample = json.loads((corpus / "rejects" / "unknown_label.jsonl").read_text().splitlines()[0])
    assert sample["detail"] == "'kind.name' has 'even', which is none of labels.names"
    assert make_recipe(spec(corpus, objective="classify", batch={"global_sequences": 4, "micro_sequences": 2}),
                       Storage(tmp_path)).shape.labels == ("odd", "never", "3")


def test_what_a_label_may_be() -> None:
    one, many = Labels(), Labels(multiple=True)
    assert [labels_of(value, one) for value in (" spam ", 3, 3.0, True, "3")] == [["spam"], ["3"], ["3"], ["true"], ["3"]]
    assert labels_of([], many) == [] and labels_of(["b", 1], many) == ["b", "1"]
    for value, rules, reason in ((None, one, "no_label"), ("", one, "no_label"), ({"a": 1}, one, "bad_label"), (["a"], one, "bad_label"),
                                 ("a", many, "bad_label"), (["a", "a"], many, "bad_label"), ([None], many, "no_label")):
        with pytest.raises(Refused) as refused:
            labels_of(value, rules)
        assert refused.value.reason == reason, value
    assert labels_of(["e\u0301", "\u00e8"], many) == ["\u00e9", "\u00e8"]
    with pytest.raises(Refused, match="'\u00e9' twice"):
        labels_of(["e\u0301", "\u00e9"], many)
    assert ordered({"10", "9", "-1"}) == ["-1", "9", "10"] and ordered({"10", "9", "a"}) == ["10", "9", "a"]
    for names in (["1", "01", "001", "2"], ["001", "2", "01", "1"]):
        assert ordered(names) == ["001", "01", "1", "2"]
    assert ordered(["2", "1" * 5000]) == ["1" * 5000, "2"], "more digits than Python takes for a number"
    with pytest.raises(CorpusError, match="no training document is left with a label"):
        check_labels({"train": Counter(), "val": Counter()}, many, "c")


@pytest.mark.parametrize(("keys", "text"), [
    ({"labels": {}, "conversations": {}}, "labels: conversations have no labels"),
    ({"labels": {}, "pack": {"method": "best_fit"}}, "pack.method: a document with a label is a window of its own"),
    ({"labels": {}, "dedup": "none"}, "dedup.exact: equal texts might have two labels"),
    ({"labels": {}, "sources": [{"path": "x", "format": "warc"}]}, r"sources.0.format: warc holds no labels"),
    ({"labels": {"names": ["a", " a "]}}, "labels.names: a is there twice; give it once"),
    ({"labels": {"names": ["a"]}}, "labels.names: 1 leaves nothing to tell apart; give 2 or more"),
    ({"labels": {"names": ["a", " "]}}, "labels.names.1: "),
    ({"labels": {"columm": "x"}}, "labels.columm")])
def test_what_cannot_be_is_refused(keys: dict[str, Any], text: str) -> None:
    with pytest.raises(SpecError, match=text):
        load_spec({"kind": "prepare", "name": "c", "sources": ["x"], **keys})


def test_a_text_that_is_sent_has_the_tokens_of_the_same_text_prepared(run: Run, tmp_path: Path) -> None:
    said = "mail ada@real-company.com  now\r\n\r\n", "\ufb01ne\u0301  \x00 cafe\u0301"
    given = [{"text": f"{text}{i} ", "kind": "ab"[i % 2]} for i in range(20) for text in said]
    keys = {**BYTES, "context": 64, "labels": {"label_key": "kind"}}
    rules = {"unicode": "NFKC", "whitespace": "collapse", "redact": ["email"]}
    corpus = Path(run(write(tmp_path / "a.jsonl", given), clean=rules, **keys)[""])
    recipe = make_recipe(spec(corpus, objective="classify", batch={"global_sequences": 4, "micro_sequences": 2}), Storage(tmp_path))
    lineage = export_lineage(recipe, RunFolder(tmp_path / "run"))
    assert lineage["clean"] == {**rules, "control_characters": "remove", "fix_encoding": False}
    model = build_model(recipe.spec.model, model_config(recipe.spec.model, recipe.shape), 0)
    export_model(model, None, read_manifest(corpus).tokenizer, tmp_path / "export", lineage)
    engine = TorchClassifier(tmp_path / "export")
    windows = Windows(corpus)
    prepared = {tuple(row[:row.tolist().index(recipe.shape.eos_id)].tolist()) for row in windows.read(*windows.first(len(windows)))}
    sent = {tuple(engine.encode(one["text"])) for one in given}
    assert prepared and prepared <= sent
    write_json(tmp_path / "export" / "distlm.json", {key: value for key, value in lineage.items() if key != "clean"})
    silent = TorchClassifier(tmp_path / "export")
    assert not prepared & {tuple(silent.encode(one["text"])) for one in given}, "what is not told is not applied"
    write_json(tmp_path / "export" / "distlm.json", {**lineage, "clean": {"unicode": "NFX"}})
    with pytest.raises(InputError, match=r"distlm\.json: clean: {'unicode': 'NFX'} are no rules"):
        TorchClassifier(tmp_path / "export")


@pytest.mark.parametrize("too_long", ["cut", "reject"])
def test_a_longer_text_that_is_sent_is_cut_where_documents_were(run: Run, tmp_path: Path, too_long: str) -> None:
    given = [{"text": f"{i:02}" + "x" * (40 if i == 7 else 5), "kind": "ab"[i % 2]} for i in range(30)]
    keys = {**BYTES, "labels": {"label_key": "kind", "too_long": too_long}, "split": {"val_fraction": 0.2}}
    corpus = Path(run(write(tmp_path / "a.jsonl", given), **keys)[""])
    config = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
              "max_position_embeddings": 64}
    recipe = make_recipe(spec(corpus, objective="classify", batch={"global_sequences": 4, "micro_sequences": 2}, model={"config": config}),
                         Storage(tmp_path))
    lineage = export_lineage(recipe, RunFolder(tmp_path / "run"))
    assert lineage.get("cut_tokens") == (recipe.shape.context if too_long == "cut" else None)
    model = build_model(recipe.spec.model, model_config(recipe.spec.model, recipe.shape), 0)
    export_model(model, None, read_manifest(corpus).tokenizer, tmp_path / "export", lineage)
    engine = TorchClassifier(tmp_path / "export")
    ids, cut = asyncio.run(classified_tokens(engine, given[7]["text"]))
    rows = np.concatenate([windows.read(*windows.first(len(windows))) for windows in (Windows(corpus), Windows(corpus, "val"))])
    prepared = [row.tolist() for row in rows if row[:2].tolist() == ids[:2]]
    assert (prepared, cut) == (([[*ids, recipe.shape.eos_id]], True) if too_long == "cut" else ([], False))


def test_a_rule_that_not_all_sources_have_is_applied_to_no_text_that_is_sent(run: Run, tmp_path: Path) -> None:
    given = [{"text": f"text {i}", "kind": "ab"[i % 2]} for i in range(40)]
    paths = [write(tmp_path / "a.jsonl", given[:20]), write(tmp_path / "b.jsonl", given[20:])]
    sources = [{"path": str(paths[0])}, {"path": str(paths[1]), "clean": {"whitespace": "keep"}}]
    corpus = Path(run(sources, clean={"whitespace": "trim", "unicode": "NFKC"}, labels={"label_key": "kind"}, **BYTES)[""])
    assert common(read_manifest(corpus).cleaning) == {"unicode": "NFKC", "control_characters": "remove", "fix_encoding": False,
                                                      "whitespace": "keep", "redact": []}


def encoders_tokenizer(folder: Path, family: str) -> Any:
    """That of a family of encoders, of single characters."""
    if family == "bert":
        signs = [*map(chr, range(ord("!"), ord("A"))), *map(chr, range(ord("["), ord("~")))]
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *signs, *(f"##{sign}" for sign in signs), "even", "odd"]
        made: Any = BertTokenizerFast(vocab={word: i for i, word in enumerate(words)})
    else:
        words = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *byte_characters()]
        made = RobertaTokenizerFast(vocab={word: i for i, word in enumerate(words)}, merges=[])
    made.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_an_encoder_reads_a_document_as_its_tokenizer_writes_and_cuts_the_text(family: str, run: Run, tmp_path: Path) -> None:
    tokenizer = encoders_tokenizer(tmp_path / "encoder", family)
    given = [{"text": f"{name} {'x' * (i % 20)} {i}", "label": name} for i in range(40) for name in ("even", "odd")]
    given += [{"text": f"x {tokenizer.sep_token} {tokenizer.cls_token} y", "label": "odd"}]
    result = run(write(tmp_path / "a.jsonl", given), labels={"too_long": "cut"}, tokenizer={"from": str(tmp_path / "encoder")},
                 context=CONTEXT, split={"val_fraction": 0.25})
    manifest = verify(Path(result[""]))
    assert manifest.eos_id == tokenizer.sep_token_id and manifest.data["labels"]["cut_documents"] > 0
    frame, found = read_frame(manifest.tokenizer), Counter[tuple[int, ...]]()
    for split in ("train", "val"):
        windows = Windows(manifest.path, split)
        rows = torch.from_numpy(windows.read(*windows.first(len(windows)))[:, :CONTEXT].astype(np.int64))
        inputs = frame.inputs(rows, lengths_of(rows, manifest.eos_id), tokenizer.pad_token_id)
        found.update(tuple(row[mask > 0].tolist()) for row, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True))
        assert all((row[mask == 0] == tokenizer.pad_token_id).all() for row, mask in zip(*inputs.values(), strict=True))
    assert found == Counter(tuple(tokenizer(one["text"], truncation=True, max_length=CONTEXT + 2, split_special_tokens=True)["input_ids"])
                            for one in given)
