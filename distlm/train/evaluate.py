"""Validation loss, and what else the objective measures, over the same windows every time, divided over the ranks."""

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import distributed
from transformers import AutoTokenizer

from distlm.corpus.stream import Windows, joined
from distlm.errors import TrainError
from distlm.model.complete import complete
from distlm.model.loss import IGNORED, TokenScores, blank_scores
from distlm.train.batch import Batch, TokenBatch
from distlm.train.objectives import objective_of
from distlm.train.recipe import Recipe, manifest_of, read_prompts
from distlm.train.totals import BINS, tally


class Predictions(NamedTuple):
    """The tokens of this rank's windows that give loss, in the order in which the model is asked of them, all [tokens]."""

    targets: NDArray[np.int64]
    sizes: NDArray[np.float64]
    """The bytes of each."""
    groups: NDArray[np.int64]
    """The corpus, or where it tells several the source of each, by its number among those of `recipe.val`."""


class Evaluator:
    """Holds this rank's validation windows. All ranks take part in every call."""

    def __init__(self, recipe: Recipe, rank: int, device: torch.device) -> None:
        self._recipe, self._parts = recipe, recipe.val
        self._objective, self._rank = objective_of(recipe.spec), rank
        self._batches: list[tuple[int, Batch]] = []
        """Each with its part: no batch holds windows of two corpora."""
        self._predictions: list[Predictions] = []
        """Where the objective measures each token: of each batch."""
        self._groups: list[NDArray[np.int64]] = []
        """Where it measures samples: of each part the group of each sample, as Predictions has them."""
        readers, first_group = recipe.spec.data_workers, 0
        for i, part in enumerate(recipe.val):
            windows = Windows(part.corpus, "val", recipe.spec.fold)
            shards, rows = (places[rank // recipe.group::readers] for places in windows.first(part.windows))
            mine = joined(windows.read(shards, rows), windows.marks(shards, rows) if recipe.marked else None,
                          windows.labels(shards, rows) if recipe.shape.labels else None).astype(np.int64)
            size = recipe.micro_sequences
            rounds = -(-part.windows // (size * readers))
            batches = [self._make(mine[j * size:(j + 1) * size], rank) for j in range(rounds)]
            self._batches += [(i, batch) for batch in batches]
            groups = np.full((len(rows), recipe.shape.context + 1), first_group)
            if part.sources:
                groups += windows.sources_of(windows.documents(shards, rows))
            if self._objective.BY_TOKEN:
                self._predictions += [self._predict(batch, groups[j * size:(j + 1) * size, 1:], windows) for j, batch in enumerate(batches)]
            else:
                self._groups.append(groups[:, 0])
            first_group += max(1, len(part.sources))
            self._idle = self._make(np.zeros((1, *mine.shape[1:]), np.int64), rank)
        self._num_groups = first_group
        self._device = device
        self._prompts = read_prompts(recipe)

    def _make(self, rows: NDArray[np.int64], rank: int) -> Batch:
        return self._objective.make_batch(rows, self._recipe).part(*self._recipe.part(rank))

    def _predict(self, batch: Batch, groups: NDArray[np.int64], windows: Windows) -> Predictions:
        """groups: [windows, context], of whole windows."""
        assert isinstance(batch, TokenBatch)
        targets = (batch.tokens[:, 1:] if batch.targets is None else batch.targets).numpy()
        index, parts = self._recipe.part(self._rank)
        kept, size = targets != IGNORED, groups.shape[1] // parts
        return Predictions(targets[kept], windows.bytes_of(targets[kept]), groups[:, index * size:(index + 1) * size][kept])

    @torch.no_grad()
    def measure(self, engine: Any, done: int) -> dict[str, Any]:
        """`val_loss` after `done` steps, the mean per target, in nats, of a mixture the mean by its shares, with that of each corpus under
        `val_by_source`, and on rank 0 what the objective measures beside it; empty without a validation window. Raises TrainError, on all
        ranks, where the loss is not finite."""
        if not self._parts and not self._prompts:
            return {}
        engine.eval()
        samples = {"samples": self._complete(engine)} if self._prompts else {}
        if not self._parts:
            engine.train()
            return samples
        observed = []
        totals = torch.zeros(2, len(self._parts), dtype=torch.float64, device=self._device)
        for i, batch in self._batches:                     # a rank that has run out still takes part: ZeRO-3 gathers in each call
            value = engine(*(batch if batch.sequences else self._idle).inputs(self._device))
            if batch.sequences:
                totals[0, i] += value.double()
                totals[1, i] += batch.num_targets()
                observed.append(engine.module.observed)
        engine.train()
        distributed.all_reduce(totals)
        means = [total / count for total, count in zip(*totals.tolist(), strict=True)]
        val_loss = sum(part.share * mean for part, mean in zip(self._parts, means, strict=True))
        if not math.isfinite(val_loss):
            of = ", ".join(part.name for part, mean in zip(self._parts, means, strict=True) if not math.isfinite(mean))
            raise TrainError(f"the validation loss is {val_loss} {f'after step {done}' if done else 'before the first step'}, on windows "
                             f"of {of}", cause="nonfinite_loss", remedy="lower optimizer.lr, or look at these windows")
        by_corpus = {part.name: {"loss": mean} for part, mean in zip(self._parts, means, strict=True)} if len(means) > 1 else {}
        seen = self._summed(observed) if self._objective.BY_TOKEN else self._gathered(observed)
        measured = {} if seen is None else self._objective.measure(seen, self._recipe)
        return {"val_loss": val_loss, **({"val_by_source": by_corpus} if by_corpus else {}), **measured, **samples}

    def _gathered(self, observed: list[torch.Tensor]) -> list[NDArray[np.float32]] | None:
        """What was observed of the samples of all ranks, by their groups, on rank 0. All ranks take part."""
        everyone: list[Any] | None = [None] * distributed.get_world_size() if self._rank == 0 else None
        distributed.gather_object(([one.cpu().numpy() for one in observed], np.concatenate(self._groups)), everyone)
        if everyone is None:
            return None
        rows = np.concatenate([one for found, _ in everyone[::self._recipe.group] for one in found])
        groups = np.concatenate([one for _, one in everyone[::self._recipe.group]])
        return [rows[groups == i] for i in range(self._num_groups)]

    def _summed(self, observed: list[TokenScores]) -> NDArray[np.float64] | None:
        """The sums over the tokens of all ranks, on rank 0; ranks that have the same ones count as many times, which no mean shows. All
        ranks take part."""
        none = blank_scores(torch.zeros(0, dtype=torch.int64, device=self._device))
        scores = TokenScores(*(torch.cat(each) for each in zip(none, *observed, strict=True)))
        logprobs, best, confidences = (one.cpu().numpy() for one in scores)
        targets, sizes, groups = (np.concatenate(each) for each in zip(*self._predictions, strict=True))
        sums = torch.from_numpy(tally(logprobs, best, confidences, targets, sizes, groups, self._num_groups, BINS)).to(self._device)
        distributed.all_reduce(sums)
        return sums.cpu().numpy() if self._rank == 0 else None

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

