"""What a prepare job puts into its folder, and how what an attempt leaves there is taken back or cleared away."""

import shutil
from pathlib import Path

from distlm.corpus.manifest import FILE, FILES, INPUTS
from distlm.storage import writing

MADE = (FILE, INPUTS, "train", "val", "test", *FILES)
"""What a prepare job makes, the manifest first: it goes first where the rest is to be made again. `rejects` come last."""


def take_back(folder: Path, scratch: Path) -> None:
    """Put what an attempt that was killed while it committed has moved out of its scratch folder back there."""
    for name in ("tokenizer", "train", "val", "test"):
        if scratch.is_dir() and (folder / name).is_dir() and not (folder / FILE).exists():
            with writing(folder / name):
                shutil.rmtree(scratch / name, ignore_errors=True)
                (folder / name).rename(scratch / name)


def clear(folder: Path, *patterns: str, but: Path | None = None) -> None:
    """Remove what matches, and the scratch folders of other attempts than `but`."""
    others = [path for path in folder.glob(".scratch-*") if but and path != but]
    for path in others + [path for pattern in patterns for path in folder.glob(pattern)]:
        if not path.is_dir():
            with writing(path):
                path.unlink(missing_ok=True)
        for _ in range(100):                               # a task that still runs may put a file there once more
            if not path.exists():
                break
            shutil.rmtree(path, ignore_errors=True)
