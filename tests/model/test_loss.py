"""The loss and its gradient are PyTorch's own, summed, whatever the chunk."""

import pytest
import torch
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM

from distlm.model import loss
from tests.model.families import MIXTURES, tiny


@pytest.mark.parametrize("elements", [1, 700, 1 << 19])
def test_loss_and_gradient_are_those_of_pytorch(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(loss.CHUNK_ELEMENTS, "cpu", elements)
    torch.manual_seed(0)
    logits, targets = (torch.randn(57, 300) * 4).requires_grad_(), torch.randint(0, 300, (57,))
    ours = loss.summed_cross_entropy(logits, targets)
    (ours / 57).backward()
    gradient, logits.grad = logits.grad, None
    theirs = functional.cross_entropy(logits.double(), targets, reduction="sum")
    (theirs / 57).backward()
    assert ours.dtype == torch.float32 and ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    torch.testing.assert_close(gradient, logits.grad, rtol=1e-5, atol=1e-8)


def test_a_token_that_is_nearly_impossible_has_a_finite_loss() -> None:
    logits = torch.tensor([[500.0, -500.0, 0.0]])
    assert loss.summed_cross_entropy(logits, torch.tensor([1])).item() == 1000.0


def test_bf16_logits_are_summed_in_float32() -> None:
    torch.manual_seed(0)
    logits, targets = torch.randn(4096, 64, dtype=torch.bfloat16, requires_grad=True), torch.randint(0, 64, (4096,))
    ours = loss.summed_cross_entropy(logits, targets)
    ours.backward()
    assert ours.item() == pytest.approx(functional.cross_entropy(logits.double(), targets, reduction="sum").item(), rel=1e-6)
    assert logits.grad is not None and logits.grad.dtype == torch.bfloat16


def test_evaluation_keeps_no_gradient() -> None:
    with torch.no_grad():
        assert not loss.summed_cross_entropy(torch.randn(3, 5), torch.zeros(3, dtype=torch.int64)).requires_grad


TINY = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 32, "pad_token_id": None, "bos_token_id": 0, "eos_token_id": 0}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", sorted(loss.PLAIN_HEADS))
def test_a_head_by_blocks_gives_the_loss_and_gradients_of_whole_logits(family: str, tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(loss.BLOCK_ELEMENTS, "cpu", 97 * 7)
    torch.manual_seed(0)
    layers = 2 if family in MIXTURES else 1                # the first of several is dense
    config = AutoConfig.for_model(family, **tiny(family, layers), tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    torch.nn.init.normal_(model.get_output_embeddings().weight, std=0.3)
    tokens = torch.randint(0, 97, (3, 20))
    logits = model(input_ids=tokens[:, :-1]).logits.flatten(0, 1)
    theirs = functional.cross_entropy(logits, tokens[:, 1:].flatten(), reduction="sum")
    (theirs / 57).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    names = set(model.state_dict())
    wrapped = loss.CausalLoss(model)
    linear, blocks = loss.functional.linear, list[int]()

    def counted(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if len(weight) == 97:
            blocks.append(rows.numel() // rows.shape[-1])
        return linear(rows, weight, bias)

    monkeypatch.setattr(loss.functional, "linear", counted)
    ours = wrapped(tokens)
    (ours / 57).backward()
    assert max(blocks) <= 7 and sum(blocks) == 57, "logits are never whole"
    assert isinstance(model.get_output_embeddings(), loss.LossHead) and set(model.state_dict()) == names
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    for name, p in model.named_parameters():
        if p.grad is not None:
            assert (p.grad - expected[name]).norm() <= 1e-5 * expected[name].norm(), name


def test_a_head_in_bf16_sums_its_gradients_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(loss.BLOCK_ELEMENTS, "cpu", 64 * 16)
    torch.manual_seed(0)
    linear, hidden, targets = torch.nn.Linear(32, 64, bias=True), torch.randn(8, 512, 32), torch.randint(0, 64, (4096,))
    exact = functional.cross_entropy(linear.double()(hidden.double()).flatten(0, 1), targets, reduction="sum") / 768
    exact.backward()
    expected = [linear.weight.grad, linear.bias.grad]
    linear = linear.bfloat16()
    linear.zero_grad()
    head, inside = loss.LossHead(linear), hidden.bfloat16().requires_grad_()
    head.targets = targets
    (head(inside) / 768).backward()
    for p, gradient in zip((linear.weight, linear.bias), expected, strict=True):
        assert gradient is not None and p.grad is not None and p.grad.dtype == torch.bfloat16
        assert (p.grad.double() - gradient).norm() < 0.01 * gradient.norm()
    gain = (inside.grad.double() * 768).abs().sum() / _hidden_gradient(linear, inside, targets).abs().sum()
    assert abs(gain.item() - 1) < 1e-3                     # 1 / 768 is not rounded to bf16


def _hidden_gradient(linear: torch.nn.Linear, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    head, inside = loss.LossHead(linear), hidden.detach().clone().requires_grad_()
    head.targets = targets
    head(inside).backward()
    assert inside.grad is not None
    return inside.grad.double()


def test_evaluation_computes_no_gradient_of_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    inner, seen = loss._by_chunks, []
    monkeypatch.setattr(loss, "_by_chunks", lambda *given: (seen.append(given[2]), inner(*given))[1])
    model = loss.CausalLoss(AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **TINY)))
    with torch.no_grad():
        model(torch.randint(0, 97, (2, 9)))
    assert seen == [None]
    model(torch.randint(0, 97, (2, 9)))
    assert seen[1] is not None


def test_a_family_that_caps_its_logits_keeps_its_head() -> None:
    config = AutoConfig.for_model("gemma2", **TINY, head_dim=8, final_logit_softcapping=3.0)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    torch.nn.init.normal_(model.get_output_embeddings().weight, std=2.0)
    tokens = torch.randint(0, 97, (2, 9))
    logits = model(input_ids=tokens[:, :-1]).logits
    expected = functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")
    assert loss.CausalLoss(model)(tokens).item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("penalties", [(0.1, 0.0), (0.0, 0.01), (0.2, 0.003)], ids=["smoothing", "z", "both"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_penalties_are_in_the_gradient_and_the_value_is_the_plain_loss(family: str, penalties: tuple[float, float],
                                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    """llama's head gives the loss by blocks, gemma2's the logits: both against PyTorch's own derivative of the whole in float64."""
    monkeypatch.setitem(loss.BLOCK_ELEMENTS, "cpu", 97 * 7)
    monkeypatch.setitem(loss.CHUNK_ELEMENTS, "cpu", 97 * 3)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **TINY, head_dim=8, tie_word_embeddings=False))
    torch.nn.init.normal_(model.get_output_embeddings().weight, std=0.3)
    tokens = torch.randint(0, 97, (3, 20))
    logits = model(input_ids=tokens[:, :-1]).logits.flatten(0, 1).double()
    smoothing, z_loss = penalties
    whole = functional.cross_entropy(logits, tokens[:, 1:].flatten(), reduction="sum", label_smoothing=smoothing)
    (whole + z_loss * logits.logsumexp(1).square().sum()).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    plain = loss.CausalLoss(model)(tokens).item()
    wrapped = loss.CausalLoss(model, *penalties)
    if family == "llama":
        wrapped = loss.CausalLoss(AutoModelForCausalLM.from_config(model.config), *penalties)
        wrapped.model.load_state_dict(model.state_dict())
    ours = wrapped(tokens)
    ours.backward()
    assert ours.item() == plain
    for name, p in wrapped.model.named_parameters():
        if p.grad is not None:
            assert (p.grad - expected[name]).norm() <= 1e-5 * expected[name].norm(), name
    with torch.no_grad():
        assert wrapped(tokens).item() == plain


@pytest.mark.parametrize(("family", "headed"), [("llama", False), ("llama", True), ("gpt2", False), ("gemma3_text", False)])
def test_the_scores_of_each_token_are_those_of_whole_logits(family: str, headed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(loss.BLOCK_ELEMENTS, "cpu", 97 * 7)
    values = {"vocab_size": 97, "n_embd": 32, "n_layer": 1, "n_head": 2} if family == "gpt2" else {**TINY, "head_dim": 8}
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **values, **({"final_logit_softcapping": 2.0} if family == "gemma3_text" else {}))
    model = AutoModelForCausalLM.from_config(config).eval()
    torch.nn.init.normal_(model.get_output_embeddings().weight, std=0.3)
    tokens = torch.randint(0, 97, (3, 20))
    targets = torch.where(torch.rand(3, 19) < 0.3, loss.IGNORED, tokens[:, 1:])
    logits = model(input_ids=tokens[:, :-1]).logits
    whole, kept = logits.double().log_softmax(-1), targets != loss.IGNORED
    if headed:
        loss.CausalLoss(model)                             # which replaces the head
    with torch.no_grad():
        found = loss.token_scores(model, tokens, targets)
        silent = loss.token_scores(model, tokens, torch.full_like(targets, loss.IGNORED))
    wanted = whole.gather(-1, tokens[:, 1:, None])[..., 0]
    torch.testing.assert_close(found.logprobs, torch.where(kept, wanted, 0).float())
    assert torch.equal(found.best, torch.where(kept, logits.argmax(-1), 0))
    torch.testing.assert_close(found.confidences, torch.where(kept, whole.exp().amax(-1), 0).float())
    assert not any(one.any() for one in silent) and silent.logprobs.shape == targets.shape

    (gradient,) = torch.autograd.grad(loss.token_scores(model, tokens).logprobs.sum(), model.get_output_embeddings().weight)
    (expected,) = torch.autograd.grad(wanted.sum(), model.get_output_embeddings().weight)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-4)


def test_whole_logits_are_never_there_for_the_scores_of_a_plain_head(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(loss.BLOCK_ELEMENTS, "cpu", 97 * 7)
    model, sizes = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **TINY)), []
    linear = functional.linear

    def counted(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        sizes.append((rows.shape[0], weight.shape[0]))
        return linear(rows, weight, bias)

    monkeypatch.setattr(loss.functional, "linear", counted)
    with torch.no_grad():
        loss.token_scores(model, torch.randint(0, 97, (3, 20)))
    blocks = [rows for rows, width in sizes if width == 97]
    assert max(blocks) <= 7 and sum(blocks) == 57
