"""With mup what a few steps do to a model is the same at every width, and is not without it."""

import functools
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distlm.errors import SpecError
from distlm.model.build import Shape, build_model, decoder_layers, model_config
from distlm.model.loss import CausalLoss
from distlm.model.mup import FAMILIES, rate_factor
from distlm.spec.load import dump, load_spec
from distlm.spec.train import ModelSpec
from distlm.train.optimizer import make_optimizer, set_rate
from tests.train.ranks import losses, make_corpus, run_ranks, spec

SHAPE, BASE = Shape(vocab_size=64, context=16, eos_id=0), 32
OPTIMIZERS, RATE = ("adamw", "lion"), 0.01


def config(family: str, width: int) -> dict[str, Any]:
    heads = width // 8
    if family == "gpt2":
        return {"model_type": family, "n_embd": width, "n_layer": 2, "n_head": heads, "tie_word_embeddings": False}
    more = {} if family == "gpt_neox" else {"num_key_value_heads": heads // 2}
    return {"model_type": family, "hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2,
            "num_attention_heads": heads, "tie_word_embeddings": False, **more, **({"head_dim": 8} if family == "qwen3" else {})}


@functools.cache
def moved(family: str, name: str, width: int, mup: bool) -> dict[str, float]:
    """How far five steps of that optimizer move what the last layer gives, before the norm behind it, and the logits, as root mean
    squares."""
    model_spec = {"config": config(family, width), **({"mup": {"base_width": BASE}} if mup else {})}
    given = spec("c", model=model_spec, optimizer={"name": name, "lr": RATE})  # type: ignore[arg-type]
    model = build_model(given.model, model_config(given.model, SHAPE), 0).eval()
    random = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 64, (8, 17), generator=random)

    def look() -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            logits = model.base_model(input_ids=tokens[:, :-1]).last_hidden_state @ head.T
        return given_by_last[-1], logits

    head = model.get_output_embeddings().weight
    given_by_last: list[torch.Tensor] = []
    decoder_layers(model)[-1].register_forward_hook(lambda _, __, out: given_by_last.append(out[0] if isinstance(out, tuple) else out))
    loss = CausalLoss(model)
    optimizer = make_optimizer(given, loss)
    before = look()
    for _ in range(5):
        (loss(tokens) / tokens[:, 1:].numel()).backward()
        set_rate(optimizer, RATE)
        optimizer.step()
        optimizer.zero_grad()
    return {name: (after - one).square().mean().sqrt().item()
            for name, one, after in zip(("hidden", "logits"), before, look(), strict=True)}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("what", ["hidden", "logits"])
def test_steps_move_activations_as_far_at_every_width(family: str, name: str, what: str) -> None:
    """The coordinate check of Yang et al. 2022, appendix D.1."""
    with_it, without = ([moved(family, name, width, mup)[what] for width in (BASE, 4 * BASE, 16 * BASE)] for mup in (True, False))
    assert with_it[0] == without[0], "at the base width nothing changes"
    assert all(0.5 < one / with_it[0] < 1.7 for one in with_it)
    assert all(wider > 1.5 * one for one, wider in itertools.pairwise(without))


@pytest.mark.slow
def test_zero_keeps_the_rates_of_the_table(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path / "c")
    stages = {0: {"zero": 0}, 1: {"zero": 1}, 3: {"zero": 3, "deepspeed": {"zero_optimization": {"stage3_param_persistence_threshold": 0}}}}
    run_ranks({tmp_path / str(zero): spec(corpus, model={"config": config("llama", 64), "mup": {"base_width": 16}}, sharding=sharding,
                                          scale={"workers": 2}, duration={"steps": 6}, evaluate={"every_steps": 6},
                                          checkpoint={"every_steps": 6}) for zero, sharding in stages.items()})
    for zero in (1, 3):
        np.testing.assert_allclose(losses(tmp_path / str(zero)), losses(tmp_path / "0"), rtol=2e-6)


def test_initial_weights_and_rates_are_those_of_the_table() -> None:
    given = ModelSpec.model_validate({"config": config("llama", 128), "mup": {"base_width": BASE}}, by_name=True)
    plain = ModelSpec.model_validate({"config": config("llama", 128)}, by_name=True)
    ours, theirs = (build_model(one, model_config(one, SHAPE), 0) for one in (given, plain))
    rates = rate_factor(ours, BASE)
    for (name, one), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        hidden, last = "_proj" in name, "lm_head" in name
        torch.testing.assert_close(one, other * (0.5 if hidden else 0.25 if last else 1.0))
        assert rates[one] == (0.25 if hidden or last else 1.0), name


@pytest.mark.parametrize(("sections", "message"), [
    ({"model": {"from": "m", "mup": {"base_width": 32}}}, "model.mup: a checkpoint's weights are not drawn anew"),
    ({"model": {"preset": "llama-tiny", "mup": {"base_width": 32}}, "optimizer": {"name": "sgd"}}, "its rules are for adamw and lion")])
def test_what_the_table_does_not_describe_is_refused(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError) as error:
        load_spec({**dump(spec("c")), **sections})  # type: ignore[arg-type]
    assert message in str(error.value)


@pytest.mark.parametrize(("changes", "message"), [({"tie_word_embeddings": True}, "cannot have the scales of both"),
                                                  ({"model_type": "gemma"}, "not known how gemma scales")])
def test_a_model_that_the_table_does_not_describe_is_refused(changes: dict[str, Any], message: str) -> None:
    given = ModelSpec.model_validate({"config": {**config("llama", 64), **changes}, "mup": {"base_width": 32}}, by_name=True)
    with pytest.raises(SpecError, match=message):
        model_config(given, SHAPE)
