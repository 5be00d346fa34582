"""A model learns of a teacher as the paper has it: loss and gradient are those of whole logits in float64."""

import copy
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM

from distlm.model import distill, loss
from distlm.model.attention import use_cpu_attention
from distlm.model.distill import DistillationLoss, Teacher
from tests.model.test_loss import TINY

LENGTHS = (20, 13, 7)
"""Of the sequences of a batch; what is behind gives no loss."""


def tiny(family: str, seed: int, **values: Any) -> Any:
    torch.manual_seed(seed)
    if family == "gpt2":
        config = AutoConfig.for_model(family, vocab_size=97, n_embd=32, n_layer=1, n_head=2, n_positions=32)
    else:
        config = AutoConfig.for_model(family, **{**TINY, "head_dim": 8, **values})
    model = AutoModelForCausalLM.from_config(config).eval()
    torch.nn.init.normal_(model.get_output_embeddings().weight, std=0.3)
    return model


def ragged() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """tokens, targets and positions: documents of other lengths, and tokens here and there that give no loss."""
    torch.manual_seed(5)
    tokens = torch.randint(0, 97, (3, 20))
    ends = torch.tensor(LENGTHS)[:, None]
    silent = (torch.arange(1, 20) >= ends) | (torch.rand(3, 19) < 0.2)
    return tokens, torch.where(silent, loss.IGNORED, tokens[:, 1:]), torch.arange(19).expand(3, -1)


def by_the_paper(student: Any, teacher: Any, temperature: float, alpha: float) -> tuple[float, list[float], dict[str, torch.Tensor]]:
    """(loss, its two parts, gradients): equation 1's distributions, whole, in float64."""
    tokens, targets, positions = ragged()
    student, teacher = copy.deepcopy(student).double(), copy.deepcopy(teacher).double()
    kept = targets != loss.IGNORED
    v = teacher(input_ids=tokens[:, :-1], position_ids=positions).logits[kept].detach()
    z = student(input_ids=tokens[:, :-1], position_ids=positions).logits[kept]
    p, q = (torch.exp(one / temperature) / torch.exp(one / temperature).sum(1, keepdim=True) for one in (v, z))
    kl = (p * (p / q).log()).sum()
    hard = functional.cross_entropy(z, targets[kept], reduction="sum")
    total = (1 - alpha) * hard + alpha * temperature**2 * kl
    total.backward()
    return total.item(), [hard.item(), kl.item()], {name: one.grad for name, one in student.named_parameters() if one.grad is not None}


@pytest.mark.parametrize(("temperature", "alpha"), [(1.0, 0.5), (2.0, 0.3), (4.0, 1.0)])
@pytest.mark.parametrize(("family", "other"), [("llama", "llama"), ("llama", "gpt2"), ("gemma2", "llama"), ("qwen2", "gemma2")])
def test_loss_and_gradients_are_the_papers(family: str, other: str, temperature: float, alpha: float,
                                           monkeypatch: pytest.MonkeyPatch) -> None:
    """gemma2 caps its logits, which are whole there."""
    monkeypatch.setitem(loss.BLOCK_ELEMENTS, "cpu", 97 * 7)
    monkeypatch.setitem(loss.CHUNK_ELEMENTS, "cpu", 97 * 3)
    student, teacher = tiny(family, 0, tie_word_embeddings=False), tiny(other, 1)
    expected, parts, gradients = by_the_paper(student, teacher, temperature, alpha)
    names = set(student.state_dict())
    wrapped = DistillationLoss(student, Teacher(teacher), temperature, alpha)
    student.train()
    ours = wrapped.train()(*ragged())
    ours.backward()
    assert ours.dtype == torch.float32 and ours.item() == pytest.approx(expected, rel=1e-5)
    assert wrapped.sums.tolist() == pytest.approx(parts, rel=1e-4)
    assert set(student.state_dict()) == names and set(wrapped.state_dict()) == {f"model.{name}" for name in names}
    assert {name for name, one in student.named_parameters() if one.grad is not None} == set(gradients)
    for name, gradient in gradients.items():
        found = student.get_parameter(name).grad.double()
        assert (found - gradient).norm() <= 1e-4 * gradient.norm(), name
    assert not teacher.training and all(one.grad is None and not one.requires_grad for one in teacher.parameters())


def gradients_of(wrapped: loss.CausalLoss, *inputs: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    value = wrapped.train()(*inputs)
    value.backward()
    return value.detach(), {name: one.grad for name, one in wrapped.model.named_parameters() if one.grad is not None}


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("penalties", [(0.0, 0.0), (0.1, 0.01)])
def test_with_alpha_0_it_is_plain_training(family: str, penalties: tuple[float, float]) -> None:
    plain, gradients = gradients_of(loss.CausalLoss(tiny(family, 0), *penalties), *ragged())
    ours, found = gradients_of(DistillationLoss(tiny(family, 0), Teacher(tiny("llama", 1)), 3.0, 0.0, *penalties), *ragged())
    assert torch.equal(ours, plain) and found.keys() == gradients.keys()
    for name in found:
        assert torch.equal(found[name], gradients[name]), name


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_teacher_that_thinks_the_same_teaches_nothing(family: str) -> None:
    student = tiny(family, 0)
    use_cpu_attention(student)                             # as the loop does, and the teacher by itself
    wrapped = DistillationLoss(student, Teacher(tiny(family, 0)), 2.0, 1.0)
    value, gradients = gradients_of(wrapped, *ragged())
    assert value == 0 and wrapped.sums[1] == 0 and wrapped.sums[0] > 0 and not any(one.any() for one in gradients.values())


def test_the_gradient_is_as_large_at_a_high_temperature() -> None:
    """At a high temperature it is that of half the squared difference of centred logits over the vocabulary (equation 4), times T² / T²."""
    student, teacher = tiny("llama", 0, tie_word_embeddings=False), tiny("llama", 1)
    tokens, targets, positions = ragged()
    kept = targets != loss.IGNORED
    v, z = (one(input_ids=tokens[:, :-1], position_ids=positions).logits[kept] for one in (teacher, student))
    v, z = (one - one.mean(1, keepdim=True) for one in (v.detach(), z))
    (expected,) = torch.autograd.grad((z - v).square().sum() / 2 / 97, student.lm_head.weight)
    _, found = gradients_of(DistillationLoss(student, Teacher(teacher), 100.0, 1.0), tokens, targets, positions)
    assert (found["lm_head.weight"] - expected).norm() < 0.05 * expected.norm()


def test_evaluation_is_the_plain_loss_and_does_not_ask_the_teacher() -> None:
    asked: list[Any] = []
    wrapped = DistillationLoss(tiny("llama", 0), Teacher(teacher := tiny("llama", 1)), 2.0, 0.5)
    teacher.register_forward_pre_hook(lambda *_: asked.append(1))
    plain = loss.CausalLoss(tiny("llama", 0)).eval()
    with torch.no_grad():
        assert torch.equal(wrapped.eval()(*ragged()), plain(*ragged())) and not asked
        assert wrapped.model(input_ids=torch.zeros(1, 4, dtype=torch.int64)).logits.shape == (1, 4, 97), "a prompt is completed"


def test_no_logits_are_ever_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(loss.BLOCK_ELEMENTS, "cpu", 97 * 7)
    wrapped, sizes, linear = DistillationLoss(tiny("llama", 0), Teacher(tiny("gpt2", 1)), 2.0, 0.5), [], functional.linear

    def counted(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        sizes.append((rows.shape[0], weight.shape[0]))
        return linear(rows, weight, bias)

    monkeypatch.setattr(distill.functional, "linear", counted)
    wrapped.train()(torch.randint(0, 97, (3, 20)))
    blocks = [rows for rows, width in sizes if width == 97]
    assert max(blocks) <= 7 and sum(blocks) == 2 * 57
