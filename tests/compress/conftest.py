"""A storage root with a corpus, text, and a run, m, whose model has three layers."""

from pathlib import Path

import pytest

from tests.corpus.made import Doc, make
from tests.evaluate.models import make_model


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("compress")
    make(root / "corpora" / "text", [Doc("train " * 20), *(Doc(f"def of_{i}(x):\n    return x + {i}\n", split="val") for i in range(20))])
    make_model(root / "runs" / "m" / "export", root / "corpora" / "text", hidden_size=64, intermediate_size=128, num_hidden_layers=3)
    return root
