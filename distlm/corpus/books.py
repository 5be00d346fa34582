"""The books of a prepare job: each step's, balanced when it ends, and samples of what was rejected."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from distlm.corpus.accounts import Samples, Step, check_balance, write_rejects
from distlm.corpus.inputs import Inputs
from distlm.errors import CorpusError
from distlm.progress import Progress

PLACES = ("place", "same_as")
"""What of a sample is a partition and a row."""


@dataclass
class Books:
    """Every step that is done, in order, and the first rejected records of each reason by their names."""

    folder: Path
    inputs: Inputs
    progress: Progress
    steps: list[Step] = field(default_factory=list)
    samples: Samples = field(default_factory=Samples)

    def add(self, *steps: Step) -> None:
        """Add the books of steps that are done. Raises CorpusError for the first that does not balance, before anything is made of it."""
        for step in steps:
            self.steps.append(step)
            check_balance([one.data({}) for one in self.steps[-2:]], str(self.folder))
            for reason, lost in sorted(step.rejected.items()):
                if lost["documents"]:
                    self.progress.note(f"{lost['documents']:,} document{'s' if lost['documents'] > 1 else ''} rejected: {reason} "
                                       f"({lost['bytes']:,} bytes)")

    def sample_read(self, found: Samples) -> None:
        """Keep samples of records that are known by range and number; there are no others as yet."""
        for reason, kept in found.kept.items():
            self.samples.kept[reason] = [{**self.inputs.record(sample.pop("number"), sample.pop("record")), **sample} for sample in kept]

    def sample(self, found: Sequence[Samples], partitions: Sequence[Path]) -> None:
        """Keep the first samples of documents that are known by partition and row."""
        samples = Samples()
        samples.merge(found, ("place",))
        for reason, kept in samples.kept.items():
            for sample in kept:
                names = {key: self.inputs.place(partitions[value[0]], value[1]) for key, value in sample.items() if key in PLACES}
                rest = {key: value for key, value in sample.items() if key not in PLACES}
                self.samples.add(reason, {**names.pop("place"), **rest, **names})

    def write_samples(self) -> None:
        """Raises StorageError."""
        write_rejects(self.folder / "rejects", self.samples)

    def check_left(self, step: Step) -> None:
        """Raises CorpusError where the step has left nothing."""
        if not step.given["documents"]:
            reasons = {reason: lost["documents"] for step in self.steps for reason, lost in step.rejected.items() if lost["documents"]}
            raise CorpusError(f"no document is left of {self.steps[0].taken['documents']:,}: "
                              + ", ".join(f"{count:,} {reason}" for reason, count in reasons.items()),
                              where=", ".join(source.path for source in self.inputs.spec.sources),
                              remedy=f"{self.folder}/rejects shows samples")
