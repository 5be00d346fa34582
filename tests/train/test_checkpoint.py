"""Only what was committed whole, and is still whole, is a checkpoint."""

import math
import pickle
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from distlm.errors import CheckpointError
from distlm.runs import RunFolder
from distlm.spec import TrainSpec
from distlm.spec.load import load_spec
from distlm.storage import Storage, read_json, write_json
from distlm.train import checkpoint
from distlm.train.recipe import make_recipe
from tests.train.ranks import losses, make_corpus, metrics, run_ranks, spec


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("run")
    run_ranks({root / "run": spec(make_corpus(root / "c"))})
    return root / "run"


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def test_the_newest_two_are_kept_and_each_is_committed(run: Path) -> None:
    assert [path.name for path in checkpoint.committed(run)] == ["step-000015", "step-000020"]
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"step-000015", "step-000020"}
    found, refused = checkpoint.latest(run)
    assert found and found.step == 20 and not refused
    assert found.manifest["samples"] == 20 * 12 and found.manifest["tokens"] == 20 * 12 * 16


def damage_shard(folder: Path, damage: str) -> None:
    """Cut off the end of a shard of a checkpoint, turn a bit in its middle, or delete it."""
    shard = next((folder / "state").glob("*model_states.pt"))
    data = bytearray(shard.read_bytes())
    if damage == "missing":
        shard.unlink()
    elif damage == "truncated":
        shard.write_bytes(data[:-7])
    else:
        data[len(data) // 2] ^= 1
        shard.write_bytes(data)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing", "manifest", "marker", "renamed"])
def test_a_damaged_checkpoint_is_refused_and_the_one_before_is_taken(run: Path, damage: str) -> None:
    newest = run / "checkpoints" / "step-000020"
    if damage in ("truncated", "flipped", "missing"):
        damage_shard(newest, damage)
    elif damage == "marker":
        (newest / "COMMITTED").write_bytes(b"\xff" + (newest / "COMMITTED").read_bytes()[1:])
    elif damage == "renamed":
        newest = newest.rename(newest.with_name("step-000030"))
    else:
        (newest / "manifest.json").write_text((newest / "manifest.json").read_text().replace('"step": 20', '"step": 21'))
    found, refused = checkpoint.latest(run)
    assert found and found.step == 15
    assert len(refused) == 1 and str(newest) in str(refused[0])


def test_nothing_is_unpickled_before_its_hash_has_been_looked_at(run: Path) -> None:
    """A shard that does something as it is loaded: the checkpoint before it is taken, and that was never done."""
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (run / "sprung",)

    trap = pickle.dumps(Trap())
    for shard in (run / "checkpoints" / "step-000020").rglob("*.pt"):
        shard.write_bytes(trap)
    shutil.rmtree(run / "export")
    given = load_spec(run / "spec.yaml").spec
    assert isinstance(given, TrainSpec)
    run_ranks({run: given})
    assert not (run / "sprung").exists() and len(losses(run)) == 20
    assert len((run / "windows-0.txt").read_text().splitlines()) == 20 + 5, "it goes on at step 15"
    pickle.loads(trap)
    assert (run / "sprung").exists()


def test_a_copy_under_another_name_is_left_alone(run: Path) -> None:
    copy = Path(shutil.copytree(run / "checkpoints" / "step-000020", run / "checkpoints" / "step-000020.bak"))
    found, refused = checkpoint.latest(run)
    assert found and found.step == 20 and not refused
    checkpoint.prune(run, keep=2)
    assert (copy / "COMMITTED").exists() and len(checkpoint.committed(run)) == 2


def test_milestones_and_the_best_are_kept_beside_the_newest(tmp_path: Path) -> None:
    losses: dict[int, float | None] = {5: math.nan, 10: 1.5, 15: 1.0, 20: 2.0, 25: None, 30: 1.5, 35: 2.5, 40: 2.4}
    for step, loss in losses.items():
        path = checkpoint.checkpoint_path(tmp_path, step)
        path.mkdir(parents=True)
        write_json(path / "manifest.json", {"step": step, **({} if loss is None else {"val_loss": loss})})
        (path / "COMMITTED").touch()
        checkpoint.prune(tmp_path, keep=2, milestone_steps=20, keep_best=2)
    assert [int(path.name[5:]) for path in checkpoint.committed(tmp_path)] == [10, 15, 20, 35, 40]
    (tmp_path / "checkpoints" / "step-000015" / "manifest.json").write_text("{")
    checkpoint.prune(tmp_path, keep=2, keep_best=1)
    assert [int(path.name[5:]) for path in checkpoint.committed(tmp_path)] == [10, 35, 40]


def test_what_was_evaluated_after_sigterm_counts_among_the_best(tmp_path: Path) -> None:
    for step, loss in {5: 2.0, 10: None, 15: 1.5, 20: 3.0, 25: None}.items():
        path = checkpoint.checkpoint_path(tmp_path, step)
        path.mkdir(parents=True)
        write_json(path / "manifest.json", {"step": step, **({} if loss is None else {"val_loss": loss})})
        (path / "COMMITTED").touch()
    for record in ({"step": 10, "loss": 1.0}, {"step": 10, "val_loss": 1.0}, {"step": 25, "averaged": [], "val_loss": 0.5}):
        RunFolder(tmp_path).metrics(record)
    checkpoint.prune(tmp_path, keep=1, keep_best=2)
    assert [int(path.name[5:]) for path in checkpoint.committed(tmp_path)] == [10, 15, 25]


def test_every_checkpoint_is_evaluated_where_the_best_are_kept(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run_ranks({run: spec(make_corpus(tmp_path / "c"), checkpoint={"every_steps": 4, "keep_best": 2, "milestone_steps": 8})})
    values = {record["step"]: record["val_loss"] for record in metrics(run) if "val_loss" in record}
    assert sorted(values) == [0, 4, 8, 10, 12, 16, 20]
    best = sorted((4, 8, 12, 16, 20), key=values.__getitem__)[:2]
    kept = {int(path.name[5:]): read_json(path / "manifest.json")["val_loss"] for path in checkpoint.committed(run)}
    assert kept == {step: values[step] for step in sorted({8, 16, 20, *best})}


def test_a_folder_without_the_marker_is_no_checkpoint(run: Path) -> None:
    (run / "checkpoints" / "step-000020" / "COMMITTED").unlink()
    found, refused = checkpoint.latest(run)
    assert found and found.step == 15 and not refused
    checkpoint.prune(run, keep=2)
    assert not (run / "checkpoints" / "step-000020").exists()


def test_a_run_goes_on_from_the_checkpoint_before_and_ends_the_same(run: Path, tmp_path: Path) -> None:
    runs = {Path(shutil.copytree(run, tmp_path / damage)): damage for damage in ("truncated", "flipped", "missing")}
    for damaged, damage in runs.items():
        damage_shard(damaged / "checkpoints" / "step-000020", damage)
        shutil.rmtree(damaged / "export")
    run_ranks({damaged: spec(_corpus(run)) for damaged in runs})
    for damaged, damage in runs.items():
        assert losses(damaged) == losses(run), damage
        assert len([line for line in (damaged / "windows-0.txt").read_text().splitlines() if line.startswith("15: ")]) == 2, "from step 15"
        assert checkpoint.verified(damaged / "checkpoints" / "step-000020").step == 20
        ours, theirs = ((one / "export" / "model.safetensors").read_bytes() for one in (damaged, run))
        assert ours == theirs, damage


def test_a_rank_that_is_killed_in_the_middle_of_a_save_that_steps_wait_for_costs_the_steps_since_the_one_before(tmp_path: Path) -> None:
    run, whole = tmp_path / "run", tmp_path / "whole"
    given = spec(make_corpus(tmp_path / "c"), scale={"workers": 2}, sharding={"zero": 2},
                 checkpoint={"every_steps": 5, "asynchronous": False})
    run_ranks({whole: given})
    run_ranks({run: given}, inside=(signal.SIGKILL, "write", 10))
    partial = run / "checkpoints" / "step-000010"
    assert len([*(partial / "state").glob("*optim_states.pt")]) >= 1 and not (partial / "COMMITTED").exists(), "the fault fired inside it"
    found, refused = checkpoint.latest(run)
    assert found and found.step == 5 and not refused and len(losses(run)) == 10
    run_ranks({run: given})
    assert losses(run) == losses(whole)
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"step-000015", "step-000020"}
    ours, theirs = ((one / "export" / "model.safetensors").read_bytes() for one in (run, whole))
    assert ours == theirs


def test_a_disk_that_is_full_in_the_middle_of_a_save_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    run = tmp_path / "run"
    output = run_ranks({run: spec(make_corpus(tmp_path / "c"))}, full_before_step=7)
    assert "StorageError" in output and "step-000010: the checkpoint cannot be written" in output
    found, refused = checkpoint.latest(run)
    assert found and found.step == 5 and not refused
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-000005"] and not (run / "export").exists()
    assert "and what there was of it is removed; free space" in output


def _corpus(run: Path) -> Path:
    from distlm.spec import load_spec

    return Path(load_spec(run / "spec.yaml").spec.corpus)  # type: ignore[union-attr]


def test_a_run_that_has_gone_further_than_the_spec_asks_is_refused(run: Path) -> None:
    found, _ = checkpoint.latest(run)
    assert found
    with pytest.raises(CheckpointError, match="has 20 steps done, and the spec asks for 10; set duration to 20 steps or more"):
        checkpoint.check_fits(found, make_recipe(spec(_corpus(run), duration={"steps": 10}), Storage(run.parent)))


def test_one_whose_gradients_were_added_up_otherwise_is_refused_as_are_those_of_older_versions(run: Path) -> None:
    found, _ = checkpoint.latest(run)
    assert found and found.manifest["reduce_precision"] == "same", "in fp32 there is one way alone"
    older = replace(found, manifest={key: value for key, value in found.manifest.items() if key != "reduce_precision"} | {
        "precision": "bf16"})
    summed, same = (make_recipe(spec(_corpus(run), precision="bf16", reduce_precision=how), Storage(run.parent))
                    for how in ("fp32", "same"))
    checkpoint.check_fits(older, same)
    with pytest.raises(CheckpointError, match="was saved with reduce_precision same, and the spec says fp32"):
        checkpoint.check_fits(older, summed)


NVME = {"zero": 3, "deepspeed": {"zero_optimization": {"offload_optimizer": {"device": "nvme", "nvme_path": "/tmp"}}}}


@pytest.mark.parametrize(("change", "name"), [({"scale": {"workers": 2}, "sharding": NVME}, "workers"), ({"sharding": NVME}, "zero"),
                                              ({"sharding": {"zero": 1}, "optimizer": {"name": "muon", "clip": 0}}, "zero"),
                                              ({"precision": "bf16"}, "precision"), ({"seed": 1}, "seed")])
def test_a_checkpoint_of_another_set_up_is_refused_by_name(run: Path, change: dict[str, object], name: str) -> None:
    found, _ = checkpoint.latest(run)
    assert found
    recipe = make_recipe(spec(_corpus(run), **change), Storage(run.parent))
    with pytest.raises(CheckpointError, match=f"was saved with {name}"):
        checkpoint.check_fits(found, recipe)
