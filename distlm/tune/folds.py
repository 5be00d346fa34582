"""What a cross-validation found: of each point of the space every metric in each fold, their mean and their standard deviation.

    points = points_of(spec, trials)                       # the best first
    points[0].scores["accuracy"].mean
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from distlm.spec.tune import TuneSpec
from distlm.train.objectives import objective_of
from distlm.tune import space

if TYPE_CHECKING:
    from distlm.tune.sweep import Trial


@dataclass(frozen=True)
class Scores:
    """A metric over the folds."""

    folds: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.folds)

    @property
    def std(self) -> float:
        """Of a sample: with one degree of freedom less than folds."""
        return statistics.stdev(self.folds)

    def data(self) -> dict[str, Any]:
        return {"mean": self.mean, "std": self.std, "folds": list(self.folds)}

    def __str__(self) -> str:
        return f"{self.mean:.4f} ± {self.std:.4f}"


@dataclass(frozen=True)
class Point:
    """A point of the space, and the trials of its folds, in their order."""

    values: dict[str, Any]
    trials: "tuple[Trial, ...]"
    scores: dict[str, Scores]
    """Of the metrics that every fold has; none where a fold has not come to its end."""

    def data(self) -> dict[str, Any]:
        """As it stands in the sweep's result."""
        confusion = self.confusion()
        return {"values": self.values, "trials": [trial.name for trial in self.trials],
                "metrics": {name: scores.data() for name, scores in self.scores.items()}, **({"confusion": confusion} if confusion else {})}

    def confusion(self) -> dict[str, Any]:
        """Of all documents, each by the trial that it was held out from: the folds' matrices of their last evaluations, summed up. Empty
        where a fold has none."""
        found = [next((record["confusion"] for record in reversed(trial.folder.read_metrics()) if "confusion" in record), None)
                 for trial in self.trials]
        whole = [one for one in found if one]
        if not self.scores or len(whole) < len(found):
            return {}
        return {"labels": whole[0]["labels"], "counts": np.sum([one["counts"] for one in whole], 0).tolist()}


def points_of(spec: TuneSpec, trials: "Sequence[Trial]") -> list[Point]:
    """The points of a sweep, the best by the mean of the metric first; none of a sweep without folds."""
    if spec.folds is None:
        return []
    found = []
    for first in range(0, len(trials), spec.folds):
        mine = tuple(trials[first:first + spec.folds])
        names = [name for name, metric in objective_of(mine[0].spec).METRICS.items() if metric.evaluated or name == spec.metric]
        values = {name: [trial.value(name) for trial in mine] for name in names}
        ended = all(trial.folder.state()[0] == "succeeded" for trial in mine)
        scores = {name: Scores(tuple(each)) for name, each in values.items() if ended and None not in each}    # type: ignore[arg-type]
        found.append(Point({key: value for key, value in mine[0].values.items() if key != "fold"}, mine, scores))
    sign = 1 if space.mode_of(spec) == "min" else -1
    return sorted(found, key=lambda point: sign * point.scores[spec.metric].mean if spec.metric in point.scores else math.inf)


def table(points: list[Point]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """(titles, rows): each fold of the best point, then the means and standard deviations of all that have some."""
    names, best = list(points[0].scores), points[0]
    rows = [(trial.name, *(f"{best.scores[name].folds[i]:.4f}" for name in names)) for i, trial in enumerate(best.trials)]
    for point in points:
        if point.scores:
            what = ", ".join(f"{key}={value}" for key, value in point.values.items())
            rows.append((f"mean {what}".strip(), *(str(point.scores[name]) if name in point.scores else "" for name in names)))
    return ("fold", *names), rows
