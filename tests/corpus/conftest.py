"""A local Ray for the tests of this folder, and small corpora."""

import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from distlm.corpus.prepare import prepare
from distlm.progress import Progress
from distlm.runs import RunFolder
from distlm.spec import load_spec
from distlm.storage import Storage
from tests.records import Records


@pytest.fixture(scope="package")
def cluster() -> Iterator[None]:
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def prepared(base: Path, sources: Any, root: str = "store", progress: Progress | None = None, **keys: Any) -> dict[str, Any]:
    """Prepare a corpus of few words and small windows under `base`; keyword arguments are the spec's. `root` names the storage root. Ray is
    running."""
    given = {"kind": "prepare", "name": "words", "context": 16, "shard_windows": 32, "tokenizer": {"vocab_size": 300}, **keys}
    spec: Any = load_spec({**given, "sources": sources if isinstance(sources, list) else [str(sources)]}).spec
    storage = Storage(base / root)
    folder = RunFolder(storage.corpus(spec.name))
    folder.path.mkdir(parents=True, exist_ok=True)
    return prepare(spec, folder, storage, progress or Records())


@pytest.fixture
def run(cluster: None, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """`prepared` in a folder of the test's own."""
    return functools.partial(prepared, tmp_path)


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Sixty documents in files of four kinds, among them duplicates."""
    folder = tmp_path / "texts"
    (folder / "deep").mkdir(parents=True)
    for i in range(20):
        (folder / f"{i:02}.txt").write_text(document(i), encoding="utf-8")
        (folder / "deep" / f"{i:02}.py").write_text(document(i + 15), encoding="utf-8")
    (folder / "more.jsonl").write_text("".join(json.dumps({"text": document(i + 30), "id": i}) + "\n" for i in range(20)))
    return folder


def document(i: int) -> str:
    words = " ".join(f"word{(i * 7 + j * j) % 50}" for j in range(30))
    return f"Document {i} says: {words}\nAnd nothing more than {i}. Ärger 你好\n"
