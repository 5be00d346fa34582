"""Jobs on a real cluster: sent, followed through a broken connection, stopped, and never lost sight of."""

import os
import select
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import psutil
import pytest
from typer.testing import CliRunner

from distlm import cluster, head, jobs, logs, stopping, submitting, upload
from distlm.cli import app
from distlm.errors import DistlmError, InputError
from distlm.runs import RunFolder
from distlm.serve.client import healthy
from distlm.storage import Storage, read_json
from tests.codes import INTERRUPTED
from tests.serve.tiny_models import LLAMA, make_model

SPEC = """kind: prepare
name: words
sources: [{folder}/texts]
tokenizer: {{train: bytes}}
context: 32
workers: 1
"""
COUNT = "import time\nfor i in range(300):\n    print(f'line {i:04}', flush=True)\n    time.sleep(0.01)\n"
SLOW = """import signal, sys, time
from pathlib import Path
from distlm.cli.terminal import interrupt
from distlm.runs import RunFolder
signal.signal(signal.SIGTERM, interrupt)
with RunFolder(Path(sys.argv[1])).running():
    print("began", flush=True)
    time.sleep(600)
"""


@pytest.fixture(scope="module")
def storage(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        root = tmp_path_factory.mktemp("store")
        patch.setenv("DISTLM_STORAGE", str(root))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.delenv("RAY_ADDRESS", raising=False)
        yield Storage(root)


@pytest.fixture(scope="module")
def up(storage):
    started, _ = head.up(head.LocalCluster(cpus=8, object_store_bytes=100_000_000), storage)
    yield started
    head.down(started)
    assert head.processes(started) == []


@pytest.fixture
def send(up, storage, tmp_path):
    """Send a Python script as a job of the name given, the way `submit` sends a spec."""
    def call(name: str, script: str, root: Storage = storage) -> jobs.Submission:
        here = tmp_path / name
        here.mkdir()
        (here / "script.py").write_text(script)
        folder = RunFolder(root.run(name))
        submission = jobs.Submission(f"train-{name}-{os.urandom(4).hex()}", up.dashboard_url, up.token_file, folder.path)
        upload.pack(here, tmp_path / f"{name}.zip", storage.root)
        folder.event("queued", submission=submission.id, dashboard=up.dashboard_url, token_file=up.token_file)
        submitting.send(submission, f"python script.py {folder.path}", tmp_path / f"{name}.zip", {"PYTHONUNBUFFERED": "1"}, {})
        return submission

    return call


def distlm(*words, cwd=None):
    return subprocess.run([sys.executable, "-m", "distlm", *words], capture_output=True, text=True, timeout=200, cwd=cwd)


def refused(*words) -> str:
    """What a command says that the user has to change, in this process: a process of its own takes seconds to begin."""
    done = CliRunner().invoke(app, words)
    assert isinstance(done.exception, DistlmError) and done.exception.exit_code == 2, done.output
    return str(done.exception)


class Breaking:
    """A proxy before the dashboard that cuts every connection after some bytes of answer, later each time."""

    def __init__(self, url: str, limit: int) -> None:
        self.target, self.limit, self.cuts = int(url.rsplit(":", 1)[1]), limit, 0
        self.server = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.server.getsockname()[1]}"
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self) -> None:
        while True:
            try:
                one, _ = self.server.accept()
            except OSError:
                return
            threading.Thread(target=self.serve, args=(one,), daemon=True).start()

    def serve(self, one: socket.socket) -> None:
        other, passed = socket.create_connection(("127.0.0.1", self.target)), 0
        with one, other:
            while True:
                for ready in select.select([one, other], [], [])[0]:
                    data = ready.recv(512)
                    if not data:
                        return
                    if ready is other:
                        passed += len(data)
                        if passed > self.limit:
                            self.cuts += 1
                            self.limit += 1500
                            return
                    (one if ready is other else other).sendall(data)


def test_submit_runs_a_spec_and_follows_it_to_its_end(up, storage, tmp_path, monkeypatch):
    (tmp_path / "texts").mkdir()
    for i in range(6):
        (tmp_path / "texts" / f"{i}.txt").write_text(f"some words {i} " * 50)
    (tmp_path / "words.yaml").write_text(SPEC.format(folder=tmp_path))
    # Ray's own command, with the environment that `cluster up` prints, beside ours
    by_ray = [str(Path(sys.executable).parent / "ray"), "job", "submit", "--working-dir", ".", "--", "distlm", "run", "words.yaml", "--set",
              "name=by-ray"]
    environment = {**os.environ, "RAY_ADDRESS": up.dashboard_url, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": up.token_file}
    with subprocess.Popen(by_ray, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment) as ray:
        sent = distlm("submit", "words.yaml", "--follow", "--set", "seed=3", cwd=tmp_path)
        said, _ = ray.communicate(timeout=120)
    assert sent.returncode == 0, sent.stdout + sent.stderr
    assert f"dashboard {up.dashboard_url} (token in {up.token_file})\n" in sent.stdout and '{"distlm"' not in sent.stdout
    assert "prepare words" in sent.stdout
    folder = RunFolder(storage.corpus("words"))
    states = [event["state"] for event in folder.events() if event["state"] not in ("note", "running")]
    assert states == ["queued", "starting", "succeeded"]
    assert "seed: 3" in (folder.path / "spec.yaml").read_text()

    monkeypatch.chdir(tmp_path)
    taken = refused("submit", "words.yaml")
    assert "the name words is taken" in taken and "--resume" in taken
    assert "context" in refused("submit", "words.yaml", "--resume", "--set", "context=64")

    assert ray.returncode == 0 and "prepare by-ray" in said, said
    made = RunFolder(storage.corpus("by-ray"))
    assert made.state() == ("succeeded", "completed") and made.read_result()["documents"] == folder.read_result()["documents"] == 6


@pytest.mark.slow                                          # tests/serve/test_deploy.py has one that is deployed
def test_a_followed_endpoint_is_a_success_and_stop_takes_it_down(up, storage, tmp_path):
    make_model(storage.run("tiny") / "export", LLAMA)
    (tmp_path / "ask.yaml").write_text("kind: serve\nname: ask\nmodel: tiny\nport: 0\nthreads: 1\ncpus_per_replica: 0.5\n")
    sent = distlm("submit", "ask.yaml", "--follow", cwd=tmp_path)
    assert sent.returncode == 0 and "`distlm query ask PROMPT`" in sent.stdout, sent.stdout + sent.stderr
    record = read_json(storage.endpoint("ask") / "endpoint.json")
    assert healthy(record) and [job.name for job in stopping.in_cluster(up, storage)] == ["ask"]
    asked = subprocess.run([sys.executable, "-m", "distlm", "cluster", "down"], input="n\n", capture_output=True, text=True, timeout=60)
    assert "ask would end with it" in asked.stdout and asked.returncode != 0 and healthy(record)
    done = distlm("stop", "ask")
    assert done.returncode == 0 and "the endpoint was taken down" in done.stdout, done.stdout + done.stderr
    assert not healthy(record) and cluster.status(cluster.of(up)).applications == {}
    with pytest.raises(httpx.ConnectError):
        httpx.get(record["url"], trust_env=False)


def test_a_mistake_in_a_spec_is_found_before_anything_is_sent(up, storage, tmp_path, monkeypatch):
    (tmp_path / "bad.yaml").write_text("kind: prepare\nname: bad\nsource: x\n")
    done = distlm("submit", "bad.yaml", cwd=tmp_path)
    assert done.returncode == 2 and "bad.yaml:3" in done.stderr and not storage.corpus("bad").exists()
    (tmp_path / "none.yaml").write_text("kind: train\nname: none\ncorpus: nowhere\nmodel: {preset: llama-tiny}\nduration: {steps: 1}\n")
    monkeypatch.chdir(tmp_path)
    assert "nowhere" in refused("submit", "none.yaml") and not storage.run("none").exists()


def test_following_loses_and_repeats_no_line_when_the_connection_breaks(send, up):
    submission = send("count", COUNT)
    proxy = Breaking(up.dashboard_url, 1500)
    lines = list(logs.follow(jobs.Submission(submission.id, proxy.url, up.token_file, submission.folder)))
    proxy.server.close()
    assert proxy.cuts >= 2
    assert [line for line in lines if line.startswith("line")] == [f"line {i:04}" for i in range(300)]


def test_interrupting_a_follower_leaves_the_job_and_stop_ends_it(send, storage):
    submission = send("slow", SLOW)
    follower = subprocess.Popen([sys.executable, "-m", "distlm", "logs", "-f", "slow"], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                text=True)
    while "began" not in follower.stdout.readline():
        assert follower.poll() is None
    follower.send_signal(signal.SIGINT)
    _, said = follower.communicate(timeout=30)
    assert follower.returncode in INTERRUPTED and "slow goes on" in said and "`distlm stop slow`" in said, said
    assert jobs.ray_job(submission)["status"] == "RUNNING" and jobs.locate("slow", storage).state in ("starting", "running")

    owner = RunFolder(storage.run("slow")).events()[-1]["owner"]["pid"]
    done = distlm("stop", "slow")
    assert done.returncode == 0 and "train slow stopped (user)" in done.stdout, done.stderr
    assert not psutil.pid_exists(owner) and jobs.ray_job(submission)["status"] == "STOPPED"
    refused("stop", "slow")
    states = [event["state"] for event in RunFolder(storage.run("slow")).events() if event["state"] != "note"]
    assert states.count("stopped") == 1


JOIN = """import sys, ray
ray.init(address=sys.argv[1], log_to_driver=False)
print("joined", flush=True)
sys.stdin.read()
"""


def test_down_asks_about_what_the_cluster_runs_for_others_too_and_cannot_ask_nobody(send, up, storage, tmp_path):
    mine, foreign = send("mine", SLOW), send("foreign", SLOW, Storage(tmp_path / "other"))
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": up.token_file}
    with subprocess.Popen([sys.executable, "-c", JOIN, up.address], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          text=True) as joined:
        while "joined" not in joined.stdout.readline():
            assert joined.poll() is None
        down = [sys.executable, "-m", "distlm", "cluster", "down"]
        done = subprocess.run(down, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)
        assert done.returncode == 2 and up.alive(), done.stdout + done.stderr
        assert "mine, " in done.stderr and mine.id not in done.stderr and "--yes" in done.stderr
        assert f"{foreign.id} (python script.py" in done.stderr and "import sys, ray" in done.stderr, done.stderr
        closed = subprocess.run(["sh", "-c", '"$@" <&-', "sh", *down], capture_output=True, text=True, timeout=60)
        assert closed.returncode == 2 and foreign.id in closed.stderr and "--yes" in closed.stderr
        joined.stdin.close()
    with cluster.authenticated(up.token_file):
        for submission in (mine, foreign):
            stopping._stop_ray_job(submission, 10)
    assert stopping.others_in_cluster(up, []) == []


def test_a_job_that_failed_before_it_began_is_seen_and_its_name_is_free(send, storage):
    submission = send("early", "import sys; print('no luck'); sys.exit(7)")
    assert "no luck" in list(logs.follow(submission))
    job = jobs.locate("early", storage)
    assert (job.state, job.cause) == ("failed", "internal") and "FAILED" in job.message
    submitting._check_name(RunFolder(storage.run("early")), resume=False)


def test_a_job_that_is_queued_holds_its_name(send, storage):
    send("held", SLOW)
    with pytest.raises(InputError, match="held is"):
        submitting._check_name(RunFolder(storage.run("held")), resume=True)
    assert stopping.stop(jobs.locate("held", storage), storage).state == "stopped"


def test_a_job_that_the_cluster_has_forgotten_has_failed(up, storage):
    RunFolder(storage.run("lost")).event("queued", submission="train-lost-1")
    job = jobs.locate("lost", storage)
    assert (job.state, job.cause) == ("failed", "head_lost")


@pytest.mark.parametrize("deaf", [False, True])
def test_stop_ends_a_local_process_and_records_it(deaf, storage):
    name = f"local-{deaf}"
    script = SLOW.replace("with Run", "signal.signal(signal.SIGINT, signal.SIG_IGN)\nwith Run") if deaf else SLOW
    process = subprocess.Popen([sys.executable, "-c", script, str(storage.run(name))], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "began\n"
    job = stopping.stop(jobs.locate(name, storage), storage, grace_s=1.0 if deaf else 20.0)
    assert (job.state, job.cause) == ("stopped", "user") and not psutil.pid_exists(process.pid)
    with pytest.raises(InputError, match="has already stopped"):
        stopping.stop(job, storage)


def test_logs_of_a_local_job_are_followed_to_its_end(storage):
    folder = RunFolder(storage.run("written"))
    folder.event("starting")
    log = folder.path / "logs" / "driver.log"
    log.parent.mkdir()
    log.write_text("one\ntw")
    lines = logs.driver_log(jobs.read(folder), follow=True)
    assert next(lines) == "one"
    with log.open("a") as file:
        file.write("o\nthree")
    folder.event("succeeded", "completed")
    assert list(lines) == ["two", "three"]
    assert distlm("logs", "runs/written").stdout == "one\ntwo\nthree\n"


def test_load_run_finds_a_job_by_name_and_by_path(storage):
    import distlm as package

    folder = RunFolder(storage.run("named"))
    folder.event("starting")
    folder.metrics({"step": 1, "loss": 2.0})
    for name in ("named", "runs/named", str(folder.path)):
        assert package.load_run(name).read_metrics() == [{"step": 1, "loss": 2.0}]
