"""Sums over tokens, and the measures that follow from them: loss, perplexity, bits per byte, accuracy, calibration.

    sums = tally(logprobs, best, confidences, targets, bytes, groups, num_groups=2, bins=15)       # of a batch; they add up
    measures(sums.sum(0))["loss"]                                                                  # nats per token
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Sums = NDArray[np.float64]
"""[groups, 4 + 3 * bins]: tokens, nats, hits and bytes; then tokens, confidence and hits of each bin. A hit is a token that was the
likeliest."""
FACTS = 4
BINS = 15
"""Bins of equal width into which confidences go, as Guo et al. 2017 have it."""


def tally(logprobs: NDArray[np.floating[Any]], best: NDArray[np.int64], confidences: NDArray[np.floating[Any]],
          targets: NDArray[np.int64], sizes: NDArray[np.float64], groups: NDArray[np.int64], num_groups: int, bins: int) -> Sums:
    """The sums of tokens that give loss, all [tokens], in their order. `sizes`: bytes of each target; `groups`: which row each adds to.

    A confidence c goes to the bin m of those in which it is in ((m-1)/bins, m/bins] (Guo et al. 2017, section 2)."""
    sure = confidences.astype(np.float64)
    facts = [np.ones(len(targets)), -logprobs.astype(np.float64), best == targets, sizes]
    sums = np.stack([np.bincount(groups, fact, num_groups) for fact in facts], 1)
    places = groups * bins + np.clip(np.ceil(sure * bins).astype(np.int64) - 1, 0, bins - 1)
    binned = [np.bincount(places, fact, num_groups * bins).reshape(num_groups, bins) for fact in (facts[0], sure, facts[2])]
    return np.concatenate([sums, np.stack(binned, 2).reshape(num_groups, 3 * bins)], 1)


def mixed(parts: list[NDArray[np.float64]], shares: list[float]) -> NDArray[np.float64]:
    """A row of sums of which every token of a part, a row, counts so much that the part has its share. Each part has tokens."""
    return np.asarray(sum(share * part / part[0] for part, share in zip(parts, shares, strict=True)))


def measures(sums: NDArray[np.float64]) -> dict[str, Any]:
    """What a row of sums comes to, for JSON: None is a number that there is not. Perplexity is exp(loss); accuracy the share of tokens that
    were the likeliest; reliability has the bins of the calibration error."""
    tokens, nats, hits, size = sums[:FACTS].tolist()
    if not tokens:
        return {"tokens": 0, "loss": None, "perplexity": None, "bits_per_byte": None, "accuracy": None, "ece": None,
                "reliability": []}
    loss = nats / tokens
    return {"tokens": int(tokens), "loss": loss, "perplexity": math.exp(loss) if loss < 700 else None,
            "bits_per_byte": nats / math.log(2) / size if size else None, "accuracy": hits / tokens, "ece": calibration_error(sums),
            "reliability": reliability(sums)}


def calibration_error(sums: NDArray[np.float64]) -> float:
    """The expected calibration error: sum over bins of |bin| / n * |accuracy(bin) - confidence(bin)| (Guo et al. 2017, equation 3)."""
    _, sure, hits = sums[FACTS:].reshape(-1, 3).T
    return float(np.abs(hits - sure).sum() / sums[0])      # |bin| falls out


def reliability(sums: NDArray[np.float64], unit: str = "tokens") -> list[dict[str, Any]]:
    """Of each bin its bounds, how many of the unit are in it, and their mean confidence and accuracy, None where it is empty."""
    table, bins = [], sums[FACTS:].reshape(-1, 3)
    for i, (count, sure, hits) in enumerate(bins.tolist()):
        table.append({"above": i / len(bins), "up_to": (i + 1) / len(bins), unit: int(count),
                      "confidence": sure / count if count else None, "accuracy": hits / count if count else None})
    return table
