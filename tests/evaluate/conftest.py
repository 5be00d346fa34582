"""A storage root with a model and tasks, the model's server, and one cluster for the files of this folder."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from distlm import cluster
from distlm.storage import Storage
from tests.evaluate.tasks import make_root
from tests.serve.test_api import Server


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `make_root` makes; files that need other models have a root of their own."""
    return make_root(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="session")
def server(root: Path) -> Iterator[Server]:
    made = Server(root / "runs" / "m", max_sequences=3, max_queued=8)
    yield made
    made.close()


@pytest.fixture(scope="package")
def joined(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("cluster")
    with cluster.connect(folder / "driver.log", storage=Storage(folder)):
        yield


@pytest.fixture(scope="module")
def storage(root: Path, joined: None) -> Storage:
    return Storage(root)
