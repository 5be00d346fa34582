"""Compiled layers with an adapter train the same one, go on bit-equal, and are compiled whole and once."""

import functools
import importlib.util
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft.tuners.lora import dora
from safetensors.torch import load_file
from torch._dynamo.utils import counters

from distlm.errors import SpecError
from distlm.model.adapter import add_adapter
from distlm.model.attention import use_cpu_attention
from distlm.model.build import build_model, compile_layers, load_model, model_config, recompute
from distlm.model.export import export_model
from distlm.model.loss import CausalLoss
from distlm.spec import TrainSpec
from distlm.spec.adapter import Adapter
from distlm.storage import Storage
from distlm.train.recipe import make_recipe
from tests.train.ranks import losses, make_corpus, make_labelled_corpus, make_packed_corpus, run_ranks, spec

compiler = pytest.mark.skipif(not shutil.which("g++") and not shutil.which("clang++"), reason="there is no C++ compiler")
quantized = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
TWO = {"workers": 2}
MERGED, ADAPTER = "export/model.safetensors", "export/adapter/adapter_model.safetensors"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Corpora of plain windows, of packed documents and of labels, and a base."""
    root = tmp_path_factory.mktemp("compile-adapter")
    make_packed_corpus(root / "packed")
    make_labelled_corpus(root / "labels")
    given = spec(make_corpus(root / "c"))
    model = build_model(given.model, model_config(given.model, make_recipe(given, Storage(root)).shape), 3)
    export_model(model, None, root / "c" / "tokenizer", root / "base", {})
    return root


def tuned(root: Path, corpus: str = "c", adapter: dict[str, Any] | None = None, **sections: Any) -> TrainSpec:
    return spec(root / corpus, model={"from": str(root / "base")}, adapter={"rank": 4, **(adapter or {})},
                **{"duration": {"steps": 8}, "evaluate": {"every_steps": 4}, "checkpoint": {"every_steps": 4}, "scale": TWO, **sections})


@compiler
@pytest.mark.parametrize("sections", [
    pytest.param({}, marks=pytest.mark.slow, id="lora"),
    pytest.param({"sharding": {"zero": 2}, "activation_checkpointing": 1}, marks=pytest.mark.slow, id="zero2-again"),
    pytest.param({"adapter": {"method": "dora"}}, marks=pytest.mark.slow, id="dora"),
    pytest.param({"adapter": {"method": "dora"}, "sharding": {"zero": 2}}, marks=pytest.mark.slow, id="dora-zero2"),
    pytest.param({"adapter": {"base": "nf4"}, "activation_checkpointing": 1}, marks=[pytest.mark.slow, quantized], id="nf4-again")])
def test_compiled_layers_train_the_same_adapter_and_leave_the_base_alone(sections: dict[str, Any], root: Path, tmp_path: Path) -> None:
    """In fp32, on packed documents. What is exported is the base with that adapter."""
    runs = {tmp_path / name: tuned(root, "packed", compile=name == "compiled", **sections) for name in ("eager", "compiled")}
    printed = run_ranks(runs, watch=True)
    assert losses(tmp_path / "compiled") != losses(tmp_path / "eager"), "nothing was compiled"
    np.testing.assert_allclose(losses(tmp_path / "compiled"), losses(tmp_path / "eager"), rtol=1e-5)
    said = [line for line in printed.splitlines() if " compiled: loaded" in line]
    assert len(said) == 2 and all(" kept, " in line for line in said), printed[-2000:]
    for file in (ADAPTER, MERGED):
        eager, found = (load_file(tmp_path / name / file) for name in ("eager", "compiled"))
        assert found.keys() == eager.keys() and all(torch.allclose(found[key], eager[key], atol=2e-5) for key in eager), file


@compiler
@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_losses_in_bf16_are_those_of_layers_that_are_not_compiled_but_for_rounding(method: str, root: Path, tmp_path: Path) -> None:
    runs = {tmp_path / name: tuned(root, adapter={"method": method}, precision="bf16", compile=wanted)
            for name, wanted in (("eager", False), ("compiled", True))}
    run_ranks(runs)
    np.testing.assert_allclose(losses(tmp_path / "compiled"), losses(tmp_path / "eager"), rtol=2e-3)
    eager, found = (load_file(tmp_path / name / ADAPTER) for name in ("eager", "compiled"))
    assert found.keys() == eager.keys()
    for name, value in eager.items():
        assert (found[name] - value).norm() < 0.1 * value.norm() + 1e-3, name


CASES: dict[str, Any] = {"dropout": {"adapter": {"dropout": 0.1}, "activation_checkpointing": 1, "precision": "bf16"},
                         "dora": {"adapter": {"method": "dora"}, "sharding": {"zero": 2}, "ema": {"decay": 0.9}}}


@compiler
@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_run_goes_on_bit_equal(name: str, root: Path, tmp_path: Path) -> None:
    """With an adapter's dropout too, whose random numbers are the compiler's."""
    run, given = tmp_path / name, tuned(root, compile=True, **CASES[name])
    run_ranks({run: given})
    before = losses(run), [(run / file).read_bytes() for file in (MERGED, ADAPTER)]
    shutil.rmtree(run / "checkpoints" / "step-000008")
    shutil.rmtree(run / "export")
    run_ranks({run: given})
    assert (losses(run), [(run / file).read_bytes() for file in (MERGED, ADAPTER)]) == before


@compiler
@pytest.mark.slow
@pytest.mark.parametrize("objective", ["classify", "distill"])
def test_other_objectives_train_the_same_adapter(objective: str, root: Path, tmp_path: Path) -> None:
    more: dict[str, Any] = {"distill": {"teacher": str(root / "base")}} if objective == "distill" else {}
    corpus = "labels" if objective == "classify" else "c"
    run_ranks({tmp_path / name: tuned(root, corpus, objective=objective, compile=wanted, **more)
               for name, wanted in (("eager", False), ("compiled", True))})
    np.testing.assert_allclose(losses(tmp_path / "compiled"), losses(tmp_path / "eager"), rtol=1e-5)
    eager, found = (load_file(tmp_path / name / ADAPTER) for name in ("eager", "compiled"))
    assert found.keys() == eager.keys() and all(torch.allclose(found[key], eager[key], atol=2e-5) for key in eager)


@pytest.mark.parametrize("adapter", [pytest.param({"dropout": 0.1}, id="lora", marks=pytest.mark.slow),
                                     pytest.param({"method": "dora"}, id="dora", marks=pytest.mark.slow),
                                     pytest.param({"base": "nf4"}, id="nf4", marks=[quantized, pytest.mark.slow])])
def test_a_layer_is_compiled_whole_and_no_further_once_all_its_variants_are(adapter: dict[str, Any], root: Path,
                                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    """In training and evaluation, computed again or not, for batches of several sizes, with documents apart or not."""
    monkeypatch.setattr(torch.nn.Module, "compile", functools.partialmethod(torch.nn.Module.compile, backend="eager", fullgraph=True))
    model = load_model(str(root / "base"), "x", torch.float32, nf4="base" in adapter)
    add_adapter(model, Adapter(rank=4, **adapter), 0, compiled=True)
    use_cpu_attention(model)
    recompute(model, 2)
    loss = CausalLoss(model)

    def run() -> None:
        for train, sequences in ((False, 6), (False, 1), (True, 6), (True, 4), (False, 3)):
            for positions in (None, torch.arange(16).repeat(sequences, 1) % 8):
                with torch.set_grad_enabled(train):
                    value = loss.train(train)(torch.zeros(sequences, 17, dtype=torch.int64), None, positions)
                if train:
                    value.backward()

    before = torch._dynamo.config.recompile_limit
    counters.clear()
    try:
        compile_layers(model)
        run()
        made = counters["stats"]["unique_graphs"]
        with torch._dynamo.config.patch(error_on_recompile=True):
            run()
        assert counters["stats"]["unique_graphs"] == made <= 24 and not counters["graph_break"]
    finally:
        torch._dynamo.reset()
        torch._dynamo.config.recompile_limit = before


def test_a_peft_whose_dora_cannot_be_compiled_is_told_where_that_is_asked_for(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = dora.DoraLinearLayer.get_weight_norm
    monkeypatch.delattr(dora.DoraLinearLayer, "get_lora_weight")
    make_recipe(tuned(root, adapter={"method": "dora"}), Storage(root))
    with pytest.raises(SpecError, match=r"^compile: DoRA cannot be compiled with peft [\d.]+, which has no get_lora_weight; leave it out"):
        make_recipe(tuned(root, adapter={"method": "dora"}, compile=True), Storage(root))
    assert dora.DoraLinearLayer.get_weight_norm is before, "nothing of peft is changed for it"
