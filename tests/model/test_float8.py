"""In fp8 the products of hidden layers are rounded while a model trains, and nothing else of it changes."""

import copy
from typing import Any

import pytest
import torch

from distlm.errors import SpecError
from distlm.model.build import Shape, build_model, model_config, skeleton
from distlm.model.float8 import check_float8, hidden_matrices, use_float8
from distlm.spec.train import ModelSpec

pytest.importorskip("torchao")
SHAPE = Shape(vocab_size=64, context=16, eos_id=0)
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
NAMES = [f"model.layers.{i}.{name}_proj" for i in range(2)
         for name in ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down")]


def made(shape: Shape = SHAPE, **config: Any) -> Any:
    given = ModelSpec(config={"model_type": "qwen2", **SIZES, **config})
    return build_model(given, model_config(given, shape), 0).to(torch.bfloat16)


@pytest.mark.parametrize(("shape", "config", "names"), [
    (SHAPE, {}, NAMES), (SHAPE, {"tie_word_embeddings": True}, NAMES),
    (Shape(64, 16, 0, labels=tuple("abcdefghijklmnop")), {}, NAMES),
    (SHAPE, {"intermediate_size": 72}, [name for name in NAMES if "mlp" not in name])])
def test_what_is_converted_are_the_matrices_of_hidden_layers_in_sixteens(shape: Shape, config: dict[str, Any], names: list[str]) -> None:
    model = made(shape, **config)
    before = dict(model.named_parameters())
    use_float8(model, emulate=True)
    assert [name for name, module in model.named_modules() if type(module).__name__ == "Trained"] == names
    after = dict(model.named_parameters())
    assert list(after) == list(before) and all(after[name] is before[name] for name in before)
    assert list(model.state_dict()) == list(made(shape, **config).state_dict())


def test_products_are_rounded_in_training_and_are_bf16_s_otherwise() -> None:
    plain = made()
    model = copy.deepcopy(plain)
    use_float8(model, emulate=True)
    tokens = torch.randint(0, 64, (3, 15), generator=torch.Generator().manual_seed(0))         # no multiple of 16
    found: dict[str, list[torch.Tensor]] = {}
    for name, one in (("plain", plain), ("fp8", model)):
        trained = one.train()(input_ids=tokens).logits
        trained.float().square().mean().backward()
        gradients = torch.cat([p.grad.float().flatten() for p in one.model.layers.parameters()])
        with torch.no_grad():
            found[name] = [one.eval()(input_ids=tokens).logits, trained.detach(), gradients]
    assert torch.equal(found["fp8"][0], found["plain"][0])
    for rounded, exact in zip(found["fp8"][1:], found["plain"][1:], strict=True):
        assert 0.01 < (rounded - exact).norm() / exact.norm() < 0.15           # three bits of mantissa, and two


def test_a_product_is_that_of_matrices_rounded_by_one_scale_each() -> None:
    model = made()
    use_float8(model, emulate=True)
    layer = model.train().get_submodule(NAMES[4])                              # without a bias
    inputs = torch.randn(16, 32, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16).requires_grad_()
    outputs = layer(inputs)
    towards = torch.randn(16, 64, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    outputs.backward(towards)

    def rounded(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        scale = torch.finfo(dtype).max / values.detach().abs().max().double()
        return (values.detach().float() * scale.float()).to(dtype).float() / scale.float()

    x, w = rounded(inputs, torch.float8_e4m3fn), rounded(layer.weight, torch.float8_e4m3fn)
    g = rounded(towards, torch.float8_e5m2)
    for found, by_hand in ((outputs, x @ w.T), (inputs.grad, g @ w), (layer.weight.grad, g.T @ x)):
        torch.testing.assert_close(found, by_hand.to(torch.bfloat16))


@pytest.mark.parametrize(("config", "message"), [
    ({"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4}, r"the gpt2 family has weights .* such as attn.c_attn.weight"),
    ({"model_type": "mixtral", **SIZES, "num_local_experts": 2}, r"the mixtral family has weights .* not of linear layers"),
    ({"model_type": "llama", "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 2},
     r"no linear layer of this model has sizes that are multiples of 16"),
    ({"model_type": "ctrl", "n_embd": 32, "n_layer": 2, "n_head": 4, "dff": 64}, r"the layers of the ctrl family cannot be told")])
def test_a_family_without_such_matrices_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=f"precision: .*{message}.*; take bf16"):
        check_float8(model_config(ModelSpec(config=config), SHAPE))


@pytest.mark.parametrize(("family", "each"), [("llama", 7), ("qwen3", 7), ("phi3", 4), ("gpt_neox", 4), ("starcoder2", 6)])
def test_other_families_are_taken(family: str, each: int) -> None:
    sizes = {name: size for name, size in SIZES.items() if family != "gpt_neox" or name != "num_key_value_heads"}
    config = model_config(ModelSpec(config={"model_type": family, **sizes}), SHAPE)
    check_float8(config)
    assert len(hidden_matrices(skeleton(config))) == 2 * each
