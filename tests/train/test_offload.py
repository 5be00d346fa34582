"""Weights and the optimizer's states lie outside of the device, and the steps are the same."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from deepspeed.ops.op_builder import AsyncIOBuilder

from distlm import plan
from distlm.errors import SpecError, TrainError
from distlm.execute import resolve
from distlm.spec.load import dump, load_spec
from distlm.storage import Storage
from distlm.train.disks import own_disks
from distlm.train.zero import check_node, deepspeed_config
from tests.train.disks import build_op, lacking
from tests.train.ranks import losses, make_corpus, metrics, run_ranks, spec
from tests.train.test_resume import case, check_going_on, records

OPTIMIZER, BOTH = {"optimizer": "cpu"}, {"optimizer": "cpu", "parameters": "cpu"}


def sharding(zero: int, offload: dict[str, Any] | None = None) -> dict[str, Any]:
    small = {"deepspeed": {"zero_optimization": {"stage3_param_persistence_threshold": 0}}} if zero == 3 else {}
    return {"zero": zero, **small, **({"offload": offload} if offload else {})}


def check(tmp_path: Path, cases: dict[str, tuple[str, str, int, dict[str, Any]]], **sections: Any) -> None:
    """Every case goes on bit-equal from its checkpoint, and has the losses of the run that keeps all on the device."""
    corpus = make_corpus(tmp_path / "c")
    kept = {tmp_path / f"{name}-kept": case(corpus, optimizer, precision, zero, **{"sharding": sharding(zero), **sections})
            for name, (optimizer, precision, zero, _) in cases.items()}
    away = {tmp_path / name: case(corpus, optimizer, precision, zero, **{"sharding": sharding(zero, offload), **sections})
            for name, (optimizer, precision, zero, offload) in cases.items()}
    check_going_on({**kept, **away})
    for run, given in away.items():
        other = run.with_name(f"{run.name}-kept")
        rtol = 1e-5 if given.precision == "fp32" else 5e-3
        np.testing.assert_allclose(losses(run), losses(other), rtol=rtol, err_msg=run.name)
        assert metrics(run)[-1]["val_loss"] == pytest.approx(metrics(other)[-1]["val_loss"], rel=rtol), run.name


def test_what_is_offloaded_makes_the_same_steps_and_goes_on(tmp_path: Path) -> None:
    check(tmp_path, {"z3": ("lion", "fp32", 3, BOTH)}, ema={"decay": 0.9})


@pytest.mark.slow
@pytest.mark.parametrize(("optimizer", "precision"), [("adamw", "fp32"), ("adamw", "bf16"), ("sgd", "fp32"), ("muon", "bf16")])
def test_every_stage(optimizer: str, precision: str, tmp_path: Path) -> None:
    stages = [(1, OPTIMIZER), (2, OPTIMIZER), (3, OPTIMIZER), (3, {"parameters": "cpu"}), (3, BOTH)]
    check(tmp_path, {f"{zero}-{'-'.join(offload)}": (optimizer, precision, zero, offload) for zero, offload in stages})


WIDE = {"config": {"model_type": "llama", "hidden_size": 256, "intermediate_size": 2048, "num_hidden_layers": 2, "num_attention_heads": 4,
                   "num_key_value_heads": 2, "tie_word_embeddings": True}}
"""DeepSpeed leaves in memory what is less than a mebibyte on a rank."""


@pytest.fixture(scope="module")
def op(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of ranks that have DeepSpeed's own op."""
    if missing := lacking():
        pytest.skip(f"DeepSpeed's op for disks cannot be built: there is no {missing}")
    root = tmp_path_factory.getbasetemp()                  # of all processes of pytest-xdist is its parent: the op is built once
    return build_op((root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "op")


def test_what_lies_on_disks_goes_when_a_rank_ends_however_it_does(tmp_path: Path) -> None:
    options = {"offload_optimizer": {"device": "nvme", "nvme_path": str(tmp_path / "fast")}}
    with pytest.raises(ZeroDivisionError), own_disks(options, tmp_path / "run", 0):
        own = Path(options["offload_optimizer"]["nvme_path"], "zero_stage_3", "optimizer")
        assert own.is_relative_to(tmp_path / "fast") and "run-" in str(own)
        for rank in ("rank0", "rank1"):
            (own / rank).mkdir(parents=True)
            (own / rank / "1.tensor.swp").touch()
        raise ZeroDivisionError
    assert [one.name for one in (tmp_path / "fast").rglob("*.swp")] == ["1.tensor.swp"] and not (own / "rank0").exists()
    options["offload_optimizer"]["nvme_path"] = str(tmp_path / "fast")
    with own_disks(options, tmp_path / "run", 1):
        pass
    assert not [*(tmp_path / "fast").iterdir()]


def check_disks(tmp_path: Path, optimizer: str, precision: str, parameters: dict[str, str], **ranks: Any) -> None:
    """A run that is killed goes on bit-equal from what lies on disks, has the losses of one that has all in memory, and leaves nothing."""
    disk, corpus = tmp_path / "disk", make_corpus(tmp_path / "c")
    kept, away = (case(corpus, optimizer, precision, 3, model=WIDE, sharding=sharding(3, offload))
                  for offload in (None, {"optimizer": "nvme", "path": str(disk), **parameters}))
    run_ranks({tmp_path / "killed": away}, kill_before_step=5, **ranks)
    assert [path for path in disk.rglob("*.swp") if path.stat().st_size >= 1 << 20], "some of it lies there"
    run_ranks({tmp_path / "kept": kept, tmp_path / "whole": away, tmp_path / "killed": away}, **ranks)
    assert not list(disk.iterdir()), "nothing is left by runs that have ended"
    assert records(tmp_path / "killed") == records(tmp_path / "whole")
    ours, theirs = ((tmp_path / run / "export" / "model.safetensors").read_bytes() for run in ("killed", "whole"))
    assert ours == theirs
    np.testing.assert_allclose(losses(tmp_path / "whole"), losses(tmp_path / "kept"), rtol=1e-5 if precision == "fp32" else 5e-3)


def test_what_lies_on_disks_makes_the_same_steps_and_goes_on(tmp_path: Path) -> None:
    check_disks(tmp_path, "adamw", "bf16", {}, plain_disks=True)


@pytest.mark.slow
@pytest.mark.timeout(1800)                                 # the op is built first
@pytest.mark.parametrize(("optimizer", "precision", "parameters"), [
    ("adamw", "fp32", {}), ("adamw", "bf16", {"parameters": "cpu"}), ("lion", "fp32", {"parameters": "cpu"}), ("sgd", "bf16", {})])
def test_what_deepspeed_s_op_lays_on_disks_makes_the_same_steps_and_goes_on(
        tmp_path: Path, op: dict[str, str], optimizer: str, precision: str, parameters: dict[str, str]) -> None:
    check_disks(tmp_path, optimizer, precision, parameters, environment=op)


def test_a_node_without_what_disks_need_says_so_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(builder: Any, verbose: bool) -> None:
        raise RuntimeError("Error building extension 'async_io': [1/3] c++ a.cpp\nb.h:7:10: fatal error: libaio.h: No such file\n")

    (tmp_path / "file").touch()
    given = spec(Path("c"), sharding={"zero": 3, "offload": {"optimizer": "nvme", "path": str(tmp_path / "file" / "disk")}})
    option = {"offload_optimizer": {"device": "nvme", "nvme_path": "/proc"}}
    raw = spec(Path("c"), sharding={"zero": 3, "deepspeed": {"zero_optimization": option}})
    for can, load, one, message in (
            (False, fails, given, "sharding.offload: a worker's node lacks libaio"),
            (True, fails, given, "cannot build what DeepSpeed reads and writes disks with: b.h:7:10: fatal error: libaio.h: No such file"),
            (True, lambda *_, **__: None, given, "/file/disk: a worker's node cannot write there: Not a directory"),
            (True, lambda *_, **__: None, raw, "offload.path: /proc: a worker's node cannot write there: ")):
        monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda *_, can=can, **__: can)
        monkeypatch.setattr(AsyncIOBuilder, "load", load)
        with pytest.raises(TrainError) as error:
            check_node(one)
        assert message in str(error.value) and "\n" not in str(error.value) and error.value.cause == "bad_input"


def test_runs_that_share_a_disk_lie_apart(tmp_path: Path) -> None:
    found = []
    for run in ("a/run", "b/run"):
        config = deepspeed_config(spec(Path("c"), sharding=NVME), 1, 1)
        with own_disks(config["zero_optimization"], tmp_path / run, 0):
            found.append(Path(config["zero_optimization"]["offload_optimizer"]["nvme_path"]))
    assert found[0] != found[1] and {one.parent for one in found} == {Path("/scratch")}
    options = deepspeed_config(spec(Path("c"), sharding=sharding(3, BOTH)), 1, 1)["zero_optimization"]
    with own_disks(before := dict(options), tmp_path, 0):
        assert options == before, "nothing of it lies on disks"


NVME = {"zero": 3, "offload": {"optimizer": "nvme", "parameters": "cpu", "path": "/scratch"}}


def test_deepspeed_takes_the_configuration_of_every_key() -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    raw = {"deepspeed": {"zero_optimization": {"offload_optimizer": {"buffer_count": 5}}}}
    zero = DeepSpeedZeroConfig(**deepspeed_config(spec(Path("c"), sharding={**NVME, **raw}), 1, 1)["zero_optimization"])
    assert zero.offload_optimizer and zero.offload_param and zero.offload_optimizer.buffer_count == 5
    assert [one.device for one in (zero.offload_optimizer, zero.offload_param)] == ["nvme", "cpu"]
    assert str(zero.offload_optimizer.nvme_path) == "/scratch"
    zero = DeepSpeedZeroConfig(**deepspeed_config(spec(Path("c"), sharding=sharding(1, OPTIMIZER)), 1, 1)["zero_optimization"])
    assert zero.offload_optimizer and zero.offload_optimizer.device == "cpu" and zero.offload_param is None


@pytest.mark.parametrize(("sections", "message"), [
    ({"sharding": {"zero": 2, "offload": {"parameters": "cpu"}}}, "offload.parameters: cpu needs weights that are sharded; set zero: 3"),
    ({"sharding": {"zero": 0, "offload": {"optimizer": "cpu"}}}, "offload.optimizer: cpu needs ZeRO stage 1 at least, and zero is 0"),
    ({"sharding": {**NVME, "zero": 2, "offload": {"optimizer": "nvme", "path": "/d"}}}, "nvme needs ZeRO stage 3 at least, and zero is 2"),
    ({"sharding": {"zero": 3, "offload": {"optimizer": "nvme"}}}, "sharding.offload.path: optimizer: nvme needs a folder"),
    ({"sharding": {"zero": 3, "offload": {"optimizer": "cpu", "path": "/d"}}}, "sharding.offload.path: /d has no effect"),
    ({"sharding": {"zero": 3, "offload": {}}}, "sharding.offload: neither optimizer nor parameters is given"),
    ({"sharding": NVME, "optimizer": {"name": "muon", "clip": 0}}, "sharding.offload.optimizer: nvme is not proved to make the same steps"),
    ({"sharding": {"zero": 3, "deepspeed": {"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}}},
     "sharding.deepspeed.zero_optimization.offload_optimizer: device: nvme needs nvme_path"),
    ({"sharding": {"zero": 3, "deepspeed": {"zero_optimization": {"offload_param": {"device": "nvme", "nvme_path": "/d"}}}}},
     "sharding.deepspeed.zero_optimization.offload_param: nvme ends runs: DeepSpeed"),
    ({"sharding": NVME, "ema": {}}, "sharding.offload.optimizer: weights on disks cannot be averaged"),
    ({"sharding": {**sharding(2, OPTIMIZER), "deepspeed": {"zero_optimization": {"offload_optimizer": {"device": "none"}}}}},
     "sharding.deepspeed.zero_optimization.offload_optimizer.device: contradicts sharding.offload.optimizer")])
def test_what_deepspeed_cannot_offload_is_refused_by_key(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError) as error:
        load_spec({**dump(spec(Path("c"))), **sections})
    assert message in str(error.value)


def test_the_plan_tells_what_lies_where(tmp_path: Path) -> None:
    sections: dict[str, Any] = {"sharding": {"zero": 3, "offload": {"optimizer": "nvme", "parameters": "cpu", "path": "/scratch"}},
                                "scale": {"gpus_per_worker": 1}}
    given = spec(make_corpus(tmp_path / "c"), **sections)
    rows = dict(plan.needs(resolve(dump(given)), Storage(tmp_path)))
    assert "(weights " in rows["host memory a worker"] and "(optimizer " in rows["on disks a worker"]
    assert "optimizer" not in rows["memory a worker"] and "weights" not in rows["memory a worker"]
