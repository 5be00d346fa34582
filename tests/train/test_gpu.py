"""On one GPU: each step is the CPU's within rounding, and a run that goes on is bit-equal to one that was not stopped."""

import importlib.util
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from deepspeed.ops.op_builder import AsyncIOBuilder

from distlm.model.build import build_model, model_config
from distlm.model.export import export_model
from distlm.model.float8 import CAPABILITY
from distlm.spec import TrainSpec
from distlm.storage import Storage
from distlm.train.recipe import make_recipe
from distlm.train.saver import on_host
from tests.train.ranks import losses, make_corpus, make_packed_corpus, metrics, run_ranks, spec

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
GPU = {"gpus_per_worker": 1}
MODEL = {"config": {"model_type": "llama", "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
                    "num_key_value_heads": 2, "tie_word_embeddings": True}}
SHARDED = {"zero": 3, "deepspeed": {"zero_optimization": {"stage3_param_persistence_threshold": 0}}}
STAGES = [{"zero": 0}, {"zero": 1}, {"zero": 2}, SHARDED]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus") / "c")


@pytest.fixture(scope="module")
def on_cpu(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cpu")
    run_ranks({root / "fp32": spec(corpus, model=MODEL), root / "bf16": spec(corpus, model=MODEL, precision="bf16")})
    return root


def test_every_stage_in_fp32_gives_the_losses_of_a_cpu(corpus: Path, on_cpu: Path, tmp_path: Path) -> None:
    runs = {tmp_path / f"zero{one['zero']}": spec(corpus, model=MODEL, scale=GPU, sharding=one) for one in STAGES}
    run_ranks(runs, device="cuda")
    for run in runs:
        np.testing.assert_allclose(losses(run), losses(on_cpu / "fp32"), rtol=1e-4, err_msg=run.name)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_every_stage_in_half_precision_learns_the_same(corpus: Path, on_cpu: Path, tmp_path: Path, precision: str) -> None:
    runs = {tmp_path / f"zero{one['zero']}": spec(corpus, model=MODEL, scale=GPU, sharding=one, precision=precision)
            for one in STAGES if one["zero"] or precision == "bf16"}
    run_ranks(runs, device="cuda")
    for run in runs:
        kept = [record["loss"] for record in metrics(run) if "loss" in record]
        assert len(kept) == 20 and all(map(math.isfinite, kept))
        if precision == "bf16":
            np.testing.assert_allclose(kept, losses(on_cpu / "bf16"), rtol=1e-2, err_msg=run.name)
        else:
            assert kept[-1] < kept[0] - 0.3, run.name


@pytest.mark.parametrize("base", [None, "nf4"])
def test_an_adapter_learns_as_on_a_cpu_beside_a_base_that_stays(corpus: Path, tmp_path: Path, base: str | None) -> None:
    if base and importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed")
    given = spec(corpus, model=MODEL)
    model = build_model(given.model, model_config(given.model, make_recipe(given, Storage(tmp_path)).shape), 3, torch.bfloat16)
    export_model(model, None, corpus / "tokenizer", tmp_path / "base", {})
    sections = {"model": {"from": str(tmp_path / "base")}, "adapter": {"rank": 4, "base": base}, "precision": "bf16"}
    run_ranks({tmp_path / "cpu": spec(corpus, **sections)})
    runs = {tmp_path / f"zero{zero}": spec(corpus, scale=GPU, sharding={"zero": zero}, **sections) for zero in range(3)}
    printed = run_ranks(runs, device="cuda", watch=True)
    assert printed.count("kept, ") == 3
    for run in runs:
        np.testing.assert_allclose(losses(run), losses(tmp_path / "cpu"), rtol=1e-2, err_msg=run.name)


@pytest.mark.parametrize("name", ["adamw", "muon", "lion", "adafactor", "sgd", "offload", "nvme", "dropout", "compiled"])
def test_a_run_that_goes_on_is_bit_equal(corpus: Path, tmp_path: Path, name: str) -> None:
    if name == "nvme" and not AsyncIOBuilder().is_compatible(verbose=False):
        pytest.skip("libaio is not installed")
    sections: dict[str, object] = {
        "muon": {"optimizer": {"name": "muon", "lr": 0.01, "clip": 0}}, "lion": {"optimizer": {"name": "lion", "lr": 0.001}},
        "adafactor": {"optimizer": {"name": "adafactor", "lr": 0.01}, "sharding": {"zero": 0}},
        "sgd": {"optimizer": {"name": "sgd", "lr": 0.1}},
        "offload": {"sharding": {"zero": 3, "offload": {"optimizer": "cpu", "parameters": "cpu"}}},
        "nvme": {"sharding": {"zero": 3, "offload": {"optimizer": "nvme", "path": str(tmp_path / "nvme")}}},
        "dropout": {"regularization": {"dropout": 0.1}}, "compiled": {"compile": True}}.get(name, {})
    given = spec(corpus, **{"model": MODEL, "scale": GPU, "precision": "bf16", "sharding": {"zero": 2}, **sections})
    goes_on_bit_equal(given, 13, tmp_path)


def goes_on_bit_equal(given: TrainSpec, step: int, folder: Path) -> None:
    """Assert that a run which is killed before a step comes to the losses and the export of one that is not."""
    run_ranks({folder / "whole": given}, device="cuda")
    run_ranks({folder / "stopped": given}, device="cuda", kill_before_step=step)
    run_ranks({folder / "stopped": given}, device="cuda")
    assert losses(folder / "stopped") == losses(folder / "whole")
    ours, theirs = ((folder / run / "export" / "model.safetensors").read_bytes() for run in ("stopped", "whole"))
    assert ours == theirs


@pytest.mark.parametrize("name", ["plain", "documents", "compiled"])
def test_with_deterministic_a_run_of_long_windows_goes_on_bit_equal(tmp_path: Path, name: str) -> None:
    """At 2,048 tokens the kernels that PyTorch takes by itself add gradients up in another order each time."""
    corpus = make_corpus(tmp_path / "c", windows=(20, 28), context=2048, starts=(0, 700))
    sections: dict[str, Any] = {"documents": {"batch": {"global_sequences": 12, "micro_sequences": 2, "mask_documents": True}},
                                "compiled": {"compile": True}}.get(name, {})
    given = spec(corpus, deterministic=True, precision="bf16", duration={"steps": 8}, checkpoint={"every_steps": 3}, scale=GPU,
                 model={"config": {**MODEL["config"], "hidden_size": 256}}, **sections)
    goes_on_bit_equal(given, 5, tmp_path)


def test_what_is_saved_beside_the_steps_is_a_copy_in_the_host_s_memory() -> None:
    state = {"weights": torch.arange(8.0, device="cuda")}
    copied = on_host(state)
    state["weights"].zero_()
    assert copied["weights"].device.type == "cpu" and copied["weights"].tolist() == list(range(8))


def test_compiled_layers_give_the_same_losses(corpus: Path, on_cpu: Path, tmp_path: Path) -> None:
    bf16 = spec(corpus, model=MODEL, scale=GPU, compile=True, precision="bf16", activation_checkpointing=1)
    run_ranks({tmp_path / "fp32": spec(corpus, model=MODEL, scale=GPU, compile=True), tmp_path / "bf16": bf16}, device="cuda")
    np.testing.assert_allclose(losses(tmp_path / "fp32"), losses(on_cpu / "fp32"), rtol=1e-4)
    np.testing.assert_allclose(losses(tmp_path / "bf16"), losses(on_cpu / "bf16"), rtol=1e-2)


def test_documents_are_kept_apart_as_on_a_cpu(tmp_path: Path) -> None:
    corpus = make_packed_corpus(tmp_path / "packed")
    run_ranks({tmp_path / "cpu": spec(corpus, model=MODEL, duration={"steps": 6})})
    run_ranks({tmp_path / "gpu": spec(corpus, model=MODEL, duration={"steps": 6}, scale=GPU),
               tmp_path / "compiled": spec(corpus, model=MODEL, duration={"steps": 6}, scale=GPU, compile=True)}, device="cuda")
    for name in ("gpu", "compiled"):
        np.testing.assert_allclose(losses(tmp_path / name), losses(tmp_path / "cpu"), rtol=1e-4, err_msg=name)


@pytest.mark.skipif(torch.cuda.is_available() and torch.cuda.get_device_capability() < CAPABILITY, reason="this GPU has no float8")
def test_fp8_gives_the_losses_of_a_cpu_that_emulates_it_and_goes_on_bit_equal(corpus: Path, tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    sections: dict[str, Any] = {"model": MODEL, "scale": GPU, "precision": "fp8", "compile": True, "sharding": {"zero": 2},
                                "optimizer": {"lr": 0.003}}
    given = spec(corpus, **sections)
    run_ranks({tmp_path / "cpu": given, tmp_path / "bf16": spec(corpus, **{**sections, "precision": "bf16"})})
    run_ranks({tmp_path / "gpu": given, tmp_path / "again": spec(corpus, **sections, activation_checkpointing=1)}, device="cuda")
    found = losses(tmp_path / "gpu")
    for other in ("cpu", "again", "bf16"):
        np.testing.assert_allclose(found, losses(tmp_path / other), rtol=1e-2, err_msg=other)
    assert found[-1] < found[0] - 1
    run_ranks({tmp_path / "stopped": given}, device="cuda", kill_before_step=13)
    run_ranks({tmp_path / "stopped": given}, device="cuda")
    assert losses(tmp_path / "stopped") == found
