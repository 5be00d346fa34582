"""The specs that are shipped are valid and say where their schema is."""

from pathlib import Path

import pytest

from distlm.execute import resolve

JOBS = sorted((Path(__file__).parent.parent / "jobs").glob("*.yaml"))


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.name)
def test_a_shipped_spec_is_valid_and_names_its_schema(path: Path) -> None:
    resolve(path)
    first = path.read_text().splitlines()[0]
    assert first == "# yaml-language-server: $schema=../distlm/spec/schema.json"
    assert (path.parent / first.partition("=")[2]).is_file()


def test_there_is_one_for_every_kind() -> None:
    assert {resolve(path).spec.kind for path in JOBS} == {"prepare", "train", "tune", "serve", "pipeline"}
