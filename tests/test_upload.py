"""What a submitted job takes along, and what never."""

import subprocess
import zipfile

import pytest

from distlm import upload
from distlm.errors import InputError


@pytest.fixture
def folder(tmp_path):
    """A project with all that must stay behind."""
    here = tmp_path / "project"
    for name in ("train.yaml", "src/code.py", ".git/config", "env/pyvenv.cfg", "env/lib/big.py", "runs/a/events.jsonl", "runs/a/model.bin",
                 "store/corpora/x/0.arrow", "__pycache__/x.pyc", ".venv/pyvenv.cfg"):
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_text(name)
    return here


def names(archive):
    return sorted(zipfile.ZipFile(archive).namelist())


def test_git_environments_runs_and_storage_stay_behind(folder, tmp_path):
    upload.pack(folder, tmp_path / "a.zip", folder / "store", {".distlm/x.yaml": "kind: train"})
    assert names(tmp_path / "a.zip") == [".distlm/x.yaml", "src/code.py", "train.yaml"]
    assert zipfile.ZipFile(tmp_path / "a.zip").read("src/code.py") == b"src/code.py"


def test_keys_and_environments_stay_behind_where_there_is_no_git(folder, tmp_path):
    for name in ("other/clusters/c/cluster.json", "other/clusters/c/token", "other/clusters/c/head.log", "conda/conda-meta/history",
                 "conda/bin/python", "module/.git", "module/a.py", "token", "keys/api_key"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    for name in ("token", "keys/api_key"):
        (folder / name).chmod(0o600)
    (folder / "src" / "token").write_text("a word, which all may read")
    upload.pack(folder, tmp_path / "a.zip", folder / "store")
    assert names(tmp_path / "a.zip") == ["module/a.py", "src/code.py", "src/token", "train.yaml"]


def test_what_git_ignores_stays_behind(folder, tmp_path):
    (folder / ".git" / "config").unlink()
    (folder / ".git").rmdir()
    subprocess.run(["git", "init", "-q", str(folder)], check=True)
    (folder / ".gitignore").write_text("*.log\n")
    (folder / "out.log").write_text("x")
    (folder / "src" / "ü.py").write_text("x")
    upload.pack(folder, tmp_path / "a.zip", folder / "store")
    assert names(tmp_path / "a.zip") == [".gitignore", "src/code.py", "src/ü.py", "train.yaml"]


@pytest.mark.parametrize("git", [True, False])
def test_a_folder_that_might_be_wanted_does_not_stay_behind_in_silence(git, folder, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a.txt").write_text("a")
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    for name in ("data/logs/events.jsonl", "ignored/events.jsonl", "old/cluster.json"):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text("{}")
    (folder / "env2").symlink_to(folder / "env")
    if git:
        (folder / ".git" / "config").unlink()
        (folder / ".git").rmdir()
        subprocess.run(["git", "init", "-q", str(folder)], check=True)
        (folder / ".gitignore").write_text("ignored\n")
    said = upload.pack(folder, tmp_path / "a.zip", folder / "store")
    assert said == [*([] if git else ["ignored/ (holds events.jsonl)"]), "linked/ (a link)", "old/ (holds cluster.json)",
                    "data/logs/ (holds events.jsonl)", "runs/a/ (holds events.jsonl)"]
    assert names(tmp_path / "a.zip") == [*([".gitignore"] if git else []), "src/code.py", "train.yaml"]


def test_equal_files_give_an_equal_archive(folder, tmp_path):
    for name in ("a.zip", "b.zip"):
        upload.pack(folder, tmp_path / name, folder / "store")
        (folder / "train.yaml").touch()
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()


def test_too_much_is_refused_by_the_names_of_the_largest(folder, tmp_path):
    (folder / "data").mkdir()
    for i in range(3):
        with open(folder / "data" / f"{i}.bin", "wb") as file:
            file.truncate(40 << 20)                        # sparse: no disk is used
    with open(folder / "model.bin", "wb") as file:
        file.truncate(7 << 20)
    with pytest.raises(InputError, match=r"127 MiB are more than the 100 MiB .*: data/ 120 MiB, model\.bin 7 MiB, ") as error:
        upload.pack(folder, tmp_path / "a.zip", folder / "store")
    assert error.value.exit_code == 2 and not (tmp_path / "a.zip").exists()
