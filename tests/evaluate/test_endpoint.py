"""An endpoint that is asked for a corpus gives the numbers of its model; one that cannot be asked is told apart by why."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from distlm.errors import DistlmError, InputError, ServeError
from distlm.evaluate import endpoint as endpoints
from distlm.evaluate.driver import evaluate
from distlm.evaluate.endpoint import find_endpoint, find_tokenizer
from distlm.evaluate.task import Task
from distlm.runs import RunFolder
from distlm.spec import EvaluateSpec
from distlm.storage import Storage, write_json
from tests.corpus.made import make
from tests.evaluate.models import evaluated, make_model
from tests.evaluate.test_evaluate import DOCS, SOURCES
from tests.records import Records
from tests.serve.test_api import KEY, Server
from tests.train.ranks import make_packed_corpus


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("endpoint")
    make(root / "two", [*DOCS], sources=SOURCES)
    make_packed_corpus(root / "packed")
    make_packed_corpus(root / "chat", conversations=True)
    make_model(root / "model", root / "two")
    make_model(root / "other", root / "packed")
    for name, key in ("key", KEY), ("wrong", KEY[::-1]):
        (root / name).write_text(key)
        os.chmod(root / name, 0o600)
    return root


@pytest.fixture(scope="module")
def servers(root: Path) -> Iterator[dict[str, Server]]:
    made = {name: Server(root / name, max_sequences=2, max_queued=1) for name in ("model", "other")}
    yield made
    for server in made.values():
        server.close()


def asked(root: Path, url: str, corpus: str | None = "two", **keys: Any) -> EvaluateSpec:
    return EvaluateSpec.model_validate({"name": "e", "corpus": corpus and str(root / corpus), "batch_windows": 3,
                                        "endpoint": {"url": url, "api_key_file": str(root / "key")}, **keys})


def run(spec: EvaluateSpec, root: Path, folder: Path, progress: Records | None = None) -> dict[str, Any]:
    return evaluate(spec, RunFolder(folder), Storage(root), progress or Records())


@pytest.mark.parametrize(("corpus", "name"), [("two", "model"), ("packed", "other"), ("chat", "other")])
def test_an_endpoint_has_the_numbers_of_its_model(corpus: str, name: str, root: Path, servers: dict[str, Server], tmp_path: Path) -> None:
    shown = Records()
    found = run(asked(root, servers[name].url, corpus, concurrent=4), root, tmp_path, shown)
    own = evaluated(EvaluateSpec(name="e", model=str(root / name), corpus=str(root / corpus)), Storage(root))
    assert found["loss"] == pytest.approx(own["loss"], abs=1e-5) and found["ece"] == pytest.approx(own["ece"], abs=1e-4)
    assert (found["tokens"], found["accuracy"], found["windows"]) == (own["tokens"], own["accuracy"], own["windows"])
    for source, one in own["corpora"][corpus]["sources"].items():
        assert found["corpora"][corpus]["sources"][source]["loss"] == pytest.approx(one["loss"], abs=1e-5)
    assert found["evaluated"] == f"tiny at {servers[name].url}/v1" and (tmp_path / "report.html").exists()
    sent_again = [note for note in shown.notes if "sent" in note]              # of three requests one may wait
    assert not sent_again or "the endpoint was full" in sent_again[0]


def test_prompts_are_completed_by_the_endpoint(root: Path, servers: dict[str, Server], tmp_path: Path) -> None:
    [sample] = run(asked(root, servers["model"].url, windows=1, prompts=["def"], max_tokens=4), root, tmp_path)["samples"]
    assert sample == {"prompt": "def", "completion": servers["model"].complete(prompt=[104, 105, 106], max_tokens=4)["choices"][0]["text"]}


def test_an_endpoint_of_ours_is_found_by_name_and_by_url(root: Path, servers: dict[str, Server], tmp_path: Path) -> None:
    server, storage = servers["model"], Storage(tmp_path)
    record = {"url": f"{server.url}/v1", "model": "tiny", "api_key_file": str(root / "key"), "app": "py", "version": "v1"}
    write_json(storage.endpoint("py") / "endpoint.json", record)
    for given in ("py", f"{server.url}/v1"):
        spec = asked(root, "http://x", endpoint=given, windows=2)
        assert find_endpoint(spec, storage).told() == {"endpoint": f"{server.url}/v1", "endpoint_model": "tiny", "version": "v1",
                                                       "source": None, "lineage": None}
        assert run(spec, tmp_path, tmp_path / "e")["tokens"] == 32
    with pytest.raises(InputError, match=r"endpoint: there is no endpoint pyy under .*; did you mean py\?"):
        run(asked(root, "http://x", endpoint="pyy"), tmp_path, tmp_path / "e")
    write_json(storage.endpoint("py") / "endpoint.json", {**record, "model": "another"})
    with pytest.raises(ServeError, match="does not prove that it knows its key and serves its model; `distlm status py`"):
        run(asked(root, "http://x", endpoint="py"), tmp_path, tmp_path / "e")


def test_an_adapter_of_an_endpoint_of_ours_is_known_by_address_and_key(root: Path, servers: dict[str, Server], tmp_path: Path) -> None:
    server, storage = servers["model"], Storage(tmp_path)
    record = {"url": f"{server.url}/v1", "model": "tiny", "api_key_file": str(root / "key"), "app": "py", "version": "v1", "source": "s",
              "folder": str(tmp_path / "own"), "lineage": {"run": "base"}, "adapters": {"poems": {"run": "poems"}}}
    write_json(storage.endpoint("py") / "endpoint.json", record)
    given = {"url": server.url, "api_key_file": str(root / "key")}
    for model, lineage in (("poems", {"run": "poems"}), (None, {"run": "base"})):
        found = find_endpoint(asked(root, "", endpoint={**given, "model": model}), storage)
        assert found.told() == {"endpoint": record["url"], "endpoint_model": model or "tiny", "version": "v1", "source": "s",
                                "lineage": lineage}
    for other in ({"url": "http://127.0.0.1:9"}, {"api_key_file": str(root / "wrong")}):
        assert find_endpoint(asked(root, "", endpoint={**given, **other}), storage).told().keys() == {"endpoint"}, "it is somebody else's"
    questions, own = asked(root, "", corpus=None, tasks=["t.yaml"], endpoint={**given, "model": "poems"}), tmp_path / "own" / "adapters"
    write_json(own / "poems" / "tokenizer.json", {})
    assert find_tokenizer(questions, Task("val", (), 8, 15), find_endpoint(questions, storage), storage) == own / "poems"
    write_json(storage.endpoint("py") / "endpoint.json", {**record, "model": "another"})
    with pytest.raises(ServeError, match="does not prove that it knows its key"):
        run(asked(root, "", endpoint={**given, "model": "poems"}), tmp_path, tmp_path / "e")


def test_what_is_wrong_with_an_endpoint_is_said(root: Path, servers: dict[str, Server], tmp_path: Path) -> None:
    url = servers["model"].url
    given = {"url": url, "api_key_file": str(root / "key")}
    for spec, kind, message in (
            (asked(root, url, endpoint={**given, "api_key_file": str(root / "wrong")}), InputError,
             "endpoint: .*/wrong: the endpoint refuses the key; name the file"),
            (asked(root, url, endpoint={**given, "api_key_file": str(root / "none")}), InputError, "there is no such API key file"),
            (asked(root, "http://127.0.0.1:9"), ServeError, "endpoint: http://127.0.0.1:9/v1: the endpoint cannot be reached"),
            (asked(root, url, endpoint={**given, "model": "gpt"}), InputError, "it does not serve gpt; it serves tiny"),
            (asked(root, url, "packed"), InputError, "the tokenizer of the model that it serves is not that of the corpus packed"),
            (asked(root, f"{url}/elsewhere"), ServeError, r"Not Found \(status 404\)")):
        with pytest.raises(kind, match=message):
            run(spec, root, tmp_path)
    make(tmp_path / "wide", [*DOCS], context=32)
    with pytest.raises(InputError, match="it takes 16 tokens of context, and the corpus wide has windows of 32"):
        run(asked(root, url, corpus=str(tmp_path / "wide")), root, tmp_path)


@pytest.mark.parametrize(("answer", "message"), [
    ({"choices": [{"index": 0, "text": "", "logprobs": {"tokens": ["a"]}}]}, "does not give back the tokens of a prompt by their ids"),
    ({"choices": []}, "does not give back the tokens"), (None, r"busy \(status 503\)")])
def test_an_endpoint_that_answers_something_else_ends_the_job(answer: Any, message: str, root: Path, tmp_path: Path,
                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    def respond(request: httpx.Request) -> httpx.Response:
        if request.method == "GET":
            return httpx.Response(200, json={"data": [{"id": "foreign"}]})
        return httpx.Response(200, json=answer) if answer else httpx.Response(503, json={"error": {"message": "busy"}})

    make_client = httpx.Client
    monkeypatch.setattr(endpoints.httpx, "Client", lambda **given: make_client(transport=httpx.MockTransport(respond)))
    shown = Records()
    with pytest.raises(DistlmError, match=message):
        run(asked(root, "http://foreign", concurrent=2), root, tmp_path, shown)
    assert "does not tell its tokenizer" in shown.text


def test_a_full_endpoint_is_asked_again_and_that_is_on_record(root: Path, servers: dict[str, Server], tmp_path: Path,
                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    refused, request = [], httpx.Client.request

    def busy(self: httpx.Client, method: str, url: str, **given: Any) -> httpx.Response:
        if method == "POST" and len(refused) < 2:
            refused.append(url)
            return httpx.Response(429, headers={"Retry-After": "0"}, json={"error": {"message": "full"}})
        return request(self, method, url, **given)

    monkeypatch.setattr(httpx.Client, "request", busy)
    shown = Records()
    assert run(asked(root, servers["model"].url, windows=6, concurrent=1), root, tmp_path, shown)["tokens"] == 96
    assert shown.notes[-1] == "the endpoint was full, and requests were sent 2 times again"
    assert RunFolder(tmp_path).events()[-1]["message"] == shown.notes[-1]


def test_an_endpoint_that_does_not_answer_is_told_from_one_that_is_not_there(root: Path, tmp_path: Path,
                                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distlm.evaluate.endpoint.ANSWER_S", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        given = EvaluateSpec.model_validate({"name": "e", "corpus": str(root / "two"), "endpoint": {
            "url": f"http://127.0.0.1:{silent.getsockname()[1]}", "api_key_file": str(root / "key")}})
        with pytest.raises(ServeError, match=r"has not answered a request in 0\.1 s"):
            evaluate(given, RunFolder(tmp_path), Storage(root), Records())
