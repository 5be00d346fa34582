"""The OpenAI API over a real engine: what is honoured, what is refused, and how."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
import uvicorn

from distlm.errors import ServeError
from distlm.model.adapter_folder import home_of
from distlm.serve import sample
from distlm.serve.api import Card, create_app
from distlm.serve.client import healthy, query
from distlm.serve.deploy import lineage_of
from distlm.serve.metrics import Metrics
from distlm.serve.torch_engine import TorchEngine
from tests.serve.test_torch_engine import reference
from tests.serve.tiny_models import LLAMA, make_model

KEY = "sk-0123456789abcdef"
LINEAGE = {"run": "tiny", "corpus_hash": "ab12", "checkpoint": "step-000010", "trial": None}


class Server:
    """The application under uvicorn on loopback."""

    def __init__(self, folder: Path, make: Any = TorchEngine, **options: Any) -> None:
        metrics = Metrics("tiny", "r0")
        self.engine = make(folder, threads=1, metrics=metrics, **options)
        adapters = [Card(name, lineage_of(home_of(place))) for name, place in options.get("adapters", {}).items()]
        self.app = create_app(self.engine, Card("tiny", LINEAGE), KEY, metrics, default_max_tokens=8, adapters=adapters)
        listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        self._server = uvicorn.Server(uvicorn.Config(self.app, log_level="warning"))
        self._thread = threading.Thread(target=self._server.run, args=([listener],))
        self._thread.start()
        self.http = httpx.Client(base_url=self.url, headers={"Authorization": f"Bearer {KEY}"}, timeout=30)

    def close(self) -> None:
        self.http.close()
        self._server.should_exit = True
        self._thread.join()
        self.engine.close()

    def complete(self, **fields: Any) -> dict[str, Any]:
        answer = self.http.post("/v1/completions", json={"model": "tiny", "prompt": "the cat", "temperature": 0, **fields})
        assert answer.status_code == 200, answer.text
        return answer.json()

    def refused(self, path: str = "completions", **fields: Any) -> tuple[int, dict[str, Any]]:
        base = {"prompt": "the cat"} if path == "completions" else {"messages": [{"role": "user", "content": "hi"}]}
        body = {name: value for name, value in {"model": "tiny", **base, **fields}.items() if value is not ...}
        answer = self.http.post(f"/v1/{path}", json=body)
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
        return answer.status_code, answer.json()["error"]

    def events(self, path: str = "completions", **fields: Any) -> list[dict[str, Any]]:
        base = {"prompt": "the cat"} if path == "completions" else {"messages": [{"role": "user", "content": "hi"}]}
        answer = self.http.post(f"/v1/{path}", json={"model": "tiny", "temperature": 0, "stream": True, **base, **fields})
        assert answer.headers["content-type"].startswith("text/event-stream"), answer.text
        lines = [line for line in answer.text.split("\n\n") if line]
        assert all(line.startswith("data: ") for line in lines) and lines[-1] == "data: [DONE]"
        return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


@pytest.fixture(scope="module")
def server(llama: Path) -> Iterator[Server]:
    server = Server(llama, max_sequences=4, max_queued=4)
    yield server
    server.close()


def wait(condition: Any, timeout_s: float = 20) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_greedy_text_is_that_of_generate(server: Server, llama: Path) -> None:
    tokenizer = server.engine.tokenizer
    prompt = tokenizer("the cat")["input_ids"]
    wanted = reference(llama, tuple(prompt), 12)
    answer = server.complete(max_tokens=12)
    assert answer["choices"][0]["text"] == tokenizer.decode(wanted, skip_special_tokens=True)
    assert answer["usage"] == {"prompt_tokens": len(prompt), "completion_tokens": len(wanted), "total_tokens": len(prompt) + len(wanted)}
    assert answer["object"] == "text_completion" and answer["model"] == "tiny"
    assert answer["choices"][0]["finish_reason"] == ("stop" if wanted[-1] == 0 else "length")


def test_every_kind_of_prompt_gives_the_same(server: Server) -> None:
    ids = server.engine.tokenizer("the cat")["input_ids"]
    texts = [[choice["text"] for choice in server.complete(prompt=prompt)["choices"]]
             for prompt in ("the cat", ["the cat"], ids, [ids], ["the cat", "x ="], [ids, server.engine.tokenizer("x =")["input_ids"]])]
    assert texts[0] == texts[1] == texts[2] == texts[3] == texts[4][:1] and texts[4] == texts[5] and len(texts[4]) == 2


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_a_stream_is_the_answer_in_pieces(server: Server, path: str) -> None:
    base = {"prompt": "the cat"} if path == "completions" else {"messages": [{"role": "user", "content": "hi"}]}
    whole = server.http.post(f"/v1/{path}", json={"model": "tiny", "temperature": 0, "max_tokens": 12, **base}).json()
    events = server.events(path, max_tokens=12, stream_options={"include_usage": True})
    assert events[-1]["choices"] == [] and events[-1]["usage"] == whole["usage"]
    assert len({event["id"] for event in events}) == 1 and all(event["usage"] is None for event in events[:-1])
    choices = [event["choices"][0] for event in events[:-1]]
    if path == "completions":
        assert "".join(choice["text"] for choice in choices) == whole["choices"][0]["text"]
    else:
        assert choices[0]["delta"]["role"] == "assistant" and events[0]["object"] == "chat.completion.chunk"
        assert "".join(choice["delta"].get("content", "") for choice in choices) == whole["choices"][0]["message"]["content"]
    assert [choice["finish_reason"] for choice in choices][-1] == whole["choices"][0]["finish_reason"]
    assert all(choice["finish_reason"] is None for choice in choices[:-1])
    assert "usage" not in server.events(path, max_tokens=2)[0]


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_the_text_before_it(server: Server, stream: bool) -> None:
    text = server.complete(max_tokens=30)["choices"][0]["text"]
    stop = text[6:9]
    wanted = text[:text.index(stop)]
    if stream:
        choices = [event["choices"][0] for event in server.events(max_tokens=30, stop=[stop])]
        found, reason = "".join(choice["text"] for choice in choices), choices[-1]["finish_reason"]
    else:
        answer = server.complete(max_tokens=30, stop=stop)
        found, reason = answer["choices"][0]["text"], answer["choices"][0]["finish_reason"]
        assert answer["usage"]["completion_tokens"] < 30
    assert (found, reason) == (wanted, "stop")


def test_n_choices_differ_and_a_seed_repeats_them(server: Server) -> None:
    answers = [[choice["text"] for choice in server.complete(n=6, temperature=1.5, seed=3)["choices"]] for _ in range(2)]
    assert answers[0] == answers[1] and len(set(answers[0])) > 1
    events = server.events(n=6, temperature=1.5, seed=3)
    streamed = ["".join(e["choices"][0]["text"] for e in events if e["choices"][0]["index"] == i) for i in range(6)]
    assert streamed == answers[0]


def test_echo_and_logprobs_score_a_prompt_as_lm_eval_asks(server: Server) -> None:
    ids = server.engine.tokenizer("the cat sat")["input_ids"]
    answer = server.complete(prompt=[ids], echo=True, logprobs=1, max_tokens=1, seed=1)["choices"][0]
    logprobs = answer["logprobs"]
    assert answer["text"].startswith("the cat sat") and len(logprobs["tokens"]) == len(ids) + 1
    assert logprobs["token_logprobs"][0] is None and logprobs["top_logprobs"][0] is None
    for token, value, top in list(zip(logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True))[1:]:
        assert top[token] == value <= max(top.values()) <= 0
    assert logprobs["text_offset"][:2] == [0, len(logprobs["tokens"][0])]
    scored = server.complete(prompt=[ids], echo=True, logprobs=0, max_tokens=0)
    assert scored["choices"][0]["text"] == "the cat sat" and scored["usage"]["completion_tokens"] == 0


def test_a_prompt_that_is_scored_alone_may_have_one_token_more_than_the_context(server: Server,
                                                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    ids, forward, read = [7 + i % 90 for i in range(129)], server.engine._forward, []
    monkeypatch.setattr(server.engine, "_forward", lambda ids, *given: read.append(len(ids)) or forward(ids, *given))
    monkeypatch.setattr(sample, "CHUNK_ELEMENTS", 10 * server.engine.vocabulary)
    fields = {"echo": True, "logprobs": 1, "return_tokens_as_token_ids": True}
    whole = server.complete(prompt=[ids, ids[:128], ids[:1]], max_tokens=0, **fields)["choices"]
    told = [choice["logprobs"] for choice in whole]
    assert read == [128, 127]                              # a model has no position for more, and the last token predicts nothing
    assert told[0]["tokens"] == [f"token_id:{token}" for token in ids] and len(told[2]["tokens"]) == 1
    assert told[0]["token_logprobs"][:128] == pytest.approx([None, *told[1]["token_logprobs"][1:]], abs=1e-5)
    with torch.inference_mode():
        logits = server.engine.model(torch.tensor([ids[:-1]])).logits[0]
    wanted = logits.log_softmax(-1)
    for place, (value, top) in enumerate(zip(told[0]["token_logprobs"][1:], told[0]["top_logprobs"][1:], strict=True)):
        assert value == pytest.approx(float(wanted[place, ids[place + 1]]), abs=1e-5)
        assert max(top, key=top.get) == f"token_id:{int(logits[place].argmax())}" and len(top) <= 2
    [spelled] = server.complete(prompt=[ids], max_tokens=0, echo=True, logprobs=1)["choices"]
    assert spelled["logprobs"]["text_offset"] == told[0]["text_offset"]
    for tokens, limit in ((130, 0), (129, 1), (128, 1)):
        status, error = server.refused(prompt=[5] * tokens, max_tokens=limit, **fields)
        assert status == 400 and error["code"] == "context_length_exceeded"


def test_chat_logprobs(server: Server) -> None:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3, "temperature": 0}
    answer = server.http.post("/v1/chat/completions", json={**body, "logprobs": True, "top_logprobs": 2}).json()
    for entry in answer["choices"][0]["logprobs"]["content"]:
        assert entry["logprob"] == entry["top_logprobs"][0]["logprob"] and len(entry["top_logprobs"]) == 2


def test_models_shows_the_lineage(server: Server) -> None:
    (card,) = server.http.get("/v1/models").json()["data"]
    assert card["id"] == "tiny" and card["lineage"] == LINEAGE and card["max_model_len"] == 128
    assert server.http.get("/v1/models/tiny").json()["id"] == "tiny"
    assert server.http.get("/v1/models/other").status_code == 404


@pytest.mark.parametrize("header", [{}, {"Authorization": "Bearer wrong"}, {"Authorization": KEY}, {"Authorization": f"Basic {KEY}"},
                                    {"Authorization": "Bearer schl\u00fcssel".encode()}])
def test_without_the_key_there_is_401_everywhere_but_at_health(server: Server, header: dict[str, str]) -> None:
    with httpx.Client(base_url=server.url) as http:
        for path in ("/v1/models", "/metrics", "/openapi.json", "/nothing", "/v1/health", "//health"):
            answer = http.get(path, headers=header)
            assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key", path
        assert http.post("/v1/completions", content=b"{", headers=header).status_code == 401
        assert http.get("/health", headers=header).json() == {"status": "ok"}


def test_health_proves_that_it_knows_the_key_without_being_told(server: Server, tmp_path: Path) -> None:
    key = tmp_path / "api_key"
    key.touch(mode=0o600)
    key.write_text(KEY)
    record = {"url": f"{server.url}/v1", "model": "tiny", "api_key_file": str(key)}
    assert healthy(record) and not healthy({**record, "model": "other"})
    key.write_text(KEY[::-1])
    assert not healthy(record)


@pytest.mark.parametrize(("fields", "param", "words"), [
    ({"temperature": 3}, "temperature", "less than or equal to 2"), ({"temperature": "0"}, "temperature", "number"),
    ({"top_p": 1.5}, "top_p", "less than"), ({"n": 0}, "n", "greater"), ({"max_tokens": -1}, "max_tokens", "greater"),
    ({"max_tokens": True}, "max_tokens", "integer"), ({"seed": 1.5}, "seed", "integer"), ({"stop": [""]}, "stop", "empty"),
    ({"stop": 5}, "stop", "string"), ({"prompt": []}, "prompt", "not an empty list"), ({"prompt": [[]]}, "prompt", "token ids"),
    ({"prompt": ["a", 1]}, "prompt", "token ids"), ({"prompt": {"a": 1}}, "prompt", "string"), ({"prompt": ...}, "prompt", "missing"),
    ({"prompt": [5, 100000]}, "prompt", "100000 is no token id"), ({"prompt": [-1]}, "prompt", "-1"), ({"model": ...}, "model", "missing"),
    ({"presence_penalty": 0.5}, "presence_penalty", "not supported"), ({"frequency_penalty": 1}, "frequency_penalty", "not supported"),
    ({"logit_bias": {"5": 1}}, "logit_bias", "not supported"), ({"suffix": "x"}, "suffix", "not supported"),
    ({"best_of": 3}, "best_of", "not supported"), ({"top_k": 5}, "top_k", "no field"), ({"messages": []}, "messages", "no field"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "stream: true"), ({"logprobs": 50}, "logprobs", "20"),
    ({"stream": True, "stream_options": {"x": 1}}, "stream_options", "not supported"), ({"max_tokens": 0}, "max_tokens", "echo"),
    ({"n": 128, "prompt": ["x"] * 17}, "n", "2048"), ({"presence_penalty": False}, "presence_penalty", "not supported"),
])
def test_a_field_that_cannot_be_honoured_is_refused_by_name(server: Server, fields: dict[str, Any], param: str, words: str) -> None:
    status, error = server.refused(**fields)
    assert (status, error["param"], error["type"]) == (400, param, "invalid_request_error") and words in error["message"], error
    assert param in error["message"]


@pytest.mark.parametrize(("fields", "param"), [
    ({"messages": []}, "messages"), ({"messages": [{"role": "king", "content": "x"}]}, "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages"),
    ({"messages": [{"role": "user", "content": "x", "name": "ann"}]}, "messages"), ({"messages": [{"role": "user"}]}, "messages"),
    ({"tools": [{"type": "function"}]}, "tools"), ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"top_logprobs": 2}, "top_logprobs"), ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"), ({"echo": True}, "echo"),
    ({"reasoning_effort": "low"}, "reasoning_effort"), ({"tool_choice": "required"}, "tool_choice"),
])
def test_a_chat_field_that_cannot_be_honoured_is_refused_by_name(server: Server, fields: dict[str, Any], param: str) -> None:
    status, error = server.refused("chat/completions", **fields)
    assert status == 400 and error["param"].split(".")[0] == param and param in error["message"], error


def test_neutral_values_of_unsupported_fields_pass(server: Server) -> None:
    server.complete(presence_penalty=0, frequency_penalty=0.0, logit_bias={}, best_of=1, suffix=None, user="me", stop=None, logprobs=None)
    answer = server.http.post("/v1/chat/completions", json={
        "model": "tiny", "messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}, {"role": "assistant", "content": "x",
                                      "refusal": None, "tool_calls": []}, {"role": "user", "content": "y"}],
        "max_completion_tokens": 2, "tools": [], "tool_choice": "auto", "response_format": {"type": "text"}, "store": False, "n": 1,
        "parallel_tool_calls": True, "metadata": None})
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize("body", [b"{", b"", b"[1]", b'"x"', b'{"model": "tiny", "prompt": "\xff"}', b'{"model": NaN}', b"[" * 100_000,
                                  b'{"model": "tiny", "prompt": "\\ud800"}', b'{"model": "tiny", "prompt": "x", "\\ud800": 1}',
                                  b'{"model": "tiny", "prompt": "x", "seed": ' + b"9" * 5000 + b"}"])
def test_a_body_that_is_no_object_is_a_400_of_openais_shape(server: Server, body: bytes) -> None:
    answer = server.http.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400 and answer.json()["error"]["type"] == "invalid_request_error", answer.text


def test_unknown_paths_models_and_methods_have_openais_shape(server: Server) -> None:
    assert server.refused(model="gpt-9")[0] == 404 and server.refused(model="gpt-9")[1]["code"] == "model_not_found"
    assert server.http.get("/v1/nothing").json()["error"]["type"] == "invalid_request_error"
    assert server.http.get("/v1/completions").status_code == 405


def test_a_prompt_that_does_not_fit_is_a_400_that_names_the_limit(server: Server) -> None:
    for fields in ({"prompt": [5] * 128}, {"prompt": [5] * 100, "max_tokens": 29}, {"prompt": "the cat " * 200}):
        status, error = server.refused(**fields)
        assert status == 400 and error["code"] == "context_length_exceeded" and "128 tokens" in error["message"]
    assert server.complete(prompt=[5] * 100, max_tokens=28)["usage"]["prompt_tokens"] == 100
    assert server.complete(prompt=[5] * 125)["usage"]["completion_tokens"] <= 3      # the default gives way to the context


def test_an_empty_prompt_starts_a_document(server: Server) -> None:
    assert server.complete(prompt="")["choices"][0]["text"] == server.complete(prompt=[0])["choices"][0]["text"]


@pytest.mark.parametrize(("template", "problem"), [
    ("{{ raise_exception('roles alternate') }}", "TemplateError: roles alternate"), ("{{ 1 // 0 }}", "ZeroDivisionError"),
    ("{% for i in range(10 ** 7) %}{% endfor %}", "OverflowError"),
    ("{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}", "RecursionError")])
def test_a_template_that_fails_is_the_requests_error(template: str, problem: str, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.engine.tokenizer, "chat_template", template)
    status, error = server.refused("chat/completions")
    assert (status, error["param"]) == (400, "messages") and f"refuses these messages: {problem}" in error["message"]


def test_chat_uses_the_template_and_refuses_without_one(server: Server, tmp_path: Path) -> None:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 5, "temperature": 0}
    chat = server.http.post("/v1/chat/completions", json=body).json()
    plain = server.complete(prompt="<|user|>hi\n<|assistant|>", max_tokens=5)
    assert chat["choices"][0]["message"]["content"] == plain["choices"][0]["text"] and chat["usage"] == plain["usage"]
    bare = Server(make_model(tmp_path, LLAMA))
    try:
        status, error = bare.refused("chat/completions")
        assert status == 400 and "chat_template" in error["message"]
    finally:
        bare.close()


def test_metrics_have_vllms_names_and_count(server: Server) -> None:
    def value(name: str) -> float:
        lines = server.http.get("/metrics").text.splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"vllm:{name}"))

    names = ("prompt_tokens_total", "generation_tokens_total", 'request_success_total{finished_reason="length"',
             "time_to_first_token_seconds_count", "inter_token_latency_seconds_count", "num_requests_running", "num_requests_waiting")
    before = [value(name) for name in names]
    answer = server.complete(prompt=[5] * 10, max_tokens=5, n=2, temperature=1.0, seed=5)
    made = answer["usage"]["completion_tokens"]
    lengths = sum(choice["finish_reason"] == "length" for choice in answer["choices"])
    gained = [value(name) - old for name, old in zip(names, before, strict=True)]
    assert gained == [20, made, lengths, 2, made - 2, 0, 0]


def test_a_client_that_leaves_frees_its_place(server: Server) -> None:
    server.engine.ends, ends = frozenset(), server.engine.ends
    body = {"model": "tiny", "prompt": "the cat", "max_tokens": 110, "temperature": 0}
    forward = server.engine.model.forward

    def slow(*args: Any, **kwargs: Any) -> Any:
        time.sleep(0.05)
        return forward(*args, **kwargs)

    server.engine.model.forward = slow
    try:
        with server.http.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
            lines = answer.iter_lines()                    # kept: httpx closes the connection with the iterator
            next(lines)
            assert server.engine._active
        wait(lambda: not server.engine._active, 3)
        with pytest.raises(httpx.ReadTimeout):
            server.http.post("/v1/completions", json=body, timeout=0.3)
        wait(lambda: not server.engine._active, 3)
    finally:
        server.engine.model.forward, server.engine.ends = forward, ends
    assert 'finished_reason="abort"' in server.http.get("/metrics").text


def test_more_requests_than_may_wait_get_429_with_a_time_to_come_again(llama: Path) -> None:
    server = Server(llama, max_sequences=1, max_queued=1)
    server.engine.ends = frozenset()

    async def burst() -> list[httpx.Response]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(server.app), base_url="http://x",
                                     headers={"Authorization": f"Bearer {KEY}"}, timeout=60) as http:
            body = {"model": "tiny", "prompt": "x", "max_tokens": 60}
            return list(await asyncio.gather(*(http.post("/v1/completions", json=body) for _ in range(6))))

    try:
        answers = asyncio.run(burst())
    finally:
        server.close()
    assert sorted(answer.status_code for answer in answers)[0] == 200
    refused = [answer for answer in answers if answer.status_code == 429]
    assert refused and all(answer.headers["Retry-After"] and answer.json()["error"]["code"] == "queue_full" for answer in refused)


def test_a_dead_engine_is_said_to_clients_and_to_health(llama: Path) -> None:
    server = Server(llama)

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no more memory")

    server.engine.model.forward = broken
    try:
        first = server.events()[-1]
        status, error = server.refused()
        health = server.http.get("/health")
    finally:
        server.close()
    assert "no more memory" in first["error"]["message"] and (status, error["code"]) == (503, "engine_failed") and health.status_code == 503


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_there_is_no_memory_for_is_told_so_and_the_next_is_answered(stream: bool, server: Server) -> None:
    forward = server.engine.model.forward

    def full(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    server.engine.model.forward = full
    try:
        status, error = (503, server.events()[0]["error"]) if stream else server.refused()
    finally:
        server.engine.model.forward = forward
    assert (status, error["code"], error["type"]) == (503, "out_of_memory", "server_error") and "no memory for a prompt" in error["message"]
    assert server.complete(max_tokens=3)["usage"]["completion_tokens"] == 3


def test_the_openai_client_works_sync_async_and_streaming(server: Server) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0)
    messages: Any = [{"role": "user", "content": "hi"}]
    whole = client.chat.completions.create(model="tiny", messages=messages, max_completion_tokens=6, temperature=0)
    pieces = client.chat.completions.create(model="tiny", messages=messages, max_completion_tokens=6, temperature=0, stream=True)
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == whole.choices[0].message.content
    assert [model.id for model in client.models.list()] == ["tiny"]
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="other", prompt="x")
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0).models.list()

    async def work() -> str:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=KEY) as other:
            return "".join([piece.choices[0].text async for piece in await other.completions.create(
                model="tiny", prompt="the cat", max_tokens=8, temperature=0, stream=True)])

    assert asyncio.run(work()) == server.complete(max_tokens=8)["choices"][0]["text"]


def test_query_streams_the_text_and_says_what_is_wrong(server: Server) -> None:
    assert "".join(query(server.url, KEY, "the cat", 8)) == server.complete(max_tokens=8)["choices"][0]["text"]
    assert list(query(f"{server.url}/v1", KEY, "hi", 8, chat=True))
    with pytest.raises(ServeError, match="API key"):
        list(query(server.url, "wrong", "x"))
    with pytest.raises(ServeError, match="top_k"):
        list(query(server.url, KEY, "x", top_k=3))
    with pytest.raises(ServeError, match="cannot be reached"):
        list(query("http://127.0.0.1:9", KEY, "x"))
