"""The optimizer, the learning rate over time, and what regularizes."""

import re
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from distlm.spec.base import Part, Rule, without_effect

OPTIMIZER_KEYS = {"adamw": ("betas", "eps"), "muon": ("momentum", "betas", "eps"), "lion": ("betas",), "adafactor": ("beta2_decay",),
                  "sgd": ("momentum",)}
"""Keys that only some optimizers read."""
OPTIMIZER_DEFAULTS: dict[str, dict[str, Any]] = {"lion": {"betas": (0.9, 0.99)}, "sgd": {"momentum": 0.9}}
"""Where an optimizer's default is not the field's."""


class ParameterGroup(Part):
    """Parameters that are treated in their own way."""

    match: Annotated[str, Field(min_length=1)]
    """A regular expression that is searched for in the parameters' names, as transformers names them: model.embed_tokens.weight. A
    parameter belongs to the first group that matches it."""
    lr_factor: Annotated[float, Field(ge=0)] = 1.0
    """The learning rate over that of the schedule."""
    weight_decay: Annotated[float | None, Field(ge=0)] = None
    """Decay, of vectors too. Default: optimizer.weight_decay for parameters with two dimensions or more."""

    @model_validator(mode="after")
    def _compiles(self) -> "ParameterGroup":
        try:
            re.compile(self.match)
        except re.error as error:
            raise Rule("match", f"{self.match!r} is no regular expression: {error}") from None
        return self


class Optimizer(Part):
    """How gradients become updates. Weight decay is decoupled (Loshchilov and Hutter 2019), and for matrices alone."""

    name: Literal["adamw", "muon", "lion", "adafactor", "sgd"] = "adamw"
    """adamw; muon for the matrices of hidden layers, of experts each one's, and adamw for the rest (Jordan et al. 2024), scaled so that
    adamw's rate and decay suit it (Liu et al. 2025); lion (Chen et al. 2023); adafactor (Shazeer and Stern 2018); sgd, whose decay is
    added to the gradient."""
    lr: Annotated[float, Field(gt=0)] = 1e-3
    """Peak learning rate; of adafactor, relative to a parameter's root mean square."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """Decay of parameters with two dimensions or more."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    """adamw, muon's adamw, lion: decay rates of the two moments; of lion, of the update and of the momentum, 0.9 and 0.99 by default."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """adamw, muon's adamw: added to the denominator."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """muon, sgd: decay rate of the momentum; 0.9 by default with sgd."""
    beta2_decay: Annotated[float, Field(gt=-1, lt=0)] = -0.8
    """adafactor: at step t the second moment forgets t to the power of this."""
    clip: Annotated[float, Field(ge=0)] = 1.0
    """Largest global gradient norm; 0 turns clipping off. Under ZeRO 1 to 3 the norm that DeepSpeed knows of muon, and that metrics.jsonl
    shows, is the update's: there it must be 0."""
    groups: list[ParameterGroup] = []
    """Parameters with another decay or learning rate than the rest."""

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, data: Any) -> Any:
        return {**OPTIMIZER_DEFAULTS.get(str(data.get("name")), {}), **data} if isinstance(data, dict) else data

    @model_validator(mode="after")
    def _effect(self) -> "Optimizer":
        for key in dict.fromkeys(key for keys in OPTIMIZER_KEYS.values() for key in keys):
            if key not in OPTIMIZER_KEYS[self.name]:
                without_effect(self, f"with {self.name}, whose keys are {', '.join(OPTIMIZER_KEYS[self.name])}", key)
        return self


class Schedule(Part):
    """The learning rate as a function of the step: warm-up, then the named shape."""

    name: Literal["cosine", "linear", "constant", "inverse_sqrt", "wsd"] = "cosine"
    """cosine and linear fall to min_ratio; inverse_sqrt falls with the root of the step; wsd (warm-up, stable, decay) is constant until
    its last part falls linearly."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps over which the rate rises linearly."""
    warmup_tokens: Annotated[int | None, Field(ge=1)] = None
    """The same in tokens, rounded up to whole steps."""
    decay_fraction: Annotated[float, Field(gt=0, le=1)] = 0.2
    """wsd: the share of all steps that decays."""
    min_ratio: Annotated[float, Field(ge=0, le=1)] = 0.1
    """cosine, linear, wsd: the final rate over the peak rate."""

    @model_validator(mode="after")
    def _effect(self) -> "Schedule":
        if self.warmup_tokens is not None and self.warmup_steps:
            raise Rule("warmup_tokens", f"{self.warmup_tokens} stands beside warmup_steps {self.warmup_steps}; leave one of them out")
        if self.name != "wsd":
            without_effect(self, f"with {self.name}: only wsd decays at the end", "decay_fraction")
        if self.name == "constant":
            without_effect(self, "with constant, which does not fall", "min_ratio")
        if self.name == "inverse_sqrt":
            without_effect(self, "with inverse_sqrt, which has no floor", "min_ratio")
        return self

    def in_steps(self, steps: Callable[[int], int]) -> "Schedule":
        """The same schedule with its warm-up counted in steps; `steps` are those that so many tokens take."""
        if self.warmup_tokens is None:
            return self
        return self.model_copy(update={"warmup_tokens": None, "warmup_steps": steps(self.warmup_tokens)})


class Regularization(Part):
    """What keeps a model from fitting its samples too closely. The training loss that is shown is the plain cross-entropy all the same, and
    evaluation uses none of it."""

    dropout: Annotated[float | None, Field(ge=0, lt=1)] = None
    """Share of activations that are set to 0 wherever the model's family can: llama in attention alone, gpt2 after embeddings and layers
    too. Default: 0, or what model.config or the checkpoint of model.from says."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the target's probability that is spread over the whole vocabulary (Szegedy et al. 2016, section 7)."""
    z_loss: Annotated[float, Field(ge=0)] = 0.0
    """Weight of log² Z, the squared logarithm of the softmax's denominator; 1e-4 in PaLM (Chowdhery et al. 2022, section 5)."""


def group_of(name: str, groups: Sequence[ParameterGroup]) -> ParameterGroup | None:
    """The first group that matches a parameter's name."""
    return next((group for group in groups if re.search(group.match, name)), None)


def check_groups(groups: Sequence[ParameterGroup], names: list[str]) -> None:
    """Raises Rule for a group that holds no parameter of a model's `names`."""
    used = [group_of(name, groups) for name in names]
    for i, group in enumerate(groups):
        if not any(one is group for one in used):
            earlier = any(re.search(group.match, name) for name in names)
            raise Rule(f"optimizer.groups.{i}.match",
                       f"{group.match!r} matches only what an earlier group holds; leave it out, or put it first" if earlier else
                       f"{group.match!r} matches no parameter; their names are like {', '.join(names[:1] + names[len(names) // 2:][:1])}")


def check_optimizer(optimizer: Optimizer, zero: int) -> None:
    """Raises Rule where DeepSpeed's sharding would make other steps of an optimizer."""
    if optimizer.name == "adafactor" and zero:
        raise Rule("sharding.zero", f"{zero} flattens matrices, of which adafactor keeps rows and columns; set zero: 0, or take adamw")
    if optimizer.name == "muon" and zero and optimizer.clip:
        raise Rule("optimizer.clip", f"{optimizer.clip:g} would clip muon's orthogonal updates under ZeRO-{zero}, not the gradient; set "
                                     "clip: 0, which muon does not need, or zero: 0")
