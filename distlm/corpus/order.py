"""The order of training: a pure function of (seed, global sample number), the same at any number of workers.

An epoch permutes the shards, and the windows inside each shard: reads stay within one file for a while, which object
stores and page caches like, and nothing has to be indexed at start. Documents were shuffled when the corpus was made.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Order:
    """Maps global sample numbers to (shard, row). `sizes` are the windows of each shard."""

    sizes: tuple[int, ...]
    seed: int

    @property
    def num_windows(self) -> int:
        return sum(self.sizes)

    def locate(self, samples: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(shard, row), both int64[n], of the samples, int64[n]. Sample n lies in epoch n // num_windows."""
        epochs, places = np.divmod(samples, self.num_windows)
        shards, rows = np.empty_like(samples), np.empty_like(samples)
        for epoch in np.unique(epochs):
            inside = epochs == epoch
            order, starts = _shard_order(self.sizes, self.seed, int(epoch))
            slot = np.searchsorted(starts, places[inside], side="right") - 1
            shard, offset = order[slot], places[inside] - starts[slot]
            row = np.empty_like(offset)
            for one in np.unique(shard):
                here = shard == one
                row[here] = permutation(self.sizes[one], self.seed, int(epoch), int(one) + 1)[offset[here]]
            shards[inside], rows[inside] = shard, row
        return shards, rows


@lru_cache(maxsize=64)
def _shard_order(sizes: tuple[int, ...], seed: int, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    order = permutation(len(sizes), seed, epoch, 0)
    starts = np.concatenate([[0], np.cumsum(np.asarray(sizes, dtype=np.int64)[order])[:-1]])
    return order, starts


@lru_cache(maxsize=256)
def permutation(size: int, seed: int, epoch: int, stream: int) -> NDArray[np.int64]:
    """int64[size]: positions sorted by a hash, so that it never changes with a library's version."""
    with np.errstate(over="ignore"):
        key = hash64(hash64(hash64(np.uint64(seed) + GOLDEN) + np.uint64(epoch)) + np.uint64(stream))
        return np.argsort(hash64(key + GOLDEN * np.arange(1, size + 1, dtype=np.uint64)), kind="stable").astype(np.int64)


def hash64(x: NDArray[np.uint64] | np.uint64) -> NDArray[np.uint64]:
    """splitmix64's finaliser (Steele, Lea and Flood 2014), a bijection of uint64. A new array; the rest is done in place."""
    x = np.asarray(x, dtype=np.uint64)
    y = x ^ (x >> np.uint64(30))
    y *= np.uint64(0xBF58476D1CE4E5B9)
    y ^= y >> np.uint64(27)
    y *= np.uint64(0x94D049BB133111EB)
    y ^= y >> np.uint64(31)
    return y
