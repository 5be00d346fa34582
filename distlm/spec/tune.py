"""`kind: tune`: a sweep of training runs."""

import math
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from distlm.spec.base import Job, Part, Rule, Seed, exactly_one
from distlm.spec.explain import shown
from distlm.spec.fold import MOST_FOLDS

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
    space: dict[str, Dimension] = {}
    """Keys of the training spec, dotted, each with its values. With folds it may be left out."""
    folds: Annotated[int | None, Field(ge=2, le=MOST_FOLDS)] = None
    """With objective: classify, a cross-validation: every point of the space is trained so many times, each time with another part of the
    corpus's training and validation documents held out, and judged by the mean of the metric. Left out, the corpus's own split is."""
    trials: Annotated[int | None, Field(ge=1, le=MOST_TRIALS)] = None
    """How many times the space is drawn: with `grid`, every point that often, each with its own random values. Default: 8, and 1 where
    all keys are `grid`; such a space drawn again varies the seed."""
    metric: Annotated[str, Field(min_length=1)] = "val_loss"
    """What trials are judged by, at their last evaluation: val_loss; of objective pretrain, sft and distill val_perplexity,
    val_bits_per_byte, val_accuracy, val_ece; of classify accuracy, roc_auc, val_ece (of one label a document), and precision, recall and f1
    with _macro or _micro; of dpo val_reward_accuracy, val_reward_margin, val_chosen_log_prob, val_rejected_log_prob. Or at their last step:
    loss; of distill cross_entropy, kl; of dpo reward_accuracy, reward_margin. A loss that the space scales (class_weights, dpo.beta,
    distill.alpha) is refused."""
    mode: Literal["min", "max"] | None = None
    """Whether less or more of the metric is better. Default: what it is of the metric; val_chosen_log_prob and val_rejected_log_prob have
    none, and need it."""
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
        if not self.space and self.folds is None:
            raise Rule("space", "there is nothing to try; give keys with values, or set folds for a cross-validation")
        if self.folds is not None and self.asha:
            raise Rule("asha", "would stop some folds of a point early, and leave it without a mean; leave one of the two out")
        points = math.prod(len(dimension.grid) for dimension in self.space.values() if dimension.grid is not None)
        times = self.repeats * (self.folds or 1)
        if points * times > MOST_TRIALS:
            each = f", each {times} times" if times > 1 else ""
            raise Rule("space", f"its grid has {points:,} points{each}, and a sweep {MOST_TRIALS:,} trials at most; take fewer values, "
                                "or choice in place of grid")
        return self
