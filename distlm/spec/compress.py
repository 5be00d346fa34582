"""`kind: compress`: a smaller model of a model, with what it costs and what it gains."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from distlm.spec.base import Job, Rule, without_effect
from distlm.spec.mixture import CorpusName

Method = Literal["int8_weight_only", "int8_dynamic", "int4_weight_only", "structured", "magnitude"]
QUANTIZED = ("int8_weight_only", "int8_dynamic", "int4_weight_only")
"""The methods that torchao does."""


class CompressSpec(Job):
    """A run's export, or any checkpoint, with weights of 8 or 4 bits, fewer layers and channels, or zeros among its weights. Size, speed
    and loss are measured before and after."""

    kind: Literal["compress"] = "compress"
    """The kind of the job."""
    model: Annotated[str, Field(min_length=1)]
    """A run by name or path, or a folder that `AutoModelForCausalLM.from_pretrained` loads."""
    method: Method
    """int8_weight_only: a scale for each row of a matrix. int8_dynamic: inputs are 8 bits too, a scale for each token.
    int4_weight_only: a scale and a zero point for each group. structured: channels of feed-forward layers, whole layers, or both go.
    magnitude: the smallest weights of each matrix become zero."""
    corpus: CorpusName
    """A prepared corpus, by name or path, with the model's tokenizer: the loss is measured on it."""
    split: Literal["train", "val", "test"] = "val"
    """The split whose windows are taken."""
    windows: Annotated[int | None, Field(ge=1)] = 512
    """The first so many windows, or null for all."""
    mask_documents: bool | None = None
    """As in `kind: evaluate`."""
    group_size: Literal[32, 64, 128, 256] = 32
    """int4_weight_only: neighbouring weights of a row that share a scale and a zero point."""
    channels: Annotated[float, Field(ge=0, lt=1)] = 0
    """structured: the share of each feed-forward layer's channels that goes, those of the smallest norm."""
    layers: Annotated[int, Field(ge=0)] = 0
    """structured: so many whole layers go, those that change what passes through them least."""
    sparsity: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """magnitude: the share of each matrix's weights that become zero."""
    batch_windows: Annotated[int, Field(ge=1)] = 8
    """Windows of one forward pass."""
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic in which both are measured, and what weights that are not compressed are held in; auto: bf16 on GPU, fp32 on CPU, as they
    are evaluated and served."""
    gpus: Annotated[int, Field(ge=0, le=1)] = 0
    """1 measures on a GPU, 0 on CPU."""
    cpus: Annotated[float, Field(gt=0)] = 1
    """Logical CPUs that the job's worker reserves."""
    threads: Annotated[int | None, Field(ge=1)] = None
    """Threads of its matrix products. Default: the node's cores."""

    @model_validator(mode="after")
    def _rules(self) -> "CompressSpec":
        for key, method in (("group_size", "int4_weight_only"), ("channels", "structured"), ("layers", "structured"),
                            ("sparsity", "magnitude")):
            if self.method != method:
                without_effect(self, f"with method: {self.method}", key)
        if self.method == "structured" and not self.channels and not self.layers:
            raise Rule("method", "structured takes nothing away without channels or layers; set channels: 0.25, say")
        return self
