"""What stops a step before its update: a loss or a gradient that is not finite, and a loss that is far above those before it.

Every rank comes to the same decision out of the same numbers. Where something is not finite, the micro-batches go through the model once
more, with the same random numbers, to find whose they were.
"""

import contextlib
import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import distributed

from distlm.errors import TrainError
from distlm.spec.train import Spike
from distlm.train.batch import Batch
from distlm.train.recipe import Recipe

TO_SIGMA = 1.4826
"""The standard deviation of a normal distribution over its median absolute deviation."""


class SpikeGuard:
    """The losses of the last steps, and whether the next one is far above them: by the rule of Hampel (1974), loss > median + factor *
    1.4826 * median absolute deviation. A thousandth of the median is the least deviation. Every loss is taken in, so that a level that
    stays becomes the usual one."""

    def __init__(self, spec: Spike | None, losses: list[float]) -> None:
        self.spec = spec
        self.losses: deque[float] = deque(losses, maxlen=spec.window if spec else 0)
        """The newest last; a checkpoint holds them."""

    def limit(self, loss: float) -> float | None:
        """Take in a step's loss. What it should have been at most, where it is above that and the window is full; else None."""
        known = list(self.losses)
        self.losses.append(loss)
        if self.spec is None or len(known) < self.spec.window:
            return None
        middle = median(known)
        spread = max(median(abs(one - middle) for one in known), 1e-3 * abs(middle))          # none where losses are equal
        limit = middle + self.spec.factor * TO_SIGMA * spread
        return limit if loss > limit else None

    def skips(self, loss: float, limit: float, step: int, recipe: Recipe) -> bool:
        """Whether a spike's update is left out. Raises TrainError where the spec says to stop at one."""
        assert self.spec
        if self.spec.action == "stop":
            first, last = recipe.samples(step)
            raise TrainError(f"the loss is {loss:.4g} at step {step + 1}, samples {first} to {last}, and at "
                             f"most {limit:.4g} was to be expected after the {self.spec.window} steps before",
                             where="guard.spike", cause="loss_spike",
                             remedy="look at these samples, lower optimizer.lr, or set action: skip")
        return self.spec.action == "skip"


@contextlib.contextmanager
def without_update(engine: Any) -> Iterator[None]:
    """A step of the engine inside drops its gradients and leaves weights and the optimizer's states as they are: every wrapper of
    DeepSpeed comes to the optimizer's own step in the end."""
    optimizers = [one for one in (engine.basic_optimizer, getattr(engine.optimizer, "backup_optimizer", None)) if one is not None]
    for one in optimizers:
        one.step = lambda *_, **__: None
    try:
        yield
    finally:
        for one in optimizers:
            del one.step


@dataclass(frozen=True)
class Random:
    """The state of a rank's random numbers."""

    cpu: torch.Tensor
    cuda: torch.Tensor | None

    @staticmethod
    def now() -> "Random":
        return Random(torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_available() else None)

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda)


def nonfinite_loss(engine: Any, batch: Batch, recipe: Recipe, step: int, random: Random, mean: float) -> TrainError:
    """The error for a loss that is not finite; `random` is what the step began with. All ranks take part and get the same."""
    return _error(f"the loss is {mean}", "the output of", _blame(engine, batch, recipe, random, _first_output), recipe, step)


def nonfinite_gradient(engine: Any, batch: Batch, recipe: Recipe, step: int, random: Random, norm: float) -> TrainError:
    """The same for a gradient's norm, where every loss is finite."""
    return _error(f"the gradient's norm is {norm}", "the gradient of", _blame(engine, batch, recipe, random, _first_gradient), recipe, step)


def _error(what: str, of: str, blame: tuple[int, int, str] | None, recipe: Recipe, step: int) -> TrainError:
    (first, last), remedy = recipe.samples(step), "lower optimizer.lr, or look at these samples"
    if blame is None:                                      # a sum over micro-batches or ranks, or a fault of the machine
        return TrainError(f"{what} at step {step + 1}, samples {first} to {last}; once more, every part is "
                          "finite", remedy=remedy, cause="nonfinite_loss")
    micro, rank, name = blame
    size = recipe.micro_sequences
    first += (rank // recipe.group * recipe.micro_batches(step) + micro) * size
    return TrainError(f"{what} at step {step + 1} on rank {rank}, first in {of} {name}, samples {first} to {first + size - 1}",
                      remedy=remedy, cause="nonfinite_loss")


def _blame(engine: Any, batch: Batch, recipe: Recipe, random: Random,
           look: Callable[[Any, Batch], str | None]) -> tuple[int, int, str] | None:
    """(micro-batch, rank, name) of the first that `look` finds. Ranks go on in step until the end: ZeRO-3 gathers in every pass. Layers run
    uncompiled: hooks may be passed over otherwise, and gradients come all at once."""
    random.restore()
    found = None
    with torch.compiler.set_stance("force_eager"):
        for i, micro in enumerate(batch.split(recipe.micro_sequences)):
            name = look(engine, micro)
            found = found or (name and (i, distributed.get_rank(), name))
    everyone: list[Any] = [None] * recipe.world
    distributed.all_gather_object(everyone, found)
    return min((one for one in everyone if one), default=None)


def _first_output(engine: Any, micro: Batch) -> str | None:
    """The first module to end with an output that is not finite: one that holds others ends after them."""
    found: list[str] = []

    def look(name: str, output: Any) -> None:
        for value in output if isinstance(output, tuple | list) else output.values() if isinstance(output, dict) else [output]:
            if not found and torch.is_tensor(value) and value.is_floating_point() and not value.isfinite().all():
                found.append(name)

    hooks = [module.register_forward_hook(lambda _, __, output, name=name: look(name, output))
             for name, module in engine.module.named_modules() if name]
    try:
        with torch.no_grad():
            loss = engine(*micro.inputs(engine.device))
    finally:
        for hook in hooks:
            hook.remove()
    if not found and not loss.isfinite():
        return "the loss"
    return found[0].removeprefix("model.") if found else None


def _first_gradient(engine: Any, micro: Batch) -> str | None:
    """The first parameter that the backward pass comes to whose gradient is not finite. Gradients are dropped as they come."""
    found: list[str] = []

    def look(name: str, gradient: torch.Tensor) -> torch.Tensor:
        if not found and not gradient.isfinite().all():
            found.append(name)
        return gradient.new_zeros(()).expand_as(gradient)

    named = [(name, p) for name, p in engine.module.named_parameters() if p.requires_grad]
    hooks = [p.register_hook(lambda gradient, name=name: look(name, gradient)) for name, p in named]
    try:
        loss = engine.module(*micro.inputs(engine.device))               # not through the engine, which would reduce what is dropped here
        torch.autograd.grad(loss, [p for _, p in named], allow_unused=True)
    finally:
        for hook in hooks:
            hook.remove()
    return found[0].removeprefix("model.") if found else None


def finite(norm: float) -> bool:
    """DeepSpeed marks a norm that is none as -1 or infinity."""
    return math.isfinite(norm) and norm >= 0
