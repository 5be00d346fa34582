"""The embedded engine: continuous batching over a `transformers` model, on CPU or GPU.

A thread owns the model. Between two decode steps it drops what was cancelled, takes in what waits (one forward pass per prompt), then
decodes all sequences together in one forward pass, whichever adapters they have. Tokens go back to the asyncio loops of the callers, one
call per step and loop.

    engine = TorchEngine(folder, max_sequences=8, adapters={"poems": adapter_folder})
    async for index, chunk in engine.generate([Request(prompt, max_tokens=16)]): ...
"""

import asyncio
import contextlib
import logging
import random
import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, DynamicCache
from transformers.cache_utils import DynamicLayer

from distlm.errors import ServeError, out_of_memory
from distlm.model.adapter_folder import ends_of, load_tokenizers
from distlm.model.build import load_model
from distlm.model.complete import end_ids
from distlm.model.quantize import rounds_inputs
from distlm.model.vocabulary import vocabulary_hash
from distlm.serve.engine import Chunk, EngineFailed, EngineFull, NoMemory, Request, Token, Variant
from distlm.serve.lora import Adapters
from distlm.serve.metrics import Metrics
from distlm.serve.sample import choose, score
from distlm.serve.slots import SlotCache
from distlm.serve.text import TextStream

log = logging.getLogger(__name__)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Stream:
    """The chunks of the sequences of one call, as an async iterator. Closing it, or letting go of it, cancels what is left."""

    def __init__(self, num_sequences: int) -> None:
        self.loop = asyncio.get_running_loop()
        self.queue: asyncio.Queue[tuple[int, Chunk] | Exception] = asyncio.Queue()
        self.open = num_sequences
        self.cancelled = False

    def __aiter__(self) -> "Stream":
        return self

    async def __anext__(self) -> tuple[int, Chunk]:
        if not self.open:
            raise StopAsyncIteration
        try:
            item = await self.queue.get()
        except asyncio.CancelledError:
            self.cancelled = True
            raise
        if isinstance(item, Exception):
            self.open = 0
            raise item
        self.open -= item[1].finish_reason is not None
        return item

    async def aclose(self) -> None:
        self.cancelled, self.open = True, 0


@dataclass(eq=False)
class Channel:
    """The engine's side of a stream. It does not keep the stream itself alive, so a stream that is dropped is noticed."""

    loop: asyncio.AbstractEventLoop
    queue: "asyncio.Queue[Any]"
    stream: "weakref.ref[Stream]"

    def cancelled(self) -> bool:
        stream = self.stream()
        return stream is None or stream.cancelled


@dataclass(eq=False)
class Running:
    """A sequence on its way."""

    request: Request
    index: int
    channel: Channel
    text: TextStream
    source: random.Random
    arrived: float = field(default_factory=time.monotonic)
    last_time: float = 0.0
    last_token: int = 0
    num_tokens: int = 0


class TorchEngine:
    """See the module. Raises InputError where the model cannot be loaded, ServeError where it cannot be decoded in slots."""

    def __init__(self, folder: str | Path, *, dtype: str = "auto", device: str | None = None, threads: int | None = None,
                 max_sequences: int = 8, max_queued: int = 64, metrics: Metrics | None = None,
                 adapters: Mapping[str, Path] | None = None) -> None:
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        kind = DTYPES[dtype] if dtype != "auto" else torch.float32 if self.device.type == "cpu" else torch.bfloat16
        model: Any = load_model(folder, f"model: {folder}", kind, exact=False)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self.model: Any = model.to(self.device).eval()
        self.context = context_of(self.model.config)
        self.vocabulary: int = self.model.get_input_embeddings().num_embeddings
        self.vocabulary_hash = vocabulary_hash(Path(folder))
        told = self.model.generation_config.eos_token_id
        self.ends = frozenset(end_ids(self.tokenizer.eos_token_id if told is None else told))
        self.adapters = self._variants(Path(folder), adapters or {})
        self._lora = Adapters(self.model, adapters or {})
        self.metrics = metrics or Metrics()
        for name in self.adapters:
            self.metrics.of(name)
        self.max_sequences, self.max_queued, self.threads = max_sequences, max_queued, threads
        with torch.inference_mode():
            self.cache = self._proven_cache()
        self._wake = threading.Condition()                 # guards _waiting, _error, _closed
        self._waiting: deque[Running] = deque()
        self._error: EngineFailed | None = None
        self._closed = False
        self._active: list[Running] = []                   # row i of the cache belongs to _active[i]
        self._outbox: list[tuple[Channel, Any]] = []
        self._started: set[Channel] = set()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def generate(self, requests: Sequence[Request]) -> Stream:
        """Chunks with the place of their request, from within a running asyncio loop. Raises EngineFull and EngineFailed at once."""
        for request in requests:
            assert request.prompt and len(request.prompt) + (request.max_tokens or -1) <= self.context, "the API checks this"
        stream = Stream(len(requests))
        channel = Channel(stream.loop, stream.queue, weakref.ref(stream))
        with self._wake:
            self.check()
            queued = len({running.channel for running in self._waiting} - self._started)
            if queued >= self.max_queued and len(self._active) + len(self._waiting) >= self.max_sequences:
                raise EngineFull(f"{len(self._active)} sequences are decoded and {queued} requests wait, which is the limit",
                                 remedy="try again later")
            for index, request in enumerate(requests):
                text = TextStream(self._tokenizer(request), request.prompt, request.stop)
                self._waiting.append(Running(request, index, channel, text, random.Random(request.seed)))
            self._gauge_waiting()
            self._wake.notify()
        return stream

    def check(self) -> None:
        """Raises EngineFailed where the thread has died."""
        if self._error is not None:
            raise self._error
        if not self._thread.is_alive():
            raise EngineFailed("the engine has been closed")

    def close(self) -> None:
        """End the thread; sequences that are on their way fail."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join()

    def _run(self) -> None:
        if self.threads:
            torch.set_num_threads(self.threads)            # OpenMP keeps this per thread
        try:
            with torch.inference_mode():
                while self._wait_for_work():
                    self._drop_cancelled()
                    self._admit()
                    if self._active:
                        self._decode()
                    self._deliver()
            self._fail(EngineFailed("the engine has been closed"))
        except BaseException as error:                     # a thread's last stop: whoever waits must hear of it
            log.exception("the engine has died")
            self._fail(EngineFailed(f"the engine has died: {type(error).__name__}: {error}"))

    def _wait_for_work(self) -> bool:
        with self._wake:
            while not (self._waiting or self._active or self._closed):
                self._wake.wait()
            return not self._closed

    def _drop_cancelled(self) -> None:
        for row in reversed(range(len(self._active))):
            if self._active[row].channel.cancelled():
                self._metrics(self._active[row]).finished("abort")
                self._leave(row)
        with self._wake:
            gone = {channel for channel in {running.channel for running in self._waiting} if channel.cancelled()}
            left = [running for running in self._waiting if running.channel in gone]
            if gone:
                self._waiting = deque(running for running in self._waiting if running.channel not in gone)
                self._gauge_waiting()
        for running in left:
            self._metrics(running).finished("abort")

    def _admit(self) -> None:
        while len(self._active) < self.max_sequences:
            with self._wake:
                if not self._waiting:
                    break
                running = self._waiting.popleft()
                self._started.add(running.channel)
                self._gauge_waiting()
            try:
                self._prefill(running)
                continue
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
            self._refuse(running)                          # the error is gone, and what it held with it
        with self._wake:
            self._started &= {running.channel for running in self._waiting}

    def _prefill(self, running: Running) -> None:
        """Run the prompt, and take the first token from its last logits. Where none is to follow, its last token is not run."""
        request = running.request
        prompt = request.prompt
        read, tokens = prompt if request.max_tokens else prompt[:-1], list[Token]()
        scored = request.echo and request.logprobs is not None
        if read and (scored or request.max_tokens):
            cache, logits = self._forward(read, 0 if scored else 1, request.adapter)
        if scored:
            tokens = [Token(prompt[0], None, ())]
            if prompt[1:]:
                tokens += score(logits[:len(prompt) - 1], prompt[1:], request.logprobs or 0)
        text = ""
        if request.echo:
            text = self._tokenizer(request).decode(prompt, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        self._metrics(running).prompt_tokens.inc(len(prompt))
        if not request.max_tokens:
            self._send(running, Chunk(text, (), tuple(tokens), "length"))
            return
        self._take(running, choose(logits[-1:], [request], [running.source])[0], logits[-1:], text, tokens)
        if running.last_token >= 0:
            self.cache.join(cache, len(prompt))
            self._active.append(running)
        self._gauge()

    def _refuse(self, running: Running) -> None:
        """Fail the request of a sequence that there is no memory for, with all of its sequences; the others go on."""
        length = len(running.request.prompt)
        said = f"there is no memory for a prompt of {length:,} tokens beside the {len(self._active)} sequences that are decoded"
        log.warning(said)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self._outbox.append((running.channel, NoMemory(said, remedy="shorten it, leave out echo with logprobs, or try again later")))
        self._metrics(running).finished("abort")
        if stream := running.channel.stream():
            stream.cancelled = True
        self._drop_cancelled()
        self._gauge()

    def _decode(self) -> None:
        """One token more for every active sequence."""
        positions, mask = self.cache.step(self.device, self.model.dtype)
        ids = torch.tensor([[running.last_token] for running in self._active], device=self.device)
        self._lora.choose([running.request.adapter for running in self._active])
        logits = self.model(input_ids=ids, position_ids=positions, attention_mask=mask, past_key_values=self.cache,
                            use_cache=True).logits[:, -1]
        tokens = choose(logits, [running.request for running in self._active], [running.source for running in self._active])
        for row in reversed(range(len(tokens))):
            self._take(self._active[row], tokens[row], logits[row:row + 1])
            if self._active[row].last_token < 0:
                self._leave(row)
        self._gauge()

    def _take(self, running: Running, token: int, logits: torch.Tensor, echoed: str = "", scored: Sequence[Token] = ()) -> None:
        """Pass a token on. A sequence that ends with it has last_token -1 afterwards."""
        request, now, metrics = running.request, time.monotonic(), self._metrics(running)
        (metrics.inter_token if running.num_tokens else metrics.first_token).observe(now - (running.last_time or running.arrived))
        metrics.generation_tokens.inc()
        running.last_time, running.last_token = now, token
        running.num_tokens += 1
        own = self.adapters[request.adapter].ends if request.adapter else ()
        reason = "stop" if token in self.ends or token in own else None
        text = running.text.push(token) if not reason else ""
        if running.text.stopped:
            reason = "stop"
        if not reason and running.num_tokens >= request.max_tokens:
            reason = "length"
        if reason:
            text += running.text.finish()
            reason = "stop" if running.text.stopped else reason
            running.last_token = -1
        tokens = [*scored, *(score(logits, [token], request.logprobs) if request.logprobs is not None else [])]
        self._send(running, Chunk(echoed + text, (token,), tuple(tokens), reason))

    def _send(self, running: Running, chunk: Chunk) -> None:
        self._outbox.append((running.channel, (running.index, chunk)))
        if chunk.finish_reason:
            self._metrics(running).finished(chunk.finish_reason)
            self._metrics(running).end_to_end.observe(time.monotonic() - running.arrived)

    def _leave(self, row: int) -> None:
        self.cache.leave(row)
        self._active[row] = self._active[-1]
        self._active.pop()
        self._gauge()

    def _metrics(self, running: Running) -> Metrics:
        return self.metrics.of(running.request.adapter)

    def _gauge_waiting(self) -> None:
        waiting = Counter(running.request.adapter for running in self._waiting)
        for name in ("", *self.adapters):
            self.metrics.of(name).waiting.set(waiting[name])

    def _gauge(self) -> None:
        running, cached = Counter[str](), Counter[str]()
        for one, length in zip(self._active, self.cache.lengths, strict=True):
            running[one.request.adapter] += 1
            cached[one.request.adapter] += length
        for name in ("", *self.adapters):
            self.metrics.of(name).running.set(running[name])
            self.metrics.of(name).cache_usage.set(cached[name] / (self.max_sequences * self.context))

    def _deliver(self) -> None:
        outbox, self._outbox = self._outbox, []
        for loop in {channel.loop for channel, _ in outbox}:
            mine = [(channel.queue, item) for channel, item in outbox if channel.loop is loop]
            with contextlib.suppress(RuntimeError):        # the caller's loop is closed
                loop.call_soon_threadsafe(_put, mine)

    def _fail(self, error: EngineFailed) -> None:
        with self._wake:
            self._error = error
            channels = {running.channel for running in [*self._active, *self._waiting]} | self._started
            channels |= {channel for channel, _ in self._outbox}
            self._waiting.clear()
        self._outbox += [(channel, error) for channel in channels]
        self._deliver()
        self._active.clear()

    def _tokenizer(self, request: Request) -> Any:
        return self.adapters[request.adapter].tokenizer if request.adapter else self.tokenizer

    def _variants(self, model: Path, folders: Mapping[str, Path]) -> dict[str, Variant]:
        """Raises InputError as `load_tokenizers`. A tokenizer of an adapter's own says by itself what ends a sequence, and so does the
        generation_config.json of its run, beside what ends the model's."""
        found = dict[str, Variant]()
        for name, (home, tokenizer) in load_tokenizers(folders, model, self.tokenizer, self.vocabulary).items():
            end = None if tokenizer is self.tokenizer else tokenizer.eos_token_id
            ends = ends_of(folders[name]) | frozenset([] if end is None else [end])
            found[name] = Variant(tokenizer, vocabulary_hash(home), ends - self.ends)
        return found

    def _forward(self, ids: Sequence[int], keep: int, adapter: str = "") -> tuple[DynamicCache, torch.Tensor]:
        """One sequence from its start. Returns its cache and logits [keep or all, vocabulary]."""
        cache = DynamicCache()
        tokens = torch.tensor([list(ids)], device=self.device)
        positions = torch.arange(len(ids), device=self.device)[None]
        self._lora.choose([adapter])
        logits = self.model(input_ids=tokens, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=keep).logits
        return cache, logits[0]

    def _proven_cache(self) -> SlotCache:
        """A slot cache that gives this model the logits which it has without one, with each adapter too, beside a row that has none.
        Families differ; this finds those that do not fit."""
        family = self.model.config.model_type
        subject = f"models of the family {family}"
        with _decoded(subject):
            samples = [tuple(n * 7 % self.vocabulary for n in range(1, length)) for length in (4, 7, 3)]
            first, _ = self._forward(samples[0], keep=1)
            if any(type(layer) is not DynamicLayer for layer in first.layers):
                raise ValueError("not every layer has a plain attention cache")
            self._prove(samples, "", len(first.layers))
        for name in self.adapters:
            with _decoded(f"{subject} with the adapter {name}"):
                self._prove(samples, name, len(first.layers))
        return SlotCache(len(first.layers), self.max_sequences, self.context)

    def _prove(self, samples: Sequence[tuple[int, ...]], adapter: str, num_layers: int) -> None:
        """Decode the second sample and, with the adapter, the third. Raises ValueError where one has other logits than alone."""
        cache, adapters = SlotCache(num_layers, 3, self.context), ("", "", adapter)
        for sample, name in zip(samples, adapters, strict=True):
            cache.join(self._forward(sample, 1, name)[0], len(sample))
        cache.leave(0)
        positions, mask = cache.step(self.device, self.model.dtype)
        ids = torch.tensor([[1], [2]], device=self.device)
        self._lora.choose([adapter, ""])
        found = self.model(input_ids=ids, position_ids=positions, attention_mask=mask, past_key_values=cache, use_cache=True).logits
        for row, (sample, token, name) in enumerate(((samples[2], 1, adapter), (samples[1], 2, ""))):
            wanted = self._forward((*sample, token), 1, name)[1][-1].float()
            error = (found[row, -1].float() - wanted).abs().max() / wanted.abs().max()
            if not error < (1e-3 if self.model.dtype == torch.float32 and not rounds_inputs(self.model) else 0.1):
                raise ValueError(f"logits are off by {float(error):.2g} of their size")


def context_of(config: Any) -> int:
    """The positions that a model can attend to. Sliding windows are served up to their width, where they are plain attention."""
    text = config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    if kinds - {"full_attention", "sliding_attention"}:
        raise ServeError(f"{text.model_type}: layers of kind {', '.join(sorted(kinds))} cannot be served",
                         remedy="serve a model whose layers are full_attention or sliding_attention", cause="bad_input")
    context = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None)
    if not context:
        raise ServeError(f"{text.model_type}: config.json names no max_position_embeddings", cause="bad_input",
                         remedy="add it: it is the limit of prompt and completion")
    window = getattr(text, "sliding_window", None)
    slides = "sliding_attention" in kinds or not getattr(text, "layer_types", None)
    return min(context, window) if window and slides else context


@contextlib.contextmanager
def _decoded(subject: str) -> Iterator[None]:
    try:
        yield
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
        raise ServeError(f"{subject} cannot be decoded in slots: {error}", cause="bad_input",
                         remedy="llama, gpt2, qwen and others with plain attention caches can") from error


def _put(items: list[tuple["asyncio.Queue[Any]", Any]]) -> None:
    for queue, item in items:
        queue.put_nowait(item)
