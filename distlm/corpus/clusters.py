"""Samples of what was found several times, for `duplicates.jsonl` and the report: the largest clusters of each step, the first members of
each. They are bounded, and chosen by the documents alone."""

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from distlm.corpus.fuzzy import Dropped

MAX_CLUSTERS = 5
MAX_MEMBERS = 8
EXCERPT_CHARS = 400
LEAD_CHARS = 80
"""Shown before the first difference of two texts."""


@dataclass(frozen=True)
class Cluster:
    """Documents that are alike."""

    documents: int
    members: list[tuple[int, int]]
    """(partition, row) of the one that is kept, and of the first of the others."""
    similarities: list[float]
    """Of the others, each to the one of the cluster that it is most like."""


def largest(dropped: Sequence[Dropped]) -> list[Cluster]:
    """The largest clusters, by what goes from each partition; of equal size, those of the first keepers."""
    numbers = np.concatenate([np.zeros(0, np.int64), *(one.rows + (i << 32) for i, one in enumerate(dropped))])
    keepers = np.concatenate([np.zeros(0, np.int64), *(one.keeper_rows + (one.keeper_partitions << 32) for one in dropped)])
    similarities = np.concatenate([np.zeros(0), *(one.similarities for one in dropped)])
    kept, counts = np.unique(keepers, return_counts=True)
    found = []
    for i in np.argsort(-counts, kind="stable")[:MAX_CLUSTERS]:
        others = np.flatnonzero(keepers == kept[i])[:MAX_MEMBERS - 1]
        members = [(number >> 32, number & 0xFFFFFFFF) for number in [int(kept[i]), *numbers[others].tolist()]]
        found.append(Cluster(int(counts[i]) + 1, members, np.round(similarities[others], 4).tolist()))
    return found


def excerpts(first: str, second: str) -> list[str]:
    """Of two texts, what stands about their first difference; of equal ones the beginning, once."""
    if first == second:
        return [excerpt(first)]
    same = bisect.bisect_left(range(min(len(first), len(second))), True, key=lambda at: first[:at + 1] != second[:at + 1])
    begin = max(0, same - LEAD_CHARS)
    return [excerpt(first, begin), excerpt(second, begin)]


def excerpt(text: str, begin: int = 0) -> str:
    end = begin + EXCERPT_CHARS
    return ("…" if begin else "") + text[begin:end] + ("…" if end < len(text) else "")
