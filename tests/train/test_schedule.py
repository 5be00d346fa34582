"""The rate at a step: warm-up to the peak, the named shape, the floor at the end."""

import pytest

from distlm.spec.optimizer import Schedule
from distlm.train.schedule import learning_rate


@pytest.mark.parametrize("name", ["cosine", "linear", "constant", "inverse_sqrt", "wsd"])
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


@pytest.mark.parametrize(("schedule", "rates"), [
    ({"name": "constant"}, [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
    ({"name": "constant", "warmup_steps": 4}, [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
    ({"name": "linear", "min_ratio": 0.2}, [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2]),
    ({"name": "linear", "warmup_steps": 4, "min_ratio": 0.0}, [0.25, 0.5, 0.75, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]),
    ({"name": "cosine", "min_ratio": 0.0}, [1.0, 0.96194, 0.85355, 0.69134, 0.5, 0.30866, 0.14645, 0.03806, 0.0]),
    ({"name": "cosine", "warmup_steps": 4, "min_ratio": 0.5}, [0.25, 0.5, 0.75, 1.0, 1.0, 0.92678, 0.75, 0.57322, 0.5]),
    ({"name": "inverse_sqrt"}, [1.0, 0.70711, 0.57735, 0.5, 0.44721, 0.40825, 0.37796, 0.35355, 0.33333]),
    ({"name": "inverse_sqrt", "warmup_steps": 4}, [0.25, 0.5, 0.75, 1.0, 0.89443, 0.8165, 0.75593, 0.70711, 0.66667]),
    ({"name": "wsd", "decay_fraction": 0.5, "min_ratio": 0.0}, [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25]),
    ({"name": "wsd", "warmup_steps": 4, "decay_fraction": 0.22, "min_ratio": 0.5}, [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0, 0.75])])
def test_nine_steps(schedule: dict[str, object], rates: list[float]) -> None:
    given = Schedule.model_validate(schedule)
    assert [learning_rate(given, 3.0, step, 9) / 3 for step in range(9)] == pytest.approx(rates, abs=1e-5)


def test_a_warm_up_in_tokens_is_rounded_up_to_whole_steps() -> None:
    def steps(tokens: int) -> int:
        return -(-tokens // 100)

    assert Schedule(warmup_tokens=1001).in_steps(steps) == Schedule(warmup_steps=11)
    assert Schedule(warmup_tokens=1000, name="wsd").in_steps(steps) == Schedule(warmup_steps=10, name="wsd")
    assert Schedule(warmup_steps=3).in_steps(steps) == Schedule(warmup_steps=3)
