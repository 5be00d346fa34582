"""Weights that stay zero: recovery training of a model whose smallest weights were pruned.

A gradient that is zero wherever the weight is makes no update of it by an optimizer that looks at each weight alone: moments stay zero, and
decay of zero is zero. Nothing is put right after a step, so that all ranks and all ZeRO stages have the same.
"""

import torch

from distlm.errors import TrainError


def keep_zeros(model: torch.nn.Module) -> int:
    """Let every weight of a matrix that is zero now stay zero; biases begin at zero, and are trained. The model has its weights whole, and
    is not divided yet. Returns how many they are. Raises TrainError where there is none."""
    total = 0
    for parameter in model.parameters():
        zero = parameter.detach() == 0
        if parameter.dim() > 1 and (count := int(zero.sum())):
            parameter.register_hook(Mask(zero))
            total += count
    if not total:
        raise TrainError("no weight of the model is zero", where="keep_zeros", cause="bad_input",
                         remedy="prune it first by kind: compress with method: magnitude, or leave keep_zeros out")
    return total


class Mask:
    """A gradient's hook; the mask follows the gradient's device."""

    def __init__(self, zero: torch.Tensor) -> None:
        self.zero = zero

    def __call__(self, gradient: torch.Tensor) -> torch.Tensor:
        self.zero = self.zero.to(gradient.device)
        return gradient.masked_fill(self.zero, 0)
