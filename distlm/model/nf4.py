"""Weights that stand still in 4-bit NormalFloat, with scales of 8 bits (QLoRA: Dettmers et al. 2023, arXiv:2305.14314, section 3), by
bitsandbytes: an adapter is trained through them.

    check_nf4(config)                                      # before any work
    model = load_model(source, where, dtype, nf4=True)     # each matrix is rounded as it is read; calls nf4_options and settle
"""

import importlib.util
from typing import TYPE_CHECKING, Any

from distlm.errors import InputError, SpecError
from distlm.model.build import skeleton
from distlm.model.encoder import is_encoder

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

BLOCK, SCALES = 64, 256
"""Parameters that have one scale of 8 bits, and such scales that have one of 32."""
BITS = 4 + 8 / BLOCK + 32 / (BLOCK * SCALES)
"""Of a parameter, with its share of the scales."""
BITSANDBYTES = "pip install 'distlm[qlora]'"


def check_nf4(config: "PreTrainedConfig") -> None:
    """Raises SpecError where bitsandbytes is not installed, the family's weights are no matrices, or its linear layers are of a kind of
    their own, as falcon's are, which transformers leaves whole, and for an encoder."""
    import torch
    from transformers.pytorch_utils import Conv1D

    from distlm.model.quantize import check_matrices

    if importlib.util.find_spec("bitsandbytes") is None:
        raise SpecError("the package bitsandbytes is not installed", where="adapter.base", remedy=BITSANDBYTES)
    if is_encoder(config):
        raise SpecError("only causal models are held in 4 bits, and this is an encoder", where="adapter.base", remedy="leave it out")
    model = skeleton(config)
    try:
        check_matrices(model)
    except InputError as error:
        raise SpecError(error.message, where="adapter.base", remedy=error.remedy) from None
    _check_none([name for name, module in _layers(model).items() if type(module) not in (torch.nn.Linear, Conv1D)], model)


def nf4_elements(config: "PreTrainedConfig") -> int:
    """The elements of all matrices that would be held in NF4: those of the linear layers, but for the last one."""
    return sum(module.weight.numel() for module in _layers(skeleton(config)).values())


def _layers(model: Any) -> dict[str, Any]:
    """The linear layers but for the last one, a classifier's too, by name, whether or not they are rounded."""
    import torch
    from transformers.pytorch_utils import Conv1D

    embeddings, last = model.get_input_embeddings().weight, model.get_output_embeddings() or model.score
    return {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear | Conv1D) and module is not last
            and module.weight is not embeddings}


def _check_none(whole: list[str], model: "PreTrainedModel") -> None:
    if whole:
        raise SpecError(f"transformers rounds no layer of the kind of {whole[0]} in the {model.config.model_type} family",
                        where="adapter.base", remedy="leave it out, or take a family such as llama or qwen3")


def nf4_options(dtype: "torch.dtype") -> dict[str, Any]:
    """What `from_pretrained` takes to round matrices as it reads them, so that products are computed in `dtype`."""
    from transformers import BitsAndBytesConfig

    return {"quantization_config": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                                                      bnb_4bit_compute_dtype=dtype)}


def settle(model: "PreTrainedModel") -> None:
    """Let what was loaded be trained through on every device, and stay as it is. Raises SpecError where a layer was not rounded."""
    from bitsandbytes.nn import Linear4bit

    _check_none([name for name, module in _layers(model).items() if not isinstance(module, Linear4bit)], model)
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False      # at the first evaluation weights would be reordered, and let no gradient through
            module.register_state_dict_post_hook(_drop_scales)


def _drop_scales(module: "torch.nn.Module", state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """A checkpoint leaves out what stands still, and knows weights by their names alone."""
    for name in [name for name in state if name.startswith(f"{prefix}weight.")]:
        del state[name]
