"""Files are written whole or not at all, and only under the root."""

import os
import resource
from pathlib import Path

import pytest

from distlm.errors import StorageError
from distlm.storage import Storage, read_json, write_atomic, write_json


def test_a_failed_write_leaves_the_old_file_and_nothing_beside_it(tmp_path):
    path = tmp_path / "a.json"
    write_atomic(path, "old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(StorageError, match=f"{path}: cannot write: File too large; free space or name another storage root"):
            write_atomic(path, b"x" * 100_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.json"]


def test_a_write_into_what_is_no_folder_is_a_storage_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write") as caught:
        write_atomic(tmp_path / "file" / "a", "x")
    assert caught.value.exit_code == 4 and caught.value.cause == "storage"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_write_into_a_read_only_folder_is_a_storage_error(tmp_path):
    (tmp_path / "shut").mkdir(mode=0o500)
    with pytest.raises(StorageError, match="Permission denied"):
        write_atomic(tmp_path / "shut" / "a", "x")


def test_an_interrupt_in_the_middle_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(_):
        raise KeyboardInterrupt
    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomic(tmp_path / "a", "x")
    assert os.listdir(tmp_path) == []


def test_a_file_is_readable_by_others_and_parents_are_made(tmp_path):
    path = tmp_path / "b" / "c" / "a"
    write_atomic(path, "x")
    assert path.stat().st_mode & 0o777 == 0o644


def test_json_goes_there_and_back(tmp_path):
    write_json(tmp_path / "a", {"b": [1, None, "ü"]})
    assert read_json(tmp_path / "a") == {"b": [1, None, "ü"]}
    with pytest.raises(StorageError, match="there is no such file"):
        read_json(tmp_path / "b")
    for content in (b"{", b"\xff"):
        (tmp_path / "c").write_bytes(content)
        with pytest.raises(StorageError, match="cannot be read"):
            read_json(tmp_path / "c")


@pytest.mark.parametrize("name", ["../b", "../../etc", "/etc/passwd", "a/../..", "..", ".", "", "../runs"])
def test_no_name_leads_out_of_the_root(tmp_path, name):
    with pytest.raises(StorageError, match=r"leads out of .*runs; use a plain name"):
        Storage(tmp_path).run(name)


def test_each_kind_has_its_folder(tmp_path):
    storage = Storage(tmp_path)
    places = [storage.corpus("a"), storage.run("a"), storage.sweep("a"), storage.evaluation("a"), storage.endpoint("a"),
              storage.pipeline("a")]
    assert [p.relative_to(tmp_path).as_posix() for p in places] == ["corpora/a", "runs/a", "sweeps/a", "evaluations/a", "endpoints/a",
                                                                    "pipelines/a"]


@pytest.mark.parametrize("root", ["s3://bucket/x", "gs://bucket", "hdfs://host/x"])
def test_an_object_store_is_refused(root):
    with pytest.raises(StorageError, match=f"storage: {root}: object stores are not supported yet; name a folder that every node sees"):
        Storage.find(root)


def test_the_root_is_named_or_in_the_environment_or_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("DISTLM_STORAGE", raising=False)
    assert Storage.find().root == tmp_path / "distlm"
    monkeypatch.setenv("DISTLM_STORAGE", "~/other")
    assert Storage.find().root == tmp_path / "other"
    assert Storage.find("/named").root == Path("/named")
    monkeypatch.chdir(tmp_path)
    assert Storage.find("b/../c").run("x") == tmp_path / "c/runs/x" == Storage(Path("b/../c")).run("x")
