"""A mixture's order is a pure function of the sample number, keeps to its weights over any stretch, and skips no sample of a corpus."""

from pathlib import Path

import numpy as np
import pytest

from distlm.corpus.mix import BLOCK, Mix
from distlm.corpus.stream import Plan, Windows, local_steps, ordered_steps, read_block, read_samples
from tests.train.ranks import make_corpus

TWO = Mix(("a", "b"), (0.7, 0.3), 0)
ANNEALED = Mix(("a", "b", "c"), (0.7, 0.3, 0.0), 3, (0.0, 0.2, 0.8), (30_000, 50_000))
GOLDEN_CORPORA = [0, 0, 1, 0, 0, 1, 0, 0, 0, 1, 0, 0, 1, 0, 0, 1, 0, 0, 0, 1]
GOLDEN_ANNEALED = [2, 1, 0, 2, 2, 1, 2, 0, 2, 1, 2, 0]


def weights(kind: str, count: int) -> tuple[float, ...]:
    """Weights of `count` corpora that add up to 1: all equal, one above all, or at random."""
    given = {"equal": np.ones(count), "one": np.asarray([4 * count] + [1] * (count - 1)),
             "random": np.random.default_rng(count).dirichlet(np.full(count, 0.5)) + 1e-9}[kind]
    return tuple((given / given.sum()).tolist())


@pytest.mark.parametrize("kind", ["equal", "one", "random"])
@pytest.mark.parametrize("count", [1, 2, 3, 7, 20, 60])
def test_any_ten_thousand_samples_hold_the_shares_within_a_thousandth(kind: str, count: int) -> None:
    mix = Mix(tuple(map(str, range(count))), weights(kind, count), seed=count)
    for first in (0, 10 ** 11):
        corpora, _ = mix.assign(np.arange(first, first + 25_000))
        for i, weight in enumerate(mix.weights):
            taken = np.concatenate([[0], np.cumsum(corpora == i)])
            assert np.abs((taken[10_000:] - taken[:-10_000]) / 10_000 - weight).max() <= 0.001


@pytest.mark.parametrize("mix", [TWO, ANNEALED, Mix(tuple("abcdefghij"), weights("random", 10), 5)], ids=["two", "annealed", "ten"])
def test_each_corpus_gives_its_own_samples_one_after_the_other(mix: Mix) -> None:
    corpora, own = mix.assign(np.arange(60_000))
    for i in range(len(mix.corpora)):
        assert own[corpora == i].tolist() == list(range((corpora == i).sum()))
    for n in (0, 1, BLOCK - 1, BLOCK, 33_333, 60_000):
        assert mix.counts(n).tolist() == np.bincount(corpora[:n], minlength=len(mix.corpora)).tolist()


def test_any_part_of_the_order_is_the_same_alone() -> None:
    whole = np.stack(ANNEALED.assign(np.arange(60_000)))
    picked = np.random.default_rng(0).integers(0, 60_000, 500)
    alone = Mix(ANNEALED.corpora, ANNEALED.weights, 3, ANNEALED.final_weights, ANNEALED.anneal)
    np.testing.assert_array_equal(np.stack(alone.assign(picked)), whole[:, picked])
    np.testing.assert_array_equal(np.stack(alone.assign(np.arange(29_990, 50_010))), whole[:, 29_990:50_010])


def test_the_order_never_changes() -> None:
    """Golden: a change here would make every run of the past resume elsewhere."""
    assert TWO.assign(np.arange(20))[0].tolist() == GOLDEN_CORPORA
    assert ANNEALED.assign(np.arange(43_000, 43_012))[0].tolist() == GOLDEN_ANNEALED


def test_the_seed_moves_the_order_and_not_the_shares() -> None:
    orders = [Mix(("a", "b"), (0.7, 0.3), seed).assign(np.arange(1000))[0] for seed in range(5)]
    assert len({order.tobytes() for order in orders}) > 2
    assert all(abs((order == 0).sum() - 700) <= 2 for order in orders)


def test_annealing_changes_the_weights_linearly_over_its_samples() -> None:
    corpora, _ = ANNEALED.assign(np.arange(60_000))
    for i, (before, after) in enumerate(zip(ANNEALED.weights, ANNEALED.final_weights, strict=True)):
        taken = np.concatenate([[0], np.cumsum(corpora == i)])
        assert np.abs(taken - ANNEALED.expected(i, np.arange(60_001.0))).max() <= 2
        shares = [(taken[n + 500] - taken[n - 500]) / 1000 for n in (29_000, 35_000, 40_000, 45_000, 51_000)]
        np.testing.assert_allclose(shares, np.linspace(before, after, 5), atol=0.003)
    assert not (corpora[50_003:] == 0).any() and not (corpora[:29_997] == 2).any()


def test_a_mixture_of_one_is_the_corpus_itself(tmp_path: Path) -> None:
    corpus = str(make_corpus(tmp_path / "c"))
    alone, mixed = Plan(corpus, 12, 2, 9, 5), Plan(corpus, 12, 2, 9, 5, Mix((corpus,), (1.0,), 5))
    for rank in range(2):
        ours, theirs = read_block(mixed, range(9), rank), read_block(alone, range(9), rank)
        np.testing.assert_array_equal(ours["tokens"], theirs["tokens"])


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    folder = tmp_path_factory.mktemp("mix")
    corpora = tuple(str(make_corpus(folder / name, windows=windows)) for name, windows in (("a", (20, 17, 11)), ("b", (9, 4))))
    return Plan(corpora[0], 12, 1, 40, 0, Mix(corpora, (0.6, 0.4), 0))


def test_a_corpus_gives_the_windows_that_it_would_give_alone(plan: Plan) -> None:
    assert plan.mix
    corpora, _ = plan.mix.assign(np.arange(480))
    tokens = read_samples(plan, np.arange(480))
    for i, folder in enumerate(plan.mix.corpora):
        windows = Windows(folder)
        count = int((corpora == i).sum())
        np.testing.assert_array_equal(tokens[corpora == i], windows.read(*windows.order(0).locate(np.arange(count))))
    first = tokens[corpora == 1][:13]
    assert sorted(map(tuple, first)) == sorted(map(tuple, Windows(plan.mix.corpora[1]).head(13))), "a pass holds every window once"


@pytest.mark.parametrize("world", [2, 3])
def test_any_number_of_workers_gets_the_same_mixed_batches_from_any_step_on(plan: Plan, world: int) -> None:
    one = [batch["tokens"] for batch in local_steps(plan, 0, 0)]
    part = Plan(plan.corpus, 12, world, 40, 0, plan.mix)
    ranks = [list(ordered_steps(local_steps(part, rank, 17), part, rank, 17)) for rank in range(world)]
    for step in range(17, 40):
        np.testing.assert_array_equal(np.concatenate([rank[step - 17] for rank in ranks]), one[step])
