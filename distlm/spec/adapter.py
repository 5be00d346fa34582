"""Low-rank adapters: what is trained in place of a model's weights."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from distlm.spec.base import Part, Rule


class Adapter(Part):
    """A low-rank update of matrices, W + alpha / rank · B A, of which A and B alone are trained (Hu et al. 2021): the base stays as it is.
    A classifier's last layer is trained whole beside them. The export is the merged model; the adapter alone lies in its folder `adapter`,
    as peft reads it, with that layer."""

    method: Literal["lora", "dora"] = "lora"
    """lora; dora trains the length of each row beside its direction (Liu et al. 2024)."""
    rank: Annotated[int, Field(ge=1)] = 16
    """Rows of A and columns of B."""
    alpha: Annotated[float, Field(gt=0)] = 32
    """What the update is scaled by, over the rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of A's inputs that are set to 0."""
    base: Literal["nf4"] | None = None
    """How the base's matrices are held, but for the embeddings and the last layer: nf4 for 4-bit NormalFloat with scales of 8 bits (QLoRA:
    Dettmers et al. 2023), 4.13 bits a parameter, computed with in the run's precision; with the extra `distlm[qlora]`. Left out, they are
    held in the run's precision. The export is the base of the checkpoint with the adapter, which differs from what was trained by the
    rounding: distlm.json has the loss of that as val_loss_as_held."""
    target_modules: Literal["all-linear"] | list[Annotated[str, Field(min_length=1)]] = "all-linear"
    """all-linear for every linear layer but the last, or the ends of modules' names, such as q_proj and v_proj."""

    @model_validator(mode="after")
    def _some(self) -> "Adapter":
        if not self.target_modules:
            raise Rule("target_modules", "[] would train nothing; name modules, or leave it out")
        return self
