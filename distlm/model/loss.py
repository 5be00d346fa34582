"""What a model is trained on: the next token's cross-entropy, summed, so that the caller divides by the global count once."""

import torch
from torch import nn
from torch.nn import functional


class CausalLoss(nn.Module):
    """Wraps a causal language model; its forward pass is the loss."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """The sum over all predictions of -log p(token), a float32 scalar in nats. tokens: int64[batch, context + 1]."""
        logits = self.model(input_ids=tokens[:, :-1], use_cache=False).logits
        return functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")
