"""The loss of pairs of answers and its gradient are those of the paper, by any head, in blocks of any size."""

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from distlm.model import preference, rows
from distlm.model.attention import NAME, use_cpu_attention
from distlm.model.documents import IMPLEMENTATIONS
from distlm.model.loss import IGNORED
from distlm.model.preference import PreferenceLoss, Reference, lay_out, linear_log_probs

VOCABULARY, CONTEXT = 40, 23
WINDOWS = [((2, 5), (3, 4)), ((1, 9), (1, 7)), ((4, 1), (4, 2))]
"""(tokens of the prompt, of the answer) of the chosen and of the rejected conversation of each pair."""
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "tie_word_embeddings": True},
    "gemma2": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
               "head_dim": 8},
    "gemma3_text": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
                    "head_dim": 8, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}}
"""One whose head is replaced, one that caps its logits, and one that has a layer with a sliding window."""


def make(family: str, attention: str = "eager") -> Any:
    torch.manual_seed(0)
    own = attention == NAME
    config = AutoConfig.for_model(family, vocab_size=VOCABULARY, attn_implementation="sdpa" if own else attention, **FAMILIES[family])
    model = AutoModelForCausalLM.from_config(config)
    if own:
        use_cpu_attention(model)
    return model


def batch(packed: bool = True) -> tuple[tuple[Any, ...], list[list[tuple[torch.Tensor, int]]]]:
    """The windows as the loss takes them, and each conversation by itself with the length of its prompt."""
    random = torch.Generator().manual_seed(1)
    tokens = torch.zeros(len(WINDOWS), CONTEXT + 1, dtype=torch.int64)
    targets = torch.full((len(WINDOWS), CONTEXT), IGNORED)
    positions, alone = torch.zeros_like(targets), []
    for row, pair in enumerate(WINDOWS):
        place, conversations = 0, []
        for prompt, answer in pair:
            said = torch.randint(1, VOCABULARY, (prompt + answer,), generator=random)
            end = place + prompt + answer
            tokens[row, place:end] = said
            targets[row, place + prompt - 1:end - 1] = said[prompt:]
            positions[row, place:] = torch.arange(CONTEXT - place)
            conversations.append((said, prompt))
            place = end
        alone.append(conversations)
    return (torch.arange(len(WINDOWS)), *lay_out(tokens, targets, positions, packed)), alone


def log_prob(model: Any, said: torch.Tensor, prompt: int) -> torch.Tensor:
    """log pi(y | x): the sum over the answer's tokens."""
    each = functional.log_softmax(model(said[None, :-1]).logits[0].float(), -1)
    return sum((each[i - 1, said[i]] for i in range(prompt, len(said))), torch.zeros(()))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradient_are_equation_7(family: str, smoothing: float, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("BLOCK_ELEMENTS", "CHUNK_ELEMENTS"):
        monkeypatch.setattr(preference, name, {"cpu": VOCABULARY * (3 if name == "BLOCK_ELEMENTS" else 2)})
    inputs, alone = batch()
    model, beta = make(family), 0.3
    ours = PreferenceLoss(make(family), beta, smoothing)
    reference = torch.randn(len(WINDOWS), 2, generator=torch.Generator().manual_seed(2)) - 30
    ours.reference = Reference(torch.arange(len(WINDOWS)), reference)
    expected, margins = torch.zeros(()), []
    for i, (chosen, rejected) in enumerate(alone):
        margin = beta * ((log_prob(model, *chosen) - reference[i, 0]) - (log_prob(model, *rejected) - reference[i, 1]))
        expected = expected - (1 - smoothing) * functional.logsigmoid(margin) - smoothing * functional.logsigmoid(-margin)
        margins.append(float(margin.detach()))
    loss = ours(*inputs)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(ours.sums, torch.tensor([sum(margins), float(sum(margin > 0 for margin in margins)), 37.0]))
    expected.backward()
    (2 * loss).backward()
    theirs = dict(model.named_parameters())
    for name, parameter in ours.model.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad / 2, theirs[name].grad, atol=1e-6, rtol=1e-4, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradient_are_those_of_trl(family: str, tmp_path: Path) -> None:
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    model, reference = make(family), make(family)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(VOCABULARY)}, unk_token="t1"))
    trainer = trl.DPOTrainer(model, reference, trl.DPOConfig(str(tmp_path), beta=0.3, use_cpu=True, bf16=False, report_to=[],
                                                             gradient_checkpointing=False),
                             train_dataset=datasets.Dataset.from_list([{"prompt": "t1", "chosen": "t2", "rejected": "t3"}]),
                             processing_class=PreTrainedTokenizerFast(tokenizer_object=words, eos_token="t0"))
    inputs, alone = batch()
    rows = [pair[second] for second in (0, 1) for pair in alone]       # trl's batch: all chosen answers, then all rejected ones
    said = torch.nn.utils.rnn.pad_sequence([one for one, _ in rows], batch_first=True)
    place = torch.arange(said.shape[1])
    there = torch.stack([place < len(one) for one, _ in rows])
    answers = torch.stack([place >= prompt for _, prompt in rows]) & there
    loss = trainer.compute_loss(model, {"input_ids": said, "attention_mask": there.long(), "completion_mask": answers.long()})
    loss.backward()
    ours = PreferenceLoss(make(family), 0.3)
    with torch.no_grad():
        scores = torch.stack([torch.stack([log_prob(reference, *one) for one in pair]) for pair in alone])
    ours.reference = Reference(torch.arange(len(WINDOWS)), scores)
    mean = ours(*inputs) / len(WINDOWS)
    torch.testing.assert_close(mean, loss)
    mean.backward()
    theirs = dict(model.named_parameters())
    for name, parameter in ours.model.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, atol=1e-6, rtol=1e-4, msg=name)


@pytest.mark.parametrize("smaller", [False, True])
@pytest.mark.parametrize(("family", "attention"), [("gemma2", "eager"), *itertools.product(("llama", "gemma3_text"), IMPLEMENTATIONS)])
def test_pairs_side_by_side_have_the_loss_and_the_gradient_that_they_have_in_their_windows(
        family: str, attention: str, smaller: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "TRIM_TOKENS", 1 if smaller else 16)
    reference = torch.randn(len(WINDOWS), 2, generator=torch.Generator().manual_seed(2)) - 30
    found, shapes = [], list[tuple[int, ...]]()
    for packed in (False, True):
        ours, (inputs, _) = PreferenceLoss(make(family, attention), 0.3), batch(packed)
        assert ours.model.config._attn_implementation == attention
        ours.model.get_input_embeddings().register_forward_pre_hook(lambda _, given: shapes.append(tuple(given[0].shape)))
        ours.reference = Reference(torch.arange(len(WINDOWS)), reference)
        loss = ours(*inputs)
        loss.backward()
        found.append((loss.detach(), torch.cat([one.grad.flatten() for one in ours.parameters() if one.grad is not None]), ours.sums))
    (loss, gradient, sums), (expected, by_window, own) = found[1], found[0]
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    assert (gradient - by_window).norm() <= 1e-6 * by_window.norm()
    torch.testing.assert_close(sums, own, rtol=1e-5, atol=1e-5)
    read = sum(prompt + answer - 1 for pair in WINDOWS for prompt, answer in pair)
    assert sums[2] == own[2] == read == 37
    assert shapes == [(3, 23), (3, 13) if smaller else (2, 23)], "of windows, and of rows"


def test_a_window_without_marks_is_a_chosen_answer_alone() -> None:
    """As what a rank that has run out of windows computes, so that the others can go on."""
    tokens = torch.zeros(1, CONTEXT + 1, dtype=torch.int64)
    given = (tokens, tokens[:, 1:], torch.arange(CONTEXT)[None])
    one, other = (PreferenceLoss(make("llama"), 0.3).eval() for _ in range(2))
    with torch.no_grad():
        torch.testing.assert_close(*(loss(torch.zeros(1, dtype=torch.int64), *lay_out(*given, packed))
                                     for loss, packed in ((one, True), (other, False))))
    torch.testing.assert_close(one.observed, other.observed)
    assert one.observed[0, 0] < 0 == one.observed[0, 1]


def test_without_a_reference_the_model_is_its_own() -> None:
    inputs, alone = batch()
    ours = PreferenceLoss(make("llama"), 0.1).eval()
    with torch.no_grad():
        assert float(ours(*inputs)) == pytest.approx(len(WINDOWS) * math.log(2))
        found = torch.stack([torch.stack([log_prob(make("llama"), *one) for one in pair]) for pair in alone])
    torch.testing.assert_close(ours.observed, torch.cat([found, torch.zeros(len(WINDOWS), 2)], 1))
    ours.reference = Reference(torch.tensor([0, 2]), found[[0, 2]])
    with torch.no_grad():
        ours(*inputs)
    assert ours.observed[:, 2].isnan().tolist() == [False, True, False], "a pair that the reference does not know is no pair of 0"


def test_log_probs_have_a_bias_and_no_gradient_for_weights_that_stay() -> None:
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(7, 4, requires_grad=True), torch.randn(9, 4), torch.randn(9, requires_grad=True)
    targets = torch.arange(7)
    each = linear_log_probs(hidden, weight, bias, targets)
    weights = torch.randn(7)
    by = torch.autograd.grad((each * weights).sum(), [hidden, bias])
    whole = functional.log_softmax(functional.linear(hidden, weight, bias), 1).gather(1, targets[:, None]).squeeze(1)
    torch.testing.assert_close(each, whole)
    for ours, theirs in zip(by, torch.autograd.grad((whole * weights).sum(), [hidden, bias]), strict=True):
        torch.testing.assert_close(ours, theirs)
