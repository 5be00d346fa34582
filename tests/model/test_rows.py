"""Documents lie whole in few rows, one behind the other."""

import random

import pytest

from distlm.model.rows import fewest_tokens


def spans(lengths: list[int], begins: list[int]) -> list[range]:
    return [range(begin, begin + length) for begin, length in zip(begins, lengths, strict=True)]


@pytest.mark.parametrize("most", [16, 23, 100, 256, 1000])
def test_pairs_that_fit_a_row_take_no_more_rows_than_windows(most: int) -> None:
    draw = random.Random(most)
    for _ in range(200):
        pairs = []
        for _ in range(draw.randint(1, 12)):
            first = draw.randint(0, most)
            pairs.append((first, draw.choice((most - first, draw.randint(0, most - first)))))
        lengths = [one for pair in pairs for one in pair]
        found = fewest_tokens(lengths, most)
        assert found.number * found.width <= len(pairs) * most and (found.width == most or found.width % 16 == 0)
        taken = [place for span in spans(lengths, found.begins) for place in span]
        assert len(set(taken)) == len(taken) == sum(lengths) and max(taken, default=0) < found.number * found.width
        assert all(span.start // found.width == (span.stop - 1) // found.width for span in spans(lengths, found.begins) if len(span))


def test_the_width_with_the_least_padding_is_taken_and_of_equal_ones_the_least() -> None:
    assert fewest_tokens([30, 20, 10, 4], 64)[:2] == (1, 64)
    assert fewest_tokens([40, 40, 40, 40], 160)[:2] == (2, 80), "as many tokens as one row of 160, and shorter rows"
    assert fewest_tokens([32, 32, 32, 32], 128)[:2] == (4, 32)
    assert fewest_tokens([32, 32], 40)[:2] == (2, 32)
    assert fewest_tokens([20, 5], 20)[:2] == (2, 20), "no row is wider than a window"
    assert fewest_tokens([0, 0], 64)[:2] == (1, 16)
