"""GELU by the logistic function is GELU by tanh."""

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, GemmaConfig, GPT2Config

from distlm.model.activation import LogisticGELU, without_tanh


def test_numbers_and_gradients_are_those_of_tanh() -> None:
    x = torch.cat([torch.linspace(-12, 12, 4001, dtype=torch.float64), torch.tensor([-1e30, -100.0, 100.0, 1e30], dtype=torch.float64)])
    seen = []
    for gelu in (LogisticGELU(), lambda x: functional.gelu(x, approximate="tanh")):
        given = x.clone().requires_grad_()
        found = gelu(given)
        found[:4001].sum().backward()
        seen.append((found.detach(), given.grad))
    for ours, theirs in zip(*seen, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("config", [
    GPT2Config(n_layer=2, n_head=2, n_embd=32, vocab_size=64, n_positions=32),
    GemmaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
                vocab_size=64)], ids=["gpt2", "gemma"])
def test_a_model_computes_the_same_with_it(config: GPT2Config | GemmaConfig) -> None:
    torch.manual_seed(0)
    model, tokens = AutoModelForCausalLM.from_config(config).eval(), torch.randint(0, 64, (2, 16))
    expected = model(input_ids=tokens).logits
    without_tanh(model)
    assert sum(isinstance(one, LogisticGELU) for one in model.modules()) == 2
    torch.testing.assert_close(model(input_ids=tokens).logits, expected, rtol=1e-5, atol=1e-6)
