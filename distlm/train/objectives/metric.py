"""What a run records of itself by which others of its kind can be compared with it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from distlm.train.recipe import Recipe


class Metric(NamedTuple):
    """A value of metrics.jsonl."""

    mode: Literal["min", "max", ""]
    """Whether less or more of it is better; "" where that depends on what is wanted."""
    evaluated: bool = True
    """Whether evaluation measures it, and not each step."""
    scaled_by: tuple[str, ...] = ()
    """Keys of the spec: runs that differ in one of them cannot be compared by it."""


def by_source(observed: "Sequence[NDArray[Any]]", recipe: "Recipe") -> "dict[str, NDArray[Any]]":
    """Of what was observed of samples, by their groups: that of each corpus, if there are several, and of each source that has samples."""
    found, first = dict[str, Any](), 0
    for part in recipe.val:
        groups = observed[first:first + max(1, len(part.sources))]
        first += len(groups)
        if len(recipe.val) > 1:
            found[part.name] = np.concatenate(groups)
        found |= {f"{part.name}: {name}": rows for name, rows in zip(part.sources, groups, strict=False) if len(rows)}
    return found
