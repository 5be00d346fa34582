"""The average job: several runs become one, as the mean of their weights, and each step of it is measured on the same windows.

The scores of a candidate are those of its file, so that what was measured is what is exported.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distlm.average.report import write_report
from distlm.average.weights import check_alike, write_mean
from distlm.corpus.manifest import manifest_hash
from distlm.errors import InputError
from distlm.evaluate.driver import Workers
from distlm.evaluate.kinds import kind_of
from distlm.evaluate.task import Task, check_model, make_task, read_corpora
from distlm.model.adapter import base_hash
from distlm.model.find import find_model
from distlm.model.reading import recorded_reading
from distlm.progress import Progress
from distlm.runs import RunFolder
from distlm.spec import AverageSpec
from distlm.storage import Storage
from distlm.text.clean import common
from distlm.train.scores import LABELS, LANGUAGE


def average(spec: AverageSpec, folder: RunFolder, storage: Storage, progress: Progress) -> dict[str, Any]:
    """Measure the models, average all of them or those that lower the loss, and export it; write report.html. Ray is initialised. Raises
    SpecError, InputError, ClusterError, CorpusError, EvaluationError."""
    models = find_models(spec, storage)
    task = make_task(spec.scoring(str(models[0])), storage)
    folder.event("running", message=f"{len(models)} models, {task.windows:,} windows")
    candidate = folder.path / "candidate"
    try:
        with Workers(spec.scoring(str(models[0])), task, folder, progress) as workers:
            alone = [measured(task, model, workers) for model in models]
            for name, found in zip(spec.models, alone, strict=True):
                progress.note(f"{name}: loss {found['loss']:.4f}")
            order = sorted(range(len(models)), key=lambda i: alone[i]["loss"])
            if spec.method == "uniform":
                taken, tried = order, dict[int, float]()
                write_mean([models[i] for i in taken], candidate, {})
                soup = measured(task, candidate, workers)
            else:
                taken, tried, soup = greedy(spec, task, models, alone, order, candidate, workers, progress)
        progress.note(f"the mean of {', '.join(spec.models[i] for i in taken)}: loss {soup['loss']:.4f}" if len(taken) > 1 else
                      f"no mean has a lower loss than {spec.models[taken[0]]} alone")
        write_mean([models[i] for i in taken], folder.path / "export", lineage_of(spec, folder, [models[i] for i in taken], task, soup))
    finally:
        shutil.rmtree(candidate, ignore_errors=True)
    keys = LABELS if task.labels else LANGUAGE
    outputs = {"": str(folder.path), "export": str(folder.path / "export"), "method": spec.method, "split": spec.split,
               "windows": task.windows, **({"labels": [*task.labels]} if task.labels else {}), **{key: soup[key] for key in keys},
               "averaged": len(taken),
               "best": str(models[order[0]]), "best_loss": alone[order[0]]["loss"],
               "models": [{"model": spec.models[i], "path": str(models[i]), "taken": i in taken, "with": tried.get(i),
                           **{key: alone[i][key] for key in keys}} for i in order]}
    write_report(folder, outputs)
    return outputs


def greedy(spec: AverageSpec, task: Task, models: list[Path], alone: list[dict[str, Any]], order: list[int], candidate: Path,
           workers: Workers, progress: Progress) -> tuple[list[int], dict[int, float], dict[str, Any]]:
    """(the models that are taken, the loss of the mean with each that was tried, the scores of the last mean that was kept): recipe 1 of
    Wortsman et al. 2022, with the loss in place of the accuracy."""
    taken, tried, soup = order[:1], {}, alone[order[0]]
    for i in order[1:]:
        write_mean([models[j] for j in [*taken, i]], candidate, {})
        found = measured(task, candidate, workers)
        tried[i], keep = found["loss"], found["loss"] <= soup["loss"]
        progress.note(f"with {spec.models[i]}: loss {found['loss']:.4f}, {'kept' if keep else 'left out'}")
        if keep:
            taken, soup = [*taken, i], found
    return taken, tried, soup


def measured(task: Task, model: Path, workers: Workers) -> dict[str, Any]:
    """The scores of one model. Raises InputError where no token of the windows gives loss."""
    found = kind_of(task).outcome(task, str(model), workers.score(model))
    if found.get("tokens") == 0:
        raise InputError(f"no token of the {task.windows:,} windows gives loss", where="windows",
                         remedy="take more windows, or other corpora")
    return found


def find_models(spec: AverageSpec, storage: Storage) -> list[Path]:
    """The folders of the models. Raises InputError for one that is not there, that is there twice, or that is not like the first, and for a
    corpus that they do not read."""
    models = [find_model(text, storage, f"models.{i}").resolve() for i, text in enumerate(spec.models)]
    own = storage.run(spec.name).resolve()
    for i, model in enumerate(models):
        if model.is_relative_to(own):
            raise InputError("the average would be written over it", where=f"models.{i}: {model}", remedy="take another name")
    if twice := next((i for i, model in enumerate(models) if model in models[:i]), 0):
        raise InputError(f"it is {spec.models[models.index(models[twice])]} again", where=f"models.{twice}: {models[twice]}",
                         remedy="give it once")
    check_alike(models, "models")
    masked = any(part.mask_documents for part in make_task(spec.scoring(str(models[0])), storage).parts)
    for model in models[1:]:
        check_model(model, read_corpora(spec.scoring(str(model)), storage), masked)
    return models


def inputs_of(spec: AverageSpec, storage: Storage) -> dict[str, Any]:
    """What the job reads, by path and hash, for its lineage. Raises SpecError and InputError, before any work."""
    models = find_models(spec, storage)
    task = make_task(spec.scoring(str(models[0])), storage)
    return {"models": {str(model): base_hash(str(model)) for model in models},
            "corpora": {part.corpus: manifest_hash(part.corpus) for part in task.parts}}


def lineage_of(spec: AverageSpec, folder: RunFolder, taken: list[Path], task: Task, soup: dict[str, Any]) -> dict[str, Any]:
    """What the endpoint tells about its model."""
    return {"run": folder.name, "trial": None, "corpus": ", ".join(part.name for part in task.parts),
            "corpus_hash": ", ".join(manifest_hash(part.corpus) for part in task.parts), "checkpoint": None,
            "val_loss": soup["loss"] if spec.split == "val" else None, "method": spec.method,
            "averaged": {str(model): base_hash(str(model)) for model in taken}, **(reading_of(taken) if task.labels else {})}


def reading_of(models: Sequence[Path]) -> dict[str, Any]:
    """What an endpoint makes of a text before classifiers read it, where all of them have it made: the rules of cleaning on which they
    agree, and the shortest length to which they have it cut. Raises InputError for what are no such rules."""
    found = [recorded_reading(model) for model in models]
    rules = [one.clean.model_dump() for one in found if one.clean]
    cuts = [one.cut_tokens for one in found if one.cut_tokens]
    return {**({"clean": common(rules)} if len(rules) == len(models) else {}),
            **({"cut_tokens": min(cuts)} if len(cuts) == len(models) else {})}
