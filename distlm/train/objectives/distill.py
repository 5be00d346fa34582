"""`objective: distill`: a model learns what a teacher thinks of each token, beside the token that the corpus has (Hinton, Vinyals and Dean
2015, arXiv:1503.02531, section 2). Corpora, batches and what a loss is divided by are those of a language model.

The teacher computes beside the student in each step: its logits over a vocabulary are too many to be kept. Evaluation does without it:
val_loss is the plain cross-entropy, which can be compared with that of any run.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from distlm.train.objectives.language import BY_TOKEN, EVALUATED, begin, check, make_batch, measure, num_targets, shape
from distlm.train.objectives.metric import Metric

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from distlm.model.distill import DistillationLoss
    from distlm.train.recipe import Recipe

__all__ = ["BY_TOKEN", "MEANS", "METRICS", "begin", "check", "make_batch", "measure", "module", "num_targets", "shape"]

MEANS: tuple[str, ...] = ("cross_entropy", "kl")
KL = ("distill.temperature", "distill.teacher")
METRICS: Mapping[str, Metric] = {
    **EVALUATED, "loss": Metric("min", evaluated=False, scaled_by=("distill.alpha", *KL)),
    "cross_entropy": Metric("min", evaluated=False), "kl": Metric("min", evaluated=False, scaled_by=KL)}


def module(model: "PreTrainedModel", recipe: "Recipe") -> "DistillationLoss":
    from distlm.model.build import precision_dtype
    from distlm.model.distill import DistillationLoss, Teacher, load_teacher

    spec = recipe.spec
    assert spec.distill
    teacher = Teacher(load_teacher(spec.distill.teacher, recipe.shape, precision_dtype(spec.precision), recipe.mask_documents))
    return DistillationLoss(model, teacher, spec.distill.temperature, spec.distill.alpha, spec.regularization.label_smoothing,
                            spec.regularization.z_loss)
