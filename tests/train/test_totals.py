"""Measures follow from sums that add up; calibration is that of Guo et al. 2017."""

import math

import numpy as np
import pytest

from distlm.train.totals import measures, reliability, tally

SURE = [0.05, 0.1, 0.1001, 0.3, 0.55, 0.6, 0.61, 0.95, 1.0, 1.0]
RIGHT = [False, True, False, False, True, False, True, True, True, False]


def by_hand(sure: list[float], right: list[bool], bins: int) -> float:
    """Equation 3, a bin after the other: bin m has the confidences in ((m-1)/bins, m/bins]."""
    error = 0.0
    for m in range(1, bins + 1):
        mine = [(c, r) for c, r in zip(sure, right, strict=True) if (m - 1) / bins < c <= m / bins]
        if mine:
            accuracy, confidence = sum(r for _, r in mine) / len(mine), sum(c for c, _ in mine) / len(mine)
            error += len(mine) / len(sure) * abs(accuracy - confidence)
    return error


def sums(sure: list[float], right: list[bool], bins: int, groups: list[int] | None = None) -> np.ndarray:
    number = len(sure)
    return tally(np.full(number, -2.0, np.float32), np.where(right, 7, 3), np.asarray(sure), np.full(number, 7), np.full(number, 4.0),
                 np.asarray(groups or [0] * number), 2, bins)


@pytest.mark.parametrize("bins", [1, 2, 10, 15])
def test_the_calibration_error_is_that_of_equation_3(bins: int) -> None:
    found = measures(sums(SURE, RIGHT, bins).sum(0))
    assert found["ece"] == pytest.approx(by_hand(SURE, RIGHT, bins), abs=1e-12)
    assert found["tokens"] == 10 and found["accuracy"] == 0.5 and found["loss"] == 2.0 and found["perplexity"] == math.exp(2)
    assert found["bits_per_byte"] == pytest.approx(2 / math.log(2) / 4)


def test_the_table_has_each_bin_and_none_where_it_is_empty() -> None:
    table = reliability(sums(SURE, RIGHT, 10).sum(0))
    assert [one["tokens"] for one in table] == [2, 1, 1, 0, 0, 2, 1, 0, 0, 3] and table[0]["accuracy"] == 0.5
    assert table[9]["confidence"] == pytest.approx(2.95 / 3) and table[3] == {"above": 0.3, "up_to": 0.4, "tokens": 0, "confidence": None,
                                                                              "accuracy": None}


def test_sums_of_sources_add_up_and_one_without_tokens_has_no_measure() -> None:
    parts = sums(SURE, RIGHT, 15, [0, 0, 1, 1, 0, 1, 0, 1, 0, 1])
    assert np.allclose(parts.sum(0), sums(SURE, RIGHT, 15)[0], rtol=1e-15) and parts[:, 0].tolist() == [5, 5]
    assert measures(sums(SURE, RIGHT, 15)[1])["loss"] is None
