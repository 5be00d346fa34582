"""A worker of its own measures of a checkpoint what those that train measure of it, and no step waits for it."""

import contextlib
import json
import math
import multiprocessing
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import psutil
import pytest
import ray

from distlm.autoscale import total, train_bundles
from distlm.errors import SpecError
from distlm.model.build import build_model, model_config
from distlm.model.export import export_model
from distlm.runs import RunFolder
from distlm.spec import TrainSpec
from distlm.spec.load import load_spec
from distlm.storage import Storage, write_json
from distlm.train import checkpoint
from distlm.train.checkpoint import checkpoint_path
from distlm.train.driver import train
from distlm.train.recipe import make_recipe
from distlm.train.validation import FOLDER, arrived, due, settle
from tests.records import Records
from tests.train.ranks import losses, make_corpus, make_labelled_corpus, metrics, run_ranks, spec
from tests.train.test_dpo import make_pairs
from tests.train.test_driver import make_run, wait_for

STEPS, EVERY = 6, 2
ZERO_1 = {"sharding": {"zero": 1}}
CASES: dict[str, dict[str, Any]] = {
    "zero-0": {}, "zero-1": ZERO_1, "zero-2-ema": {"sharding": {"zero": 2}, "ema": {"decay": 0.5}}, "zero-3": {"sharding": {"zero": 3}},
    "bf16": {"precision": "bf16"}, "bf16-zero-2": {"precision": "bf16", "sharding": {"zero": 2}},
    "bf16-zero-3": {"precision": "bf16", "sharding": {"zero": 3}},
    "muon": {"optimizer": {"name": "muon", "lr": 0.01, "clip": 0}, "sharding": {"zero": 2}},
    "sequence": {"sharding": {"zero": 1, "sequence_parallel": 2}}, "labels": {"corpus": "l", "objective": "classify", **ZERO_1},
    "adapter": {"model": {"from": "base"}, "adapter": {"rank": 4}, "sharding": {"zero": 2}},
    "preferences": {"corpus": "p", "model": {"from": "base"}, "objective": "dpo", **ZERO_1}}
"""Runs of two workers."""


def case(root: Path, **sections: Any) -> TrainSpec:
    corpus = root / sections.pop("corpus", "c")
    if source := sections.get("model", {}).get("from"):
        sections["model"] = {"from": str(root / source)}
    return spec(corpus, **{"duration": {"steps": STEPS}, "evaluate": {"every_steps": EVERY}, "scale": {"workers": 2},
                           "checkpoint": {"every_steps": EVERY, "keep": 3}, **sections})


def beside(given: TrainSpec) -> TrainSpec:
    """The same with a worker that evaluates."""
    return TrainSpec.model_validate({**given.model_dump(by_alias=True), "evaluate": {"every_steps": EVERY, "worker": {}}})


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs that evaluate between their steps, and keep what they evaluate."""
    root = tmp_path_factory.mktemp("validation")
    make_corpus(root / "c")
    make_labelled_corpus(root / "l")
    make_pairs(root / "p")
    given = spec(root / "c")
    config = model_config(given.model, make_recipe(given, Storage(root)).shape)
    export_model(build_model(given.model, config, 3), None, root / "c" / "tokenizer", root / "base", {})
    run_ranks({root / name: case(root, **sections) for name, sections in CASES.items()})
    run_ranks({root / "tensor": case(root, sharding={"zero": 1, "tensor_parallel": 2})})
    return root


def measure(root: Path, specs: dict[str, dict[str, Any]]) -> None:
    """In a process of its own: what Validator has of all checkpoints of all runs goes to a file."""
    from torch import distributed

    from distlm.train.validation import Validator

    found: dict[str, Any] = {}
    for name, given in specs.items():
        recipe = make_recipe(TrainSpec.model_validate(given), Storage(root))
        worker = Validator(recipe, root / name, root / "log")
        found[name] = {str(step): worker.measure(checkpoint_path(root / name, step)) for step in range(EVERY, STEPS + 1, EVERY)}
        distributed.destroy_process_group()
    write_json(root / "found.json", found)


def test_a_worker_measures_what_those_that_train_do(root: Path) -> None:
    specs = {name: beside(case(root, **sections)) for name, sections in {**CASES, "tensor": {}}.items()}
    process = multiprocessing.get_context("spawn").Process(target=measure, args=(root, {
        name: one.model_dump(by_alias=True) for name, one in specs.items()}))
    process.start()
    process.join()
    assert process.exitcode == 0, (root / "log").read_text()
    for name, by_step in json.loads((root / "found.json").read_text()).items():
        expected = {record["step"]: record for record in metrics(root / name) if "val_loss" in record}
        for step, found in by_step.items():
            theirs = expected[int(step)]
            assert found.pop("evaluation_s") > 0
            assert found.keys() <= theirs.keys() and "val_loss" in found
            assert found["val_loss"] == pytest.approx(theirs["val_loss"], rel=1e-4 if "bf16" in name else 1e-6), (name, step)
            for key in ("val_accuracy", "val_bits_per_byte", "val_ece", "accuracy", "f1_macro", "val_reward_margin"):
                if key in theirs:
                    assert found[key] == pytest.approx(theirs[key], rel=1e-2 if "bf16" in name else 1e-5), (name, step, key)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init(num_cpus=6, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def validators() -> list[psutil.Process]:
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):            # it may end while it is looked at
            if "ray::Validator" in " ".join(process.cmdline()):
                found.append(process)
    return found


def test_ranks_record_what_has_come_and_evaluate_at_the_ends_alone(root: Path, tmp_path: Path) -> None:
    run, given = tmp_path / "run", beside(case(root))
    write_json(run / FOLDER / "step-000000.json", {"step": 0, "val_loss": 9.0, "val_by_source": {"c": {"loss": 9.0}}})
    run_ranks({run: given})
    found = [(record["step"], record["val_loss"]) for record in metrics(run) if "val_loss" in record]
    assert [step for step, _ in found] == [0, 0, STEPS] and found[1][1] == 9.0 and not [*(run / FOLDER).iterdir()]
    assert losses(run) == losses(root / "zero-0"), "to the bit"
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(run / "tensorboard")).Reload()
    assert 9.0 in [event.value for event in board.Scalars("loss/val")]


def test_what_a_driver_left_unmeasured_is_measured_when_the_run_is_taken_up_again(cluster: None, root: Path, tmp_path: Path) -> None:
    folder, given = RunFolder(tmp_path / "run"), beside(case(root))
    shutil.copytree(root / "zero-0", folder.path)
    expected = {record["step"]: record["val_loss"] for record in metrics(folder.path) if "val_loss" in record}
    lines = [{key: value for key, value in record.items() if not key.startswith("val_") or record["step"] in (0, STEPS)}
             for record in metrics(folder.path)]
    (folder.path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    progress = Records()
    train(given, folder, Storage(tmp_path), progress)
    found = {record["step"]: record["val_loss"] for record in folder.read_metrics() if "val_loss" in record}
    assert found == pytest.approx(expected, rel=1e-6) and sorted(found) == [0, 2, 4, 6]
    assert folder.launches() == 0 and "waiting for the evaluation of step-000002, step-000004" in progress.notes


@pytest.mark.slow
def test_no_step_waits_for_an_evaluation_and_none_is_lost(cluster: None, root: Path, tmp_path: Path) -> None:
    given = case(root, name="beside", corpus="c", duration={"steps": 24}, sharding={"zero": 2},
                 evaluate={"worker": {}}, checkpoint={"every_steps": 4, "keep": 6, "keep_best": 1})
    run_ranks({tmp_path / "runs" / "between": case(root, duration={"steps": 24}, sharding={"zero": 2}, evaluate={"every_steps": 4},
                                                   checkpoint={"every_steps": 4})})
    folder = make_run(tmp_path, given)
    seen: list[dict[str, Any]] = []
    outputs = train(given, folder, Storage(tmp_path), Records(), on_metrics=seen.append)
    between = {record["step"]: record["val_loss"] for record in metrics(tmp_path / "runs" / "between") if "val_loss" in record}
    found = {record["step"]: record["val_loss"] for record in folder.read_metrics() if "val_loss" in record}
    assert found == pytest.approx(between, rel=1e-5) and sorted(found) == [0, 4, 8, 12, 16, 20, 24]
    steps = [record for record in folder.read_metrics() if "loss" in record]
    assert [record["step"] for record in steps if "evaluate_s" in record] == [24]
    assert losses(folder.path) == pytest.approx(losses(tmp_path / "runs" / "between"), rel=1e-6)
    assert {record["step"] for record in seen if "val_loss" in record} == set(found), "all are followed, those after the last step too"
    assert outputs["val_loss_first"] == found[0]
    assert json.loads((folder.path / "export" / "distlm.json").read_text())["val_loss"] == found[24]
    assert not [*(folder.path / FOLDER).glob("*.json")]
    wait_for(lambda: not validators(), "the end of the worker", 60)


@pytest.mark.slow
def test_a_worker_that_is_killed_costs_neither_an_evaluation_nor_a_step(cluster: None, root: Path, tmp_path: Path) -> None:
    given = case(root, name="killed", duration={"steps": 400}, evaluate={"worker": {}}, checkpoint={"every_steps": 20, "keep": 20})
    folder, found = make_run(tmp_path, given), list[psutil.Process]()

    def kill() -> None:
        wait_for(lambda: found.extend(validators()) or found, "the worker")
        found[0].send_signal(signal.SIGKILL)

    thread = Thread(target=kill)
    thread.start()
    train(given, folder, Storage(tmp_path), Records())
    thread.join()
    notes = [event for event in folder.events() if "is not evaluated" in event["message"]]
    assert [note["cause"] for note in notes] == ["worker_died"]
    measured = {record["step"] for record in folder.read_metrics() if "val_loss" in record}
    assert measured == {*range(0, 401, 20)}, "another one takes what it had"
    assert len(losses(folder.path)) == 400 and folder.launches() == 1


def test_evaluations_are_due_at_checkpoints_and_the_rest_is_refused(root: Path) -> None:
    def recipe(**sections: Any) -> Any:
        return make_recipe(case(root, corpus="c", **sections), Storage(root))

    every = recipe(evaluate={"worker": {}})
    assert [step for step in range(STEPS + 1) if due(every, step)] == [2, 4] and not due(recipe(), 2)
    rarely = {"every_steps": 4, "worker": {}}
    assert [step for step in range(STEPS + 1) if due(recipe(evaluate=rarely), step)] == [4]
    best = recipe(evaluate=rarely, checkpoint={"every_steps": EVERY, "keep_best": 1})
    assert [step for step in range(STEPS + 1) if due(best, step)] == [2, 4]
    with pytest.raises(SpecError, match=r"3 is no multiple of the 2 steps between checkpoints.*try 4"):
        recipe(evaluate={"every_steps": 3, "worker": {}})
    with pytest.raises(SpecError, match="round_robin_gradients"):
        recipe(evaluate={"worker": {}}, sharding={"zero": 2, "deepspeed": {"zero_optimization": {"round_robin_gradients": True}}})
    text = {"kind": "train", "name": "r", "corpus": "c", "model": {"preset": "llama-10m"}, "duration": {"steps": 2}, "precision": "fp16",
            "sharding": {"zero": 1}, "scale": {"gpus_per_worker": 1}, "evaluate": {"worker": {}}}
    with pytest.raises(SpecError, match=r"evaluate.worker.gpus: fp16 needs GPUs"):
        load_spec(text)
    assert total(train_bundles(case(root, corpus="c", evaluate={"worker": {"cpus": 3, "gpus": 1}}))) == {"CPU": 6, "GPU": 1}


def test_what_has_come_is_recorded_once_and_forgotten_where_a_run_goes_on_before_it(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for step in (10, 20, 30, 40):
        write_json(tmp_path / FOLDER / f"step-{step:06d}.json", {"step": step, "val_loss": math.pi})
    folder.metrics({"step": 20, "val_loss": math.pi})
    folder.metrics({"step": 15, "loss": 1.0})
    settle(folder, 30)
    assert [*arrived(folder)] == []
    assert [record["step"] for record in folder.read_metrics()] == [10, 15, 20, 30], "by step, whenever they were written"


def test_the_checkpoint_that_is_measured_and_the_best_of_those_that_are_stay(root: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run_ranks({run: case(root, duration={"steps": 10}, evaluate={"every_steps": 10}, checkpoint={"every_steps": 1, "keep": 8})})
    write_json(run / FOLDER / "step-000004.json", {"step": 4, "val_loss": 0.5})
    (run / checkpoint.MEASURING).write_text("step-000006")
    checkpoint.prune(run, 2, keep_best=1)
    assert [checkpoint.step_of(path) for path in checkpoint.committed(run)] == [4, 6, 9, 10]
    (run / checkpoint.MEASURING).write_text("step-000009")
    checkpoint.prune(run, 2, keep_best=1)
    assert [checkpoint.step_of(path) for path in checkpoint.committed(run)] == [4, 9, 10]
