"""Classifiers: the same steps however they are sharded, transformers' own loss, scores of what is exported, and what is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from distlm.corpus.stream import Windows, local_steps, ordered_steps
from distlm.errors import DistlmError, InputError, SpecError
from distlm.model.build import build_model, model_config
from distlm.spec import TrainSpec
from distlm.spec.load import dump, load_spec
from distlm.storage import Storage
from distlm.train.objectives.classify import class_weights
from distlm.train.recipe import Recipe, make_recipe
from tests.serve.tiny_models import make_classifier
from tests.train.ranks import losses, make_corpus, make_labelled_corpus, make_packed_corpus, metrics, run_ranks, spec, windows_seen

CLASSIFY = {"objective": "classify", "duration": {"steps": 12}, "evaluate": {"every_steps": 6}, "checkpoint": {"every_steps": 4}}
SHARDED = {"zero": 3, "deepspeed": {"zero_optimization": {"stage3_param_persistence_threshold": 0}}}
CASES = {f"zero{zero}": {"sharding": {"zero": zero} if zero < 3 else SHARDED, "scale": {"workers": 2}} for zero in range(4)}
SCORES = ("accuracy", "precision_macro", "recall_macro", "f1_macro", "precision_micro", "recall_micro", "f1_micro", "roc_auc")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("classify")


@pytest.fixture(scope="module")
def corpus(root: Path) -> Path:
    return make_labelled_corpus(root / "labelled", sources=("news", "mail"))


@pytest.fixture(scope="module")
def runs(root: Path, corpus: Path) -> Path:
    """Finished runs of one worker and of two."""
    many = make_labelled_corpus(root / "many", multiple=True)
    run_ranks({root / "base": spec(corpus, duration={"steps": 4})})
    run_ranks({root / "one": spec(corpus, **CLASSIFY), root / "weighted": spec(corpus, **CLASSIFY, class_weights="balanced"),
               root / "multiple": spec(many, **CLASSIFY), root / "tuned": spec(corpus, **CLASSIFY, model={"from": str(root / "base")}),
               root / "bf16": spec(corpus, **CLASSIFY, precision="bf16", optimizer={"name": "muon", "lr": 0.01})})
    run_ranks({root / name: spec(corpus, **CLASSIFY, **case) for name, case in CASES.items()})
    return root


def documents(corpus: Path, split: str, rows: np.ndarray | None = None) -> list[tuple[torch.Tensor, list[int]]]:
    """(tokens without the end token, labels) of the windows."""
    table = pa.ipc.open_file(corpus / split / "00000.arrow").get_batch(0)
    table = table if rows is None else table.take(pa.array(rows))
    return [(torch.tensor(row["tokens"][:row["filled"] - 1]), row["labels"]) for row in table.to_pylist()]


def by_hand(model: Any, texts: list[tuple[torch.Tensor, list[int]]], weights: Any = None) -> tuple[float, np.ndarray]:
    """(mean loss, logits) by transformers' own forward pass, a document at a time."""
    total, found = 0.0, []
    for tokens, labels in texts:
        with torch.no_grad():
            if model.config.problem_type == "single_label_classification":
                output = model(input_ids=tokens[None], labels=torch.tensor(labels))
            else:
                output = model(input_ids=tokens[None], labels=torch.eye(model.config.num_labels)[labels].sum(0)[None])
        total += output.loss.item() * (1 if weights is None else float(weights[labels[0]]))
        found.append(output.logits[0].float().numpy())
    return total / len(texts), np.stack(found)


def exported(run: Path) -> Any:
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification.from_pretrained(run / "export").eval()


def recipe_of(corpus: Path, **sections: Any) -> Recipe:
    return make_recipe(spec(corpus, **CLASSIFY, **sections), Storage(corpus.parent))


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_two_workers_under_any_stage_give_one_workers_losses_and_scores(runs: Path, zero: int) -> None:
    np.testing.assert_allclose(losses(runs / f"zero{zero}"), losses(runs / "one"), rtol=1e-5)
    for ours, theirs in zip(metrics(runs / f"zero{zero}"), metrics(runs / "one"), strict=True):
        assert ours.get("confusion") == theirs.get("confusion")
        for key in ("val_loss", "val_ece", *SCORES):
            assert (key in ours) == (key in theirs) and ours.get(key, 0) == pytest.approx(theirs.get(key, 0), rel=1e-5), key
        for name, found in theirs.get("val_by_source", {}).items():
            assert ours["val_by_source"][name] == {key: pytest.approx(value, rel=1e-5) for key, value in found.items()}, name
    assert all(key in ours for key in ("confusion", "val_loss", "val_ece", "val_by_source", *SCORES)), "of the last step"


@pytest.mark.parametrize("name", ["one", "weighted", "multiple"])
def test_the_first_losses_are_those_of_transformers_a_document_at_a_time(runs: Path, name: str) -> None:
    corpus = runs / ("many" if name == "multiple" else "labelled")
    recipe = recipe_of(corpus, **({"class_weights": "balanced"} if name == "weighted" else {}))
    weights = class_weights(recipe)
    assert (weights is not None) == (name == "weighted") and not recipe.marked and not recipe.mask_documents
    model = build_model(recipe.spec.model, model_config(recipe.spec.model, recipe.shape), recipe.spec.seed).eval()
    _, rows = Windows(corpus).order(0).locate(np.arange(recipe.global_sequences))
    first, step = metrics(runs / name)[:2]
    assert step["loss"] == pytest.approx(by_hand(model, documents(corpus, "train", rows), weights)[0], rel=1e-5)
    texts = documents(corpus, "val")
    assert first["val_loss"] == pytest.approx(by_hand(model, texts, weights)[0], rel=1e-5)
    for i, source in enumerate(("news", "mail") * (name != "multiple")):
        found = first["val_by_source"][f"labelled: {source}"]
        assert found["loss"] == pytest.approx(by_hand(model, texts[i::2], weights)[0], rel=1e-5), "as heavy as in val_loss"


@pytest.mark.parametrize("name", ["one", "zero3", "multiple", "bf16"])
def test_the_export_is_the_classifier_that_was_evaluated(runs: Path, name: str) -> None:
    from transformers import AutoTokenizer

    corpus = runs / ("many" if name == "multiple" else "labelled")
    model, last = exported(runs / name), [record for record in metrics(runs / name) if "val_loss" in record][-1]
    assert model.config.id2label == {0: "zero", 1: "one", 2: "two"} and model.config.label2id["two"] == 2
    assert AutoTokenizer.from_pretrained(runs / name / "export").pad_token_id == 0 == model.config.pad_token_id
    texts = documents(corpus, "val")
    loss, logits = by_hand(model, texts)
    assert loss == pytest.approx(last["val_loss"], rel=1e-2 if name == "bf16" else 1e-5)
    if name == "multiple":
        truth = np.stack([np.isin(range(3), labels) for _, labels in texts])
        assert last["accuracy"] == pytest.approx(((logits > 0) == truth).all(1).mean())
        assert np.sum(last["confusion"]["counts"]) == truth.size
    else:
        truth = np.array([labels[0] for _, labels in texts])
        assert last["accuracy"] == pytest.approx((logits.argmax(1) == truth).mean())
        assert np.sum(last["confusion"]["counts"], axis=1).tolist() == np.bincount(truth, minlength=3).tolist()
    assert set(SCORES) < set(last) and losses(runs / name)[-1] < losses(runs / name)[0]


def test_a_language_models_weights_are_taken_and_its_last_layer_is_new(runs: Path, corpus: Path) -> None:
    from transformers import AutoModelForCausalLM

    recipe = recipe_of(corpus, model={"from": str(runs / "base")})
    first, again = (build_model(recipe.spec.model, model_config(recipe.spec.model, recipe.shape), 0) for _ in range(2))
    other = build_model(recipe.spec.model, model_config(recipe.spec.model, recipe.shape), 1)
    base = dict(AutoModelForCausalLM.from_pretrained(runs / "base" / "export").named_parameters())
    for name, value in first.named_parameters():
        assert torch.equal(value, dict(again.named_parameters())[name])
        assert torch.equal(value, base[name]) if name != "score.weight" else not torch.equal(value, other.get_parameter(name)), name
    assert losses(runs / "tuned") != losses(runs / "one")
    further = recipe_of(corpus, model={"from": str(runs / "one")})
    model = build_model(further.spec.model, model_config(further.spec.model, further.shape), 3)
    assert torch.equal(model.get_parameter("score.weight"), exported(runs / "one").score.weight), "a classifier's is kept"


def test_a_killed_run_goes_on_bit_equal(runs: Path, corpus: Path, tmp_path: Path) -> None:
    run = {tmp_path / "zero3": spec(corpus, **CLASSIFY, **CASES["zero3"])}
    run_ranks(run, kill_before_step=6)
    assert not (tmp_path / "zero3" / "export").exists()
    run_ranks(run)
    assert losses(tmp_path / "zero3") == losses(runs / "zero3")
    assert windows_seen(tmp_path / "zero3") == windows_seen(runs / "zero3")
    ours, theirs = ((path / "zero3" / "export" / "model.safetensors").read_bytes() for path in (tmp_path, runs))
    assert ours == theirs


def test_balanced_weights_are_those_of_scikit_learn(corpus: Path, root: Path) -> None:
    weights = class_weights(recipe_of(corpus, class_weights="balanced"))
    truth = np.array([labels[0] for _, labels in documents(corpus, "train")])
    counts = np.bincount(truth, minlength=3)
    assert weights is not None and counts.min() < counts.max()
    np.testing.assert_allclose(weights, len(truth) / (3 * counts), rtol=1e-6)
    given = class_weights(recipe_of(corpus, class_weights={"two": 4.0}))
    assert given is not None and given.tolist() == [1, 1, 4]
    lacks = class_weights(recipe_of(make_labelled_corpus(root / "lacks", names=("zero", "one", "two", "three")), class_weights="balanced"))
    assert lacks is not None and lacks.tolist() == [*weights.tolist(), 1], "of a class that no document has"
    many = recipe_of(make_labelled_corpus(root / "everywhere", multiple=True), class_weights="balanced")
    manifest = root / "everywhere" / "manifest.json"
    data = json.loads(manifest.read_text())
    data["labels"]["train"]["one"] = data["splits"]["train"]["documents"]
    del data["hash"]
    manifest.write_text(json.dumps(data))
    everywhere = class_weights(many)
    assert everywhere is not None and everywhere[many.shape.labels.index("one")] == 1, "one that every document has is still learned"


def test_what_does_not_fit_is_refused(runs: Path, corpus: Path, tmp_path: Path) -> None:
    plain, other = make_corpus(tmp_path / "plain"), make_labelled_corpus(tmp_path / "other", multiple=True)

    def refused(given: Path, error: type[DistlmError], text: str, **sections: Any) -> None:
        with pytest.raises(error, match=text):
            make_recipe(spec(given, **{**CLASSIFY, **sections}), Storage(tmp_path))

    refused(plain, SpecError, r"objective: classify needs labels, and the documents of the corpus plain have none; prepare it with labels")
    refused(corpus, SpecError, r"class_weights.tow: the corpus labelled has no label 'tow'; did you mean two\?", class_weights={"tow": 2.0})
    mixture = TrainSpec.model_validate({**dump(spec(corpus, **CLASSIFY)), "corpus": [
        {"corpus": str(corpus), "weight": 1}, {"corpus": str(other), "weight": 1}]})
    with pytest.raises(SpecError, match="corpus: the labels of the corpus other are not those of labelled"):
        make_recipe(mixture, Storage(tmp_path))
    refused(corpus, SpecError, "model: no classifier can be built from it: .*mamba", model={"config": {"model_type": "mamba"}})
    for name, keys in (("adapter", {"adapter": {}}),
                       ("class_weights", {"objective": "pretrain", "class_weights": "balanced"}),
                       ("sharding.sequence_parallel", {"sharding": {"sequence_parallel": 2}, "scale": {"workers": 2}}),
                       ("batch.mask_documents", {"batch": {"global_sequences": 8, "mask_documents": True}}),
                       ("regularization.label_smoothing", {"regularization": {"label_smoothing": 0.1}})):
        base = {"kind": "train", "name": "c", "corpus": "c", "model": {"preset": "llama-tiny"}, "duration": {"steps": 1},
                "objective": "classify"}
        with pytest.raises(SpecError, match=f"^spec: {name}: "):
            load_spec({**base, **keys})


def test_a_classifier_of_other_labels_is_refused(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "one" / "export", tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["id2label"]["0"] = "none"
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="the checkpoint tells apart none, one, two, and the corpus zero, one, two; prepare the "
                                         r'corpus with labels.names: \["none", "one", "two"\], which leaves out documents with others, '):
        recipe_of(runs / "labelled", model={"from": str(tmp_path / "model")})
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "problem_type": "regression"}))
    with pytest.raises(InputError, match="it gives a text a number and tells no labels apart"):
        recipe_of(runs / "labelled", model={"from": str(tmp_path / "model")})
    for corpus, model, said in (("many", "one", "gives a text one label, and the corpus any number; prepare the corpus with "
                                 "labels.multiple: false"),
                                ("labelled", "multiple", "gives a text any number of labels, and the corpus one; prepare the corpus with "
                                 "labels.multiple: true")):
        with pytest.raises(InputError, match=said):
            recipe_of(runs / corpus, model={"from": str(runs / model / "export")})


@pytest.mark.parametrize("objective", ["pretrain", "sft"])
def test_a_classifier_is_no_language_model_to_start_from(tmp_path: Path, objective: str) -> None:
    corpus = make_corpus(tmp_path / "c") if objective == "pretrain" else make_packed_corpus(tmp_path / "c", conversations=True)
    model = make_classifier(tmp_path / "model")
    with pytest.raises(InputError, match="the checkpoint is a classifier of ham, spam, eggs, and predicts no tokens; name the language "
                                         "model that it was trained from, or set objective: classify") as caught:
        make_recipe(spec(corpus, objective=objective, model={"from": str(model)}), Storage(tmp_path))
    assert caught.value.where == f"model.from: {model}"


def test_a_mixture_of_corpora_with_labels_brings_each_its_own(corpus: Path, tmp_path: Path) -> None:
    second = make_labelled_corpus(tmp_path / "second", documents=(30, 9))
    given = TrainSpec.model_validate({**dump(spec(corpus, **CLASSIFY, class_weights="balanced")), "corpus": [
        {"corpus": str(corpus), "weight": 1}, {"corpus": str(second), "weight": 1}]})
    recipe = make_recipe(given, Storage(tmp_path))
    plan = recipe.plan()
    rows = np.concatenate([*ordered_steps(local_steps(plan, 0, 0), plan, 0, 0)])
    known = {tuple(tokens.tolist()): labels for one in (corpus, second) for tokens, labels in documents(one, "train")}
    found = [known[tuple(row[:np.flatnonzero(row[:-1] == 0)[0]].tolist())] == [row[-1]] for row in rows]
    assert all(found) and len(found) == recipe.num_samples
    weights = class_weights(recipe)
    truth = [labels[0] for one in (corpus, second) for _, labels in documents(one, "train")]
    assert weights is not None
    np.testing.assert_allclose(weights, len(truth) / (3 * np.bincount(truth, minlength=3)), rtol=1e-6)
