"""Validation loss, and what else the objective measures, over the same windows every time, divided over the ranks."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import distributed
from transformers import AutoTokenizer

from distlm.corpus.stream import Windows, joined
from distlm.model.complete import complete
from distlm.train.batch import Batch
from distlm.train.objectives import objective_of
from distlm.train.recipe import Recipe, manifest_of, read_prompts


class Evaluator:
    """Holds this rank's validation windows. All ranks take part in every call."""

    def __init__(self, recipe: Recipe, rank: int, device: torch.device) -> None:
        self._recipe, self._parts = recipe, recipe.val
        self._objective, self._rank = objective_of(recipe.spec), rank
        self._batches: list[tuple[int, Batch]] = []
        """Each with its part: no batch holds windows of two corpora."""
        readers = recipe.spec.data_workers
        for i, part in enumerate(recipe.val):
            windows = Windows(part.corpus, "val", recipe.spec.fold)
            shards, rows = (places[rank // recipe.group::readers] for places in windows.first(part.windows))
            mine = joined(windows.read(shards, rows), windows.marks(shards, rows) if recipe.marked else None,
                          windows.labels(shards, rows) if recipe.shape.labels else None).astype(np.int64)
            size = recipe.micro_sequences
            rounds = -(-part.windows // (size * readers))
            self._batches += [(i, self._make(mine[j * size:(j + 1) * size], rank, device)) for j in range(rounds)]
            self._idle = self._make(np.zeros((1, *mine.shape[1:]), np.int64), rank, device)
        self._device = device
        self._prompts = read_prompts(recipe)

    def _make(self, rows: NDArray[np.int64], rank: int, device: torch.device) -> Batch:
        return self._objective.make_batch(rows, self._recipe, device).part(*self._recipe.part(rank))

    @torch.no_grad()
    def measure(self, engine: Any) -> dict[str, Any]:
        """`val_loss`, the mean per target, in nats, of a mixture the mean by its shares, and on rank 0 what the objective measures beside
        it; empty without a validation window."""
        if not self._parts and not self._prompts:
            return {}
        engine.eval()
        samples = {"samples": self._complete(engine)} if self._prompts else {}
        if not self._parts:
            engine.train()
            return samples
        observed: list[NDArray[np.float32]] = []
        totals = torch.zeros(2, len(self._parts), dtype=torch.float64, device=self._device)
        for i, batch in self._batches:                     # a rank that has run out still takes part: ZeRO-3 gathers in each call
            value = engine(*(batch if batch.sequences else self._idle).inputs)
            if batch.sequences:
                totals[0, i] += value.double()
                totals[1, i] += batch.num_targets()
                if hasattr(engine.module, "observed"):
                    observed.append(engine.module.observed.cpu().numpy())
        engine.train()
        distributed.all_reduce(totals)
        means = [total / count for total, count in zip(*totals.tolist(), strict=True)]
        val_loss = sum(part.share * mean for part, mean in zip(self._parts, means, strict=True))
        if not hasattr(engine.module, "observed"):
            return {"val_loss": val_loss, **samples}
        everyone: list[list[NDArray[np.float32]] | None] | None = [None] * distributed.get_world_size() if self._rank == 0 else None
        distributed.gather_object(observed, everyone)
        if everyone is None:
            return {"val_loss": val_loss, **samples}
        seen = [one for found in everyone[::self._recipe.group] for one in found or ()]
        return {"val_loss": val_loss, **self._objective.measure(np.concatenate(seen), self._recipe), **samples}

    def _complete(self, engine: Any) -> list[dict[str, str]]:
        """What the model adds to each prompt, uncompiled: lengths change with every token. Empty where another rank tells."""
        sharding, spec = self._recipe.spec.sharding, self._recipe.spec.evaluate
        together = sharding.zero == 3 or sharding.tensor_parallel > 1
        if self._rank and not together:
            return []
        tokenizer: Any = AutoTokenizer.from_pretrained(manifest_of(self._recipe).tokenizer, local_files_only=True)
        with torch.compiler.set_stance("force_eager"):
            texts = complete(engine.module.model, tokenizer, self._prompts, spec.max_tokens, together)
        return [{"prompt": prompt, "completion": text} for prompt, text in zip(spec.prompts, texts, strict=True)]

