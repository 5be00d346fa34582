"""Weights that are averaged: over steps while training goes on, or over the last checkpoints at its end.

Both work on the fp32 masters, each rank on its part of them, wherever DeepSpeed keeps them.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import distributed

from distlm.errors import CheckpointError
from distlm.runs import RunFolder
from distlm.train import checkpoint
from distlm.train.recipe import Recipe


class Ema:
    """An exponential moving average of the weights, begun with the first ones: e += (1 - d) (w - e) after each step."""

    def __init__(self, decay: float, engine: Any) -> None:
        self._decay = decay
        self.values = [part.detach().clone() for part in masters(engine)]
        """This rank's part, parallel to `masters`; a checkpoint holds it."""

    @torch.no_grad()
    def update(self, engine: Any, done: int) -> None:
        """Take in the weights after `done` steps. d is at most (1 + done) / (10 + done), as in TensorFlow's ExponentialMovingAverage: the
        first weights are soon forgotten."""
        torch._foreach_lerp_(self.values, masters(engine), 1 - min(self._decay, (1 + done) / (10 + done)))

    @contextlib.contextmanager
    def in_place(self, engine: Any) -> Iterator[None]:
        """The model has the averaged weights inside, and its own, to the bit, after. All ranks take part."""
        self._swap(engine)
        try:
            yield
        finally:
            self._swap(engine)

    @torch.no_grad()
    def _swap(self, engine: Any) -> None:
        for value, part in zip(self.values, masters(engine), strict=True):
            kept = part.detach().clone()
            part.copy_(value)
            value.copy_(kept)
        spread(engine)


@torch.no_grad()
def take_mean(engine: Any, folder: RunFolder, recipe: Recipe, rank: int) -> list[str]:
    """Give the model the mean of the run's last `checkpoint.average` checkpoints, whose names are returned; that there are fewer is noted
    in the events. All ranks take part; training cannot go on after it. Raises CheckpointError where one is damaged."""
    asked = recipe.spec.checkpoint.average
    paths = checkpoint.due(folder.path)[-asked:]
    if rank == 0:
        if len(paths) < asked:
            folder.event("note", message=f"the export is the mean of {len(paths)} checkpoints and not of {asked}: no more are left")
        for path in paths:
            try:
                checkpoint.verified(path)
            except CheckpointError as error:
                error.remedy = f"resume with checkpoint.average: {len(paths) - 1 - paths.index(path) or 1}, the ones after it"
                raise
    distributed.barrier()
    sums: list[torch.Tensor] = []
    for path in paths:
        checkpoint.load(engine, path, recipe, rank)
        sums = [part.detach().clone() + (sums[i] if sums else 0) for i, part in enumerate(masters(engine))]
    for total, part in zip(sums, masters(engine), strict=True):
        part.copy_(total / len(paths))
    spread(engine)
    return [path.name for path in paths]


def masters(engine: Any) -> list[torch.Tensor]:
    """The fp32 weights that this rank updates: ZeRO's flat partitions, the copies behind bf16 weights, or the parameters themselves."""
    optimizer = engine.optimizer
    for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition"):    # stage 3; 1 and 2
        if hasattr(optimizer, name):
            return list(getattr(optimizer, name))
    if hasattr(optimizer, "fp32_groups"):
        return [part for group in optimizer.fp32_groups for part in group]
    return [p for group in optimizer.param_groups for p in group["params"]]


def spread(engine: Any) -> None:
    """Bring changed masters to the weights that the model computes with, as DeepSpeed does after a step. All ranks take part."""
    optimizer = engine.optimizer
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        optimizer._partition_all_parameters()
        for i in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(i)
        optimizer._post_step([])
    elif hasattr(optimizer, "update_lp_params"):
        optimizer.update_lp_params()
        for i in range(len(getattr(optimizer, "bit16_groups", []))):
            optimizer._update_model_bit16_weights(i)
    elif hasattr(optimizer, "fp32_groups"):
        for precise, rounded in zip(optimizer.fp32_groups, optimizer.fp16_groups, strict=True):
            for master, parameter in zip(precise, rounded, strict=True):
                parameter.data.copy_(master)
