"""A job that is too large for the cluster as it is waits where that can grow, and only there."""

import importlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from distlm import autoscale
from distlm.errors import ClusterError
from tests.records import Records

WAIT = """import json, sys, ray
from distlm import autoscale
from tests.records import Records
ray.init(address=sys.argv[1], log_to_driver=False)
shown, before = Records(), ray.cluster_resources()["CPU"]
autoscale.grow([{"CPU": 1}] * 3, shown, timeout_s=60)
print(json.dumps([autoscale.autoscales(), before, ray.cluster_resources()["CPU"], shown.notes]))
"""


class Fake:
    """A cluster of 2 CPUs to which an autoscaler adds one whenever it is waited for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, autoscales: bool = True, largest: dict[str, float] | None = None) -> None:
        self.cpus, self.asked, self.removed = 2.0, list[Any](), 0
        monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": self.cpus})
        monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": self.cpus}}])
        monkeypatch.setattr(autoscale, "autoscales", lambda: autoscales)
        monkeypatch.setattr(autoscale, "largest", lambda: largest)
        groups = importlib.import_module("ray.util.placement_group")       # ray.util has a function of that name
        monkeypatch.setattr(groups, "placement_group", self.ask)
        monkeypatch.setattr(groups, "remove_placement_group", self.remove)

    def ask(self, bundles: Any) -> "Fake":
        self.asked.append(bundles)
        return self

    def wait(self, timeout_s: float) -> bool:
        self.cpus += 1
        return self.cpus >= sum(bundle["CPU"] for bundle in self.asked[-1])

    def remove(self, group: "Fake") -> None:
        self.removed += 1


def test_what_fits_together_must_fit_node_by_node(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [{"Alive": True, "Resources": {"CPU": 4.0, "GPU": 1.0}}, {"Alive": True, "Resources": {"CPU": 4.0}},
             {"Alive": False, "Resources": {"CPU": 64.0}}]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    assert autoscale.fits([{"CPU": 3, "GPU": 1}, {"CPU": 3}, {"CPU": 1}, {"CPU": 1}])
    assert autoscale.fits([{"CPU": 1}] * 5 + [{"CPU": 3}])
    assert autoscale.fits([{"CPU": 0.2}] * 20 + [{"CPU": 4}]) and autoscale.total([{"CPU": 0.05}] * 20)["CPU"] == 1
    assert not autoscale.fits([{"CPU": 6}, {"CPU": 1}])
    assert not autoscale.fits([{"CPU": 1, "GPU": 1}] * 2)


def test_a_job_that_does_not_fit_is_refused_in_one_text(monkeypatch: pytest.MonkeyPatch) -> None:
    Fake(monkeypatch, autoscales=False)
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": 1.0}}] * 2)

    def refused(bundles: autoscale.Bundles, what: str) -> str:
        with pytest.raises(ClusterError) as error:
            autoscale.require(bundles, what, Records(), where="scale", remedy="ask for less")
        assert error.value.cause == "bad_spec"
        return str(error.value)

    autoscale.require([{"CPU": 1}] * 2, "2 workers", Records(), where="", remedy="")
    assert refused([{"CPU": 1}] * 3, "3 workers") == "scale: 3 workers need 3 CPUs, and the cluster has 2; ask for less"
    assert refused([{"CPU": 1, "GPU": 1}], "1 replica") == "scale: 1 replica needs 1 GPUs, and the cluster has 0; ask for less"
    assert "1 of 2 CPUs and 0 GPUs, do not fit the cluster's nodes one by one" in refused([{"CPU": 2}], "1 replica")


def test_a_job_fits_as_often_as_all_of_its_parts_find_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": 5.0}}] * 2)
    assert autoscale.times([{"CPU": 3}], 9) == 2           # 10 CPUs would be enough for three
    assert [autoscale.times([{"CPU": 1}] * 2, most) for most in (0, 3, 9)] == [0, 3, 5]
    assert autoscale.times([{"CPU": 6}], 9) == 0


def test_a_job_waits_for_the_nodes_that_an_autoscaler_adds(monkeypatch: pytest.MonkeyPatch) -> None:
    fake, shown = Fake(monkeypatch, largest={"CPU": 5}), Records()
    autoscale.grow([{"CPU": 2, "GPU": 0}] * 2 + [{"CPU": 1}], shown)
    assert fake.asked == [[{"CPU": 2}, {"CPU": 2}, {"CPU": 1}]] and fake.removed == 1 and fake.cpus == 5
    assert shown.notes == ["the job needs 5 CPUs and the cluster has 2: waiting for its autoscaler to add nodes, at most 15 minutes"]
    assert [(one["unit"], one["done"], one["total"]) for one in shown.records[1:]] == [("CPUs there", 3, 5), ("CPUs there", 4, 5)]


@pytest.mark.parametrize(("cpus", "options"), [(2, {}), (5, {"autoscales": False}), (5, {"largest": {"CPU": 4}})])
def test_nothing_is_waited_for_that_is_there_or_cannot_come(monkeypatch: pytest.MonkeyPatch, cpus: int, options: dict[str, Any]) -> None:
    fake, shown = Fake(monkeypatch, **options), Records()
    autoscale.grow([{"CPU": 1}] * cpus, shown)
    assert not fake.asked and not shown.records


def test_nodes_are_waited_for_no_longer_than_said(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Fake(monkeypatch)
    monkeypatch.setattr(fake, "wait", lambda timeout_s: False)
    autoscale.grow([{"CPU": 9}], Records(), timeout_s=0)
    assert fake.removed == 1


@pytest.mark.slow
def test_rays_own_autoscaler_adds_the_node_that_a_job_waits_for(tmp_path: Path) -> None:
    """Its provider for tests starts nodes on this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    empty: dict[str, Any] = {name: [] for name in (
        "cluster_synced_files", "rsync_exclude", "rsync_filter", "initialization_commands", "setup_commands", "head_setup_commands",
        "worker_setup_commands", "head_start_ray_commands", "worker_start_ray_commands")}
    types = {"head": {"resources": {"CPU": 1}, "node_config": {}, "max_workers": 0},
             "more": {"resources": {"CPU": 2}, "node_config": {}, "min_workers": 0, "max_workers": 1}}
    (tmp_path / "cluster.json").write_text(json.dumps({
        **empty, "cluster_name": "fake", "max_workers": 1, "provider": {"type": "fake_multinode", "gcs_address": address},
        "available_node_types": types, "head_node_type": "head", "upscaling_speed": 1.0, "idle_timeout_minutes": 5, "auth": {},
        "file_mounts": {}, "file_mounts_sync_continuously": False}))
    given = {**os.environ, "RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_AUTH_MODE": "disabled"}
    given.pop("RAY_ADDRESS", None)
    short = Path(os.path.realpath(f"/tmp/grow-{os.getpid()}"))             # sockets lie in it
    with open(tmp_path / "head.log", "w") as log:
        head = psutil.Popen([str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", f"--port={address.rsplit(':')[1]}",
                             "--num-cpus=1", "--include-dashboard=false", f"--temp-dir={short}", "--object-store-memory=100000000",
                             "--disable-usage-stats", f"--autoscaling-config={tmp_path / 'cluster.json'}"],
                            env=given, stdout=log, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 60
        while "Ray runtime started" not in (tmp_path / "head.log").read_text():
            assert time.monotonic() < deadline and head.poll() is None, (tmp_path / "head.log").read_text()
            time.sleep(0.2)
        done = subprocess.run([sys.executable, "-c", WAIT, address], env=given, capture_output=True, text=True, timeout=150)
        assert done.returncode == 0, done.stderr
        grew, before, after, notes = json.loads(done.stdout.splitlines()[-1])
        assert grew and before < 3 <= after, done.stdout   # the provider's own count of the first node varies
        assert len(notes) == 1 and notes[0].startswith("the job needs 3 CPUs and the cluster has "), notes
    finally:
        children = head.children(recursive=True)
        head.send_signal(signal.SIGTERM)
        psutil.wait_procs([head], timeout=15)
        for one in [head, *children]:
            if one.is_running():
                one.kill()
        psutil.wait_procs(children, timeout=10)
        shutil.rmtree(short, ignore_errors=True)
