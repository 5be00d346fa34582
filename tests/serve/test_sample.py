"""Drawing tokens: the distribution, its limits, and what must not break it."""

import random

import pytest
import torch

from distlm.serve.engine import Request
from distlm.serve.sample import choose, score


def draw(logits: list[float], number: int, **fields: float) -> torch.Tensor:
    """The share of each token among `number` draws."""
    source = random.Random(0)
    rows = torch.tensor([logits] * number)
    request = Request((1,), 1, **fields)
    return torch.bincount(torch.tensor(choose(rows, [request] * number, [source] * number)), minlength=len(logits)) / number


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_tempered_softmax(temperature: float) -> None:
    logits = [2.0, -1.0, 1.0, 0.0]
    wanted = (torch.tensor(logits) / temperature).softmax(-1)
    assert torch.allclose(draw(logits, 20_000, temperature=temperature), wanted, atol=0.015)


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    logits = torch.tensor([0.1, 0.5, 0.15, 0.25]).log().tolist()
    assert torch.allclose(draw(logits, 20_000, temperature=1.0, top_p=0.7), torch.tensor([0, 2 / 3, 0, 1 / 3]), atol=0.015)
    assert draw(logits, 1000, temperature=1.0, top_p=0.8)[0] == 0
    assert draw(logits, 1000, temperature=1.0, top_p=0.8)[2] > 0


def test_rows_are_greedy_or_drawn_each_as_asked() -> None:
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
    requests = [Request((1,), 1, temperature=2.0 * (i % 2), seed=i) for i in range(6)]
    together = choose(logits, requests, [random.Random(i) for i in range(6)])
    alone = [choose(logits[i:i + 1], [requests[i]], [random.Random(i)])[0] for i in range(6)]
    assert together == alone and together[::2] == logits.argmax(-1)[::2].tolist()


@pytest.mark.parametrize("fields", [{"temperature": 1e-300}, {"temperature": 2.0, "top_p": 0.0}, {"temperature": 2.0, "top_p": 1e-30}])
def test_limits_are_greedy(fields: dict[str, float]) -> None:
    assert draw([0.0, 3.0, 1.0], 200, **fields).tolist() == [0, 1, 0]


def test_logits_that_are_not_finite_neither_break_the_draw_nor_the_json() -> None:
    logits = torch.tensor([[float("nan")] * 4, [0.0, float("-inf"), 1.0, 2.0]])
    chosen = choose(logits, [Request((1,), 1, temperature=1.0)] * 2, [random.Random(0)] * 2)
    assert 0 <= chosen[0] < 4 and chosen[1] != 1
    assert score(logits[1:], [1], 0)[0].logprob == -9999.0
