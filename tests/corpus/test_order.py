"""The order of samples is a pure function, and the same at any number of workers."""

from pathlib import Path

import numpy as np
import pytest

from distlm.corpus.order import Order
from distlm.corpus.stream import Plan, Windows, local_steps, ordered_steps, read_block
from distlm.errors import CorpusError
from tests.train.ranks import VOCABULARY, make_corpus

GOLDEN_SHARDS = [1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1]
GOLDEN_ROWS = [0, 3, 2, 1, 3, 0, 4, 1, 2, 3, 4, 1, 0, 2, 2, 0, 1, 3]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus") / "c", windows=(20, 17, 11))


def test_an_epoch_holds_every_window_once_and_two_differ() -> None:
    order = Order((20, 17, 11), seed=3)
    epochs = [order.locate(np.arange(48 * e, 48 * (e + 1))) for e in range(2)]
    for shards, rows in epochs:
        assert sorted(zip(shards.tolist(), rows.tolist(), strict=True)) == [(s, r) for s, n in enumerate((20, 17, 11)) for r in range(n)]
    assert epochs[0][1].tolist() != epochs[1][1].tolist()
    assert Order((20, 17, 11), seed=4).locate(np.arange(48))[1].tolist() != epochs[0][1].tolist()


def test_the_order_never_changes() -> None:
    """Golden: a change here would make every run of the past resume elsewhere."""
    shards, rows = Order((5, 4), seed=7).locate(np.arange(18))
    assert shards.tolist() == GOLDEN_SHARDS and rows.tolist() == GOLDEN_ROWS


def test_any_part_of_the_order_is_the_same_alone() -> None:
    order = Order((20, 17, 11), seed=0)
    whole = np.stack(order.locate(np.arange(200)))
    parts = [np.stack(Order((20, 17, 11), seed=0).locate(np.arange(a, min(a + 13, 200)))) for a in range(0, 200, 13)]
    np.testing.assert_array_equal(whole, np.concatenate(parts, axis=1))


@pytest.mark.parametrize("world", [1, 2, 3])
def test_one_two_and_three_workers_get_the_same_global_batches(corpus: Path, world: int) -> None:
    one = [batch["tokens"] for batch in local_steps(Plan(str(corpus), 12, 1, 9, 0), 0, 0)]
    plan = Plan(str(corpus), 12, world, 9, 0)
    ranks = [list(ordered_steps(local_steps(plan, rank, 4), plan, rank, 4)) for rank in range(world)]
    for step in range(4, 9):                               # started in the middle, it continues exactly there
        np.testing.assert_array_equal(np.concatenate([rank[step - 4] for rank in ranks]), one[step])


def test_a_block_in_the_wrong_place_is_an_error(corpus: Path) -> None:
    plan = Plan(str(corpus), 12, 2, 9, 0)
    with pytest.raises(CorpusError, match="out of order: rank 0 expected step 3"):
        list(ordered_steps(iter([read_block(plan, range(4, 5), 0)]), plan, 0, 3))
    with pytest.raises(CorpusError, match="out of order"):
        list(ordered_steps(iter([read_block(plan, range(3, 4), 1)]), plan, 0, 3))
    with pytest.raises(CorpusError, match="ended before step 4 of 9"):
        list(ordered_steps(iter([read_block(plan, range(3, 4), 0)]), plan, 0, 3))


def test_a_damaged_shard_is_never_read(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path / "c")
    shard = corpus / "train" / "00001.arrow"
    data = bytearray(shard.read_bytes())
    data[-700] ^= 1
    shard.write_bytes(data)
    windows = Windows(corpus)
    assert windows.read(np.array([0]), np.array([3])).shape == (1, 17)
    with pytest.raises(CorpusError, match=r"00001\.arrow: the shard is damaged"):
        windows.read(np.array([1]), np.array([3]))
    shard.unlink()
    with pytest.raises(CorpusError, match="cannot be read"):
        Windows(corpus).read(np.array([1]), np.array([3]))


def test_windows_are_what_was_written(corpus: Path) -> None:
    tokens = Windows(corpus).head(48)
    np.testing.assert_array_equal(tokens[:, 0].astype(int) * VOCABULARY + tokens[:, 1], np.arange(48))
