"""Attention on CPU gives PyTorch's own results, with gradients about as near to float64's."""

import pytest
import torch
from torch.nn import functional
from transformers import AttentionInterface, AutoModelForCausalLM, LlamaConfig, MistralConfig

from distlm.model import attention
from distlm.model.attention import NAME, causal_attention, use_cpu_attention


def gradients(attend: object, dtype: torch.dtype, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    query, key, value, outer = (one.detach().clone().to(dtype).requires_grad_() for one in tensors)
    attend(query, key, value).backward(outer)  # type: ignore[operator]
    return [one.grad.double() for one in (query, key, value) if one.grad is not None]


def pytorch(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return functional.scaled_dot_product_attention(query, key, value, is_causal=True)


@pytest.mark.parametrize("elements", [1, 3 * 200 * 16 * 2, 1 << 20])
@pytest.mark.parametrize(("dtype", "width"), [(torch.float32, 16), (torch.bfloat16, 16), (torch.bfloat16, 64)])
@pytest.mark.parametrize("sharpness", [1, 4])
def test_outputs_and_gradients_are_about_as_exact_as_pytorchs(dtype: torch.dtype, width: int, elements: int, sharpness: int,
                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    """Where heads are narrow for so many tokens the probabilities are computed again."""
    monkeypatch.setattr(attention, "BLOCK_ELEMENTS", elements)
    monkeypatch.setattr(attention, "BLOCK_QUERIES", 16 if elements > 1 else 64)
    torch.manual_seed(0)
    tensors = [torch.randn(4, 3, 200, width).to(dtype) for _ in range(4)]
    tensors[0] *= sharpness                                # scores of a trained model are not small
    exact = gradients(pytorch, torch.float64, tensors)
    theirs = gradients(pytorch, dtype, tensors)
    ours = gradients(lambda q, k, v: causal_attention(q, k, v, width ** -0.5), dtype, tensors)
    for a, b, c in zip(ours, theirs, exact, strict=True):
        assert (a - c).norm() <= 1.5 * (b - c).norm() + 1e-7 * c.norm()


@pytest.mark.parametrize("elements", [1, 3 * 60 * 16 * 2, 1 << 20])
@pytest.mark.parametrize("width", [8, 16])
@pytest.mark.parametrize("ahead", [False, True])
def test_with_documents_apart_gradients_are_pytorchs(elements: int, width: int, ahead: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """`ahead`: of its own document a token sees what comes after it, too."""
    monkeypatch.setattr(attention, "BLOCK_ELEMENTS", elements)
    monkeypatch.setattr(attention, "BLOCK_QUERIES", 16)
    torch.manual_seed(0)
    tensors = [torch.randn(4, 3, 60, width, dtype=torch.float64) for _ in range(4)]
    documents = torch.sort(torch.randint(0, 4, (4, 60)), 1).values
    mask = documents[:, None, :, None] == documents[:, None, None, :]
    mask = mask if ahead else mask.tril()
    ours = gradients(lambda q, k, v: causal_attention(q, k, v, width ** -0.5, mask), torch.float32, tensors)
    theirs = gradients(lambda q, k, v: functional.scaled_dot_product_attention(q, k, v, mask), torch.float32, tensors)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", [
    LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=64),
    MistralConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=64,
                  sliding_window=8)], ids=["grouped heads", "sliding window"])
def test_a_model_computes_the_same_with_it(config: LlamaConfig) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    tokens, seen = torch.randint(0, 64, (3, 24)), []
    for own in (False, True):
        if own:
            use_cpu_attention(model)
        model.zero_grad()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        seen.append([loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    assert model.config._attn_implementation == NAME
    for a, b in zip(*seen, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_mask_is_looked_through_once_a_forward_pass(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = AutoModelForCausalLM.from_config(LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
                                                         vocab_size=64))
    tokens, positions = torch.randint(0, 64, (2, 24)), torch.arange(8).repeat(2, 3)
    expected = model(input_ids=tokens, position_ids=positions, use_cache=False).logits
    use_cpu_attention(model)
    looks, look = [], attention.looks_ahead
    monkeypatch.setattr(attention, "looks_ahead", lambda mask: looks.append(look(mask)) or looks[-1])
    if compiled:
        for layer in model.model.layers:
            layer.compile(backend="aot_eager", fullgraph=True)
    for count in (1, 2):
        found = model(input_ids=tokens, position_ids=positions, use_cache=False).logits
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        found.sum().backward()
        assert looks == count * [False]


def test_dropout_and_attention_to_all_tokens_are_left_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "causal_attention", lambda *_: pytest.fail("it is causal, and drops nothing"))
    use_cpu_attention(AutoModelForCausalLM.from_config(LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                                                                   num_attention_heads=2, vocab_size=9)))
    attend, module, tensor = AttentionInterface()[NAME], torch.nn.Module(), torch.randn(1, 2, 4, 8)
    for rest in ({"dropout": 0.5}, {"is_causal": False}):
        assert attend(module, tensor, tensor, tensor, None, **rest)[0].shape == (1, 4, 2, 8)
    module.is_causal = False  # type: ignore[assignment]
    expected = functional.scaled_dot_product_attention(tensor, tensor, tensor).transpose(1, 2)
    torch.testing.assert_close(attend(module, tensor, tensor, tensor, None)[0], expected)


def test_another_choice_of_attention_is_left_alone() -> None:
    config = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=9,
                         attn_implementation="eager")
    model = AutoModelForCausalLM.from_config(config)
    use_cpu_attention(model)
    assert model.config._attn_implementation == "eager"


def test_padding_that_sees_nothing_spoils_no_token() -> None:
    """Of a batch that is padded on the left the first rows see no key at all."""
    config = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=64)
    torch.manual_seed(0)
    model, tokens = AutoModelForCausalLM.from_config(config), torch.randint(0, 64, (2, 12))
    real = torch.ones(2, 12, dtype=torch.int64)
    real[0, :5] = 0
    expected = model(input_ids=tokens, attention_mask=real).logits
    use_cpu_attention(model)
    found = model(input_ids=tokens, attention_mask=real).logits
    torch.testing.assert_close(found[real.bool()], expected[real.bool()], rtol=1e-4, atol=1e-5)
    found[real.bool()].sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_probabilities_are_kept_for_a_backward_pass_alone() -> None:
    query = torch.randn(1, 2, 8, 4)
    for learns, kept in ((False, 0), (True, 2 * 8 * 8)):
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda one, sizes=sizes: sizes.append(one.numel()) or one, lambda one: one):
            causal_attention(query.clone().requires_grad_(learns), query, query, 0.5)
        assert (kept in sizes) is learns


@pytest.mark.parametrize(("tokens", "matrices"), [(64, 24), (64, 130), (200, 7), (1024, 8), (1024, 3), (1024, 6), (4096, 8)])
def test_products_have_as_many_shapes_as_blocks_have(tokens: int, matrices: int) -> None:
    query = torch.empty(matrices, tokens, 16, device="meta")
    shapes = {tuple(one.stop - one.start for one in block) for block in attention._blocks(query, None, None)}
    assert attention.num_products(tokens, matrices) == 3 * len(shapes)
