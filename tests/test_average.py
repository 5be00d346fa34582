"""Several runs as one model: the mean that the paper's recipes make, measured as it is exported, and what has no mean."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from distlm import execute, plan, reads, summary
from distlm.average import driver
from distlm.average.weights import write_mean
from distlm.errors import InputError, SpecError
from distlm.evaluate.kinds import kind_of
from distlm.evaluate.worker import Worker
from distlm.model.adapter import base_hash
from distlm.model.reading import recorded_reading
from distlm.runs import RunFolder
from distlm.spec import AverageSpec
from distlm.storage import Storage, read_json, write_json
from distlm.train.scores import SCORES
from tests.evaluate.models import evaluated, sums_of
from tests.records import Records
from tests.train.ranks import make_corpus, make_labelled_corpus, run_ranks, spec
from tests.train.test_classify import by_hand, documents, exported


class Here:
    """Workers that score in this process."""

    def __init__(self, spec: Any, task: Any, folder: Any, progress: Any) -> None:
        self.task = task

    def __enter__(self) -> "Here":
        return self

    def __exit__(self, *_: object) -> None: ...

    def score(self, model: Path) -> Any:
        worker = Worker(self.task, "cpu", "fp32", None)
        worker.load(model)
        return [kind_of(self.task).measure(worker)(batch) for batch in range(len(self.task.batches))]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus, and runs near each other: a and b on two sides of a trained run, so that its loss is lower than theirs, and one far off."""
    root = tmp_path_factory.mktemp("average")
    corpus = make_corpus(root / "corpora" / "c")
    run_ranks({root / "base": spec(corpus, duration={"steps": 60}, evaluate={}, checkpoint={})})
    base = load_file(root / "base" / "export" / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    noise = {name: torch.randn(value.shape, generator=generator) for name, value in base.items()}
    for name, scale in (("a", 0.1), ("b", -0.11), ("far", 3.0)):
        export = root / "runs" / name / "export"
        shutil.copytree(root / "base" / "export", export)
        save_file({key: value + scale * noise[key] for key, value in base.items()}, export / "model.safetensors", {"format": "pt"})
    return root


def averaged(root: Path, monkeypatch: pytest.MonkeyPatch, **keys: Any) -> tuple[dict[str, Any], RunFolder]:
    monkeypatch.setattr(driver, "Workers", Here)
    given = AverageSpec.model_validate({"name": "soup", "models": ["far", "a", "b"], "corpus": "c", **keys})
    folder = RunFolder.create(root / "runs" / given.name, "kind: average\n", {"kind": "average"})
    return driver.average(given, folder, Storage(root), Records()), folder


def loss_of(root: Path, model: Path) -> float:
    given = AverageSpec.model_validate({"name": "e", "models": ["a", "b"], "corpus": str(root / "corpora" / "c")}).scoring(str(model))
    total = np.sum(sums_of(given, Storage(root))[1], axis=(0, 1))
    return float(total[1] / total[0])


def weights(root: Path, *names: str) -> dict[str, torch.Tensor]:
    found = [load_file(root / "runs" / name / "export" / "model.safetensors") for name in names]
    return {key: sum((one[key] for one in found[1:]), found[0][key]) / len(found) for key in found[0]}


def test_greedy_keeps_what_lowers_the_loss_and_uniform_takes_all(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = {name: loss_of(root, root / "runs" / name / "export") for name in ("a", "b", "far")}
    assert alone["far"] > max(alone["a"], alone["b"])
    made, folder = averaged(root, monkeypatch, name="greedy")
    first, second = sorted(("a", "b"), key=lambda name: alone[name])
    assert [one["model"] for one in made["models"]] == [first, second, "far"]
    assert [one["taken"] for one in made["models"]] == [True, True, False] and made["averaged"] == 2
    assert [one["loss"] for one in made["models"]] == pytest.approx([alone[first], alone[second], alone["far"]], rel=1e-6)
    assert made["loss"] < made["best_loss"] == made["models"][0]["loss"] and made["models"][2]["with"] > made["loss"]
    ours, wanted = load_file(folder.path / "export" / "model.safetensors"), weights(root, first, second)
    assert all(torch.equal(ours[key], wanted[key]) for key in {**ours, **wanted})
    assert made["loss"] == pytest.approx(loss_of(root, folder.path / "export"), rel=1e-9), "what was measured is what is exported"
    assert not (folder.path / "candidate").exists()

    told = read_json(folder.path / "export" / "distlm.json")
    assert told["averaged"] == {str(root / "runs" / name / "export"): base_hash(str(root / "runs" / name / "export"))
                                for name in (first, second)} and told["val_loss"] == made["loss"]
    assert reads.missing("average", made) == ""
    rows = dict(summary.of_average(made))
    assert rows["averaged"] == "2 of 3 models, greedy" and rows["far"] == f"loss {alone['far']:.4f}, left out"
    page = (folder.path / "report.html").read_text()
    assert f"{made['loss']:.4f}" in page and f"{alone['far']:.4f}" in page and "<script" not in page

    every, whole = averaged(root, monkeypatch, name="uniform", method="uniform")
    ours, wanted = load_file(whole.path / "export" / "model.safetensors"), weights(root, first, second, "far")
    assert all(torch.equal(ours[key], wanted[key]) for key in ours) and every["averaged"] == 3 and every["loss"] > made["loss"]


@pytest.mark.parametrize("multiple", [False, True])
def test_classifiers_have_a_mean_whose_scores_are_those_of_an_evaluation(multiple: bool, tmp_path: Path,
                                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = make_labelled_corpus(tmp_path / "corpora" / "c", multiple=multiple)
    run_ranks({tmp_path / "runs" / name: spec(corpus, objective="classify", duration={"steps": 8}, evaluate={}, checkpoint={},
                                              optimizer={"lr": lr}) for name, lr in (("a", 0.005), ("b", 0.01), ("far", 0.2))})
    alone = {name: by_hand(exported(tmp_path / "runs" / name), documents(corpus, "val"))[0] for name in ("a", "b", "far")}
    for name, cut in (("a", 12), ("b", 16), ("far", 16)):
        told = tmp_path / "runs" / name / "export" / "distlm.json"
        write_json(told, {**read_json(told), "clean": {"unicode": "NFC", "redact": ["email"]}, "cut_tokens": cut})
    made = {}
    for method in ("uniform", "greedy"):
        made[method], folder = averaged(tmp_path, monkeypatch, name=method, method=method)
        reading = recorded_reading(folder.path / "export")
        assert reading.clean and (reading.clean.unicode, reading.clean.redact) == ("NFC", ("email",))
        assert reading.cut_tokens == 12 + 4 * (method == "greedy" and not any(
            one["taken"] for one in made[method]["models"] if one["model"] == "a"))
        given = AverageSpec.model_validate({"name": "e", "models": ["a", "b"], "corpus": "c"}).scoring(str(folder.path / "export"))
        theirs = evaluated(given, Storage(tmp_path))
        assert {name: made[method][name] for name in ("loss", *SCORES, "ece", "documents", "labels")} == {
            name: theirs[name] for name in ("loss", *SCORES, "ece", "documents", "labels")}
        assert made[method]["loss"] == pytest.approx(by_hand(exported(folder.path), documents(corpus, "val"))[0], rel=1e-5)
        assert [one["model"] for one in made[method]["models"]] == sorted(alone, key=lambda name: alone[name])
        assert f"{theirs['f1_macro']:.4f}" in (folder.path / "report.html").read_text()
        assert dict(summary.of_average(made[method]))["macro F1"] == f"{theirs['f1_macro']:.4f}"
    ours, wanted = load_file(tmp_path / "runs" / "uniform" / "export" / "model.safetensors"), weights(tmp_path, *(
        one["model"] for one in made["uniform"]["models"]))
    assert "score.weight" in ours and all(torch.equal(ours[key], wanted[key]) for key in ours)
    assert made["greedy"]["loss"] <= made["greedy"]["best_loss"] == pytest.approx(min(alone.values()), rel=1e-5)
    run_ranks({tmp_path / "runs" / "language": spec(corpus, duration={"steps": 1}, schedule={}, evaluate={}, checkpoint={})})
    other = AverageSpec.model_validate({"name": "s", "models": ["a", "language"], "corpus": "c"})
    with pytest.raises(InputError, match=r"models\.1: .*: its architectures is \['LlamaForCausalLM'\], and that of"):
        execute.inputs(other, Storage(tmp_path))


def test_the_mean_of_a_model_with_itself_is_the_model_in_any_layout_of_files(root: Path, tmp_path: Path) -> None:
    source = root / "runs" / "a" / "export"
    whole = load_file(source / "model.safetensors")
    parts = tmp_path / "parts"
    parts.mkdir()
    for name in ("config.json", "tokenizer.json"):
        (parts / name).write_bytes((source / name).read_bytes())
    names = sorted(whole)
    for i, some in enumerate((names[:3], names[3:])):
        save_file({name: whole[name] for name in some}, parts / f"model-{i}.safetensors", {"format": "pt"})
    write_json(parts / "model.safetensors.index.json", {"weight_map": {name: f"model-{int(i >= 3)}.safetensors" for i, name in
                                                                       enumerate(names)}})
    write_mean([parts, source], tmp_path / "one", {"run": "x"})
    write_mean([source, parts], tmp_path / "two", {})
    found = {name: value for i in range(2) for name, value in load_file(tmp_path / "one" / f"model-{i}.safetensors").items()}
    assert all(torch.equal(found[name], whole[name]) for name in whole)
    assert all(torch.equal(value, whole[name]) for name, value in load_file(tmp_path / "two" / "model.safetensors").items())
    half = tmp_path / "half"
    write_mean([source, source], half, {})
    save_file({name: value.bfloat16() for name, value in whole.items()}, half / "model.safetensors", {"format": "pt"})
    write_mean([half, half], tmp_path / "three", {})
    assert {value.dtype for value in load_file(tmp_path / "three" / "model.safetensors").values()} == {torch.bfloat16}


def test_what_has_no_mean_is_refused_in_one_line_before_any_work(root: Path, tmp_path: Path) -> None:
    storage = Storage(root)

    def copied(name: str, **settings: Any) -> Path:
        shutil.copytree(root / "runs" / "a" / "export", tmp_path / name)
        write_json(tmp_path / name / "config.json", {**read_json(tmp_path / name / "config.json"), **settings})
        return tmp_path / name

    wide, other = copied("wide", intermediate_size=65), copied("other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["another"] = len(tokenizer["model"]["vocab"])
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    lacks = copied("lacks")
    held = load_file(lacks / "model.safetensors")
    held.pop("model.norm.weight")
    save_file(held, lacks / "model.safetensors", {"format": "pt"})
    dropout = copied("dropout", attention_dropout=0.5)

    def refused(*models: Any) -> str:
        given = AverageSpec.model_validate({"name": "s", "models": ["a", *map(str, models)], "corpus": "c"})
        with pytest.raises(InputError) as error:
            execute.inputs(given, storage)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert f"models.1: {wide}: its intermediate_size is 65, and that of" in refused(wide)
    assert f"models.2: {other}: its tokenizer is not that of" in refused("b", other)
    assert "its weights model.norm.weight are not there, and in" in refused(lacks)
    assert "it is a again; give it once" in refused(root / "runs" / "a")
    (tmp_path / "link").symlink_to(root / "runs" / "b" / "export")
    assert "it is b again; give it once" in refused("b", tmp_path / "link")
    over = AverageSpec.model_validate({"name": "a", "models": ["b", "a"], "corpus": "c"})
    with pytest.raises(InputError, match=r"models\.1: .*/runs/a/export: the average would be written over it; take another name"):
        execute.inputs(over, storage)
    assert "did you mean far?" in refused("farr")
    for keys, what in (({"models": ["a"]}, "must have 2 entries at least"), ({"models": ["a", "a"]}, "a is there twice")):
        with pytest.raises(SpecError, match=what):
            execute.resolve({"kind": "average", "name": "s", "corpus": "c", "models": ["a", "b"], **keys})
    given = AverageSpec.model_validate({"name": "s", "models": ["a", str(dropout)], "corpus": "c"})
    assert list(execute.inputs(given, storage)["models"]) == [str(root / "runs" / "a" / "export"), str(dropout)]
    rows = dict(plan.needs(execute.resolve({"kind": "average", "name": "s", "models": ["a", "b", "far"], "corpus": "c"}), storage))
    assert rows["measured"] == "5 times, each model and each mean" and rows["models"] == "3, greedy"
