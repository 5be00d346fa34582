"""What several commands are given, and what a shell completes."""

from pathlib import Path
from typing import Annotated

import typer


def names(incomplete: str) -> list[str]:
    """Names of jobs, for shell completion."""
    from distlm.storage import FOLDERS, Storage

    root = Storage.find().root
    return sorted({path.name for kind in FOLDERS.values() for path in (root / kind).glob(f"{incomplete}*") if path.is_dir()})


def specs(incomplete: str) -> list[str]:
    """Spec files, for shell completion."""
    folder = Path(incomplete).parent if incomplete else Path(".")
    return sorted(str(path) + ("/" if path.is_dir() else "") for path in folder.glob("*")
                  if (path.is_dir() or path.suffix in (".yaml", ".yml")) and str(path).startswith(incomplete))


SpecFile = Annotated[Path, typer.Argument(metavar="SPEC", help="A spec file.", autocompletion=specs)]
Sets = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a value; may be given several times.")]
Name = Annotated[str, typer.Argument(metavar="NAME", help="A job's name, kind/NAME as in runs/NAME, or its folder.",
                                     autocompletion=names)]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the job of this name.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
