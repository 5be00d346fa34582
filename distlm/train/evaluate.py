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
        self._parts, self._context = recipe.val, recipe.shape.context
        self._batches: list[tuple[int, torch.Tensor]] = []
        """(part, int64[n, context + 1]): no batch holds windows of two corpora."""
        for i, part in enumerate(recipe.val):
            mine = Windows(part.corpus, "val").head(part.windows).astype(np.int64)[rank::recipe.world]
            size = recipe.micro_sequences
            rounds = -(-part.windows // (size * recipe.world))
            self._batches += [(i, torch.from_numpy(mine[j * size:(j + 1) * size]).to(device)) for j in range(rounds)]
        self._idle = torch.zeros((1, recipe.shape.context + 1), dtype=torch.int64, device=device)
        self._device = device

    @torch.no_grad()
    def loss(self, engine: Any) -> float | None:
        """Mean negative log-likelihood per token, in nats, of a mixture the mean by its shares; None without a validation window."""
        if not self._parts:
            return None
        engine.eval()
        totals = torch.zeros(len(self._parts), dtype=torch.float64, device=self._device)
        for i, tokens in self._batches:                    # a rank that has run out still takes part: ZeRO-3 gathers in each call
            value = engine(tokens if len(tokens) else self._idle)
            if len(tokens):
                totals[i] += value.double()
        engine.train()
        distributed.all_reduce(totals)
        means = [total / (part.windows * self._context) for total, part in zip(totals.tolist(), self._parts, strict=True)]
        return sum(part.share * mean for part, mean in zip(self._parts, means, strict=True))
