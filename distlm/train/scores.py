"""Scores of a classifier, as scikit-learn defines them: classes that are never predicted or never there count as 0 in a macro mean
(zero_division=0), and are left out of the mean of areas under the ROC curve, which they have none of.

    single_label(truth, logits, names)                     # {"accuracy": 0.91, "f1_macro": 0.88, ..., "confusion": {...}}
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distlm.train.totals import calibration_error, reliability, tally

SCORES = ("accuracy", "precision_macro", "recall_macro", "f1_macro", "precision_micro", "recall_micro", "f1_micro", "roc_auc")
"""What is measured, but for what is confused with what; `roc_auc` alone may not be there."""
LANGUAGE = ("loss", "perplexity", "bits_per_byte", "accuracy", "ece", "tokens")
LABELS = ("loss", *SCORES, "ece", "documents")
"""What an evaluation of a language model comes to, and of a classifier."""
MAX_CONFUSION = 64
"""A matrix of more classes is not made: in its place stand the MOST_CONFUSED."""
MOST_CONFUSED = 40

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def scores_of(observed: NDArray[np.float32], names: Sequence[str], multiple: bool) -> dict[str, Any]:
    """observed: float32[n, k + classes], each sample's labels and logits, as model.loss.ClassifierLoss leaves them."""
    given, logits = observed[:, :-len(names)], observed[:, -len(names):]
    return multi_label(given > 0, logits, names) if multiple else single_label(given[:, 0].astype(np.int64), logits, names)


def single_label(truth: Ints, logits: NDArray[Any], names: Sequence[str]) -> dict[str, Any]:
    """truth: int64[n], logits: float[n, classes]. The first of the largest logits is the class that is predicted. The areas are those of
    one class against the rest, by its probability. Raises ValueError for a logit that is not a number, which predicts nothing."""
    check_numbers(logits)
    predicted = logits.argmax(1)
    hits, found, given = (np.bincount(one, minlength=len(names)) for one in (truth[truth == predicted], predicted, truth))
    scores = softmax(logits)
    areas = [roc_auc(truth == i, scores[:, i]) for i in range(len(names))]
    return {"accuracy": float(hits.sum() / max(1, len(truth))), **averages(hits, found, given), **mean_area(areas),
            **({"confusion": {"labels": [*names], "counts": confusion(truth, predicted, len(names)).tolist()}}
               if len(names) <= MAX_CONFUSION else {"confused": confused_pairs(truth, predicted, given, names)})}


def multi_label(truth: NDArray[np.bool_], logits: NDArray[Any], names: Sequence[str]) -> dict[str, Any]:
    """truth: bool[n, labels], logits: float[n, labels]. A label is predicted where its probability is above a half. The accuracy is that
    of all labels of a sample together. Raises ValueError for a logit that is not a number."""
    check_numbers(logits)
    predicted = logits > 0
    hits, found, given = ((truth & predicted).sum(0), predicted.sum(0), truth.sum(0))
    areas = [roc_auc(truth[:, i], logits[:, i].astype(np.float64)) for i in range(len(names))]
    pairs = np.stack([len(truth) - found - given + hits, found - hits, given - hits, hits], 1)
    return {"accuracy": float((truth == predicted).all(1).mean()), **averages(hits, found, given), **mean_area(areas),
            **({"confusion": {"labels": [*names], "counts": pairs.reshape(-1, 2, 2).tolist()}} if len(names) <= MAX_CONFUSION else
               {"confused": confused_labels(given - hits, found - hits, given, names)})}


def check_numbers(logits: NDArray[Any]) -> None:
    """Raises ValueError where a logit is not a number: the largest of a row that has one would be the first such."""
    if wrong := int(np.isnan(logits).any(1).sum()):
        raise ValueError(f"the logits of {wrong:,} of {len(logits):,} samples are not numbers")


def confusion(truth: Ints, predicted: Ints, classes: int) -> Ints:
    """int64[classes, classes]: how many samples of each class (rows) were taken for each (columns)."""
    return np.bincount(truth * classes + predicted, minlength=classes * classes).reshape(classes, classes)


def confused_pairs(truth: Ints, predicted: Ints, given: Ints, names: Sequence[str]) -> dict[str, Any]:
    """The pairs of classes whose samples were most often taken one for the other, the most frequent first, with all `errors` and the
    `distinct` pairs that there are. given: int64[classes], the samples of each. No more is held than the samples have."""
    wrong = truth != predicted
    pairs, times = np.unique(truth[wrong] * len(names) + predicted[wrong], return_counts=True)
    first = np.lexsort((pairs, -times))[:MOST_CONFUSED]
    return {"errors": int(wrong.sum()), "distinct": len(pairs), "pairs": [
        {"label": names[i], "taken_for": names[j], "count": int(count), "documents": int(given[i])}
        for (i, j), count in zip((divmod(int(pair), len(names)) for pair in pairs[first]), times[first], strict=True)]}


def confused_labels(missed: Ints, wrongly: Ints, given: Ints, names: Sequence[str]) -> dict[str, Any]:
    """The labels with the most errors, those first, with all `errors` and the `distinct` labels that have any. missed, wrongly, given:
    int64[labels], the samples that lack the label, that have it and should not, and that should have it."""
    errors = missed + wrongly
    first = [int(i) for i in np.argsort(-errors, kind="stable")[:MOST_CONFUSED] if errors[i]]
    return {"errors": int(errors.sum()), "distinct": int((errors > 0).sum()), "labels": [
        {"label": names[i], "missed": int(missed[i]), "wrongly": int(wrongly[i]), "documents": int(given[i])} for i in first]}


def averages(hits: Ints, found: Ints, given: Ints) -> dict[str, float]:
    """Precision, recall and F1, as macro mean over classes and micro over all decisions. hits, found, given: int64[classes], the samples
    of each class that were taken for it, all that were taken for it, and all of it."""
    result = {}
    for kind, (hit, took, had) in (("macro", (hits, found, given)), ("micro", (hits.sum(), found.sum(), given.sum()))):
        for name, part, whole in (("precision", hit, took), ("recall", hit, had), ("f1", 2 * hit, took + had)):
            ratio = np.divide(part, whole, out=np.zeros(np.shape(part), np.float64), where=np.asarray(whole) > 0)
            result[f"{name}_{kind}"] = float(np.mean(ratio))
    return result


def roc_auc(truth: NDArray[np.bool_], scores: Floats) -> float | None:
    """The probability that a positive sample has the higher score than a negative one, ties for a half: Mann and Whitney's U over the
    number of pairs (Hanley and McNeil 1982). None where one of the two is absent."""
    positives = int(truth.sum())
    negatives = len(truth) - positives
    if not positives or not negatives:
        return None
    _, place, size = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = np.cumsum(size) - (size - 1) / 2               # the mean rank of equal scores, from 1
    return float((ranks[place][truth].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def mean_area(areas: list[float | None]) -> dict[str, float]:
    """Without the classes that have none; nothing where all have none."""
    known = [area for area in areas if area is not None]
    return {"roc_auc": float(np.mean(known))} if known else {}


def calibration(truth: NDArray[np.float32], logits: NDArray[np.float32], bins: int) -> dict[str, Any]:
    """Of the likeliest label of each document. truth: [documents], logits: [documents, names]."""
    blank = np.zeros(len(truth))
    sums = tally(blank, logits.argmax(1), softmax(logits).max(1), truth.astype(np.int64), blank, blank.astype(np.int64), 1, bins)[0]
    return {"ece": calibration_error(sums), "reliability": reliability(sums, "documents")}


def softmax(logits: NDArray[Any]) -> Floats:
    """float64[n, classes], rows that add up to 1."""
    shifted = np.exp(logits.astype(np.float64) - logits.max(1, keepdims=True, initial=-np.inf))
    return np.asarray(shifted / shifted.sum(1, keepdims=True))
