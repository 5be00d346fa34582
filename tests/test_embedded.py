"""A cluster inside a process's life: what it leaves of its own behind, which is nothing."""

import contextlib
import errno
import io
import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from distlm import cluster
from distlm.errors import ClusterError, StorageError
from distlm.runs import RunFolder
from distlm.spec.load import dump, to_yaml
from distlm.storage import Storage, write_json
from tests.train.ranks import make_corpus, spec
from tests.train.test_driver import steps_done, wait_for, workers

WARNED = """
import os, sys, time
from pathlib import Path
from distlm import cluster
with cluster.connect(Path(sys.argv[1])):
    import ray
    from ray._private.utils import publish_error_to_driver
    print(os.environ["RAY_TMPDIR"])
    while "10 workers" not in Path(sys.argv[1]).read_text():
        publish_error_to_driver("pool", "10 workers", ray._private.worker.global_worker.gcs_client)
        time.sleep(0.1)
    for i in range(3):                                     # repetitions, which Ray holds back until it shuts down
        publish_error_to_driver("pool", "10 workers", ray._private.worker.global_worker.gcs_client)
    time.sleep(0.5)
"""
WRITER = """
import contextlib, sys, time
from pathlib import Path
with contextlib.suppress(FileNotFoundError):
    for i in range(int(sys.argv[2])):
        Path(sys.argv[1], str(i)).mkdir()
        time.sleep(0.001)
"""


def test_an_embedded_cluster_keeps_rays_words_off_the_terminal_and_leaves_neither_folder_nor_process(tmp_path):
    done = subprocess.run([sys.executable, "-c", WARNED, str(tmp_path / "driver.log")], capture_output=True, text=True, timeout=120,
                          env={**os.environ, "DISTLM_STORAGE": str(tmp_path)})
    [folder] = done.stdout.splitlines()
    assert done.stderr == "" and "10 workers" in (tmp_path / "driver.log").read_text()
    assert "repeated" in (tmp_path / "driver.log").read_text(), "Ray has held something back"
    assert folder.startswith("/tmp/distlm-") and not Path(folder).exists() and left_in(folder) == []


def test_an_embedded_cluster_that_does_not_start_says_where_the_log_is_and_leaves_nothing(tmp_path, monkeypatch):
    ray, folders = cluster.import_ray(), []

    def init(**settings):
        folders.append(Path(settings["_temp_dir"]).parent)
        assert (folders[-1] / "token").stat().st_mode & 0o077 == 0
        raise RuntimeError("\nThe current node timed out during startup.\nMore.")

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: folders.append("shut down"))
    for log in (tmp_path / "driver.log", None):
        with pytest.raises(ClusterError, match=r"Ray does not start: The current node timed out during startup\.; the log") as met:
            with cluster.connect(log, storage=Storage(tmp_path)):
                pytest.fail("it was joined")
        assert log is None or met.value.where == str(log)
    assert folders[1] == folders[3] == "shut down" and not folders[0].exists() and "RAY_AUTH_TOKEN_PATH" not in os.environ

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tempfile, "mkdtemp", full)
    with pytest.raises(StorageError, match=r"/tmp: cannot write: No space left on device; free space there"):
        with cluster.connect(storage=Storage(tmp_path)):
            pytest.fail("it was joined")


def left_in(folder: str) -> list[str]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get("RAY_TMPDIR") == folder:
                found.append(process.name())
    return found


@pytest.mark.slow
def test_of_a_job_that_is_killed_with_its_embedded_cluster_the_workers_end_and_the_next_start_clears_the_rest(tmp_path):
    given = spec(make_corpus(tmp_path / "c"), duration={"steps": 100_000}, checkpoint={"every_steps": 1000},
                 evaluate={"every_steps": 1000}, scale={"workers": 2})
    file, run = tmp_path / "run.yaml", RunFolder(Storage(tmp_path).run(given.name))
    file.write_text(to_yaml(dump(given)))
    environment = {**{k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}, "DISTLM_STORAGE": str(tmp_path)}
    job = subprocess.Popen([sys.executable, "-m", "distlm", "run", str(file)], env=environment, stdout=subprocess.DEVNULL,
                           stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: steps_done(run.path) >= 20 or job.poll() is not None, "step 20", 180)
        assert job.poll() is None
        trained = workers(job.pid)
        [folder] = {process.environ()["RAY_TMPDIR"] for process in trained}
        assert len(trained) == 2 and folder.startswith("/tmp/distlm-")
    finally:
        job.kill()
        job.wait()
    shown = subprocess.run([sys.executable, "-m", "distlm", "status", given.name, "--json"], env=environment, capture_output=True)
    found = json.loads(shown.stdout)
    assert (found["state"], found["cause"]) == ("failed", "head_lost")
    psutil.wait_procs(trained, timeout=60)
    assert not any(process.is_running() for process in trained)
    wait_for(lambda: not [name for name in left_in(folder) if "Agent" not in name], "the end of all of Ray's but its agents", 60)
    assert Path(folder).exists()
    done = subprocess.run([sys.executable, "-c", WARNED, str(tmp_path / "driver.log")], env=environment, capture_output=True, timeout=120)
    assert done.returncode == 0 and not Path(folder).exists() and left_in(folder) == []


def test_folders_are_cleared_of_embedded_clusters_of_this_host_that_are_dead(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    dead = {"host": socket.gethostname(), "pid": ended.pid, "started": psutil.Process(ended.pid).create_time()}
    ended.wait()
    mine = {"host": socket.gethostname(), "pid": os.getpid(), "started": psutil.Process().create_time()}
    for name, owner in {"dead": dead, "again": {**mine, "started": 1.0}, "living": mine, "elsewhere": {**dead, "host": "other"},
                        "torn": [], "head": None}.items():
        (tmp_path / f"distlm-{name}" / "ray").mkdir(parents=True)
        if owner is not None:
            write_json(tmp_path / f"distlm-{name}" / cluster.OWNER, owner)
    cluster._clear_orphans(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"distlm-living", "distlm-elsewhere", "distlm-torn", "distlm-head"}


@pytest.mark.parametrize("orphaned", [True, False])
def test_what_still_writes_into_an_embedded_clusters_folder_does_not_keep_it(orphaned, tmp_path):
    folder = tmp_path / "distlm-x"
    folder.mkdir()
    words = [sys.executable, "-c", WRITER, str(folder), "100000" if orphaned else "400"]
    own = subprocess.Popen(["sh", "-c", '"$@" &', "sh", *words] if orphaned else words, env={**os.environ, "RAY_TMPDIR": str(folder)})
    if orphaned:
        own.wait()
    deadline = time.monotonic() + 30
    while not (folder / "20").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert (folder / "20").exists()
    cluster._clear(folder)
    assert not folder.exists()
    if orphaned:
        assert left_in(str(folder)) == []
    else:
        own.wait()
        assert own.returncode == 0, "a process of our own is not Ray's to end"


def test_an_endpoint_of_a_cluster_that_was_left_is_not_taken_for_one_of_the_next(monkeypatch):
    from ray.serve import context

    monkeypatch.setattr(context, "_global_client", object())
    monkeypatch.setattr(context, "_global_client_job_id", "01000000")
    cluster._shutdown()
    assert context._global_client is None


def test_the_next_session_has_a_log_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.data._internal.logging import SessionFileHandler

    monkeypatch.setattr("ray.shutdown", lambda: None)
    sessions = [tmp_path / "first"]
    handler, logger = SessionFileHandler("data.log", get_log_directory=lambda: str(sessions[-1])), logging.getLogger("of-a-session")
    logger.addHandler(handler)
    try:
        logger.error("one")
        cluster._shutdown()
        shutil.rmtree(sessions[0])
        sessions.append(tmp_path / "second")
        logger.error("two")
        assert (sessions[1] / "data.log").read_text() == "two\n" and not sessions[0].exists()
    finally:
        logger.removeHandler(handler)
        handler.close()


def test_a_handler_leaves_a_stream_that_somebody_has_closed(tmp_path: Path) -> None:
    old, new, logger = (tmp_path / "old").open("w"), io.StringIO(), logging.getLogger("of-a-closed-stream")
    handler = logging.StreamHandler(old)
    logger.addHandler(handler)
    try:
        old.close()
        cluster._redirect_handlers(old, new)
        logger.error("said")
        assert new.getvalue() == "said\n"
    finally:
        logger.removeHandler(handler)


def test_a_handler_that_follows_standard_error_by_itself_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    new, logger = io.StringIO(), logging.getLogger("of-a-follower")
    handler = logging._StderrHandler()                     # as dill's, which torch imports where it is there
    logger.addHandler(handler)
    try:
        cluster._redirect_handlers(sys.stderr, new)
        monkeypatch.setattr(sys, "stderr", new)
        logger.error("said")
        assert new.getvalue() == "said\n"
    finally:
        logger.removeHandler(handler)
