"""What a run trains on: one corpus, or several by weight."""

from typing import Annotated, Any

from pydantic import Field, model_validator

from distlm.spec.base import Part, Rule, without_effect
from distlm.spec.explain import shown

CorpusName = Annotated[str, Field(min_length=1)]


class Share(Part):
    """One corpus of a mixture."""

    corpus: CorpusName
    """A prepared corpus, by name or path; all of a mixture have the same context and tokenizer."""
    weight: Annotated[float, Field(ge=0)]
    """Its share of the samples, relative to the sum of all weights: 0.7 and 0.3 are the same as 7 and 3."""
    epochs: Annotated[float | None, Field(gt=0)] = None
    """At most so many passes over its training split: a longer duration is refused. Default: as many as it takes."""
    final_weight: Annotated[float | None, Field(ge=0)] = None
    """Its weight at the end; given for every corpus of the mixture or for none. Default: the weights stay as they are."""

    @model_validator(mode="after")
    def _used(self) -> "Share":
        if not self.weight and not self.final_weight:
            raise Rule("weight", "0 would take no sample of this corpus; leave it out, or give it a final_weight")
        return self


Shares = Annotated[list[Share], Field(min_length=1)]


class Mixture(Part):
    """Several corpora of which every batch takes its samples in proportion. A plain list stands for `{mix: ...}`."""

    mix: Shares
    """The corpora, each with its weight."""
    anneal_fraction: Annotated[float, Field(gt=0, le=1)] = 0.2
    """With final_weight: the share of all samples, at the end, over which the weights change linearly from weight to final_weight."""

    @model_validator(mode="after")
    def _rules(self) -> "Mixture":
        names = [share.corpus for share in self.mix]
        for i, share in enumerate(self.mix):
            if share.corpus in names[:i]:
                raise Rule("mix", f"{share.corpus} is there twice; give it once, with the sum of the weights")
        finals = [share.final_weight for share in self.mix if share.final_weight is not None]
        if finals and len(finals) < len(self.mix):
            missing = next(share.corpus for share in self.mix if share.final_weight is None)
            raise Rule("mix", f"{missing} has no final_weight and others have; give one to each corpus, or to none")
        if finals and not sum(finals):
            raise Rule("mix", "every final_weight is 0; one at least must be above it")
        if not sum(share.weight for share in self.mix):
            raise Rule("mix", "every weight is 0; one at least must be above it")
        if not finals:
            without_effect(self, "where no corpus has a final_weight", "anneal_fraction")
        return self


def mixture(value: Any) -> Any:
    """A mapping or a list is a mixture, and its mistakes stand where they are, not under each form that a corpus can have."""
    if isinstance(value, dict | list):
        return Mixture.model_validate({"mix": value} if isinstance(value, list) else value, by_alias=True, by_name=False)
    if value == "":
        raise Rule("", "'': must not be empty")
    if not isinstance(value, str | Mixture):
        raise Rule("", f"{shown(value)}: must be text, or a list of sections with corpus and weight; a number is put in quotes")
    return value
