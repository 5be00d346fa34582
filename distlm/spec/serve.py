"""`kind: serve`: an OpenAI-compatible endpoint over an exported model."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from distlm.spec.base import Job, Name, Rule

ROUTES = ("v1", "health", "metrics", "docs", "openapi.json")
"""The first path segments of an endpoint: where a cluster has several, /<name> must be none of these."""


class ServeSpec(Job):
    """From a run to an endpoint."""

    kind: Literal["serve"] = "serve"
    """The kind of the job."""
    model: str
    """A run by name or path, or a folder that `AutoModelForCausalLM.from_pretrained` loads."""
    adapters: dict[Name, Annotated[str, Field(min_length=1)]] = {}
    """Low-rank adapters of this model by the names that requests choose them by: runs with `adapter:`, or folders of peft's. Requests for
    the model and for each of them are decoded together."""
    host: Annotated[str, Field(min_length=1)] = "127.0.0.1"
    """The address that the endpoint listens on."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """The port; 0 takes a free one."""
    api_key_file: str | None = None
    """A file of mode 600 with the key that clients send. Default: made in the endpoint's folder."""
    replicas: Annotated[int, Field(ge=1)] = 1
    """Copies of the model."""
    gpus_per_replica: Annotated[float, Field(ge=0)] = 0
    """GPUs of one replica; 0 serves on CPU."""
    cpus_per_replica: Annotated[float, Field(ge=0)] = 1
    """Logical CPUs that one replica reserves."""
    threads: Annotated[int | None, Field(ge=1)] = None
    """Threads of a replica's matrix products. Default: the node's cores over the replicas."""
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic; auto: bf16 on GPU, fp32 on CPU."""
    max_sequences: Annotated[int, Field(ge=1)] = 8
    """Requests that one replica decodes together."""
    max_queued: Annotated[int, Field(ge=0)] = 64
    """Requests that wait for a place; more are answered 429."""
    max_tokens: Annotated[int, Field(ge=1)] = 128
    """Tokens of a completion where the request does not say."""

    @model_validator(mode="after")
    def _name(self) -> "ServeSpec":
        if self.name in ROUTES:
            raise Rule("name", f"an endpoint named {self.name} would hide the path /{self.name} of another; take another name")
        if self.name in self.adapters:
            raise Rule(f"adapters.{self.name}", "is the name by which requests choose the model without an adapter; take another name")
        return self
