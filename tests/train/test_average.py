"""What is exported is the average that the spec asks for, and what is evaluated is what is exported."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from distlm.corpus.stream import Windows
from distlm.errors import SpecError
from distlm.model.build import build_model, model_config
from distlm.runs import RunFolder
from distlm.runs.report import matrices
from distlm.storage import Storage
from distlm.train.driver import outcome
from distlm.train.recipe import make_recipe
from distlm.train.scores import single_label
from tests.train.ranks import make_corpus, make_labelled_corpus, metrics, run_ranks, spec
from tests.train.test_classify import by_hand, documents, exported

STEPS = 4


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs that keep a checkpoint of every step, so that averages can be made by hand."""
    root = tmp_path_factory.mktemp("average")
    corpus = make_corpus(root / "c")
    run_ranks({root / "ema": _spec(corpus, ema={"decay": 0.3}), root / "mean": _spec(corpus, average=3), root / "plain": _spec(corpus)})
    return root


def _spec(corpus: Path, average: int = 1, **sections: Any) -> Any:
    return spec(corpus, duration={"steps": STEPS}, schedule={"name": "constant"}, evaluate={"every_steps": STEPS},
                checkpoint={"every_steps": 1, "keep": STEPS, "average": average}, **sections)


def weights(run: Path, step: int) -> dict[str, torch.Tensor]:
    file = run / "checkpoints" / f"step-{step:06d}" / "state" / "mp_rank_00_model_states.pt"
    return {name.removeprefix("model."): value for name, value in torch.load(file, weights_only=False)["module"].items()}


def val_loss(run: Path) -> float:
    """By transformers alone."""
    from transformers import AutoModelForCausalLM

    tokens = torch.from_numpy(Windows(run.parent / "c", "val").head(7).astype(np.int64))
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(run / "export")(input_ids=tokens[:, :-1]).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).item()


def test_averages_are_those_made_by_hand(root: Path) -> None:
    recipe = make_recipe(_spec(root / "c"), Storage(root))
    first = build_model(recipe.spec.model, model_config(recipe.spec.model, recipe.shape), 0)
    ema = {name: p.detach().clone() for name, p in first.named_parameters()}
    for step in range(1, STEPS + 1):
        decay, now = min(0.3, (1 + step) / (10 + step)), weights(root / "ema", step)
        ema = {name: decay * value + (1 - decay) * now[name] for name, value in ema.items()}
    last = [weights(root / "mean", step) for step in (2, 3, 4)]
    mean = {name: sum(one[name] for one in last) / 3 for name in ema}
    for run, expected in (("ema", ema), ("mean", mean), ("plain", weights(root / "plain", STEPS))):
        exported = load_file(root / run / "export" / "model.safetensors")
        for name, value in exported.items():
            torch.testing.assert_close(value, expected[name], msg=f"{run}: {name}")


def test_training_is_the_same_with_an_average(root: Path) -> None:
    of = [[record["loss"] for record in metrics(root / run) if "loss" in record] for run in ("ema", "mean", "plain")]
    assert of[0] == of[1] == of[2]


def test_what_is_evaluated_is_what_is_exported(root: Path) -> None:
    lineage = {run: json.loads((root / run / "export" / "distlm.json").read_text()) for run in ("ema", "mean", "plain")}
    for run, told in lineage.items():
        assert told["val_loss"] == pytest.approx(val_loss(root / run), rel=1e-5), run
    assert metrics(root / "ema")[-1]["val_loss"] == lineage["ema"]["val_loss"] != metrics(root / "plain")[-1]["val_loss"]
    *_, step, mean = metrics(root / "mean")
    assert step["val_loss"] == metrics(root / "plain")[-1]["val_loss"] != lineage["mean"]["val_loss"] == mean["val_loss"]
    assert mean["step"] == STEPS and mean["averaged"] == lineage["mean"]["averaged"] and mean["val_ece"] != step["val_ece"]
    assert lineage["mean"]["averaged"] == ["step-000002", "step-000003", "step-000004"] and "averaged" not in lineage["plain"]


def test_all_that_a_run_tells_of_an_averaged_classifier_is_of_what_is_exported(tmp_path: Path) -> None:
    corpus = make_labelled_corpus(tmp_path / "c")
    given = _spec(corpus, 3, objective="classify", optimizer={"lr": 0.2}, batch={"global_sequences": 12, "micro_sequences": 6})
    run_ranks({tmp_path / "run": given})
    *_, step, mean = metrics(tmp_path / "run")
    texts, truth = documents(corpus, "val"), np.array([labels[0] for _, labels in documents(corpus, "val")])
    loss, logits = by_hand(exported(tmp_path / "run"), texts)
    made = outcome(make_recipe(given, Storage(tmp_path)), RunFolder(tmp_path / "run"))
    wanted = {"val_loss": pytest.approx(loss, rel=1e-5), **single_label(truth, logits, ("zero", "one", "two"))}
    confusion = wanted.pop("confusion")
    assert mean["confusion"] == confusion != step["confusion"], "the last step's is another"
    for key, value in wanted.items():
        assert mean[key] == made[key] == value if key == "val_loss" else mean[key] == made[key] == pytest.approx(value, abs=1e-6), key
    assert json.loads((tmp_path / "run" / "export" / "distlm.json").read_text())["val_loss"] == mean["val_loss"]
    table = matrices(metrics(tmp_path / "run"))[0]
    assert [[count for count, _ in cells] for _, cells in table.rows] == confusion["counts"]


def test_that_fewer_are_left_than_are_averaged_is_noted(root: Path, tmp_path: Path) -> None:
    assert not RunFolder(root / "mean").events()
    run = Path(shutil.copytree(root / "mean", tmp_path / "run"))
    shutil.rmtree(run / "export")
    shutil.rmtree(run / "checkpoints" / "step-000003")
    (run / "checkpoints" / "step-000001" / "COMMITTED").unlink()
    again = Path(shutil.copytree(root / "mean", tmp_path / "again"))
    shutil.rmtree(again / "export")
    run_ranks(dict.fromkeys((run, again), _spec(root / "c", average=3)))
    assert metrics(again) == metrics(root / "mean"), "a mean that was told is not told twice"
    assert [event["message"] for event in RunFolder(run).events()] == [
        "the export is the mean of 2 checkpoints and not of 3: no more are left"]
    assert json.loads((run / "export" / "distlm.json").read_text())["averaged"] == ["step-000002", "step-000004"]


def test_more_checkpoints_than_a_run_saves_cannot_be_averaged(root: Path) -> None:
    few = spec(root / "c", duration={"steps": 5}, checkpoint={"every_steps": 3, "keep": 3, "average": 3})
    with pytest.raises(SpecError, match=r"checkpoint.average: 3 checkpoints are averaged, and 5 steps save 2; set it to 2"):
        make_recipe(few, Storage(root))
