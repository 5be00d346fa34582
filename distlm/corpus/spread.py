"""One function over many items, as tasks of Ray Data.

    for index, result in spread(tokenize, partitions, workers=4, keep=scratch / "tokenize"): ...
"""

import contextlib
import functools
import logging
import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import ray
import ray.data
from ray.exceptions import NodeDiedError, OutOfMemoryError, WorkerCrashedError

from distlm.errors import DistlmError
from distlm.storage import write_atomic

Item = TypeVar("Item")
Result = TypeVar("Result")
MAX_RETRIES = 4
"""Of a part whose worker died. Ray Data has no limit of its own."""


def spread(function: Callable[[Item], Result], items: Sequence[Item], workers: int,
           keep: Path | None = None) -> Iterator[tuple[int, Result]]:
    """Yield (index, function(item)) in the order in which tasks end, `workers` at a time. A task that is lost with its node is run
    again, so that `function` must come to the same files and result each time. Results are kept in the folder `keep`: a job that
    was killed and comes again with the same folder finds there what was done. Raises the first DistlmError of a task, or one for a task
    whose worker dies again and again, as it does of a document that no library survives; others may still be running then."""
    done = {i: _kept_file(keep, i).read_bytes() for i in range(len(items)) if keep and _kept_file(keep, i).exists()}
    yield from ((i, pickle.loads(result)) for i, result in done.items())
    waiting = [i for i in range(len(items)) if i not in done]
    if not waiting:
        return
    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = context.print_on_execution_start = False
    context.execution_no_progress_timeout_s = -1           # one task may be long
    workers = min(workers, len(waiting))
    cpus = max(0.01, min(1.0, ray.cluster_resources().get("CPU", 1.0) / workers))
    with ray.data.DataContext.current(context), _quiet(), _from_the_start():
        blocks = [{"index": i, "item": pickle.dumps(items[i])} for i in waiting]
        dataset = ray.data.from_items(blocks, override_num_blocks=len(blocks)).map_batches(
            functools.partial(_run, function, keep), batch_size=None, num_cpus=cpus, compute=ray.data.TaskPoolStrategy(size=workers),
            max_retries=MAX_RETRIES)
        rows: Any = iter(dataset.iter_rows())
        with contextlib.closing(rows):                     # what has not begun when an error comes does not begin
            while (row := _next(rows, keep.name if keep else function.__name__)) is not None:
                result = pickle.loads(row["result"])
                if isinstance(result, DistlmError):
                    raise result
                yield row["index"], result


def _next(rows: Iterator[dict[str, Any]], stage: str) -> dict[str, Any] | None:
    try:
        return next(rows, None)
    except (WorkerCrashedError, NodeDiedError, OutOfMemoryError) as error:
        raise DistlmError(f"a worker died {MAX_RETRIES + 1} times at the same part: {str(error).splitlines()[0]}", where=f"stage {stage}",
                          cause="worker_died", remedy="its log in the dashboard may say of what; --resume goes on where the job stopped, "
                                                      "with fewer workers if it was memory") from None


def _kept_file(keep: Path, index: int) -> Path:
    return keep / f"{index:06d}.pickle"


def _run(function: Callable[[Any], Any], keep: Path | None, batch: dict[str, Any]) -> dict[str, Any]:
    results = []
    for index, item in zip(batch["index"], batch["item"], strict=True):
        try:
            results.append(pickle.dumps(function(pickle.loads(item))))
            if keep:
                write_atomic(_kept_file(keep, index), results[-1])
        except DistlmError as error:                       # as a value, it comes back as it is
            results.append(pickle.dumps(error))
    return {"index": batch["index"], "result": results}


@contextlib.contextmanager
def _from_the_start() -> Iterator[None]:
    """Let all workers begin at once: Ray Data asks what the cluster holds, begins with one task, and looks for the answer a second later,
    which is as long as many a stage takes. There is no public setting for it."""
    from ray.data._internal.execution.resource_manager import ResourceManager

    manager: Any = ResourceManager
    before = manager.GLOBAL_LIMITS_UPDATE_INTERVAL_S
    manager.GLOBAL_LIMITS_UPDATE_INTERVAL_S = 0.02
    try:
        yield
    finally:
        manager.GLOBAL_LIMITS_UPDATE_INTERVAL_S = before


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep Ray Data's own lines off the terminal: what goes wrong is raised, and its log files have it all."""
    handlers = [handler for handler in logging.getLogger("ray.data").handlers if isinstance(handler, logging.StreamHandler)]
    levels = [handler.level for handler in handlers]
    for handler in handlers:
        handler.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for handler, level in zip(handlers, levels, strict=True):
            handler.setLevel(level)


def default_workers() -> int:
    """The cluster's CPUs; of a single node, no more than its cores, whatever number it was given."""
    cpus = int(ray.cluster_resources().get("CPU", 1))
    return max(1, cpus if len(ray.nodes()) > 1 else min(cpus, os.cpu_count() or 1))
