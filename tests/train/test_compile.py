"""Layers that are compiled make the same steps, and a run of theirs goes on bit-equal."""

import functools
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from distlm.errors import SpecError, TrainError
from distlm.model.build import Shape, build_model, compile_layers, model_config, recompute
from distlm.spec import load_spec
from distlm.spec.train import ModelSpec
from distlm.train.zero import check_node
from tests.train.ranks import losses, make_corpus, run_ranks, spec

compiler = pytest.mark.skipif(not shutil.which("g++") and not shutil.which("clang++"), reason="there is no C++ compiler")


@compiler
def test_compiled_layers_give_the_same_losses(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path / "c", val=0)            # an evaluation would be compiled too
    short = {"duration": {"steps": 8}, "evaluate": {}, "checkpoint": {}}
    run_ranks({tmp_path / "eager": spec(corpus, **short), tmp_path / "compiled": spec(corpus, compile=True, **short)})
    assert losses(tmp_path / "compiled") != losses(tmp_path / "eager"), "nothing was compiled"
    np.testing.assert_allclose(losses(tmp_path / "compiled"), losses(tmp_path / "eager"), rtol=1e-6)


@compiler
@pytest.mark.parametrize("gradient", [pytest.param(False, marks=pytest.mark.slow), True])
def test_the_layer_is_named_whose_output_or_gradient_is_not_finite(tmp_path: Path, gradient: bool) -> None:
    run = tmp_path / "run"
    given = spec(make_corpus(tmp_path / "c", val=0), compile=True, evaluate={}, checkpoint={})
    output = run_ranks({run: given}, poison={"window": 46, "module": "model.layers.1.mlp.down_proj", "gradient": gradient})
    [(what, name, cause)] = re.findall(r"rank 0 ended: .*, first in the (output|gradient) of (\S+), samples .* \[(.*)\]", output)
    assert (what, cause) == ("gradient" if gradient else "output", "nonfinite_loss")
    assert name == "model.layers.1.mlp.down_proj" + ".weight" * gradient


@compiler
@pytest.mark.slow
@pytest.mark.parametrize("sections", [{"sharding": {"zero": 2}}, {"activation_checkpointing": 1}, {"precision": "bf16"},
                                      {"optimizer": {"name": "muon", "lr": 0.01}}], ids=lambda one: "-".join(one))
def test_a_compiled_run_goes_on_bit_equal(sections: dict[str, object], tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path / "c")
    given, names = spec(corpus, compile=True, scale={"workers": 2}, **sections), ("whole", "stopped")
    run_ranks({tmp_path / "whole": given})
    run_ranks({tmp_path / "stopped": given}, kill_before_step=13)
    run_ranks({tmp_path / "stopped": given})
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")
    ours, theirs = ((tmp_path / run / "export" / "model.safetensors").read_bytes() for run in names)
    assert ours == theirs


@compiler
@pytest.mark.slow
def test_a_compiled_run_whose_optimizer_is_offloaded_makes_the_same_steps(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path / "c")
    runs = {name: spec(corpus, compile=compile, scale={"workers": 2}, duration={"steps": 6}, sharding={"zero": zero, **offload},
                       activation_checkpointing=zero - 1, precision=precision)
            for zero, precision in ((1, "fp32"), (2, "bf16")) for name, compile, offload in (
                (f"{zero}-kept", False, {}), (f"{zero}-compiled", True, {}), (f"{zero}-both", True, {"offload": {"optimizer": "cpu"}}))}
    run_ranks({tmp_path / name: given for name, given in runs.items()})
    for zero, rtol in ((1, 1e-5), (2, 5e-3)):
        kept, compiled, both = (losses(tmp_path / f"{zero}-{name}") for name in ("kept", "compiled", "both"))
        assert compiled != kept, "nothing was compiled"
        np.testing.assert_allclose(both, kept, rtol=rtol)
        np.testing.assert_allclose(both, compiled, rtol=min(rtol, 1e-3))


def test_every_variant_of_a_layer_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers with and without a sliding window, computed again or not, in training and evaluation, for batches of two sizes."""
    monkeypatch.setattr(torch.nn.Module, "compile", functools.partialmethod(torch.nn.Module.compile, backend="eager"))
    given = ModelSpec(config={"model_type": "gemma3_text", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4,
                              "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "sliding_window": 8,
                              "layer_types": ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]})
    model = build_model(given, model_config(given, Shape(64, 16, 0)), 0)
    recompute(model, 2)
    before = torch._dynamo.config.recompile_limit
    try:
        compile_layers(model)
        with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
            for sequences in (3, 2):
                with torch.no_grad():
                    model.eval()(input_ids=torch.zeros(sequences, 16, dtype=torch.int64))
            for sequences in (3, 2):
                model.train()(input_ids=torch.zeros(sequences, 16, dtype=torch.int64)).logits.sum().backward()
    finally:
        torch._dynamo.reset()
        torch._dynamo.config.recompile_limit = before


def test_a_node_without_a_compiler_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", str(tmp_path / "none"))
    with pytest.raises(TrainError, match="compile: there is no C\\+\\+ compiler on a worker's node; install"):
        check_node(spec(tmp_path, compile=True))


def test_stage_3_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "spec.yaml"
    file.write_text("kind: train\nname: x\ncorpus: c\nmodel: {preset: llama-tiny}\nduration: {steps: 1}\ncompile: true\n"
                    "sharding: {zero: 3}\n")
    with pytest.raises(SpecError, match="compile: true cannot be with ZeRO stage 3"):
        load_spec(file)
