"""What a run is trained for. An objective is a module of this folder that says what its corpora are, what the loss of a sample is, and what
is measured of it. The stream, the loop, sharding and checkpoints are the same for all.

    objective = objective_of(spec)
    loss = objective.module(model, recipe)(*objective.make_batch(rows, recipe).inputs(device))
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol

from distlm.corpus.manifest import Manifest
from distlm.model.build import Shape
from distlm.spec.train import TrainSpec
from distlm.train.objectives import classify, distill, dpo, language
from distlm.train.objectives.metric import Metric

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray
    from transformers import PreTrainedModel

    from distlm.runs import RunFolder
    from distlm.train.batch import Batch
    from distlm.train.recipe import Recipe


class Objective(Protocol):
    """What a module of this folder has."""

    MEANS: tuple[str, ...]
    """What a step records beside its loss: the module leaves them in `sums` after each pass of training, float32[len(MEANS)], summed over
    the batch like the loss."""
    BY_TOKEN: bool
    """Whether evaluation measures each token. The module then leaves a model.loss.TokenScores as `observed`."""
    METRICS: Mapping[str, Metric]
    """What metrics.jsonl has of a run, loss and val_loss among it. Where two cannot be compared by one of them, the first by which they can
    is what to take instead."""

    def check(self, spec: TrainSpec, manifests: list[Manifest]) -> None:
        """Raises SpecError or InputError, before any work, where the corpora do not hold what is trained on."""

    def shape(self, manifest: Manifest) -> Shape:
        """What the corpus decides of the model, which `model_config` and `build_model` make from it."""

    def module(self, model: "PreTrainedModel", recipe: "Recipe") -> "torch.nn.Module":
        """What the engine wraps. It holds the model as `model`, and its forward pass, called with a batch's `inputs`, is the loss summed
        over the batch, a float32 scalar: the loop divides by the global count of targets.

        While it does not train it leaves `observed` behind each pass: float32[sequences, any], what `measure` needs of each sample, or what
        BY_TOKEN says."""

    def begin(self, engine: Any, recipe: "Recipe", folder: "RunFolder", rank: int, device: "torch.device") -> None:
        """What is to be done before the first step, and before a checkpoint is loaded, with the model as it is at first. All ranks."""

    def make_batch(self, rows: "NDArray[Any]", recipe: "Recipe") -> "Batch":
        """Rows of the stream, as `corpus.stream.ordered_steps` yields them, as tensors on the host."""

    def num_targets(self, recipe: "Recipe", step: int) -> int | None:
        """What the loss of a step is divided by, summed over all ranks, where the recipe alone tells; else None, and the batches count."""

    def measure(self, observed: Any, recipe: "Recipe") -> dict[str, Any]:
        """What evaluation records beside `val_loss`, from what the module observed of each corpus of `recipe.val`, or of each of its
        sources where it has some: float32[samples of all ranks, any], or where each token is measured, a row of train.totals.Sums. One
        rank calls it."""


OBJECTIVES: MappingProxyType[str, Objective] = MappingProxyType({"pretrain": language, "sft": language, "distill": distill, "dpo": dpo,
                                                                 "classify": classify})


def objective_of(spec: TrainSpec) -> Objective:
    return OBJECTIVES[spec.objective]
