"""`precision: fp8`: the matrix products of a model's hidden layers in float8 while it trains, by torchao.

    check_float8(config)                                   # whether the family's can be
    use_float8(model)                                      # in place, before its layers are compiled

What goes into a product is rounded as Micikevicius et al. 2022 (arXiv:2209.05433) have it: weights and inputs to four bits of exponent
and three of mantissa, gradients of outputs to five and two, each whole matrix by one scale, that of its largest value at this step. Weights
stay the parameters that they are, in bf16 under their names: optimizers, checkpoints and exports do not know. Embeddings, norms, attention
and the last layer compute in bf16, and so does all that is not training: a val_loss is that of the model that is exported.
"""

from dataclasses import replace
from typing import TYPE_CHECKING

from distlm.errors import SpecError
from distlm.model.build import decoder_layers, skeleton

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

CAPABILITY = (8, 9)
"""CUDA's compute capability of the first GPUs that multiply in float8."""
MULTIPLE = 16
"""What their kernels want both sizes of a matrix to be multiples of."""
RECIPE = "tensorwise"
"""torchao's name for one scale a matrix; docs/experiments.md has it beside the others."""


def hidden_matrices(model: "PreTrainedModel") -> list[str]:
    """The linear layers inside of a model's hidden layers whose products can be in float8, by name."""
    from torch import nn

    hidden = {module for layer in decoder_layers(model) for module in layer.modules()}
    return [name for name, module in model.named_modules() if module in hidden and type(module) is nn.Linear
            and not any(size % MULTIPLE for size in module.weight.shape)]


def check_float8(config: "PreTrainedConfig") -> None:
    """Raises SpecError where none of the hidden layers' products can be in float8, or weights that are no linear layer's would stay out:
    those of gpt2, and of experts."""
    from torch import nn

    model = skeleton(config)
    if not decoder_layers(model):
        raise SpecError(f"the layers of the {config.model_type} family cannot be told from the rest of it", where="precision",
                        remedy="take bf16")
    others = [f"{name}.{key}" if name else key for layer in decoder_layers(model) for name, module in layer.named_modules()
              if type(module) is not nn.Linear for key, weight in module.named_parameters(recurse=False) if weight.dim() > 1]
    if others:
        raise SpecError(f"the {config.model_type} family has weights in its layers that are not of linear layers, such as {others[0]}, and "
                        "fp8 is not for them", where="precision", remedy="take bf16")
    if not hidden_matrices(model):
        raise SpecError(f"fp8 has no matrix to multiply by: no linear layer of this model has sizes that are multiples of {MULTIPLE}",
                        where="precision", remedy="take bf16, or a hidden_size and an intermediate_size that are")


def use_float8(model: "PreTrainedModel", *, emulate: bool = False) -> None:
    """Let the products of `hidden_matrices` be in float8 while the model is in training mode. `emulate`: on a processor that has none, by
    values that are rounded and multiplied in float32."""
    from torch.nn import functional
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    from torchao.float8.float8_linear import Float8Linear

    class Trained(Float8Linear):
        def forward(self, input: "torch.Tensor") -> "torch.Tensor":
            return super().forward(input) if self.training else functional.linear(input, self.weight, self.bias)

    names = set(hidden_matrices(model))
    config = replace(Float8LinearConfig.from_recipe_name(RECIPE), emulate=emulate, pad_inner_dim=True)     # tokens in 16s
    convert_to_float8_training(model, module_filter_fn=lambda _, name: name in names, config=config)
    for name in names:
        model.get_submodule(name).__class__ = Trained
