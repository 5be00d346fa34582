"""A mixture of corpora as one order of samples: sample n is which corpus's, and its which; a pure function with random access.

    mix = Mix(("a", "b"), (0.7, 0.3), seed=0)
    corpora, own = mix.assign(np.arange(120, 180))         # the same whatever was asked before

Corpus i takes its sample k when its expected share of the samples so far, W_i(t), reaches k + p_i, with a phase p_i in [0, 1); samples
are numbered in the order in which they are taken (stride scheduling, Waldspurger and Weihl 1995). Sample n is taken at a time t that
differs from n by less than the number of corpora. So any samples in a row hold of each corpus what is expected within a few, and any
part of the order is found without what lies before it.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from distlm.corpus.order import GOLDEN, hash64

BLOCK = 4096
"""Samples that are assigned at once."""
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Mix:
    """Which corpus gives which sample. Weights are constant, then change linearly over the samples of `anneal`, then stay."""

    corpora: tuple[str, ...]
    """The corpus folders."""
    weights: tuple[float, ...]
    """Shares of the samples; they add up to 1."""
    seed: int
    final_weights: tuple[float, ...] = ()
    """Shares after annealing; they add up to 1. Empty without annealing."""
    anneal: tuple[int, int] = (0, 0)
    """The sample with which annealing begins, and the one with which it is done."""

    def assign(self, samples: Ints) -> tuple[Ints, Ints]:
        """(place of the corpus in the mixture, number among that corpus's own samples), both int64[n], of the samples, int64[n]."""
        blocks, places = np.divmod(samples, BLOCK)
        corpora, own = np.empty_like(samples), np.empty_like(samples)
        for block in np.unique(blocks):
            inside = blocks == block
            members, numbers, _ = _block(self, int(block))
            corpora[inside], own[inside] = members[places[inside]], numbers[places[inside]]
        return corpora, own

    def counts(self, samples: int) -> Ints:
        """int64[corpora]: how many of the first `samples` each corpus gives."""
        members, _, before = _block(self, samples // BLOCK)
        return before + np.bincount(members[:samples % BLOCK], minlength=len(self.corpora))

    def expected(self, corpus: int, time: Floats) -> Floats:
        """W_i: the integral of a corpus's weight over the first `time` samples."""
        first, last, begin, end = self._line(corpus)
        inside, after = np.clip(time - begin, 0, end - begin), np.maximum(time - end, 0)
        bend = (last - first) / (end - begin) if end > begin else 0.0
        return first * np.minimum(time, begin) + (first + bend * inside / 2) * inside + last * after

    def due(self, corpus: int, own: Ints) -> Floats:
        """When a corpus's own samples are taken: the time at which W_i is own + phase; infinity for what is never reached."""
        first, last, begin, end = self._line(corpus)
        share = own + self._phase(corpus)
        before, until = self.expected(corpus, np.asarray([begin, end], dtype=np.float64))
        with np.errstate(divide="ignore", invalid="ignore"):
            time = share / first if first else np.full(share.shape, float(begin))
            inside = share - before
            root = np.sqrt(np.maximum(first * first + 2 * (last - first) / max(end - begin, 1) * inside, 0))
            time = np.where(share > before, begin + 2 * inside / (first + root), time)
            return np.where(share > until, end + (share - until) / last if last else np.inf, time)

    def taken(self, corpus: int, time: float) -> int:
        """How many samples of a corpus are due before `time`. Compared with the times themselves, so that rounding cannot disagree."""
        near = int(self.expected(corpus, np.asarray(time)) - self._phase(corpus))
        low = max(near - 2, 0)
        return low + int((self.due(corpus, np.arange(low, near + 4)) < time).sum())

    def _line(self, corpus: int) -> tuple[float, float, int, int]:
        """The weight before and after annealing, and the samples between which it changes."""
        return self.weights[corpus], (self.final_weights or self.weights)[corpus], *self.anneal

    def _phase(self, corpus: int) -> float:
        """In [0, 1): spread evenly over the corpora, so that equal weights take turns, from a start that the seed gives."""
        turns = hash64(np.asarray([self.seed], dtype=np.uint64)) + GOLDEN * np.asarray([corpus], dtype=np.uint64)
        return float(turns[0] >> np.uint64(11)) / 2 ** 53


@lru_cache(maxsize=64)
def _block(mix: Mix, block: int) -> tuple[Ints, Ints, Ints]:
    """Corpus and own number of a block's samples, both int64[BLOCK], and the samples of each corpus before it, int64[corpora]."""
    start, count = block * BLOCK, len(mix.corpora)
    margin = count + 1                                     # by time t, more than t - count and fewer than t + count samples are taken
    low: Ints = np.asarray([mix.taken(i, start - margin) for i in range(count)])
    high: Ints = np.asarray([mix.taken(i, start + BLOCK + margin) for i in range(count)])
    own = np.concatenate([np.arange(a, b) for a, b in zip(low, high, strict=True)])
    members: Ints = np.repeat(np.arange(count), high - low)
    times = np.concatenate([mix.due(i, np.arange(a, b)) for i, (a, b) in enumerate(zip(low, high, strict=True))])
    order = np.lexsort((members, times))
    skipped = start - int(low.sum())
    inside = order[skipped:skipped + BLOCK]
    assert skipped >= 0 and len(inside) == BLOCK
    return members[inside], own[inside], low + np.bincount(members[order[:skipped]], minlength=count)
