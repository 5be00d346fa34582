"""Documents that share a window give the loss and the gradients that they give one by one."""

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM

from distlm.corpus.stream import NO_LOSS, START
from distlm.errors import SpecError
from distlm.model import documents, loss
from distlm.model.attention import NAME, use_cpu_attention
from distlm.model.documents import check_documents_apart, check_family
from distlm.train.batch import make_batch
from tests.model.families import tiny

TINY = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 32, "pad_token_id": None, "bos_token_id": 0, "eos_token_id": 0}
GEMMA = {**TINY, "head_dim": 8, "final_logit_softcapping": 3.0}
LENGTHS = [[12, 9], [1, 1, 19], [20], [5, 4, 3, 2, 1]]
"""Of the documents in windows of 21 tokens; what is left of one is padding."""


def build(family: str, attention: str, **more: Any) -> Any:
    values = GEMMA if family == "gemma2" else tiny(family, 2)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(
        family, **values, **more, attn_implementation="eager" if attention == "eager" else "sdpa"), dtype=torch.float32)
    torch.nn.init.normal_(model.get_output_embeddings().weight, std=0.3)
    if attention == NAME:
        use_cpu_attention(model)
    return model


def windows() -> tuple[np.ndarray, list[torch.Tensor]]:
    """(rows of tokens and marks, the documents)."""
    random, rows, documents = np.random.default_rng(0), [], []
    for lengths in LENGTHS:
        tokens, marks = np.zeros(21, np.int64), np.full(21, NO_LOSS)
        at = 0
        for length in lengths:
            tokens[at:at + length], marks[at:at + length] = random.integers(0, 97, length), [START] + [0] * (length - 1)
            documents.append(torch.from_numpy(tokens[at:at + length].copy()))
            at += length
        rows.append(np.stack([tokens, marks]))
    return np.stack(rows), documents


@pytest.mark.parametrize(("family", "attention", "more"), [
    *[(family, attention, {}) for family in ("llama", "gpt2") for attention in ("eager", "sdpa", NAME)],
    ("mistral", NAME, {"sliding_window": 4}), ("gemma2", "eager", {})])
def test_a_packed_batch_gives_the_loss_and_gradients_of_its_documents_one_by_one(family: str, attention: str, more: dict[str, Any]) -> None:
    model = build(family, attention, **more)
    rows, documents = windows()
    theirs = torch.zeros(())
    for document in documents:
        if len(document) > 1:
            logits = model(input_ids=document[None, :-1]).logits[0]
            theirs = theirs + functional.cross_entropy(logits, document[1:], reduction="sum")
    theirs.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    check_documents_apart(model)
    batch = make_batch(rows, True)
    assert batch.num_targets() == sum(len(document) - 1 for document in documents)
    ours = loss.CausalLoss(model)(*batch.inputs(torch.device("cpu")))
    ours.backward()
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    for name, p in model.named_parameters():
        if "k_proj.bias" not in name:
            assert (p.grad - expected[name]).norm() <= 1e-6 * expected[name].norm(), name


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_targets_that_are_ignored_give_no_loss_and_no_gradient(family: str) -> None:
    model = build(family, "sdpa" if family == "llama" else "eager")
    tokens = torch.randint(0, 97, (3, 21))
    targets = torch.where(torch.rand(3, 20) < 0.4, loss.IGNORED, tokens[:, 1:])
    logits = model(input_ids=tokens[:, :-1]).logits
    theirs = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum", ignore_index=loss.IGNORED)
    theirs.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    wrapped = loss.CausalLoss(model)
    ours = wrapped(tokens, targets)
    ours.backward()
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    for name, p in model.named_parameters():
        assert (p.grad - expected[name]).norm() <= 1e-5 * expected[name].norm(), name
    model.zero_grad()
    nothing = wrapped(tokens, torch.full_like(targets, loss.IGNORED))
    nothing.backward()
    assert nothing.item() == 0 and all(p.grad is not None and not p.grad.any() for p in model.parameters())
    assert wrapped(tokens).item() == pytest.approx(wrapped(tokens, tokens[:, 1:]).item(), rel=1e-6)


@pytest.mark.parametrize("family", sorted(documents.KEPT_APART))
def test_the_families_that_need_no_look_keep_documents_apart(family: str) -> None:
    check_documents_apart(build(family, NAME))


@pytest.mark.parametrize(("family", "values"), [("bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
                                                ("mamba", {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}),
                                                ("gpt_oss", {**tiny("gpt_oss", 2), "attn_implementation": "eager"})])
def test_a_family_that_does_not_is_refused(family: str, values: dict[str, Any]) -> None:
    config = AutoConfig.for_model(family, **{"vocab_size": 97, **values})
    model = AutoModelForCausalLM.from_config(config)
    said = f"batch.mask_documents: the {family} family of transformers does not keep the documents .* false"
    with pytest.raises(SpecError, match=said):
        check_documents_apart(model)
    assert model.training
    with pytest.raises(SpecError, match=said):
        check_family(config)
    assert config.vocab_size == 97 and config.num_hidden_layers == 2


def test_a_family_is_judged_by_a_small_part_of_its_model_or_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[int] = []
    monkeypatch.setattr(documents, "check_documents_apart", lambda model: built.append(model.num_parameters()))
    wide = AutoConfig.for_model("gemma2", **GEMMA, attn_implementation="eager")
    check_family(wide)
    assert len(built) == 1 and built[0] < 20_000
    wide.intermediate_size = 10**9
    check_family(wide)
    check_family(AutoConfig.for_model("llama", **TINY))
    assert len(built) == 1, "a gigabyte is not built, and llama's family is known"
    with pytest.raises(SpecError, match=r"model\.config\.attn_implementation: flash_attention_2 attends over the documents"):
        check_family(AutoConfig.for_model("llama", **TINY, attn_implementation="flash_attention_2"))


def test_an_attention_that_looks_over_documents_is_refused() -> None:
    model = build("llama", "sdpa")
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(SpecError, match="flash_attention_2 attends over the documents"):
        check_documents_apart(model)
