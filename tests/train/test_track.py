"""A run's metrics arrive whole and in order at a server that speaks MLflow's REST API, whatever the server does meanwhile."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from distlm.errors import SpecError
from distlm.runs import RunFolder
from distlm.spec import TrainSpec
from distlm.storage import Storage
from distlm.train import track
from distlm.train.recipe import make_recipe
from distlm.train.track import tracked
from tests.records import Records
from tests.train.ranks import make_corpus, spec
from tests.train.test_driver import wait_for


class Server(ThreadingHTTPServer):
    """The part of MLflow's REST API that a run needs, with its answers to what does not exist (mlflow.org, REST API 2.0)."""

    def __init__(self) -> None:
        self.experiments: dict[str, str] = {}
        self.runs: list[dict[str, Any]] = []
        self.refuse, self.authorizations = 0, set[str | None]()
        super().__init__(("127.0.0.1", 0), Answer)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Answer(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        assert self.path.startswith("/api/2.0/mlflow/experiments/get-by-name?experiment_name="), self.path
        found = self.server.experiments.get(self.path.rpartition("=")[2])
        self.reply(200 if found else 404, {"experiment": {"experiment_id": found}} if found else {"error_code": "RESOURCE_DOES_NOT_EXIST"})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.authorizations.add(self.headers["Authorization"])
        if self.server.refuse:
            self.server.refuse -= 1
            self.reply(503, {})
            return
        runs, what = self.server.runs, self.path.removeprefix("/api/2.0/mlflow/")
        if what == "experiments/create":
            self.server.experiments[body["name"]] = "7"
            self.reply(200, {"experiment_id": "7"})
        elif what == "runs/create":
            assert body["experiment_id"] == "7"
            runs.append({"name": body["run_name"], "params": {}, "metrics": [], "status": "RUNNING"})
            self.reply(200, {"run": {"info": {"run_id": str(len(runs) - 1)}}})
        elif what == "runs/log-batch":
            assert len(body.get("metrics", [])) <= 1000 and len(body.get("params", [])) <= 100
            run = runs[int(body["run_id"])]
            run["params"].update({one["key"]: one["value"] for one in body.get("params", [])})
            run["metrics"] += [(one["step"], one["key"], one["value"]) for one in body.get("metrics", [])]
            self.reply(200, {})
        elif what == "runs/update":
            runs[int(body["run_id"])]["status"] = body["status"]
            self.reply(200, {})
        else:
            self.reply(404, {})

    def reply(self, code: int, body: dict[str, Any]) -> None:
        content = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as one:
        thread = threading.Thread(target=one.serve_forever, daemon=True)
        thread.start()
        yield one
        one.shutdown()


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path / "store" / "run", "", {})


def given(server: Server | str, tmp_path: Path) -> TrainSpec:
    return spec(tmp_path, track={"mlflow": server if isinstance(server, str) else server.url})


def record(step: int) -> dict[str, Any]:
    return {"step": step, "loss": 5.0 - step / 100, "lr": 0.01, "time": 1e9 + step, "skipped": True}


def test_every_record_arrives_with_the_specs_values_and_a_run_that_goes_on_stays_one(server: Server, folder: RunFolder, tmp_path: Path,
                                                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "secret")
    progress = Records()
    with pytest.raises(KeyboardInterrupt), tracked(given(server, tmp_path), folder, progress) as log:
        for step in range(1, 501):
            log(record(step))
        raise KeyboardInterrupt
    [run] = server.runs
    assert run["status"] == "KILLED" and run["name"] == "run" and run["params"]["optimizer.lr"] == "0.01"
    assert [step for step, key, _ in run["metrics"] if key == "loss"] == [*range(1, 501)]
    assert {key for _, key, _ in run["metrics"]} == {"loss", "lr", "skipped"} and server.authorizations == {"Bearer secret"}
    with tracked(given(server, tmp_path), folder, progress) as log:
        log(record(501))
    assert len(server.runs) == 1 and run["metrics"][-1][0] == 501 and run["status"] == "FINISHED" and progress.notes == []


def test_a_server_that_is_away_for_a_while_loses_nothing(server: Server, folder: RunFolder, tmp_path: Path,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(track, "RETRY_S", 0.05)
    server.refuse = 5
    progress = Records()
    with tracked(given(server, tmp_path), folder, progress) as log:
        log(record(1))
        log(record(2))
    assert [value for _, key, value in server.runs[-1]["metrics"] if key == "loss"] == [4.99, 4.98] and progress.notes == []


def test_a_server_that_never_answers_ends_no_run_and_is_told(folder: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(track, "RETRY_S", 0.05)
    monkeypatch.setattr(track, "LAST_S", 0.3)
    progress = Records()
    with Server() as closed:
        url = closed.url                                   # nobody listens there any more
    with tracked(given(url, tmp_path), folder, progress) as log:
        log(record(1))
    [note] = progress.notes
    assert note.startswith("mlflow has not taken all metrics: ") and note.endswith("metrics.jsonl has them")
    assert note in [event["message"] for event in folder.events()]


def test_a_package_that_is_missing_is_told_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SpecError, match=r"track.wandb: the package wandb is not installed; pip install 'distlm\[wandb\]'"):
        make_recipe(spec(make_corpus(tmp_path / "c"), track={"wandb": "p"}), Storage(tmp_path))


def test_wandb_writes_its_files_where_it_is_offline(folder: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    progress = Records()
    with tracked(spec(tmp_path, track={"wandb": "p"}), folder, progress) as log:
        log({**record(1), "grad_norm": 1.0625})
        log({"step": 0, "time": 9.0, "val_loss": 7.03125})             # measured beside the steps, where W&B would drop what comes late
    [file] = folder.path.glob("wandb/offline-run-*/*.wandb")
    wait_for(lambda: all(part in file.read_bytes() for part in (b"1.0625", b"7.03125", b"evaluated_step")),
             "what its process writes after it has answered", 30)
    assert b"grad_norm" in file.read_bytes() and progress.notes == [], "no key of a spec"
