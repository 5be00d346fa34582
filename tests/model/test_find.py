"""A model is named by run or by folder, and what is not there is named with the nearest."""

from pathlib import Path

import pytest

from distlm.errors import InputError
from distlm.model.find import find_model
from distlm.runs import RunFolder
from distlm.storage import Storage, write_json


def test_a_model_is_a_run_by_name_a_run_by_path_or_a_plain_folder(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    export = storage.run("tiny") / "export"
    write_json(export / "config.json", {})
    assert find_model("tiny", storage) == export
    assert find_model(str(export.parent), storage) == find_model(str(export), storage) == export


def test_a_model_that_is_not_there_is_named_with_the_nearest(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    write_json(storage.run("tiny") / "export" / "config.json", {})
    with pytest.raises(InputError, match=r"^model: there is no run and no folder 'tinny'; did you mean tiny\?$"):
        find_model("tinny", storage)
    with pytest.raises(InputError, match=r"no config\.json"):
        find_model(str(tmp_path), storage)
    RunFolder.create(storage.run("young"), "kind: train\n", {})
    with pytest.raises(InputError, match=r"model\.from: .*young: the run has no export"):
        find_model("young", storage, "model.from")
