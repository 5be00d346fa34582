"""Where a model lies that a spec names: a run by name or path, or a folder of `transformers`; and whether it can be read and trained."""

import contextlib
import importlib.util
from pathlib import Path
from typing import Any

from distlm.errors import InputError, SpecError, StorageError
from distlm.runs import RunFolder
from distlm.spec.load import nearest
from distlm.storage import Storage, read_json

MAKERS = ("train", "compress")
"""The kinds of jobs whose folders have an export."""
TORCHAO = "pip install 'distlm[compress]'"


def find_model(text: str, storage: Storage, key: str = "model") -> Path:
    """The folder to load, one with a config.json: the export of a run or of what was made of one, or the folder itself. `key` is the
    spec's key, for the error. Raises InputError with the nearest name, and for a name that several have."""
    named: list[Path] = []
    with contextlib.suppress(StorageError):                # an absolute path, or one with ..
        named = [place for kind in MAKERS if (place := storage.folder(kind, text)).is_dir()]
    if len(named) > 1:
        raise InputError(f"there are {' and '.join(map(str, named))}", where=f"{key}: {text}", remedy="name one of them by its path")
    for place in [*named, Path(text).expanduser().absolute()]:
        if not place.is_dir():
            continue
        if (place / "export" / "config.json").exists():
            return place / "export"
        if (place / "config.json").exists():
            return place
        raise InputError("the run has no export" if RunFolder(place).exists() else "there is no config.json in this folder",
                         where=f"{key}: {place}", remedy="`distlm runs` shows whether the run has ended well" if RunFolder(place).exists()
                         else "name a run, or a folder that AutoModelForCausalLM.from_pretrained loads")
    runs = [storage.folder(kind, "x").parent for kind in MAKERS]
    near = nearest(text, [path.name for folder in runs if folder.is_dir() for path in folder.iterdir()])
    raise InputError(f"there is no run and no folder {text!r}", where=key, remedy=f"did you mean {near}?" if near else
                     f"the runs are in {runs[0]}")


def check_name(kind: str, name: str, storage: Storage) -> None:
    """Raises InputError where the model that a job leaves would have the name of one that a job of another kind has left: `find_model`
    could not tell them apart. A job that has begun goes on."""
    mine, places = storage.folder(kind, name), [storage.folder(maker, name) for maker in MAKERS]
    if mine not in places or (RunFolder(mine).exists() and RunFolder(mine).state()[0] != "queued"):
        return
    if any(place != mine and place.is_dir() for place in places):
        what = "a run" if kind == "compress" else "a compressed model"
        raise InputError(f"there is {what} of this name, and {name} would stand for both", where="name", remedy="take another name")


def quantization_of(folder: Path) -> dict[str, Any]:
    """How the weights of a checkpoint are quantized, by its config.json; empty where they are not."""
    return dict(read_json(folder / "config.json").get("quantization_config") or {})


def check_loadable(folder: Path, key: str = "model") -> None:
    """Raises InputError for a checkpoint of quantized weights that only an absent package reads."""
    if quantization_of(folder).get("quant_method") == "torchao" and importlib.util.find_spec("torchao") is None:
        raise InputError("its weights are quantized by torchao, which is not installed", where=f"{key}: {folder}", remedy=TORCHAO)


def check_whole(folder: Path, key: str = "model") -> None:
    """Raises InputError for a checkpoint of quantized weights, which have no gradient and are not rounded twice."""
    if quantization_of(folder):
        raise InputError("its weights are quantized", where=f"{key}: {folder}", remedy="take the model that it was made from")


def check_torchao(key: str = "method") -> None:
    """Raises SpecError where torchao is not installed."""
    if importlib.util.find_spec("torchao") is None:
        raise SpecError("the package torchao is not installed", where=key, remedy=TORCHAO)
