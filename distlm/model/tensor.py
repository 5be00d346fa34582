"""Tensor parallelism: how one model's layers are divided over the ranks of a group (Shoeybi et al. 2019, section 3).

The first matrices of attention and of a feed-forward layer are cut by outputs, so that a rank has heads and hidden units of its own, and
those after them by inputs, whose products the ranks add up. All the rest, embeddings and the last layer too, is whole on every rank.
DeepSpeed's AutoTP cuts the layers and exchanges activations; what it does with which layer is said here alone.

    check_tensor(config, degree=2)
    layer_specs()                   # for DeepSpeed's tensor_parallel.partition_config
    dimension("model.layers.0.mlp.down_proj.weight")        # 1
"""

import re
from typing import TYPE_CHECKING, Any

from distlm.errors import SpecError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "smollm3", "olmo", "starcoder2", "gpt_neox")
"""Those whose matrices these names are; a test has the losses and norms of each. gpt2 has its queries, keys and values in one matrix that
AutoTP does not take apart."""
BY_OUTPUTS = r".*\.(q_proj|k_proj|v_proj|gate_proj|up_proj|c_fc|query_key_value|dense_h_to_4h)"
BY_INPUTS = r".*\.(o_proj|down_proj|c_proj|attention\.dense|dense_4h_to_h)"
ON_HEADS = r".*\.(q_norm|k_norm)"
"""Whole on every rank, but each has the gradient of its own heads alone."""


def check_tensor(config: "PreTrainedConfig", degree: int) -> None:
    """Raises SpecError for a model that cannot be divided over `degree` ranks."""
    where = "sharding.tensor_parallel"
    if config.model_type not in FAMILIES:
        raise SpecError(f"DeepSpeed is not known to divide the {config.model_type} family rightly", where=where,
                        remedy=f"leave it out, or take {', '.join(FAMILIES[:-1])} or {FAMILIES[-1]}")
    heads = config.num_attention_heads
    for what, count in (("attention heads", heads), ("key-value heads", getattr(config, "num_key_value_heads", None) or heads),
                        ("units of a feed-forward layer", config.intermediate_size)):
        if count % degree:
            near = [str(n) for n in range(1, min(count, 64) + 1) if count % n == 0]
            raise SpecError(f"{degree} does not divide the model's {count} {what}", where=where, remedy=f"try {', '.join(near)}")


def layer_specs() -> list[dict[str, Any]]:
    """The layers as DeepSpeed's AutoTP is told of them."""
    return [{"patterns": [rf"{BY_OUTPUTS}\.weight$"], "partition_type": "column"},
            {"patterns": [rf"{BY_INPUTS}\.weight$"], "partition_type": "row"},
            {"patterns": [rf"{ON_HEADS}\.weight$"], "partition_type": "skip", "grad_allreduce": True}]


def dimension(name: str) -> int | None:
    """The dimension in which a parameter is cut; None for one that is whole on every rank."""
    if re.fullmatch(rf"{BY_OUTPUTS}\.(weight|bias)", name):
        return 0
    return 1 if re.fullmatch(rf"{BY_INPUTS}\.weight", name) else None


def divide(model: "PreTrainedModel", degree: int) -> "PreTrainedModel":
    """Let a model without weights, as `model.build.skeleton` makes it, have what one rank of `degree` holds. Raises SpecError where it
    cannot be."""
    if degree == 1:
        return model
    check_tensor(model.config, degree)
    for name, parameter in model.named_parameters():
        dim = dimension(name)
        if dim is not None:
            owner: Any = model.get_submodule(name.rpartition(".")[0])
            part = parameter.chunk(degree, dim)[0].detach().clone().requires_grad_()
            setattr(owner, name.rpartition(".")[2], type(parameter)(part))
    return model
