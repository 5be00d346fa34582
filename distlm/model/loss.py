"""What a model is trained on: the next token's cross-entropy, summed, so that the caller divides by the global count once."""

from typing import Any

import torch
from torch import nn

CHUNK_ELEMENTS = {"cpu": 1 << 19, "cuda": 1 << 26}
"""Logits that are in float32 at once: what a core's cache holds, or enough to fill a GPU."""


class CausalLoss(nn.Module):
    """Wraps a causal language model; its forward pass is the loss."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """The sum over all predictions of -log p(token), a float32 scalar in nats. tokens: int64[batch, context + 1]."""
        logits = self.model(input_ids=tokens[:, :-1], use_cache=False).logits
        return summed_cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def summed_cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Sum of -log softmax(logits)[target], computed in float32 by chunks of rows, the gradient in the same pass.

    logits: [rows, vocabulary] of any float type; targets: int64[rows]. Returns a float32 scalar.
    """
    return _SummedCrossEntropy.apply(logits, targets)


class _SummedCrossEntropy(torch.autograd.Function):
    """Whole float32 logits cost more time than the products around them: neither they nor their gradient are ever there."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        rows = max(1, CHUNK_ELEMENTS.get(logits.device.type, 1 << 26) // logits.shape[1])
        total = torch.zeros((), dtype=torch.float32, device=logits.device)
        gradient = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        for start in range(0, len(logits), rows):
            part = slice(start, start + rows)
            scores, target = logits[part].float(), targets[part, None]
            p = torch.softmax(scores, dim=1)
            log_sum = scores.amax(1, keepdim=True) - p.amax(1, keepdim=True).log()   # the largest p is never too small for a log
            total += (log_sum - scores.gather(1, target)).sum()
            if gradient is not None:
                gradient[part] = p.scatter_add_(1, target, torch.full_like(target, -1, dtype=p.dtype))
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *outputs: torch.Tensor) -> tuple[torch.Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * outputs[0].to(gradient.dtype), None
