"""Weights of 8 or 4 bits: torchao says how they are rounded and written, and PyTorch's own kernels for CPUs multiply by them.

    quantize(model, "int8_weight_only")                    # in place; save_pretrained then writes what torchao reads
    use_kernels(model)                                     # in place: what was loaded computes fast, and is no torchao any more

torchao itself turns int8 weights back into whole matrices at every step unless a compiler fuses that away, and has no 4-bit weights for
CPUs that it can write to safetensors; the kernels are there without a compiler (docs/experiments.md).
"""

from typing import Any

import torch
from torch.nn import functional

from distlm.errors import InputError

FEW_TOKENS, BLOCK_ROWS = 16, 1024
"""For more tokens the kernel for int8 is slower than unrolled blocks of so many rows (docs/experiments.md)."""


def quantize(model: Any, method: str, group_size: int = 32) -> dict[str, Any]:
    """Round the weights of all linear layers, but for those that share theirs with the embeddings, and for the last one, which 4 bits are
    too few for. Returns how many they are, and the names of those that stay as their shape does not fit, if any. Raises InputError where
    the family has none that fit."""
    from torchao.quantization import quantize_
    from transformers import TorchAoConfig
    from transformers.quantizers.quantizer_torchao import TorchAoHfQuantizer

    config, (found, unfit) = _config(method, group_size), linear_layers(model, method, group_size)
    for module in found:
        if method == "int4_weight_only":
            module.weight = torch.nn.Parameter(int4_tensor(module.weight.detach(), group_size), requires_grad=False)
        else:
            quantize_(module, config)
    setting: Any = TorchAoConfig(config)
    model.config.quantization_config = setting
    model.hf_quantizer = TorchAoHfQuantizer(setting, pre_quantized=True)       # by which transformers writes them
    return {"matrices": len(found), **({"left_whole": unfit} if unfit else {})}


def linear_layers(model: Any, method: str, group_size: int) -> tuple[list[torch.nn.Linear], list[str]]:
    """Those whose weights are rounded, and the names of those whose shape does not `fit`; the model may be a skeleton. Raises InputError
    where there are none, or others that would stay."""
    check_matrices(model)
    embeddings: Any = model.get_input_embeddings()
    whole = {model.get_output_embeddings()} if method == "int4_weight_only" else set()
    meant = {name: module for name, module in model.named_modules() if type(module) is torch.nn.Linear and module not in whole
             and module.weight is not embeddings.weight}
    found = [module for module in meant.values() if fits(module, method, group_size)]
    if not found:
        raise InputError(f"no linear layer of the {model.config.model_type} family can be quantized so", where="method",
                         remedy=f"{'lower group_size, or ' if method == 'int4_weight_only' else ''}take a family such as llama or qwen3")
    return found, [name for name, module in meant.items() if not fits(module, method, group_size)]


def check_matrices(model: Any) -> None:
    """Raises InputError for a family whose layers hold most weights in what is no matrix, such as fused experts and convolutions."""
    for name, parameter in model.named_parameters():
        if parameter.dim() > 2:
            raise InputError(f"the {model.config.model_type} family has weights that are no matrices, such as {name}, and would keep them "
                             "whole", where="method", remedy="take a dense family such as llama or qwen3")


def _config(method: str, group_size: int) -> Any:
    """torchao's own name for a method."""
    from torchao.quantization import Int4WeightOnlyConfig, Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig

    if method == "int4_weight_only":
        return Int4WeightOnlyConfig(group_size=group_size, set_inductor_config=False)
    return (Int8WeightOnlyConfig if method == "int8_weight_only" else Int8DynamicActivationInt8WeightConfig)(set_inductor_config=False)


def fits(module: torch.nn.Linear, method: str, group_size: int) -> bool:
    """Whether the kernels take a matrix of this shape: 4 bits come in whole groups, and in blocks of 16 rows."""
    return method != "int4_weight_only" or (module.in_features % group_size == 0 and module.out_features % 16 == 0)


def int4_tensor(weight: torch.Tensor, group_size: int) -> Any:
    """torchao's Int4Tensor of a matrix [rows, columns], rounded as torchao has it done by mslk, which is for GPUs alone: q in 0..15 with
    w = (q - 8) * scale + zero, scale = (max - min) / 15 and zero = min + 8 * scale of each group."""
    from torchao.quantization import Int4Tensor

    rows, columns = weight.shape
    groups = weight.float().reshape(rows, -1, group_size)
    low, high = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
    scale = (high - low).clamp(min=1e-6) / 15
    q = ((groups - low) / scale).round().clamp(0, 15).to(torch.int8).reshape(rows, columns) - 8
    packed = (q[:, ::2] & 0xF) | (q[:, 1::2] << 4)
    scales, zeros = (part.squeeze(2).t().contiguous().to(weight.dtype) for part in (scale, low + 8 * scale))
    return Int4Tensor(packed.contiguous(), scales, zeros, [1, group_size], weight.shape)


def use_kernels(model: Any) -> None:
    """Put layers that compute by PyTorch's kernels in the places of those with torchao's weights. Other kinds of weights stay."""
    for name, module in list(model.named_modules()):
        if not isinstance(module, torch.nn.Linear):
            continue
        weight: Any = module.weight.data
        if type(weight).__name__ == "Int8Tensor":
            kind = Int8Linear if weight.act_quant_kwargs is None else Int8DynamicLinear
            model.set_submodule(name, kind(weight.qdata, weight.scale.to(model.dtype), module.bias))
        elif type(weight).__name__ == "Int4Tensor":
            model.set_submodule(name, Int4Linear(weight.qdata, torch.stack([weight.scale, weight.zero_point], 2).to(model.dtype),
                                                 module.bias))
    del model.hf_quantizer


def rounds_inputs(model: torch.nn.Module) -> bool:
    """Whether layers round what goes into them, by which a last bit can become a step of 8 bits."""
    return any(isinstance(module, Quantized) for module in model.modules())


class Quantized(torch.nn.Module):
    """A linear layer whose weights are buffers: nothing of it is trained. Its scales have the model's dtype."""

    q: torch.Tensor
    scale: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, q: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.register_buffer("q", q.clone(memory_format=torch.contiguous_format))      # the kernels crash where a file's map begins oddly
        self.register_buffer("scale", scale.contiguous())
        self.register_buffer("bias", None if bias is None else bias.detach())

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """[..., columns] to [..., rows]."""
        found = self.product(inputs.reshape(-1, inputs.shape[-1]).contiguous()).unflatten(0, inputs.shape[:-1])
        return found if self.bias is None else found + self.bias

    def product(self, inputs: torch.Tensor) -> torch.Tensor:
        """[n, columns] to [n, rows]."""
        raise NotImplementedError


class Int8Linear(Quantized):
    """q: int8[rows, columns]; scale: [rows, 1]; w = q * scale. For a few tokens on CPU PyTorch's kernel reads q as it is, in bfloat16, and
    its time grows with their number; for more, blocks of q are unrolled, each into memory that stays in a cache."""

    def product(self, inputs: torch.Tensor) -> torch.Tensor:
        scale = self.scale.flatten()
        if inputs.is_cpu and len(inputs) <= FEW_TOKENS:
            return torch.ops.aten._weight_int8pack_mm(inputs.bfloat16(), self.q, scale.bfloat16()).to(inputs.dtype)
        found = torch.cat([functional.linear(inputs, block.to(inputs.dtype)) for block in self.q.split(BLOCK_ROWS)], 1)
        return found * scale.to(inputs.dtype)


class Int8DynamicLinear(Quantized):
    """As Int8Linear, with inputs that are rounded to int8 too, by a scale for each token, as torchao does it."""

    def product(self, inputs: torch.Tensor) -> torch.Tensor:
        scale = (inputs.abs().amax(1, keepdim=True).float() / 127.5).clamp(min=torch.finfo(torch.float32).eps)
        rounded = (inputs * scale.reciprocal()).round_().clamp_(-128, 127).to(torch.int8)
        return (self.whole_numbers(rounded) * scale * self.scale.flatten()).to(inputs.dtype)

    def whole_numbers(self, rounded: torch.Tensor) -> torch.Tensor:
        """int8[n, columns] to [n, rows]. GPUs multiply no fewer than 17 rows at once, and matrices of multiples of 8 alone."""
        if rounded.is_cpu:
            return torch._int_mm(rounded, self.q.t())
        if any(size % 8 for size in self.q.shape):
            return functional.linear(rounded.float(), self.q.float())
        return torch._int_mm(functional.pad(rounded, (0, 0, 0, max(0, 32 - len(rounded)))), self.q.t())[:len(rounded)]


class Int4Linear(Quantized):
    """q: uint8[rows, columns / 2], two of 4 bits in each, the first in the lower ones; scale: [groups, rows, 2], scale and zero point;
    w = q * scale + zero with q in -8..7. On CPU the first product puts q into the order of the kernel, which computes in bfloat16."""

    ordered = False

    def product(self, inputs: torch.Tensor) -> torch.Tensor:
        group = inputs.shape[1] // len(self.scale)
        if not inputs.is_cpu:
            groups = self.unpacked().unflatten(1, (-1, group)).to(inputs.dtype)
            scale, zero = self.scale.transpose(0, 1).unsqueeze(2).unbind(3)
            return functional.linear(inputs, (groups * scale + zero).flatten(1))
        if not self.ordered:
            self.q, self.ordered = torch.ops.aten._convert_weight_to_int4pack_for_cpu(self.unpacked().int() + 8, 1), True
        found = torch.ops.aten._weight_int4pack_mm_for_cpu(inputs.bfloat16(), self.q, group, self.scale.bfloat16())
        return found.to(inputs.dtype)

    def unpacked(self) -> torch.Tensor:
        """int8[rows, columns] in -8..7."""
        q = self.q.view(torch.int8)
        return torch.stack([(q << 4) >> 4, q >> 4], 2).flatten(1)
