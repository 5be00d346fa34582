"""The OpenAI API over an engine, as a FastAPI application.

    app = create_app(engine, Card("py", lineage={...}), key, default_max_tokens=128)

The model and each adapter of the engine are asked by their names. /v1/models, /v1/completions, /v1/chat/completions, /metrics want the API
key; /health answers without. Of a classifier /v1/classify takes the place of the completions.
"""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Awaitable, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from distlm import __version__
from distlm.serve.answers import Chat, Completion, error, usage
from distlm.serve.engine import NONFINITE, Classifier, Engine, EngineFailed, EngineFull, NoMemory, NotFinite, Request, Token
from distlm.serve.fields import OFF, ChatRequest, ClassifyRequest, CompletionRequest, Sampling
from distlm.serve.guard import Guard, proof
from distlm.serve.metrics import Metrics
from distlm.serve.text import HALF_PAIR, has_half_pair

RULES = {"input": "must be a string, a list of strings, a list of token ids, or a list of lists of token ids, and not an empty list",
         "prompt": "must be a string, a list of strings, a list of token ids, or a list of lists of token ids, and not an empty list",
         "stop": "must be a string or a list of at most 16 strings"}
"""What to say of fields that take several types."""
MAX_CHOICES = 2048
"""Completions of one request: prompts times n."""


@dataclass(frozen=True)
class Card:
    """The model as /v1/models shows it."""

    id: str
    lineage: dict[str, Any] = field(default_factory=dict)
    """export/distlm.json: run, corpus, corpus_hash, checkpoint, trial."""
    created: int = field(default_factory=lambda: int(time.time()))


class Refused(Exception):
    """A request that cannot be answered: the HTTP status and the body of the error."""

    def __init__(self, status: int, message: str, **more: Any) -> None:
        super().__init__(message)
        self.status, self.body = status, error(message, **more)


def create_app(engine: Engine | Classifier, card: Card, key: str, metrics: Metrics, *, default_max_tokens: int = 128,
               adapters: Sequence[Card] = ()) -> FastAPI:
    """The application. `key` is what clients must send; `adapters` are those of the engine."""
    app = FastAPI(title="distlm", version=__version__, docs_url=None, redoc_url=None)
    app.add_middleware(Guard, key=key)
    shown = {card.id: {"id": card.id, "object": "model", "created": card.created, "owned_by": "distlm", "root": card.id, "parent": None,
                       "max_model_len": engine.context, "vocab_size": engine.vocabulary, "vocabulary_hash": engine.vocabulary_hash,
                       "lineage": card.lineage,
                       **({"labels": engine.labels, "multiple_labels": engine.multiple} if isinstance(engine, Classifier) else {})}}
    for adapter in adapters:
        assert not isinstance(engine, Classifier), "a classifier has no adapters"
        shown[adapter.id] = {**shown[card.id], "id": adapter.id, "created": adapter.created, "parent": card.id, "lineage": adapter.lineage,
                             "vocabulary_hash": engine.adapters[adapter.id].vocabulary_hash}

    @app.get("/health")
    async def health(nonce: str = "") -> Response:
        engine.check()
        return JSONResponse({"status": "ok", **({"proof": proof(key, card.id, nonce)} if nonce else {})})

    @app.get("/metrics")
    async def prometheus() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": list(shown.values())}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        known(name)
        return shown[name]

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, http: HttpRequest) -> Response:
        tokenizer = tokenizer_of(body.model)
        prompts = [await tokens_of(language_model(), tokenizer, prompt) for prompt in body.prompts]
        return await answer(body, prompts, Completion(body.model, tokenizer, body.return_tokens_as_token_ids), http)

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, http: HttpRequest) -> Response:
        tokenizer = tokenizer_of(body.model)
        return await answer(body, [await chat_tokens(tokenizer, body)], Chat(body.model, tokenizer), http)

    @app.post("/v1/classify")
    async def classify(body: ClassifyRequest) -> Response:
        known(body.model)
        if not isinstance(engine, Classifier):
            raise Refused(400, f"{card.id!r} is a language model and no classifier; use /v1/completions", param="model",
                          code="no_classifier")
        texts = [await classified_tokens(engine, text) for text in body.texts]
        found = await engine.classify([ids for ids, _ in texts], body.use_activation)
        told, even = ("probabilities", 0.5) if body.use_activation else ("logits", 0.0)
        return JSONResponse({"object": "list", "model": card.id, "data": [
            {"index": i, "label": None if engine.multiple else max(values, key=lambda name: values[name]),
             "labels": [name for name, value in values.items() if value > even] if engine.multiple else None,
             told: values, **({"truncated": True} if texts[i][1] else {})} for i, values in enumerate(found)],
             "usage": usage(sum(len(ids) for ids, _ in texts), 0)})

    def language_model() -> Engine:
        if isinstance(engine, Classifier):
            raise Refused(400, f"{card.id!r} is a classifier and completes no text; use /v1/classify", param="model",
                          code="no_language_model")
        return engine

    def known(name: str) -> None:
        if name not in shown:
            raise Refused(404, f"the model {name!r} does not exist; this endpoint serves {', '.join(map(repr, shown))}", param="model",
                          code="model_not_found")

    def tokenizer_of(name: str) -> Any:
        known(name)
        language = language_model()
        return language.tokenizer if name == card.id else language.adapters[name].tokenizer

    async def answer(body: Sampling, prompts: list[list[int]], writer: Completion, http: HttpRequest) -> Response:
        if len(prompts) * body.n > MAX_CHOICES:
            raise Refused(400, f"{len(prompts)} prompts times n: {body.n} are {len(prompts) * body.n} choices; {MAX_CHOICES} are the most "
                          "of one request", param="n")
        language = language_model()
        adapter = "" if body.model == card.id else body.model
        requests = [request for prompt in prompts for request in requests_of(body, prompt, language, default_max_tokens, adapter)]
        chunks = language.generate(requests)
        num_prompt = sum(map(len, prompts))
        if body.stream:
            return StreamingResponse(stream(chunks, len(requests), num_prompt, body, writer), media_type="text/event-stream",
                                     headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        return JSONResponse(await while_connected(http, whole(chunks, len(requests), num_prompt, writer)))

    @app.exception_handler(Refused)
    async def refused(_: HttpRequest, problem: Refused) -> Response:
        return JSONResponse(problem.body, problem.status)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: HttpRequest, problem: RequestValidationError) -> Response:
        return JSONResponse(explain(problem.errors()), 400)

    @app.exception_handler(HTTPException)
    async def http_error(_: HttpRequest, problem: HTTPException) -> Response:
        return JSONResponse(error(str(problem.detail)), problem.status_code, problem.headers)

    @app.exception_handler(EngineFull)
    async def full(_: HttpRequest, problem: EngineFull) -> Response:
        return JSONResponse(error(str(problem), kind="rate_limit_error", code="queue_full"), 429, {"Retry-After": "2"})

    @app.exception_handler(EngineFailed)
    @app.exception_handler(NoMemory)
    async def failed(_: HttpRequest, problem: EngineFailed | NoMemory) -> Response:
        return JSONResponse(failure(problem), 503)

    @app.exception_handler(NotFinite)
    async def not_finite(_: HttpRequest, problem: NotFinite) -> Response:
        return JSONResponse(error(str(problem), kind="server_error", code=NONFINITE), 500)

    return app


def requests_of(body: Sampling, prompt: list[int], engine: Engine, default_max_tokens: int, adapter: str) -> list[Request]:
    """A request for each of the n choices of a prompt. Raises Refused."""
    conflict = body.conflict()
    if conflict:
        raise Refused(400, f"{conflict[0]} {conflict[1]}", param=conflict[0])
    limit = body.limit
    if limit is None:
        limit = max(1, min(default_max_tokens, engine.context - len(prompt)))
    last = not limit                                       # of a prompt that is scored alone the last token is not read
    if len(prompt) + limit > engine.context + last:
        raise Refused(400, f"this model's maximum context length is {engine.context} tokens, and {len(prompt) + limit} were asked for: "
                      f"{len(prompt)} in the prompt and {limit} in the completion; shorten the prompt or max_tokens",
                      param="messages" if isinstance(body, ChatRequest) else "prompt", code="context_length_exceeded")
    echo = isinstance(body, CompletionRequest) and body.echo
    return [Request(tuple(prompt), limit, body.temperature, body.top_p, None if body.seed is None else body.seed + i, body.stops,
                    body.num_top, echo, adapter) for i in range(body.n)]


async def tokens_of(engine: Engine, tokenizer: Any, prompt: str | list[int]) -> list[int]:
    """Token ids of a prompt by one of the engine's tokenizers; an empty text is the start of a document. Raises Refused."""
    if isinstance(prompt, str):
        encodable(prompt, "prompt")
        ids = (await asyncio.to_thread(tokenizer, prompt))["input_ids"]
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if not ids and start is None:
            raise Refused(400, "the prompt is empty, and the model's tokenizer has no token to start a text with", param="prompt")
        return ids or [start]
    return known_tokens(engine, prompt, "prompt")


def known_tokens(engine: Engine | Classifier, ids: list[int], param: str) -> list[int]:
    """The ids as they are. Raises Refused for one that the model has not."""
    wrong = next((token for token in ids if not 0 <= token < engine.vocabulary), None)
    if wrong is not None:
        raise Refused(400, f"{param}: {wrong} is no token id; there are 0 to {engine.vocabulary - 1}", param=param)
    return ids


async def classified_tokens(engine: Classifier, text: str | list[int]) -> tuple[list[int], bool]:
    """Token ids of a text as documents were trained on, and whether it was cut for that, as token ids never are. Raises Refused for one
    that is empty, or too long where documents were not cut."""
    if isinstance(text, str):
        encodable(text, "input")
        whole = await asyncio.to_thread(engine.encode, text)
        ids = whole[:engine.cut_tokens]
    else:
        ids = whole = known_tokens(engine, text, "input")
        if engine.before and tuple(ids[:len(engine.before)]) == engine.before:
            raise Refused(400, "input: the tokens begin with the special ones that the endpoint itself puts around a text; leave them out",
                          param="input")
    if not ids:
        raise Refused(400, "input: an empty text has no label", param="input")
    if len(ids) > engine.context:
        raise Refused(400, f"this model's maximum context length is {engine.context} tokens, and a text has {len(ids)}; shorten it",
                      param="input", code="context_length_exceeded")
    return ids, len(ids) < len(whole)


async def chat_tokens(tokenizer: Any, body: ChatRequest) -> list[int]:
    """Token ids of a conversation in the template of the model that was chosen. Raises Refused."""
    if not tokenizer.chat_template:
        raise Refused(400, "this model's tokenizer has no chat_template, so it cannot chat; use /v1/completions", code="no_chat_template")
    for message in body.messages:
        encodable(message.text, "messages")
    messages = [{"role": message.role, "content": message.text} for message in body.messages]
    try:
        return await asyncio.to_thread(tokenizer.apply_chat_template, messages, tokenize=True, add_generation_prompt=True,
                                       return_dict=False)
    except Exception as problem:                           # a template is a program, and fails as it likes
        said = " ".join(f"{type(problem).__name__}: {problem}".split())
        raise Refused(400, f"the model's chat_template refuses these messages: {said}", param="messages") from None


def encodable(text: str, param: str) -> None:
    """Raises Refused for half a surrogate pair."""
    if has_half_pair(text):
        raise Refused(400, f"{param}: {HALF_PAIR}", param=param)


async def whole(chunks: AsyncIterator[tuple[int, Any]], num_choices: int, num_prompt: int, writer: Completion) -> dict[str, Any]:
    """The answer in one piece."""
    texts = [""] * num_choices
    tokens: list[list[Token]] = [[] for _ in texts]
    reasons: list[str | None] = [None] * num_choices
    num_generated = 0
    async for index, chunk in chunks:
        texts[index] += chunk.text
        tokens[index] += chunk.tokens
        reasons[index] = chunk.finish_reason
        num_generated += len(chunk.ids)
    choices = [writer.choice(i, texts[i], tokens[i], reasons[i], streaming=False) for i in range(num_choices)]
    return writer.envelope(choices, streaming=False, usage=usage(num_prompt, num_generated))


async def stream(chunks: Any, num_choices: int, num_prompt: int, body: Sampling, writer: Completion) -> AsyncIterator[bytes]:
    """The answer as server-sent events. Where the client leaves, this is closed, and `chunks` with it, which frees the places."""
    num_generated = 0
    with_usage = body.stream_options is not None and body.stream_options.include_usage

    def event(choices: list[dict[str, Any]], total: dict[str, int] | None = None) -> bytes:
        record = writer.envelope(choices, streaming=True)
        return b"data: " + json.dumps({**record, "usage": total} if with_usage else record, ensure_ascii=False).encode() + b"\n\n"

    async with contextlib.aclosing(chunks):
        try:
            opened = [opening for i in range(num_choices) if (opening := writer.opening(i))]
            for opening in opened:
                yield event([opening])
            async for index, chunk in chunks:
                num_generated += len(chunk.ids)
                if chunk.text or chunk.tokens or chunk.finish_reason:
                    yield event([writer.choice(index, chunk.text, chunk.tokens, chunk.finish_reason, streaming=True)])
            if with_usage:
                yield event([], usage(num_prompt, num_generated))
        except (EngineFailed, NoMemory) as problem:
            yield b"data: " + json.dumps(failure(problem)).encode() + b"\n\n"
        yield b"data: [DONE]\n\n"


def failure(problem: EngineFailed | NoMemory) -> dict[str, Any]:
    """The body of an error of the engine's."""
    return error(str(problem), kind="server_error", code="out_of_memory" if isinstance(problem, NoMemory) else "engine_failed")


async def while_connected(http: HttpRequest, work: Awaitable[dict[str, Any]]) -> dict[str, Any]:
    """The result of `work`, which is cancelled where the client leaves before it."""
    async def gone() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise Refused(499, "the client has closed the connection")
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()


def explain(problems: Any) -> dict[str, Any]:
    """The body of an error for the first of pydantic's complaints, naming the field."""
    problem = problems[0]
    place = [str(part) for part in problem["loc"] if part != "body"]
    name = place[0] if place else None
    if problem["type"] == "json_invalid":
        return error(f"the body is not valid JSON: {problem.get('ctx', {}).get('error', '')}", code="invalid_json")
    if not place:
        return error("the body must be a JSON object, sent with `Content-Type: application/json`")
    path = ".".join(place)
    if problem["type"] == "extra_forbidden":
        known = name in OFF or len(place) > 1
        return error(f"{path} is not supported by this endpoint" + ("" if known else ", or no field of this API") + "; leave it out",
                     param=name, code="unsupported_parameter")
    if problem["type"] == "missing":
        return error(f"the field {path} is missing", param=path, code="missing_parameter")
    if name in RULES:
        return error(f"{name} {RULES[name]}", param=name)
    message = problem["msg"][0].lower() + problem["msg"][1:]
    shown = repr(problem["input"])
    return error(f"{path}: {shown if len(shown) < 60 else 'the value'}: {message}", param=name)
