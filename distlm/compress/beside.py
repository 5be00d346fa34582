"""A run that makes a smaller model, or mends one, beside what it began with, on the run's own validation windows: a student and its
teacher, what was trained on and the pruned model that it was.

    outputs |= beside(spec, folder, storage, progress)     # after the run: measures by side, or nothing where there is none
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from distlm.autoscale import require
from distlm.compress.driver import scored, started
from distlm.compress.worker import Sides
from distlm.errors import DistlmError
from distlm.evaluate.task import Task, make_task
from distlm.model.adapter import base_hash
from distlm.progress import Progress
from distlm.runs import RunFolder
from distlm.runs.report import write_report
from distlm.spec import EvaluateSpec, TrainSpec
from distlm.storage import Storage, read_json
from distlm.train.recipe import Recipe, make_recipe

OBJECTIVES = ("pretrain", "sft", "distill")
"""Those by which a model stays what it was, or becomes like its teacher: a classifier is no smaller language model."""

LESS = "one worker holds all of them: `kind: evaluate` measures each alone, or lower batch.micro_sequences"
"""What to do where memory is short."""


def beside(spec: TrainSpec, folder: RunFolder, storage: Storage, progress: Progress) -> dict[str, Any]:
    """`sides`, the measures of each model by its name, which the page of the run then has too; empty for a run that does not compress.
    The run has ended well: what cannot be measured is told, and fails nothing. Ray is initialised. Raises KeyboardInterrupt alone."""
    if spec.objective not in OBJECTIVES or not (spec.distill or spec.model.source):
        return {}

    def tell(cause: str, why: str) -> None:
        progress.note(told := f"the run is not measured beside what it began with: {why}")
        folder.event("note", cause, told)

    try:
        recipe = make_recipe(spec, storage)
        models = models_of(recipe, folder)
        if len(models) < 2:
            return {}
        sides = measured(recipe, models, storage, folder, progress)
        write_report(folder, sides)
        return {"sides": sides}
    except KeyboardInterrupt:
        tell("user", "interrupted")
        raise
    except DistlmError as error:
        tell(error.cause, str(error))
    except Exception as error:
        tell("internal", f"{type(error).__name__}: {error}")
    return {}


def models_of(recipe: Recipe, folder: RunFolder) -> dict[str, Path]:
    """The folders of the models by what they are to the run, in the order of their making. The model that was pruned is among them where it
    is still what it was, by the hash of its weights."""
    spec, found = recipe.spec, dict[str, Path]()
    if spec.distill:
        found["teacher"] = Path(spec.distill.teacher)
    source = Path(spec.model.source or "")
    told = lineage_of(source) if spec.model.source else {}
    if "compression" in told or spec.keep_zeros:
        parent = told.get("parent")
        whole, weights = (Path(str(parent.get("model"))), parent.get("weights_hash")) if isinstance(parent, dict) else (Path(), None)
        if weights and (whole / "config.json").is_file() and base_hash(str(whole)) == weights and whole not in found.values():
            found["whole"] = whole
        found["pruned"] = source
    return {**found, "student" if spec.distill else "recovered": folder.path / "export"}


def lineage_of(model: Path) -> dict[str, Any]:
    """What an export says of itself; nothing where it is none of ours."""
    path = model / "distlm.json"
    told = read_json(path) if path.is_file() else {}
    return told if isinstance(told, dict) else {}


def task_of(recipe: Recipe, model: Path, storage: Storage) -> Task:
    """The validation windows of the run, in its micro-batches, with attention as in training; none where the corpora have none."""
    if not recipe.val:
        return Task("val", (), 1, 1)
    counts = {part.corpus: part.windows for part in recipe.val}
    task = make_task(EvaluateSpec(name="beside", model=str(model), corpus=[*counts], windows=max(counts.values()),
                                  batch_windows=recipe.micro_sequences, mask_documents=recipe.mask_documents), storage)
    return replace(task, parts=tuple(replace(part, windows=counts[part.corpus]) for part in task.parts))


def measured(recipe: Recipe, models: dict[str, Path], storage: Storage, folder: RunFolder, progress: Progress) -> dict[str, Any]:
    """The measures of each model by one worker, as `kind: evaluate` has them. Raises what that does."""
    scale, log = recipe.spec.scale, folder.path / "logs" / "beside.log"
    device, dtype = ("cuda", "bf16") if scale.gpus_per_worker else ("cpu", "fp32")
    require([{"CPU": scale.cpus_per_worker, "GPU": scale.gpus_per_worker}], "the worker that measures", progress, where="scale",
            remedy="take a larger cluster")
    task = task_of(recipe, models["student" if "student" in models else "recovered"], storage)
    progress.note(f"{' and '.join(models)} side by side")
    with started(Sides, scale.cpus_per_worker, scale.gpus_per_worker, log, LESS, task, device, dtype, scale.threads_per_worker,
                 log) as (worker, ask):
        for name, model in models.items():
            ask(worker.add.remote(name, model))
        scores = {name: scored(ask, worker, name, task, progress) if task.parts else {} for name in models}
        speeds = ask(worker.measure.remote())
    return {name: {"model": str(model), **scores[name], **speeds[name]} for name, model in models.items()}
