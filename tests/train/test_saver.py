"""A checkpoint that is written beside the steps is the one that would have been written while they stood still, or none."""

import copy
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from distlm.spec import TrainSpec
from distlm.train import checkpoint
from distlm.train.saver import Save, Saver, on_host
from tests.train.ranks import losses, make_corpus, make_packed_corpus, metrics, run_ranks, spec, windows_seen
from tests.train.test_resume import records


def files(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def saves(run: Path) -> dict[int, dict[str, float]]:
    """What metrics.jsonl tells of each checkpoint."""
    return {int(record["checkpoint"]): record for record in metrics(run) if "checkpoint" in record}


def case(corpus: Path, zero: int, precision: str, asynchronous: bool) -> TrainSpec:
    """Ten steps of two ranks, with dropout, so that random numbers count, and an average; a checkpoint after five."""
    return spec(corpus, precision=precision, duration={"steps": 10}, scale={"workers": 2}, sharding={"zero": zero}, ema={"decay": 0.9},
                model={"config": {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4}}, regularization={"dropout": 0.1},
                checkpoint={"every_steps": 5, "asynchronous": asynchronous})


def test_its_files_are_those_of_the_moment_and_a_run_goes_on_from_it_bit_equal(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path / "c")
    kinds = [(0, "bf16"), (2, "bf16"), (3, "fp32")]
    still, beside = ({tmp_path / f"{name}-{zero}-{precision}": case(corpus, zero, precision, asynchronous) for zero, precision in kinds}
                     for name, asynchronous in (("still", False), ("beside", True)))
    run_ranks(still)                                       # processes of their own: DeepSpeed numbers tensors by process
    run_ranks(beside, hold=(5, 8))
    before = {}
    for one, other in zip(still, beside, strict=True):
        expected, found = files(one / "checkpoints" / "step-000005"), files(other / "checkpoints" / "step-000005")
        assert {name for name in expected if expected[name] != found.get(name)} == set() and len(found) == len(expected), other.name
        told = saves(other).get(5, {"step": 10, "checkpoint_s": 1, "checkpoint_stall_s": 0})   # none where the last save waited for it
        assert saves(one)[5]["step"] == 6 and told["step"] >= 9, "three steps were made before anything was written"
        assert told["checkpoint_stall_s"] < told["checkpoint_s"]
        assert records(other) == records(one)
        before[other] = records(other), files(other / "export")["model.safetensors"]
        shutil.rmtree(other / "checkpoints" / "step-000010")
        shutil.rmtree(other / "export")
    run_ranks(beside)
    for run, (expected, weights) in before.items():
        assert records(run) == expected and files(run / "export")["model.safetensors"] == weights, run.name


def test_what_a_save_takes_alone_is_told_without_the_slow_steps_beside_it(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path / "c")
    runs = {tmp_path / name: spec(corpus, scale={"workers": 2}, duration={"steps": 3}, evaluate={"every_steps": 3},
                                  checkpoint={"every_steps": 1, "asynchronous": name == "beside"}) for name in ("beside", "still")}
    run_ranks(runs, slow_s=2)
    beside, still = (saves(run)[1] for run in runs)
    assert 0 < beside["checkpoint_alone_s"] < beside["checkpoint_s"] - 1, "it is committed in the next step's exchange"
    assert 0 < still["checkpoint_alone_s"] <= still["checkpoint_s"] < still["checkpoint_alone_s"] + 1


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks that nothing happens to."""
    root = tmp_path_factory.mktemp("whole")
    run_ranks({root / "run": longer(make_corpus(root / "c", windows=(300,)))})
    return root / "run"


def longer(corpus: Path) -> TrainSpec:
    return spec(corpus, scale={"workers": 2}, sharding={"zero": 2}, evaluate={"every_steps": 20})


def test_a_rank_that_is_killed_while_one_is_written_costs_the_steps_since_the_one_before(whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    given = longer(whole.parent / "c")
    run_ranks({run: given}, kill_before_step=12, hold=(10, 99))
    assert len(losses(run)) == 12, "steps went on beside it"
    assert (run / "checkpoints" / "step-000010" / "state").is_dir()
    found, refused = checkpoint.latest(run)
    assert found and found.step == 5 and not refused
    run_ranks({run: given})
    assert records(run) == records(whole)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-000015", "step-000020"]
    assert files(run / "export")["model.safetensors"] == files(whole / "export")["model.safetensors"]


def test_a_disk_that_is_full_while_one_is_written_ends_the_run_with_that_cause(whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    output = run_ranks({run: longer(whole.parent / "c")}, full_before_step=12, hold=(10, 12))
    assert "StorageError" in output and "step-000010: the checkpoint cannot be written" in output
    assert 12 <= len(losses(run)) < 20 and losses(run) == losses(whole)[:len(losses(run))]
    found, refused = checkpoint.latest(run)
    assert found and found.step == 5 and not refused
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-000005"], "a part of one takes the room that is missing"
    assert "and what there was of it is removed; free space" in output


def test_an_error_of_all_ranks_leaves_what_is_on_its_way_committed(whole: Path, tmp_path: Path) -> None:
    run, window = tmp_path / "run", windows_seen(whole)[12][0]
    output = run_ranks({run: longer(whole.parent / "c")}, poison={"window": window, "module": "model.layers.1"}, hold=(10, 12))
    assert output.count("[nonfinite_loss]") == 2, "on both ranks"
    assert [path.name for path in checkpoint.committed(run)] == ["step-000005", "step-000010"]
    assert len(losses(run)) == 12 and 10 not in saves(run), "it was on its way when the step failed"


def test_input_of_which_nothing_can_be_learnt_is_an_error_of_all_ranks_too(tmp_path: Path) -> None:
    run = tmp_path / "run"
    output = run_ranks({run: longer(make_packed_corpus(tmp_path / "c"))}, empty_step=12, hold=(10, 12))
    assert output.count("TrainError: no token gives loss at step 13") == 2, "on both ranks"
    assert [path.name for path in checkpoint.committed(run)] == ["step-000005", "step-000010"] and len(losses(run)) == 12


def test_a_checkpoint_is_listed_on_the_disk_before_an_earlier_one_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, flush = tmp_path / "checkpoints" / "step-000005", os.fsync
    (path / "state").mkdir(parents=True)
    (path / "state" / "shard").write_text("x")
    flushed: dict[Path, list[str]] = {}

    def spy(handle: int) -> None:
        name = Path(os.readlink(f"/proc/self/fd/{handle}"))
        flushed[name] = os.listdir(name) if name.is_dir() else []
        flush(handle)

    def prune(*_: Any) -> None:
        assert {"COMMITTED", "manifest.json", "state"} <= set(flushed[path])
        assert flushed[path / "state"] == ["shard"] and flushed[path.parent] == ["step-000005"]
        pruned.append(1)

    pruned: list[int] = []
    monkeypatch.setattr(os, "fsync", spy)
    monkeypatch.setattr(checkpoint, "prune", prune)
    saver: Any = SimpleNamespace(_recipe=SimpleNamespace(spec=spec(tmp_path / "c")), _run=tmp_path, _done=[], _base=None)
    Saver._seal(saver, Save(5, path, {"step": 5}, False, 0.0), [])
    assert pruned and checkpoint.verified(path).step == 5


def test_the_copy_gives_the_same_file_whatever_becomes_of_the_state(tmp_path: Path) -> None:
    flat = torch.arange(12.0)
    parameter = torch.nn.Parameter(torch.ones(2))
    noted: Any = torch.ones(2)
    noted.note, noted.like = 7, flat[:3]
    state: dict[str, Any] = {
        "noted": noted, "views": [flat[2:6], flat.view(3, 4).t()], "again": flat[2:6], "half": torch.ones(3, dtype=torch.bfloat16),
        "parameter": parameter, "tied": (parameter, 1), "grad": torch.ones(1, requires_grad=True) * 2, "none": torch.empty(0),
        "scaler": SimpleNamespace(scale=2.0), "names": {"a": torch.float32, "b": flat.shape}}
    torch.save(state, tmp_path / "before.pt")
    copied = on_host(state)
    with torch.no_grad():
        flat += 1
        noted.note = 8
        parameter *= 2
        state["half"].zero_()
        state["scaler"].scale = 1.0
    state["names"]["c"] = 1
    (tmp_path / "after").mkdir()
    torch.save(copied, tmp_path / "after" / "before.pt")   # the name is in the file
    assert (tmp_path / "after" / "before.pt").read_bytes() == (tmp_path / "before.pt").read_bytes()
    one, other = copied["views"]
    assert one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr() != copy.copy(flat).untyped_storage().data_ptr()
