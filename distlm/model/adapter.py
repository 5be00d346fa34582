"""Low-rank adapters (Hu et al. 2021; Liu et al. 2024) by peft: put into a model, taken out of it, merged.

    add_adapter(model, spec.adapter, seed=0)               # in place; the base no longer wants gradients
    save_adapter(model, weights, source, folder)           # what PeftModel.from_pretrained loads
    put_adapter(model, weights)                            # those that were trained
    merge(model)                                           # in place: the model is a plain one again
"""

import hashlib
import importlib
import importlib.util
import inspect
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from distlm.errors import SpecError
from distlm.model.build import HEAD, head_names, last_line, skeleton
from distlm.model.encoder import is_encoder
from distlm.spec.adapter import Adapter

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

NAME = "default"
"""peft's own name for an adapter of which there is one."""


def add_adapter(model: "PreTrainedModel", adapter: Adapter, seed: int, compiled: bool = False) -> None:
    """Put an adapter that changes nothing yet into the model, which then has it alone to train; a classifier's head, which may be drawn at
    random, is trained whole beside it. A is drawn from `seed`. `compiled`: the model's layers will be. Raises SpecError where peft
    is not installed, no module is the target, or one that cannot be: that layer, or one whose matrix is another's too; and what
    `check_dora` raises."""
    if importlib.util.find_spec("peft") is None:
        raise SpecError("the package peft is not installed", where="adapter", remedy="pip install 'distlm[adapters]'")
    import torch
    from peft import LoraConfig, inject_adapter_in_model

    options: dict[str, Any] = {"lora_alpha": adapter.alpha, "target_modules": adapter.target_modules,
                               "task_type": "SEQ_CLS" if model.config.problem_type else "CAUSAL_LM"}
    if is_encoder(model.config):                           # heads of several layers
        options["exclude_modules"] = [name.rpartition(".")[0] for name in sorted(head_names(model)) if name.endswith(".weight")]
    shared = _shared(model)
    config = LoraConfig(r=adapter.rank, lora_dropout=adapter.dropout, use_dora=adapter.method == "dora", **options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            inject_adapter_in_model(config, model)
        except (ValueError, TypeError) as error:
            names = sorted({name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)})
            raise SpecError(f"peft cannot put an adapter there: {last_line(error)}", where="adapter.target_modules",
                            remedy=f"the model's linear layers are {', '.join(names)}" if names else "") from None
    from peft.tuners.tuners_utils import BaseTunerLayer

    tied = [name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer) and name in shared]
    if tied:
        raise SpecError(f"the matrix of {tied[0]} is that of {shared[tied[0]]} too, which merging would change with it",
                        where="adapter.target_modules", remedy="name other layers")
    if model.config.problem_type:
        head = head_names(model)
        if not head <= dict(model.named_parameters()).keys():
            raise SpecError(f"the last layer of a classifier, {HEAD.removesuffix('.weight')}, is trained whole",
                            where="adapter.target_modules", remedy="name other layers")
        for name in head:
            model.get_parameter(name).requires_grad_(True)
    if adapter.method == "dora" and compiled:
        _let_dora_compile()


FOLLOWED = ("get_weight_norm", "get_lora_weight")
"""Methods of peft's DoRA layer around which a cache is emptied."""


def check_dora() -> None:
    """Raises SpecError where peft's DoRA is not one that torch.compile can be let follow."""
    dora: Any = importlib.import_module("peft.tuners.lora.dora")
    lacking = [name for name in FOLLOWED if not hasattr(dora.DoraLinearLayer, name)]
    if lacking:
        raise SpecError(f"DoRA cannot be compiled with peft {version('peft')}, which has no {lacking[0]}", where="compile",
                        remedy="leave it out, or pip install 'distlm[adapters]' for a peft that is known")


def _let_dora_compile() -> None:
    """Let torch.compile follow peft's DoRA, of this whole process, which it would leave uncompiled without a word: there a cache is emptied
    at each pass that nothing is ever put into, and the name of the weights' module is asked for. What is computed is the same."""
    check_dora()
    dora: Any = importlib.import_module("peft.tuners.lora.dora")
    dora.dequantize_module_weight = held_weight
    for name in FOLLOWED:
        setattr(dora.DoraLinearLayer, name, inspect.unwrap(getattr(dora.DoraLinearLayer, name)))


def held_weight(layer: Any) -> "torch.Tensor":
    """The matrix of a base's layer, in the precision that is computed in where it is held in NF4."""
    weight: torch.Tensor = layer.weight
    state = getattr(weight, "quant_state", None)
    if state is None:
        return weight
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight, state)


def _shared(model: "PreTrainedModel") -> dict[str, str]:
    """Of each module whose matrix is another's too, the name of that one: a last layer that is tied to the embeddings, and these."""
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name.rpartition(".")[0])
    return {name: names[i - 1] for names in owners.values() if len(names) > 1 for i, name in enumerate(names)}


def adapter_sizes(config: "PreTrainedConfig", adapter: Adapter) -> dict[str, int]:
    """The elements of each parameter that is trained with an adapter for a model of this configuration, by name. Raises SpecError."""
    model = skeleton(config)
    add_adapter(model, adapter, 0)
    return {name: parameter.numel() for name, parameter in model.named_parameters() if parameter.requires_grad}


def put_adapter(model: "PreTrainedModel", weights: "dict[str, torch.Tensor]") -> None:
    """Give what is trained of a model these `weights`, in the precision that they have, whatever that of the model is."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = weights[name].to(parameter.device)


def merge(model: "PreTrainedModel") -> None:
    """Add the adapter to the matrices that it changes, and take it out. With an adapter in float32 a sum is made in float32, and rounded
    once to what the matrix is held in, as is the head of a classifier."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()
            model.set_submodule(name, module.get_base_layer())
    if model.config.problem_type:
        embeddings: Any = model.get_input_embeddings()
        for name in head_names(model):
            parameter = model.get_parameter(name)
            parameter.data = parameter.data.to(embeddings.weight.dtype)
    vars(model).pop("peft_config", None)


def save_adapter(model: "PreTrainedModel", weights: "dict[str, torch.Tensor]", source: str, folder: Path) -> None:
    """Write an adapter's `weights`, by their names in the model that has it, as peft does: adapter_config.json and
    adapter_model.safetensors. The head of a classifier is among them."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    config: Any = model.peft_config[NAME]
    config.base_model_name_or_path, config.inference_mode = source, True
    head = {name: weights[name] for name in sorted(head_names(model) & weights.keys())} if model.config.problem_type else {}
    base = f"{model.base_model_prefix}."
    config.modules_to_save = sorted({name.removeprefix(base).partition(".")[0] for name in head}) or None
    config.exclude_modules = None                          # which is for where they are put
    config.save_pretrained(str(folder))
    found = {**get_peft_model_state_dict(model, state_dict=weights, adapter_name=NAME), **head}
    save_file({f"base_model.model.{name}": value.contiguous() for name, value in found.items()}, folder / "adapter_model.safetensors",
              metadata={"format": "pt"})


def base_hash(source: str) -> str:
    """A hash over the files of weights of a checkpoint: an adapter belongs to them."""
    digest = hashlib.sha256()
    for file in sorted([*Path(source).glob("*.safetensors"), *Path(source).glob("*.bin")]):
        whole = xxhash.xxh3_128()
        with file.open("rb") as stream:
            while block := stream.read(1 << 24):
                whole.update(block)
        digest.update(f"{file.name} {whole.hexdigest()}\n".encode())
    return digest.hexdigest()
