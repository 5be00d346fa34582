"""GELU's approximation by tanh, computed by the logistic function, of which tanh is a form: 1 + tanh(u) = 2 / (1 + exp(-2u)). What the
compiler makes of tanh on a CPU takes more than twice as long (docs/experiments.md).

    without_tanh(model)         # before its layers are compiled
"""

import math

import torch
from torch import nn


class LogisticGELU(nn.Module):
    """x / (1 + exp(-2u)), u = sqrt(2 / pi) (x + 0.044715 x^3): Hendrycks and Gimpel, arXiv:1606.08415, section 2."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Of any shape, each number by itself."""
        return x * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x))


def without_tanh(model: nn.Module) -> None:
    """Replace the activations that are computed by tanh."""
    from transformers.activations import GELUTanh, NewGELUActivation

    for module in [*model.modules()]:
        for name, child in module.named_children():
            if isinstance(child, GELUTanh | NewGELUActivation):
                setattr(module, name, LogisticGELU())
