"""Classifiers behind the API: the probabilities are transformers' own, and what they cannot do is refused by name."""

import asyncio
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from distlm import endpoints, execute, plan, summary
from distlm.cli import jobs
from distlm.errors import InputError, ServeError
from distlm.serve.api import Card, create_app
from distlm.serve.classifier import TorchClassifier
from distlm.serve.client import CUT, classify
from distlm.serve.engine import EngineFailed
from distlm.serve.guard import make_key
from distlm.serve.metrics import Metrics
from distlm.spec import ServeSpec
from distlm.storage import Storage, write_json
from tests.serve.test_api import Server
from tests.serve.tiny_models import make_classifier

KEY = "sk-0123456789abcdef"
TEXTS = ["the cat sat", "def main(argument):\n    return 1", "x", "the dog — naïve — barked " * 4]


def client_of(engine: Any) -> httpx.AsyncClient:
    app = create_app(engine, Card("tiny"), KEY, Metrics())
    return httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://test",
                             headers={"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"})


async def post(client: httpx.AsyncClient, path: str = "classify", **body: Any) -> httpx.Response:
    return await client.post(f"/v1/{path}", content=json.dumps({"model": "tiny", **body}))


async def health(engine: Any) -> httpx.Response:
    async with client_of(engine) as client:
        return await client.get("/health")


def answer(engine: Any, path: str = "classify", **body: Any) -> tuple[int, dict[str, Any]]:
    async def ask() -> httpx.Response:
        async with client_of(engine) as client:
            return await post(client, path, **body)

    found = asyncio.run(ask())
    return found.status_code, found.json()


def reference(folder: Path, text: str) -> list[float]:
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([tokenizer(text)["input_ids"]])).logits[0]
    return (logits.sigmoid() if model.config.problem_type.startswith("multi") else logits.softmax(0)).tolist()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_classifier(tmp_path_factory.mktemp("classifier"))


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[TorchClassifier]:
    yield TorchClassifier(folder, threads=1, max_sequences=3)


@pytest.mark.parametrize(("family", "multiple"), [("llama", False), ("gpt2", False), ("llama", True)])
def test_the_probabilities_are_those_of_transformers(tmp_path: Path, family: str, multiple: bool) -> None:
    made = make_classifier(tmp_path, family, multiple=multiple)
    engine = TorchClassifier(made, threads=1, max_sequences=3)
    status, found = answer(engine, input=TEXTS)
    assert status == 200 and [one["index"] for one in found["data"]] == [0, 1, 2, 3] and found["model"] == "tiny"
    for text, one in zip(TEXTS, found["data"], strict=True):
        wanted = reference(made, text)
        assert list(one["probabilities"]) == ["ham", "spam", "eggs"]
        assert list(one["probabilities"].values()) == pytest.approx(wanted, abs=1e-6)
        names = [name for name, chance in one["probabilities"].items() if chance > 0.5]
        best = ("ham", "spam", "eggs")[wanted.index(max(wanted))]
        assert (one["label"], one["labels"]) == ((None, names) if multiple else (best, None))
    assert found["usage"]["prompt_tokens"] == sum(len(engine.tokenizer(text)["input_ids"]) for text in TEXTS)
    assert answer(engine, input=TEXTS[0])[1]["data"][0]["probabilities"] == pytest.approx(found["data"][0]["probabilities"], abs=1e-6)


@pytest.mark.parametrize("multiple", [False, True])
def test_tokens_are_taken_by_their_ids_and_logits_are_given(tmp_path: Path, multiple: bool) -> None:
    made = make_classifier(tmp_path, multiple=multiple)
    engine = TorchClassifier(made, threads=1, max_sequences=3)
    ids, model = [engine.encode(text) for text in TEXTS], AutoModelForSequenceClassification.from_pretrained(made).eval()
    texts, tokens = answer(engine, input=TEXTS)[1], answer(engine, input=ids, use_activation=None, user=None)[1]
    assert tokens == texts and answer(engine, input=ids[1])[1]["data"][0]["label"] == texts["data"][1]["label"]
    for one, given, other in zip(answer(engine, input=ids, use_activation=False)[1]["data"], ids, texts["data"], strict=True):
        with torch.no_grad():
            wanted = model(input_ids=torch.tensor([given])).logits[0].tolist()
        assert one["logits"] == pytest.approx(dict(zip(("ham", "spam", "eggs"), wanted, strict=True)), abs=1e-5)
        assert (one["label"], one["labels"], one.keys()) == (other["label"], other["labels"], {"index", "label", "labels", "logits"})


def test_the_end_of_a_pipeline_asks_as_any_client_does(folder: Path, llama: Path, tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text(KEY)
    key.chmod(0o600)
    made: dict[str, Any] = {"model": "tiny", "api_key_file": str(key)}
    server = Server(folder, TorchClassifier, max_sequences=2)
    try:
        said = summary.ask({**made, "url": server.url, "classifier": True}, TEXTS[0])
        wanted = sorted(zip(reference(folder, TEXTS[0]), ("ham", "spam", "eggs"), strict=True), reverse=True)
        assert said == ", ".join(f"{name} {chance:.3f}" for chance, name in wanted)
        with pytest.raises(ServeError, match=r"the endpoint did not classify a text: .*an empty text has no label") as caught:
            summary.ask({**made, "url": server.url, "classifier": True}, "")
        assert caught.value.where == server.url
    finally:
        server.close()
    server = Server(llama, max_sequences=1)
    try:
        alone = server.complete(prompt="the cat", **summary.SAMPLING)["choices"][0]["text"]
        assert alone and summary.ask({**made, "url": server.url}, "the cat") == alone
        assert summary.ask({**made, "url": f"{server.url}/v1"}, "the cat") == alone
    finally:
        server.close()
    with pytest.raises(ServeError, match=r"the endpoint did not complete a prompt: .*cannot be reached"):
        summary.ask({**made, "url": server.url}, "the cat")


def test_a_text_that_spells_the_end_token_is_text(engine: TorchClassifier) -> None:
    status, found = answer(engine, input="the cat<|endoftext|>")
    assert status == 200 and found["usage"]["prompt_tokens"] > len(engine.tokenizer("the cat")["input_ids"]) + 3


@pytest.mark.parametrize(("body", "text"), [
    ({"input": ""}, "input: an empty text has no label"), ({"input": []}, "input must be a string, a list of strings, a list of token ids"),
    ({}, "the field input is missing"), ({"input": [1, "a"]}, "input must be a string"), ({"input": [[1], []]}, "input must be a string"),
    ({"input": [[1], [300]]}, "input: 300 is no token id; there are 0 to 299"), ({"input": [1] * 129}, "and a text has 129"),
    ({"input": "a", "temperature": 1}, "temperature is not supported by this endpoint"),
    ({"input": "the cat " * 200}, "this model's maximum context length is 128 tokens, and a text has"),
    ({"input": "\ud800"}, "half a surrogate pair")])
def test_what_is_no_text_is_refused(engine: TorchClassifier, body: dict[str, Any], text: str) -> None:
    status, found = answer(engine, **body)
    assert status == 400 and text in found["error"]["message"], found


def test_each_kind_of_model_refuses_what_the_other_does(engine: TorchClassifier, llama: Path) -> None:
    from distlm.serve.torch_engine import TorchEngine

    status, found = answer(engine, "completions", prompt="a")
    assert (status, found["error"]["code"]) == (400, "no_language_model") and "'tiny' is a classifier" in found["error"]["message"]
    status, found = answer(engine, "chat/completions", messages=[{"role": "user", "content": "hi"}])
    assert (status, found["error"]["code"]) == (400, "no_language_model")
    assert answer(engine, input="a", model="other")[0] == 404
    language = TorchEngine(llama, threads=1, max_sequences=1)
    try:
        status, found = answer(language, input="a")
        assert (status, found["error"]["code"]) == (400, "no_classifier")
    finally:
        language.close()


def test_more_requests_than_may_wait_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = 40                                             # more than asyncio's own threads, which must not be what limits
    engine = TorchClassifier(folder, threads=1, max_queued=limit)
    go, chances = threading.Event(), {"ham": 1.0}
    monkeypatch.setattr(engine, "_values", lambda *_: [chances] if go.wait(20) else [])

    async def flood() -> tuple[httpx.Response, list[httpx.Response]]:
        async with client_of(engine) as client:
            asked = {asyncio.ensure_future(post(client, input="x")) for _ in range(limit + 2)}
            done, waiting = await asyncio.wait(asked, timeout=10, return_when=asyncio.FIRST_COMPLETED)
            go.set()
            [refused] = done
            return await refused, await asyncio.gather(*waiting)

    try:
        refused, others = asyncio.run(flood())
        assert refused.status_code == 429 and refused.headers["retry-after"] == "2"
        assert (refused.json()["error"]["code"], refused.json()["error"]["type"]) == ("queue_full", "rate_limit_error")
        assert [one.status_code for one in others] == [200] * (limit + 1)
        assert answer(engine, input="x")[1]["data"][0]["probabilities"] == chances       # they have left
    finally:
        go.set()
        engine.close()


def test_an_engine_that_fails_says_so_and_is_not_healthy(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, model = TorchClassifier(folder, threads=1), TorchClassifier(folder, threads=1).model

    def broken(error: Exception) -> None:
        def fail(**_: Any) -> None:
            raise error
        monkeypatch.setattr(engine, "model", fail)

    broken(torch.OutOfMemoryError("CUDA out of memory"))
    status, found = answer(engine, input="x")
    assert (status, found["error"]["code"]) == (503, "out_of_memory") and asyncio.run(health(engine)).status_code == 200
    monkeypatch.setattr(engine, "model", model)
    kept = model.score.weight.detach().clone()
    torch.nn.init.constant_(model.score.weight, torch.inf)
    for activation in (True, False):
        status, found = answer(engine, input="x", use_activation=activation)
        assert (status, found["error"]["code"], found["error"]["type"]) == (500, "nonfinite_logits", "server_error")
    model.score.weight.data.copy_(kept)
    assert answer(engine, input="x")[0] == asyncio.run(health(engine)).status_code == 200, "others are answered"
    broken(RuntimeError("CUDA error: an illegal memory access was encountered"))
    said = "the engine has died: RuntimeError: CUDA error: an illegal memory access was encountered"
    status, found = answer(engine, input="x")
    assert (status, found["error"]) == (503, {"message": said, "type": "server_error", "param": None, "code": "engine_failed"})
    monkeypatch.setattr(engine, "model", model)
    with pytest.raises(EngineFailed, match="CUDA error"):  # what Ray Serve asks: it starts another replica
        engine.check()
    assert answer(engine, input="x")[0] == 503 and asyncio.run(health(engine)).status_code == 503


@pytest.mark.parametrize("multiple", [False, True])
def test_query_shows_the_labels_that_the_endpoint_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
                                                        multiple: bool) -> None:
    server = Server(make_classifier(tmp_path / "model", multiple=multiple), TorchClassifier)
    try:
        [card] = server.http.get("/v1/models").json()["data"]
        assert (card["labels"], card["multiple_labels"]) == (["ham", "spam", "eggs"], multiple)
        chances = dict(zip(card["labels"], reference(tmp_path / "model", TEXTS[1]), strict=True))
        key = make_key(tmp_path / "key")
        key.write_text(KEY)
        folder = Storage(tmp_path).endpoint("c")
        folder.mkdir(parents=True)
        write_json(folder / "endpoint.json", {"url": f"{server.url}/v1", "model": "tiny", "api_key_file": str(key), "classifier": True})
        monkeypatch.setenv("DISTLM_STORAGE", str(tmp_path))
        [found] = endpoints.classify("c", TEXTS[1:2])
        assert found["probabilities"] == pytest.approx(chances, abs=1e-6)
        assert [found] == classify(server.url, KEY, [TEXTS[1]])
        jobs.query("c", TEXTS[1])
        *rows, last = [line.split() for line in capsys.readouterr().out.splitlines()]
        assert rows == [["label", "probability"], *([label, f"{chance:.2%}"] for label, chance in
                                                    sorted(chances.items(), key=lambda one: -one[1]))]
        over = [label for label, chance in chances.items() if chance > 0.5]
        assert last == (["labels", *", ".join(over or ["none"]).split()] if multiple else ["label", rows[1][0]])
        with pytest.raises(InputError, match="c is a classifier and completes no text; leave out --chat"):
            jobs.query("c", "x", chat=True)
        with pytest.raises(ServeError, match=r"an empty text has no label \(status 400\)"):
            endpoints.classify("c", [""])
    finally:
        server.close()


def test_a_classifier_without_padding_cannot_be_served(tmp_path: Path) -> None:
    made = make_classifier(tmp_path)
    config = json.loads((made / "config.json").read_text())
    (made / "config.json").write_text(json.dumps({**config, "pad_token_id": None}))
    with pytest.raises(InputError, match="names no pad_token_id") as caught:
        TorchClassifier(made)
    assert caught.value.where == str(made)


@pytest.mark.parametrize(("changes", "text"), [
    ({"problem_type": "regression", "id2label": {"0": "stars"}}, "it gives a text a number and tells no labels apart"),
    ({"problem_type": None, "id2label": {"0": "spam"}}, "it has one label, which every text would have; take a classifier of two"),
    ({"problem_type": "multi_label_classification", "id2label": {"0": "spam"}}, "")])
def test_a_model_that_tells_no_labels_apart_cannot_be_served(tmp_path: Path, changes: dict[str, Any], text: str) -> None:
    made = make_classifier(tmp_path)
    config = {**json.loads((made / "config.json").read_text()), **changes, "label2id": {}}
    model = AutoModelForSequenceClassification.from_config(AutoConfig.for_model(**config))
    model.save_pretrained(made)
    (made / "config.json").write_text(json.dumps({**json.loads((made / "config.json").read_text()), **changes}))
    if not text:
        assert TorchClassifier(made).labels == ["spam"]
        return
    spec, storage = ServeSpec(name="s", model=str(made)), Storage(tmp_path)
    for told in (lambda: TorchClassifier(made), lambda: execute.inputs(spec, storage), lambda: plan.of_serve(spec, storage)):
        with pytest.raises(InputError, match=text):
            told()


def test_a_text_that_is_longer_than_the_documents_is_cut_as_they_were_and_that_is_told(tmp_path: Path) -> None:
    made = make_classifier(tmp_path)
    (made / "distlm.json").write_text(json.dumps({"cut_tokens": 20}))
    engine, text = TorchClassifier(made, threads=1, max_sequences=2), "the cat sat on the mat and the dog barked " * 20
    ids = engine.tokenizer(text)["input_ids"]
    assert len(ids) > 128 and len(engine.tokenizer(TEXTS[0])["input_ids"]) < 20
    status, found = answer(engine, input=[text, TEXTS[0]])
    assert status == 200 and [one.get("truncated") for one in found["data"]] == [True, None]
    assert found["usage"]["prompt_tokens"] == 20 + len(engine.tokenizer(TEXTS[0])["input_ids"])
    with torch.no_grad():
        logits = AutoModelForSequenceClassification.from_pretrained(made)(input_ids=torch.tensor([ids[:20]])).logits[0]
    assert list(found["data"][0]["probabilities"].values()) == pytest.approx(logits.softmax(0).tolist(), abs=1e-6)
    server = Server(made, TorchClassifier)
    try:
        assert [one["truncated"] for one in classify(server.url, KEY, [text, TEXTS[0]])] == [True, False]
        asked = {"url": server.url, "model": "tiny", "api_key_file": str(make_key(tmp_path / "key")), "classifier": True}
        (tmp_path / "key").write_text(KEY)
        assert [CUT in summary.ask(asked, one) for one in (text, TEXTS[0])] == [True, False]
    finally:
        server.close()
    (made / "distlm.json").write_text(json.dumps({"cut_tokens": 0}))
    with pytest.raises(InputError, match=r"distlm\.json: cut_tokens: 0 is no number of tokens"):
        TorchClassifier(made)
