"""What is said of a job is what is: an endpoint runs as long as it answers."""

import asyncio
import contextlib
import json
import socket
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest
from typer.testing import CliRunner

from distlm import cluster, execute, jobs, logs, stopping, submitting
from distlm.cli import app
from distlm.endpoints import query
from distlm.errors import ClusterError, InputError, ServeError
from distlm.runs import RunFolder
from distlm.serve.client import healthy
from distlm.serve.guard import make_key, proof
from distlm.storage import Storage, write_json
from tests import endpoints
from tests.endpoints import fake_endpoint


def test_an_endpoint_is_running_while_it_answers_and_lost_when_it_does_not(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    folder = RunFolder.create(storage.endpoint("py"), "kind: serve\n", {})
    with folder.running():
        pass
    with fake_endpoint(folder.path, "py") as record:
        write_json(folder.path / "endpoint.json", record)
        job = jobs.locate("py", storage)
        assert (job.state, job.cause) == ("running", "") and record["url"] in job.message
        write_json(folder.path / "endpoint.json", {**record, "model": "before"})
        assert jobs.locate("py", storage).state == "failed", "another endpoint has the port now"
    job = jobs.locate("py", storage)
    assert (job.state, job.cause) == ("failed", "head_lost")
    (folder.path / "endpoint.json").unlink()
    folder.event("stopped", "user")
    assert jobs.locate("py", storage).state == "stopped"


@contextlib.contextmanager
def impostor() -> Iterator[tuple[str, list[str]]]:
    """Somebody else who listens at an address of ours, agrees to all, and keeps what it is told."""
    told: list[str] = []

    class Listener(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            told.append(f"{self.path} {self.headers}")
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"status": "RUNNING", "proof": "", "data": [{"id": "py"}]}).encode())

        do_POST = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Listener)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", told
    server.shutdown()
    server.server_close()


def test_whoever_has_taken_an_endpoints_port_is_not_told_its_key(tmp_path: Path) -> None:
    folder = RunFolder(Storage(tmp_path).endpoint("py"))
    folder.event("succeeded", "completed")
    key = make_key(folder.path / "api_key")
    with impostor() as (url, told):
        write_json(folder.path / "endpoint.json", {"url": f"{url}/v1", "model": "py", "api_key_file": str(key), "app": "py"})
        job = jobs.locate("py", tmp_path)
        with pytest.raises(ServeError, match="no endpoint answers there that knows the key"):
            next(query("py", "secret prompt", storage=tmp_path))
    assert (job.state, job.cause) == ("failed", "head_lost") and told
    assert not [text for text in told if key.read_text().strip() in text or "Authorization" in text or "secret" in text]


def test_a_proof_that_was_overheard_proves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def overheard(key: str, model: str, nonce: str) -> str:
        asked.append(nonce)
        return proof(key, model, asked[0])

    monkeypatch.setattr(endpoints, "proof", overheard)
    with fake_endpoint(tmp_path, "py") as record:
        assert [healthy(record) for _ in range(3)] == [True, False, False]
    assert len(set(asked)) == 3


@pytest.mark.parametrize("known", ["dead", "moved", "forgotten"])
def test_whoever_has_taken_a_dashboards_port_is_not_told_the_token(known: str, tmp_path: Path) -> None:
    folder = tmp_path / "clusters" / "local"
    folder.mkdir(parents=True)
    (folder / "token").write_text("a" * 64)
    with impostor() as (url, told):
        me = psutil.Process()
        head = cluster.heads.Head("local", "0", str(folder), str(folder), "127.0.0.1:1", url, str(folder / "token"), 1,
                                  socket.gethostname(), me.pid, me.create_time())
        write_json(folder / "cluster.json", asdict(head))
        RunFolder(Storage(tmp_path).run("x")).event("queued", submission="train-x-1", dashboard=url, token_file=str(folder / "token"))
        jobs.locate("x", tmp_path)
        assert len(told) == 1 and "a" * 64 in told.pop(), "the head lives: it is asked"
        if known == "forgotten":
            (folder / "cluster.json").unlink()
        else:
            write_json(folder / "cluster.json", asdict(replace(head, **({"started": 1.0} if known == "dead" else {"dashboard_url": "http://other"}))))
        job = jobs.locate("x", tmp_path)
        assert job.state == "queued" and "`distlm stop x` frees the name" in job.message and told == []


@contextlib.contextmanager
def dashboard(asked: list[str] | None = None, **jobs_: str) -> Iterator[str]:
    """What answers as Ray's job API does: submission -> status; 404 for others. What is asked of it by POST goes into `asked`."""
    class Dashboard(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status = jobs_.get(self.path.split("/")[-1].replace("-", "_"))
            self.send_response(200 if status else 404)
            self.end_headers()
            self.wfile.write(json.dumps({"status": status, "message": "no luck"}).encode())

        def do_POST(self) -> None:
            (asked if asked is not None else []).append(self.path)
            self.do_GET()

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Dashboard)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def queued(tmp_path: Path, url: str) -> RunFolder:
    folder = RunFolder(Storage(tmp_path).run("x"))
    folder.event("queued", submission="train-x-1", dashboard=url)
    return folder


def elsewhere(folder: RunFolder, **more: Any) -> None:
    """The journal of a job whose driver began on another host."""
    folder.event("starting", **more)
    events = folder.events()
    events[-1]["owner"]["host"] = "elsewhere"
    (folder.path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))


def test_a_submitted_job_is_asked_for_where_it_was_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with dashboard(train_x_1="RUNNING") as mine, dashboard() as other:
        folder = queued(tmp_path, mine)
        monkeypatch.setenv("RAY_ADDRESS", other)
        assert jobs.locate("x", tmp_path).state == "queued"
        elsewhere(folder)
        assert jobs.locate("x", tmp_path).state == "starting" and len(folder.events()) == 2


@pytest.mark.parametrize(("owner", "age_s", "state"), [("alive", 0, "queued"), ("dead", 0, "failed"), ("elsewhere", 60, "queued"),
                                                       ("elsewhere", 3600, "failed")])
def test_a_job_whose_files_are_on_their_way_is_not_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: str, age_s: float,
                                                            state: str) -> None:
    monkeypatch.setattr(jobs, "ray_job", lambda _: None)   # it knows of none before they are there
    with contextlib.ExitStack() as stack:
        folder = queued(tmp_path, "http://head:8265")
        other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
        stack.callback(lambda: other.communicate(b"\n"))
        [event] = folder.events()
        event["owner"].update({"pid": other.pid, "started": psutil.Process(other.pid).create_time()})
        if owner == "dead":
            stack.close()
        if owner == "elsewhere":
            event["owner"]["host"] = "elsewhere"
        event["time"] -= age_s
        (folder.path / "events.jsonl").write_text(json.dumps(event) + "\n")
        assert jobs.locate("x", tmp_path).state == state


def test_a_cluster_that_does_not_answer_ends_no_job_and_stop_frees_the_name(tmp_path: Path) -> None:
    with dashboard() as gone:
        pass
    folder = queued(tmp_path, gone)
    job = jobs.locate("x", tmp_path)
    assert job.state == "queued" and "`distlm stop x` frees the name" in job.message and len(folder.events()) == 1
    with pytest.raises(InputError, match="x is queued"):
        RunFolder.create(folder.path, "", {}, resume=True)
    job = stopping.stop("x", tmp_path)
    assert (job.state, job.cause) == ("stopped", "user") and "never began" in job.message
    submitting._check_name(folder, resume=False)


@pytest.mark.parametrize("status", ["FAILED", "STOPPED", ""])
def test_what_ray_says_does_not_end_a_driver_that_lives(status: str, tmp_path: Path) -> None:
    with dashboard(train_x_1=status) as url:
        folder = queued(tmp_path, url)
        folder.event("starting")
        assert jobs.locate("x", tmp_path).state == "starting" and len(folder.events()) == 2


@pytest.mark.parametrize(("status", "began_as", "state"), [("FAILED", "train-x-1", "failed"), ("STOPPED", "train-x-1", "stopped"),
                                                          ("", "train-x-1", "starting"), ("FAILED", "", "starting")])
def test_ray_is_believed_about_a_driver_on_another_host_that_it_has_started(status: str, began_as: str, state: str, tmp_path: Path) -> None:
    with dashboard(train_x_1=status) as url:
        elsewhere(queued(tmp_path, url), **({"submission": began_as} if began_as else {}))
        assert jobs.locate("x", tmp_path).state == state


@pytest.mark.parametrize(("code", "said", "cause", "message"), [
    (2, "failed with exit code 2, last available logs:\ndistlm: error: a.yaml:3: corpus: there is no corpus x\n", "bad_input",
     "a.yaml:3: corpus: there is no corpus x"),
    (1, "failed with exit code 1, last available logs:\nKilled\n", "internal", "its Ray job has FAILED: failed with exit code 1")])
def test_a_job_that_ended_before_it_could_write_has_the_cause_that_it_printed(code: int, said: str, cause: str, message: str, tmp_path: Path
                                                                             ) -> None:
    with dashboard(train_x_1="FAILED") as url:
        folder = queued(tmp_path, url)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(jobs, "ray_job", lambda _: {"status": "FAILED", "message": said, "driver_exit_code": code})
            job = jobs.locate("x", tmp_path)
    assert (job.state, job.cause) == ("failed", cause) and job.message.startswith(message) and folder.state() == ("failed", cause)


def test_a_job_whose_machine_is_gone_ends_by_force(tmp_path: Path) -> None:
    folder = RunFolder(Storage(tmp_path).run("x"))
    elsewhere(folder)
    with pytest.raises(ClusterError, match=r"x runs on elsewhere, not here; .*--force"):
        stopping.stop("x", tmp_path)
    job = stopping.stop("x", tmp_path, force=True)
    assert (job.state, job.cause) == ("stopped", "user") and "its process was not reached" in job.message
    RunFolder.create(folder.path, "", {}, resume=True)


@pytest.mark.parametrize("held", [False, True])
def test_an_endpoint_whose_cluster_is_gone_is_struck_off_without_a_new_one(held: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
                                                                           ) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if held:                                               # another cluster is up: an application of that name there is another's
        other = cluster.heads.Head("local", "0", str(tmp_path), str(tmp_path), "127.0.0.1:2", "", "", 1, socket.gethostname(), 0, 0)
        monkeypatch.setattr(cluster.heads, "recorded", lambda _: [other])
        monkeypatch.setattr(cluster.heads.Head, "alive", lambda _: True)
    monkeypatch.setattr(cluster, "connect", lambda *_, **__: pytest.fail("a cluster is joined or started"))
    folder = RunFolder.create(Storage(tmp_path).endpoint("py"), "kind: serve\n", {})
    with folder.running():
        pass
    write_json(folder.path / "endpoint.json", {"url": "http://127.0.0.1:1/v1", "app": "py", "cluster": "127.0.0.1:3"})
    (folder.path / "models" / "1").mkdir(parents=True)     # what its replicas loaded
    job = stopping.stop("py", tmp_path)
    assert (job.state, job.cause) == ("stopped", "user") and "its record was removed" in job.message
    assert not (folder.path / "endpoint.json").exists() and not (folder.path / "models").exists()


def test_an_endpoint_that_answers_is_not_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    folder = RunFolder.create(Storage(tmp_path).endpoint("py"), "kind: serve\n", {})
    with folder.running():
        pass
    with fake_endpoint(folder.path, "py") as record:
        write_json(folder.path / "endpoint.json", {**record, "cluster": "10.0.0.1:3"})
        with pytest.raises(ClusterError, match=r"py answers, and the cluster .*--force"):
            stopping.stop("py", tmp_path)
        assert (folder.path / "endpoint.json").exists() and jobs.locate("py", tmp_path).state == "running"
        (folder.path / "models" / "1").mkdir(parents=True)
        assert stopping.stop("py", tmp_path, force=True).state == "stopped"
        assert (folder.path / "models" / "1").exists(), "it runs on, and a replica may start again"


def test_what_ended_with_its_cluster_is_recorded(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    mine = cluster.heads.Head("local", "0", "", "", "127.0.0.1:7", "http://127.0.0.1:9", "", 1, socket.gethostname(), 0, 0)
    for name, url in (("x", "http://127.0.0.1:9"), ("y", "http://127.0.0.1:8")):
        RunFolder(storage.run(name)).event("queued", submission=f"train-{name}-1", dashboard=url)
    endpoint = RunFolder(storage.endpoint("e"))
    endpoint.event("running")
    write_json(endpoint.path / "endpoint.json", {"cluster": "127.0.0.1:7"})
    (endpoint.path / "models" / "1").mkdir(parents=True)
    for job in stopping.in_cluster(mine, storage):
        stopping.ended_with_cluster(job)
    assert endpoint.state() == ("stopped", "user") and [path.name for path in endpoint.path.iterdir()] == ["events.jsonl"]
    assert RunFolder(storage.run("x")).state() == ("stopped", "user") and RunFolder(storage.run("y")).state() == ("queued", "")


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("verb", ["run", "submit"])
def test_a_cluster_is_looked_for_under_the_callers_root_and_not_the_specs(verb: str, given: bool, tmp_path: Path,
                                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[Any] = []

    def look(storage: Any = None) -> None:
        looked.append(storage or Storage.find())
        raise ClusterError("enough")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("DISTLM_STORAGE", str(tmp_path / "default"))
    monkeypatch.setattr(cluster, "find", look)
    (tmp_path / "a.txt").write_text("text")
    spec = {"kind": "prepare", "name": "x", "sources": [str(tmp_path / "a.txt")], "storage": str(tmp_path / "own")}
    with pytest.raises(ClusterError, match="enough"):
        (execute.run if verb == "run" else submitting.submit)(spec, storage=tmp_path / "given" if given else None)
    assert looked == [Storage(tmp_path / ("given" if given else "default"))]
    assert verb == "submit" or Storage(tmp_path / ("given" if given else "own")).corpus("x").exists()


DRIVER = """
import sys, time
from pathlib import Path
from distlm.runs import RunFolder
folder = RunFolder(Path(sys.argv[1]))
with folder.running():
    if sys.argv[2]:
        folder.event("note", cluster=sys.argv[2])
    print("began", flush=True)
    time.sleep(600)
"""


def test_a_job_that_has_joined_a_cluster_is_asked_about_and_ends_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTLM_STORAGE", str(tmp_path))
    storage, folder = Storage(tmp_path), tmp_path / "clusters" / "local"
    with contextlib.ExitStack() as stack:
        def start(*words: str) -> "subprocess.Popen[str]":
            process = stack.enter_context(subprocess.Popen([sys.executable, "-c", *words], stdout=subprocess.PIPE, text=True,
                                                           start_new_session=True))
            stack.callback(process.kill)
            return process

        head = start("import time; time.sleep(600)")
        write_json(folder / "cluster.json", asdict(cluster.heads.Head(
            "local", "0", str(folder), str(folder / "ray"), "127.0.0.1:7", "http://127.0.0.1:9", str(folder / "token"), 1,
            socket.gethostname(), head.pid, psutil.Process(head.pid).create_time())))
        drivers = [start(DRIVER, str(storage.run(name)), address)
                   for name, address in (("inside", "127.0.0.1:7"), ("other", "127.0.0.1:8"), ("alone", ""))]
        assert [driver.stdout.readline() for driver in drivers if driver.stdout] == ["began\n"] * 3
        asked = CliRunner().invoke(app, ["cluster", "down"], input="n\n")
        assert "inside would end with it" in asked.output and isinstance(asked.exception, SystemExit) and asked.exit_code == 1
        assert head.poll() is None and drivers[0].poll() is None
        unasked = CliRunner().invoke(app, ["cluster", "down"]).exception
        assert isinstance(unasked, InputError) and "inside would end with it" in str(unasked) and "--yes" in str(unasked)
        done = CliRunner().invoke(app, ["cluster", "down", "--yes"])
        assert done.exit_code == 0 and "train inside ended with it" in done.output, done.output
        assert drivers[0].poll() is not None and head.poll() is not None and [driver.poll() for driver in drivers[1:]] == [None, None]
    assert RunFolder(storage.run("inside")).state() == ("stopped", "user")
    assert "its cluster is taken down" in [event["message"] for event in RunFolder(storage.run("inside")).events()]


@pytest.mark.parametrize(("one", "other", "same"), [
    ("127.0.0.1:7", "localhost:7", True), ("127.0.0.1:7", "127.0.0.1:8", False), ("127.0.0.1:7", "10.255.255.1:7", False),
    ("10.255.255.1:7", "10.255.255.1:7", True), ("", "127.0.0.1:7", False)])
def test_an_address_of_this_machine_is_known_by_its_port(one: str, other: str, same: bool) -> None:
    assert cluster.heads.same_address(one, other) is same


def test_a_job_is_followed_inside_a_running_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def stream(_: Any) -> Any:
        for text in ("one\n", "two\n"):
            await asyncio.sleep(0)
            yield text
        raise OSError("cut")

    async def notebook() -> list[str]:
        found = []
        with pytest.raises(OSError, match="cut"):
            for chunk in logs._tail(jobs.Submission("x", "", None, tmp_path)):
                found.append(chunk)
        return found

    monkeypatch.setattr(logs, "_stream", stream)
    assert asyncio.run(notebook()) == ["one\n", "two\n"]
    assert not [thread for thread in threading.enumerate() if thread.name == "distlm-tail"]


def test_a_storage_root_is_given_as_text_path_or_storage(tmp_path: Path) -> None:
    import distlm as package

    folder = RunFolder(Storage(tmp_path).run("x"))
    folder.event("succeeded", "completed")
    for root in (str(tmp_path), tmp_path, Storage(tmp_path)):
        assert package.load_run("x", root) == folder and package.status("x", root).state == "succeeded"
        with pytest.raises(InputError, match="has already succeeded"):
            package.stop("x", root)
        with pytest.raises(InputError, match="there is no endpoint 'x'"):
            package.query("x", "a", storage=root)


@pytest.mark.parametrize("kind", ["tune", "pipeline", "prepare"])
def test_a_spec_that_names_files_travels_whole(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = tmp_path / "here"
    here.mkdir()
    (tmp_path / "train.yaml").write_text("kind: train\nname: t\ncorpus: c\nmodel: {preset: llama-tiny}\nduration: {steps: 3}\n")
    (here / "job.yaml").write_text({"tune": "kind: tune\nname: x\ntrain: ../train.yaml\nspace: {seed: {grid: [1]}}\n",
                                    "pipeline": "kind: pipeline\nname: x\nsteps: {a: {file: ../train.yaml}}\n",
                                    "prepare": "kind: prepare\nname: x\nsources: [stdlib]\n"}[kind])
    sent: dict[str, Any] = {}

    def send(submission: jobs.Submission, entrypoint: str, archive: Path, variables: dict[str, str], metadata: dict[str, str]) -> None:
        with zipfile.ZipFile(archive) as packed:
            sent.update(entrypoint=entrypoint, variables=variables, files={n: packed.read(n).decode() for n in packed.namelist()})

    monkeypatch.setattr(submitting, "send", send)
    with dashboard() as url:
        monkeypatch.setattr(cluster, "require", lambda *_: cluster.Cluster("c", "127.0.0.1:1", url))
        submission = submitting.submit(here / "job.yaml", storage=str(tmp_path / "store"), working_dir=here)
    assert sent["variables"]["DISTLM_SUBMISSION"] == submission.id
    if kind == "prepare":
        assert "run job.yaml" in sent["entrypoint"]
    else:
        assert "run .distlm/x.yaml" in sent["entrypoint"] and "llama-tiny" in sent["files"][".distlm/x.yaml"]


def test_a_name_that_was_taken_while_its_files_were_packed_is_not_queued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage, pack = Storage(tmp_path / "store"), submitting.upload.pack
    spec = {"kind": "prepare", "name": "x", "sources": ["stdlib"]}

    def taken(*given: Any) -> int:
        RunFolder.create(storage.corpus("x"), "kind: prepare\n", {}).event("starting")
        return pack(*given)

    monkeypatch.setattr(submitting.upload, "pack", taken)
    monkeypatch.setattr(submitting, "send", lambda *_: pytest.fail("it is sent"))
    with dashboard() as url:
        monkeypatch.setattr(cluster, "require", lambda *_: cluster.Cluster("c", "127.0.0.1:1", url))
        with pytest.raises(InputError, match="x is starting; `distlm status x` shows it"):
            submitting.submit(spec, storage=storage, working_dir=tmp_path)
    assert RunFolder(storage.corpus("x")).state() == ("starting", "")


def test_an_interrupted_submit_is_stopped_by_the_user_and_does_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    asked: list[str] = []
    monkeypatch.setattr(submitting, "send", interrupted)
    with dashboard(asked) as url:
        monkeypatch.setattr(cluster, "require", lambda *_: cluster.Cluster("c", "127.0.0.1:1", url))
        with pytest.raises(KeyboardInterrupt):
            submitting.submit({"kind": "prepare", "name": "x", "sources": ["stdlib"]}, storage=tmp_path / "store", working_dir=tmp_path)
    job = jobs.locate("x", tmp_path / "store")
    assert (job.state, job.cause) == ("stopped", "user") and "interrupted" in job.message
    [submission] = [event["submission"] for event in RunFolder(job.folder).events() if event["state"] == "queued"]
    assert asked == [f"/api/jobs/{submission}/stop"], "the cluster may have taken it"


def test_what_a_job_does_not_take_along_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = tmp_path / "here"
    for i in range(6):
        (here / f"{i}").mkdir(parents=True)
        (here / f"{i}" / "events.jsonl").write_text("")
    (here / "job.yaml").write_text("kind: prepare\nname: x\nsources: [stdlib]\n")
    monkeypatch.chdir(here)
    monkeypatch.setenv("DISTLM_STORAGE", str(tmp_path / "store"))
    monkeypatch.setattr(submitting, "send", lambda *_: None)
    with dashboard() as url:
        monkeypatch.setattr(cluster, "require", lambda *_: cluster.Cluster("c", "127.0.0.1:1", url))
        done = CliRunner().invoke(app, ["submit", "job.yaml", "--no-follow"])
    told = ", ".join(f"{i}/ (holds events.jsonl)" for i in range(4))
    assert f"not taken along: {told} and 2 more" in done.output, done.output
    folder = RunFolder(Storage(tmp_path / "store").corpus("x"))
    assert folder.state() == ("queued", "") and "5/ (holds events.jsonl)" in folder.events()[-1]["message"]
