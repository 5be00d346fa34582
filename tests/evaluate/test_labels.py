"""A classifier is measured as its training measured it, by its endpoint as by itself, and what does not fit it is refused."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from distlm import execute, plan
from distlm.corpus.manifest import read_manifest
from distlm.errors import DistlmError, EvaluationError, InputError, SpecError
from distlm.evaluate import labels
from distlm.evaluate.driver import evaluate
from distlm.evaluate.endpoint import find_endpoint
from distlm.evaluate.task import inputs_of
from distlm.evaluate.worker import Worker
from distlm.model.export import export_model
from distlm.runs import RunFolder
from distlm.serve.classifier import TorchClassifier
from distlm.spec import CompressSpec, EvaluateSpec
from distlm.storage import Storage, read_json, write_json
from distlm.train.scores import SCORES
from tests.evaluate.models import evaluated, make_model, sums_of
from tests.records import Records
from tests.serve.test_api import KEY, Server
from tests.train.ranks import make_corpus, make_labelled_corpus, metrics, run_ranks
from tests.train.ranks import spec as train_spec
from tests.train.test_classify import CLASSIFY, by_hand, documents, exported

RUNS = {"one": "labelled", "many": "multiple"}
"""Run -> its corpus."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Corpora of two sources with one label a document and with several, one without, a classifier of each, a language model."""
    root = tmp_path_factory.mktemp("labels")
    for corpus in RUNS.values():
        make_labelled_corpus(root / "corpora" / corpus, multiple=corpus == "multiple", sources=("news", "mail"))
    make_corpus(root / "corpora" / "plain")
    run_ranks({root / "runs" / run: train_spec(root / "corpora" / corpus, **CLASSIFY) for run, corpus in RUNS.items()})
    make_model(root / "runs" / "language", root / "corpora" / "labelled")
    (root / "key").write_text(KEY)
    os.chmod(root / "key", 0o600)
    return root


def spec(root: Path, run: str = "one", **keys: Any) -> EvaluateSpec:
    return EvaluateSpec.model_validate({"name": "e", "model": str(root / "runs" / run / "export"),
                                        "corpus": str(root / "corpora" / RUNS[run]), **keys})


@pytest.mark.parametrize("run", RUNS)
def test_the_numbers_are_those_of_trainings_last_evaluation(run: str, root: Path) -> None:
    last = [record for record in metrics(root / "runs" / run) if "val_loss" in record][-1]
    found = evaluated(spec(root, run, batch_windows=5), Storage(root))
    assert found["documents"] == found["windows"] == 21 and found["loss"] == pytest.approx(last["val_loss"], rel=1e-5)
    assert found["confusion"] == last["confusion"] and found["labels"] == ["zero", "one", "two"]
    for name in SCORES:
        assert found[name] == pytest.approx(last[name], abs=1e-9), name
    assert last.get("val_ece") == (None if run == "many" else pytest.approx(found["ece"], abs=1e-6))
    sources = found["corpora"][RUNS[run]]["sources"]
    assert {*last["val_by_source"]} == {f"{RUNS[run]}: news", f"{RUNS[run]}: mail"}
    for source, theirs in sources.items():
        ours = last["val_by_source"][f"{RUNS[run]}: {source}"]
        known = {name: theirs[name] for name in ("loss", *SCORES, "ece") if theirs[name] is not None}
        assert ours == {name: pytest.approx(value, rel=1e-5, abs=1e-6) for name, value in known.items()}


@pytest.mark.parametrize("run", RUNS)
def test_they_are_scikit_learns_of_all_documents_and_of_each_source(run: str, root: Path) -> None:
    sklearn = pytest.importorskip("sklearn.metrics")
    corpus, many = RUNS[run], run == "many"
    found = evaluated(spec(root, run, **({} if many else {"calibration_bins": 4})), Storage(root))
    texts = documents(root / "corpora" / corpus, "val")
    _, logits = by_hand(exported(root / "runs" / run), texts)
    truth = np.stack([np.isin(range(3), given) for _, given in texts]) if many else np.array([given[0] for _, given in texts])
    sources = found["corpora"][corpus]["sources"]
    assert [*sources] == ["news", "mail"] and (sources["news"]["documents"], sources["mail"]["documents"]) == (11, 10)
    assert found["corpora"][corpus]["loss"] == found["loss"]
    for measured, rows in ((found, slice(None)), (sources["news"], slice(0, None, 2)), (sources["mail"], slice(1, None, 2))):
        right, values = truth[rows], logits[rows]
        guess = values > 0 if many else values.argmax(1)
        chances = torch.from_numpy(values).double().sigmoid().numpy() if many else torch.from_numpy(values).double().softmax(1).numpy()
        assert measured["loss"] == pytest.approx(by_hand(exported(root / "runs" / run), texts[rows])[0], rel=1e-5)
        assert measured["accuracy"] == pytest.approx(sklearn.accuracy_score(right, guess))
        for kind in ("macro", "micro"):
            wanted = sklearn.precision_recall_fscore_support(right, guess, labels=range(3), average=kind, zero_division=0)[:3]
            assert [measured[f"{name}_{kind}"] for name in ("precision", "recall", "f1")] == pytest.approx(wanted), kind
        has = right if many else right[:, None] == range(3)
        areas = [sklearn.roc_auc_score(has[:, i], chances[:, i]) for i in range(3) if 0 < has[:, i].sum() < len(has)]
        assert measured["roc_auc"] == pytest.approx(np.mean(areas))
        if many:
            assert (measured["ece"], measured["reliability"]) == (None, [])
            continue
        bins = np.ceil(chances.max(1) * 4).astype(int) - 1
        gaps = [abs((guess == right)[bins == i].mean() - chances.max(1)[bins == i].mean()) * (bins == i).mean() for i in set(bins.tolist())]
        assert measured["ece"] == pytest.approx(sum(gaps), abs=1e-6)
        assert [one["documents"] for one in measured["reliability"]] == np.bincount(bins, minlength=4).tolist()


def test_a_class_that_no_document_has_leaves_no_number_out(root: Path) -> None:
    found = evaluated(spec(root, windows=1), Storage(root))
    assert found["documents"] == 1 and found["roc_auc"] is None and found["corpora"]["labelled"]["sources"].keys() == {"news"}


def test_a_batch_comes_to_the_same_whoever_takes_it_and_in_whatever_order(root: Path) -> None:
    given = spec(root, batch_windows=4)
    task, whole = sums_of(given, Storage(root))
    found: dict[int, labels.Observed] = {}
    for rank in range(2):
        worker = Worker(task, "cpu", "fp32", None)
        worker.load(Path(str(given.model)))
        found |= {batch: worker.observe(batch) for batch in reversed(range(rank, len(whole), 2))}
    assert len(whole) > 4 and all(np.array_equal(found[i].rows, one.rows) for i, one in enumerate(whole))
    assert labels.outcome(task, "m", [found[i] for i in range(len(whole))]) == labels.outcome(task, "m", whole)


def test_several_corpora_are_measured_each_and_together(root: Path, tmp_path: Path) -> None:
    other = make_labelled_corpus(tmp_path / "other", documents=(30, 9))
    both = evaluated(spec(root, corpus=[str(root / "corpora" / "labelled"), str(other)]), Storage(root))
    alone = [evaluated(spec(root, corpus=str(one)), Storage(root)) for one in (root / "corpora" / "labelled", other)]
    assert both["documents"] == 30 and both["corpora"]["other"]["sources"] == {}
    assert both["loss"] == pytest.approx(sum(one["loss"] * one["documents"] for one in alone) / 30)
    for name, one in zip(both["corpora"], alone, strict=True):
        assert both["corpora"][name]["confusion"] == one["confusion"]
    counts = [np.array(one["confusion"]["counts"]) for one in (both, *alone)]
    assert (counts[0] == counts[1] + counts[2]).all()


def test_bfloat16_comes_near_and_logits_that_are_not_finite_are_told(root: Path, tmp_path: Path) -> None:
    task, whole = sums_of(spec(root), Storage(root))
    worker = Worker(task, "cpu", "bf16", None)
    worker.load(root / "runs" / "one" / "export")
    assert 0 < np.abs(worker.observe(0).rows - whole[0].rows).max() < 0.3
    broken = exported(root / "runs" / "one")
    torch.nn.init.constant_(broken.score.weight, torch.inf)
    export_model(broken, None, root / "corpora" / "labelled" / "tokenizer", tmp_path / "broken", {})
    with pytest.raises(EvaluationError, match="the classifier's logits are not finite for a document of labelled") as error:
        sums_of(spec(root, model=str(tmp_path / "broken")), Storage(root))
    assert error.value.cause == "nonfinite_loss"


@pytest.mark.parametrize("run", RUNS)
def test_a_corpus_may_lack_labels_of_the_classifier_and_number_them_otherwise(run: str, root: Path, tmp_path: Path) -> None:
    sklearn = pytest.importorskip("sklearn.metrics")
    corpus = make_labelled_corpus(tmp_path / "fewer", multiple=run == "many", names=("two", "zero"))
    found = evaluated(spec(root, run, corpus=str(corpus)), Storage(root))
    texts = [(tokens, [{0: 2, 1: 0}[label] for label in given]) for tokens, given in documents(corpus, "val")]
    loss, logits = by_hand(exported(root / "runs" / run), texts)
    assert found["loss"] == pytest.approx(loss, rel=1e-5) and found["labels"] == ["zero", "one", "two"]
    has = np.stack([np.isin(range(3), given) for _, given in texts])
    assert has.any(0).tolist() == [True, False, True]
    right, guess = (has, logits > 0) if run == "many" else (has.argmax(1), logits.argmax(1))
    for kind in ("macro", "micro"):
        wanted = sklearn.precision_recall_fscore_support(right, guess, labels=range(3), average=kind, zero_division=0)[:3]
        assert [found[f"{name}_{kind}"] for name in ("precision", "recall", "f1")] == pytest.approx(wanted), kind
    matrix = sklearn.multilabel_confusion_matrix(right, guess) if run == "many" else sklearn.confusion_matrix(right, guess, labels=range(3))
    assert found["confusion"] == {"labels": ["zero", "one", "two"], "counts": matrix.tolist()}
    assert found["roc_auc"] == pytest.approx(np.mean([sklearn.roc_auc_score(has[:, i], (
        torch.from_numpy(logits).sigmoid() if run == "many" else torch.from_numpy(logits).softmax(1)).numpy()[:, i]) for i in (0, 2)]))
    whole = evaluated(spec(root, run, corpus=[str(root / "corpora" / RUNS[run]), str(corpus)]), Storage(root))
    assert whole["documents"] == 21 + len(texts) and whole["corpora"]["fewer"]["confusion"] == found["confusion"]


@pytest.fixture(scope="module")
def servers(root: Path) -> Iterator[dict[str, Server]]:
    made = {run: Server(root / "runs" / run / "export", TorchClassifier, max_sequences=3, max_queued=1) for run in RUNS}
    made["language"] = Server(root / "runs" / "language", max_sequences=2)
    yield made
    for server in made.values():
        server.close()


def asked(root: Path, server: Server, corpus: str, **keys: Any) -> EvaluateSpec:
    return EvaluateSpec.model_validate({"name": "e", "corpus": str(root / "corpora" / corpus), "batch_windows": 4,
                                        "endpoint": {"url": server.url, "api_key_file": str(root / "key")}, **keys})


@pytest.mark.parametrize("run", RUNS)
def test_an_endpoint_has_the_numbers_of_its_model(run: str, root: Path, servers: dict[str, Server], tmp_path: Path) -> None:
    found = evaluate(asked(root, servers[run], RUNS[run], concurrent=3), RunFolder(tmp_path), Storage(root), Records())
    own = evaluated(spec(root, run), Storage(root))
    corpora = [(found, own), *((found["corpora"][RUNS[run]]["sources"][source], one)
                               for source, one in own["corpora"][RUNS[run]]["sources"].items())]
    for theirs, ours in corpora:
        assert theirs["loss"] == pytest.approx(ours["loss"], abs=1e-6) and theirs["confusion"] == ours["confusion"]
        assert [theirs[name] for name in SCORES] == [ours[name] for name in SCORES] and theirs["documents"] == ours["documents"]
        assert theirs["ece"] == (ours["ece"] if run == "many" else pytest.approx(ours["ece"], abs=1e-6))
    assert found["evaluated"] == f"tiny at {servers[run].url}/v1"
    page = (tmp_path / "report.html").read_text()
    assert page.count('<table class="matrix">') == (3 if run == "many" else 1) and ("<svg" in page) == (run == "one")


def test_a_classifier_keeps_its_own_padding_as_its_endpoint_does_and_takes_the_end_token_where_it_names_none(
        root: Path, servers: dict[str, Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = evaluated(spec(root), Storage(root))
    shutil.copytree(root / "runs" / "one" / "export", tmp_path / "model")
    config = read_json(tmp_path / "model" / "config.json")
    ends = [int(text[-1]) for text, _ in documents(root / "corpora" / "labelled", "val")]
    last = ends[0]
    for padding in (None, next(token for token in range(1, 100) if token not in ends), last):
        write_json(tmp_path / "model" / "config.json", {**config, "pad_token_id": padding, "problem_type": None})
        found = evaluated(spec(root, model=str(tmp_path / "model")), Storage(root))
        same = abs(found["loss"] - whole["loss"]) < 1e-6
        assert same == (padding != last), "behind a text that ends with its padding another token is read"
    engine = servers["one"].engine
    monkeypatch.setattr(engine, "pad", last)
    monkeypatch.setattr(engine.model.config, "pad_token_id", last)
    theirs = evaluate(asked(root, servers["one"], "labelled"), RunFolder(tmp_path), Storage(root), Records())
    assert theirs["loss"] == pytest.approx(found["loss"], abs=1e-6) and theirs["confusion"] == found["confusion"]


def test_an_endpoint_tells_of_logits_that_are_not_finite_as_its_model_does(root: Path, servers: dict[str, Server], tmp_path: Path,
                                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    layer = servers["one"].engine.model.score
    monkeypatch.setattr(layer, "weight", torch.nn.Parameter(torch.full_like(layer.weight, torch.nan)))
    with pytest.raises(EvaluationError, match="the classifier's logits are not finite for a document of labelled") as error:
        evaluate(asked(root, servers["one"], "labelled"), RunFolder(tmp_path), Storage(root), Records())
    assert error.value.cause == "nonfinite_loss"


def test_a_language_model_is_measured_by_the_texts_alone(root: Path, servers: dict[str, Server], tmp_path: Path) -> None:
    shown = Records()
    found = evaluate(asked(root, servers["language"], "labelled"), RunFolder(tmp_path), Storage(root), shown)
    own = evaluated(spec(root, model=str(root / "runs" / "language")), Storage(root))
    assert found["loss"] == pytest.approx(own["loss"], abs=1e-5) and found["tokens"] == own["tokens"] and "f1_macro" not in found
    assert "labelled has labels, and what is measured is no classifier: its texts are, and not its labels" in shown.notes


def test_what_an_endpoint_of_a_classifier_cannot_be_asked_is_told(root: Path, servers: dict[str, Server], tmp_path: Path) -> None:
    for corpus, keys, kind, message in (
            ("plain", {}, InputError, "corpus: tiny at .* is a classifier, and the documents of the corpus plain have no labels"),
            ("multiple", {}, InputError, "endpoint: .*: the checkpoint gives a text one label, and the corpus any number"),
            ("labelled", {"prompts": ["x"]}, SpecError, "prompts: .* has no effect with a classifier"),
            ("labelled", {"mask_documents": True}, SpecError, "mask_documents: True has no effect with a classifier")):
        with pytest.raises(kind, match=message):
            evaluate(asked(root, servers["one"], corpus, **keys), RunFolder(tmp_path), Storage(root), Records())
    storage = Storage(tmp_path)
    write_json(storage.endpoint("c") / "endpoint.json", {"url": f"{servers['one'].url}/v1", "model": "tiny", "classifier": True,
                                                         "api_key_file": str(root / "key"), "app": "c", "version": "v1"})
    assert find_endpoint(asked(root, servers["one"], "labelled", endpoint="c"), storage).classifies
    with pytest.raises(InputError, match=r"corpus: tiny at http.*/v1 is a classifier, and the documents of the corpus plain"):
        inputs_of(asked(root, servers["one"], "plain", endpoint="c"), storage)


@pytest.mark.parametrize(("keys", "message"), [
    ({"corpus": "plain"}, "corpus: .*/one/export is a classifier, and the documents of the corpus plain have no labels; prepare it with"),
    ({"corpus": "multiple"}, "model: .*the checkpoint gives a text one label, and the corpus any number; take a classifier of the"),
    ({"model": "renamed"}, r"model: .*the checkpoint tells apart ham, one, two, and documents of labelled have the label zero; prepare "
                           r'labelled with labels.names: \["ham", "one", "two"\], which leaves out documents with others, or take a'),
    ({"model": "number"}, "model: .*/number/export: it gives a text a number and tells no labels apart; take a classifier of two labels"),
    ({"model": "foreign"}, "model: .*the tokenizer of the checkpoint is not that of the corpus labelled"),
    ({"model": "encoder"}, "model: .*/encoder/export: its tokenizer puts no special token before a text"),
    ({"prompts": ["x"]}, r"prompts: \['x'\] has no effect with a classifier; leave it out"),
    ({"mask_documents": False}, "mask_documents: False has no effect with a classifier"),
    ({"model": "many", "corpus": "multiple", "calibration_bins": 5}, "calibration_bins: 5 has no effect where documents may have several"),
    ({"tasks": ["t.yaml"]}, "tasks: tasks are questions to a language model, and .*/one/export is a classifier")])
def test_what_does_not_fit_a_classifier_is_refused_before_any_work(keys: dict[str, Any], message: str, root: Path, tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    (tmp_path / "corpora").symlink_to(root / "corpora")
    shutil.copytree(root / "runs", tmp_path / "runs")
    for name, file, change in (("renamed", "config.json", {"id2label": {"0": "ham", "1": "one", "2": "two"}}),
                               ("number", "config.json", {"problem_type": "regression"}),
                               ("foreign", "tokenizer.json", {"model": {"type": "WordLevel", "vocab": {}, "unk_token": "x"}})):
        made = shutil.copytree(root / "runs" / "one" / "export", tmp_path / "runs" / name / "export")
        write_json(made / file, {**json.loads((made / file).read_text()), **change})
    vocabulary = read_manifest(root / "corpora" / "labelled").vocab_size
    encoder = AutoConfig.for_model("bert", vocab_size=vocabulary, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
                                   intermediate_size=8, id2label={0: "zero", 1: "one", 2: "two"})
    AutoModelForSequenceClassification.from_config(encoder).save_pretrained(tmp_path / "runs" / "encoder" / "export")
    given = {"kind": "evaluate", "name": "e", "model": "one", "corpus": "labelled", **keys}
    with pytest.raises(DistlmError, match=message):
        execute.run(given, storage=storage, progress=Records())
    assert not storage.evaluation("e").exists()
    with pytest.raises(DistlmError, match=message):
        plan.needs(execute.resolve(given), storage)


def test_a_compression_refuses_a_classifier(root: Path) -> None:
    from distlm.compress.task import task_of

    compress = CompressSpec(name="small", model="one", corpus="labelled", method="magnitude", sparsity=0.5)
    with pytest.raises(InputError, match="it is a classifier, and only language models can be here; `kind: evaluate` measures it"):
        task_of(compress, Storage(root))


@pytest.mark.slow
def test_a_job_leaves_the_numbers_the_page_and_what_it_was_made_of(root: Path, joined: None) -> None:
    storage, shown = Storage(root), Records()
    given = {"kind": "evaluate", "name": "job", "model": "one", "corpus": "labelled", "workers": 2, "batch_windows": 4}
    made = execute.run(given, storage=storage, progress=shown)
    expected = evaluated(spec(root, batch_windows=4), storage)
    assert {key: made[key] for key in expected if key != "evaluated"} == {key: expected[key] for key in expected if key != "evaluated"}
    folder = RunFolder(storage.evaluation("job"))
    assert folder.state() == ("succeeded", "completed") and json.loads((folder.path / "result.json").read_text()) == made
    inputs = folder.lineage()["inputs"]
    assert inputs["model"] == str(root / "runs" / "one" / "export") and [*inputs["corpora"]] == [str(root / "corpora" / "labelled")]
    page = (folder.path / "report.html").read_text()
    cells = [cell.split("<")[0] for cell in page.split('<table class="matrix">')[1].split("</table>")[0].split("var(--card))\">")[1:]]
    assert cells == [str(count) for row in made["confusion"]["counts"] for count in row]
    assert "labelled: mail" in page and f"{made['f1_macro']:.4f}" in page and page.count("<svg") == 3 and "likeliest label" in page
    [table] = [record for record in shown.records if record["distlm"] == "table"]
    rows = {row[0]: row[1] for row in table["rows"]}
    assert rows["documents"] == "21, val" and rows["macro F1"] == f"{made['f1_macro']:.4f}" and "10 documents" in rows["labelled: mail"]
    needs = dict(plan.needs(execute.resolve(given), storage))
    assert needs["labels"] == "3: zero, one, two" and needs["model"] == inputs["model"] and "kept apart" not in needs["corpus"]
