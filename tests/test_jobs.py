"""What is said of a job is what is: an endpoint runs as long as it answers."""

import asyncio
import contextlib
import json
import socket
import subprocess
import sys
import threading
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from distlm import cluster, jobs, logs, stopping, submitting
from distlm.errors import InputError
from distlm.runs import RunFolder
from distlm.storage import Storage, write_json
from tests.dashboards import dashboard, elsewhere, queued
from tests.endpoints import fake_endpoint, impostor


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
