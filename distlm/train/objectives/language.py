"""`objective: pretrain | sft`: the next token's cross-entropy over all tokens that give one. Of conversations those are the answers'."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from distlm.corpus.manifest import Manifest
from distlm.errors import SpecError
from distlm.model.build import Shape
from distlm.spec.train import TrainSpec
from distlm.train.objectives.metric import Metric
from distlm.train.totals import measures, mixed

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from transformers import PreTrainedModel

    from distlm.model.loss import CausalLoss
    from distlm.runs import RunFolder
    from distlm.train.batch import TokenBatch
    from distlm.train.recipe import Recipe


MEANS: tuple[str, ...] = ()
BY_TOKEN = True
EVALUATED: Mapping[str, Metric] = {"val_loss": Metric("min"), "val_perplexity": Metric("min"), "val_bits_per_byte": Metric("min"),
                                   "val_accuracy": Metric("max"), "val_ece": Metric("min")}
METRICS: Mapping[str, Metric] = {**EVALUATED, "loss": Metric("min", evaluated=False)}


def check(spec: TrainSpec, manifests: list[Manifest]) -> None:
    """Raises SpecError where sft has texts, and for pairs of answers."""
    for one in manifests:
        if spec.objective == "sft" and not one.conversations:
            raise SpecError(f"sft needs conversations, and the corpus {one.name} has texts, of which every token gives loss",
                            where="objective", remedy="prepare it with conversations, or leave objective out")
        if one.pairs:
            raise SpecError(f"{spec.objective} would train on the rejected answers of the corpus {one.name} too", where="objective",
                            remedy="set objective: dpo")


def shape(manifest: Manifest) -> Shape:
    return Shape(manifest.vocab_size, manifest.context, manifest.eos_id)


def module(model: "PreTrainedModel", recipe: "Recipe") -> "CausalLoss":
    from distlm.model.loss import CausalLoss

    penalties = recipe.spec.regularization
    return CausalLoss(model, penalties.label_smoothing, penalties.z_loss)


def begin(engine: Any, recipe: "Recipe", folder: "RunFolder", rank: int, device: "torch.device") -> None:
    """There is nothing to be done."""


def make_batch(rows: "NDArray[Any]", recipe: "Recipe") -> "TokenBatch":
    from distlm.train import batch

    return batch.make_batch(rows, recipe.mask_documents)


def num_targets(recipe: "Recipe", step: int) -> int | None:
    """All tokens of a step, unless some give no loss."""
    return None if recipe.marked else recipe.tokens_of(step)


def measure(observed: "NDArray[np.float64]", recipe: "Recipe") -> dict[str, Any]:
    """Perplexity, bits per byte, accuracy and calibration error as `kind: evaluate` has them, of a mixture with the shares of its corpora;
    and under `val_by_source` those of each corpus, if there are several, and of each source that has tokens."""
    parts, by_source, first = [], {}, 0
    for part in recipe.val:
        rows = observed[first:first + max(1, len(part.sources))]
        first += len(rows)
        parts.append(rows.sum(0))
        if len(recipe.val) > 1:
            by_source[part.name] = _known(parts[-1])
        by_source |= {f"{part.name}: {name}": _known(row) for name, row in zip(part.sources, rows, strict=False) if row[0]}
    whole = _known(mixed(parts, [part.share for part in recipe.val]))
    return {**{f"val_{key}": value for key, value in whole.items() if key != "loss"}, **({"val_by_source": by_source} if by_source else {})}


def _known(sums: "NDArray[np.float64]") -> dict[str, float]:
    """The measures that there are."""
    found = measures(sums)
    return {key: found[key] for key in ("loss", "perplexity", "bits_per_byte", "accuracy", "ece") if found[key] is not None}
