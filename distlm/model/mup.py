"""A learning rate that is found at one width and holds at others: the maximal update parametrization (Yang et al. 2022, table 3).

Table 3 needs no multiplier in the forward pass, so that the export is a model like any other. With m = width / base width, Adam and
initial weights as they are at the base width:

    parameter                         initial standard deviation    learning rate
    embeddings, norms, biases         as it is                      as it is
    hidden matrices                   over sqrt(m)                  over m
    the last layer                    over m                        over m

Attention's 1 / sqrt(head width) is constant where heads have one width and grow in number.
"""

from typing import TYPE_CHECKING

from distlm.errors import SpecError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gpt2", "gpt_neox")
"""Those whose layers are matrices, norms and biases alone, and whose logits and embeddings nothing scales."""


def check_mup(config: "PreTrainedConfig") -> None:
    """Raises SpecError for a model that the table does not describe."""
    if config.model_type not in FAMILIES:
        raise SpecError(f"it is not known how {config.model_type} scales with its width", where="model.mup",
                        remedy=f"leave it out, or take {', '.join(FAMILIES[:-1])} or {FAMILIES[-1]}")
    if config.tie_word_embeddings:
        raise SpecError("embeddings that are the last layer too cannot have the scales of both", where="model.mup",
                        remedy="set tie_word_embeddings: false in model.config, or leave mup out")


def rate_factor(model: "PreTrainedModel", base_width: int) -> dict["torch.nn.Parameter", float]:
    """What each parameter's learning rate is multiplied by."""
    import torch

    over = base_width / model.config.hidden_size
    embeddings = {module.weight for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    return {parameter: 1.0 if parameter.dim() < 2 or parameter in embeddings else over for parameter in model.parameters()}


def scale_weights(model: "PreTrainedModel", base_width: int) -> None:
    """Give weights as transformers draws them, whose standard deviations know no width, those of the table."""
    import torch

    last = model.get_output_embeddings().weight
    with torch.no_grad():
        for parameter, factor in rate_factor(model, base_width).items():
            parameter.mul_(factor if parameter is last else factor**0.5)
