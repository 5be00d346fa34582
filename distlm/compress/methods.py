"""What each method does to a model, in place."""

from typing import Any

from distlm.evaluate.task import Task
from distlm.spec import CompressSpec
from distlm.spec.compress import QUANTIZED


def compress(model: Any, spec: CompressSpec, task: Task) -> dict[str, Any]:
    """Compress a model in place. Returns what was done, for the records. Raises InputError where its family does not fit."""
    done: dict[str, Any] = {"method": spec.method}
    if spec.method in QUANTIZED:
        from distlm.model.quantize import quantize

        if spec.method == "int4_weight_only":
            done["group_size"] = spec.group_size
        return {**done, **quantize(model, spec.method, spec.group_size)}
    from distlm.compress.prune import magnitude, structured

    return {**done, **(structured(model, spec, task) if spec.method == "structured" else magnitude(model, spec.sparsity))}
