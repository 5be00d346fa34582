"""The requests of the OpenAI API. A field is honoured, or refused by name; it is never ignored.

A field that is not supported is still accepted with the value that means "off", because clients send those.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

OFF: dict[str, tuple[Any, ...]] = {
    "presence_penalty": (0,), "frequency_penalty": (0,), "logit_bias": ({},), "suffix": ("",), "best_of": (1,),
    "tools": ([],), "functions": ([],), "tool_choice": ("none", "auto"), "function_call": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},), "modalities": (["text"],), "store": (False,), "metadata": ({},),
    "service_tier": ("auto", "default"), "audio": (), "prediction": (), "reasoning_effort": (), "verbosity": (), "web_search_options": (),
}
"""Fields of OpenAI's that are not supported, with the values besides null that change nothing."""

Count = Annotated[int, Field(ge=0)]
Stop = str | Annotated[list[str], Field(max_length=16)]


def is_off(name: str, value: Any) -> bool:
    """Does this value of a field that is not supported change nothing?"""
    return any(value == off and isinstance(value, bool) == isinstance(off, bool) for off in OFF.get(name, ()))


class StrictModel(BaseModel):
    """Unknown fields and wrong types are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class StreamOptions(StrictModel):
    include_usage: bool = False


class Body(StrictModel):
    """What every request takes."""

    model: str
    user: str | None = None
    """A label of the client's for itself."""

    @model_validator(mode="before")
    @classmethod
    def _without_what_is_off(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {name: value for name, value in data.items() if value is not None and not is_off(name, value)}


class Sampling(Body):
    """What both kinds of completion take."""

    max_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(ge=0, le=1)] = 1.0
    seed: int | None = None
    stop: Stop | None = None
    n: Annotated[int, Field(ge=1, le=128)] = 1
    stream: bool = False
    stream_options: StreamOptions | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        return () if self.stop is None else (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def limit(self) -> int | None:
        """Tokens that the client allows."""
        return self.max_tokens

    @property
    def num_top(self) -> int | None:
        """Alternatives to report for each token."""
        raise NotImplementedError

    def conflict(self) -> tuple[str, str] | None:
        """(field, rule) of a rule between fields that is broken."""
        if self.stream_options is not None and not self.stream:
            return "stream_options", "only goes with stream: true"
        if "" in self.stops:
            return "stop", "must not hold an empty string"
        return None


class CompletionRequest(Sampling):
    """POST /v1/completions"""

    prompt: str | Annotated[list[str], Field(min_length=1, max_length=2048)] | Annotated[list[int], Field(min_length=1)] | Annotated[
        list[Annotated[list[int], Field(min_length=1)]], Field(min_length=1, max_length=2048)]
    echo: bool = False
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    return_tokens_as_token_ids: bool = False
    """Write the tokens of logprobs as `token_id:17`, since several tokens may have one text; vLLM's name for it."""

    @property
    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)

    @property
    def num_top(self) -> int | None:
        return self.logprobs

    def conflict(self) -> tuple[str, str] | None:
        if self.max_tokens == 0 and not self.echo:
            return "max_tokens", "can be 0 only with echo: true"
        return super().conflict()


class ClassifyRequest(Body):
    """POST /v1/classify"""

    input: str | Annotated[list[str], Field(min_length=1, max_length=2048)] | Annotated[list[int], Field(min_length=1)] | Annotated[
        list[Annotated[list[int], Field(min_length=1)]], Field(min_length=1, max_length=2048)]
    use_activation: bool = True
    """false: the logits of the labels in place of their probabilities; vLLM's name for it."""

    @property
    def texts(self) -> list[str | list[int]]:
        if isinstance(self.input, str) or isinstance(self.input[0], int):
            return [self.input]
        return list(self.input)


class TextPart(StrictModel):
    type: Literal["text"]
    text: str


class Message(StrictModel):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[TextPart]

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {name: value for name, value in data.items() if name == "content" or (value is not None and value != [])}

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(Sampling):
    """POST /v1/chat/completions"""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @property
    def limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def num_top(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    def conflict(self) -> tuple[str, str] | None:
        if None is not self.max_tokens != self.max_completion_tokens is not None:
            return "max_tokens", "differs from max_completion_tokens, which has taken its place: give one"
        if self.top_logprobs is not None and not self.logprobs:
            return "top_logprobs", "only goes with logprobs: true"
        return super().conflict()
