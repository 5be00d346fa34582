"""Quantized weights: what torchao says they are, computed by PyTorch's own kernels, through the files and back."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM

from distlm.errors import InputError
from distlm.model.build import load_model
from distlm.model.export import export_model
from distlm.model.quantize import Int4Linear, Int8DynamicLinear, Int8Linear, int4_tensor, quantize

pytest.importorskip("torchao")
SHAPE = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4,
         "num_key_value_heads": 2, "initializer_range": 0.2}
KINDS = {"int8_weight_only": Int8Linear, "int8_dynamic": Int8DynamicLinear, "int4_weight_only": Int4Linear}


def whole(folder: Path, family: str = "qwen2", **values: Any) -> Path:
    """A model, with biases that are not zero where its family has some."""
    (folder / "tokenizer").mkdir(parents=True)
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**SHAPE, **values}))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    export_model(model, None, folder / "tokenizer", folder / "whole", {})
    return folder / "whole"


def quantized(folder: Path, method: str, **values: Any) -> tuple[Any, Path]:
    """A model whose weights are torchao's own, and the export of it."""
    model: Any = load_model(whole(folder, **values), "model", torch.float32).eval().requires_grad_(False)
    quantize(model, method)
    export_model(model, None, folder / "tokenizer", folder / "export", {})
    return model, folder / "export"


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("method", ["int8_weight_only", "int8_dynamic"])
def test_an_export_computes_what_torchao_does_and_holds_a_byte_a_weight(method: str, tied: bool, tmp_path: Path) -> None:
    by_torchao, export = quantized(tmp_path, method, tie_word_embeddings=tied)
    model: Any = load_model(export, "model", torch.float32).eval()
    tokens = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        wanted, found = by_torchao(tokens).logits, model(tokens).logits
    assert (found - wanted).norm() < (1e-5 if method == "int8_weight_only" else 0.05) * wanted.norm()      # a last bit can be a step
    layers = {name: type(module) for name, module in model.named_modules() if name.endswith(("proj", "lm_head"))}
    assert len(layers) == 8 and {kind for name, kind in layers.items() if name != "lm_head"} == {KINDS[method]}
    assert layers["lm_head"] is (torch.nn.Linear if tied else KINDS[method])
    sizes = [sum(file.stat().st_size for file in folder.glob("*.safetensors")) for folder in (tmp_path / "whole", export)]
    plain = sum(p.numel() for name, p in model.named_parameters())
    assert sizes[1] < sizes[0] / 4 + 4 * plain


@pytest.mark.parametrize("tokens", [5, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", KINDS)
def test_each_layer_multiplies_by_the_weights_that_its_file_says(method: str, dtype: torch.dtype, tokens: int, tmp_path: Path,
                                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distlm.model.quantize.BLOCK_ROWS", 24)                 # the last block is a short one
    before, export = quantized(tmp_path, method)
    model: Any = load_model(export, "model", dtype)
    torch.manual_seed(1)
    for name in ("self_attn.q_proj", "mlp.down_proj"):
        layer, told = (one.model.layers[0].get_submodule(name) for one in (model, before))
        inputs = torch.randn(tokens // 5, 5, told.weight.shape[1], dtype=dtype)
        if method == "int4_weight_only":
            q = torch.stack([told.weight.qdata << 4 >> 4, told.weight.qdata >> 4], 2).flatten(1)
            scale, zero = (part.t().repeat_interleave(32, 1) for part in (told.weight.scale, told.weight.zero_point))
            weight = q * scale + zero
        else:
            weight = told.weight.qdata * told.weight.scale
        wanted = functional.linear(inputs.float(), weight, told.bias)
        error = (layer(inputs).float() - wanted).abs().max() / wanted.abs().max()
        assert error < (1e-5 if method == "int8_weight_only" and dtype == torch.float32 and tokens == 40 else 1e-2)
        if method == "int8_dynamic" and dtype == torch.float32:
            assert torch.allclose(layer(inputs), told(inputs), atol=1e-5)


def test_four_bits_are_the_nearest_of_sixteen_steps_between_the_ends_of_a_group() -> None:
    torch.manual_seed(0)
    weight = torch.randn(16, 64)
    found = Int4Linear(*(lambda one: (one.qdata, torch.stack([one.scale, one.zero_point], 2)))(int4_tensor(weight, 32)), None)
    groups = weight.reshape(16, 2, 32)
    steps = torch.linspace(0, 1, 16) * (groups.amax(2) - groups.amin(2))[..., None] + groups.amin(2)[..., None]
    nearest = steps.gather(2, (groups[..., None] - steps[:, :, None]).abs().argmin(3)).reshape(16, 64)
    unrolled = found.unpacked() * found.scale[..., 0].t().repeat_interleave(32, 1) + found.scale[..., 1].t().repeat_interleave(32, 1)
    assert torch.allclose(unrolled, nearest, atol=1e-5)
    assert torch.allclose(found(torch.eye(64)).t(), nearest, atol=0.02) and found.ordered


def test_a_matrix_that_begins_oddly_in_its_file_is_multiplied_all_the_same() -> None:
    memory = torch.randint(-127, 128, (64 * 64 + 8,), dtype=torch.int8)[8:].view(64, 64)
    assert memory.data_ptr() % 16 == 8
    layer = Int8Linear(memory, torch.ones(64, 1, dtype=torch.bfloat16), None)
    assert layer(torch.ones(1, 64, dtype=torch.bfloat16)).float()[0, 0] == pytest.approx(float(memory[0].sum()), rel=0.01, abs=2)


def test_a_family_without_linear_layers_is_refused(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", vocab_size=320, n_embd=64, n_layer=1, n_head=4))
    with pytest.raises(InputError, match="no linear layer of the gpt2 family can be quantized so; take a family"):
        quantize(model, "int8_weight_only")
    narrow = load_model(whole(tmp_path, hidden_size=48, intermediate_size=80), "model", torch.float32)
    with pytest.raises(InputError, match="lower group_size, or take"):
        quantize(narrow, "int4_weight_only", 256)


def test_matrices_whose_shape_does_not_fit_stay_and_are_named(tmp_path: Path) -> None:
    model: Any = load_model(whole(tmp_path, intermediate_size=144, num_hidden_layers=2), "model", torch.float32)
    assert quantize(model, "int4_weight_only", 32) == {"matrices": 12, "left_whole": [f"model.layers.{i}.mlp.down_proj" for i in range(2)]}
    assert type(model.model.layers[0].mlp.down_proj.weight.data) is torch.Tensor
