"""Validation loss over the same windows every time, divided over the ranks."""

from typing import Any

import numpy as np
import torch
from torch import distributed

from distlm.corpus.stream import Windows
from distlm.train.recipe import Recipe


class Evaluator:
    """Holds this rank's validation windows. All ranks take part in every call."""

    def __init__(self, recipe: Recipe, rank: int, device: torch.device) -> None:
        windows = Windows(recipe.corpus, "val").head(recipe.val_windows).astype(np.int64)
        self._count = len(windows) * recipe.shape.context
        size = recipe.micro_sequences
        rounds = -(-len(windows) // (size * recipe.world))
        mine = windows[rank::recipe.world]
        self._batches = [torch.from_numpy(mine[i * size:(i + 1) * size]).to(device) for i in range(rounds)]
        self._idle = torch.zeros((1, recipe.shape.context + 1), dtype=torch.int64, device=device)
        self._device = device

    @torch.no_grad()
    def loss(self, engine: Any) -> float | None:
        """Mean negative log-likelihood per token, in nats; None where the corpus has no validation window."""
        if not self._count:
            return None
        engine.eval()
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        for tokens in self._batches:                       # a rank that has run out still takes part: ZeRO-3 gathers in each call
            value = engine(tokens if len(tokens) else self._idle)
            if len(tokens):
                total += value.double()
        engine.train()
        distributed.all_reduce(total)
        return total.item() / self._count
