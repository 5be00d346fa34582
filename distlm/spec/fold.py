"""One fold of a cross-validation."""

from typing import TYPE_CHECKING, Annotated

from pydantic import Field, model_validator

from distlm.spec.base import Part, Rule
from distlm.spec.mixture import Mixture

if TYPE_CHECKING:
    from distlm.spec.train import TrainSpec

MOST_FOLDS = 100


class Fold(Part):
    """With objective: classify, the documents of training and validation divided anew, by the hashes of their contents: each is held out
    for validation in one fold, and trained on in all others."""

    index: Annotated[int, Field(ge=0)]
    """The fold that is held out, from 0."""
    of: Annotated[int, Field(ge=2, le=MOST_FOLDS)]
    """How many folds there are."""

    @model_validator(mode="after")
    def _one_of_them(self) -> "Fold":
        if self.index >= self.of:
            raise Rule("index", f"{self.index}: the folds of {self.of} are 0 to {self.of - 1}")
        return self


def check_fold(spec: "TrainSpec") -> None:
    """Raises Rule where documents cannot be divided so."""
    if spec.fold is None:
        return
    if spec.objective != "classify":
        raise Rule("fold", f"is for objective: classify, whose documents have windows of their own, not for {spec.objective}; leave it out")
    if isinstance(spec.corpus, Mixture):
        raise Rule("fold", "divides one corpus, not a mixture; prepare its texts as one corpus of several sources")
