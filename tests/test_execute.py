"""From a spec to a finished folder: what is refused before any work, what is recorded, what may be taken up again."""

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from distlm import cluster, execute, summary
from distlm.errors import InputError, ServeError, SpecError
from distlm.runs import RunFolder
from distlm.serve.client import healthy
from distlm.serve.guard import make_key
from distlm.spec import load_spec
from distlm.spec.load import dump, parse, to_yaml
from distlm.storage import Storage, write_json
from tests.endpoints import fake_endpoint
from tests.records import Records
from tests.train import ranks


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Storage]:
    root = Storage(tmp_path_factory.mktemp("storage"))
    with cluster.connect(root.root / "driver.log", storage=root):
        yield root


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    (tmp_path / "texts").mkdir()
    for i in range(6):
        (tmp_path / "texts" / f"{i}.txt").write_text(f"{i} is followed by {i + 1}. " * 40)
    return tmp_path / "texts"


def spec(texts: Path, name: str, **keys: Any) -> dict[str, Any]:
    return {"kind": "prepare", "name": name, "sources": [str(texts)], "context": 16, "tokenizer": {"train": "bytes"},
            "split": {"val_fraction": 0.3}, **keys}


def test_a_job_leaves_its_spec_with_origins_its_lineage_its_end_and_its_result(storage: Storage, texts: Path) -> None:
    file = texts.parent / "prepare.yaml"
    file.write_text(f"kind: prepare\nname: full\nsources: [{texts}]\ncontext: 16\ntokenizer: {{train: bytes}}\n")
    made = execute.run(file, overrides=["split.val_fraction=0.3"], storage=storage, progress=Records())
    folder = RunFolder(storage.corpus("full"))
    assert folder.state() == ("succeeded", "completed") and folder.read_result() == made and made["documents"] == 6
    text = (folder.path / "spec.yaml").read_text()
    assert "context: 16  # prepare.yaml:4" in text and "val_fraction: 0.3  # --set" in text and "exact: true  # default" in text
    assert dump(load_spec(folder.path / "spec.yaml").spec) == dump(execute.resolve(file, ["split.val_fraction=0.3"]).spec)
    assert folder.lineage()["kind"] == "prepare"
    assert [event["cluster"] for event in folder.events() if "cluster" in event] == [cluster.joined()] != [""]


@pytest.mark.parametrize(("url", "token_file", "said"), [
    ("http://127.0.0.1:9", "/tmp/x/token", "dashboard http://127.0.0.1:9 (token in /tmp/x/token)"),
    ("http://127.0.0.1:9", None, "dashboard http://127.0.0.1:9"), ("", "/tmp/x/token", "dashboard off")])
def test_a_dashboard_is_shown_with_the_place_of_the_token_that_it_asks_for(url: str, token_file: str | None, said: str, tmp_path: Path,
                                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster.import_ray(), "is_initialized", lambda: False)
    connection = cluster.Connection("127.0.0.1:7", url, True, token_file)
    monkeypatch.setattr(cluster, "connect", lambda *_, **__: contextlib.nullcontext(connection))
    kept = Records()
    with execute.connected(RunFolder(tmp_path / "runs" / "a"), Storage(tmp_path), kept) as embedded:
        assert embedded and kept.notes == [f"a cluster for this job alone, {said}"]


def test_a_taken_name_is_refused_and_a_complete_job_is_not_done_again(storage: Storage, texts: Path) -> None:
    made = execute.run(spec(texts, "twice"), storage=storage, progress=Records())
    folder = RunFolder(storage.corpus("twice"))
    events = folder.events()
    with pytest.raises(InputError, match=r"the name twice is taken.*--resume"):
        execute.run(spec(texts, "twice"), storage=storage, progress=Records())
    shown = Records()
    assert execute.run(spec(texts, "twice"), storage=storage, progress=shown, resume=True) == made
    assert shown.notes == ["prepare twice has already succeeded: nothing to do"] and folder.events() == events
    shard = next((folder.path / "train").iterdir())
    shard.unlink()
    with pytest.raises(InputError, match=rf"{shard.name} is missing; take another name to prepare again, or move the folder away"):
        execute.run(spec(texts, "twice"), storage=storage, progress=Records(), resume=True)


def test_a_run_whose_export_is_gone_is_not_complete(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, shown = execute.resolve({"kind": "train", "name": "bare", "corpus": "c", "model": {"preset": "llama-tiny"},
                                     "duration": {"steps": 3}}), Records()
    folder = RunFolder.create(storage.run("bare"), to_yaml(dump(loaded.spec)), {})
    folder.result({"export": str(folder.path / "export")})
    folder.event("succeeded", "completed")
    monkeypatch.setattr(execute, "inputs", lambda *_: {})
    monkeypatch.setattr(execute, "imported", lambda place: lambda *_: {"did": "train"} if place == execute.JOBS["train"] else {})
    with pytest.raises(InputError, match="no checkpoint to write it from; take another name"):
        execute.run_loaded(loaded, storage, shown, resume=True, hold=False)
    step = folder.path / "checkpoints" / "step-000003"
    step.mkdir(parents=True)
    (step / "COMMITTED").touch()
    assert execute.run_loaded(loaded, storage, shown, resume=True, hold=False) == {"did": "train"}
    assert "config.json is missing: it goes on from its last checkpoint" in shown.notes[0]


def test_a_changed_spec_is_not_taken_up_again_and_the_error_names_the_differences(storage: Storage, texts: Path) -> None:
    execute.run(spec(texts, "changed"), storage=storage, progress=Records())
    RunFolder(storage.corpus("changed")).event("failed", "internal")
    with pytest.raises(SpecError, match=r"context: 16 -> 32; seed: 0 -> 1.*take another name"):
        execute.run(spec(texts, "changed", context=32, seed=1), storage=storage, progress=Records(), resume=True)
    other = RunFolder(storage.folder("prepare", "changed"))
    with pytest.raises(SpecError, match="changed is of kind: prepare, and the spec of kind: train; take another name"):
        execute.check_resume(other, execute.resolve({"kind": "train", "name": "changed", "corpus": "c", "model": {"preset": "llama-tiny"},
                                                     "duration": {"steps": 1}}).spec)
    execute.run(spec(texts, "changed", workers=1), storage=storage, progress=Records(), resume=True)
    folder = RunFolder(storage.corpus("changed"))
    assert folder.state() == ("succeeded", "completed")
    assert "resumed with workers: None -> 1" in [event["message"] for event in folder.events()]
    assert len(folder.lineage()["earlier"]) == 1


def test_what_a_kind_measures_afterwards_is_among_the_outputs_of_its_job_and_of_no_job_in_its_place(
        storage: Storage, texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(spec: Any, folder: RunFolder, *_: Any) -> dict[str, Any]:
        assert folder.read_result()["documents"] == 6, "the job is done, and its result written"
        return {"measured": spec.name}

    monkeypatch.setattr("distlm.compress.beside.beside", measure)
    monkeypatch.setitem(execute.AFTERWARDS, "prepare", execute.AFTERWARDS["train"])
    made = execute.run(spec(texts, "more"), storage=storage, progress=Records())
    assert made["measured"] == "more" and RunFolder(storage.corpus("more")).read_result() == made
    other = execute.run_loaded(execute.resolve(spec(texts, "other")), storage, Records(), hold=False, do=lambda *_: {"": "x"})
    assert other == {"": "x"}


def test_a_job_that_was_submitted_takes_its_queued_folder(storage: Storage, texts: Path) -> None:
    folder = RunFolder(storage.corpus("queued"))
    folder.event("queued")
    execute.run(spec(texts, "queued"), storage=storage, progress=Records())
    assert folder.state() == ("succeeded", "completed")


def test_a_job_that_fails_records_the_cause(storage: Storage, texts: Path) -> None:
    with pytest.raises(Exception) as error:
        execute.run(spec(texts, "fails", clean={"min_chars": 1_000_000}), storage=storage, progress=Records())
    folder = RunFolder(storage.corpus("fails"))
    assert folder.state() == ("failed", "bad_input") and str(error.value) in folder.events()[-1]["message"]


TRAIN = {"corpus": "none", "model": {"preset": "llama-tiny"}, "duration": {"steps": 1}}


@pytest.mark.parametrize("given", [{"kind": "prepare", "sources": ["/no/such/folder"]}, {"kind": "serve", "model": "fulll"},
                                   {"kind": "train", **TRAIN}, {"kind": "tune", "space": {"optimizer.lr": {"grid": [1]}}, "train": TRAIN}])
def test_an_input_that_does_not_exist_is_found_before_a_folder_is_made(given: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(InputError):
        execute.run({"name": "x", **given}, storage=tmp_path, progress=Records())
    assert not list(tmp_path.iterdir())


def test_a_text_of_several_lines_survives_in_the_recorded_spec(tmp_path: Path) -> None:
    steps = {"a": {"kind": "prepare", "sources": ["stdlib"]}}
    loaded = execute.resolve({"kind": "pipeline", "name": "p", "prompt": "def f(x):\n    # a: b\n", "steps": steps})
    assert parse(execute.spec_text(loaded, RunFolder(tmp_path / "p")))[0] == dump(loaded.spec)


def test_what_an_endpoint_is_made_of_and_a_pipelines_prompt_may_change(tmp_path: Path) -> None:
    """And that of older runs in what gradients were added up: the checkpoint says what it must be."""
    folder = RunFolder(tmp_path / "x")
    serve = {"kind": "serve", "name": "x", "model": "a"}
    step = {"steps": {"a": {"kind": "prepare", "sources": ["stdlib"]}}}
    train = {"kind": "train", "name": "x", "corpus": "c", "model": {"preset": "llama-tiny"}, "duration": {"steps": 1}}
    for before, now in [(serve, {**serve, "model": "b", "max_tokens": 7, "port": 0}), (train, {**train, "reduce_precision": "same"}),
                        ({"kind": "pipeline", "name": "x", **step},
                         {"kind": "pipeline", "name": "x", "prompt": "def", "chat": True, **step})]:
        RunFolder.create(folder.path, to_yaml(dump(execute.resolve(before).spec)), {}, resume=True)
        assert execute.check_resume(folder, execute.resolve(now).spec)


def test_an_endpoint_is_healthy_only_by_its_own_key_and_name_and_no_proxy_is_asked(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with fake_endpoint(tmp_path, "e") as record:
        assert healthy(record)
        assert not healthy({**record, "model": "another"})
        assert not healthy({**record, "api_key_file": str(make_key(tmp_path / "another"))})
        assert not healthy({**record, "api_key_file": str(tmp_path / "none")})
    assert not healthy(record)


def test_an_endpoint_is_held_until_it_falls_silent_and_then_recorded_as_stopped(tmp_path: Path) -> None:
    folder = RunFolder(Storage(tmp_path).endpoint("e"))
    folder.event("succeeded", "completed")
    ended = []

    def hold() -> None:
        try:
            execute.hold_endpoints({"e": record["url"]}, Storage(tmp_path), Records(), every_s=0.1)
        except ServeError as error:
            ended.append(error)

    with fake_endpoint(folder.path, "e") as record:
        write_json(folder.path / "endpoint.json", record)
        thread = threading.Thread(target=hold)
        thread.start()
        thread.join(timeout=1)
        assert thread.is_alive() and folder.state()[0] == "succeeded"
    thread.join(timeout=60)
    assert ended and ended[0].cause == "worker_died" and folder.state() == ("stopped", "user")


def test_a_run_that_cannot_go_on_as_changed_is_refused_and_stays_as_it_is(storage: Storage) -> None:
    given = ranks.spec(ranks.make_corpus(storage.corpus("few")), name="done", duration={"steps": 5}, schedule={"name": "constant"})
    folder = RunFolder.create(storage.run("done"), to_yaml(dump(given)), {})
    ranks.run_ranks({folder.path: given})
    folder.event("succeeded", "completed")
    before = {path: path.read_bytes() for path in folder.path.iterdir() if path.is_file()}
    for change, message in ({"precision": "bf16"}, "precision: 'fp32' -> 'bf16'"), ({"duration": {"steps": 2}}, "5 steps done"):
        with pytest.raises(SpecError, match=message):
            execute.run({**dump(given), **change}, storage=storage, progress=Records(), resume=True)
        assert folder.state() == ("succeeded", "completed")
        assert {path: path.read_bytes() for path in folder.path.iterdir() if path.is_file()} == before


def test_a_run_that_has_ended_well_is_shown_as_a_table_with_what_comes_next(storage: Storage) -> None:
    shown = Records()
    summary.show_job("train", RunFolder(storage.run("done")), {"parameters": 1000, "steps": 5, "tokens": 960, "loss_first": 4.0,
                                                               "loss_last": 3.0, "val_loss_first": 4.1, "val_loss": 3.5, "perplexity": 33.1,
                                                               "bits_per_byte": 1.5, "tokens_per_s": 9000.0}, shown)
    assert shown.records[-2]["distlm"] == "table" and "serve it with" in shown.notes[-1]


def test_a_profile_is_no_run_to_go_on_with(storage: Storage) -> None:
    given = {"kind": "train", "name": "looked-at", **TRAIN}
    RunFolder.create(storage.run("looked-at"), "kind: train", {"profile": True}).event("failed", "internal")
    with pytest.raises(InputError, match="it is a profile"):
        execute.run(given, storage=storage, progress=Records(), resume=True)
