"""What is sent to a cluster is checked here first, travels whole, and is recorded before it is gone."""

import zipfile
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from distlm import cluster, execute, jobs, submitting
from distlm.cli import app
from distlm.errors import ClusterError, InputError
from distlm.runs import RunFolder
from distlm.storage import Storage
from tests.dashboards import dashboard


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("verb", ["run", "submit"])
def test_a_cluster_is_looked_for_under_the_callers_root_and_not_the_specs(verb: str, given: bool, tmp_path: Path,
                                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[Any] = []

    def look(storage: Any = None) -> None:
        looked.append(storage or Storage.find())
        raise ClusterError("enough")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("DISTLM_STORAGE", str(tmp_path / "default"))
    monkeypatch.setattr(cluster, "find", look)
    (tmp_path / "a.txt").write_text("text")
    spec = {"kind": "prepare", "name": "x", "sources": [str(tmp_path / "a.txt")], "storage": str(tmp_path / "own")}
    with pytest.raises(ClusterError, match="enough"):
        (execute.run if verb == "run" else submitting.submit)(spec, storage=tmp_path / "given" if given else None)
    assert looked == [Storage(tmp_path / ("given" if given else "default"))]
    assert verb == "submit" or Storage(tmp_path / ("given" if given else "own")).corpus("x").exists()


@pytest.mark.parametrize("kind", ["tune", "pipeline", "prepare"])
def test_a_spec_that_names_files_travels_whole(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = tmp_path / "here"
    here.mkdir()
    (tmp_path / "train.yaml").write_text("kind: train\nname: t\ncorpus: c\nmodel: {preset: llama-tiny}\nduration: {steps: 3}\n")
    (here / "job.yaml").write_text({"tune": "kind: tune\nname: x\ntrain: ../train.yaml\nspace: {seed: {grid: [1]}}\n",
                                    "pipeline": "kind: pipeline\nname: x\nsteps: {a: {file: ../train.yaml}}\n",
                                    "prepare": "kind: prepare\nname: x\nsources: [stdlib]\n"}[kind])
    sent: dict[str, Any] = {}

    def send(submission: jobs.Submission, entrypoint: str, archive: Path, variables: dict[str, str], metadata: dict[str, str]) -> None:
        with zipfile.ZipFile(archive) as packed:
            sent.update(entrypoint=entrypoint, variables=variables, files={n: packed.read(n).decode() for n in packed.namelist()})

    monkeypatch.setattr(submitting, "send", send)
    with dashboard() as url:
        monkeypatch.setattr(cluster, "require", lambda *_: cluster.Cluster("c", "127.0.0.1:1", url))
        submission = submitting.submit(here / "job.yaml", storage=str(tmp_path / "store"), working_dir=here)
    assert sent["variables"]["DISTLM_SUBMISSION"] == submission.id
    if kind == "prepare":
        assert "run job.yaml" in sent["entrypoint"]
    else:
        assert "run .distlm/x.yaml" in sent["entrypoint"] and "llama-tiny" in sent["files"][".distlm/x.yaml"]


def test_a_name_that_was_taken_while_its_files_were_packed_is_not_queued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage, pack = Storage(tmp_path / "store"), submitting.upload.pack
    spec = {"kind": "prepare", "name": "x", "sources": ["stdlib"]}

    def taken(*given: Any) -> int:
        RunFolder.create(storage.corpus("x"), "kind: prepare\n", {}).event("starting")
        return pack(*given)

    monkeypatch.setattr(submitting.upload, "pack", taken)
    monkeypatch.setattr(submitting, "send", lambda *_: pytest.fail("it is sent"))
    with dashboard() as url:
        monkeypatch.setattr(cluster, "require", lambda *_: cluster.Cluster("c", "127.0.0.1:1", url))
        with pytest.raises(InputError, match="x is starting; `distlm status x` shows it"):
            submitting.submit(spec, storage=storage, working_dir=tmp_path)
    assert RunFolder(storage.corpus("x")).state() == ("starting", "")


def test_an_interrupted_submit_is_stopped_by_the_user_and_does_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    asked: list[str] = []
    monkeypatch.setattr(submitting, "send", interrupted)
    with dashboard(asked) as url:
        monkeypatch.setattr(cluster, "require", lambda *_: cluster.Cluster("c", "127.0.0.1:1", url))
        with pytest.raises(KeyboardInterrupt):
            submitting.submit({"kind": "prepare", "name": "x", "sources": ["stdlib"]}, storage=tmp_path / "store", working_dir=tmp_path)
    job = jobs.locate("x", tmp_path / "store")
    assert (job.state, job.cause) == ("stopped", "user") and "interrupted" in job.message
    [submission] = [event["submission"] for event in RunFolder(job.folder).events() if event["state"] == "queued"]
    assert asked == [f"/api/jobs/{submission}/stop"], "the cluster may have taken it"


def test_what_a_job_does_not_take_along_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = tmp_path / "here"
    for i in range(6):
        (here / f"{i}").mkdir(parents=True)
        (here / f"{i}" / "events.jsonl").write_text("")
    (here / "job.yaml").write_text("kind: prepare\nname: x\nsources: [stdlib]\n")
    monkeypatch.chdir(here)
    monkeypatch.setenv("DISTLM_STORAGE", str(tmp_path / "store"))
    monkeypatch.setattr(submitting, "send", lambda *_: None)
    with dashboard() as url:
        monkeypatch.setattr(cluster, "require", lambda *_: cluster.Cluster("c", "127.0.0.1:1", url))
        done = CliRunner().invoke(app, ["submit", "job.yaml", "--no-follow"])
    told = ", ".join(f"{i}/ (holds events.jsonl)" for i in range(4))
    assert f"not taken along: {told} and 2 more" in done.output, done.output
    folder = RunFolder(Storage(tmp_path / "store").corpus("x"))
    assert folder.state() == ("queued", "") and "5/ (holds events.jsonl)" in folder.events()[-1]["message"]
