"""`objective: pretrain | sft`: the next token's cross-entropy over all tokens that give one. Of conversations those are the answers'."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from distlm.corpus.manifest import Manifest
from distlm.errors import SpecError
from distlm.model.build import Shape
from distlm.spec.train import TrainSpec
from distlm.train.objectives.metric import Metric

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
METRICS: Mapping[str, Metric] = {"val_loss": Metric("min"), "loss": Metric("min", evaluated=False)}


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


def make_batch(rows: "NDArray[Any]", recipe: "Recipe", device: "torch.device") -> "TokenBatch":
    from distlm.train import batch

    return batch.make_batch(rows, recipe.mask_documents, device)


def num_targets(recipe: "Recipe", step: int) -> int | None:
    """All tokens of a step, unless some give no loss."""
    return None if recipe.marked else recipe.tokens_of(step)


def measure(observed: "NDArray[np.float32]", recipe: "Recipe") -> dict[str, Any]:
    """The loss is all there is."""
    return {}
