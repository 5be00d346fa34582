"""In fp16 a scaled loss makes the steps of fp32 within its rounding; an overflow skips a step and is told."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distlm.errors import SpecError
from distlm.spec import TrainSpec
from distlm.spec.load import dump, load_spec
from tests.train.ranks import losses, make_corpus, metrics, run_ranks, spec
from tests.train.test_resume import case, check_going_on

ON_GPUS = {"workers": 2, "gpus_per_worker": 1}


def fp16(corpus: Path, zero: int, optimizer: str = "adamw", precision: str = "fp16", **scale: int) -> TrainSpec:
    return case(corpus, optimizer, precision, zero, scale=ON_GPUS, **({"loss_scale": scale} if scale else {}))


def test_overflows_are_skipped_and_told_and_a_run_goes_on_with_its_scale(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path / "c")
    plain, doubled = fp16(corpus, 1, "sgd", initial_power=8), fp16(corpus, 1, "sgd", initial_power=8, window=1)
    check_going_on({tmp_path / "fp32": fp16(corpus, 1, "sgd", "fp32"), tmp_path / "plain": plain, tmp_path / "doubled": doubled,
                    tmp_path / "overflow": fp16(corpus, 2, initial_power=21)})
    np.testing.assert_allclose(losses(tmp_path / "plain"), losses(tmp_path / "fp32"), rtol=2e-3)
    np.testing.assert_allclose(losses(tmp_path / "doubled"), losses(tmp_path / "plain"), rtol=2e-4)
    scales = {name: [record.get("loss_scale") for record in metrics(tmp_path / name) if "loss" in record]
              for name in ("fp32", "plain", "doubled", "overflow")}
    assert scales["fp32"] == [None] * 6 and scales["plain"] == [256.0] * 6 and scales["doubled"] == [2.0 ** (8 + n) for n in range(1, 7)]
    records = [record for record in metrics(tmp_path / "overflow") if "loss" in record]
    skipped = [record.get("skipped", False) for record in records]
    assert skipped[:2] == [True, True] and records[0]["loss_scale"] == 2.0**21 and records[1]["loss_scale"] == 2.0**20
    assert all(("grad_norm" in record) != before for record, before in zip(records, skipped, strict=True))


@pytest.mark.slow
def test_every_stage_goes_on_and_another_layout_keeps_the_scale(tmp_path: Path) -> None:
    import shutil

    corpus = make_corpus(tmp_path / "c")
    check_going_on({tmp_path / f"z{zero}": fp16(corpus, zero, initial_power=8, window=2) for zero in (1, 2, 3)})
    for zero in (2, 3):
        np.testing.assert_allclose(losses(tmp_path / f"z{zero}"), losses(tmp_path / "z1"), rtol=2e-3)
    before = metrics(tmp_path / "z2")
    shutil.rmtree(tmp_path / "z2" / "checkpoints" / "step-000006")
    run_ranks({tmp_path / "z2": fp16(corpus, 3, initial_power=8, window=2)})
    np.testing.assert_allclose(losses(tmp_path / "z2"), [record["loss"] for record in before if "loss" in record], rtol=2e-3)
    assert [record.get("loss_scale", 0) >= 512 for record in metrics(tmp_path / "z2") if record["step"] > 3] == [True] * 3


@pytest.mark.parametrize(("sections", "message"), [
    ({"precision": "fp16"}, "precision: fp16 needs GPUs, and scale.gpus_per_worker is 0"),
    ({"precision": "fp16", "scale": ON_GPUS}, "sharding.zero: 0 cannot be with fp16"),
    ({"loss_scale": {"window": 5}}, "loss_scale: ")])
def test_what_cannot_be_is_refused_by_key(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError) as error:
        load_spec({**dump(spec(Path("c"))), **sections})
    assert message in str(error.value)
