"""`kind: average`: one model out of the weights of several."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from distlm.spec.base import Rule
from distlm.spec.evaluate import EvaluateSpec, Scoring


class AverageSpec(Scoring):
    """The mean of the weights of several runs that began with the same weights (Wortsman et al. 2022, "Model soups", arXiv:2203.05482)."""

    kind: Literal["average"] = "average"
    """The kind of the job."""
    models: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=2)]
    """Runs by name or path, or folders that `transformers` loads, all of one shape and one tokenizer: language models, or classifiers
    of the same labels."""
    method: Literal["uniform", "greedy"] = "greedy"
    """uniform: the mean of all. greedy: models are tried in the order of their losses, and each is kept whose mean with those kept before
    has no higher loss (recipe 1)."""

    @model_validator(mode="after")
    def _twice(self) -> "AverageSpec":
        if twice := next((one for i, one in enumerate(self.models) if one in self.models[:i]), None):
            raise Rule("models", f"{twice} is there twice; give it once")
        return self

    def scoring(self, model: str) -> EvaluateSpec:
        """What measures one of the models."""
        shared = {name: getattr(self, name) for name in Scoring.model_fields if name != "storage"}
        return EvaluateSpec(model=model, **shared)
