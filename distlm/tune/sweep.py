"""A sweep: trials of one training spec, each a run folder of its own, under Ray Tune.

Tune decides which trial runs when and, with ASHA, which stops early; each trial's actor drives a Ray Train run of its own and relays
its metrics. Folders are the truth: a sweep that is taken up again reads them, leaves what has ended as it is and resumes the rest.
"""

import contextlib
import math
import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ray import tune as ray_tune
from ray.tune.progress_reporter import TrialProgressCallback
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler

from distlm.autoscale import require, times, train_bundles
from distlm.cluster import environment
from distlm.errors import DistlmError, TrainError
from distlm.progress import Logged, Progress, number
from distlm.runs import RunFolder, lineage
from distlm.spec.load import dump, to_yaml
from distlm.spec.train import TrainSpec
from distlm.spec.tune import TuneSpec
from distlm.storage import Storage, write_atomic
from distlm.train.driver import train
from distlm.train.recipe import inputs_of
from distlm.tune import space
from distlm.tune.folds import points_of, table
from distlm.tune.report import write_report

QUIET: dict[str, str | None] = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1", "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1", "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0", "RAY_CHDIR_TO_TRIAL_DIR": "0", "RAY_AIR_NEW_OUTPUT": "0"}
"""Our folders are the record, and Ctrl-C is ours: Tune would finish the trials at its leisure."""

@dataclass(frozen=True)
class Trial:
    """One point of the space."""

    name: str
    values: dict[str, Any]
    """Dotted key of the training spec -> its value in this trial."""
    spec: TrainSpec
    inputs: dict[str, Any]
    """What it reads, for its lineage."""
    folder: RunFolder

    def ended(self) -> bool:
        """Whether nothing is left to be done: it went to its end, or ASHA stopped it."""
        return self.folder.exists() and self.folder.state() in (("succeeded", "completed"), ("stopped", "completed"))

    def steps(self) -> int:
        return max((record["step"] for record in self.folder.read_metrics() if "step" in record), default=0)

    def reports(self, metric: str) -> list[dict[str, Any]]:
        """Its records that hold the metric, up to the step at which ASHA stopped it: it may have run on a little."""
        last = next((event["step"] for event in self.folder.events() if event["state"] == "stopped" and "step" in event), math.inf)
        return [r for r in self.folder.read_metrics() if r.get(metric) is not None and math.isfinite(r[metric]) and r["step"] <= last]

    def value(self, metric: str) -> float | None:
        """The last value of the metric; None where there is none."""
        value = next((r[metric] for r in reversed(self.folder.read_metrics()) if r.get(metric) is not None), None)
        return value if value is not None and math.isfinite(value) else None


def tune(spec: TuneSpec, folder: RunFolder, storage: Storage, progress: Progress) -> dict[str, Any]:
    """Run every trial that has not ended, and name the best. Raises TrainError where no trial has a result."""
    trials = plan_trials(spec, folder, storage)
    todo = [trial for trial in trials if not trial.ended()]
    if len(todo) < len(trials):
        progress.note(f"{len(trials) - len(todo)} of {len(trials)} trials have ended before and stay as they are")
    if todo:
        run_trials(spec, trials, todo, folder, storage, progress)
    progress.table(f"trials of {spec.name}", rows(spec, trials), header=("trial", *spec.space, "steps", spec.metric, "state"))
    points = points_of(spec, trials)
    best = min(points[0].trials if points else trials, key=lambda trial: place(spec, trial))
    scores = points[0].scores.get(spec.metric) if points else None
    value = scores.mean if scores else None if points else best.value(spec.metric)
    if value is None:
        causes = sorted({trial.folder.state()[1] for trial in trials} - {"completed", ""})
        lacks = f"no point has {spec.metric} in all {spec.folds} folds" if points else f"no trial of {len(trials)} has a {spec.metric}"
        raise TrainError(f"{lacks}: {', '.join(causes) or 'none was measured'}; {message(best)}",
                         where=str(folder.path), cause=causes[0] if len(causes) == 1 else "internal",
                         remedy=f"events.jsonl of {trials[0].folder.path} says more")
    if points:
        titles, lines = table(points)
        progress.table(f"folds of {spec.name}", lines, header=titles)
    best_spec = write_best(spec, best, str(scores or number(value)), folder, storage)
    progress.note(f"the best trial is {best.name}; `distlm run {best_spec}` trains it anew" if not points else
                  f"`distlm run {best_spec}` trains the best on the corpus's own training split")
    outputs = {"": str(folder.path), "best": str(best.folder.path), **{f"best.{key}": best.values[key] for key in spec.space},
               "best_spec": str(best_spec), "metric": spec.metric, "value": value, **({"std": scores.std} if scores else {}),
               "trials": [record(spec, trial) for trial in trials], **({"points": [point.data() for point in points]} if points else {})}
    write_report(folder, outputs)
    return outputs


def place(spec: TuneSpec, trial: Trial) -> tuple[bool, float]:
    """What trials are sorted by, the best first: those that have come to their end before others, then those that were measured."""
    return trial.folder.state()[0] != "succeeded", cost(trial.value(spec.metric), space.mode_of(spec))


def cost(value: float | None, mode: str) -> float:
    """The less, the better; infinite where there is no value."""
    return math.inf if value is None else value if mode == "min" else -value


def plan_trials(spec: TuneSpec, folder: RunFolder, storage: Storage) -> list[Trial]:
    """Every trial of the sweep, in the order of its samples."""
    found = []
    for index, values in enumerate(space.samples(spec)):
        name = space.trial_name(index, values)
        train = space.trial_spec(spec, values, f"{spec.name[:99 - len(name)]}.{name}")
        found.append(Trial(name, values, train, inputs_of(train, storage), RunFolder(folder.path / "trials" / name)))
    return found


def run_trials(spec: TuneSpec, trials: list[Trial], todo: list[Trial], folder: RunFolder, storage: Storage, progress: Progress) -> None:
    """Let Tune run the trials of `todo`. Afterwards the folder of each says how it ended. Raises ClusterError, KeyboardInterrupt."""
    concurrent = min(spec.concurrent or capacity(todo, progress), len(todo))
    progress.note(f"{len(todo)} trials, {concurrent} at once")
    scheduler = asha(spec, trials) if spec.asha else FIFOScheduler()
    watch = Watch(spec, trials, todo, progress)
    attempt = f"{len(list((folder.path / 'ray').glob('*'))) + 1}"
    with environment(QUIET), attached(watch):
        tuner = ray_tune.Tuner(
            ray_tune.with_resources(trial_function(todo, spec, storage), {"CPU": 0.01}),
            param_space={"trial": ray_tune.grid_search(list(range(len(todo))))},
            tune_config=ray_tune.TuneConfig(scheduler=scheduler, max_concurrent_trials=concurrent,
                                            trial_name_creator=lambda t: todo[t.config["trial"]].name,
                                            trial_dirname_creator=lambda t: todo[t.config["trial"]].name),
            run_config=ray_tune.RunConfig(name=attempt, storage_path=str(folder.path / "ray"), verbose=0, callbacks=[watch]))
        tuner.fit()


def asha(spec: TuneSpec, trials: list[Trial]) -> ASHAScheduler:
    """ASHA that is told first what the trials that have ended reported, in the order in which they did: after a break a weak trial is
    measured by them as without one."""
    assert spec.asha
    scheduler = ASHAScheduler(time_attr="step", metric=spec.metric, mode=space.mode_of(spec),
                              max_t=10**9,                 # a trial's own duration is its end
                              grace_period=spec.asha.grace_steps, reduction_factor=spec.asha.reduction)
    past: dict[str, Any] = {trial.name: SimpleNamespace(trial_id=trial.name) for trial in trials if trial.ended()}
    reports = [(record.get("time", 0.0), trial.name, record) for trial in trials if trial.ended() for record in trial.reports(spec.metric)]
    for trial in past.values():
        scheduler.on_trial_add(None, trial)                # type: ignore[arg-type]
    for _, name, record in sorted(reports, key=lambda report: report[0]):
        scheduler.on_trial_result(None, past[name], record)    # type: ignore[arg-type]
    return scheduler


def capacity(trials: list[Trial], progress: Progress) -> int:
    """How many trials the cluster holds at once, whichever these are, grown to one where it can be. Raises ClusterError."""
    needs = list({str(need): need for trial in trials for need in [train_bundles(trial.spec)]}.values())
    for need in needs:
        require(need, "a trial's workers and the data stream", progress, where="scale",
                remedy="lower scale.workers or scale.cpus_per_worker, or take a larger cluster")
    return min(times(need, len(trials)) for need in needs)


def trial_function(trials: list[Trial], spec: TuneSpec, storage: Storage) -> Callable[[dict[str, Any]], None]:
    """What Tune runs in an actor: the training of one trial in a thread, its metrics reported as they come."""

    def trial(config: dict[str, Any]) -> None:
        mine = trials[config["trial"]]
        records: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        stopped = threading.Event()
        thread = threading.Thread(target=run_trial, args=(mine, spec, storage, records, stopped), daemon=True)
        thread.start()
        held = None                                        # a result waits for the next one: ASHA must not stop a trial that has
        try:                                               # come to its end and is writing what it made
            while (latest := records.get()) is not None:
                if held:
                    ray_tune.report(held)
                held = {"step": latest["step"], spec.metric: latest[spec.metric]} if latest.get(spec.metric) is not None else None
            if mine.folder.state()[0] == "succeeded":
                value = mine.value(spec.metric)
                ray_tune.report({"step": mine.steps(), **({} if value is None else {spec.metric: value})})
        except SystemExit:                                 # Tune stops the trial: what breaks from now on is no failure
            stopped.set()
            raise

    return trial


def run_trial(trial: Trial, spec: TuneSpec, storage: Storage, records: Any, stopped: threading.Event) -> None:
    """Train one trial in its folder; puts every metrics record, and None at the end, into `records`."""
    data = dump(trial.spec)
    try:
        made_of = lineage(data, **trial.inputs, sweep=spec.name, trial=trial.name)
        folder = RunFolder.create(trial.folder.path, to_yaml(data), made_of, resume=True)
        folder.event("starting")
        with Logged(Progress(), folder.path / "logs" / "driver.log") as shown:
            outputs = train(trial.spec, folder, storage, shown, on_metrics=records.put, wanted=lambda: not stopped.is_set())
        if not stopped.is_set():                           # Tune's word stands, even where the trial got to its end meanwhile
            folder.result(outputs)
            folder.event("succeeded", "completed")
    except BaseException as error:
        if not stopped.is_set():
            cause = error.cause if isinstance(error, DistlmError) else "internal"
            trial.folder.event("failed", cause, f"{type(error).__name__}: {error}"[:2000])
    finally:
        records.put(None)


class Watch(TrialProgressCallback):
    """Follows the sweep in the driver: records what Tune stopped, writes results for TensorBoard, shows how far it is.

    It takes the place of Tune's own callback of its base class, which prints.
    """

    def __init__(self, spec: TuneSpec, trials: list[Trial], todo: list[Trial], progress: Progress) -> None:
        super().__init__()
        self.spec, self.trials, self.todo, self.progress = spec, trials, todo, progress
        self.began: set[str] = set()
        self.mode = space.mode_of(spec)
        self.best: float | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {}                                          # Tune saves its callbacks; what this one knows lies in the folders

    def on_trial_start(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        self.began.add(self.todo[trial.config["trial"]].name)
        self.show()

    def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **info: Any) -> None:
        self.best = min(self.best, result.get(self.spec.metric), key=lambda value: cost(value, self.mode))
        self.show()

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        mine = self.todo[trial.config["trial"]]
        if mine.folder.state()[0] not in ("succeeded", "failed"):
            step = (trial.last_result or {}).get("step", mine.steps())
            mine.folder.event("stopped", "completed", f"stopped early by ASHA at step {step}", step=step)
        self.finish(mine)

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        mine = self.todo[trial.config["trial"]]
        if mine.folder.state() in (("starting", ""), ("running", ""), ("failed", "head_lost"), ("queued", "")):
            mine.folder.event("failed", "worker_died", "the trial's process ended unexpectedly")
        self.finish(mine)

    def finish(self, trial: Trial) -> None:
        write_hparams(self.spec, trial)
        state, cause = trial.folder.state()
        if state == "failed":
            self.progress.note(f"trial {trial.name} has failed: {cause}: {message(trial)}")
        self.show()

    def show(self) -> None:
        done = sum(trial.ended() or (trial.name in self.began and trial.folder.state()[0] == "failed") for trial in self.trials)
        self.progress.update("trials", done, len(self.trials), **({} if self.best is None else {"best": self.best}))

    def interrupted(self) -> None:
        """Record that the user has ended what was running."""
        for trial in self.todo:
            if trial.name in self.began and not trial.ended() and trial.folder.state()[0] != "failed":
                trial.folder.event("stopped", "user", "the sweep was interrupted")


@contextlib.contextmanager
def attached(watch: Watch) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        watch.interrupted()
        raise


def message(trial: Trial) -> str:
    """What the trial last said about its end."""
    return next((e["message"] for e in reversed(trial.folder.events()) if e["state"] != "note" and e["message"]), "")


def record(spec: TuneSpec, trial: Trial) -> dict[str, Any]:
    """One trial as it stands in the sweep's result."""
    state, cause = trial.folder.state()
    return {"trial": trial.name, "values": trial.values, "steps": trial.steps(), spec.metric: trial.value(spec.metric),
            "state": state, "cause": cause, "message": message(trial), "folder": str(trial.folder.path)}


def rows(spec: TuneSpec, trials: list[Trial]) -> list[tuple[str, ...]]:
    """The table of trials, the best first."""
    found = []
    for trial in sorted(trials, key=lambda trial: place(spec, trial)):
        state, cause = trial.folder.state()
        text = {"failed": f"failed: {cause}", "stopped": "stopped early" if cause == "completed" else f"stopped: {cause}"}.get(state, state)
        value = trial.value(spec.metric)
        found.append((trial.name, *(number(trial.values[key]) for key in spec.space), f"{trial.steps():,}",
                      "" if value is None else f"{value:.4f}", text))
    return found


def write_best(spec: TuneSpec, best: Trial, value: str, folder: RunFolder, storage: Storage) -> Path:
    """Write <sweep>/best.yaml: the best trial's training spec, but for its fold, under a name that is free. `value`: its metric."""
    name, n = f"{spec.name[:90]}-best", 1
    while storage.run(name).exists():
        name, n = f"{spec.name[:90]}-best-{n + 1}", n + 1
    values = {key: one for key, one in best.values.items() if key != "fold"}
    data = {**space.with_values(space.base_data(spec), values), "name": name, **({"storage": spec.storage} if spec.storage else {})}
    path = folder.path / "best.yaml"
    remark = f"# The best of the sweep {spec.name}: trial {best.name}, {spec.metric} {value}\n"
    write_atomic(path, remark + to_yaml(data))
    return path


def write_hparams(spec: TuneSpec, trial: Trial) -> None:
    """Put the trial's values and results where TensorBoard shows trials side by side."""
    from torch.utils.tensorboard import SummaryWriter
    from torch.utils.tensorboard.summary import hparams

    values = {key: value if isinstance(value, bool | int | float | str) else str(value) for key, value in trial.values.items()}
    value = trial.value(spec.metric)
    results = {f"result/{spec.metric}": math.nan if value is None else value, "result/steps": trial.steps()}
    with SummaryWriter(str(trial.folder.path / "tensorboard")) as writer:
        for summary in hparams(values, results):
            writer.file_writer.add_summary(summary)
        for name, value in results.items():
            if math.isfinite(value):
                writer.add_scalar(name, value, trial.steps())
