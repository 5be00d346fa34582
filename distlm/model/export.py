"""A trained model as a folder that transformers and vLLM load with nothing of distlm installed."""

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distlm.errors import DistlmError
from distlm.model.encoder import is_encoder
from distlm.storage import read_json, write_json, writing

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

INDEX = "model.safetensors.index.json"
HEAD_BYTES = 100 << 20
"""The most that the head of a safetensors file may have."""
MODEL_FILES = ("config.json", "generation_config.json", "distlm.json")


def export_model(model: "PreTrainedModel", weights: dict[str, "torch.Tensor"] | None, tokenizer: Path, folder: Path,
                 lineage: dict[str, Any], before: Callable[[Path], None] | None = None) -> None:
    """Write config.json, model.safetensors, generation_config.json, the tokenizer's files and distlm.json (the lineage) to
    `folder`, which appears whole or not at all. One rank calls it. Without `weights` the model's own are written. `tokenizer` may be a
    checkpoint that has one. `before` is called with the folder that will be it, first of all."""
    from transformers import GenerationConfig

    partial = folder.with_name(f".{folder.name}.partial")
    with writing(folder):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        if before:
            before(partial)
        model.save_pretrained(partial, state_dict=weights, safe_serialization=True)
        config = json.loads((partial / "config.json").read_text())
        config["use_cache"] = True                         # training turns the cache off; whoever generates wants it
        write_json(partial / "config.json", config)
        if not model.config.problem_type:                  # a classifier generates nothing
            ends = model.generation_config.eos_token_id    # of a model that ends turns with another token, both
            GenerationConfig(eos_token_id=config.get("eos_token_id") if ends is None else ends, bos_token_id=config.get("bos_token_id"),
                             do_sample=False).save_pretrained(partial)
        for file in tokenizer.iterdir():
            if not of_a_model(file):
                shutil.copy2(file, partial / file.name)
        settings = partial / "tokenizer_config.json"
        padded = model.config.problem_type and not is_encoder(model.config)                # an encoder's padding is its tokenizer's
        if padded and settings.is_file() and (given := read_json(settings)).get("eos_token"):
            write_json(settings, {**given, "pad_token": given["eos_token"]})           # texts that are classified together are padded
        write_json(partial / "distlm.json", lineage)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)


def of_a_model(path: Path) -> bool:
    """Whether a path in a checkpoint is of its model, and not of its tokenizer."""
    return not path.is_file() or path.name in MODEL_FILES or path.name.endswith((".safetensors", ".bin", ".index.json"))


def export_lacks(folder: Path) -> str:
    """Which of config, tokenizer and the files of weights is not there, or not as long as its head says; "" where all are."""
    try:
        weights = weight_files(folder)
        for name in ("config.json", "tokenizer.json", *weights):
            path = folder / name
            if wrong := file_lacks(path, _safetensors_bytes(path) if name in weights and path.is_file() else None):
                return wrong
    except (DistlmError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{folder} cannot be read: {error}"
    return ""


def _safetensors_bytes(path: Path) -> int:
    """The length of a safetensors file by its own head."""
    length, tensors = tensors_of(path)
    return 8 + length + max((tensor["data_offsets"][1] for tensor in tensors.values()), default=0)


def weight_files(folder: Path) -> list[str]:
    """The names of the files of weights that a checkpoint of safetensors has, or should have."""
    index = folder / INDEX
    return sorted(set(read_json(index)["weight_map"].values())) if index.exists() else ["model.safetensors"]


def tensors_of(path: Path) -> tuple[int, dict[str, Any]]:
    """The bytes of a safetensors file's head, and what it says of each tensor, by name. Raises OSError, and ValueError for no such
    file."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        head = json.loads(file.read(min(length, HEAD_BYTES)))
    return length, {name: tensor for name, tensor in head.items() if name != "__metadata__"}


def stored_dtype(folder: Path) -> "torch.dtype | None":
    """The narrowest type that holds every weight of a checkpoint as its files have it, whatever its config.json says; None where they are
    no safetensors."""
    import torch

    kinds = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    files = [folder / name for name in weight_files(folder)]
    names = {tensor["dtype"] for file in files if file.is_file() for tensor in tensors_of(file)[1].values()} & kinds.keys()
    return functools.reduce(torch.promote_types, [kinds[name] for name in names]) if names else None


def file_lacks(path: Path, size: int | None) -> str:
    """Why a file is not there with that many bytes, or at all; "" where it is."""
    if not path.is_file():
        return f"{path} is missing"
    return f"{path} has {path.stat().st_size:,} of {size:,} bytes" if size is not None and path.stat().st_size != size else ""
