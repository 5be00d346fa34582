"""A corpus as a stream of training steps that continues exactly at any sample.

The driver builds a Ray dataset of plan blocks (corpus/blocks.py), one per (chunk of steps, rank), in order; a task reads the rows of
each; `streaming_split` deals block j to rank j mod world. Every row carries its step and slot, and the worker checks both:

    for tokens in ordered_steps(batches, plan, rank, first_step=120):  # worker: int64[share, context + 1]

A plan that is `marked` has marks beside the tokens: where documents begin, and what gives no loss. One that is `labelled` has labels
behind them.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

from distlm.corpus import listing
from distlm.corpus.folds import SPLITS, Folds
from distlm.corpus.manifest import Manifest, read_manifest
from distlm.corpus.mix import Mix
from distlm.corpus.order import Order
from distlm.errors import CorpusError
from distlm.spec.fold import Fold

BLOCK_BYTES = 8 << 20
MAX_CHUNK_STEPS = 32
START, NO_LOSS = 1, 2
"""Bits of a token's mark: a document, or a piece of one, begins with it; to predict it gives no loss."""


@dataclass(frozen=True)
class BatchSizes:
    """How many samples make a step: those of the warm-up's stages, then always the same."""

    full: int
    """Sequences of a step after the warm-up."""
    stages: tuple[tuple[int, int], ...] = ()
    """(sequences of a step, steps of that size), one after the other."""

    def of(self, step: int) -> int:
        """Sequences of a step."""
        for size, steps in self.stages:
            if step < steps:
                return size
            step -= steps
        return self.full

    def before(self, step: int) -> int:
        """Sequences of all steps before it: the number of its first sample."""
        samples = 0
        for size, steps in self.stages:
            samples, step = samples + size * min(step, steps), max(0, step - steps)
        return samples + step * self.full

    def steps(self, samples: float) -> int:
        """The fewest steps that take so many samples."""
        done = 0
        for size, steps in self.stages:
            if samples <= size * steps:
                return done + math.ceil(samples / size)
            samples, done = samples - size * steps, done + steps
        return done + math.ceil(samples / self.full)


@dataclass(frozen=True)
class Plan:
    """Which samples make which step: they are taken one after the other, and step s has as many as `sizes` says, which are
    `global_sequences` after the warm-up."""

    corpus: str
    """The corpus folder; of a mixture, that of its first corpus."""
    global_sequences: int
    world: int
    num_steps: int
    seed: int
    mix: Mix | None = None
    """Which corpus gives which sample, where there are several."""
    marked: bool = False
    """Whether training needs marks beside the tokens."""
    group: int = 1
    """So many neighbouring ranks read the same samples."""
    warmup: tuple[tuple[int, int], ...] = ()
    """(sequences of a step, steps of that size) of the steps that are smaller, at the beginning."""
    labelled: bool = False
    """Whether training needs the labels of documents."""
    fold: Fold | None = None
    """Which documents are held out, where not the corpus's own split is."""

    @property
    def sizes(self) -> BatchSizes:
        return BatchSizes(self.global_sequences, self.warmup)

    @property
    def piece(self) -> int:
        """Sequences of a rank that are read at once: its share of a step, or what divides its share of every step."""
        return math.gcd(self.global_sequences, *(size for size, _ in self.warmup)) * self.group // self.world

    def share(self, step: int) -> int:
        """Sequences of a rank in a step."""
        return self.sizes.of(step) * self.group // self.world

    def samples(self, step: int, rank: int) -> NDArray[np.int64]:
        """int64[share]: the global sample numbers that `rank` trains on in `step`."""
        share = self.share(step)
        first = self.sizes.before(step) + rank // self.group * share
        return np.arange(first, first + share, dtype=np.int64)

    def chunk_steps(self, context: int) -> int:
        """Steps of a block: a few megabytes of tokens."""
        share = self.global_sequences * self.group // self.world
        return max(1, min(MAX_CHUNK_STEPS, BLOCK_BYTES // (share * (context + 1) * 4)))


class Windows:
    """The windows of one split, memory-mapped. A shard's size and hash are checked when it is first opened."""

    def __init__(self, corpus: str | Path, split: str = "train", fold: Fold | None = None) -> None:
        """With `fold` its train or val, out of the shards of both splits."""
        self.folder, self.split = Path(corpus), split
        self.manifest: Manifest = read_manifest(self.folder)
        sources = [split] if fold is None else SPLITS
        self.shards = tuple(shard for one in sources for shard in self.manifest.splits[one].shards)
        self._open: dict[int, pa.RecordBatch] = {}
        self._before = [0]
        self._kept: list[NDArray[np.int64]] | None = None
        """The rows of each shard that are a fold's; None for all."""
        if fold is not None:
            folds, of = Folds(self.folder, fold), [one for one in sources for _ in self.manifest.splits[one].shards]
            self._kept = [folds.rows(split, self._shard(i), one) for i, one in enumerate(of)]
        self.sizes = tuple(shard.windows for shard in self.shards) if self._kept is None else tuple(map(len, self._kept))
        """The windows of each shard."""

    def order(self, seed: int) -> Order:
        return Order(self.sizes, seed)

    def __len__(self) -> int:
        return sum(self.sizes)

    def _rows(self, shards: NDArray[np.int64], rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where in their files the windows at (shard, row) are."""
        if self._kept is None:
            return rows
        found = np.empty_like(rows)
        for shard in np.unique(shards):
            here = shards == shard
            found[here] = self._kept[shard][rows[here]]
        return found

    def read(self, shards: NDArray[np.int64], rows: NDArray[np.int64]) -> NDArray[Any]:
        """uint16 or uint32 [n, context + 1]: the windows at (shard, row). Raises CorpusError for a damaged shard."""
        tokens, rows = np.empty((len(rows), self.manifest.context + 1), dtype=self.manifest.dtype), self._rows(shards, rows)
        for shard in np.unique(shards):
            here = shards == shard
            tokens[here] = self._shard(int(shard))["tokens"].flatten().to_numpy().reshape(-1, tokens.shape[1])[rows[here]]
        return tokens

    def marks(self, shards: NDArray[np.int64], rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        """uint8[n, context + 1]: the marks of the windows at (shard, row)."""
        marks, rows = np.empty((len(rows), self.manifest.context + 1), dtype=np.uint8), self._rows(shards, rows)
        for shard in np.unique(shards):
            here = shards == shard
            marks[here] = _marks(self._shard(int(shard)), rows[here], marks.shape[1])
        return marks

    def labels(self, shards: NDArray[np.int64], rows: NDArray[np.int64]) -> NDArray[np.int32]:
        """int32[n, k]: the labels of the windows at (shard, row). The number of the one that each has, k = 1; where there may be any
        number, k of them with 1 for each that it has, else 0."""
        names, multiple, rows = self.manifest.labels, self.manifest.multiple_labels, self._rows(shards, rows)
        labels = np.zeros((len(rows), len(names) if multiple else 1), np.int32)
        for shard in np.unique(shards):
            here = np.flatnonzero(shards == shard)
            found = self._shard(int(shard))["labels"].take(pa.array(rows[here]))
            if multiple:
                labels[np.repeat(here, np.diff(found.offsets.to_numpy())), found.flatten().to_numpy()] = 1
            else:
                labels[here, 0] = found.flatten().to_numpy()
        return labels

    def documents(self, shards: NDArray[np.int64], rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """int64[n, context + 1]: the number in its split of the document that each token of the windows at (shard, row) is of; of padding,
        that of the document before it."""
        numbers, rows = np.empty((len(rows), self.manifest.context + 1), dtype=np.int64), self._rows(shards, rows)
        for shard in np.unique(shards):
            here = shards == shard
            numbers[here] = _documents(self._shard(int(shard)), rows[here], numbers.shape[1], self._documents_before(int(shard)))
        return numbers

    def _documents_before(self, shard: int) -> int:
        """How many documents of the split begin before a shard, but for those that begin with its first token; none where shards tell the
        numbers of their documents."""
        if self.manifest.best_fit:
            return 0
        while len(self._before) <= shard:
            starts = self._shard(len(self._before) - 1)["starts"].values.to_numpy()
            self._before.append(self._before[-1] + int((starts < self.manifest.context).sum()))
        return self._before[shard]

    def sources_of(self, documents: NDArray[np.int64]) -> NDArray[np.int32]:
        """The place among the manifest's sources of that of each document, by its number in the split. Raises CorpusError where the list
        of documents is of another corpus, InputError where there is none."""
        if documents.max(initial=-1) >= len(self._origins) or self._origins.max(initial=-1) >= len(self.manifest.sources):
            raise CorpusError("it lists other documents than the windows hold", where=str(self.folder / listing.FILE),
                              remedy="the file is of another corpus: prepare it again")
        return self._origins[documents]

    @cached_property
    def _origins(self) -> NDArray[np.int32]:
        return listing.read_origins(self.folder, self.split)

    def bytes_of(self, tokens: NDArray[Any]) -> NDArray[np.float64]:
        """The UTF-8 bytes that each token stands for; where the tokenizer does not tell, what one of the split does on average."""
        split = self.manifest.splits[self.split]
        return np.full(tokens.shape, split.bytes / split.tokens) if self._lengths is None else self._lengths[tokens].astype(np.float64)

    @cached_property
    def _lengths(self) -> NDArray[np.int64] | None:
        from distlm.corpus.tokenizer import token_bytes  # imports tokenizers, which reading need not

        return token_bytes(self.manifest.tokenizer)

    def first(self, count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(shard, row), both int64[n], of the first `count` windows in file order."""
        sizes = np.asarray(self.sizes, dtype=np.int64)
        shards = np.repeat(np.arange(len(sizes)), sizes)[:count]
        rows = np.concatenate([np.arange(n) for n in sizes] or [np.arange(0)])[:count]
        return shards, rows.astype(np.int64)

    def head(self, count: int) -> NDArray[Any]:
        """The first `count` windows in file order."""
        return self.read(*self.first(count))

    def _shard(self, index: int) -> pa.RecordBatch:
        if index not in self._open:
            shard = self.shards[index]
            path = self.folder / shard.file
            try:
                source = pa.memory_map(str(path))
                buffer = source.read_buffer()
            except (OSError, pa.ArrowInvalid) as error:
                raise CorpusError(f"cannot be read: {error}", where=str(path), remedy="prepare the corpus again") from None
            if len(buffer) != shard.bytes or xxhash.xxh3_64_hexdigest(memoryview(buffer)) != shard.xxh3:
                raise CorpusError("the shard is damaged: its bytes are not those that the manifest records", where=str(path),
                                  remedy="restore it from a copy, or prepare the corpus again")
            self._open[index] = pa.ipc.open_file(pa.BufferReader(buffer)).get_batch(0)
        return self._open[index]


def silent(marks: NDArray[Any], mask_documents: bool) -> NDArray[np.bool_]:
    """Which tokens give no loss: where documents are masked their first ones too, as nothing of their own stands before them."""
    return marks & (NO_LOSS | START if mask_documents else NO_LOSS) > 0


def _marks(batch: pa.RecordBatch, rows: NDArray[np.int64], size: int) -> NDArray[np.uint8]:
    """uint8[len(rows), size], from the columns of a shard that `manifest.py` describes."""
    edges, starts = batch["starts"].offsets.to_numpy(), batch["starts"].values.to_numpy()
    counts = edges[rows + 1] - edges[rows]
    entries = np.arange(counts.sum()) + np.repeat(edges[rows] - (np.cumsum(counts) - counts), counts)
    lines, places = np.repeat(np.arange(len(rows)), counts), starts[entries]
    marks = np.zeros((len(rows), size), dtype=np.uint8)
    marks[lines, places] = START
    if "filled" in batch.schema.names:                     # packed by best-fit
        carried = batch["offsets"].values.to_numpy()[entries] > 0
        marks[lines[carried], places[carried]] |= NO_LOSS  # the piece before has predicted it
        marks[np.arange(size) >= batch["filled"].to_numpy()[rows, None]] |= NO_LOSS
    if "loss" in batch.schema.names:                       # conversations
        gives = batch["loss"].take(pa.array(rows)).flatten().to_numpy(zero_copy_only=False).reshape(-1, size)
        marks[~gives] |= NO_LOSS
    return marks


def _documents(batch: pa.RecordBatch, rows: NDArray[np.int64], size: int, before: int) -> NDArray[np.int64]:
    """int64[len(rows), size], from the columns of a shard before which `before` documents begin. One that begins with the last token of a
    window begins with the first one of the next too."""
    edges, starts = batch["starts"].offsets.to_numpy(), batch["starts"].values.to_numpy()
    begun = np.concatenate([[0], np.cumsum(starts < size - 1)])[edges]         # in the windows before
    numbers = np.empty((len(rows), size), dtype=np.int64)
    for line, row in enumerate(rows.tolist()):
        here = slice(int(edges[row]), int(edges[row + 1]))
        nth = np.searchsorted(starts[here], np.arange(size), "right")
        if "documents" in batch.schema.names:              # packed by best-fit
            numbers[line] = batch["documents"].values.to_numpy()[here][nth - 1]
        else:
            numbers[line] = before + begun[row] + nth - 1
    return numbers


@lru_cache(maxsize=256)
def _windows(corpus: str, fold: Fold | None = None) -> Windows:
    return Windows(corpus, fold=fold)


def read_block(plan: Plan, steps: range, rank: int) -> dict[str, NDArray[Any]]:
    """The rows of a block: tokens [len(steps) * share, context + 1], their marks or labels where the plan has them, their step and their
    slot."""
    samples = np.concatenate([plan.samples(step, rank) for step in steps])
    return {"tokens": read_samples(plan, samples), **({"marks": read_marks(plan, samples)} if plan.marked else {}),
            **({"labels": _read(plan, samples, Windows.labels)} if plan.labelled else {}),
            "step": np.repeat(np.asarray(steps, dtype=np.int64), [plan.share(step) for step in steps]),
            "slot": np.full(len(samples), rank, dtype=np.int32)}


def read_samples(plan: Plan, samples: NDArray[np.int64]) -> NDArray[Any]:
    """uint16 or uint32 [n, context + 1]: the windows of the samples, int64[n]. A corpus of a mixture gives its own samples in the order
    in which it would give them alone."""
    return _read(plan, samples, Windows.read)


def read_marks(plan: Plan, samples: NDArray[np.int64]) -> NDArray[np.uint8]:
    """uint8[n, context + 1]: the marks of the same windows."""
    return _read(plan, samples, Windows.marks)


def _read(plan: Plan, samples: NDArray[np.int64], read: Callable[..., NDArray[Any]]) -> NDArray[Any]:
    windows = _windows(plan.corpus, plan.fold)
    if plan.mix is None:
        return read(windows, *windows.order(plan.seed).locate(samples))
    members, own = plan.mix.assign(samples)
    none = np.zeros(0, np.int64)
    empty = read(windows, none, none)
    found = np.empty((len(samples), *empty.shape[1:]), empty.dtype)
    for member in np.unique(members):
        here, windows = members == member, _windows(plan.mix.corpora[member])
        found[here] = read(windows, *windows.order(plan.seed).locate(own[here]))
    return found


def joined(tokens: NDArray[Any], marks: NDArray[Any] | None = None, labels: NDArray[Any] | None = None) -> NDArray[Any]:
    """[n, context + 1]: tokens; with marks [n, 2, context + 1], and with labels [n, context + 1 + k]."""
    if labels is not None:
        return np.concatenate([tokens.astype(np.int64), labels], 1)
    return tokens if marks is None else np.stack([tokens, marks], 1)


def local_steps(plan: Plan, rank: int, first_step: int) -> Iterator[dict[str, NDArray[Any]]]:
    """The same batches without Ray, one per step, for a rank that runs as a plain process."""
    for step in range(first_step, plan.num_steps):
        yield read_block(plan, range(step, step + 1), rank)


def ordered_steps(batches: Iterable[dict[str, NDArray[Any]]], plan: Plan, rank: int, first_step: int) -> Iterator[NDArray[np.int64]]:
    """int64[share, context + 1] for each step; of a marked plan int64[share, 2, context + 1], tokens and marks, and of a labelled one
    int64[share, context + 1 + k], tokens and labels. `batches` have `piece` rows, or those of a step. Raises CorpusError where a row is
    not the planned one."""
    expected, pieces = first_step, list[NDArray[Any]]()
    for batch in batches:
        rows, wanted = len(batch["tokens"]), plan.share(expected) - sum(map(len, pieces))
        if not 0 < rows <= wanted or (rows < wanted and rows % plan.piece) or (batch["step"] != expected).any() or (
                batch["slot"] != rank).any():
            raise CorpusError(f"the stream is out of order: rank {rank} expected step {expected}, {wanted} rows, and got {rows} rows of "
                              f"steps {np.unique(batch['step'])}, slots {np.unique(batch['slot'])}", cause="internal")
        pieces.append(joined(batch["tokens"], batch.get("marks"), batch.get("labels")))
        if rows == wanted:
            yield np.concatenate(pieces).astype(np.int64)
            expected, pieces = expected + 1, []
    if expected != plan.num_steps:
        raise CorpusError(f"the stream ended before step {expected} of {plan.num_steps}", cause="internal")
