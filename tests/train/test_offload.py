"""Weights and the optimizer's states lie outside of the device, and the steps are the same."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distlm import plan
from distlm.errors import SpecError
from distlm.execute import resolve
from distlm.spec.load import dump, load_spec
from distlm.storage import Storage
from distlm.train.zero import deepspeed_config
from tests.train.ranks import losses, make_corpus, metrics, spec
from tests.train.test_resume import case, check_going_on

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


NVME = {"zero": 3, "offload": {"optimizer": "nvme", "parameters": "nvme", "path": "/scratch"}}


def test_deepspeed_takes_the_configuration_of_every_key() -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    raw = {"deepspeed": {"zero_optimization": {"offload_optimizer": {"buffer_count": 5}}}}
    zero = DeepSpeedZeroConfig(**deepspeed_config(spec(Path("c"), sharding={**NVME, **raw}), 1, 1)["zero_optimization"])
    assert zero.offload_optimizer and zero.offload_param and zero.offload_optimizer.buffer_count == 5
    assert [one.device for one in (zero.offload_optimizer, zero.offload_param)] == ["nvme", "nvme"]
    assert [str(one.nvme_path) for one in (zero.offload_optimizer, zero.offload_param)] == ["/scratch", "/scratch"]
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
