"""The mean of checkpoints, file by file, without building a model.

    check_alike(folders, "models")
    write_mean(folders, run / "export", lineage)
"""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distlm.corpus.manifest import TOKENIZER_FILES
from distlm.errors import InputError
from distlm.model.build import DROPOUTS
from distlm.model.export import INDEX, tensors_of, weight_files
from distlm.model.vocabulary import vocabulary_hash
from distlm.storage import read_json, write_json, writing

IDLE = ("_name_or_path", "transformers_version", "use_cache", "dtype", "torch_dtype", "initializer_range", *DROPOUTS)
"""Keys of a config.json that do not decide what a model computes of its weights."""
FLOATS = ("F64", "F32", "F16", "BF16")
"""What of the types of safetensors has a mean."""
COPIED = ("config.json", "generation_config.json", *TOKENIZER_FILES)


def check_alike(folders: Sequence[Path], key: str) -> None:
    """Raises InputError where a checkpoint has another configuration, other weights or another tokenizer than the first. `key` is the
    spec's key of the list, for the error."""
    first = folders[0]
    ours, shapes, words = _settings(first), weights_of(first, f"{key}.0: {first}"), vocabulary_hash(first)
    if name := next((name for name, text in shapes.items() if text.split("[")[0] not in FLOATS), ""):
        raise InputError(f"its weights {name} are {shapes[name]}, which have no mean", where=f"{key}.0: {first}", remedy="leave it out")
    for i, other in enumerate(folders[1:], 1):
        where, theirs = f"{key}.{i}: {other}", _settings(other)
        if name := next((name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)), ""):
            raise InputError(f"its {name} is {theirs.get(name)!r}, and that of {first} {ours.get(name)!r}", where=where,
                             remedy="only models of one shape have a mean; leave it out")
        found = weights_of(other, where)
        if name := next((name for name in {**shapes, **found} if shapes.get(name) != found.get(name)), ""):
            raise InputError(f"its weights {name} are {found.get(name, 'not there')}, and in {first} {shapes.get(name, 'not there')}",
                             where=where, remedy="only models of one shape have a mean; leave it out")
        if vocabulary_hash(other) != words:
            raise InputError(f"its tokenizer is not that of {first}", where=where, remedy="leave it out")


def _settings(folder: Path) -> dict[str, Any]:
    return {key: value for key, value in read_json(folder / "config.json").items() if key not in IDLE}


def files_of(folder: Path, where: str) -> list[Path]:
    """The files of weights of a checkpoint. Raises InputError where they are no safetensors."""
    names = weight_files(folder)
    if missing := next((name for name in names if not (folder / name).is_file()), ""):
        raise InputError(f"there is no {missing}", where=where, remedy="name a run, or a checkpoint with safetensors")
    return [folder / name for name in names]


def weights_of(folder: Path, where: str) -> dict[str, str]:
    """Shape and type of every tensor of a checkpoint, as text, by its name."""
    found: dict[str, str] = {}
    for file in files_of(folder, where):
        try:
            _, tensors = tensors_of(file)
        except (OSError, ValueError) as error:
            raise InputError(f"{file.name} cannot be read: {error}", where=where, remedy="copy the checkpoint again") from None
        found |= {name: f"{tensor['dtype']}{tensor['shape']}" for name, tensor in tensors.items()}
    return found


def write_mean(folders: Sequence[Path], target: Path, lineage: dict[str, Any]) -> None:
    """Write a checkpoint whose weights are the mean of those of `folders`, which are alike: added up in float32 in their order, stored in
    the type of the first. All else is the first's. `target` appears whole or not at all. Raises StorageError."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    partial = target.with_name(f".{target.name}.partial")
    with writing(target):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        holders = [{name: file for file in files_of(folder, str(folder)) for name in _names(file)} for folder in folders]
        for file in files_of(folders[0], str(folders[0])):
            means: dict[str, Any] = {}
            for name in _names(file):
                total: Any = 0
                for holder in holders:
                    with safe_open(holder[name], "pt") as opened:
                        tensor = opened.get_tensor(name)
                    total = total + tensor.float()
                means[name] = (total / len(folders)).to(tensor.dtype)
            save_file(means, partial / file.name, metadata={"format": "pt"})
        for name in (*COPIED, INDEX):
            if (folders[0] / name).is_file():
                shutil.copy2(folders[0] / name, partial / name)
        write_json(partial / "distlm.json", lineage)
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)


def _names(file: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        return list(opened.keys())
