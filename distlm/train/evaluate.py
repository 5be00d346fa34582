"""Validation loss over the same windows every time, divided over the ranks."""

from typing import Any

import numpy as np
import torch
from torch import distributed

from distlm.corpus.stream import Windows
from distlm.train.batch import Batch, make_batch
from distlm.train.recipe import Recipe


class Evaluator:
    """Holds this rank's validation windows. All ranks take part in every call."""

    def __init__(self, recipe: Recipe, rank: int, device: torch.device) -> None:
        self._parts = recipe.val
        self._batches: list[tuple[int, Batch]] = []
        """Each with its part: no batch holds windows of two corpora."""
        readers = recipe.spec.data_workers
        for i, part in enumerate(recipe.val):
            windows = Windows(part.corpus, "val")
            shards, rows = (places[rank // recipe.group::readers] for places in windows.first(part.windows))
            mine = windows.read(shards, rows).astype(np.int64)
            if recipe.marked:
                mine = np.stack([mine, windows.marks(shards, rows)], 1)
            size = recipe.micro_sequences
            rounds = -(-part.windows // (size * readers))
            self._batches += [(i, make_batch(mine[j * size:(j + 1) * size], recipe.mask_documents, device).part(*recipe.part(rank)))
                              for j in range(rounds)]
        self._idle = Batch(torch.zeros((1, recipe.shape.context + 1), dtype=torch.int64, device=device)).part(*recipe.part(rank))
        self._device = device

    @torch.no_grad()
    def loss(self, engine: Any) -> float | None:
        """Mean negative log-likelihood per token that gives loss, in nats, of a mixture the mean by its shares; None without a validation
        window."""
        if not self._parts:
            return None
        engine.eval()
        totals = torch.zeros(2, len(self._parts), dtype=torch.float64, device=self._device)
        for i, batch in self._batches:                     # a rank that has run out still takes part: ZeRO-3 gathers in each call
            value = engine(*(batch if batch.sequences else self._idle).inputs)
            if batch.sequences:
                totals[0, i] += value.double()
                totals[1, i] += batch.num_targets()
        engine.train()
        distributed.all_reduce(totals)
        means = [total / count for total, count in zip(*totals.tolist(), strict=True)]
        return sum(part.share * mean for part, mean in zip(self._parts, means, strict=True))
