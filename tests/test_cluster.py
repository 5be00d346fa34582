"""A real head, beside another Ray on the same machine: what `up` starts, `down` ends, and nothing else."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import psutil
import pytest
from typer.testing import CliRunner

from distlm import cluster, head
from distlm.cli import app
from distlm.errors import ClusterError, InputError
from distlm.process import signals_held
from distlm.runs import RunFolder
from distlm.storage import Storage, write_json
from tests.codes import INTERRUPTED

OTHER = """
import os, sys
from distlm import cluster
import ray
with cluster.connect() as connection:
    assert connection.embedded
    for line in sys.stdin:
        print(ray.get(ray.remote(lambda: 6 * 7).remote()), flush=True)
"""


@pytest.fixture(scope="module")
def storage():
    """A short root, as people have: below pytest's own folders Ray's sockets would not find room."""
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(prefix="d", dir="/tmp") as root:
        patch.setenv("DISTLM_STORAGE", root)
        patch.delenv("RAY_ADDRESS", raising=False)
        yield Storage(Path(root))


@pytest.fixture(scope="module")
def other(storage):
    """Another Ray on this machine, not ours to touch: one that a process carries in itself."""
    process = subprocess.Popen([sys.executable, "-c", OTHER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                               env={**os.environ, "DISTLM_STORAGE": str(storage.root / "other")})

    def ask() -> str:
        process.stdin.write("\n")
        process.stdin.flush()
        return process.stdout.readline().strip()

    yield ask
    process.stdin.close()
    process.wait(timeout=60)


@pytest.fixture(scope="module")
def up(storage, other):
    started, fresh = head.up(head.LocalCluster(cpus=6, object_store_bytes=100_000_000), storage)
    assert fresh
    yield started
    head.down(started)


def distlm(*words):
    return subprocess.run([sys.executable, "-m", "distlm", *words], capture_output=True, text=True, timeout=120)


def test_up_is_idempotent_and_prints_the_dashboard(up):
    again = distlm("cluster", "up")
    assert again.returncode == 0, again.stderr
    assert "was up already" in again.stdout and f"dashboard {up.dashboard_url} (token in {up.token_file})\n" in again.stdout


def test_status_shows_address_resources_and_jobs(up):
    shown = json.loads(distlm("cluster", "status", "--json").stdout)
    assert shown["address"] == up.address and shown["nodes"] == 1 and shown["resources"]["CPU"][1] == 6
    assert shown["jobs"] == [] and shown["applications"] == {}


def test_the_dashboard_wants_the_token_and_listens_on_loopback(up):
    assert httpx.get(up.dashboard_url + "/api/jobs/", trust_env=False).status_code == 401
    assert up.dashboard_url.startswith("http://127.0.0.1:")
    assert Path(up.token_file).stat().st_mode & 0o077 == 0
    for connection in psutil.net_connections("tcp"):
        if connection.status == "LISTEN" and connection.laddr.port == int(up.dashboard_url.rsplit(":", 1)[1]):
            assert connection.laddr.ip == "127.0.0.1"


def test_a_wrong_token_is_told_in_one_line(up, tmp_path):
    (tmp_path / "token").write_text("0" * 64)
    (tmp_path / "a.yaml").write_text("kind: prepare\nname: a\nsources: [stdlib]\n")
    environment = {**os.environ, "DISTLM_STORAGE": str(tmp_path / "store"), "RAY_ADDRESS": up.dashboard_url, "RAY_AUTH_MODE": "token",
                   "RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")}
    for words in (["cluster", "status"], ["submit", "a.yaml"]):
        done = subprocess.run([sys.executable, "-m", "distlm", *words], capture_output=True, text=True, timeout=120, cwd=tmp_path,
                              env=environment)
        assert done.returncode == 4 and len(done.stderr.splitlines()) == 1, done.stderr
        assert up.dashboard_url in done.stderr and "RAY_AUTH_TOKEN_PATH must name the cluster's token" in done.stderr


@pytest.mark.parametrize(("place", "mode", "said"), [
    ("dashboard_url", {}, "answers 401"), ("address", {}, "asks for a token, and there is none"),
    ("address", {"RAY_AUTH_MODE": "token"}, "there is no token")])
def test_without_a_token_one_line_says_what_must_name_it(place, mode, said, up, tmp_path):
    """Ray itself would abort the process, with the stack of its C++, or tell how to make a token that fits no cluster."""
    (tmp_path / "a.yaml").write_text("kind: prepare\nname: a\nsources: [stdlib]\n")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    environment |= {"HOME": str(tmp_path), "DISTLM_STORAGE": str(tmp_path / "store"), "RAY_ADDRESS": getattr(up, place), **mode}
    for words in (["cluster", "status"], ["submit", "a.yaml"]):
        done = subprocess.run([sys.executable, "-m", "distlm", *words], capture_output=True, text=True, timeout=120, cwd=tmp_path,
                              env=environment)
        *before, last = done.stderr.splitlines()
        assert done.returncode == 4 and [line for line in before if "gcs_client.cc" not in line] == [], done.stderr
        assert last.startswith("distlm: error: ") and said in last
        assert last.endswith("; RAY_AUTH_TOKEN_PATH must name the cluster's token")
    assert not (tmp_path / "store").exists()


def test_of_a_cluster_that_cannot_be_joined_it_is_said_that_a_token_may_be_wanted(tmp_path, monkeypatch):
    """Ray does not tell that it was refused."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    lost = cluster.Cluster("$RAY_ADDRESS", "10.0.0.1:6379")
    assert str(cluster._unreachable(lost, ConnectionError("no"))).endswith("where it asks for a token, RAY_AUTH_TOKEN_PATH must name the "
                                                                           "cluster's token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0")
    assert str(cluster._unreachable(lost, ConnectionError("no"))).endswith("`distlm cluster up`")


def test_of_two_that_bring_it_up_at_once_one_starts_it(tmp_path, monkeypatch):
    inside, most = [], []

    def start(*_):
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.2)
        inside.pop()

    monkeypatch.setattr(head, "_up", start)
    threads = [threading.Thread(target=head.up, args=(head.LocalCluster(), Storage(tmp_path))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1, 1, 1]


def test_everything_lies_in_one_folder(up, storage):
    assert Path(up.folder) == storage.root / "clusters" / "local" and Path(up.ray_folder).parent == Path(up.folder)
    assert {path.name for path in Path(up.folder).iterdir()} == {Path(up.ray_folder).name, "token", "cluster.json", "head.log"}
    assert list(Path(up.ray_folder).glob("session_*/logs/raylet.out"))
    opened = [Path(file.path) for process in head.processes(up) for file in process.open_files()]
    logs = [path for path in opened if path.suffix in (".log", ".out", ".err")]
    assert logs and [path for path in logs if Path(up.folder) not in path.parents] == []


def test_connect_joins_it_and_keeps_the_terminal_clean(up, tmp_path):
    code = ("import sys, logging\nfrom pathlib import Path\nfrom distlm import cluster\n"
            "with cluster.connect(Path(sys.argv[1])) as c:\n"
            "    import ray\n    logging.getLogger('ray').error('noise of ray')\n    print('more noise', file=sys.stderr)\n"
            "    print(c.address, c.dashboard_url, c.embedded, ray.get(ray.remote(lambda: 1 + 1).remote()))\n"
            "print('after', file=sys.stderr)\n")
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "driver.log")], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == [up.address, up.dashboard_url, "False", "2"], done.stderr
    assert done.stderr == "after\n"
    assert "noise of ray" in (tmp_path / "driver.log").read_text() and "more noise" in (tmp_path / "driver.log").read_text()


def test_a_port_that_is_taken_is_the_users_mistake_and_leaves_nothing(storage, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"dashboard_port: port {port} cannot be had"):
            head.up(head.LocalCluster(name="second", dashboard_port=port), storage)
        (tmp_path / "second.yaml").write_text(f"name: second\nport: {port}\n")
        assert distlm("cluster", "up", str(tmp_path / "second.yaml")).returncode == 2
    assert not (storage.root / "clusters" / "second").exists()


@pytest.fixture
def unhandled():
    """SIGTERM is handled by nobody, whatever a ray.init before has left."""
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_while_ray_starts_is_raised_when_it_stands_and_ends_it(number, unhandled, storage, tmp_path, monkeypatch):
    """Where Ray forks, Python would swallow it and leave logging's lock taken."""
    from ray._private import utils

    done = []

    def embed(stack):
        utils.set_sigterm_handler(lambda *_: sys.exit(15))           # as ray.init does
        signal.raise_signal(number)
        done.append("started")
        return cluster.Connection("", "", True)

    monkeypatch.setattr(cluster, "find", lambda storage: None)
    monkeypatch.setattr(cluster, "_embed", embed)
    monkeypatch.setattr(cluster, "_shutdown", lambda: done.append("ended"))
    monkeypatch.setattr(cluster.import_ray(), "is_initialized", lambda: False)
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt):
        with cluster.connect(tmp_path / "log", storage=storage):
            done.append("joined")
    assert done == ["started", "ended"] and signal.getsignal(number) == before
    with pytest.raises(KeyboardInterrupt):
        with signals_held():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            done.append("held")
    assert "held" not in done, "the second one is not held"


def test_sigterm_interrupts_a_job_of_a_program_that_does_not_handle_it(unhandled, storage, tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "find", lambda storage: None)
    monkeypatch.setattr(cluster, "_embed", lambda stack: cluster.Connection("", "", True))
    monkeypatch.setattr(cluster, "_shutdown", lambda: None)
    monkeypatch.setattr(cluster.import_ray(), "is_initialized", lambda: False)
    with pytest.raises(KeyboardInterrupt):
        with cluster.connect(tmp_path / "log", storage=storage):
            signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_an_interrupted_up_leaves_nothing(storage, tmp_path):
    (tmp_path / "brief.yaml").write_text("name: brief\n")
    process = subprocess.Popen([sys.executable, "-m", "distlm", "cluster", "up", str(tmp_path / "brief.yaml")], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)
    record, deadline = storage.root / "clusters" / "brief" / "cluster.json", time.monotonic() + 60
    while not record.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGSTOP)                    # it must not be done before it is interrupted
    [brief] = [one for one in head.recorded(storage) if one.name == "brief"]
    assert head.processes(brief)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGCONT)
    process.communicate(timeout=60)
    assert process.returncode in INTERRUPTED and head.processes(brief) == [] and not record.exists()


def test_an_interrupt_before_a_head_is_on_record_leaves_nothing(tmp_path, monkeypatch):
    started = []

    def start(_: Any, **more: Any) -> "subprocess.Popen[bytes]":
        process = subprocess.Popen(["sleep", "600"], start_new_session=True, env=more["env"])
        started.append((process, psutil.Process(process.pid)))
        signal.raise_signal(signal.SIGINT)
        return process

    monkeypatch.setattr(head, "subprocess", SimpleNamespace(Popen=start, DEVNULL=subprocess.DEVNULL, STDOUT=subprocess.STDOUT))
    with pytest.raises(KeyboardInterrupt):
        head.up(head.LocalCluster(), Storage(tmp_path))
    [(process, seen)] = started
    with process:
        try:
            assert not seen.is_running() or seen.status() == psutil.STATUS_ZOMBIE
            assert head.recorded(Storage(tmp_path)) == []
        finally:
            process.kill()


def test_a_head_that_cannot_start_says_why_and_leaves_nothing(storage, monkeypatch):
    monkeypatch.setattr(head, "START_TIMEOUT_S", 0.5)
    with pytest.raises(ClusterError, match="did not come up"):
        head.up(head.LocalCluster(name="slow"), storage)
    assert "slow" not in [one.name for one in head.recorded(storage)]


def test_a_raylet_that_does_not_come_up_in_time_is_started_once_more(tmp_path, monkeypatch):
    started = []

    def start(_: Any, **more: Any) -> "subprocess.Popen[bytes]":
        started.append(subprocess.Popen(["sleep", "600"], start_new_session=True, env=more["env"]))
        return started[-1]

    def wait(*_: Any) -> None:
        if len(started) == 1:
            raise ClusterError(f"Ray ended while it started: Exception: The current {head.NOT_IN_TIME}. This could happen")

    monkeypatch.setattr(head, "subprocess", SimpleNamespace(Popen=start, DEVNULL=subprocess.DEVNULL, STDOUT=subprocess.STDOUT))
    monkeypatch.setattr(head, "_wait_until_ready", wait)
    found, fresh = head.up(head.LocalCluster(), Storage(tmp_path))
    try:
        first, second = started
        first.wait(10)                                     # ended before its 600 s; whoever waited for it first has the exit status
        assert fresh and found.pid == second.pid and second.poll() is None
    finally:
        head.down(found)
        second.wait(10)


def test_a_record_from_before_a_reboot_is_not_taken_for_a_cluster(up, tmp_path, monkeypatch):
    stale = replace(up, pid=os.getpid(), started=1.0, id="0" * 32, folder=str(tmp_path / "clusters" / "local"),
                    ray_folder=str(tmp_path / "clusters" / "local" / "ray"))
    write_json(tmp_path / "clusters" / "local" / "cluster.json", asdict(stale))
    monkeypatch.setenv("DISTLM_STORAGE", str(tmp_path))
    assert not stale.alive() and cluster.find() is None
    with pytest.raises(ClusterError, match="no cluster is up"):
        cluster.require()
    done = distlm("cluster", "down")                       # takes the record away, and no process: this one has that pid
    assert done.returncode == 0 and "0 processes" in done.stdout and head.recorded(Storage(tmp_path)) == []


def record(process: "subprocess.Popen[bytes]", folder: Path, **more: Any) -> head.Head:
    """The record of a head that is only a process."""
    return head.Head(**{"name": "local", "id": "0" * 32, "folder": str(folder), "ray_folder": str(folder / "ray"), "address": "127.0.0.1:7",
                        "dashboard_url": "http://127.0.0.1:9", "token_file": str(folder / "token"), "cpus": 1,
                        "host": socket.gethostname(), "pid": process.pid, "started": psutil.Process(process.pid).create_time(), **more})


def test_whoever_got_the_number_of_a_head_that_crashed_is_not_ended(tmp_path):
    with subprocess.Popen(["sleep", "600"], start_new_session=True) as stranger:
        try:
            mine = record(stranger, tmp_path)
            assert [one.pid for one in head.processes(mine)] == [stranger.pid]
            crashed = replace(mine, started=mine.started - 3)
            assert head.processes(crashed) == [] and head.down(crashed) == 0 and stranger.poll() is None
        finally:
            stranger.kill()


def test_what_a_head_that_crashed_left_in_its_session_is_found_until_the_machine_starts_again(tmp_path, monkeypatch):
    with subprocess.Popen(["sh", "-c", "sleep 600 & echo $!; read x"], start_new_session=True, stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE) as leader:
        orphan = psutil.Process(int(leader.stdout.readline()))
        try:
            crashed = record(leader, tmp_path)
            leader.kill()
            leader.wait()
            assert not crashed.alive() and head.processes(crashed) == [orphan]
            with monkeypatch.context() as patch:
                patch.setattr(psutil, "boot_time", lambda: crashed.started + 60)
                assert head.processes(crashed) == []
            assert head.down(crashed) == 1 and head.processes(crashed) == []
        finally:
            with contextlib.suppress(psutil.Error):
                orphan.kill()


class Stuck(psutil.Process):
    """One that waits for a disk: it takes no signal."""

    def send_signal(self, number: int) -> None:
        pass

    terminate = kill = lambda self: None

    def status(self) -> str:
        return psutil.STATUS_DISK_SLEEP


def test_a_process_that_does_not_end_is_named_and_the_record_stays(tmp_path, monkeypatch):
    with subprocess.Popen(["sleep", "600"], start_new_session=True) as process:
        try:
            write_json(tmp_path / "cluster.json", asdict(mine := record(process, tmp_path)))
            monkeypatch.setattr(psutil, "process_iter", lambda: [Stuck(process.pid)])
            monkeypatch.setattr(head, "living", lambda *_: None)
            monkeypatch.setattr(head, "STOP_GRACE_S", 0.1)
            monkeypatch.setattr(head, "KILL_GRACE_S", 0.2)
            with pytest.raises(ClusterError, match=rf"{tmp_path}: .* do not end: {process.pid} \(sleep, .*, disk-sleep\); .*down` again"):
                head.down(mine)
            assert (tmp_path / "cluster.json").exists()
        finally:
            process.kill()


def test_a_cluster_of_another_host_is_neither_ended_nor_replaced_from_here(tmp_path, monkeypatch):
    storage, folder = Storage(tmp_path), tmp_path / "clusters" / "local"
    session = folder / "ray" / "session_1"
    session.mkdir(parents=True)
    (folder / "token").write_text("secret")
    elsewhere = head.Head("local", "0" * 32, str(folder), str(folder / "ray"), "127.0.0.1:7", "http://127.0.0.1:9", str(folder / "token"),
                          1, "login-node-7", 1, 1.0)
    write_json(folder / "cluster.json", asdict(elsewhere))
    RunFolder(storage.run("big")).event("queued", submission="train-big-1", dashboard="http://127.0.0.1:9")
    monkeypatch.setenv("DISTLM_STORAGE", str(tmp_path))
    for verb in ("down", "up"):
        done = CliRunner().invoke(app, ["cluster", verb])
        assert isinstance(done.exception, ClusterError) and "login-node-7" in str(done.exception) and "--force" in str(done.exception)
    assert session.exists() and (folder / "token").exists() and head.recorded(storage) == [elsewhere]
    assert CliRunner().invoke(app, ["cluster", "down", "--force"]).exit_code == 0 and head.recorded(storage) == []
    assert session.exists() and RunFolder(storage.run("big")).state() == ("queued", "")


def test_ray_address_comes_before_the_recorded_cluster(up, monkeypatch):
    assert cluster.find().name == "local"
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert cluster.find() == cluster.Cluster("$RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setenv("RAY_ADDRESS", up.address)          # its token is known
    assert cluster.find().token_file == up.token_file


def test_several_clusters_ask_for_a_choice(up, storage, monkeypatch):
    monkeypatch.setattr(head, "recorded", lambda _: [replace(up, name="a"), replace(up, name="b")])
    with pytest.raises(InputError, match="several clusters are up: a, b"):
        cluster.find()
    monkeypatch.setenv("DISTLM_CLUSTER", "b")
    assert cluster.find().name == "b"


def test_an_address_of_ray_client_is_refused_before_anything_is_sent_there(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "ray://10.0.0.1:10001")
    monkeypatch.setattr(cluster.import_ray(), "init", lambda **_: pytest.fail("it was tried"))
    with pytest.raises(ClusterError, match=r"ray://10.0.0.1:10001: .*Ray Client.*distlm submit.*host:port"):
        with cluster.connect(tmp_path / "log", storage=Storage(tmp_path)):
            pytest.fail("it was joined")


@pytest.mark.parametrize(("alive", "said"), [(["local"], "no cluster 'gpu' is up; name one that is, local, or"),
                                             (["a", "b"], "name one that is, a, b, or"), ([], "cluster up FILE")])
def test_a_cluster_that_is_named_and_not_up_is_a_mistake_and_no_other_stands_in_for_it(alive, said, tmp_path, monkeypatch):
    heads = [head.Head(name, "0" * 32, "", "", "127.0.0.1:7", "http://127.0.0.1:9", "", 1, socket.gethostname(), os.getpid(),
                       psutil.Process().create_time()) for name in alive]
    monkeypatch.setattr(head, "recorded", lambda _: heads)
    monkeypatch.setenv("DISTLM_CLUSTER", "gpu")
    with pytest.raises(InputError, match=f"DISTLM_CLUSTER: .*{said}"):
        cluster.find(Storage(tmp_path))


WAITING = """
from distlm import cluster
with cluster.connect():
    import ray, time
    print("joined", flush=True)
    ray.get(ray.remote(lambda: time.sleep(600)).remote())
"""


@pytest.mark.slow
def test_what_has_joined_a_head_that_dies_ends_soon(storage):
    """Where a head has gone nothing brings it back: Ray's own minute would be waited for nothing."""
    lost, _ = head.up(head.LocalCluster(name="lost", cpus=2, object_store_bytes=100_000_000), storage)
    try:
        driver = subprocess.Popen([sys.executable, "-c", WAITING], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                  env={**os.environ, "DISTLM_CLUSTER": "lost"})
        while "joined" not in (line := driver.stdout.readline()):
            assert line, "it has ended"
        [gcs] = [process for process in head.processes(lost) if process.name() == "gcs_server"]
        gcs.kill()
        began = time.monotonic()
        said = driver.communicate(timeout=120)[0]
        assert driver.returncode != 0 and "GCS may have been killed" in said and time.monotonic() - began < 40
    finally:
        driver.kill()
        head.down(lost)


def test_a_long_storage_path_gets_a_short_folder_for_sockets(tmp_path):
    deep = tmp_path / ("x" * 60) / "clusters" / "local"
    short = head._ray_folder(deep)
    try:
        assert len(os.fsencode(short)) <= head.LONGEST_RAY_FOLDER and short == head._ray_folder(deep) and short.stat().st_mode & 0o077 == 0
    finally:
        short.rmdir()
        short.parent.rmdir()


def test_down_ends_all_that_up_started_and_nothing_else(up, other):
    mine = head.processes(up)
    names = " ".join(" ".join(process.cmdline()) for process in mine)
    assert "gcs_server" in names and "raylet" in names and "dashboard" in names and len(mine) >= 5
    assert other() == "42"
    done = distlm("cluster", "down")
    assert done.returncode == 0 and "processes ended" in done.stdout, done.stderr
    assert [process for process in mine if process.is_running() and process.status() != psutil.STATUS_ZOMBIE] == []
    assert not up.alive() and cluster.find() is None
    assert Path(up.folder) in Path(up.ray_folder).parents or not Path(up.ray_folder).exists()
    assert other() == "42"
    assert "is not up" in distlm("cluster", "down").stdout
