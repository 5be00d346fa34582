"""Where a model lies that a spec names: a run by name or path, or a folder of `transformers`."""

import contextlib
from pathlib import Path

from distlm.errors import InputError, StorageError
from distlm.runs import RunFolder
from distlm.spec.load import nearest
from distlm.storage import Storage


def find_model(text: str, storage: Storage, key: str = "model") -> Path:
    """The folder to load, one with a config.json: a run's export, or the folder itself. `key` is the spec's key, for the error.
    Raises InputError with the nearest name."""
    run = None
    with contextlib.suppress(StorageError):                # an absolute path, or one with ..
        run = storage.run(text)
    for place in [run, Path(text).expanduser().absolute()]:
        if place is None or not place.is_dir():
            continue
        if (place / "export" / "config.json").exists():
            return place / "export"
        if (place / "config.json").exists():
            return place
        raise InputError("the run has no export" if RunFolder(place).exists() else "there is no config.json in this folder",
                         where=f"{key}: {place}", remedy="`distlm runs` shows whether the run has ended well" if RunFolder(place).exists()
                         else "name a run, or a folder that AutoModelForCausalLM.from_pretrained loads")
    runs = storage.run("x").parent
    near = nearest(text, [path.name for path in runs.iterdir()] if runs.is_dir() else [])
    raise InputError(f"there is no run and no folder {text!r}", where=key, remedy=f"did you mean {near}?" if near else
                     f"the runs are in {runs}")
