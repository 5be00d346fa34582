"""The train job: a Trainer of Ray Train over the plan-block stream, resumed by cause from our own checkpoints.

Ray Train restarts nothing by itself: a data stream that it restarts would begin at the first sample again. After a
failure the driver takes the last committed checkpoint, starts the plan at its sample, and launches a new group.
"""

import contextlib
import itertools
import math
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

from distlm.autoscale import require, train_bundles
from distlm.errors import DistlmError, StorageError, TrainError
from distlm.head import HUGE_PAGES
from distlm.machine import machine_memory
from distlm.model.build import model_config
from distlm.model.export import export_lacks
from distlm.progress import Progress
from distlm.runs import RunFolder
from distlm.runs.folder import SUBMISSION
from distlm.runs.report import write_report
from distlm.spec.optimizer import Schedule
from distlm.spec.train import Checkpoints, Duration, Evaluate, TrainSpec
from distlm.storage import Storage, read_json
from distlm.train import checkpoint, preempt
from distlm.train import profile as profiles
from distlm.train.determinism import ENVIRONMENT
from distlm.train.drain import drains_passed_on
from distlm.train.dryrun import FOLDER as DRY_RUN
from distlm.train.dryrun import choose_micro
from distlm.train.failures import alive_nodes, diagnose, lost_nodes
from distlm.train.memory import GIB, make_load, node_advice, node_memory
from distlm.train.objectives import objective_of
from distlm.train.recipe import Recipe, make_recipe, read_corpora, without_val
from distlm.train.track import tracked
from distlm.train.validation import Validation, settle
from distlm.train.worker import Task, work

OnMetrics = Callable[[dict[str, Any]], None]
KEEP_MEMORY = ":".join(f"glibc.malloc.{name}" for name in ("mmap_max=0", "trim_threshold=17179869184", "top_pad=268435456"))
"""A worker on CPU keeps what it frees for the next step: 100,000 page faults a step cost a fifth of it, where glibc gives every large
tensor back to the system. Huge pages would make it start later and its steps no shorter (docs/experiments.md). Other C libraries ignore
it."""


def train(spec: TrainSpec, folder: RunFolder, storage: Storage, progress: Progress, *,
          on_metrics: OnMetrics | None = None, wanted: Callable[[], bool] = lambda: True) -> dict[str, Any]:
    """Train to the end, from the last committed checkpoint where the folder holds one. `on_metrics` gets every record of
    metrics.jsonl as it is written, on another thread; `wanted` is asked before workers that failed are followed by others. Raises
    SpecError, InputError, ClusterError, CheckpointError, TrainError."""
    recipe = make_recipe(spec, storage)
    require_workers(spec, progress)
    for text in short_nodes(recipe):
        progress.note(text)
        folder.event("note", message=text)
    groups = f" in groups of {recipe.group}" if recipe.group > 1 else ""
    progress.note(f"{recipe.parameters:,} parameters, {recipe.num_steps:,} steps of {recipe.tokens_of(recipe.num_steps):,} tokens, "
                  f"{recipe.world} worker{'s' * (recipe.world > 1)}{groups} under ZeRO-{spec.sharding.zero}, {spec.precision}")
    if not recipe.val:
        progress.note(f"nothing is evaluated: {without_val(read_corpora(spec, storage))[0]}")
    recipe = _cut(recipe, folder, progress)
    with tracked(spec, folder, progress) as track:
        _to_the_end(recipe, folder, progress, [track, *([on_metrics] if on_metrics else [])], wanted)
    write_report(folder)
    return outcome(recipe, folder)


def _to_the_end(recipe: Recipe, folder: RunFolder, progress: Progress, on_metrics: list[OnMetrics],
                wanted: Callable[[], bool] = lambda: True) -> None:
    """Launch worker groups until one has come to the end, is `wanted` no more, or no retry is left: those of a cause count since the last
    group that committed a checkpoint of the schedule. Raises what stopped the last."""
    retry, grace_s = recipe.spec.retry.model_dump(), recipe.spec.guard.grace_period_s
    failures: dict[str, int] = {}
    for attempt in itertools.count():
        start = _resume_point(recipe, folder, progress)
        first_step = start.step if start else 0
        before, ended = checkpoint.commits(folder.path), first_step == recipe.num_steps and exported(recipe, folder)
        fits = [preempt.GraceCheck(folder, progress, grace_s)] if grace_s else []
        with (_following(folder, recipe, progress, first_step, [*on_metrics, *fits]),
              Validation(recipe, folder, progress) as validation):
            with drains_passed_on(folder, progress):
                error = None if ended else _launch(recipe, folder, first_step, start.path if start else None, attempt)
            if error is None:
                validation.finish()
        if error is None:
            break
        if checkpoint.commits(folder.path) - before:
            failures.clear()
        failures[error.cause] = failures.get(error.cause, 0) + 1
        allowed = retry.get(error.cause, 0)
        if failures[error.cause] > allowed or (folder.path / preempt.FLAG).exists() or not wanted():
            raise error
        progress.note(f"{error.cause}: {error.message}; resuming from the last checkpoint, try {failures[error.cause]} of {allowed}")
        folder.event("note", error.cause, f"resuming: {error}", attempt=failures[error.cause])


def profile(spec: TrainSpec, folder: RunFolder, storage: Storage, progress: Progress) -> dict[str, Any]:
    """A job in place of `train`: a few steps of a spec under PyTorch's profiler, whose trace goes to `profile/` of the folder, and a table
    of where they went. Raises what `train` raises."""
    duration = Duration(steps=profiles.WARM_UP + profiles.STEPS)
    recipe = make_recipe(spec.model_copy(update={"duration": duration, "schedule": Schedule(), "evaluate": Evaluate(),
                                                 "batch": spec.batch.model_copy(update={"warmup": None}), "checkpoint": Checkpoints()}),
                         storage)
    require_workers(recipe.spec, progress)
    recipe = _cut(recipe, folder, progress)
    progress.note(f"{profiles.STEPS} steps of {recipe.tokens_of(0):,} tokens under the profiler, after {profiles.WARM_UP}")
    error = _launch(recipe, folder, 0, None, 0, "profile")
    if error is not None:
        raise error
    place = folder.path / "profile"
    found = read_json(place / "profile.json")
    progress.table(f"where a step goes, rank 0 of {recipe.world}", [*profiles.rows(found)], ("", "ms", "share", "calls"))
    progress.note(f"{place / 'trace.json'} opens in ui.perfetto.dev or chrome://tracing")
    return {"": str(folder.path), "trace": str(place / "trace.json"), "step_ms": found["step_ms"], **found["regions_ms"],
            "tokens_per_s": recipe.tokens_of(0) * 1e3 / found["step_ms"]}


def _cut(recipe: Recipe, folder: RunFolder, progress: Progress) -> Recipe:
    """The recipe with its micro-batches as they are run."""
    if recipe.spec.batch.micro_sequences != "auto":
        return recipe
    return choose_micro(recipe, folder, progress, lambda trial: _launch(trial, folder, 0, None, 0, "dry_run"), machine_room(recipe.spec))


def machine_room(spec: TrainSpec) -> int | None:
    """Bytes that this machine has for all workers on CPU, where the cluster is this machine alone."""
    import ray

    alone = len([node for node in ray.nodes() if node["Alive"]]) == 1
    return machine_memory() if alone and not spec.scale.gpus_per_worker else None


def require_workers(spec: TrainSpec, progress: Progress) -> None:
    """Raises ClusterError where the cluster cannot hold the job, and does not grow to it."""
    workers = f"{spec.scale.workers} worker{'s' * (spec.scale.workers > 1)}"
    beside = spec.evaluate.worker is not None
    require(train_bundles(spec), f"{workers}{', the one that evaluates' * beside} and the data stream", progress, where="scale",
            remedy=f"lower scale.workers or scale.cpus_per_worker,{' leave out evaluate.worker,' * beside} or take a larger cluster")


def short_nodes(recipe: Recipe) -> list[str]:
    """What there is to say of the cluster's nodes whose memory is less than what workers on all their GPUs take of it, one line for each
    size. Ray counts a node's memory as memory and object store."""
    import ray

    spec = recipe.spec
    if not spec.scale.gpus_per_worker:
        return []
    config = model_config(spec.model, recipe.shape, spec.regularization.dropout)
    load = make_load(spec, config, recipe.shape, recipe.parameters, recipe.micro_sequences, recipe.accumulation, recipe.mask_documents)
    found = []
    for node in ray.nodes():
        have = node["Resources"]
        workers, limit = min(spec.scale.workers, int(have.get("GPU", 0))), int(have.get("memory", 0) + have.get("object_store_memory", 0))
        if node["Alive"] and workers and (need := node_memory(load, workers)) > limit:
            advice = node_advice(load, workers, limit)
            found.append(f"a node with {workers} of the workers has {limit / GIB:.3g} GiB of memory, and they take {need / GIB:.3g} of it: "
                         + (f"it would fit with {advice}" if advice else "take fewer workers a node"))
    return [*dict.fromkeys(found)]


def _resume_point(recipe: Recipe, folder: RunFolder, progress: Progress) -> checkpoint.Checkpoint | None:
    """The checkpoint to go on from, verified; what was refused is told. Metrics beyond it are trimmed."""
    start, refused = checkpoint.latest(folder.path)
    for error in refused:
        progress.note(f"refused: {error}")
        folder.event("note", "storage", f"checkpoint refused: {error}")
    if start is not None:
        checkpoint.check_fits(start, recipe)
        progress.note(f"resuming at step {start.step:,} of {recipe.num_steps:,}")
        if moved := checkpoint.layout_changes(start.manifest, recipe):
            progress.note(text := f"its state is divided anew: {', '.join(moved)}")
            folder.event("note", message=text)
    elif refused:
        raise refused[0]
    folder.trim_metrics(start.step if start else -1)
    settle(folder, start.step if start else -1)
    return start


def _launch(recipe: Recipe, folder: RunFolder, first_step: int, resume_from: Path | None, attempt: int,
            look: Literal["", "profile", "dry_run"] = "") -> DistlmError | None:
    """Run one worker group to its end, or look at steps alone. Returns what stopped it, if it is not done. Raises KeyboardInterrupt."""
    from ray.exceptions import RayError
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError

    from distlm.corpus.blocks import plan_streams
    from distlm.train import backend
    from distlm.train.watchdog import FOLDER, collective_timeout, verdict

    scale, folder_ray = recipe.spec.scale, folder.path / "ray"
    resources = {"CPU": scale.cpus_per_worker, **({"GPU": scale.gpus_per_worker} if scale.gpus_per_worker else {})}
    tunables = os.environ.get("GLIBC_TUNABLES", HUGE_PAGES)                    # another value is the user's own
    on_cpu = {"DS_ACCELERATOR": "cpu", "GLIBC_TUNABLES": KEEP_MEMORY if tunables == HUGE_PAGES else tunables}
    environment = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", **({} if scale.gpus_per_worker else on_cpu),
                   **({name: os.environ.get(name, value) for name, value in ENVIRONMENT.items()} if recipe.spec.deterministic else {})}
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")          # a process of its own, where this one can look
    # beside GPUs cores are idle; of a CPU's workers as many as there are cores for would take the cores (docs/experiments.md)
    readers = 4 * scale.workers if scale.gpus_per_worker else scale.workers + 1
    shutil.rmtree(folder.path / FOLDER, ignore_errors=True)
    folder.event("running", message=f"from step {first_step}")
    nodes = alive_nodes()
    run_config = RunConfig(name=f"{folder.name}-{os.getpid()}-{look}{recipe.micro_sequences}-{attempt}", storage_path=str(folder_ray),
                           failure_config=FailureConfig(max_failures=0, controller_failure_limit=0),  # type: ignore[call-arg]
                           worker_runtime_env={"env_vars": environment})
    ranks = backend.RankConfig("nccl" if scale.gpus_per_worker else "gloo", collective_timeout(recipe.spec.guard.step_timeout_s),
                               folder.path)
    try:
        with contextlib.ExitStack() as ends:
            ends.enter_context(backend.given_back(lambda text: folder.event("note", message=text)))
            steps_left = first_step < recipe.num_steps
            streams = ends.enter_context(plan_streams(recipe.plan(), first_step, readers)) if steps_left else []
            if not look:
                ends.enter_context(_sigterm_passed_on(folder))
            backend.Trainer(partial(work, Task(recipe, folder.path, first_step, resume_from, look, streams)),
                            backend_config=ranks, run_config=run_config,
                            scaling_config=ScalingConfig(num_workers=scale.workers, use_gpu=bool(scale.gpus_per_worker),
                                                         resources_per_worker=resources)).fit()
    except (TrainingFailedError, RayError) as error:
        who = {} if isinstance(error, TrainingFailedError) else {"process": "Ray Train's controller"}
        found = verdict(folder.path) or diagnose(error, folder.path, **who)
        lost = lost_nodes(nodes) if found.cause == "worker_died" else []       # what took the worker along
        return TrainError(f"a node was lost: {', '.join(lost)}", cause="node_lost") if lost else found
    done = {"": lambda: exported(recipe, folder), "profile": (folder.path / "profile" / "profile.json").exists,
            "dry_run": lambda: len([*(folder.path / DRY_RUN).glob("*.json")]) == scale.workers}[look]()
    return None if done else TrainError("the workers ended as if they were done, and are not", cause="internal",
                                        remedy=f"their logs are in {folder.path / 'logs'}")


@contextlib.contextmanager
def _sigterm_passed_on(folder: RunFolder) -> Iterator[None]:
    """SIGTERM, with which a scheduler takes a machine back, lets the ranks save and end after their step; a second one ends the run as
    before, and so does one that comes before any step. Of a job that was submitted it is Ray's way to stop it at a user's request."""
    flag = folder.path / preempt.FLAG
    flag.unlink(missing_ok=True)
    before_steps = folder.metrics_size()
    if threading.current_thread() is not threading.main_thread() or SUBMISSION in os.environ:
        yield
        return
    before = signal.getsignal(signal.SIGTERM)

    def pass_on(*_: Any) -> None:
        signal.signal(signal.SIGTERM, before)
        if folder.metrics_size() == before_steps:          # nobody looks for the flag yet, and there is nothing to save
            os.kill(os.getpid(), signal.SIGTERM)
        flag.touch()

    signal.signal(signal.SIGTERM, pass_on)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _following(folder: RunFolder, recipe: Recipe, progress: Progress, first_step: int, on_metrics: list[OnMetrics]) -> Iterator[None]:
    """Show and pass on each record of metrics.jsonl as rank 0 writes it: the file is the truth, wherever the ranks run."""
    stop, latest_val, steps = threading.Event(), {"val_loss": math.nan}, {"done": 0, "evaluated": 0}

    to_prometheus = gauges(folder.name)
    began: dict[str, float] = {}                           # the first step: what comes before it is no training

    def eta(record: dict[str, Any]) -> dict[str, float]:
        """Seconds to the end, evaluations and checkpoints included, by the pace since the first step."""
        done, since = record["step"] - began.setdefault("step", record["step"]), record["time"] - began.setdefault("time", record["time"])
        return {"eta_s": since / done * (recipe.num_steps - record["step"])} if done else {}

    def handle(record: dict[str, Any]) -> None:
        newest = {} if record["step"] < steps["done"] else record              # what was measured beside later steps sets no clock back
        steps["done"] = max(steps["done"], record["step"])
        if "val_loss" in record and record["step"] >= steps["evaluated"]:
            latest_val["val_loss"], steps["evaluated"] = record["val_loss"], record["step"]
            newest = {**newest, "val_loss": record["val_loss"]}
        if "loss" in record:
            shown = {} if math.isnan(latest_val["val_loss"]) else latest_val
            keys = ("lr", "grad_norm", "tokens_per_s", "mfu", "memory_bytes")
            progress.update("steps", record["step"], recipe.num_steps, loss=record["loss"], **shown,
                            **{key: record[key] for key in keys if key in record}, **eta(record))
        to_prometheus(newest)
        for also in on_metrics:
            also(record)

    def follow() -> None:
        position = folder.metrics_size()
        while True:
            ending = stop.is_set()                         # read once more after the last write
            records, position = folder.metrics_from(position)
            for record in records:
                handle(record)
            if ending:
                return
            stop.wait(0.3)

    thread = threading.Thread(target=follow, daemon=True, name="follow-metrics")
    progress.update("steps", first_step, recipe.num_steps)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(timeout=10)


GAUGES = {"step": "Steps done", "loss": "Training loss, nats per token", "val_loss": "Validation loss, nats per token",
          "lr": "Learning rate", "grad_norm": "Gradient norm before clipping", "tokens_per_s": "Tokens a second",
          "mfu": "Model FLOPs utilization, 0 to 1", "memory_bytes": "Memory of rank 0"}
"""What of a record of metrics.jsonl the cluster's Prometheus endpoint shows as ray_distlm_train_NAME, by run."""


def gauges(run: str) -> OnMetrics:
    """A function that shows a record of `run` at the metrics endpoint of the driver's node."""
    from ray.util.metrics import Gauge

    made = {key: Gauge(f"distlm_train_{key}", text, ("run",)) for key, text in GAUGES.items()}

    def show(record: dict[str, Any]) -> None:
        for key, gauge in made.items():
            if key in record:
                gauge.set(record[key], {"run": run})

    return show


def exported(recipe: Recipe, folder: RunFolder) -> bool:
    """Whether the export is that of the last step, and whole: it is what a run does last."""
    export = folder.path / "export"
    try:
        return read_json(export / "distlm.json")["step"] == recipe.num_steps and not export_lacks(export)
    except StorageError:
        return False


def outcome(recipe: Recipe, folder: RunFolder) -> dict[str, Any]:
    """The job's outputs, from what the run recorded."""
    records = folder.read_metrics()
    steps, values = [r for r in records if "loss" in r], [r for r in records if "val_loss" in r]
    if not steps:
        raise TrainError("the run has no metrics", where=str(folder.path / "metrics.jsonl"), cause="storage")
    speeds = sorted(r["tokens_per_s"] for r in steps)
    last = values[-1] if values else {}
    return {"": str(folder.path), "export": str(folder.path / "export"), "parameters": recipe.parameters, "steps": recipe.num_steps,
            "tokens": recipe.tokens(recipe.num_steps), "loss_first": steps[0]["loss"], "loss_last": steps[-1]["loss"],
            "val_loss_first": values[0]["val_loss"] if values else None,
            "perplexity": last.get("val_perplexity"), "bits_per_byte": last.get("val_bits_per_byte"),
            **{key: last.get(key) for key, metric in objective_of(recipe.spec).METRICS.items() if metric.evaluated},
            "tokens_per_s": speeds[len(speeds) // 2],
            **({"skipped_steps": skipped} if (skipped := sum("skipped" in r for r in steps)) or recipe.spec.precision == "fp16" else {}),
            "checkpoint": checkpoint.checkpoint_path(folder.path, recipe.num_steps).name}
