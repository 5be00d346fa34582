"""`objective: classify`: which labels a document has, by what a causal model has read at its last token, or an encoder, as its family
does, at its first.

The head is transformers' own: over a causal model one linear layer over the hidden state of a document's last token. Padding is then the
end token, so that the one behind a document is padding too, and whoever asks the export need not put it there. How an encoder is given a
document: `model/encoder.py`.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from distlm.corpus.folds import folded
from distlm.corpus.manifest import Manifest, read_manifest
from distlm.errors import SpecError
from distlm.model.build import Shape
from distlm.model.encoder import is_encoder, read_frame
from distlm.spec.train import TrainSpec
from distlm.train.objectives.metric import Metric, by_source
from distlm.train.scores import SCORES, calibration, scores_of
from distlm.train.totals import BINS

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from distlm.model.loss import ClassifierLoss
    from distlm.runs import RunFolder
    from distlm.train.batch import LabelledBatch
    from distlm.train.recipe import Recipe

MEANS: tuple[str, ...] = ()
BY_TOKEN = False
METRICS: Mapping[str, Metric] = {
    **{name: Metric("max") for name in SCORES}, "val_ece": Metric("min"), "val_loss": Metric("min", scaled_by=("class_weights",)),
    "loss": Metric("min", evaluated=False, scaled_by=("class_weights",))}


def check(spec: TrainSpec, manifests: list[Manifest]) -> None:
    """Raises SpecError where a corpus has no labels, or others than the first, and for a weight of a label that there is not."""
    first = manifests[0]
    for one in manifests:
        if not one.labels:
            raise SpecError(f"classify needs labels, and the documents of the corpus {one.name} have none", where="objective",
                            remedy="prepare it with labels, or leave objective out")
        if (one.labels, one.multiple_labels) != (first.labels, first.multiple_labels):
            raise SpecError(f"the labels of the corpus {one.name} are not those of {first.name}", where="corpus",
                            remedy="prepare them as one corpus of several sources")
    if isinstance(spec.class_weights, dict) and (unknown := [name for name in spec.class_weights if name not in first.labels]):
        from distlm.spec.load import nearest

        near = nearest(unknown[0], first.labels)
        raise SpecError(f"the corpus {first.name} has no label {unknown[0]!r}", where=f"class_weights.{unknown[0]}",
                        remedy=f"did you mean {near}?" if near else f"its labels are {', '.join(first.labels[:20])}")


def shape(manifest: Manifest) -> Shape:
    return Shape(manifest.vocab_size, manifest.context, manifest.eos_id, manifest.labels, manifest.multiple_labels,
                 read_frame(manifest.tokenizer))


def begin(engine: Any, recipe: "Recipe", folder: "RunFolder", rank: int, device: "torch.device") -> None:
    """There is nothing to be done."""


def make_batch(rows: NDArray[Any], recipe: "Recipe") -> "LabelledBatch":
    """rows: int64[n, context + 1 + k], as `corpus.stream.ordered_steps` yields them. The last token of a window is padding or an end."""
    import torch

    from distlm.train.batch import LabelledBatch

    context = recipe.shape.context
    tokens, labels = (torch.from_numpy(np.ascontiguousarray(array)) for array in (rows[:, :context], rows[:, context + 1:]))
    return LabelledBatch(tokens, labels, recipe.shape.eos_id)


def module(model: "PreTrainedModel", recipe: "Recipe") -> "ClassifierLoss":
    import torch

    from distlm.model.loss import ClassifierLoss

    weights, shape = class_weights(recipe), recipe.shape
    return ClassifierLoss(model, shape.multiple_labels, None if weights is None else torch.from_numpy(weights),
                          shape.frame if is_encoder(model.config) else None)


def class_weights(recipe: "Recipe") -> NDArray[np.float32] | None:
    """float32[labels]: what the loss of each label is multiplied by; None where all count the same. Balanced ones are those of
    scikit-learn, n / (classes x samples of the class), over the training documents; where a document may have several labels, that of a
    label counts where it is there alone, and is the documents without it over those with it. A label that no training document has
    counts 1."""
    wanted, names = recipe.spec.class_weights, recipe.shape.labels
    if wanted is None:
        return None
    if isinstance(wanted, dict):
        return np.array([wanted.get(name, 1.0) for name in names], np.float32)
    manifests = [read_manifest(corpus) for corpus in recipe.corpora]
    if recipe.spec.fold:
        manifests = [folded(one, recipe.spec.fold) for one in manifests]
    counts = np.sum([[one.data["labels"]["train"][name] for name in names] for one in manifests], axis=0)
    total = sum(one.splits["train"].documents for one in manifests)
    if recipe.shape.multiple_labels:
        return np.asarray(np.where((counts > 0) & (counts < total), (total - counts) / np.maximum(counts, 1), 1), np.float32)
    there = counts > 0                                     # as scikit-learn counts the classes
    return np.asarray(np.where(there, total / (there.sum() * np.maximum(counts, 1)), 1), np.float32)


def num_targets(recipe: "Recipe", step: int) -> int | None:
    """The documents of a step."""
    return recipe.sizes.of(step)


def measure(observed: Sequence[NDArray[np.float32]], recipe: "Recipe") -> dict[str, Any]:
    """The scores, and the calibration error of the likeliest label where a document has one, as `kind: evaluate` has them; and under
    `val_by_source` those of each corpus, if there are several, and of each source that has documents, with the loss as val_loss has it."""
    parts = by_source(observed, recipe)
    scores = _scores(np.concatenate(observed), recipe)
    ece = {"val_ece": scores.pop("ece")} if "ece" in scores else {}
    weights = class_weights(recipe) if parts else None
    told = {name: {"loss": _loss(rows, recipe, weights), **{key: value for key, value in _scores(rows, recipe).items()
                                                            if not isinstance(value, dict)}} for name, rows in parts.items()}
    return {**scores, **ece, **({"val_by_source": told} if told else {})}


def _scores(rows: NDArray[np.float32], recipe: "Recipe") -> dict[str, Any]:
    """Of documents, [documents, labels and logits]."""
    names, multiple = recipe.shape.labels, recipe.shape.multiple_labels
    return {**scores_of(rows, names, multiple), **({} if multiple else {
        "ece": calibration(rows[:, 0], rows[:, -len(names):], BINS)["ece"]})}


def _loss(rows: NDArray[np.float32], recipe: "Recipe", weights: NDArray[np.float32] | None) -> float:
    """The mean over documents, in nats."""
    import torch

    from distlm.model.loss import label_loss

    size = len(recipe.shape.labels)
    given, logits = (torch.from_numpy(one) for one in (rows[:, :-size].astype(np.int64), rows[:, -size:].astype(np.float64)))
    weighted = None if weights is None else torch.from_numpy(weights.astype(np.float64))
    return float(label_loss(logits, given, recipe.shape.multiple_labels, weighted)) / len(rows)
