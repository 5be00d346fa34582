"""Direct preference optimization: what the loss of a pair of answers is made of."""

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from distlm.spec.base import Part, Rule, without_effect

if TYPE_CHECKING:
    from distlm.spec.train import TrainSpec


class Dpo(Part):
    """With objective: dpo (Rafailov et al. 2023, arXiv:2305.18290)."""

    beta: Annotated[float, Field(gt=0)] = 0.1
    """How dear it is to move away from the model as it was at first, which is the reference (equation 7)."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """The share of pairs whose answers are taken to have been swapped (Mitchell 2023, conservative DPO)."""


def check_dpo(spec: "TrainSpec") -> None:
    """Raises Rule where pairs of answers cannot be trained on so."""
    if spec.objective != "dpo":
        without_effect(spec, f"with objective: {spec.objective}", "dpo")
        return
    if spec.model.source is None:
        raise Rule("objective", "dpo needs a model that answers already; set model.from")
    for where, given in (("sharding.tensor_parallel", spec.sharding.tensor_parallel > 1),
                         ("sharding.sequence_parallel", spec.sharding.sequence_parallel > 1)):
        if given:
            raise Rule(where, "cannot be with objective: dpo, whose answers are scored whole; leave it out")
    for key in ("label_smoothing", "z_loss"):
        if value := getattr(spec.regularization, key):
            raise Rule(f"regularization.{key}", f"{value} has no effect with objective: dpo; leave it out"
                                                + (", or set dpo.label_smoothing" if key == "label_smoothing" else ""))
    if spec.batch.mask_documents is False:
        raise Rule("batch.mask_documents", "false would let one answer see the other; leave it out")
