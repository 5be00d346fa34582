"""The compress job: a model is measured, compressed, written as an export, and what a server would load of that is measured again."""

from pathlib import Path
from typing import Any

from distlm.autoscale import compress_bundles, require
from distlm.compress.report import write_report
from distlm.compress.task import task_of
from distlm.compress.worker import Compressor
from distlm.errors import InputError
from distlm.evaluate.driver import answer
from distlm.evaluate.task import Task
from distlm.evaluate.tokens import outcome
from distlm.progress import Progress
from distlm.runs import RunFolder
from distlm.spec import CompressSpec
from distlm.storage import Storage, read_json

MEASURES = ("loss", "perplexity", "accuracy", "bits_per_byte", "tokens")


def compress(spec: CompressSpec, folder: RunFolder, storage: Storage, progress: Progress) -> dict[str, Any]:
    """Write `export/` and report.html. Ray is initialised. Raises SpecError, InputError, ClusterError, CorpusError, EvaluationError."""
    import ray

    task, source = task_of(spec, storage)
    require(compress_bundles(spec), "the worker", progress, where="cpus", remedy="lower cpus, or take a larger cluster")
    log, target = folder.path / "logs" / "worker-0.log", folder.path / "export"
    environment = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    actor = ray.remote(num_cpus=spec.cpus, num_gpus=spec.gpus, runtime_env={"env_vars": environment})(Compressor)
    worker: Any = actor.remote(spec, task, source, target, log)
    folder.event("running", message=f"{source}, {task.windows:,} windows")
    try:
        progress.note(f"{source} by {spec.method}, measured on {task.windows:,} windows of {task.parts[0].name}")
        answer(ray, worker.load.remote(), log)
        before = scored(ray, worker, "before", task, log, progress)
        done = answer(ray, worker.compress.remote(lineage_of(source, folder)), log)
        after = scored(ray, worker, "after", task, log, progress)
        progress.note("sizes and speeds of both, in turns")
        measured = answer(ray, worker.measure.remote(), log)
    finally:
        ray.kill(worker)
    sides = {"before": before | measured["before"], "after": after | measured["after"]}
    outputs = {"": str(folder.path), "export": str(target), "model": str(source), "compression": done, "split": task.split,
               "windows": task.windows, "loss": after["loss"], "loss_before": before["loss"], "bytes": sides["after"]["bytes"],
               "bytes_before": sides["before"]["bytes"], **sides}
    write_report(folder, outputs)
    return outputs


def scored(ray: Any, worker: Any, side: str, task: Task, log: Path, progress: Progress) -> dict[str, Any]:
    """The measures of a side, those of `kind: evaluate` on the same windows to the last bit."""
    waiting, sums = [worker.score.remote(side, batch) for batch in range(len(task.batches))], []
    for i, one in enumerate(waiting):
        sums.append(answer(ray, one, log))
        progress.update(f"windows {side}", sum(count for _, _, count in task.batches[:i + 1]), task.windows)
    found = outcome(task, side, sums)
    if not found["tokens"]:
        raise InputError(f"no token of the {task.windows:,} windows gives loss", where="windows",
                         remedy="take more windows, or another corpus")
    return {key: found[key] for key in MEASURES}


def lineage_of(source: Path, folder: RunFolder) -> dict[str, Any]:
    """What the export says that it was made of: the corpora of its parent, and under `parent` all that the parent says of itself."""
    told = source / "distlm.json"
    parent = read_json(told) if told.is_file() else {}
    its = ("trial", "step", "checkpoint", "val_loss", "val_loss_as_held", "parent")
    own = {key: value for key, value in parent.items() if key not in its}
    return {**own, "run": folder.name, "parent": {"model": str(source), **parent}}
