"""In fp8 a run follows bf16's, goes on bit-equal, and exports what any other does. Ranks on CPU stand for those on GPUs, by emulation."""

import importlib.util
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from distlm.corpus.stream import Windows
from distlm.errors import SpecError, TrainError
from distlm.model.loss import CausalLoss
from distlm.spec import TrainSpec
from distlm.spec.load import dump, load_spec
from distlm.storage import Storage
from distlm.train.recipe import make_recipe
from distlm.train.zero import check_node
from tests.train.ranks import losses, make_corpus, metrics, run_ranks, spec
from tests.train.test_resume import case, check_going_on

pytest.importorskip("torchao")
ON_GPU, ON_GPUS = {"gpus_per_worker": 1}, {"workers": 2, "gpus_per_worker": 1}
compiler = pytest.mark.skipif(not shutil.which("g++") and not shutil.which("clang++"), reason="there is no C++ compiler")


def fp8(corpus: Path, **sections: Any) -> TrainSpec:
    return spec(corpus, **{"precision": "fp8", "compile": True, "scale": ON_GPU, **sections})


@compiler
@pytest.mark.slow
def test_losses_follow_bf16_s_and_the_export_is_any_other_s(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path / "c")
    run_ranks({tmp_path / "bf16": fp8(corpus, precision="bf16"), tmp_path / "fp8": fp8(corpus),
               tmp_path / "again": fp8(corpus, activation_checkpointing=1)})
    found, wanted = losses(tmp_path / "fp8"), losses(tmp_path / "bf16")
    assert len(found) == 20 and found[-1] < found[0] - 0.3 and found != wanted, "nothing was rounded"
    np.testing.assert_allclose(found, wanted, rtol=1e-2)
    np.testing.assert_allclose(losses(tmp_path / "again"), found, rtol=5e-3)
    weights, others = (load_file(tmp_path / name / "export" / "model.safetensors") for name in ("fp8", "bf16"))
    assert {name: (value.shape, value.dtype) for name, value in weights.items()} == \
        {name: (value.shape, value.dtype) for name, value in others.items()}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "fp8" / "export", dtype=torch.bfloat16)
    windows = Windows(corpus, "val")
    tokens = torch.from_numpy(windows.read(*windows.first(len(windows))).astype(np.int64))
    with torch.no_grad():
        loss = CausalLoss(model.eval())(tokens) / tokens[:, 1:].numel()
    assert float(loss) == pytest.approx(metrics(tmp_path / "fp8")[-1]["val_loss"], rel=1e-3)


@compiler
@pytest.mark.slow
def test_a_run_goes_on_bit_equal_under_zero(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path / "c")
    check_going_on({tmp_path / f"zero{zero}": case(corpus, "adamw", "fp8", zero, scale=ON_GPUS, compile=True, **sections)
                    for zero, sections in ((0, {}), (2, {"ema": {"decay": 0.9}}))})
    np.testing.assert_allclose(losses(tmp_path / "zero2"), losses(tmp_path / "zero0"), rtol=1e-2)


@pytest.mark.parametrize(("sections", "message"), [
    ({"scale": {}}, "precision: fp8 needs GPUs, and scale.gpus_per_worker is 0; take bf16"),
    ({"scale": {**ON_GPU, "gpu": "A100"}}, "precision: fp8 is not in the hardware of A100; take bf16, or one of B200, H200"),
    ({"compile": False}, "compile: fp8 is slower than bf16 where layers are not compiled; set compile: true, or take bf16"),
    ({"sharding": {"zero": 3}}, "compile: true cannot be with ZeRO stage 3"),
    ({"sharding": {"tensor_parallel": 2, "zero": 1}, "scale": ON_GPUS, "compile": False}, "sharding.tensor_parallel: cannot be with"),
    ({"sharding": {"sequence_parallel": 2}, "scale": ON_GPUS, "compile": False}, "sharding.sequence_parallel: cannot be with"),
    ({"adapter": {}, "model": {"from": "m"}, "compile": False}, "adapter: is not proved with fp8"),
    ({"objective": "dpo", "model": {"from": "m"}}, "precision: fp8 is not proved with objective: dpo"),
    ({"loss_scale": {"window": 5}}, "loss_scale: ")])
def test_what_cannot_be_is_refused_by_key(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError) as error:
        load_spec({**dump(fp8(Path("c"))), **sections})
    assert message in str(error.value)


@pytest.mark.parametrize("gpu", ["H100", "H200", "L4", "RTX 4090", "B200"])
def test_gpus_that_can_are_taken(gpu: str) -> None:
    assert fp8(Path("c"), scale={**ON_GPU, "gpu": gpu}).precision == "fp8"


def test_a_recipe_refuses_other_models_and_names_the_missing_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = make_corpus(tmp_path / "c")
    gpt2 = fp8(corpus, model={"config": {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4}})
    with pytest.raises(SpecError, match="precision: the gpt2 family has weights in its layers that are not of linear layers"):
        make_recipe(gpt2, Storage(tmp_path))
    make_recipe(fp8(corpus), Storage(tmp_path))
    without_torchao(monkeypatch)
    with pytest.raises(SpecError, match=re.escape("precision: the package torchao is not installed; pip install 'distlm[compress]'")):
        make_recipe(fp8(corpus), Storage(tmp_path))


def test_a_node_that_cannot_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A10G")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 9))
    check_node(fp8(Path("c")))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 6))
    with pytest.raises(TrainError, match=r"fp8 needs a GPU of compute capability 8.9, and a worker's NVIDIA A10G has 8.6; take bf16"):
        check_node(fp8(Path("c")))
    without_torchao(monkeypatch)
    with pytest.raises(TrainError, match="precision: the package torchao is not installed on a worker's node; pip install"):
        check_node(fp8(Path("c")))


def without_torchao(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "torchao" else find(name, *more))
