"""Which predictions of a window give loss, and which positions its tokens have."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from distlm.corpus.mix import Mix
from distlm.corpus.stream import NO_LOSS, START, Plan, Windows, local_steps, ordered_steps, read_block
from distlm.model.loss import IGNORED
from distlm.train.batch import make_batch
from tests.train.ranks import CONTEXT, make_corpus, make_packed_corpus

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_packed_corpus(tmp_path_factory.mktemp("packed") / "p")


def test_a_window_without_marks_gives_loss_everywhere() -> None:
    batch = make_batch(np.arange(10).reshape(2, 5), False)
    assert batch.targets is None and batch.positions is None and batch.num_targets() == 8
    assert batch.inputs(CPU) == (batch.tokens, None, None, None, False)


@pytest.mark.parametrize("mask", [False, True])
def test_padding_repeated_tokens_and_first_tokens_give_no_loss(mask: bool) -> None:
    tokens = np.array([[10, 11, 12, 20, 30, 31, 0, 0, 0]])
    marks = np.array([[START, 0, 0, START, START | NO_LOSS, 0, NO_LOSS, NO_LOSS, NO_LOSS]])
    batch = make_batch(np.stack([tokens, marks], 1), mask)
    no = IGNORED
    assert batch.targets is not None
    assert batch.targets.tolist() == [[11, 12, no if mask else 20, no, 31, no, no, no]]
    assert batch.num_targets() == (3 if mask else 4)
    assert (batch.positions is None) != mask
    if batch.positions is not None:
        assert batch.positions.tolist() == [[0, 1, 2, 0, 0, 1, 2, 3]]
    assert [part.sequences for part in batch.split(1)] == [1]
    _, targets, _, kept, several = batch.inputs(CPU)
    assert (kept.tolist(), targets.tolist()) == (([0, 1, 4], [11, 12, 31]) if mask else ([0, 1, 2, 4], [11, 12, 20, 31]))
    assert several == mask


def test_marks_are_what_the_columns_of_a_shard_say(packed: Path) -> None:
    windows = Windows(packed)
    places = windows.first(len(windows))
    rows = pa.ipc.open_file(windows.manifest.files("train")[0]).get_batch(0).to_pylist()
    for row, marks in zip(rows, windows.marks(*places), strict=True):
        expected = [0] * (CONTEXT + 1)
        for at, offset in zip(row["starts"], row["offsets"], strict=True):
            expected[at] = START | NO_LOSS * (offset > 0)
        assert marks.tolist() == expected[:row["filled"]] + [NO_LOSS] * (CONTEXT + 1 - row["filled"])
    order = np.array([5, 0, 5, 2])
    np.testing.assert_array_equal(windows.marks(np.zeros(4, np.int64), order), windows.marks(*places)[order])


def test_every_token_but_the_first_of_a_document_gives_loss_once_an_epoch(packed: Path) -> None:
    windows = Windows(packed)
    places = windows.first(len(windows))
    batch = make_batch(np.stack([windows.read(*places).astype(np.int64), windows.marks(*places)], 1), True)
    split = windows.manifest.splits["train"]
    assert split.repeated_tokens and split.padding_tokens and batch.num_targets() == split.tokens - split.documents


def test_a_stream_has_marks_only_where_the_plan_asks_for_them(packed: Path, tmp_path: Path) -> None:
    plain, marked = (Plan(str(packed), 4, 1, 3, 0, marked=marked) for marked in (False, True))
    assert set(read_block(plain, range(2), 0)) == {"tokens", "step", "slot"} == set(read_block(marked, range(2), 0)) - {"marks"}
    one, other = (list(ordered_steps(local_steps(plan, 0, 0), plan, 0, 0)) for plan in (plain, marked))
    assert one[0].shape == (4, CONTEXT + 1) and other[0].shape == (4, 2, CONTEXT + 1)
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a, b[:, 0])
    mix = Mix((str(packed), str(make_corpus(tmp_path / "c"))), (0.5, 0.5), 0)
    plan = Plan(str(packed), 8, 1, 2, 0, mix, True)
    [first, _] = ordered_steps(local_steps(plan, 0, 0), plan, 0, 0)
    members, _ = mix.assign(np.arange(8))
    assert (first[members == 1, 1] == [START, *[0] * CONTEXT]).all() and (first[members == 0, 1, 1:] > 0).any()
