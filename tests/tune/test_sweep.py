"""A sweep over real runs: what stops early, what fails, what is best, and that nothing is left behind."""

import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.util import placement_group_table
from ray.util.state import list_actors
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from distlm import cluster, execute, progress
from distlm.errors import InputError, SpecError, TrainError
from distlm.runs import RunFolder
from distlm.spec import TrainSpec, TuneSpec, load_spec
from distlm.spec.presets import PRESETS
from distlm.storage import Storage, read_json, write_json
from distlm.train import checkpoint
from tests.corpus.made import Doc, make
from tests.records import Records

TRAIN: dict[str, Any] = {"corpus": "c", "model": {"preset": "llama-tiny"}, "duration": {"steps": 12}, "precision": "fp32",
                         "batch": {"global_sequences": 4}, "evaluate": {"every_steps": 4, "max_windows": 4},
                         "scale": {"threads_per_worker": 1}}
GOOD, WEAK = {"preset": "llama-tiny"}, {"config": {**PRESETS["llama-tiny"], "initializer_range": 1.0}}
BROKEN = {"config": {**PRESETS["llama-tiny"], "rms_norm_eps": -1.0}}
"""Its loss is no number from the first step on."""
TORN = {"config": {**PRESETS["llama-tiny"], "rms_norm_eps": 1e-4}}
"""The first test leaves it a checkpoint that cannot be read, so that it fails without a worker."""
SWEEP = {"kind": "tune", "name": "s", "train": TRAIN, "space": {"model": {"grid": [GOOD, WEAK, TORN]}}, "asha": {"grace_steps": 4},
         "concurrent": 1}
KEPT_BY_DATA = ("_StatsActor", "_AutoscalingCoordinatorActor", "AutoscalingRequester")
"""One each for the whole cluster, started by Ray Data for all that will use it."""


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Storage]:
    root = Storage(tmp_path_factory.mktemp("storage"))
    make(root.corpus("c"), [Doc(f"{i} is followed by {i + 1}, and that by {i + 2}. " * 40, split="val" if i % 5 == 4 else "train")
                            for i in range(12)], context=32, shard_windows=1000)
    with cluster.connect(root.root / "driver.log", storage=root):
        yield root


@pytest.mark.slow                                          # tests/test_quickstart.py has a sweep with ASHA among the default ones
def test_asha_stops_the_weak_trial_a_failed_one_is_in_the_table_and_nothing_is_left_behind(storage: Storage) -> None:
    from distlm.tune import sweep

    shown, spec = Records(), execute.resolve(SWEEP).spec
    assert isinstance(spec, TuneSpec)
    torn = sweep.plan_trials(spec, RunFolder(storage.sweep("s")), storage)[2].folder.path / "checkpoints" / "step-000004"
    torn.mkdir(parents=True)
    (torn / checkpoint.MARKER).write_text("of another manifest")
    made = execute.run(SWEEP, storage=storage, progress=shown)
    good, weak, broken = made["trials"]
    assert (good["state"], good["steps"]) == ("succeeded", 12)
    assert (weak["state"], weak["cause"], weak["message"]) == ("stopped", "completed", "stopped early by ASHA at step 4")
    assert (broken["state"], broken["cause"]) == ("failed", "storage") and str(torn) in broken["message"]
    assert made["best"] == good["folder"] and made["best.model"] == GOOD and made["value"] == good["val_loss"]
    assert (Path(good["folder"]) / "export" / "config.json").exists()

    [table] = [record for record in shown.records if record["distlm"] == "table" and record["title"] == "trials of s"]
    assert [row[-1] for row in table["rows"]] == ["succeeded", "stopped early", "failed: storage"]
    assert any("has failed: storage" in text for text in shown.notes)

    best = load_spec(made["best_spec"]).spec
    assert isinstance(best, TrainSpec) and best.model.preset == "llama-tiny" and not storage.run(best.name).exists()
    for trial in made["trials"]:
        events = EventAccumulator(str(Path(trial["folder"]) / "tensorboard")).Reload()
        assert "_hparams_/session_start_info" in events.PluginTagToContent("hparams")

    deadline = time.monotonic() + 60
    while left := leftovers():
        assert time.monotonic() < deadline, left
        time.sleep(0.5)


def leftovers() -> list[str]:
    """Actors of trials that live, and placement groups that hold resources."""
    living = list_actors(ray.get_runtime_context().gcs_address, filters=[("state", "!=", "DEAD")], limit=1000)
    actors = [actor.class_name for actor in living if actor.class_name not in KEPT_BY_DATA]
    groups = [str(group["name"]) for group in placement_group_table().values() if group["state"] != "REMOVED"]
    return actors + groups


@pytest.mark.slow
def test_a_sweep_that_is_taken_up_again_leaves_what_has_ended_as_it_is(storage: Storage) -> None:
    """Needs the sweep of the first test."""
    folder = RunFolder(storage.sweep("s"))
    trials = sorted((folder.path / "trials").iterdir())
    RunFolder(trials[2]).event("succeeded", "completed")   # it had failed
    before = [RunFolder(path).events() for path in trials]
    folder.event("failed", "head_lost", "as if the head had gone")
    made = execute.run(SWEEP, storage=storage, resume=True, progress=(shown := Records()))
    assert "3 of 3 trials have ended before and stay as they are" in shown.notes
    assert [RunFolder(path).events() for path in trials] == before and made["best"] == str(trials[0])


def test_a_sweep_that_is_taken_up_again_measures_trials_by_those_that_have_ended(tmp_path: Path) -> None:
    """Rungs at steps 4 and 12; of four trials that come to one, the best third and what equals it goes on."""
    from distlm.tune import sweep

    spec = TuneSpec.model_validate({**SWEEP, "asha": {"grace_steps": 4, "reduction": 3}})
    train: Any = None

    def trial(name: str, state: str, losses: dict[int, float], **more: Any) -> sweep.Trial:
        folder = RunFolder(tmp_path / name)
        for step, loss in losses.items():
            folder.metrics({"step": step, "val_loss": loss, "time": 100.0 + step})
        folder.event("running")
        folder.event(state, "completed" if state in ("succeeded", "stopped") else "worker_died", **more)
        return sweep.Trial(name, {}, train, {}, folder)

    def judged(trials: list[sweep.Trial], step: int, loss: float) -> str:
        scheduler, new = sweep.asha(spec, trials), SimpleNamespace(trial_id="new")
        scheduler.on_trial_add(None, new)                  # type: ignore[arg-type]
        return scheduler.on_trial_result(None, new, {"step": step, "val_loss": loss})    # type: ignore[arg-type]

    done = trial("done", "succeeded", {0: 5.0, 4: 2.0, 12: 1.0})
    weak = trial("weak", "stopped", {0: 5.0, 4: 3.0, 12: 0.1}, step=4)
    died = trial("died", "failed", {0: 5.0, 4: 0.5, 12: 0.1})
    assert judged([], 4, 9.0) == "CONTINUE", "the first at a rung has nothing to be measured by"
    assert judged([done, weak, died], 4, 2.9) == "STOP" and judged([done, weak, died], 4, 1.9) == "CONTINUE"
    assert judged([weak, died], 12, 9.0) == "CONTINUE", "what is run again, and what a trial did after it was stopped, counts for nothing"
    assert judged([done, weak, died], 12, 1.1) == "STOP"


def test_of_a_metric_that_is_to_be_large_the_largest_is_best_and_asha_stops_the_small(tmp_path: Path) -> None:
    from distlm.tune import sweep

    spec = TuneSpec.model_validate({**SWEEP, "train": {**TRAIN, "objective": "classify"}, "metric": "accuracy", "asha": {"grace_steps": 4}})
    train: Any = None

    def trial(name: str, state: str, *found: float) -> sweep.Trial:
        folder = RunFolder(tmp_path / name)
        for value in found:
            folder.metrics({"step": 4, "accuracy": value, "val_loss": value})
        folder.event(state, "completed" if state == "succeeded" else "oom")
        return sweep.Trial(name, {"model": 1}, train, {}, folder)

    trials = [trial("weak", "succeeded", 0.6), trial("good", "succeeded", 0.2, 0.8), trial("nan", "succeeded", 0.9, float("nan")),
              trial("none", "succeeded"), trial("died", "failed", 1.0)]
    assert [row[0] for row in sweep.rows(spec, trials)] == ["good", "weak", "nan", "none", "died"]
    assert min(trials, key=lambda one: sweep.place(spec, one)).name == "good"
    assert sweep.record(spec, trials[1])["accuracy"] == 0.8 and sweep.record(spec, trials[2])["accuracy"] is None
    for value, decision in ((0.9, "CONTINUE"), (0.1, "STOP")):
        scheduler, new = sweep.asha(spec, trials[:2]), SimpleNamespace(trial_id="new")
        scheduler.on_trial_add(None, new)                  # type: ignore[arg-type]
        assert scheduler.on_trial_result(None, new, {"step": 4, "accuracy": value}) == decision     # type: ignore[arg-type]


def test_a_sweeps_log_says_once_how_far_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from distlm.tune import sweep

    clock = itertools.count(100, 60)                       # no line is left out for coming too soon
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    train: Any = None
    trials = [sweep.Trial(name, {}, train, {}, RunFolder(tmp_path / name)) for name in ("a", "b")]
    watch = sweep.Watch(TuneSpec.model_validate(SWEEP), trials, trials, progress.PlainProgress())
    for number, mine in enumerate(trials):                 # what Tune calls, for each trial that comes to its end
        trial: Any = SimpleNamespace(config={"trial": number}, last_result={})
        watch.on_trial_start(0, [], trial)
        for step in (4, 8):
            watch.on_trial_result(0, [], trial, {"step": step, "val_loss": 5.0 - number})
        mine.folder.event("succeeded", "completed")
        watch.on_trial_result(0, [], trial, {"step": 12, "val_loss": 5.0 - number})
        watch.on_trial_complete(0, [], trial)
    assert capsys.readouterr().out.splitlines() == ["  trials 0/2", "  trials 0/2 best 5", "  trials 1/2 best 5", "  trials 1/2 best 4",
                                                    "  trials 2/2 best 4"]


@pytest.mark.slow
@pytest.mark.timeout(560)
def test_a_trial_that_is_killed_in_the_middle_goes_on_at_its_checkpoint_when_its_sweep_is_taken_up_again(storage: Storage) -> None:
    train = {**TRAIN, "evaluate": {"every_steps": 50, "max_windows": 4}, "checkpoint": {"every_steps": 20}}
    given = {"kind": "tune", "name": "cut", "train": train, "space": {"duration.steps": {"grid": [2, 150]}}, "concurrent": 1}
    file = storage.root / "cut.yaml"
    file.write_text(json.dumps(given))
    job = subprocess.Popen([sys.executable, "-m", "distlm", "run", str(file)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                           env={**os.environ, "DISTLM_STORAGE": str(storage.root), "RAY_ADDRESS": ray.get_runtime_context().gcs_address})
    folder, deadline = RunFolder(storage.sweep("cut")), time.monotonic() + 200
    first, second = (RunFolder(folder.path / "trials" / name) for name in ("000-steps-2", "001-steps-150"))
    while checkpoint.latest(second.path)[0] is None:
        assert job.poll() is None and time.monotonic() < deadline, job.communicate()[0].decode()
        time.sleep(0.05)
    job.kill()                                             # its actors, and the trial in one of them, go with it
    job.communicate()
    while second.state() != ("failed", "head_lost"):
        assert time.monotonic() < deadline, second.events()
        time.sleep(0.2)
    assert folder.state() == ("failed", "head_lost") and first.state() == ("succeeded", "completed")
    before, (cut, _), done = first.events(), checkpoint.latest(second.path), max(record["step"] for record in second.read_metrics())
    assert cut is not None and 20 <= cut.step <= done < 150, "it was killed in the middle"

    made = execute.run(given, storage=storage, resume=True, progress=(shown := Records()))
    assert "1 of 2 trials have ended before and stay as they are" in shown.notes
    assert first.events() == before and [trial["state"] for trial in made["trials"]] == ["succeeded", "succeeded"]
    began = [event["message"] for event in second.events() if event["state"] == "running"]
    assert began == ["from step 0", f"from step {cut.step}"]
    assert [record["step"] for record in second.read_metrics() if "loss" in record] == list(range(1, 151)), "no step is lost or there twice"


@pytest.mark.slow
def test_a_sweep_fails_only_when_all_trials_fail_and_says_why(storage: Storage) -> None:
    given = {"kind": "tune", "name": "broken", "train": {**TRAIN, "model": BROKEN}, "space": {"optimizer.lr": {"grid": [1e-3, 2e-3]}}}
    with pytest.raises(TrainError, match=r"no trial of 2 has a val_loss: nonfinite_loss; .*the validation loss is nan"):
        execute.run(given, storage=storage, progress=Records())
    assert RunFolder(storage.sweep("broken")).state() == ("failed", "nonfinite_loss")


def test_a_model_that_cannot_be_built_is_refused_before_any_trial(storage: Storage) -> None:
    train = {**TRAIN, "model": {"config": {"model_type": "no-such-family"}}}
    with pytest.raises(SpecError, match="no-such-family"):
        execute.run({"kind": "tune", "name": "unbuilt", "train": train, "space": {"optimizer.lr": {"grid": [1e-3]}}}, storage=storage,
                    progress=Records())
    assert not storage.sweep("unbuilt").exists()


def test_a_sweep_by_val_loss_over_a_corpus_without_validation_is_refused_before_any_work(storage: Storage) -> None:
    manifest = read_json(storage.corpus("c") / "manifest.json")
    manifest["splits"]["val"] |= {"windows": 0, "shards": []}
    del manifest["hash"]
    write_json(storage.corpus("no-val") / "manifest.json", manifest)
    shutil.copytree(storage.corpus("c") / "tokenizer", storage.corpus("no-val") / "tokenizer")
    given = {**SWEEP, "name": "no-val", "train": {**TRAIN, "corpus": "no-val"}, "space": {"optimizer.lr": {"grid": [0.1]}}}
    with pytest.raises(InputError, match=r"metric: no trial would have a val_loss: the corpus no-val has no .*metric: loss"):
        execute.run(given, storage=storage, progress=Records())
    assert not storage.sweep("no-val").exists()
    without = {**given, "metric": "loss", "train": {key: value for key, value in given["train"].items() if key != "evaluate"}}
    assert execute.inputs(execute.resolve(without).spec, storage)["corpus_hash"]


def test_having_completed_is_no_cause_of_failure(storage: Storage) -> None:
    from distlm.tune import sweep

    folder = RunFolder(storage.sweep("unmeasured"))
    loaded = execute.resolve({**SWEEP, "name": "unmeasured", "space": {"optimizer.lr": {"grid": [0.1, 0.2]}}})
    assert isinstance(loaded.spec, TuneSpec)
    for trial in sweep.plan_trials(loaded.spec, folder, storage):
        trial.folder.event("succeeded", "completed")
    with pytest.raises(TrainError, match="none was measured") as error:
        sweep.tune(loaded.spec, folder, storage, Records())
    assert error.value.cause == "internal"


def test_the_best_spec_keeps_the_storage_that_the_sweep_names(storage: Storage) -> None:
    from distlm.tune import sweep

    loaded = execute.resolve({**SWEEP, "name": "stored", "storage": str(storage.root), "space": {"optimizer.lr": {"grid": [0.1]}}})
    assert isinstance(loaded.spec, TuneSpec)
    folder = RunFolder(storage.sweep("stored"))
    [trial] = sweep.plan_trials(loaded.spec, folder, storage)
    trial.folder.metrics({"step": 1, "val_loss": 2.0})
    assert load_spec(sweep.write_best(loaded.spec, trial, "2.0", folder, storage)).spec.storage == str(storage.root)


def test_trials_at_once_leave_a_cpu_each_for_reading_data(storage: Storage) -> None:
    from distlm.tune import sweep

    loaded = execute.resolve({**SWEEP, "train": {**TRAIN, "scale": {"workers": 2}}, "name": "capacity"})
    trials = sweep.plan_trials(loaded.spec, RunFolder(storage.sweep("capacity")), storage)  # type: ignore[arg-type]
    assert sweep.capacity(trials, Records()) == int(ray.cluster_resources()["CPU"] // 3)
