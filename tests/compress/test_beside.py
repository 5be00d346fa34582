"""A run that makes a smaller model, or mends one, stands beside what it began with: size, speed and the loss of the same windows."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from distlm import cluster, execute
from distlm.compress.beside import beside, measured, models_of, task_of
from distlm.compress.driver import lineage_of
from distlm.compress.worker import Sides
from distlm.errors import ClusterError
from distlm.runs import RunFolder
from distlm.runs.report import write_report
from distlm.runs.sides import lines
from distlm.spec import TrainSpec, load_spec
from distlm.storage import Storage, read_json
from distlm.train.recipe import make_recipe
from tests.compress.made import compressed
from tests.corpus.made import Doc, make
from tests.evaluate.models import evaluated, make_model
from tests.evaluate.test_evaluate import spec as evaluation
from tests.records import Records

MEASURED = ("parameters", "bytes", "memory_bytes", "decode_1", "decode_8", "prefill")


def given(root: Path, **keys: Any) -> dict[str, Any]:
    return {"kind": "train", "name": "r", "corpus": str(root / "corpora" / "text"), "precision": "fp32", "duration": {"steps": 3},
            "batch": {"global_sequences": 2}, "optimizer": {"lr": 0.01}, "evaluate": {"max_windows": 9}, "scale": {"threads_per_worker": 1},
            **keys}


def spec(root: Path, **keys: Any) -> TrainSpec:
    loaded = load_spec(given(root, **keys)).spec
    assert isinstance(loaded, TrainSpec)
    return loaded


def pruned(root: Path, folder: Path, whole: Path) -> Path:
    """A compress job's export."""
    compressed(root, "magnitude", folder / "export", lineage_of(whole, RunFolder(folder)), model=str(whole))
    return folder / "export"


@pytest.mark.slow
def test_a_student_that_is_mended_by_its_teacher_stands_beside_both(root: Path) -> None:
    storage, whole = Storage(root), root / "runs" / "m" / "export"
    small = {"kind": "compress", "name": "fewer", "model": "m", "method": "structured", "channels": 0.5, "corpus": "text", "threads": 1}
    shown = Records()
    with cluster.connect(root / "driver.log", storage=storage):
        execute.run(small, storage=storage, progress=Records())
        made = execute.run(given(root, name="taught", model={"from": "fewer"}, objective="distill", distill={"teacher": "m"}),
                           storage=storage, progress=shown)
    sides, folder = made["sides"], RunFolder(storage.run("taught"))
    folders = {"teacher": whole, "pruned": storage.folder("compress", "fewer") / "export", "student": folder.path / "export"}
    assert folder.read_result() == made and [*sides] == [*folders]
    for name, side in sides.items():
        found = evaluated(evaluation(root, "corpora/text", str(folders[name]), windows=9, batch_windows=2), storage)
        assert side["model"] == str(folders[name]) and side["loss"] == found["loss"] and side["tokens"] == found["tokens"] == 9 * 16
        assert all(side[key] > 0 for key in MEASURED)
    assert sides["student"]["loss"] == pytest.approx(made["val_loss"], rel=1e-5), "of the windows that the run evaluates"
    assert len({side["loss"] for side in sides.values()}) == 3
    assert sides["student"]["parameters"] == sides["pruned"]["parameters"] == made["parameters"] < sides["teacher"]["parameters"]
    page = (folder.path / "report.html").read_text()
    assert "<th>teacher</th><th>pruned</th><th>student</th><th>student / teacher</th>" in page
    assert "over the same 144 tokens" in page and all(f"<td>{side['loss']:.4f}</td>" in page for side in sides.values())
    rows = dict(next(record for record in shown.records if record["distlm"] == "table")["rows"])
    assert rows["teacher -> pruned -> student: bytes on disk"].startswith(f"{sides['teacher']['bytes']:,} -> ")


def test_what_a_run_began_with_is_looked_up_in_what_it_was_trained_from(root: Path, tmp_path: Path) -> None:
    whole = shutil.copytree(root / "runs" / "m" / "export", tmp_path / "whole")
    half, folder, storage = pruned(root, tmp_path / "half", whole), RunFolder(tmp_path / "r"), Storage(tmp_path)
    export = folder.path / "export"

    def models(**keys: Any) -> dict[str, Path]:
        return models_of(make_recipe(spec(root, **keys), storage), folder)

    taught = {"objective": "distill", "distill": {"teacher": str(whole)}}
    mended = {"whole": whole, "pruned": half, "recovered": export}
    assert models(model={"from": str(half)}) == models(model={"from": str(half)}, keep_zeros=True) == mended
    assert models(model={"from": str(whole)}, keep_zeros=True) == {"pruned": whole, "recovered": export}, "another tool's zeros"
    assert models(model={"from": str(half)}, **taught) == {"teacher": whole, "pruned": half, "student": export}
    assert models(model={"from": str(whole)}, **taught) == {"teacher": whole, "student": export}
    assert models(model={"from": str(whole)}) == {"recovered": export}, "nothing was pruned"
    (whole / "distlm.json").unlink()
    assert models(model={"from": str(pruned(root, tmp_path / "plain", whole))})["whole"] == whole, "a folder that says nothing of itself"
    weights = whole / "model.safetensors"
    before = weights.read_bytes()
    weights.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    assert models(model={"from": str(half)}) == {"pruned": half, "recovered": export}, "another model lies there now"
    weights.write_bytes(before)
    assert models(model={"from": str(half)}) == mended
    told = read_json(half / "distlm.json")
    for parent in (None, "m", ["m"], {}, {"model": None}, {"model": 3, "weights_hash": 3}, {"model": str(whole)}):
        (half / "distlm.json").write_text(json.dumps({**told, "parent": parent}))
        assert models(model={"from": str(half)}) == {"pruned": half, "recovered": export}, parent
    (half / "distlm.json").write_text("[]")
    assert models(model={"from": str(half)}) == {"recovered": export}


def test_a_run_that_compresses_nothing_stands_beside_nothing_and_what_cannot_be_measured_fails_nothing(root: Path, tmp_path: Path) -> None:
    storage, folder, shown = Storage(tmp_path), RunFolder.create(tmp_path / "r", "", {}), Records()
    model = {"from": str(root / "runs" / "m" / "export")}
    assert beside(spec(root, model=model), folder, storage, shown) == {} and not shown.notes
    taught = spec(root, model=model, objective="distill", distill={"teacher": str(tmp_path / "gone")})
    assert beside(taught, folder, storage, shown) == {}
    [told] = shown.notes
    assert told.startswith("the run is not measured beside what it began with: distill.teacher: there is no run and no folder")
    assert folder.events()[-1]["message"] == told and folder.events()[-1]["cause"] == "bad_input"


@pytest.mark.slow
def test_a_worker_that_dies_a_failure_and_an_interruption_leave_a_run_that_has_ended_well(
        root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Dies(Sides):
        def add(self, side: str, folder: Path) -> None:
            (tmp_path / "fired").touch()
            os._exit(1)

    class Full(Sides):
        def add(self, side: str, folder: Path) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory")

    storage, at = Storage(root), "distlm.compress.beside"
    keys: dict[str, Any] = {"model": {"from": "m"}, "objective": "distill", "distill": {"teacher": "m"}}
    taught = spec(root, **{**keys, "model": {"from": str(root / "runs" / "m" / "export")},
                           "distill": {"teacher": str(root / "runs" / "m" / "export")}})

    def told(measures: str, by: Any, cause: str) -> str:
        folder, shown = RunFolder.create(tmp_path / by.__name__, "", {}), Records()
        shutil.copytree(root / "runs" / "m" / "export", folder.path / "export")
        with monkeypatch.context() as patch:
            patch.setattr(f"{at}.{measures}", by)
            assert beside(taught, folder, storage, shown) == {}
        last = folder.events()[-1]
        assert (last["state"], last["cause"], last["message"]) == ("note", cause, shown.notes[-1])
        return shown.notes[-1]

    def fails(*_: Any) -> None:
        raise ZeroDivisionError("by nothing")

    def interrupted(recipe: Any, models: Any, storage: Storage, folder: RunFolder, progress: Any) -> None:
        assert folder.state()[0] == "running" and folder.read_result()["export"] == str(folder.path / "export")
        raise KeyboardInterrupt

    assert told("measured", fails, "internal").endswith("began with: ZeroDivisionError: by nothing")
    with cluster.connect(tmp_path / "driver.log", storage=storage):
        assert "ended unexpectedly; its log is" in told("Sides", Dies, "worker_died") and (tmp_path / "fired").exists()
        assert told("Sides", Full, "oom").endswith("; one worker holds all of them: `kind: evaluate` measures each alone, or lower "
                                                   "batch.micro_sequences")
        wide = spec(root, **keys, scale={"cpus_per_worker": 999})
        models = {"student": root / "runs" / "m" / "export"}
        with pytest.raises(ClusterError, match="the worker that measures needs 999 CPUs"):
            measured(make_recipe(wide, storage), models, storage, RunFolder(tmp_path), Records())
        monkeypatch.setattr(f"{at}.measured", interrupted)
        made = execute.run(given(root, name="alone", **keys), storage=storage, progress=Records())
        with pytest.raises(KeyboardInterrupt):             # whose pipeline does not go on
            execute.run_loaded(load_spec(given(root, name="step", **keys)), storage, Records(), hold=False)
    for name in ("alone", "step"):
        folder = RunFolder(storage.run(name))
        assert folder.state() == ("succeeded", "completed") and folder.read_result()["export"] and "sides" not in folder.read_result()
        [note] = [event for event in folder.events() if event["cause"] == "user"]
        assert note["state"] == "note" and note["message"].endswith("began with: interrupted")
    assert RunFolder(storage.run("alone")).read_result() == made


def test_of_a_mixture_the_windows_are_those_that_the_run_evaluates(root: Path, tmp_path: Path) -> None:
    other = make(tmp_path / "other", [Doc("train " * 20), Doc("validation " * 30, split="val")])
    mix = [{"corpus": str(root / "corpora" / "text"), "weight": 3}, {"corpus": str(other), "weight": 1}]
    model = root / "runs" / "m" / "export"
    recipe = make_recipe(spec(root, corpus=mix, model={"from": str(model)}, evaluate={"max_windows": 12}), Storage(tmp_path))
    task = task_of(recipe, model, Storage(tmp_path))
    assert task.batch_windows == recipe.micro_sequences == 2
    assert [(part.corpus, part.windows) for part in task.parts] == [(one["corpus"], count) for one, count in zip(mix, (9, 3), strict=True)]


def test_without_validation_windows_no_loss_is_known_and_the_page_says_so(root: Path, tmp_path: Path) -> None:
    corpus = make(tmp_path / "c", [Doc("train " * 20)])
    models = [make_model(tmp_path / name, corpus, hidden_size=size) for name, size in (("large", 64), ("small", 32))]
    recipe = make_recipe(spec(root, corpus=str(corpus), evaluate={}, model={"from": str(models[1])}), Storage(tmp_path))
    worker = Sides(task_of(recipe, models[1], Storage(tmp_path)), "cpu", "fp32", 1)
    for model in models:
        worker.add(model.name, model)
    sides = worker.measure(rounds=1)
    folder = RunFolder.create(tmp_path / "r", "", {})
    folder.metrics({"step": 1, "loss": 4.0})
    page = write_report(folder, sides).read_text()
    assert "There are no validation windows, so no loss is known." in page and "<td>loss</td><td>–</td><td>–</td><td>–</td>" in page
    assert dict(lines(sides))["loss"] == "– -> –, x –" and sides["small"]["parameters"] < sides["large"]["parameters"]
    assert "Side by side" not in write_report(folder).read_text()
