"""A job is ended where it runs, or in its record where that is gone; what its cluster takes along is recorded."""

import contextlib
import socket
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner

from distlm import cluster, jobs, stopping
from distlm.cli import app
from distlm.errors import ClusterError, InputError
from distlm.runs import RunFolder
from distlm.storage import Storage, write_json
from tests.dashboards import elsewhere
from tests.endpoints import fake_endpoint

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
