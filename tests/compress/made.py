"""Compressions without Ray, of the model m on the corpus text of conftest.py."""

from pathlib import Path
from typing import Any

from distlm.compress.task import task_of
from distlm.compress.worker import Compressor
from distlm.evaluate.tokens import outcome
from distlm.spec import CompressSpec
from distlm.storage import Storage


def spec(method: str, **keys: Any) -> CompressSpec:
    return CompressSpec.model_validate({"kind": "compress", "name": "c", "model": "m", "method": method, "corpus": "text", "threads": 1,
                                        **keys})


def compressed(root: Path, method: str, folder: Path, lineage: dict[str, Any] | None = None,
               **keys: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """What was done, and the measures before and after, by a worker in this process."""
    one = spec(method, **keys)
    task, source = task_of(one, Storage(root))
    worker = Compressor(one, task, source, folder)
    worker.load()
    done = worker.compress(lineage or {})
    before, after = (outcome(task, side, [worker.score(side, i) for i in range(len(task.batches))]) for side in ("before", "after"))
    measured = worker.measure(rounds=1)
    return done, before | measured["before"], after | measured["after"]
