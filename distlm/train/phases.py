"""How long the parts of a step take on a rank, step by step, without waiting for the GPU.

    phases = Phases(on_gpu=False)
    with phases("forward"):
        ...
    phases.taken()                                         # {"forward_s": 0.41}
"""

import contextlib
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from distlm.train.profile import region

if TYPE_CHECKING:
    from torch.cuda import Event

ON_DEVICE = ("forward", "backward")
"""Parts that a GPU works at while the processor has gone on; the others are timed by the clock."""


class Phases:
    """Adds up the seconds of each part, however often it comes in a step."""

    def __init__(self, on_gpu: bool) -> None:
        self._on_gpu = on_gpu
        self._seconds: dict[str, float] = {}
        self._events: list[tuple[str, Event, Event]] = []

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        with region(name):
            if self._on_gpu and name in ON_DEVICE:
                import torch

                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                yield
                end.record()
                self._events.append((name, begin, end))
                return
            started = time.perf_counter()
            yield
            self._add(name, time.perf_counter() - started)

    def taken(self) -> dict[str, float]:
        """Seconds of each part since the last call, as `NAME_s`. On a GPU the step has been waited for by then, as its loss is known."""
        for name, begin, end in self._events:
            self._add(name, begin.elapsed_time(end) / 1e3)
        found = {f"{name}_s": seconds for name, seconds in self._seconds.items()}
        self._seconds, self._events = {}, []
        return found

    def _add(self, name: str, seconds: float) -> None:
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds
