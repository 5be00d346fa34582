"""What all stages of a prepare job share: what it is asked for, its books, and tasks of which a later attempt repeats none that is done."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from distlm.corpus.books import Books
from distlm.corpus.files import TextFile
from distlm.corpus.identity import attempt_hash
from distlm.corpus.inputs import Inputs
from distlm.corpus.spread import spread
from distlm.progress import Progress
from distlm.spec import PrepareSpec
from distlm.storage import writing

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass
class Job:
    """One attempt at a corpus."""

    spec: PrepareSpec
    rules: dict[str, Any]
    """The manifest's `parameters`."""
    files: list[TextFile]
    folder: Path
    progress: Progress
    workers: int
    inputs: Inputs = field(init=False)
    books: Books = field(init=False)
    scratch: Path = field(init=False)
    """A folder of these rules and files alone: another attempt at the same finds there what this one has done. Every file in it is
    replaced whole, so that a task of a failed attempt that still runs does no harm."""
    figures: dict[str, Any] = field(default_factory=dict)
    """What the manifest tells beside the accounts."""

    def __post_init__(self) -> None:
        self.inputs = Inputs(self.spec, self.files)
        self.books = Books(self.folder, self.inputs, self.progress)
        self.scratch = self.folder / f".scratch-{attempt_hash(self.spec, self.rules, self.inputs.ranges)}"

    def made(self, name: str = "") -> Path:
        """The scratch folder, or one in it, which now exists. Raises StorageError."""
        with writing(self.scratch):
            (self.scratch / name).mkdir(parents=True, exist_ok=True)
        return self.scratch / name

    def each(self, stage: str, function: Callable[[Item], Result], items: Sequence[Item], workers: int | None = None) -> \
            Iterator[tuple[int, Result]]:
        """`spread`, with what an earlier attempt has done; tasks find a folder of the stage's name on the scratch folder."""
        done = sum(1 for _ in (self.scratch / stage).glob("*.pickle"))
        if done:
            self.progress.note(f"{stage}: {done:,} of {len(items):,} parts are done already")
        return spread(function, items, workers or self.workers, self.made(stage))
