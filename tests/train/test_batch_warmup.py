"""A batch that grows: each step has its size, every sample its turn, and the steps are those of a loop written by hand."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distlm.corpus.stream import BatchSizes, Plan, local_steps, ordered_steps
from distlm.errors import CheckpointError, SpecError
from distlm.spec import TrainSpec, load_spec
from distlm.storage import Storage
from distlm.train import checkpoint
from distlm.train.recipe import make_recipe
from tests.train.ranks import CONTEXT, losses, losses_by_hand, make_corpus, metrics, run_ranks, spec, windows_seen

WARMUP = {"start_sequences": 4, "tokens": 24 * CONTEXT}
"""Sizes 4 and 8 before 12: 12 sequences each, in 3 and 2 steps."""
SIZES = [4, 4, 4, 8, 8, 12, 12, 12]


def growing(corpus: Path, micro: int = 2, **sections: Any) -> TrainSpec:
    return spec(corpus, **{"batch": {"global_sequences": 12, "micro_sequences": micro, "warmup": WARMUP}, "duration": {"steps": 8},
                           "evaluate": {"every_steps": 4}, "checkpoint": {"every_steps": 4}, **sections})


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus") / "c")


def test_steps_and_samples_are_counted_alike() -> None:
    sizes = BatchSizes(12, ((4, 3), (8, 2)))
    assert [sizes.of(step) for step in range(8)] == SIZES
    assert [sizes.before(step) for step in range(9)] == [0, *np.cumsum(SIZES)]
    for samples in range(1, 65):
        steps = sizes.steps(samples)
        assert sizes.before(steps - 1) < samples <= sizes.before(steps)
    assert sizes.steps(12.1) == 4 and BatchSizes(12).steps(24) == 2


@pytest.mark.parametrize(("world", "group"), [(1, 1), (2, 1), (4, 2)])
def test_the_stream_gives_every_sample_once_and_goes_on_in_the_midst(corpus: Path, world: int, group: int) -> None:
    plan = Plan(str(corpus), 12, world, 8, 0, group=group, warmup=((4, 3), (8, 2)))
    taken = [np.concatenate([plan.samples(step, rank) for rank in range(0, world, group)]) for step in range(8)]
    assert [len(samples) for samples in taken] == SIZES
    np.testing.assert_array_equal(np.concatenate(taken), np.arange(sum(SIZES)))

    def pieces(first: int) -> Any:                         # what Ray Data gives: as many rows each time
        for batch in local_steps(plan, 0, first):
            for start in range(0, len(batch["tokens"]), plan.piece):
                yield {key: value[start:start + plan.piece] for key, value in batch.items()}

    whole = [batch["tokens"] for batch in local_steps(plan, 0, 0)]
    for first in (0, 2, 4, 6):
        got = list(ordered_steps(pieces(first), plan, 0, first))
        assert len(got) == 8 - first
        for mine, expected in zip(got, whole[first:], strict=True):
            np.testing.assert_array_equal(mine, expected)


@pytest.mark.parametrize("names", [("zero0", "zero3"), pytest.param(("zero1", "zero2", "offloaded"), marks=pytest.mark.slow)])
def test_every_cut_and_stage_makes_the_steps_of_a_loop_written_by_hand(corpus: Path, tmp_path: Path, names: tuple[str, ...]) -> None:
    expected = losses_by_hand(growing(corpus), corpus)
    sharded = {"zero": 3, "deepspeed": {"zero_optimization": {"stage3_param_persistence_threshold": 0}}}
    cases: dict[str, Any] = {f"zero{zero}": {"sharding": {"zero": zero}} for zero in (0, 1, 2)} | {
        "zero3": {"sharding": sharded}, "offloaded": {"sharding": {"zero": 2, "offload": {"optimizer": "cpu"}}}}
    two = {tmp_path / name: growing(corpus, micro, scale={"workers": 2}, **case)
           for micro in (1, 2) for name, case in ((f"{name}-{micro}", cases[name]) for name in names)}
    run_ranks(two)
    run_ranks({tmp_path / "one": growing(corpus, 4)})
    for run in (*two, tmp_path / "one"):
        np.testing.assert_allclose(losses(run), expected, rtol=2e-5, err_msg=run.name)
        assert [len(numbers) for numbers in windows_seen(run).values()] == SIZES, run.name
    assert [record["tokens"] for record in metrics(tmp_path / "one") if "loss" in record] == [n * CONTEXT for n in np.cumsum(SIZES)]


def test_a_run_goes_on_in_the_midst_of_it_and_not_with_another(corpus: Path, tmp_path: Path) -> None:
    run, given = tmp_path / "run", growing(corpus, scale={"workers": 2}, sharding={"zero": 2})
    run_ranks({run: given})
    steps, weights = losses(run), (run / "export" / "model.safetensors").read_bytes()
    shutil.rmtree(run / "checkpoints" / "step-000008")
    shutil.rmtree(run / "export")
    (run / "windows-0.txt").unlink()
    run_ranks({run: given})
    assert losses(run) == steps and (run / "export" / "model.safetensors").read_bytes() == weights
    assert (run / "windows-0.txt").read_text().startswith("4: ")
    start, _ = checkpoint.latest(run)
    assert start and (start.manifest["samples"], start.manifest["tokens"]) == (64, 64 * CONTEXT)
    other = make_recipe(spec(corpus, scale={"workers": 2}, sharding={"zero": 2}), Storage(tmp_path))
    with pytest.raises(CheckpointError, match=r"was saved with batch_warmup \[\[4, 3\], \[8, 2\]\], and the spec says \[\]"):
        checkpoint.check_fits(start, other)


def test_durations_and_warm_ups_in_tokens_count_what_the_steps_take(corpus: Path) -> None:
    given = growing(corpus, duration={"tokens": 41 * CONTEXT}, schedule={"warmup_tokens": 13 * CONTEXT})
    recipe = make_recipe(given, Storage(corpus.parent))
    assert recipe.num_steps == 7 and recipe.num_samples == 52 and recipe.spec.schedule.warmup_steps == 4
    assert make_recipe(growing(corpus, duration={"epochs": 1}), Storage(corpus.parent)).num_steps == 7, "48 windows"


@pytest.mark.parametrize(("batch", "workers", "message"), [
    ({"warmup": {"start_sequences": 12, "tokens": 9}}, 1, "batch.warmup.start_sequences: 12 is not below the 12 of the whole batch"),
    ({"warmup": {"start_sequences": 3, "tokens": 9}}, 2, "warmup.start_sequences: 3 sequences cannot be divided over 2 workers; try 4"),
    ({"warmup": {"start_sequences": 2, "increment_sequences": 6, "tokens": 9}}, 1,
     "batch.warmup.increment_sequences: 6 does not lead from 2 to 12 sequences; try 5"),
    ({"warmup": {"start_sequences": 4, "tokens": 9}, "micro_sequences": 3}, 1,
     "3 does not divide the 4 sequences by which the steps of batch.warmup differ, over 1 workers (4 each); try 1, 2, 4"),
    ({"warmup": {"start_sequences": 4}}, 1, "batch.warmup.tokens")])
def test_what_cannot_be(batch: dict[str, Any], workers: int, message: str) -> None:
    with pytest.raises(SpecError) as error:
        load_spec({"kind": "train", "name": "a", "corpus": "c", "model": {"preset": "llama-tiny"}, "duration": {"steps": 9},
                   "scale": {"workers": workers}, "batch": {"global_sequences": 12, **batch}})
    assert message in str(error.value)
