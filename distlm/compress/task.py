"""What a compression reads and on which windows it is measured: those that `kind: evaluate` takes of the same keys."""

from pathlib import Path
from typing import Any

from distlm.evaluate.task import Task, check_generates, make_task
from distlm.evaluate.task import inputs_of as read_by_evaluation
from distlm.model.find import check_torchao, check_whole, find_model
from distlm.spec import CompressSpec, EvaluateSpec
from distlm.spec.compress import QUANTIZED
from distlm.storage import Storage


def evaluation_of(spec: CompressSpec) -> EvaluateSpec:
    """The evaluation that measures the model before, and that of the same keys measures what is made of it."""
    return EvaluateSpec(name=spec.name, model=spec.model, corpus=spec.corpus, split=spec.split, windows=spec.windows,
                        mask_documents=spec.mask_documents, batch_windows=spec.batch_windows)


def task_of(spec: CompressSpec, storage: Storage) -> tuple[Task, Path]:
    """What is measured, and the folder of the model. Raises SpecError and InputError for what cannot be done, before any work."""
    if spec.method in QUANTIZED:
        check_torchao()
    model = find_model(spec.model, storage)
    check_whole(model)
    check_generates(model)
    task = make_task(evaluation_of(spec), storage)
    if spec.method in QUANTIZED:
        left_whole(spec, model)
    else:
        from distlm.compress.prune import check

        check(spec, model)
    return task, model


def left_whole(spec: CompressSpec, model: Path) -> list[str]:
    """The linear layers of the model in this folder whose shape does not fit the method, and that stay. Raises InputError where all do."""
    from transformers import AutoConfig

    from distlm.model.build import skeleton
    from distlm.model.quantize import linear_layers

    return linear_layers(skeleton(AutoConfig.from_pretrained(model, local_files_only=True)), spec.method, spec.group_size)[1]


def inputs_of(spec: CompressSpec, storage: Storage) -> dict[str, Any]:
    """What a compression reads, by path and hash, for its lineage. Raises SpecError and InputError, before any work."""
    task_of(spec, storage)
    return read_by_evaluation(evaluation_of(spec), storage)
