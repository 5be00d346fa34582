"""`objective: dpo`: of two answers to a prompt the chosen one shall become more likely, relative to the model as it was at first (Rafailov
et al. 2023, arXiv:2305.18290, equation 7). A sample is a window with both; a loss is divided by the number of pairs.

What the model makes of all pairs at first is computed once, before the first step, and lies in the run's folder as `reference/`.
"""

import io
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from distlm.corpus.manifest import Manifest
from distlm.corpus.stream import Windows
from distlm.errors import SpecError, StorageError
from distlm.model.build import Shape
from distlm.runs import RunFolder
from distlm.spec.train import TrainSpec
from distlm.storage import read_json, write_atomic, write_json
from distlm.train.objectives.metric import Metric, by_source

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray
    from transformers import PreTrainedModel

    from distlm.model.preference import PreferenceLoss
    from distlm.train.recipe import Recipe

MEANS: tuple[str, ...] = ("reward_margin", "reward_accuracy", "pair_tokens")
BY_TOKEN = False
LOSS, REWARD = ("dpo.beta", "dpo.label_smoothing"), ("dpo.beta",)
METRICS: Mapping[str, Metric] = {
    "val_reward_accuracy": Metric("max"), "val_reward_margin": Metric("max", scaled_by=REWARD), "val_loss": Metric("min", scaled_by=LOSS),
    "val_chosen_log_prob": Metric(""), "val_rejected_log_prob": Metric(""), "reward_accuracy": Metric("max", evaluated=False),
    "reward_margin": Metric("max", evaluated=False, scaled_by=REWARD), "loss": Metric("min", evaluated=False, scaled_by=LOSS)}
FOLDER, TABLE, RECORD = "reference", "log_probs.npz", "reference.json"
NOTE_S = 10.0
"""So often the pass over the pairs says how far it is."""


@dataclass(frozen=True)
class PairBatch:
    """Pairs of answers."""

    tokens: "torch.Tensor"
    """int64[pairs, context + 1]."""
    targets: "torch.Tensor"
    """int64[pairs, context], IGNORED outside of the answers."""
    positions: "torch.Tensor"
    """int64[pairs, context]."""
    keys: "torch.Tensor"
    """int64[pairs], by which the reference knows them."""
    packed: bool
    """Whether the model reads those of a micro-batch side by side."""

    @property
    def sequences(self) -> int:
        return len(self.tokens)

    def inputs(self, device: "torch.device") -> tuple[Any, ...]:
        """What PreferenceLoss takes. The padding is left out here."""
        from distlm.model.preference import lay_out
        from distlm.train.batch import send

        *tensors, several = self.keys, *lay_out(self.tokens, self.targets, self.positions, self.packed)
        return *(send(one, device) for one in tensors), several

    def num_targets(self) -> int:
        return self.sequences

    def part(self, index: int, parts: int) -> "PairBatch":
        """The same: sequences are not divided."""
        return self

    def split(self, sequences: int) -> "Iterator[PairBatch]":
        """Micro-batches of so many pairs."""
        for start in range(0, self.sequences, sequences):
            here = slice(start, start + sequences)
            yield PairBatch(self.tokens[here], self.targets[here], self.positions[here], self.keys[here], self.packed)


def check(spec: TrainSpec, manifests: list[Manifest]) -> None:
    """Raises SpecError where a corpus holds no pairs."""
    for one in manifests:
        if not one.pairs:
            found = "conversations" if one.conversations else "texts"
            raise SpecError(f"dpo needs pairs of answers, and the corpus {one.name} has {found}", where="objective",
                            remedy="prepare it with conversations.chosen_key and rejected_key")


def shape(manifest: Manifest) -> Shape:
    return Shape(manifest.vocab_size, manifest.context, manifest.eos_id)


def module(model: "PreTrainedModel", recipe: "Recipe") -> "PreferenceLoss":
    from distlm.model.preference import PreferenceLoss

    return PreferenceLoss(model, recipe.spec.dpo.beta, recipe.spec.dpo.label_smoothing)


def make_batch(rows: "NDArray[Any]", recipe: "Recipe") -> PairBatch:
    """rows: int64[n, 2, context + 1], tokens and marks; the second document of a window is the rejected answer's."""
    import torch

    from distlm.train import batch

    made = batch.make_batch(rows, True)
    assert made.targets is not None and made.positions is not None
    # a compiled layer's kernels depend on the shapes that it has seen: a run that goes on would not be bit-equal
    packed = not recipe.spec.compile and not recipe.whole
    return PairBatch(made.tokens, made.targets, made.positions, torch.from_numpy(keys_of(rows)), packed)


def keys_of(rows: "NDArray[Any]") -> "NDArray[np.int64]":
    """int64[n]: what stands for each pair, by all that its window holds."""
    return np.array([xxhash.xxh3_64_intdigest(np.ascontiguousarray(row, np.int64).tobytes()) for row in rows], np.uint64).view(np.int64)


def num_targets(recipe: "Recipe", step: int) -> int:
    """The pairs of a step."""
    return recipe.sizes.of(step)


def measure(observed: "Sequence[NDArray[np.float32]]", recipe: "Recipe") -> dict[str, Any]:
    """The mean margin of the rewards of chosen and rejected answers, the share of pairs in which it is above 0, and the mean log p of both
    answers; and under `val_by_source` the same of each corpus, if there are several, and of each source, with the loss as val_loss has
    it."""
    told = {name: {"loss": _loss(pairs, recipe), **_means(pairs)} for name, pairs in by_source(observed, recipe).items()}
    return {**{f"val_{name}": value for name, value in _means(np.concatenate(observed)).items()},
            **({"val_by_source": told} if told else {})}


def _means(pairs: "NDArray[np.float32]") -> dict[str, float]:
    """pairs: float32[pairs, 4], as PreferenceLoss leaves them."""
    margin = pairs[:, 2] - pairs[:, 3]
    return {"reward_margin": float(margin.mean()), "reward_accuracy": float((margin > 0).mean()),
            "chosen_log_prob": float(pairs[:, 0].mean()), "rejected_log_prob": float(pairs[:, 1].mean())}


def _loss(pairs: "NDArray[np.float32]", recipe: "Recipe") -> float:
    """The mean over pairs, in nats."""
    margin, smoothing = (pairs[:, 2] - pairs[:, 3]).astype(np.float64), recipe.spec.dpo.label_smoothing
    return float(((1 - smoothing) * np.logaddexp(0, -margin) + smoothing * np.logaddexp(0, margin)).mean())


def begin(engine: Any, recipe: "Recipe", folder: RunFolder, rank: int, device: "torch.device") -> None:
    """Give the module what the model makes of all pairs at first: from the run's folder, or by a pass over them all, which is kept there.
    All ranks take part, before a checkpoint is loaded."""
    import torch
    from torch import distributed

    from distlm.model.preference import Reference

    adapter = recipe.spec.adapter
    identity = {"corpus_hash": recipe.corpus_hash, "samples": min(recipe.num_samples, sum(map(len, _train(recipe)))),
                "val": [part.windows for part in recipe.val], "precision": recipe.spec.precision, "model": _model_hash(recipe, rank),
                "base": adapter.base if adapter else None}
    place = folder.path / FOLDER
    known = [rank == 0 and _is_whole(place, identity)]
    distributed.broadcast_object_list(known)
    if not known[0]:
        started = time.monotonic()
        table = _score(engine, recipe, folder, rank, device)
        if table is not None:
            keys, first = np.unique(table[0], return_index=True)
            _write(place, keys, table[1][first], identity)
            folder.event("note", message=f"the reference: log-probabilities of {len(keys):,} pairs, {time.monotonic() - started:.1f} s")
        distributed.barrier()
    with np.load(place / TABLE) as kept:
        engine.module.reference = Reference(torch.from_numpy(kept["keys"]).to(device), torch.from_numpy(kept["log_probs"]).to(device))


def _model_hash(recipe: "Recipe", rank: int) -> str:
    """Rank 0 reads the files for all."""
    from distlm.model.adapter import base_hash

    return base_hash(str(recipe.spec.model.source)) if rank == 0 else ""


def _train(recipe: "Recipe") -> list[Windows]:
    return [Windows(corpus) for corpus in recipe.corpora]


def _sources(recipe: "Recipe") -> "list[tuple[Windows, NDArray[np.int64], NDArray[np.int64]]]":
    """(windows, shard, row) of all pairs that the run trains or is evaluated on."""
    trained = _train(recipe)
    if recipe.mix is None:
        [windows] = trained
        places = windows.order(recipe.spec.seed).locate(np.arange(min(len(windows), recipe.num_samples)))
        found = [(windows, *places)]
    else:
        found = [(windows, *windows.first(len(windows))) for windows in trained]
    return found + [(windows, *windows.first(part.windows)) for part in recipe.val for windows in [Windows(part.corpus, "val")]]


def _score(engine: Any, recipe: "Recipe", folder: RunFolder, rank: int,
           device: "torch.device") -> "tuple[NDArray[np.int64], NDArray[np.float32]] | None":
    """(keys, log-probabilities of both answers) of all pairs on rank 0, None elsewhere. Each rank takes every world-th micro-batch; rank 0
    notes how far they are."""
    import torch
    from torch import distributed

    size, world, sources = recipe.micro_sequences, recipe.world, _sources(recipe)
    parts = [(i, start) for i, (_, shards, _) in enumerate(sources) for start in range(0, len(shards), size)]
    keys, values = [np.zeros(0, np.int64)], [np.zeros((0, 2), np.float32)]
    total, noted = sum(len(shards) for _, shards, _ in sources), -math.inf
    engine.eval()
    with torch.no_grad():
        for turn in range(-(-len(parts) // world)):
            if rank == 0 and time.monotonic() >= noted + NOTE_S:
                folder.event("note", message=f"the reference: {min(turn * world * size, total):,} of {total:,} pairs")
                noted = time.monotonic()
            mine = turn * world + rank
            source, start = parts[min(mine, len(parts) - 1)]           # who has run out takes part: ZeRO-3 gathers in each pass
            windows, shards, rows = sources[source]
            here = slice(start, start + size)
            tokens, marks = windows.read(shards[here], rows[here]), windows.marks(shards[here], rows[here])
            batch = make_batch(np.stack([tokens, marks], 1).astype(np.int64), recipe)
            engine(*batch.inputs(device))
            if mine < len(parts):
                keys.append(batch.keys.numpy())
                values.append(engine.module.observed[:, :2].float().cpu().numpy())
    engine.train()
    mine_all = (np.concatenate(keys), np.concatenate(values))
    everyone: list[Any] | None = [None] * world if rank == 0 else None
    distributed.gather_object(mine_all, everyone)
    return None if everyone is None else (np.concatenate([one[0] for one in everyone]), np.concatenate([one[1] for one in everyone]))


def _write(place: Path, keys: "NDArray[np.int64]", log_probs: "NDArray[np.float32]", identity: dict[str, Any]) -> None:
    """The table, then what says that it is whole and of what it is."""
    place.mkdir(exist_ok=True)
    (place / RECORD).unlink(missing_ok=True)
    content = io.BytesIO()
    np.savez(content, keys=keys, log_probs=log_probs)
    write_atomic(place / TABLE, content.getvalue())
    write_json(place / RECORD, {**identity, "pairs": len(keys), "xxh3": xxhash.xxh3_128_hexdigest(content.getvalue())})


def _is_whole(place: Path, identity: dict[str, Any]) -> bool:
    """Whether the table is there, unchanged, and of the same pairs and the same model."""
    if not (place / RECORD).is_file() or not (place / TABLE).is_file():
        return False
    try:
        record = read_json(place / RECORD)
    except StorageError:                                   # cut short: it is made anew
        return False
    return {key: record.get(key) for key in identity} == identity and \
        record.get("xxh3") == xxhash.xxh3_128_hexdigest((place / TABLE).read_bytes())
