"""A rank's stream begins before what uses it is there."""

import threading
from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

from distlm.train.worker import begun


def test_the_first_step_is_asked_for_at_once_and_the_others_on_demand() -> None:
    asked = [threading.Event() for _ in range(3)]

    def steps() -> Iterator[NDArray[np.int64]]:
        for number, event in enumerate(asked):
            event.set()
            yield np.array([number])

    found = begun(steps())
    assert asked[0].wait(30)
    assert not asked[1].is_set()
    assert [int(step[0]) for step in found] == [0, 1, 2]
    assert not [*begun(iter(()))]


def test_what_the_stream_raises_comes_to_who_reads_it() -> None:
    def steps() -> Iterator[NDArray[np.int64]]:
        raise ValueError("out of order")
        yield

    found = begun(steps())
    with pytest.raises(ValueError, match="out of order"):
        next(found)
