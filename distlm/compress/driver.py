"""The compress job: a model is measured, compressed, written as an export, and what a server would load of that is measured again."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from distlm.autoscale import compress_bundles, require
from distlm.compress.report import write_report
from distlm.compress.task import task_of
from distlm.compress.worker import Compressor, Sides
from distlm.errors import InputError
from distlm.evaluate.driver import answer
from distlm.evaluate.task import Task
from distlm.evaluate.tokens import outcome
from distlm.model.adapter import base_hash
from distlm.progress import Progress
from distlm.runs import RunFolder
from distlm.spec import CompressSpec
from distlm.storage import Storage, read_json

MEASURES = ("loss", "perplexity", "accuracy", "bits_per_byte", "tokens")
Ask = Callable[[Any], Any]
"""Waits for what a method of the worker answers. Raises what `evaluate.driver.answer` does."""


def compress(spec: CompressSpec, folder: RunFolder, storage: Storage, progress: Progress) -> dict[str, Any]:
    """Write `export/` and report.html. Ray is initialised. Raises SpecError, InputError, ClusterError, CorpusError, EvaluationError."""
    task, source = task_of(spec, storage)
    require(compress_bundles(spec), "the worker", progress, where="cpus", remedy="lower cpus, or take a larger cluster")
    log, target = folder.path / "logs" / "worker-0.log", folder.path / "export"
    folder.event("running", message=f"{source}, {task.windows:,} windows")
    with started(Compressor, spec.cpus, spec.gpus, log, "lower batch_windows", spec, task, source, target, log) as (worker, ask):
        progress.note(f"{source} by {spec.method}, measured on {task.windows:,} windows of {task.parts[0].name}")
        ask(worker.load.remote())
        before = scored(ask, worker, "before", task, progress)
        done = ask(worker.compress.remote(lineage_of(source, folder)))
        after = scored(ask, worker, "after", task, progress)
        progress.note("sizes and speeds of both, in turns")
        measured = ask(worker.measure.remote())
    sides = {"before": before | measured["before"], "after": after | measured["after"]}
    outputs = {"": str(folder.path), "export": str(target), "model": str(source), "compression": done, "split": task.split,
               "windows": task.windows, "loss": after["loss"], "loss_before": before["loss"], "bytes": sides["after"]["bytes"],
               "bytes_before": sides["before"]["bytes"], **sides}
    write_report(folder, outputs)
    return outputs


@contextlib.contextmanager
def started(kind: type[Sides], cpus: float, gpus: float, log: Path, less: str, *given: Any) -> Iterator[tuple[Any, Ask]]:
    """A worker made of what is `given`, until the block ends, and how to wait for it. `log`: where it writes; `less`: what to do where
    memory is short. Ray is initialised."""
    import ray

    environment = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    worker: Any = ray.remote(num_cpus=cpus, num_gpus=gpus, runtime_env={"env_vars": environment})(kind).remote(*given)
    try:
        yield worker, lambda reference: answer(ray, reference, log, less)
    finally:
        ray.kill(worker)


def scored(ask: Ask, worker: Any, side: str, task: Task, progress: Progress) -> dict[str, Any]:
    """The measures of a side, those of `kind: evaluate` on the same windows to the last bit."""
    waiting, sums = [worker.score.remote(side, batch) for batch in range(len(task.batches))], []
    for i, one in enumerate(waiting):
        sums.append(ask(one))
        progress.update(f"windows {side}", sum(count for _, _, count in task.batches[:i + 1]), task.windows)
    found = outcome(task, side, sums)
    if not found["tokens"]:
        raise InputError(f"no token of the {task.windows:,} windows gives loss", where="windows",
                         remedy="take more windows, or another corpus")
    return {key: found[key] for key in MEASURES}


def lineage_of(source: Path, folder: RunFolder) -> dict[str, Any]:
    """What the export says that it was made of: the corpora of its parent, and under `parent` all that the parent says of itself,
    with a hash of its weights."""
    told = source / "distlm.json"
    parent = read_json(told) if told.is_file() else {}
    its = ("trial", "step", "checkpoint", "val_loss", "val_loss_as_held", "parent")
    own = {key: value for key, value in parent.items() if key not in its}
    return {**own, "run": folder.name, "parent": {"model": str(source), "weights_hash": base_hash(str(source)), **parent}}
