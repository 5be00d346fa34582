"""Distillation: what a model is to learn of a teacher."""

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from distlm.spec.base import Part, Rule, without_effect

if TYPE_CHECKING:
    from distlm.spec.train import TrainSpec


class Distill(Part):
    """With objective: distill (Hinton, Vinyals and Dean 2015, arXiv:1503.02531, section 2). The loss of a token is

        (1 - alpha) cross-entropy + alpha temperature² KL(teacher || student)

    where both distributions of the divergence are softmax(logits / temperature)."""

    teacher: Annotated[str, Field(min_length=1)]
    """A run by name or path, or a folder that `AutoModelForCausalLM.from_pretrained` loads, with the corpus's tokenizer. Every worker
    holds it whole."""
    temperature: Annotated[float, Field(gt=0)] = 2.0
    """What logits are divided by: above 1, unlikely tokens tell more."""
    alpha: Annotated[float, Field(ge=0, le=1)] = 0.5
    """The weight of the teacher's part of the loss; the rest is that of the corpus's own tokens."""


def check_distill(spec: "TrainSpec") -> None:
    """Raises Rule where a teacher cannot be learned from so."""
    if spec.objective != "distill":
        without_effect(spec, f"with objective: {spec.objective}", "distill")
        return
    if spec.distill is None:
        raise Rule("objective", "distill needs a teacher; set distill.teacher")
    for where, given in (("sharding.tensor_parallel", spec.sharding.tensor_parallel > 1),
                         ("sharding.sequence_parallel", spec.sharding.sequence_parallel > 1), ("model.mup", spec.model.mup)):
        if given:
            raise Rule(where, "is not proved with objective: distill; leave one of them out")
