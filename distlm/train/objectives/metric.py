"""What a run records of itself by which others of its kind can be compared with it."""

from typing import Literal, NamedTuple


class Metric(NamedTuple):
    """A value of metrics.jsonl."""

    mode: Literal["min", "max", ""]
    """Whether less or more of it is better; "" where that depends on what is wanted."""
    evaluated: bool = True
    """Whether evaluation measures it, and not each step."""
    scaled_by: tuple[str, ...] = ()
    """Keys of the spec: runs that differ in one of them cannot be compared by it."""
