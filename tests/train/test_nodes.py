"""A node of two is lost under a run on a real Ray of two nodes."""

from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from distlm.runs import RunFolder
from distlm.spec import TrainSpec
from distlm.storage import Storage
from distlm.train.driver import train
from tests.records import Records
from tests.train.ranks import losses, make_corpus, run_ranks, spec
from tests.train.test_driver import make_run, steps_done, wait_for

pytestmark = pytest.mark.slow


@pytest.fixture
def nodes() -> Iterator[Cluster]:
    """A head that holds the stream and one worker of 2 CPUs, and no other node yet."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 4, "include_dashboard": False, "node_ip_address": "127.0.0.1"})
    ray.init(cluster.address, log_to_driver=False)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus") / "c")


def over_two_nodes(corpus: Path, **more: Any) -> TrainSpec:
    return spec(corpus, **{"duration": {"steps": 200}, "checkpoint": {"every_steps": 10}, "evaluate": {"every_steps": 200},
                           "sharding": {"zero": 2}, "scale": {"workers": 2, "cpus_per_worker": 2}, **more})


def train_and_lose(nodes: Cluster, given: TrainSpec, folder: RunFolder, root: Path, again: bool) -> list[Exception]:
    """Train, and end the second node as a power cut does once the run has come to step 25; `again`: a third has come by then.
    Returns what ended the run."""
    found: list[Exception] = []

    def run() -> None:
        try:
            with folder.running():
                train(given, folder, Storage(root), Records())
        except Exception as error:
            found.append(error)

    second = nodes.add_node(num_cpus=2, node_ip_address="127.0.0.1")
    thread = Thread(target=run)
    thread.start()                                         # nodes are made by the main thread alone
    wait_for(lambda: steps_done(folder.path) >= 25 or not thread.is_alive(), "step 25")
    if again:
        nodes.add_node(num_cpus=2, node_ip_address="127.0.0.1")
    nodes.remove_node(second, allow_graceful=False)
    thread.join(200)
    assert not thread.is_alive(), "the run does not end"
    return found


def test_a_lost_node_costs_nothing_but_time_where_another_takes_its_place(nodes: Cluster, corpus: Path, tmp_path: Path) -> None:
    given, undisturbed = over_two_nodes(corpus), tmp_path / "undisturbed"
    run_ranks({undisturbed: given})
    folder = make_run(tmp_path, given)
    assert train_and_lose(nodes, given, folder, tmp_path, again=True) == []
    assert losses(folder.path) == losses(undisturbed)
    assert [event["cause"] for event in folder.events() if event["state"] == "note"] == ["node_lost"]
    model = "export/model.safetensors"
    assert (folder.path / model).read_bytes() == (undisturbed / model).read_bytes()


def test_a_node_that_stays_lost_ends_the_run_with_what_is_missing(nodes: Cluster, corpus: Path, tmp_path: Path) -> None:
    given = over_two_nodes(corpus)
    folder = make_run(tmp_path, given)
    [error] = train_and_lose(nodes, given, folder, tmp_path, again=False)
    assert folder.state() == ("failed", "timeout"), (error, folder.events())
