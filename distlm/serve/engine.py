"""What the API asks of an engine, and what it gets back.

    async for index, chunk in engine.generate([Request(prompt=(1, 2, 3), max_tokens=16)]):
        ...                                               # chunk.text; the last one has a finish_reason
"""

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from distlm.errors import ServeError

NONFINITE = "nonfinite_logits"
"""The code by which the API tells of NotFinite."""


class EngineFull(ServeError):
    """As many requests wait as may: the client should come again."""


class EngineFailed(ServeError):
    """The engine's thread has died: no request will be answered."""


class NoMemory(ServeError):
    """There is no memory for this request: others are answered."""

    cause = "oom"


class NotFinite(ServeError):
    """What the model makes of this request is no number: others are answered."""

    cause = "nonfinite_loss"


@dataclass(frozen=True)
class Request:
    """One sequence to continue."""

    prompt: tuple[int, ...]
    """At least one token."""
    max_tokens: int
    """0 only scores the prompt, which may then have one token more than the context: nothing follows its last one."""
    temperature: float = 0.0
    """0 takes the likeliest token, as `generate(do_sample=False)` does."""
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    """The text ends before the first of these."""
    logprobs: int | None = None
    """Alternatives to report for each token; 0 reports the chosen token alone, None nothing."""
    echo: bool = False
    """The prompt's text, and with `logprobs` its tokens, come first."""
    adapter: str = ""
    """Which of the engine's adapters; "" for the model without one."""


@dataclass(frozen=True)
class Token:
    """A token with its log-probability in nats under the model itself, before temperature and top_p."""

    id: int
    logprob: float | None
    """None for the first token of a prompt, which nothing predicts."""
    top: tuple[tuple[int, float], ...]
    """The likeliest tokens, best first."""


@dataclass(frozen=True)
class Chunk:
    """What one step added to a sequence."""

    text: str
    """Whole characters only; may be empty."""
    ids: tuple[int, ...] = ()
    """The generated tokens, an end token too."""
    tokens: tuple[Token, ...] = ()
    """Where logprobs were asked for: those of the prompt with `echo`, then those of `ids`."""
    finish_reason: str | None = None
    """stop (end token or stop string) or length, in the last chunk."""


@runtime_checkable
class Classifier(Protocol):
    """A model that says which labels texts have."""

    tokenizer: Any
    context: int
    """Tokens of a text, at most."""
    vocabulary: int
    vocabulary_hash: str | None
    """What stands for the tokenizer's vocabulary, as model/vocabulary.py has it."""
    labels: list[str]
    multiple: bool
    """Whether a text may have any number of labels."""
    cut_tokens: int | None
    """Tokens to which documents were cut, and longer texts are; None where these are refused."""
    before: tuple[int, ...]
    """Special tokens that the engine puts before a text; none where it puts none around it."""

    def encode(self, text: str) -> list[int]:
        """The tokens that a document of this text was trained on as: cleaned as that was, and without special tokens."""

    async def classify(self, texts: Sequence[Sequence[int]], activation: bool = True) -> list[dict[str, float]]:
        """The probability of each label of each text, given as its tokens, one at least and `context` at most. Those of a text add up to 1,
        unless it may have several labels. Without `activation` the logits that they come of. Raises EngineFull, EngineFailed, NoMemory,
        NotFinite."""

    def check(self) -> None:
        """Raises EngineFailed where no request can be answered any more."""


@dataclass(frozen=True)
class Variant:
    """The model with an adapter, as far as it differs from the model without."""

    tokenizer: Any
    vocabulary_hash: str | None
    ends: frozenset[int] = frozenset()
    """Tokens that end a sequence, beside those that end the model's."""


class Engine(Protocol):
    """A model that answers many requests at once."""

    tokenizer: Any
    context: int
    """Tokens of prompt and completion together, at most."""
    vocabulary: int
    vocabulary_hash: str | None
    """What stands for the tokenizer's vocabulary, as model/vocabulary.py has it."""
    adapters: Mapping[str, Variant]
    """By name."""

    def generate(self, requests: Sequence[Request]) -> AsyncIterator[tuple[int, Chunk]]:
        """Chunks with the place of their request. Closing the iterator cancels what is left. Raises EngineFull, EngineFailed,
        NoMemory."""

    def check(self) -> None:
        """Raises EngineFailed where no request can be answered any more."""
