"""`distlm init`: starter specs, one per kind of job, and the schema with which an editor completes them."""

from importlib import resources
from pathlib import Path

from distlm.errors import InputError
from distlm.storage import write_atomic

SCHEMA = "distlm.schema.json"


def starters() -> dict[str, str]:
    """File name -> text of what `init` writes."""
    package = resources.files("distlm")
    specs = {entry.name: entry.read_text(encoding="utf-8") for entry in (package / "templates").iterdir() if entry.name.endswith(".yaml")}
    return {**dict(sorted(specs.items())), SCHEMA: (package / "spec" / "schema.json").read_text(encoding="utf-8")}


def init(folder: Path) -> list[Path]:
    """Write the starter specs into `folder`. Raises InputError, having written nothing, where it is no folder or one of them exists."""
    if file := next((path for path in (folder, *folder.parents) if path.exists() and not path.is_dir()), None):
        raise InputError("this is a file, and the specs need a folder", where=str(file), remedy="name another folder: `distlm init DIR`")
    files = {folder / name: text for name, text in starters().items()}
    taken = [path.name for path in files if path.exists()]
    if taken:
        raise InputError(f"{', '.join(taken)} would be overwritten", where=str(folder), remedy="name another folder: `distlm init DIR`")
    for path, text in files.items():
        write_atomic(path, text)
    return [*files]
