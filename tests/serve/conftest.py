"""The model that the tests of serving share."""

from pathlib import Path

import pytest

from tests.serve.tiny_models import LLAMA, make_model


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("llama"), LLAMA, chat=True)
