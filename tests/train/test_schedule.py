"""The rate at a step: warm-up to the peak, the named shape, the floor at the end."""

import pytest

from distlm.spec.train import Schedule
from distlm.train.schedule import learning_rate


@pytest.mark.parametrize("name", ["cosine", "linear", "constant", "wsd"])
def test_warm_up_reaches_the_peak_at_its_last_step(name: str) -> None:
    schedule = Schedule(name=name, warmup_steps=4)  # type: ignore[arg-type]
    assert [learning_rate(schedule, 2.0, step, 100) for step in range(4)] == [0.5, 1.0, 1.5, 2.0]


@pytest.mark.parametrize("name", ["cosine", "linear"])
def test_decay_ends_at_the_floor(name: str) -> None:
    schedule = Schedule(name=name, warmup_steps=10, min_ratio=0.1)  # type: ignore[arg-type]
    rates = [learning_rate(schedule, 1.0, step, 110) for step in range(110)]
    assert rates[-1] == pytest.approx(0.1) and rates[10] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    middle = 0.55 if name == "linear" else 0.1 + 0.9 * 0.5
    assert rates[10 + 50] == pytest.approx(middle, abs=0.02)


def test_wsd_is_flat_and_then_falls_over_its_last_part() -> None:
    schedule = Schedule(name="wsd", warmup_steps=5, decay_fraction=0.2, min_ratio=0.0)
    rates = [learning_rate(schedule, 1.0, step, 100) for step in range(100)]
    assert set(rates[5:80]) == {1.0} and rates[80] == 1.0 and rates[81] == pytest.approx(0.95) and rates[99] == pytest.approx(0.05)


def test_constant_stays() -> None:
    assert learning_rate(Schedule(name="constant"), 3.0, 77, 100) == 3.0
