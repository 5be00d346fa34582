"""A run that makes a smaller model, or mends one, beside what it began with, on the run's own validation windows: a student and its
teacher, what was trained on and the pruned model that it was.

    outputs |= beside(spec, folder, storage, progress)     # after the run: measures by side, or nothing where there is none
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from distlm.compress.driver import scored
from distlm.compress.worker import Sides
from distlm.errors import DistlmError
from distlm.evaluate.driver import answer
from distlm.evaluate.task import Task, make_task
from distlm.evaluate.worker import default_threads
from distlm.progress import Progress
from distlm.runs import RunFolder
from distlm.runs.report import write_report
from distlm.spec import EvaluateSpec, TrainSpec
from distlm.storage import Storage, read_json
from distlm.train.recipe import Recipe, make_recipe

OBJECTIVES = ("pretrain", "sft", "distill")
"""Those by which a model stays what it was, or becomes like its teacher: a classifier is no smaller language model."""


def beside(spec: TrainSpec, folder: RunFolder, storage: Storage, progress: Progress) -> dict[str, Any]:
    """`sides`, the measures of each model by its name, which the page of the run then has too; empty for a run that does not compress.
    The run has ended well: what cannot be measured is told, and fails nothing. Ray is initialised."""
    if spec.objective not in OBJECTIVES:
        return {}
    try:
        recipe = make_recipe(spec, storage)
        models = models_of(recipe, folder)
        if len(models) < 2:
            return {}
        sides = measured(recipe, models, storage, folder, progress)
    except DistlmError as error:
        progress.note(told := f"the run is not measured beside what it began with: {error}")
        folder.event("note", message=told)
        return {}
    write_report(folder, sides)
    return {"sides": sides}


def models_of(recipe: Recipe, folder: RunFolder) -> dict[str, Path]:
    """The folders of the models by what they are to the run, in the order of their making. The model that was pruned is among them where it
    is still what it was."""
    spec, found = recipe.spec, dict[str, Path]()
    if spec.distill:
        found["teacher"] = Path(spec.distill.teacher)
    source = Path(spec.model.source or "")
    told = lineage_of(source) if spec.model.source else {}
    if "compression" in told or spec.keep_zeros:
        parent = told.get("parent", {})
        whole = Path(parent.get("model", ""))
        as_it_was = (whole / "config.json").is_file() and {"model": str(whole), **lineage_of(whole)} == parent
        if as_it_was and whole not in found.values():
            found["whole"] = whole
        found["pruned"] = source
    return {**found, "student" if spec.distill else "recovered": folder.path / "export"}


def lineage_of(model: Path) -> dict[str, Any]:
    """What an export says of itself; nothing where it is none of ours."""
    told = model / "distlm.json"
    return dict(read_json(told)) if told.is_file() else {}


def task_of(recipe: Recipe, model: Path, storage: Storage) -> Task:
    """The validation windows of the run, with attention as in training; none where the corpora have none."""
    if not recipe.val:
        return Task("val", (), 1, 1)
    counts = {part.corpus: part.windows for part in recipe.val}
    task = make_task(EvaluateSpec(name="beside", model=str(model), corpus=[*counts], windows=max(counts.values()),
                                  mask_documents=recipe.mask_documents), storage)
    return replace(task, parts=tuple(replace(part, windows=counts[part.corpus]) for part in task.parts))


def measured(recipe: Recipe, models: dict[str, Path], storage: Storage, folder: RunFolder, progress: Progress) -> dict[str, Any]:
    """The measures of each model by one worker, as `kind: evaluate` has them. Raises what that does."""
    import ray

    scale, log = recipe.spec.scale, folder.path / "logs" / "beside.log"
    task = task_of(recipe, models["student" if "student" in models else "recovered"], storage)
    environment = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    actor = ray.remote(num_cpus=scale.cpus_per_worker, num_gpus=scale.gpus_per_worker, runtime_env={"env_vars": environment})(Sides)
    worker: Any = actor.remote(task, "cuda" if scale.gpus_per_worker else "cpu", "bf16" if scale.gpus_per_worker else "fp32",
                               scale.threads_per_worker or default_threads(1), log)
    progress.note(f"{' and '.join(models)} side by side")
    try:
        for name, model in models.items():
            answer(ray, worker.add.remote(name, model), log)
        scores = {name: scored(ray, worker, name, task, log, progress) if task.parts else {} for name in models}
        speeds = answer(ray, worker.measure.remote(), log)
    finally:
        ray.kill(worker)
    return {name: {"model": str(model), **scores[name], **speeds[name]} for name, model in models.items()}
