"""`kind: tune`: a sweep of training runs."""

import math
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from distlm.spec.base import Job, Part, Rule, Seed, exactly_one
from distlm.spec.explain import shown

MOST_TRIALS = 10_000


class Dimension(Part):
    """The values that one key may take: exactly one of uniform, loguniform, choice, grid."""

    uniform: tuple[float, float] | None = None
    """Any number between the two."""
    loguniform: tuple[float, float] | None = None
    """Any number between the two, even on a logarithmic scale."""
    choice: Annotated[list[Any] | None, Field(min_length=1)] = None
    """One of these, at random."""
    grid: Annotated[list[Any] | None, Field(min_length=1, max_length=MOST_TRIALS)] = None
    """Each of these in turn."""

    @model_validator(mode="after")
    def _rules(self) -> "Dimension":
        exactly_one(self, "uniform", "loguniform", "choice", "grid")
        for name in ("uniform", "loguniform"):
            bounds = getattr(self, name)
            if bounds and not (bounds[0] < bounds[1] and (name == "uniform" or bounds[0] > 0)):
                raise Rule(name, f"{list(bounds)} is no range: the first number must be smaller"
                                 + (" and above 0" if name == "loguniform" else ""))
        seen: list[tuple[bool, Any]] = []
        for value in self.grid or []:
            if (isinstance(value, bool), value) in seen:   # true is no 1, and 1.0 is
                raise Rule("grid", f"{shown(value)} is there twice, and would be tried twice; take it out, or set trials to vary the seed")
            seen.append((isinstance(value, bool), value))
        return self


class Asha(Part):
    """Asynchronous successive halving (Li et al. 2020): weak trials stop early."""

    grace_steps: Annotated[int, Field(ge=1)] = 50
    """No trial stops before this step."""
    reduction: Annotated[int, Field(ge=2)] = 2
    """At each rung the best 1/reduction go on."""


class TuneSpec(Job):
    """A sweep: one training spec, a space over its keys, a metric."""

    kind: Literal["tune"] = "tune"
    """The kind of the job."""
    train: dict[str, Any] | str
    """The training spec that every trial starts from, inline (without name and storage) or as a file (whose own
    name and storage give way to the sweep's)."""
    space: Annotated[dict[str, Dimension], Field(min_length=1)]
    """Keys of the training spec, dotted, each with its values."""
    trials: Annotated[int | None, Field(ge=1, le=MOST_TRIALS)] = None
    """How many times the space is drawn: with `grid`, every point that often, each with its own random values. Default: 8, and 1 where
    all keys are `grid`; such a space drawn again varies the seed."""
    metric: Literal["val_loss", "loss"] = "val_loss"
    """What is minimised."""
    asha: Asha | None = None
    """Early stopping; left out, every trial runs to its end."""
    concurrent: Annotated[int | None, Field(ge=1)] = None
    """Trials at once. Default: as many as the cluster holds."""
    seed: Seed = 0
    """Draws the samples."""

    @property
    def repeats(self) -> int:
        """How many times every point of the grid is tried."""
        return self.trials or (1 if all(dimension.grid is not None for dimension in self.space.values()) else 8)

    @model_validator(mode="after")
    def _count(self) -> "TuneSpec":
        points = math.prod(len(dimension.grid) for dimension in self.space.values() if dimension.grid is not None)
        if points * self.repeats > MOST_TRIALS:
            times = f", each {self.repeats} times" if self.repeats > 1 else ""
            raise Rule("space", f"its grid has {points:,} points{times}, and a sweep {MOST_TRIALS:,} trials at most; take fewer values, "
                                "or choice in place of grid")
        return self
