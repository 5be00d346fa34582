"""Pruning: channels of feed-forward layers and whole layers that go, so that the model is a smaller one of its family; or single weights
that become zero, which `keep_zeros: true` keeps in the training that makes up for it.
"""

import copy
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils import prune as torch_prune

from distlm.corpus.manifest import read_manifest
from distlm.corpus.stream import Windows
from distlm.errors import InputError
from distlm.evaluate.task import Task
from distlm.model.build import decoder_layers, skeleton
from distlm.model.quantize import check_matrices
from distlm.spec import CompressSpec

MULTIPLE = 8
"""Channels that are left come in so many, which kernels like."""
JUDGED_WINDOWS = 16
"""Windows by which layers are judged: of the training split, since the loss is measured on another."""
PER_LAYER = frozenset({"layer_types", "mlp_layer_types", "layers_block_type", "no_rope_layers", "layer_rope_theta",
                       "num_attention_heads_per_layer", "num_key_value_heads_per_layer"})
"""Lists of a configuration of transformers that have an entry for each layer. Others may hold the numbers of some layers."""


def check(spec: CompressSpec, folder: Path) -> None:
    """Raises InputError where a model cannot be pruned so, before its weights are loaded."""
    from transformers import AutoConfig

    model = skeleton(AutoConfig.from_pretrained(folder, local_files_only=True))
    check_matrices(model)
    layers, family = decoder_layers(model), model.config.model_type
    if not layers:
        raise InputError(f"the layers of the {family} family cannot be told from the rest of it", where="method",
                         remedy="take a family such as llama or qwen3")
    if spec.layers >= len(layers):
        raise InputError(f"{spec.layers} of the model's {len(layers)} layers", where="layers",
                         remedy=f"set it to {len(layers) - 1} at most")
    if spec.layers:
        per_layer(model.config.get_text_config(), len(layers))
    if spec.channels:
        size: Any = getattr(model.config, "intermediate_size", None)
        if any({module.out_features for module in inner(one)} != {size} for one in feed_forwards(model)) or not feed_forwards(model):
            raise InputError(f"the {family} family has not the same number of channels in every feed-forward layer, as up_proj and "
                             "down_proj", where="channels", remedy="leave it out, and set layers")
        if left(size, spec.channels) == size:
            raise InputError(f"{spec.channels:g} of {size} channels is less than {MULTIPLE}, in whose multiples they go", where="channels",
                             remedy="raise it")


def structured(model: Any, spec: CompressSpec, task: Task) -> dict[str, Any]:
    """Take layers and channels away, in place. Returns what is left."""
    dropped = drop_layers(model, least_influence(model, task)[:spec.layers]) if spec.layers else []
    if spec.channels:
        size = left(model.config.intermediate_size, spec.channels)
        for one in feed_forwards(model):
            drop_channels(one, size)
        model.config.intermediate_size = size
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    if shapes != {name: value.shape for name, value in skeleton(copy.deepcopy(model.config)).state_dict().items()}:
        raise InputError(f"the configuration of the {model.config.model_type} family does not say which layers it has", where="layers",
                         remedy="take a family such as llama or qwen3")
    return {"channels": getattr(model.config, "intermediate_size", None), "layers": len(decoder_layers(model)), "dropped_layers": dropped}


def feed_forwards(model: Any) -> list[Any]:
    """The feed-forward layers with a gate or without one, whose channels stand between up_proj and down_proj."""
    return [module for module in model.modules() if isinstance(getattr(module, "up_proj", None), torch.nn.Linear)
            and isinstance(getattr(module, "down_proj", None), torch.nn.Linear)]


def inner(one: Any) -> list[torch.nn.Linear]:
    """The matrices whose rows are a feed-forward layer's channels."""
    return [matrix for name in ("up_proj", "gate_proj") if isinstance(matrix := getattr(one, name, None), torch.nn.Linear)]


def left(size: int, share: float) -> int:
    """The channels that are left of so many where a share of them goes."""
    return min(size, max(MULTIPLE, round(size * (1 - share) / MULTIPLE) * MULTIPLE))


def drop_channels(one: Any, size: int) -> None:
    """Keep the channels of the largest norm, over all weights that go with a channel (Fang et al. 2023, section 3.3)."""
    norms = sum(matrix.weight.float().square().sum(1) for matrix in inner(one)) + one.down_proj.weight.float().square().sum(0)
    kept = norms.topk(size).indices.sort().values
    for matrix in inner(one):
        matrix.weight = torch.nn.Parameter(matrix.weight[kept])
        matrix.bias = None if matrix.bias is None else torch.nn.Parameter(matrix.bias[kept])
        matrix.out_features = size
    one.down_proj.weight = torch.nn.Parameter(one.down_proj.weight[:, kept].contiguous())
    one.down_proj.in_features = size


def least_influence(model: Any, task: Task) -> list[int]:
    """The numbers of the layers, first those with the least influence: 1 - E[cos(x_i, x_i+1)] of a layer's input and output (Men et al.
    2024, equation 1)."""
    corpus = task.parts[0].corpus
    split = "train" if read_manifest(corpus).splits["train"].windows else task.split
    tokens = torch.from_numpy(Windows(corpus, split).head(JUDGED_WINDOWS)[:, :-1].astype("int64"))
    layers = decoder_layers(model)
    found: dict[int, float] = {}

    def look(number: int) -> Any:
        def hook(_: Any, inputs: Any, kwargs: Any, output: Any) -> None:
            before = inputs[0] if inputs else kwargs["hidden_states"]
            after = output[0] if isinstance(output, tuple) else output
            found[number] = 1 - float(torch.nn.functional.cosine_similarity(before.float(), after.float(), dim=-1).mean())
        return hook

    hooks = [layer.register_forward_hook(look(i), with_kwargs=True) for i, layer in enumerate(layers)]
    model.eval()(input_ids=tokens, use_cache=False, logits_to_keep=1)
    for one in hooks:
        one.remove()
    return sorted(found, key=lambda number: found[number])


def per_layer(config: Any, layers: int) -> list[str]:
    """The keys of a configuration that have an entry for each of so many layers. Raises InputError for a list of layers that is none of
    PER_LAYER: nobody knows here what of it belongs to a layer."""
    lists = [key for key, value in config.to_dict().items() if "layer" in key and isinstance(value, list) and value]
    if unknown := [key for key in lists if key not in PER_LAYER or len(getattr(config, key)) != layers]:
        raise InputError(f"it is not known what {unknown[0]} in the configuration of the {config.model_type} family says of each layer",
                         where="layers", remedy="leave it out, and set channels")
    return lists


def drop_layers(model: Any, numbers: list[int]) -> list[int]:
    """Take layers out, and out of every list of the configuration that has an entry for each. Returns their numbers, in order. Raises what
    `per_layer` does."""
    layers = decoder_layers(model)
    name = next(name for name, module in model.named_modules() if isinstance(module, torch.nn.ModuleList) and layers[0] in [*module])
    kept = [i for i in range(len(layers)) if i not in numbers]
    model.set_submodule(name, torch.nn.ModuleList(layers[i] for i in kept))
    config = model.config.get_text_config()
    for key in per_layer(config, len(layers)):
        setattr(config, key, [getattr(config, key)[i] for i in kept])
    config.num_hidden_layers = len(kept)
    return sorted(numbers)


def magnitude(model: Any, sparsity: float) -> dict[str, Any]:
    """Set the smallest weights of each matrix inside the layers to zero, in place: those of the embeddings and of the last layer stay.
    Returns how many are zero."""
    matrices = [module for layer in decoder_layers(model) for module in layer.modules()
                if isinstance(getattr(module, "weight", None), torch.nn.Parameter) and module.weight.dim() == 2]
    for module in matrices:
        torch_prune.l1_unstructured(module, "weight", amount=sparsity)
        torch_prune.remove(module, "weight")
    zeros = sum(int((module.weight == 0).sum()) for module in matrices)
    return {"sparsity": sparsity, "zeros": zeros, "zeros_of_all": round(zeros / sum(p.numel() for p in model.parameters()), 4)}
