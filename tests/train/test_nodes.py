"""A run over nodes of which one is lost or drained: each a raylet of its own, with workers and an object store, on its own address."""

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from distlm.head import Head, LocalCluster, client, down, up
from distlm.runs import RunFolder
from distlm.spec.load import dump, to_yaml
from distlm.storage import Storage, read_json
from distlm.train.drain import NODES
from tests.train.ranks import losses, make_corpus, run_ranks, spec
from tests.train.test_driver import start_of, steps_done, wait_for, workers

pytestmark = pytest.mark.slow


@dataclass
class Nodes:
    """A head that has room for one worker, and nodes that join it."""

    head: Head
    environment: dict[str, str]

    def join(self, address: str) -> "subprocess.Popen[bytes]":
        """One more node that has room for one worker, when it is alive: two that start at once may choose the same ports. One that Ray
        gives up, as it does after 30 s of a machine under load, is started again."""
        before = self.alive()
        for _ in range(3):
            node = subprocess.Popen(
                [sys.executable, "-m", "ray.scripts.scripts", "start", f"--address={self.head.address}", f"--node-ip-address={address}",
                 "--num-cpus=1", "--object-store-memory=100000000", "--block", "--disable-usage-stats"],
                env=self.environment, start_new_session=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL)
            wait_for(lambda: self.alive() > before or node.poll() is not None, f"the start of the node {address}")  # noqa: B023
            if node.poll() is None:
                return node
        raise AssertionError(f"the node {address} does not start")

    def alive(self) -> int:
        return len(self.ids())

    def ids(self) -> dict[str, str]:
        """Address -> Ray's id, of those that are alive."""
        with client(self.head.dashboard_url, self.head.token_file) as http:
            found = http.get("/nodes", params={"view": "summary"}).json()["data"]["summary"]
        return {node["ip"]: node["raylet"]["nodeId"] for node in found if "ip" in node and node["raylet"].get("state") == "ALIVE"}

    def drain(self, node: str) -> None:
        """Say that it will be gone in two minutes, as an autoscaler does."""
        subprocess.run([sys.executable, "-m", "ray.scripts.scripts", "drain-node", f"--address={self.head.address}", f"--node-id={node}",
                        "--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=spot", "--deadline-remaining-seconds=120"],
                       env=self.environment, check=True, capture_output=True)


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    head, _ = up(LocalCluster(name="nodes", cpus=1, object_store_bytes=100_000_000), Storage(tmp_path))
    try:
        marked = psutil.Process(head.pid).environ()        # what joins is ended with it
        yield Nodes(head, {**marked, "PYTHONPATH": os.environ.get("PYTHONPATH", "")})
    finally:
        down(head)


def lose(node: "subprocess.Popen[bytes]") -> list[psutil.Process]:
    """All of its processes at once, as when a machine loses its power. Returns them, when they are gone."""
    processes = [psutil.Process(node.pid), *psutil.Process(node.pid).children(recursive=True)]
    for process in processes:
        process.suspend()                                  # none may tell that another has gone
    for process in processes:
        process.kill()
    psutil.wait_procs(processes)
    return processes


def test_a_node_that_is_lost_costs_the_steps_since_the_last_checkpoint(nodes: Nodes, tmp_path: Path) -> None:
    given = spec(make_corpus(tmp_path / "c"), duration={"steps": 120}, checkpoint={"every_steps": 20}, evaluate={"every_steps": 40},
                 scale={"workers": 2}, sharding={"zero": 2})
    run_ranks({tmp_path / "undisturbed": given})
    joined = [nodes.join("127.0.0.2"), nodes.join("127.0.0.3")]
    file, folder = tmp_path / "run.yaml", RunFolder(Storage(tmp_path).run(given.name))
    file.write_text(to_yaml(dump(given)))
    job = subprocess.Popen([sys.executable, "-m", "distlm", "run", str(file)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                           env={**nodes.environment, "RAY_ADDRESS": nodes.head.address, "DISTLM_STORAGE": str(tmp_path)})
    wait_for(lambda: steps_done(folder.path) >= 25 or job.poll() is not None, "step 25", 240)
    assert job.poll() is None, job.communicate()[0].decode()
    lost, kept = sorted(joined, key=lambda node: not workers(node.pid))
    trained = [*workers(lost.pid), *workers(kept.pid), *workers(nodes.head.pid)]
    assert len(trained) == 2
    gone = lose(lost)
    wait_for(lambda: nodes.alive() == 2, "the loss of a node")
    joined.append(nodes.join("127.0.0.4"))
    output = job.communicate(timeout=300)[0].decode()
    assert job.returncode == 0, output
    failures = [event["cause"] for event in folder.events() if event["state"] == "note" and event["cause"]]
    assert failures == ["node_lost"], output
    assert folder.state() == ("succeeded", "completed")
    assert len(began := start_of(folder)) == 2 and began[1] >= 20
    assert losses(folder.path) == losses(tmp_path / "undisturbed")
    ours, theirs = ((run / "export" / "model.safetensors").read_bytes() for run in (folder.path, tmp_path / "undisturbed"))
    assert ours == theirs
    assert set(trained) & set(gone) and not any(process.is_running() for process in gone)
    living = [nodes.head.pid, kept.pid, joined[-1].pid]
    wait_for(lambda: not any(process.is_running() for process in trained) and not any(map(workers, living)), "the end of all workers", 60)



def test_a_node_that_ray_drains_is_left_after_a_step_and_costs_nothing_but_time(nodes: Nodes, tmp_path: Path) -> None:
    given = spec(make_corpus(tmp_path / "c"), duration={"steps": 120}, checkpoint={"every_steps": 50}, evaluate={"every_steps": 40},
                 scale={"workers": 2}, sharding={"zero": 2}, guard={"grace_period_s": 0.001})
    run_ranks({tmp_path / "undisturbed": given})
    joined = {address: nodes.join(address) for address in ("127.0.0.2", "127.0.0.3", "127.0.0.4")}
    file, folder = tmp_path / "run.yaml", RunFolder(Storage(tmp_path).run(given.name))
    file.write_text(to_yaml(dump(given)))
    job = subprocess.Popen([sys.executable, "-m", "distlm", "run", str(file)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                           env={**nodes.environment, "RAY_ADDRESS": nodes.head.address, "DISTLM_STORAGE": str(tmp_path)})
    wait_for(lambda: steps_done(folder.path) >= 10 or job.poll() is not None, "step 10", 240)
    assert job.poll() is None, job.communicate()[0].decode()
    address = next(one for one, node in joined.items() if workers(node.pid))
    ids = nodes.ids()
    nodes.drain(ids[address])
    wait_for(lambda: job.poll() is not None or (len(start_of(folder)) == 2 and (folder.path / NODES).exists()), "the next group")
    assert job.poll() is None, job.communicate()[0].decode()
    assert ids[address] not in read_json(folder.path / NODES), "the group that goes on is elsewhere"
    output = job.communicate(timeout=300)[0].decode()
    assert job.returncode == 0, output
    notes = [event for event in folder.events() if event["state"] == "note"]
    told, resumed = (note for note in notes if "drains" in note["message"])
    assert told["nodes"] == [ids[address]] and 60 < told["left_s"] <= 120 and f"Ray drains the node {address}, with " in told["message"]
    began = start_of(folder)
    assert len(began) == 2 and 10 <= began[1] < 120, output
    assert f"Ray drains the node {address}, and the state after step {began[1]} is saved" in resumed["message"]
    assert f"where there were {told['left_s']:.4g} s" in resumed["message"], "the deadline of this one, and not that of SIGTERM"
    assert len([note for note in notes if "guard.grace_period_s: 0.001 s are too few for" in note["message"]]) == 1
    assert [(note["cause"], note["attempt"]) for note in notes if note["cause"]] == [("preempted", 1)], "not once more for the same node"
    assert not (folder.path / NODES).exists(), "nothing of it is left"
    assert folder.state() == ("succeeded", "completed") and losses(folder.path) == losses(tmp_path / "undisturbed")
    ours, theirs = ((run / "export" / "model.safetensors").read_bytes() for run in (folder.path, tmp_path / "undisturbed"))
    assert ours == theirs
    left = [nodes.head.pid, *(node.pid for node in joined.values() if node.poll() is None)]
    wait_for(lambda: not any(map(workers, left)), "the end of all workers", 60)
