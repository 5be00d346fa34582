"""Muon without ZeRO: DeepSpeed's, but matrices of one shape go through Newton-Schulz together.

One by one each matrix starts some forty small kernels, for which a GPU waits where the model is small (docs/experiments.md).
"""

from collections.abc import Iterator
from typing import Any

import torch
from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam
from deepspeed.runtime.zero.muon.original_muon import zeropower_via_newtonschulz5

TOGETHER_ELEMENTS = 1 << 26
"""Of the matrices that go together: what they take meanwhile, a few copies in bf16, stays small beside the model."""


class Muon(MuonWithAuxAdam):
    """The steps and the states of `MuonWithAuxAdam` with ns_method standard, over whole matrices."""

    param_groups: list[dict[str, Any]]

    @torch.no_grad()
    def step(self, closure: None = None, step_id: int | None = None) -> None:
        """Raises no error for gradients that are not finite: training ends before."""
        groups = self.param_groups
        for group in groups:
            for matrices in together(group["params"]) if group["use_muon"] else ():
                self._step(group, matrices)
        self.param_groups = [group for group in groups if not group["use_muon"]]
        try:
            super().step()
        finally:
            self.param_groups = groups

    def _step(self, group: dict[str, Any], matrices: list[torch.Tensor]) -> None:
        """Nesterov's momentum, orthogonal and scaled by sqrt(max(1, rows / columns)), with decoupled decay."""
        for p in matrices:
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in matrices]
        momenta = [self.state[p]["momentum_buffer"] for p in matrices]
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        torch._foreach_lerp_(gradients, momenta, group["momentum"])
        rows, columns = matrices[0].shape[-2:]
        stacked = torch.stack(gradients)
        updates = zeropower_via_newtonschulz5(stacked.view(-1, rows, columns), steps=5).view_as(stacked)     # of experts, each its own
        updates *= max(1.0, rows / columns) ** 0.5
        torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(matrices, list(updates.to(matrices[0].dtype).unbind()), alpha=-group["lr"])


def together(matrices: list[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Those of one shape, up to TOGETHER_ELEMENTS, one at least."""
    shapes = dict.fromkeys(p.shape for p in matrices)
    for shape in shapes:
        same, count = [p for p in matrices if p.shape == shape], max(1, TOGETHER_ELEMENTS // shape.numel())
        yield from (same[i:i + count] for i in range(0, len(same), count))
