"""The loss and its gradient are PyTorch's own, summed, whatever the chunk."""

import pytest
import torch
from torch.nn import functional

from distlm.model import loss


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
