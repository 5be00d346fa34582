"""One rank of a run inside Ray Train: finds its device and its part of the stream, then runs the loop."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from distlm.train.recipe import Recipe


@dataclass(frozen=True)
class Task:
    """What the driver sends to every rank."""

    recipe: Recipe
    folder: Path
    first_step: int
    resume_from: Path | None


def work(config: dict[str, Task]) -> None:
    """The function that Ray Train runs on all ranks; it has made the process group already."""
    import ray.train
    import ray.train.torch
    import torch

    from distlm.corpus.stream import ordered_steps
    from distlm.runs import RunFolder
    from distlm.train.loop import fit

    task = config["task"]
    recipe, context = task.recipe, ray.train.get_context()
    rank, plan = context.get_world_rank(), recipe.plan()
    cores = os.cpu_count() or 1
    torch.set_num_threads(recipe.spec.scale.threads_per_worker or max(1, cores // context.get_local_world_size()))
    steps: Iterator[NDArray[np.int64]] = iter(())
    if task.first_step < recipe.num_steps:                 # else only the export is left to be made
        batches = ray.train.get_dataset_shard("train").iter_batches(batch_size=plan.share, batch_format="numpy", prefetch_batches=2)
        steps = ordered_steps(batches, plan, rank, task.first_step)
    fit(recipe, RunFolder(task.folder), steps, rank=rank, device=ray.train.torch.get_device(), first_step=task.first_step,
        resume_from=task.resume_from)
