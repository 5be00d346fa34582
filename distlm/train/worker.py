"""One rank of a run inside Ray Train: finds its device and its part of the stream, then runs the loop."""

import itertools
import os
import socket
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from distlm.train.dryrun import FOLDER, DryRun
from distlm.train.profile import StepProfile
from distlm.train.recipe import Recipe

if TYPE_CHECKING:
    from ray.data import DataIterator


@dataclass(frozen=True)
class Task:
    """What the driver sends to every rank."""

    recipe: Recipe
    folder: Path
    first_step: int
    resume_from: Path | None
    look: Literal["", "profile", "dry_run"] = ""
    """Look at the steps alone, and leave a profile or the memory that they take."""
    streams: Sequence["DataIterator"] = ()
    """That of each rank; none where no step is left."""


def work(task: Task) -> None:
    """The function that Ray Train runs on all ranks, which have joined their process group already (`backend.join`)."""
    import ray.train
    import ray.train.torch
    import torch

    from distlm.corpus.stream import ordered_steps

    device = ray.train.torch.get_device()
    if device.type == "cuda":                              # of this thread, and before anything asks for the current one
        torch.cuda.set_device(device)
    recipe, context = task.recipe, ray.train.get_context()
    rank, plan = context.get_world_rank(), recipe.plan()
    log_to(worker_log(task.folder, rank))
    cores = os.cpu_count() or 1
    torch.set_num_threads(recipe.spec.scale.threads_per_worker or max(1, cores // context.get_local_world_size()))
    steps: Iterator[NDArray[np.int64]] = iter(())
    if task.streams:                                       # else only the export is left to be made
        batches = task.streams[rank].iter_batches(batch_size=plan.piece, batch_format="numpy", prefetch_batches=2)
        steps = begun(ordered_steps(batches, plan, rank, task.first_step))
    # the stream's processes start while these load
    from distlm.runs import RunFolder
    from distlm.train.loop import fit

    look = (StepProfile(task.folder / "profile", rank, device.type == "cuda") if task.look == "profile" else
            DryRun(task.folder / FOLDER, rank, recipe.held) if task.look else None)
    fit(recipe, RunFolder(task.folder), steps, rank=rank, device=device, first_step=task.first_step, resume_from=task.resume_from,
        look=look)


def begun(steps: Iterator[NDArray[np.int64]]) -> Iterator[NDArray[np.int64]]:
    """The same steps, of which the first is asked for now, on a thread of its own. What that raises the first `next` raises."""
    first: Future[list[NDArray[np.int64]]] = Future()

    def ask() -> None:
        try:
            first.set_result([*itertools.islice(steps, 1)])
        except BaseException as error:
            first.set_exception(error)

    def in_order() -> Iterator[NDArray[np.int64]]:
        yield from first.result()
        yield from steps

    threading.Thread(target=ask, daemon=True, name="first-step").start()
    return in_order()


def worker_log(folder: Path, rank: int) -> Path:
    """Where a rank's output lies, attempt after attempt."""
    return folder / "logs" / f"worker-{rank}.log"


def log_to(path: Path) -> None:
    """Let this process write to `path` from here on, libraries too: Ray's own log goes with the cluster, and lies on the worker's node."""
    path.parent.mkdir(parents=True, exist_ok=True)
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream, number in ((sys.stdout, 1), (sys.stderr, 2)):
        stream.flush()
        os.dup2(log, number)
    os.write(log, f"--- process {os.getpid()} on {socket.gethostname()}\n".encode())
    os.close(log)
