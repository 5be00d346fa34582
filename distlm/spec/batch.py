"""The global batch, and how it is cut into micro-batches."""

import math
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from distlm.spec.base import Part, Rule, exactly_one
from distlm.spec.explain import shown


def _micro(value: Any) -> Any:
    if value != "auto" and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise Rule("", f"{shown(value)}: must be a whole number of 1 or more, or auto")
    return value


Micro = Annotated[int | Literal["auto"], BeforeValidator(_micro, json_schema_input_type=Annotated[int, Field(ge=1)] | Literal["auto"])]


class Batch(Part):
    """One optimizer step. Its loss is the sum over all tokens that give loss divided by their count, however it is cut into
    micro-batches."""

    global_tokens: Annotated[int | None, Field(ge=1)] = None
    """Tokens of a step over all workers: a multiple of the context."""
    global_sequences: Annotated[int | None, Field(ge=1)] = None
    """The same as a number of sequences."""
    micro_sequences: Micro | None = None
    """Sequences of one forward pass on one worker. auto tries before the run which is the largest that fits a worker's memory, by steps of
    which nothing is kept. Default: the largest divisor of a worker's share up to 16."""
    mask_documents: bool | None = None
    """Whether attention stays inside a document, whose positions begin at 0 and whose first token gives no loss. Default: true where a
    corpus is packed by best-fit, else false."""

    @model_validator(mode="after")
    def _one(self) -> "Batch":
        exactly_one(self, "global_tokens", "global_sequences")
        return self


def check_batch(global_sequences: int, micro_sequences: int | Literal["auto"] | None, workers: int) -> int:
    """Return the sequences of a micro-batch, for which auto may take another number later. Raises Rule where the global batch cannot be cut
    as the spec asks."""
    if global_sequences % workers:
        low = global_sequences // workers * workers
        near = [n for n in (low, low + workers) if n]
        raise Rule("batch.global_sequences" if workers <= global_sequences else "scale.workers",
                   f"{global_sequences} sequences cannot be divided over {workers} workers; try {' or '.join(map(str, near))} sequences")
    share = global_sequences // workers
    if micro_sequences is None or micro_sequences == "auto":
        return max(n for n in range(1, 17) if share % n == 0)
    if share % micro_sequences:
        small = [n for n in range(1, math.isqrt(share) + 1) if share % n == 0] if share < 1 << 40 else [1]
        divisors = sorted({*small, *(share // n for n in small)}, key=lambda n: abs(math.log(n / micro_sequences)))[:6]
        raise Rule("batch.micro_sequences", f"{micro_sequences} does not divide {global_sequences} sequences over {workers} workers "
                                            f"({share} each); try {', '.join(map(str, sorted(divisors)))}")
    return micro_sequences
