"""The serve job: what it finds and refuses, and one endpoint on a real Ray Serve."""

import contextlib
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import pytest
import ray
from typer.testing import CliRunner

from distlm import endpoints, execute, jobs, summary
from distlm.cli import app
from distlm.errors import ClusterError, InputError, ServeError, StorageError
from distlm.model import adapter_folder
from distlm.progress import Progress
from distlm.runs import RunFolder
from distlm.serve import deploy
from distlm.serve.client import healthy, query
from distlm.spec import ServeSpec
from distlm.storage import Storage, read_json
from tests.records import Records
from tests.serve.test_classify import reference as classified
from tests.serve.test_torch_engine import reference
from tests.serve.tiny_models import LLAMA, make_adapter, make_classifier, make_model


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Storage:
    storage = Storage(tmp_path_factory.mktemp("storage"))
    make_model(storage.run("tiny") / "export", LLAMA, chat=True)
    return storage


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield
    ray.serve.shutdown()
    ray.shutdown()


def endpoint(storage: Storage, **fields: Any) -> tuple[ServeSpec, RunFolder, Storage, Progress]:
    spec = ServeSpec(**{"name": "py", "model": "tiny", "port": 0, "threads": 1, "cpus_per_replica": 0.5, **fields})
    return spec, RunFolder.create(storage.endpoint(spec.name), "kind: serve\n", {}, resume=True), storage, Progress.for_stdout()


def test_a_taken_port_is_an_error_with_a_remedy() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ServeError, match=f"{port} is taken.*port: 0"):
            deploy.free_port("127.0.0.1", port)
    assert deploy.free_port("127.0.0.1", port) == port and deploy.free_port("127.0.0.1", 0) > 0
    with pytest.raises(ServeError, match="cannot be listened on"):
        deploy.free_port("192.0.2.1", port)


class FakeServe:
    """Ray Serve as `deploy.serve` sees it. `fails` is raised by what `at` names, after a deployment of what is not `kept`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.running: dict[str, Path] = {}
        self.fails: BaseException | None = None
        self.at, self.kept, self.last = "wait_until_running", "", ""
        for name in ("wait_until_running", "wait_until_healthy", "write_json"):
            monkeypatch.setattr(deploy, name, self.failing(name, getattr(deploy, name) if name == "write_json" else None))
        monkeypatch.setattr(deploy, "deploy", self.deploy)
        monkeypatch.setattr(deploy, "remove", lambda app: self.running.pop(app, None))
        monkeypatch.setattr(deploy, "applications", lambda: {app: {"status": "RUNNING", "route_prefix": "/"} for app in self.running})
        monkeypatch.setattr(deploy, "start", lambda spec: ("127.0.0.1", 1))
        monkeypatch.setattr(deploy, "require", lambda *_, **__: None)
        monkeypatch.setattr(deploy, "has_room", lambda spec: True)
        monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(gcs_address="127.0.0.1:2"))

    def failing(self, name: str, real: Any) -> Any:
        def call(*given: Any) -> None:
            if self.fails and name == self.at and self.last != self.kept:
                raise self.fails
            if real:
                real(*given)
        return call

    def deploy(self, record: dict[str, Any], prefix: str, *, surge: bool) -> None:
        self.running[record["app"]], self.last = Path(record["folder"]), record["version"]


@pytest.mark.parametrize(("nodes", "room"), [([{"CPU": 1.0}, {"CPU": 1.0, "GPU": 1.0}], False), ([{"GPU": 1.0}, {"CPU": 2.0}], False),
                                             ([{"CPU": 1.0}, {"CPU": 2.0, "GPU": 1.0}], True), ([{}], False)])
def test_a_replica_has_room_where_one_node_holds_it_whole(nodes: list[dict[str, float]], room: bool,
                                                                monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray._private.state.available_resources_per_node", lambda: dict(enumerate(nodes)))
    assert deploy.has_room(ServeSpec(name="x", model="m", cpus_per_replica=2, gpus_per_replica=1)) is room


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeServe:
    return FakeServe(monkeypatch)


def given_model(tmp_path: Path, **fields: Any) -> tuple[ServeSpec, RunFolder, Storage, Records]:
    """Of an endpoint of a run whose weights are large enough to be linked."""
    export = tmp_path / "runs" / "tiny" / "export"
    export.mkdir(parents=True, exist_ok=True)
    (export / "config.json").write_text("{}")
    (export / "distlm.json").write_text('{"run": "tiny"}')
    (export / "model.safetensors").write_bytes(bytes(deploy.COPIED_BYTES + 1))
    if (folder := RunFolder(tmp_path / "endpoints" / "py")).exists():
        folder.event("succeeded", "completed")             # as execute.run records it
    *given, _ = endpoint(Storage(tmp_path), **fields)
    return (*given, Records())


@pytest.mark.parametrize("links", [True, False])
def test_an_endpoint_owns_the_files_that_its_replicas_load(links: bool, fake: FakeServe, tmp_path: Path,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    if not links:
        monkeypatch.setattr(deploy.os, "link", lambda *_: (_ for _ in ()).throw(OSError("no links here")))
    deploy.serve(*given_model(tmp_path))
    folder, first = tmp_path / "endpoints" / "py", fake.running["py"]
    run = tmp_path / "runs" / "tiny"
    assert first.parent == folder / "models" and (first / "model.safetensors").samefile(run / "export" / "model.safetensors") == links
    (run / "export" / "config.json").write_text("edited")
    run.rename(run.with_name("tiny.old-1"))                # as a pipeline that trains again
    assert (first / "config.json").read_text() == "{}" and (first / "model.safetensors").stat().st_size == deploy.COPIED_BYTES + 1
    assert read_json(folder / "endpoint.json")["lineage"] == {"run": "tiny"}

    deploy.serve(*given_model(tmp_path))
    assert list((folder / "models").iterdir()) == [fake.running["py"]] != [first], "an earlier version's are gone"
    deploy.undeploy("py", Storage(tmp_path))
    assert not (folder / "models").exists()


@pytest.mark.parametrize(("at", "error"), [("wait_until_running", ServeError("it fails")), ("wait_until_running", KeyboardInterrupt()),
                                           ("write_json", StorageError("no space left"))])
def test_an_endpoint_that_is_too_busy_to_say_so_is_kept_when_its_replacement_fails(at: str, error: BaseException, fake: FakeServe,
                                                                                   tmp_path: Path) -> None:
    deploy.serve(*given_model(tmp_path))                   # nothing answers at its address
    folder, first = tmp_path / "endpoints" / "py", fake.running["py"]
    before = read_json(folder / "endpoint.json")
    fake.fails, fake.at, fake.kept = error, at, before["version"]
    with pytest.raises(type(error)):
        deploy.serve(*given_model(tmp_path))
    assert fake.running == {"py": first} and read_json(folder / "endpoint.json") == before
    assert list((folder / "models").iterdir()) == [first]

    fake.kept = ""                                         # what was before cannot be brought back either
    with pytest.raises(type(error)):
        deploy.serve(*given_model(tmp_path))
    assert fake.running == {"py": first} and read_json(folder / "endpoint.json") == before

    (folder / "endpoint.json").unlink()                    # it runs, and nobody knows from what
    with pytest.raises(type(error)):
        deploy.serve(*given_model(tmp_path))
    assert "py" in fake.running and fake.running["py"].is_dir()


@pytest.mark.parametrize("at", ["wait_until_running", "write_json"])
def test_nothing_stays_of_an_endpoint_that_has_never_come_up(at: str, fake: FakeServe, tmp_path: Path) -> None:
    fake.fails, fake.at = ServeError("it fails"), at
    with pytest.raises(ServeError, match="it fails"):
        deploy.serve(*given_model(tmp_path))
    folder = tmp_path / "endpoints" / "py"
    assert not fake.running and not (folder / "endpoint.json").exists() and not list((folder / "models").iterdir())


def test_an_error_on_the_way_back_does_not_hide_the_first(fake: FakeServe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("Serve's controller has died")

    *given, shown = given_model(tmp_path)
    deploy.serve(*given, shown)
    fake.fails = ServeError("it fails")
    put_back = deploy.put_back
    monkeypatch.setattr(deploy, "put_back", lambda *given: (monkeypatch.setattr(deploy, "deploy", broken), put_back(*given)))
    with pytest.raises(ServeError, match="it fails"):
        deploy.serve(*given, shown)
    assert "could not be brought back: Serve's controller has died; `distlm stop py` takes it down" in shown.notes[-1]

    fake.running.clear()
    monkeypatch.setattr(deploy, "remove", broken)
    monkeypatch.setattr(deploy, "deploy", fake.deploy)
    with pytest.raises(ServeError, match="it fails"):
        deploy.serve(*given, shown)
    assert "could not be taken down: Serve's controller has died" in shown.notes[-1]


def test_an_endpoint_from_start_to_end_on_ray_serve_and_a_classifier_beside_it(cluster: None, storage: Storage, torn: str) -> None:
    with pytest.raises(ClusterError, match="100 replicas"):
        deploy.serve(*endpoint(storage, replicas=100))
    with socket.create_server(("127.0.0.1", 0)) as other, pytest.raises(ServeError, match="is taken"):
        deploy.serve(*endpoint(storage, port=other.getsockname()[1]))

    outputs = deploy.serve(*endpoint(storage))
    folder = storage.endpoint("py")
    record = json.loads((folder / "endpoint.json").read_text())
    assert outputs == {"": record["url"], "url": record["url"], "api_key_file": str(folder / "api_key"), "model": "py"}
    assert Path(record["folder"]).parent == folder / "models" and record["source"] == str(storage.run("tiny") / "export")
    assert record["app"] == "py" and record["lineage"]["corpus_hash"] == "ab12"
    key = (folder / "api_key").read_text().strip()
    base = outputs["url"].removesuffix("/v1")

    client = openai.OpenAI(base_url=outputs["url"], api_key=key, max_retries=0)
    card = client.models.list().data[0]
    assert card.id == "py" and card.model_extra["lineage"]["run"] == "tiny"
    ids = list(range(5, 25))
    wanted = reference(storage.run("tiny") / "export", tuple(ids), 20)
    whole = client.completions.create(model="py", prompt=ids, max_tokens=20, temperature=0)
    assert whole.usage.completion_tokens == len(wanted)
    pieces = list(client.completions.create(model="py", prompt=ids, max_tokens=20, temperature=0, stream=True,
                                            stream_options={"include_usage": True}))
    assert "".join(piece.choices[0].text for piece in pieces[:-1]) == whole.choices[0].text and pieces[-1].usage == whole.usage
    assert len(pieces) > 5
    assert "".join(query(outputs["url"], key, "hi", 4, chat=True)) == client.chat.completions.create(
        model="py", messages=[{"role": "user", "content": "hi"}], max_tokens=4, temperature=0).choices[0].message.content

    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=outputs["url"], api_key="wrong", max_retries=0).models.list()
    with pytest.raises(openai.BadRequestError, match="128 tokens"):
        client.completions.create(model="py", prompt=[5] * 200)
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.completions.create(model="other", prompt="x")
    with pytest.raises(openai.BadRequestError, match="top_k"):
        client.completions.create(model="py", prompt="x", extra_body={"top_k": 3})
    assert httpx.get(f"{base}/health").status_code == 200 and httpx.get(f"{base}/metrics").status_code == 401

    leaves_and_frees(base, key)

    goes_on_answering_when_its_replacement_fails(outputs, storage, torn)

    assert healthy(outputs) and not healthy({**outputs, "model": "second"})
    assert deploy.serve(*endpoint(storage, max_tokens=3)) == outputs and (folder / "api_key").read_text().strip() == key
    assert client.completions.create(model="py", prompt=ids, temperature=0).usage.completion_tokens == 3, "replaced, with the key it had"

    made = make_classifier(storage.run("sorted") / "export")
    other = deploy.serve(*endpoint(storage, name="sorter", model=str(storage.run("sorted"))))
    assert other["url"] == f"{base}/sorter/v1" and httpx.get(f"{base}/sorter/v1/models").status_code == 401
    classifies(other, made, storage)
    with pytest.raises(ServeError, match="a cluster has one address"):
        deploy.serve(*endpoint(storage, name="third", port=1))
    deploy.undeploy("sorter", storage)

    *given, _ = endpoint(storage, name="ended")
    with pytest.raises(KeyboardInterrupt):
        deploy.serve(*given, CtrlC())
    assert "ended" not in deploy.applications() and httpx.get(f"{base}/health").status_code == 200

    deploy.undeploy("py", storage)
    assert not (folder / "endpoint.json").exists() and deploy.running_serve() is None
    with pytest.raises(httpx.NetworkError):                # refused, or reset by a proxy that is on its way out
        httpx.get(f"{base}/health")
    with pytest.raises(InputError, match="no endpoint py"):
        deploy.undeploy("py", storage)


@pytest.fixture(scope="module")
def torn(storage: Storage) -> str:
    """A run whose weights are cut off in the middle."""
    weights = make_model(storage.run("torn") / "export", LLAMA) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:weights.stat().st_size // 2])
    return "torn"


def goes_on_answering_when_its_replacement_fails(outputs: dict[str, Any], storage: Storage, torn: str) -> None:
    folder, replica = RunFolder(storage.endpoint("py")), replica_of(outputs)
    folder.event("succeeded", "completed")                 # as execute.run records it
    before = read_json(folder.path / "endpoint.json")
    with asking(outputs) as answers:
        *given, _ = endpoint(storage, model=torn)
        said = r"cannot be served: .*InputError: model: .*torn/export: transformers cannot load the weights"
        with pytest.raises(ServeError, match=said), folder.running():
            deploy.serve(*given, (shown := Records()))
        enough, deadline = len(answers) + 3, time.monotonic() + 20
        while len(answers) < enough:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert set(answers) == {200}, "not one request has failed"
    assert replica_of(outputs) == replica and read_json(folder.path / "endpoint.json") == before
    assert ray.serve.status().applications["py"].status == "RUNNING", "a replica that dies is replaced again"
    assert folder.state() == ("failed", "bad_input")
    said = f"not replaced: the endpoint as it was before answers at {outputs['url']}"
    assert said in shown.notes and said in [event["message"] for event in folder.events()]
    job = jobs.locate("py", storage)
    assert job.state == "running" and job.message.startswith(f"answers at {outputs['url']}; its replacement has failed: ServeError: py:")


@pytest.mark.slow
def test_an_endpoint_that_had_to_make_room_is_brought_back_when_its_replacement_fails(cluster: None, storage: Storage, torn: str) -> None:
    outputs = deploy.serve(*endpoint(storage, name="kept"))
    replica = replica_of(outputs)
    RunFolder(storage.endpoint("kept")).event("succeeded", "completed")
    *given, _ = endpoint(storage, name="kept", model=torn, cpus_per_replica=3.9)
    with pytest.raises(ServeError, match="cannot load the weights"):
        deploy.serve(*given, (shown := Records()))
    assert shown.notes == ["the cluster has no room for a second replica: the endpoint is silent while it is replaced",
                           f"not replaced: the endpoint as it was before answers at {outputs['url']}"]
    assert replica_of(outputs) != replica, "it was stopped, and brought up again"
    deploy.undeploy("kept", storage)


class CtrlC(Records):
    """The user's, when the replicas begin to start."""

    def update(self, unit: str, done: int, total: int | None = None, **figures: float) -> None:
        raise KeyboardInterrupt


@contextlib.contextmanager
def asking(endpoint: dict[str, Any]) -> Iterator[list[int]]:
    """Sends one completion after another; yields the list of their statuses, which grows."""
    key, statuses, done = Path(endpoint["api_key_file"]).read_text().strip(), list[int](), threading.Event()

    def ask() -> None:
        while not done.is_set():
            statuses.append(httpx.post(f"{endpoint['url']}/completions", json={"model": endpoint["model"], "prompt": "x", "max_tokens": 2},
                                       headers={"Authorization": f"Bearer {key}"}, timeout=30).status_code)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield statuses
    finally:
        done.set()
        thread.join()


def replica_of(endpoint: dict[str, Any]) -> str:
    """The replica that answers."""
    key = Path(endpoint["api_key_file"]).read_text().strip()
    text = httpx.get(endpoint["url"].removesuffix("/v1") + "/metrics", headers={"Authorization": f"Bearer {key}"}).text
    return re.findall(r'replica="([^"]+)"', text)[0]


def leaves_and_frees(base: str, key: str) -> None:
    """A client that goes away mid-stream, and one that does not stream, free their places."""
    http = httpx.Client(base_url=base, headers={"Authorization": f"Bearer {key}"}, timeout=30)
    body = {"model": "py", "prompt": [[5] * 8] * 32, "max_tokens": 120, "temperature": 1, "n": 64}

    def value(name: str) -> float:
        text = http.get("/metrics").text
        return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith(f"vllm:{name}"))

    for stream in (True, False):
        aborted = value('request_success_total{finished_reason="abort"')
        if stream:
            with http.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
                assert answer.status_code == 200
                lines = answer.iter_lines()                # kept: httpx closes the connection with the iterator
                next(lines)
                assert value("num_requests_running") > 0
        else:
            leaver = threading.Thread(target=leave, args=(base, key, body))
            leaver.start()
            leaver.join()
        deadline = time.monotonic() + 10
        while value("num_requests_running") or value("num_requests_waiting"):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert value('request_success_total{finished_reason="abort"') > aborted, "the client must have left before the end"
    http.close()


def leave(base: str, key: str, body: dict[str, Any]) -> None:
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{base}/v1/completions", json=body, headers={"Authorization": f"Bearer {key}"}, timeout=0.3)


def classifies(outputs: dict[str, Any], made: Path, storage: Storage) -> None:
    """The endpoint `sorter` of the classifier in the folder `made`."""
    assert outputs["classifier"] is True
    wanted = classified(made, "the cat sat")
    text = summary.ask(outputs, "the cat sat")
    assert text.split(", ") == [f"{name} {chance:.3f}" for chance, name in sorted(
        zip(wanted, ("ham", "spam", "eggs"), strict=True), reverse=True)]
    [found] = endpoints.classify("sorter", ["the cat sat"], storage=storage)
    assert endpoints.serves_classifier("sorter", storage) and [*found["probabilities"].values()] == pytest.approx(wanted, abs=1e-6)
    assert "/v1/classify -H" in summary.curl(outputs, "the cat sat")
    with pytest.raises(ServeError, match="'sorter' is a classifier and completes no text; use /v1/classify"):
        list(query(outputs["url"], Path(outputs["api_key_file"]).read_text().strip(), "hi", 4))


def again(storage: Storage, **fields: Any) -> dict[str, Any]:
    """Replace the endpoint `voices`."""
    RunFolder(storage.endpoint("voices")).event("succeeded", "completed")      # as execute.run records it
    return deploy.serve(*endpoint(storage, name="voices", **fields))


@pytest.mark.slow
def test_adapters_come_and_go_by_replacing_their_endpoint(cluster: None, storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    base = storage.run("tiny") / "export"
    make_adapter(storage.run("poems"), base, chat=True)
    make_adapter(storage.run("lines"), base, seed=2, method="dora")
    make_model(storage.run("stranger") / "export", LLAMA, seed=7)
    named = {"poems": "poems", "dora": str(storage.run("lines") / "export" / "adapter")}
    outputs = deploy.serve(*endpoint(storage, name="voices"))
    try:
        key = Path(outputs["api_key_file"]).read_text().strip()
        with asking(outputs) as answers:
            monkeypatch.delattr(adapter_folder, "base_hash")           # the weights were read before: once is enough
            assert again(storage, adapters=named) == {**outputs, "adapters": ["poems", "dora"]}
            monkeypatch.undo()
        assert answers and set(answers) == {200}, "the model itself answers all the while"
        folder = Path(read_json(storage.endpoint("voices") / "endpoint.json")["folder"])
        assert sorted(path.name for path in (folder / "adapters").iterdir()) == ["dora", "poems"]

        client = openai.OpenAI(base_url=outputs["url"], api_key=key, max_retries=0)
        cards = {card.id: card.model_extra for card in client.models.list().data}
        assert list(cards) == ["voices", "poems", "dora"] and cards["dora"]["parent"] == "voices" and cards["voices"]["parent"] is None
        assert cards["dora"]["lineage"]["run"] == "lines" and cards["dora"]["lineage"]["corpus_hash"] == "cd2"

        exports = {"voices": base, "poems": storage.run("poems") / "export", "dora": storage.run("lines") / "export"}
        wishes = [(name, [5 + i, 9, 30 + 2 * i, 7]) for i in range(4) for name in exports]
        with ThreadPoolExecutor(len(wishes)) as pool:      # more than there are places: rows of all kinds come and go together
            found = list(pool.map(lambda wish: client.completions.create(
                model=wish[0], prompt=wish[1], max_tokens=24, temperature=0, logprobs=0,
                extra_body={"return_tokens_as_token_ids": True}).choices[0].logprobs.tokens, wishes))
        wanted = [reference(exports[name], tuple(prompt), 24) for name, prompt in wishes]
        assert [[int(text.removeprefix("token_id:")) for text in tokens] for tokens in found] == wanted
        assert wanted[0] != wanted[1] != wanted[2] != wanted[0]

        assert "".join(endpoints.query("voices", "hi", 8, model="poems", chat=True, storage=storage)) == client.chat.completions.create(
            model="poems", messages=[{"role": "user", "content": "hi"}], max_tokens=8, temperature=0).choices[0].message.content
        monkeypatch.setenv("DISTLM_STORAGE", str(storage.root))
        asked = CliRunner().invoke(app, ["query", "voices", "hi", "--max-tokens", "6", "--model", "dora"])
        assert asked.exit_code == 0 and asked.output == client.completions.create(
            model="dora", prompt="hi", max_tokens=6, temperature=0).choices[0].text + "\n"
        with pytest.raises(ServeError, match="the model 'prose' does not exist; this endpoint serves 'voices', 'poems', 'dora'"):
            list(endpoints.query("voices", "hi", 8, model="prose", storage=storage))
        text = httpx.get(outputs["url"].removesuffix("/v1") + "/metrics", headers={"Authorization": f"Bearer {key}"}).text
        assert re.search(r'vllm:generation_tokens_total\{model_name="poems",replica="\w+"\} [1-9]', text)

        with pytest.raises(InputError, match=r"adapters.poems: .* was trained on .*tiny/export, whose weights are not those of .*stranger"):
            execute.inputs(ServeSpec(name="voices", model="stranger", adapters=named), storage)

        again(storage, adapters={"dora": named["dora"]})
        assert [card.id for card in client.models.list().data] == ["voices", "dora"]
        with pytest.raises(openai.NotFoundError, match="'poems' does not exist"):
            client.completions.create(model="poems", prompt="x")
    finally:
        deploy.undeploy("voices", storage)
