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


class BatchWarmup(Part):
    """Smaller batches at the beginning, whose gradients are no noisier where the loss still falls fast (Brown et al. 2020, appendix B;
    McCandlish et al. 2018). A step's size rises from start_sequences by increment_sequences; every size has the same tokens, up to whole
    steps. The learning rate is what the schedule says for the step."""

    start_sequences: Annotated[int, Field(ge=1)]
    """Sequences of the first step."""
    increment_sequences: Annotated[int | None, Field(ge=1)] = None
    """Sequences by which it rises. Default: start_sequences."""
    tokens: Annotated[int, Field(ge=1)]
    """Tokens after which the batch is whole."""

    @property
    def increment(self) -> int:
        """Sequences by which a step's size rises."""
        return self.increment_sequences or self.start_sequences

    def sizes(self, global_sequences: int) -> range:
        """Sequences of a step before it has `global_sequences`."""
        return range(self.start_sequences, global_sequences, self.increment)

    def stages(self, global_sequences: int, context: int) -> tuple[tuple[int, int], ...]:
        """(sequences of a step, steps of that size) until the batch is whole."""
        sizes = self.sizes(global_sequences)
        return tuple((one, math.ceil(self.tokens / len(sizes) / (one * context))) for one in sizes)


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
    warmup: BatchWarmup | None = None
    """Smaller batches at the beginning. Left out, all have the same size."""
    mask_documents: bool | None = None
    """Whether attention stays inside a document, whose positions begin at 0 and whose first token gives no loss. Default: true where a
    corpus is packed by best-fit, else false."""

    @model_validator(mode="after")
    def _one(self) -> "Batch":
        exactly_one(self, "global_tokens", "global_sequences")
        return self


def check_batch(global_sequences: int, batch: Batch, workers: int) -> int:
    """Return the sequences of a micro-batch, for which auto may take another number later. Raises Rule where the global batch, or a smaller
    one of its warm-up, cannot be cut as the spec asks."""
    if global_sequences % workers:
        low = global_sequences // workers * workers
        near = [n for n in (low, low + workers) if n]
        raise Rule("batch.global_sequences" if workers <= global_sequences else "scale.workers",
                   f"{global_sequences} sequences cannot be divided over {workers} workers; try {' or '.join(map(str, near))} sequences")
    share, micro = global_sequences // workers, batch.micro_sequences
    if warmup := batch.warmup:
        _check_warmup(warmup, global_sequences, workers)
        share = math.gcd(share, warmup.start_sequences // workers, warmup.increment // workers)
    if micro is None or micro == "auto":
        return max(n for n in range(1, 17) if share % n == 0)
    if share % micro:
        near = sorted(divisors(share), key=lambda n: abs(math.log(n / micro)))[:6]
        what = (f"{global_sequences} sequences over {workers} workers ({share} each)" if share == global_sequences // workers else
                f"the {share * workers} sequences by which the steps of batch.warmup differ, over {workers} workers ({share} each)")
        raise Rule("batch.micro_sequences", f"{micro} does not divide {what}; try {', '.join(map(str, sorted(near)))}")
    return micro


def divisors(number: int) -> list[int]:
    """Of a number of sequences, in rising order; beyond 2^40, which takes too long, those up to 2^20 and what they are divided into."""
    below = [n for n in range(1, min(math.isqrt(number), 1 << 20) + 1) if number % n == 0]
    return sorted({*below, *(number // n for n in below)})


def _check_warmup(warmup: BatchWarmup, global_sequences: int, workers: int) -> None:
    """Raises Rule where its steps cannot be divided over the workers, or do not come to the global batch."""
    if warmup.start_sequences >= global_sequences:
        raise Rule("batch.warmup.start_sequences", f"{warmup.start_sequences} is not below the {global_sequences} of the whole batch; "
                                                   "lower it, or leave batch.warmup out")
    for key, value in (("start_sequences", warmup.start_sequences), ("increment_sequences", warmup.increment)):
        if value % workers:
            raise Rule(f"batch.warmup.{key}", f"{value} sequences cannot be divided over {workers} workers; try "
                                              f"{-(-value // workers) * workers}")
    if (rest := global_sequences - warmup.start_sequences) % warmup.increment:
        near = max(n for n in divisors(rest) if n % workers == 0 and n <= warmup.increment)
        raise Rule("batch.warmup.increment_sequences", f"{warmup.increment} does not lead from {warmup.start_sequences} to "
                                                       f"{global_sequences} sequences; try {near}")
