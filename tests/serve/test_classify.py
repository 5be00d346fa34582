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
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from distlm.errors import ServeError
from distlm.serve.api import Card, create_app
from distlm.serve.classifier import TorchClassifier
from distlm.serve.engine import EngineFull
from distlm.serve.metrics import Metrics
from tests.serve.tiny_models import make_classifier

KEY = "sk-0123456789abcdef"
TEXTS = ["the cat sat", "def main(argument):\n    return 1", "x", "the dog — naïve — barked " * 4]


def answer(engine: Any, path: str = "classify", **body: Any) -> tuple[int, dict[str, Any]]:
    app = create_app(engine, Card("tiny"), KEY, Metrics())

    async def post() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://test") as client:
            return await client.post(f"/v1/{path}", content=json.dumps({"model": "tiny", **body}),
                                     headers={"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"})

    found = asyncio.run(post())
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


def test_a_text_that_spells_the_end_token_is_text(engine: TorchClassifier) -> None:
    status, found = answer(engine, input="the cat<|endoftext|>")
    assert status == 200 and found["usage"]["prompt_tokens"] > len(engine.tokenizer("the cat")["input_ids"]) + 3


@pytest.mark.parametrize(("body", "text"), [
    ({"input": ""}, "input: an empty text has no label"), ({"input": []}, "input must be a string, or a list of strings that is not empty"),
    ({}, "the field input is missing"), ({"input": [1, 2]}, "input must be a string"),
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
    engine = TorchClassifier(folder, threads=1, max_queued=0)
    entered, go = threading.Event(), threading.Event()
    monkeypatch.setattr(engine, "_probabilities", lambda texts: entered.set() or (go.wait(20) and [{}]))
    first = threading.Thread(target=engine.classify, args=([[1]],))
    first.start()
    assert entered.wait(20)
    with pytest.raises(EngineFull, match="1 requests are here"):
        engine.classify([[1]])
    go.set()
    first.join(20)
    assert engine.classify([[1]]) == [{}]


def test_a_classifier_without_padding_cannot_be_served(tmp_path: Path) -> None:
    made = make_classifier(tmp_path)
    config = json.loads((made / "config.json").read_text())
    (made / "config.json").write_text(json.dumps({**config, "pad_token_id": None}))
    with pytest.raises(ServeError, match="names no pad_token_id"):
        TorchClassifier(made)
