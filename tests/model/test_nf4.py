"""Matrices in NF4: those that the plan counts, as many bits, and values that the paper has; gradients pass through them at any time."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from distlm.errors import SpecError
from distlm.model.build import Shape, build_model, load_model, model_config
from distlm.model.nf4 import BITS, check_nf4, nf4_elements
from distlm.spec.train import ModelSpec

NEEDS = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
LLAMA = {"model_type": "llama", "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1, "num_attention_heads": 4,
         "num_key_value_heads": 4, "tie_word_embeddings": False}
GPT2 = {"model_type": "gpt2", "n_embd": 256, "n_layer": 1, "n_head": 4}
FALCON = {"model_type": "falcon", "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
CODES = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
         -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
         0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]
"""Dettmers et al. 2023, appendix E."""


def saved(folder: Path, config: dict[str, Any]) -> tuple[Any, Any]:
    """(its configuration, the model in float32), which lies in the folder too."""
    found = model_config(ModelSpec(config=config), Shape(300, 16, 0))
    model = build_model(ModelSpec(config=config), found, 0)
    model.save_pretrained(folder)
    return found, model


def matrices(model: Any) -> dict[str, Any]:
    from bitsandbytes.nn import Linear4bit

    return {name: module for name, module in model.named_modules() if isinstance(module, Linear4bit)}


@NEEDS
@pytest.mark.parametrize(("config", "count"), [(LLAMA, 7), (GPT2, 4)])
def test_what_is_held_is_what_is_counted_in_as_many_bits(tmp_path: Path, config: dict[str, Any], count: int) -> None:
    found, _ = saved(tmp_path, config)
    held = matrices(load_model(tmp_path, "x", torch.bfloat16, nf4=True))
    states = [module.weight.quant_state for module in held.values()]
    assert len(held) == count and sum(state.shape.numel() for state in states) == nf4_elements(found)
    parts = [part for module in held.values() for part in (module.weight.data, module.weight.quant_state.absmax,
                                                           module.weight.quant_state.state2.absmax)]
    assert sum(part.nbytes for part in parts) == nf4_elements(found) * BITS / 8 and pytest.approx(4.127, abs=1e-3) == BITS


@NEEDS
def test_a_weight_is_the_nearest_of_sixteen_values_of_its_block(tmp_path: Path) -> None:
    from bitsandbytes.functional import dequantize_4bit

    _, model = saved(tmp_path, LLAMA)
    for name, module in matrices(load_model(tmp_path, "x", torch.float32, nf4=True)).items():
        held = dequantize_4bit(module.weight.data, module.weight.quant_state)
        blocks = model.get_submodule(name).weight.detach().reshape(-1, 64)
        scales = blocks.abs().amax(1, keepdim=True)
        nearest = (blocks / scales).unsqueeze(2).sub(torch.tensor(CODES)).abs().argmin(2)
        expected = torch.tensor(CODES)[nearest] * scales
        # a scale of 8 bits is off by some per cent at most
        assert torch.allclose(held.reshape(-1, 64), expected, rtol=0.06, atol=1e-5), name


@NEEDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_pass_after_an_evaluation_and_nothing_of_it_is_in_a_state_dict(tmp_path: Path, dtype: torch.dtype) -> None:
    from bitsandbytes.functional import dequantize_4bit

    saved(tmp_path, LLAMA)
    model = load_model(tmp_path, "x", dtype, nf4=True)
    module: Any = model.get_submodule("model.layers.0.mlp.up_proj")
    before = module.weight.data.clone()
    x = torch.randn(3, 256, dtype=dtype)
    with torch.no_grad():
        model.eval()(input_ids=torch.zeros(1, 4, dtype=torch.int64))
    model.train()
    given = x.clone().requires_grad_()
    out = module(given)
    out.float().square().sum().backward()
    weight = dequantize_4bit(module.weight.data, module.weight.quant_state)
    expected = x.clone().requires_grad_()
    functional.linear(expected, weight).float().square().sum().backward()
    assert torch.allclose(out, functional.linear(x, weight), rtol=0.02, atol=0.02)
    assert torch.equal(module.weight.data, before) and given.grad is not None and expected.grad is not None
    assert (given.grad - expected.grad).norm() < 0.01 * expected.grad.norm()
    assert not [name for name in model.state_dict() if "quant" in name or "absmax" in name]


@NEEDS
def test_a_base_that_was_left_whole_is_not_trained_on(tmp_path: Path) -> None:
    saved(tmp_path, FALCON)
    with pytest.raises(SpecError, match=r"adapter.base: transformers rounds no layer of the kind of transformer.h.0"):
        load_model(tmp_path, "x", torch.bfloat16, nf4=True)


def test_what_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    experts = {"model_type": "mixtral", "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
               "num_key_value_heads": 4, "num_local_experts": 2}
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: object() if name == "bitsandbytes" else find(name, *more))
    with pytest.raises(SpecError, match=r"adapter.base: the mixtral family has weights that are no matrices"):
        check_nf4(model_config(ModelSpec(config=experts), Shape(300, 16, 0)))
    with pytest.raises(SpecError, match=r"adapter.base: .* no layer of the kind of transformer.h.0.self_attention.query_key_value"):
        check_nf4(model_config(ModelSpec(config=FALCON), Shape(300, 16, 0)))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "bitsandbytes" else find(name, *more))
    with pytest.raises(SpecError, match=r"adapter.base: the package bitsandbytes is not installed; pip install 'distlm\[qlora\]'"):
        check_nf4(model_config(ModelSpec(config=LLAMA), Shape(300, 16, 0)))
