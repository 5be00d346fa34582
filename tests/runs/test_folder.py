"""A job's folder says what happened, whatever became of the process."""

import json
import multiprocessing
import os
import pickle
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from distlm import errors
from distlm.errors import CAUSES, CheckpointError, DistlmError, InputError, SpecError, StorageError, TrainError
from distlm.runs import RunFolder, lineage


@pytest.fixture
def folder(tmp_path):
    return RunFolder.create(tmp_path / "a", "kind: train\n", {"seed": 1})


def test_a_new_folder_is_queued_and_holds_spec_and_lineage(folder):
    assert folder.state() == ("queued", "") and folder.events() == []
    assert (folder.path / "spec.yaml").read_text() == "kind: train\n" and folder.lineage() == {"seed": 1}
    assert RunFolder.open(folder.path) == folder


def test_what_succeeds_keeps_its_name(folder):
    with folder.running():
        assert folder.state() == ("starting", "")
        folder.event("running")
        assert folder.state() == ("running", "")
    assert folder.state() == ("succeeded", "completed")
    with pytest.raises(InputError, match="the name a is taken by a job that has succeeded; take another name, or go on with --resume"):
        RunFolder.create(folder.path, "", {})


def test_an_ended_job_goes_on_with_resume_and_keeps_its_journals(folder):
    with pytest.raises(TrainError):
        with folder.running():
            folder.metrics({"step": 1})
            raise TrainError("lost", cause="worker_died")
    assert folder.state() == ("failed", "worker_died")
    again = RunFolder.create(folder.path, "kind: train\nseed: 2\n", {}, resume=True)
    with again.running():
        again.metrics({"step": 2})
    assert [e["state"] for e in again.events()] == ["starting", "failed", "starting", "succeeded"]
    assert [m["step"] for m in again.read_metrics()] == [1, 2]


def test_a_job_that_runs_is_not_taken_up_again(folder):
    with folder.running():
        for resume in (False, True):
            with pytest.raises(InputError, match="a is starting; `distlm status a` shows it, `distlm stop a` ends it"):
                RunFolder.create(folder.path, "", {}, resume=resume)


def test_of_two_that_start_at_once_one_gets_the_name(folder):
    with pytest.raises(InputError, match="a is being started by another process"):
        RunFolder.create(folder.path, "kind: serve\n", {"seed": 2})
    assert (folder.path / "spec.yaml").read_text() == "kind: train\n" and folder.lineage() == {"seed": 1}


def _create(path, barrier, results):
    barrier.wait()
    try:
        RunFolder.create(path, "kind: train\n", {"pid": os.getpid()}, resume=True)
        results.put(os.getpid())
    except InputError:
        results.put(0)
    barrier.wait()


def test_of_processes_that_start_at_once_one_gets_the_name(tmp_path):
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(3), context.Queue()
    processes = [context.Process(target=_create, args=(tmp_path / "x", barrier, results)) for _ in range(3)]
    for process in processes:
        process.start()
    found = sorted(results.get(timeout=60) for _ in processes)
    for process in processes:
        process.join()
    assert found[:2] == [0, 0] and found[2] == RunFolder(tmp_path / "x").lineage()["pid"]


def test_a_claim_ends_with_its_process(tmp_path):
    code = f"import os, signal; from pathlib import Path; from distlm.runs import RunFolder\n" \
           f"RunFolder.create(Path({str(tmp_path / 'a')!r}), '', {{}}); os.kill(os.getpid(), signal.SIGKILL)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9
    RunFolder.create(tmp_path / "a", "", {})


def test_a_queued_folder_is_for_its_own_submission(tmp_path, monkeypatch):
    folder = RunFolder(tmp_path / "a")
    folder.event("queued", submission="train-a-1")
    for mine in (None, "train-a-2"):
        if mine:
            monkeypatch.setenv("DISTLM_SUBMISSION", mine)
        for resume in (False, True):
            with pytest.raises(InputError, match=r"a is queued as train-a-1; .*`distlm stop a` ends it"):
                RunFolder.create(folder.path, "", {}, resume=resume)
    monkeypatch.setenv("DISTLM_SUBMISSION", "train-a-1")
    with RunFolder.create(folder.path, "", {}).running():
        assert folder.events()[-1]["submission"] == "train-a-1"


RUNNING = """
import sys
from pathlib import Path
from distlm.runs import RunFolder
with RunFolder.create(Path(sys.argv[1]), "", {}).running():
    print("running", flush=True)
    sys.stdin.read()
"""


def test_a_name_is_queued_for_a_job_that_failed_before_it_began_and_for_no_other(tmp_path):
    folder = RunFolder(tmp_path / "a")
    folder.queue("submitted", submission="train-a-1")
    with pytest.raises(InputError, match="a is queued as train-a-1"):
        folder.queue("submitted", submission="train-a-2", resume=True)
    folder.event("failed", "internal", "could not be submitted")
    folder.queue("submitted", submission="train-a-3", dashboard="http://127.0.0.1:9")
    assert folder.events()[-1]["submission"] == "train-a-3" and folder.events()[-1]["dashboard"] == "http://127.0.0.1:9"
    begun = RunFolder.create(tmp_path / "b", "", {})
    with pytest.raises(InputError, match="b is being started by another process"):
        begun.queue("submitted", submission="train-b-1")
    begun.event("failed", "internal")
    with pytest.raises(InputError, match="the name b is taken by a job that has failed"):
        begun.queue("submitted", submission="train-b-1")
    begun.queue("submitted", submission="train-b-1", resume=True)


def test_a_submission_that_is_queued_late_does_not_get_the_folder_of_a_job_that_runs(tmp_path, monkeypatch):
    folder = RunFolder(tmp_path / "a")
    with subprocess.Popen([sys.executable, "-c", RUNNING, folder.path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout.readline() == "running\n"
        with pytest.raises(InputError, match="a is starting"):
            folder.queue("submitted", submission="train-a-1", resume=True)
        folder.event("queued", submission="train-a-1")     # from where the file system knows no locks
        monkeypatch.setenv("DISTLM_SUBMISSION", "train-a-1")
        with pytest.raises(InputError, match="a is being started by another process"):
            RunFolder.create(folder.path, "", {}, resume=True)
        first.kill()
    RunFolder.create(folder.path, "", {}, resume=True)


def test_there_is_no_job_where_there_is_no_folder(tmp_path):
    with pytest.raises(InputError, match="there is no such job"):
        RunFolder.open(tmp_path / "b")


@pytest.mark.parametrize(("raised", "state", "cause"), [
    (KeyboardInterrupt(), "stopped", "user"), (SpecError("x"), "failed", "bad_spec"), (InputError("x"), "failed", "bad_input"),
    (StorageError("x"), "failed", "storage"), (TrainError("x", cause="oom"), "failed", "oom"), (ValueError("x"), "failed", "internal"),
    (SystemExit(1), "failed", "internal"),
])
def test_every_end_has_its_cause(folder, raised, state, cause):
    with pytest.raises(type(raised)):
        with folder.running():
            raise raised
    assert folder.state() == (state, cause)


def test_a_note_does_not_change_the_state(folder):
    folder.event("running")
    folder.event("note", "worker_died", "resumed from step 100", step=100)
    assert folder.state() == ("running", "") and folder.events()[-1]["step"] == 100


def test_states_and_causes_are_closed_lists(folder):
    for state, cause in (("sleeping", ""), ("failed", "bad luck")):
        with pytest.raises(AssertionError):
            folder.event(state, cause)
    with pytest.raises(AssertionError):
        TrainError("x", cause="bad luck")
    assert folder.events() == []


def test_a_driver_that_is_killed_leaves_a_failed_job(folder):
    code = f"import os, signal; from pathlib import Path; from distlm.runs import RunFolder\n" \
           f"with RunFolder(Path({str(folder.path)!r})).running(): os.kill(os.getpid(), signal.SIGKILL)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9
    assert folder.events()[-1]["state"] == "starting"
    assert folder.state() == ("failed", "head_lost")
    RunFolder.create(folder.path, "", {}, resume=True)


def test_a_process_that_took_a_dead_drivers_number_is_not_the_driver(folder):
    folder.event("running")
    event = folder.events()[-1]
    assert event["owner"]["pid"] == os.getpid()
    event["owner"]["started"] -= 100
    (folder.path / "events.jsonl").write_text(json.dumps(event) + "\n")
    assert folder.state() == ("failed", "head_lost")


def test_a_driver_on_another_host_is_believed(folder):
    folder.event("running")
    event = folder.events()[-1]
    event["owner"].update(host="elsewhere", pid=2**22 + 1)
    (folder.path / "events.jsonl").write_text(json.dumps(event) + "\n")
    assert folder.state() == ("running", "")


def test_a_torn_last_line_costs_that_line_alone(folder):
    folder.metrics({"step": 1})
    with open(folder.path / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "lo')
    assert [m["step"] for m in folder.read_metrics()] == [1]
    folder.metrics({"step": 3})
    assert [m["step"] for m in folder.read_metrics()] == [1, 3]


def _append(folder, writer, count):
    for i in range(count):
        folder.metrics({"writer": writer, "i": i, "pad": "x" * 300})


@pytest.mark.parametrize("line", ["{\"time\": 1, \"state\": \"running\"}", "{\"state\": 7}", "{}", "nonsense"])
def test_a_line_that_is_no_event_takes_nothing_down(folder, line):
    with open(folder.path / "events.jsonl", "a") as file:
        file.write(line + "\n")
    assert folder.state()[0] in ("queued", "running")


def test_lines_of_several_processes_do_not_mix(folder):
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_append, args=(folder, w, 100)) for w in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [w.exitcode for w in writers] == [0, 0, 0]
    found = folder.read_metrics()
    assert all([m["i"] for m in found if m["writer"] == w] == list(range(100)) for w in range(3))


def test_a_full_disk_is_an_error_and_not_a_shorter_line(folder):
    folder.metrics({"step": 1})
    size = (folder.path / "metrics.jsonl").stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 8, hard))
    try:
        with pytest.raises(StorageError, match=r"metrics\.jsonl: cannot write: File too large; free space"):
            folder.metrics({"step": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    folder.metrics({"step": 3})
    assert [m["step"] for m in folder.read_metrics()] == [1, 3]


@pytest.mark.parametrize("raised", [CheckpointError("no shard"), KeyboardInterrupt("no shard")])
def test_a_full_disk_hides_neither_the_error_that_it_caused_nor_an_interrupt(raised, folder, monkeypatch):
    def full(*_):
        raise StorageError("cannot write: No space left on device")
    with pytest.raises(type(raised), match="no shard"):
        with folder.running():
            monkeypatch.setattr(RunFolder, "_append", full)
            raise raised


def test_a_result_is_read_back(folder):
    folder.result({"": "path", "loss": 1.5})
    assert folder.read_result() == {"": "path", "loss": 1.5}


KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, DistlmError)]


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_survives_the_way_through_ray(kind):
    error = kind("3 is odd", where="a.yaml:1: x", remedy="try 4", cause="hang")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind and str(copy) == str(error) == "a.yaml:1: x: 3 is odd; try 4"
    assert (copy.cause, copy.exit_code, copy.where, copy.remedy) == ("hang", kind.exit_code, "a.yaml:1: x", "try 4")
    assert kind.cause in CAUSES and kind.exit_code in (2, 3, 4)


def test_lineage_names_code_packages_and_inputs():
    record = lineage({"kind": "train", "name": "a", "seed": 3}, corpus="c")
    assert record["inputs"] == {"corpus": "c"} and record["seed"] == 3 and record["packages"]["ray"] and record["hardware"]["cpus"]
    json.dumps(record)


def test_lineage_claims_no_commit_for_code_that_git_does_not_track(tmp_path):
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    git = ["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a@example.com"]
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "x"], check=True)
    (tmp_path / "copy_.py").write_text(Path(sys.modules["distlm.runs.lineage"].__file__).read_text())
    shown = [sys.executable, "-c", "import copy_; print(copy_.lineage({})['code'])"]
    found = subprocess.run(shown, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "{}"
    subprocess.run([*git, "add", "copy_.py"], check=True)
    found = subprocess.run(shown, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "commit" in found.stdout
