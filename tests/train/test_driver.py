"""The train job on a real Ray: exact against ranks without Ray, and resumed by cause after real kills."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Thread

import httpx
import numpy as np
import psutil
import pytest
import ray
from ray.util import placement_group, placement_group_table, remove_placement_group

from distlm.corpus.blocks import plan_streams
from distlm.corpus.stream import START, Plan, local_steps, ordered_steps
from distlm.errors import ClusterError, SpecError, StorageError, TrainError
from distlm.execute import profile
from distlm.machine import machine_memory
from distlm.runs import RunFolder
from distlm.spec import TrainSpec
from distlm.spec.load import dump, to_yaml
from distlm.storage import Storage, write_json
from distlm.train import backend, checkpoint, driver
from distlm.train.determinism import ENVIRONMENT
from distlm.train.driver import KEEP_MEMORY, gauges, train
from distlm.train.recipe import make_recipe
from tests.codes import INTERRUPTED
from tests.records import Records
from tests.train.ranks import VOCABULARY, losses, make_corpus, make_labelled_corpus, metrics, run_ranks, spec
from tests.train.test_dpo import make_pairs

LONG = {"duration": {"steps": 120}, "checkpoint": {"every_steps": 20}, "evaluate": {"every_steps": 40}, "scale": {"workers": 2},
        "sharding": {"zero": 2}}
WIDE = {"config": {"model_type": "llama", "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}}
"""Its shards are longer than any log, and take a while to write."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    context = ray.init(num_cpus=6, include_dashboard=False, log_to_driver=False, _system_config={"metrics_report_interval_ms": 500})
    yield context.address_info["address"]
    ray.shutdown()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus") / "c")


@pytest.fixture(scope="module")
def undisturbed(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run by plain processes: what Ray adds must not show."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    run_ranks({run: spec(corpus, **LONG)})
    return run


def workers(pid: int | None = None, title: str = "RayTrainWorker") -> list[psutil.Process]:
    """The training workers, or other actors, of the Ray that this process, or the one of that number, has started, and of no other."""
    found = []
    for process in psutil.Process(pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):            # it may end while it is looked at
            if title in " ".join(process.cmdline()):
                found.append(process)
    return found


def wait_for(condition: Callable[[], object], what: str, seconds: float = 300) -> None:
    """`seconds` are for workers that start on a machine under load; where all is well none of them passes."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen in {seconds} s"
        time.sleep(0.02)


def steps_done(run: Path) -> int:
    path = run / "metrics.jsonl"
    return max((record["step"] for record in metrics(run)), default=0) if path.exists() else 0


def make_run(root: Path, given: TrainSpec) -> RunFolder:
    return RunFolder.create(Storage(root).run(given.name), to_yaml(dump(given)), {})


@pytest.mark.slow
def test_a_job_that_is_killed_whole_and_then_a_worker_cost_nothing_but_time(cluster: str, corpus: Path, undisturbed: Path, tmp_path: Path
                                                                            ) -> None:
    given, storage = spec(corpus, **LONG), Storage(tmp_path)
    file, folder = tmp_path / "run.yaml", RunFolder(storage.run("run"))
    file.write_text(to_yaml(dump(given)))
    job = subprocess.Popen([sys.executable, "-m", "distlm", "run", str(file)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                           env={**os.environ, "RAY_ADDRESS": cluster, "DISTLM_STORAGE": str(tmp_path)})
    wait_for(lambda: steps_done(folder.path) >= 25 or job.poll() is not None, "step 25")
    job.send_signal(signal.SIGKILL)
    output = job.communicate()[0].decode()
    assert job.returncode == -signal.SIGKILL, output
    assert folder.state() == ("failed", "head_lost"), "a driver that is gone is seen"
    wait_for(lambda: not workers(), "the end of the workers", 60)
    before = steps_done(folder.path)
    assert before < 60

    progress, killed, tunables, seen = Records(), list[int](), list[bool](), list[dict[str, float]]()

    def kill() -> None:
        wait_for(lambda: workers() and steps_done(folder.path) >= 60, "step 60")
        victim = workers()[0]
        killed.append(victim.pid)
        environment = Path(f"/proc/{victim.pid}/environ").read_text().replace("\0", ":")   # glibc cuts its own variable into pieces
        tunables.append(f"GLIBC_TUNABLES={KEEP_MEMORY}" in environment and "hugetlb" not in environment)
        victim.send_signal(signal.SIGKILL)

    killer = Thread(target=kill)
    killer.start()
    RunFolder.create(folder.path, file.read_text(), {}, resume=True)
    with folder.running():
        outputs = train(given, folder, storage, progress, on_metrics=seen.append)
    killer.join()
    assert killed, "the fault fired"
    assert tunables == [True]
    assert losses(folder.path) == losses(undisturbed)
    assert (folder.path / "export" / "model.safetensors").read_bytes() == (undisturbed / "export" / "model.safetensors").read_bytes()
    failures = [event["cause"] for event in folder.events() if event["state"] == "note" and event["cause"]]
    assert failures == ["worker_died"] and folder.state() == ("succeeded", "completed")
    began = start_of(folder)
    assert began[0] == 0 and 20 <= began[1] <= before and began[2] >= 40
    assert [step % 20 for step in began] == [0, 0, 0], "Ray's SIGTERM to workers whose driver is gone is no request to save"
    assert [note for note in progress.notes if "resuming at step" in note] == [f"resuming at step {step} of 120" for step in began[1:]]
    assert seen[-1]["step"] == 120
    assert outputs["steps"] == 120 and outputs["loss_last"] == losses(undisturbed)[-1] and outputs["checkpoint"] == "step-000120"
    assert outputs["perplexity"] == pytest.approx(np.exp(outputs["val_loss"]))
    wait_for(lambda: not workers(), "the end of the workers", 30)


@pytest.mark.slow
def test_sigterm_to_a_worker_and_then_to_the_driver_costs_nothing_but_time(cluster: str, corpus: Path, undisturbed: Path, tmp_path: Path
                                                                           ) -> None:
    folder, sent = make_run(tmp_path, given := spec(corpus, **LONG)), []

    def preempt() -> None:
        wait_for(lambda: workers() and steps_done(folder.path) >= 5, "step 5")
        workers()[-1].send_signal(signal.SIGTERM)
        sent.append("worker")
        wait_for(lambda: len([event for event in folder.events() if event["state"] == "running"]) == 2, "the second launch")
        wait_for(lambda: steps_done(folder.path) >= (began := start_of(folder)[-1]) + 5 and began, "five steps more")
        os.kill(os.getpid(), signal.SIGTERM)
        sent.append("driver")

    thread = Thread(target=preempt)
    thread.start()
    with pytest.raises(TrainError, match=r"was sent SIGTERM, and the state after step \d+ is saved, \S+ s later; go on with --resume"), \
            folder.running():
        train(given, folder, Storage(tmp_path), Records())
    thread.join()
    assert sent == ["worker", "driver"], "the faults fired"
    assert folder.state() == ("failed", "preempted")
    assert [event["cause"] for event in folder.events() if event["state"] == "note"] == ["preempted"]
    wait_for(lambda: not workers(), "the end of the workers", 30)
    with folder.running():
        train(given, folder, Storage(tmp_path), Records())
    assert len(began := start_of(folder)) == 3 and any(step % 20 for step in began), "not only from checkpoints that were due"
    assert losses(folder.path) == losses(undisturbed)
    assert (folder.path / "export" / "model.safetensors").read_bytes() == (undisturbed / "export" / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_a_controller_that_is_killed_costs_nothing_but_time_and_keeps_no_resources(cluster: str, corpus: Path, undisturbed: Path,
                                                                                   tmp_path: Path) -> None:
    given = spec(corpus, **{**LONG, "scale": {"workers": 2, "cpus_per_worker": 2}})        # two groups would not fit
    folder, killed = make_run(tmp_path, given), list[int]()

    def kill() -> None:
        wait_for(lambda: workers() and steps_done(folder.path) >= 50, "step 50")
        [victim] = workers(title="TrainController")
        victim.send_signal(signal.SIGKILL)
        killed.append(victim.pid)

    thread = Thread(target=kill)
    thread.start()
    with folder.running():
        train(given, folder, Storage(tmp_path), Records())
    thread.join()
    assert killed, "the fault fired"
    [note] = [event for event in folder.events() if event["state"] == "note"]
    assert note["cause"] == "worker_died" and "Ray Train's controller ended unexpectedly; its log is in Ray's log folder" in note["message"]
    assert folder.state() == ("succeeded", "completed") and losses(folder.path) == losses(undisturbed)
    assert len(began := start_of(folder)) == 2 and began[1] >= 40
    wait_for(lambda: not workers() and all(group["state"] == "REMOVED" for group in placement_group_table().values()),
             "the end of all that the run had started", 30)


@pytest.mark.slow
def test_an_interrupted_training_is_stopped_by_the_user_keeps_nothing_and_goes_on(cluster: str, corpus: Path, undisturbed: Path,
                                                                                  tmp_path: Path) -> None:
    given, storage = spec(corpus, **LONG), Storage(tmp_path)
    file, folder = tmp_path / "run.yaml", RunFolder(storage.run("run"))
    file.write_text(to_yaml(dump(given)))

    def run(*options: str) -> subprocess.Popen[str]:
        return subprocess.Popen([sys.executable, "-m", "distlm", "run", str(file), *options], stdout=subprocess.PIPE, text=True,
                                stderr=subprocess.STDOUT, env={**os.environ, "RAY_ADDRESS": cluster, "DISTLM_STORAGE": str(tmp_path)})

    def begun() -> bool:
        return folder.exists() and any(event["state"] == "running" for event in folder.events())

    for condition, options in ((begun, []), (lambda: steps_done(folder.path) >= 25, ["--resume"])):      # no worker is there yet; steps
        job = run(*options)
        wait_for(lambda condition=condition, job=job: condition() or job.poll() is not None, "what it is interrupted in")  # type: ignore[misc]
        job.send_signal(signal.SIGINT)
        output = job.communicate(timeout=60)[0]
        assert job.returncode in INTERRUPTED and "Traceback" not in output and "--resume" in output, output
        assert folder.state() == ("stopped", "user")
        wait_for(lambda: not workers() and all(group["state"] == "REMOVED" for group in placement_group_table().values()),
                 "the end of all that the run had started", 30)
        assert not (folder.path / "export").exists()
    job = run("--resume")
    output = job.communicate(timeout=300)[0]
    assert job.returncode == 0, output
    assert [start >= 20 for start in start_of(folder)] == [False, False, True], "from its last checkpoint"
    assert losses(folder.path) == losses(undisturbed)


def test_a_job_gives_back_what_it_has_reserved_and_no_other_job_s(cluster: str) -> None:
    """Another driver in the same cluster has a group meanwhile, and this one had one before."""
    code = ("import sys, ray\nfrom ray.util import placement_group\nray.init(address=sys.argv[1], log_to_driver=False)\n"
            "group = placement_group([{'CPU': 1}])\nassert group.wait(60)\nprint(group.id.hex(), flush=True)\nsys.stdin.read()")
    mine, told = placement_group([{"CPU": 1}]), list[str]()
    other = subprocess.Popen([sys.executable, "-c", code, cluster], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdin and other.stdout
    with pytest.raises(KeyboardInterrupt), backend.given_back(told.append):
        made = placement_group([{"CPU": 1}])
        theirs = other.stdout.readline().strip()
        assert made.wait(60) and mine.wait(60) and theirs
        assert backend.reserved() == {mine.id.hex(), made.id.hex()}
        raise KeyboardInterrupt
    states = {name: group["state"] for name, group in placement_group_table().items()}
    assert [states[name] for name in (mine.id.hex(), made.id.hex(), theirs)] == ["CREATED", "REMOVED", "CREATED"] and not told
    other.communicate("", timeout=60)
    remove_placement_group(mine)

    @ray.remote(num_cpus=0)
    def drives() -> bool:
        return backend.drives()

    assert backend.drives() and not ray.get(drives.remote()), "what a task has made ends with its driver, which may be long after it"


@pytest.mark.slow
def test_a_worker_that_is_stopped_is_named_and_ended_and_costs_nothing_but_time(cluster: str, corpus: Path, undisturbed: Path,
                                                                                 tmp_path: Path) -> None:
    given = spec(corpus, guard={"step_timeout_s": 15}, **LONG)
    folder, stopped = make_run(tmp_path, given), list[int]()

    def stop() -> None:
        wait_for(lambda: workers() and steps_done(folder.path) >= 50, "step 50")
        victim = workers()[-1]
        victim.send_signal(signal.SIGSTOP)
        stopped.append(victim.pid)

    thread = Thread(target=stop)
    thread.start()
    with folder.running():
        train(given, folder, Storage(tmp_path), Records())
    thread.join()
    assert stopped, "the fault fired"
    [note] = [event for event in folder.events() if event["state"] == "note"]
    assert note["cause"] == "hang" and f"(process {stopped[0]} on " in note["message"] and "does not answer" in note["message"]
    assert sum("no progress for 15 s" in log.read_text() for log in (folder.path / "logs").glob("worker-*.log")) == 1, "the other's stacks"
    assert folder.state() == ("succeeded", "completed") and losses(folder.path) == losses(undisturbed)
    assert (folder.path / "export" / "model.safetensors").read_bytes() == (undisturbed / "export" / "model.safetensors").read_bytes()
    assert not psutil.pid_exists(stopped[0]) and not (folder.path / "hang").exists()
    wait_for(lambda: not workers(), "the end of the workers", 30)


@pytest.mark.slow
def test_a_disk_that_is_full_ends_the_run_with_that_cause_and_leaves_no_part_of_a_checkpoint(cluster: str, corpus: Path, tmp_path: Path
                                                                                              ) -> None:
    folder, filled = make_run(tmp_path, given := spec(corpus, model=WIDE, **LONG)), list[int]()

    def fill() -> None:
        wait_for(lambda: workers() and steps_done(folder.path) >= 25, "step 25")
        for worker in workers():
            worker.rlimit(psutil.RLIMIT_FSIZE, (1 << 20, 1 << 20))
            filled.append(worker.pid)

    thread = Thread(target=fill)
    thread.start()
    with pytest.raises(StorageError, match=r"step-\d+: the checkpoint cannot be written: .*, and what there was of it is removed; free"), \
            folder.running():
        train(given, folder, Storage(tmp_path), Records())
    thread.join()
    assert len(filled) == 2, "the fault fired"
    assert folder.state() == ("failed", "storage") and not [event for event in folder.events() if event["state"] == "note"]
    kept = checkpoint.committed(folder.path)
    assert kept and sorted((folder.path / "checkpoints").iterdir()) == kept and checkpoint.verified(kept[-1]).step >= 20
    wait_for(lambda: not workers(), "the end of the workers", 30)


def stops_in_a_save(worker: psutil.Process, run: Path) -> bool:
    """Whether it stands still now with a file of a checkpoint half written. It is stopped before it is looked at, and where it was at
    something else it goes on: nothing is left to a race."""
    if all((path / checkpoint.MARKER).exists() for path in (run / "checkpoints").iterdir()):
        return False
    worker.suspend()
    if writing(worker):
        return True
    worker.resume()
    return False


def writing(worker: psutil.Process) -> list[Path]:
    """The checkpoints of whose state it has files open to write."""
    return [file.parent.parent for file in (Path(one.path) for one in worker.open_files() if one.mode != "r")
            if file.parent.name == checkpoint.TAG]


@pytest.mark.slow                                          # tests/train/test_checkpoint.py has one that steps wait for, without Ray
def test_a_worker_that_is_killed_in_the_middle_of_a_save_costs_nothing_but_time(cluster: str, corpus: Path, tmp_path: Path) -> None:
    large = {"config": {**WIDE["config"], "intermediate_size": 4096}}
    given = spec(corpus, model=large, duration={"steps": 24}, checkpoint={"every_steps": 4}, evaluate={"every_steps": 12},
                 scale={"workers": 2}, sharding={"zero": 2})
    run_ranks({tmp_path / "undisturbed": given})
    folder, killed, left = make_run(tmp_path, given), list[int](), set[str]()

    def kill() -> None:
        wait_for(lambda: workers() and checkpoint.committed(folder.path), "the first checkpoint")
        victim = workers()[-1]
        wait_for(lambda: stops_in_a_save(victim, folder.path), "a save that is under way")
        [partial] = writing(victim)
        left.update(path.name for path in partial.iterdir())
        killed.append(int(partial.name.removeprefix("step-")))
        victim.kill()

    killer = Thread(target=kill)
    killer.start()
    with folder.running():
        train(given, folder, Storage(tmp_path), Records())
    killer.join()
    assert killed and checkpoint.TAG in left and not left & {"manifest.json", checkpoint.MARKER}, "the fault fired inside of a save"
    assert [event["cause"] for event in folder.events() if event["state"] == "note"] == ["worker_died"]
    assert folder.state() == ("succeeded", "completed")
    assert start_of(folder) == [0, killed[0] - 4], "half a checkpoint is none"
    assert losses(folder.path) == losses(tmp_path / "undisturbed")
    ours, theirs = ((run / "export" / "model.safetensors").read_bytes() for run in (folder.path, tmp_path / "undisturbed"))
    assert ours == theirs
    assert [checkpoint.verified(path).step for path in sorted((folder.path / "checkpoints").iterdir())] == [20, 24], "nor does it stay"
    wait_for(lambda: not workers(), "the end of the workers", 30)


def start_of(folder: RunFolder) -> list[int]:
    """The first step of every launch."""
    return [int(event["message"].removeprefix("from step ")) for event in folder.events() if event["state"] == "running"]


@pytest.mark.slow
def test_a_run_goes_on_with_more_workers_and_says_so(cluster: str, corpus: Path, tmp_path: Path) -> None:
    alone = {**LONG, "scale": {"workers": 1, "threads_per_worker": 1}, "sharding": {"zero": 0}}
    folder, shown = make_run(tmp_path, given := spec(corpus, **alone)), Records()
    with folder.running():
        train(given, folder, Storage(tmp_path), Records())
    whole = losses(folder.path)
    shutil.rmtree(checkpoint.committed(folder.path)[-1])
    shutil.rmtree(folder.path / "export")
    with folder.running():
        train(spec(corpus, **LONG), folder, Storage(tmp_path), shown)
    text = "its state is divided anew: workers 1 -> 2, zero 0 -> 2"
    assert text in shown.notes and text in [event["message"] for event in folder.events()]
    np.testing.assert_allclose(losses(folder.path), whole, rtol=1e-4)
    last = [record for record in shown.records if record["distlm"] == "update"][-1]["figures"]
    assert {"loss", "val_loss", "lr", "grad_norm", "tokens_per_s", "memory_bytes"} <= set(last) and last["eta_s"] == 0


@pytest.mark.slow                                          # tests/test_quickstart.py has one of two that is killed
def test_the_only_worker_that_is_killed_costs_nothing_but_time_and_leaves_its_log(cluster: str, corpus: Path, tmp_path: Path) -> None:
    sections = {"duration": {"steps": 60}, "checkpoint": {"every_steps": 10}, "evaluate": {"every_steps": 20},
                "scale": {"workers": 1, "threads_per_worker": 1}}
    run_ranks({tmp_path / "undisturbed": spec(corpus, **sections)})
    given = spec(corpus, deterministic=True, **sections)   # which changes nothing on a CPU
    folder, killed, environment = make_run(tmp_path, given), [], dict[str, str]()

    def kill() -> None:
        wait_for(lambda: steps_done(folder.path) >= 15, "step 15")
        [victim] = workers()
        killed.append(victim.pid)
        environment.update(victim.environ())
        victim.send_signal(signal.SIGKILL)

    killer = Thread(target=kill)
    killer.start()
    with folder.running():
        train(given, folder, Storage(tmp_path), Records())
    killer.join()
    assert killed, "the fault fired"
    assert {name: environment[name] for name in ENVIRONMENT} == ENVIRONMENT, "before anything was loaded"
    assert losses(folder.path) == losses(tmp_path / "undisturbed")
    assert folder.state() == ("succeeded", "completed")
    [note] = [event for event in folder.events() if event["state"] == "note"]
    log = folder.path / "logs" / "worker-0.log"
    assert note["cause"] == "worker_died" and note["message"].endswith(f"its log is {log}")
    began = [int(line.split()[2]) for line in log.read_text().splitlines() if line.startswith("--- process ")]
    assert len(began) == 2 and began[0] == killed[0]
    wait_for(lambda: not workers(), "the end of the workers", 30)


@pytest.mark.slow                                          # tests/train/test_checkpoint.py has the same without Ray
@pytest.mark.parametrize("damaged", [False, True])
def test_a_run_that_lacks_only_its_export_makes_it_and_a_truncated_shard_costs_the_steps_since_the_one_before(
        cluster: str, corpus: Path, undisturbed: Path, tmp_path: Path, damaged: bool) -> None:
    given = spec(corpus, **LONG)
    folder, progress = RunFolder(Storage(tmp_path).run("run")), Records()
    shutil.copytree(undisturbed, folder.path)
    shutil.rmtree(folder.path / "export")
    newest = folder.path / "checkpoints" / "step-000120"
    if damaged:
        shard = next((newest / "state").glob("*optim_states.pt"))
        shard.write_bytes(shard.read_bytes()[:-100])
    with folder.running():
        train(given, folder, Storage(tmp_path), progress)
    assert losses(folder.path) == losses(undisturbed)
    assert (folder.path / "export" / "model.safetensors").read_bytes() == (undisturbed / "export" / "model.safetensors").read_bytes()
    refused = [event for event in folder.events() if "refused" in event["message"]]
    assert len(refused) == int(damaged) and all(str(newest) in event["message"] and event["cause"] == "storage" for event in refused)
    assert [note for note in progress.notes if "resuming at step" in note] == [f"resuming at step {100 if damaged else 120} of 120"]
    assert bool([note for note in progress.notes if note.startswith("refused: ")]) == damaged


def test_failures_of_a_cause_count_since_the_last_checkpoint(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups end as scripted: with a cause, and perhaps a checkpoint of a step. The last one comes to the end."""
    def run(name: str, *ends: tuple[str, int | None]) -> tuple[str, list[tuple[str, int]]]:
        folder, left = make_run(tmp_path / name, given), [*ends, ("", None)]

        def launch(*_: object) -> TrainError | None:
            cause, step = left.pop(0)
            if step is not None:
                path = checkpoint.checkpoint_path(folder.path, step)
                path.mkdir(parents=True, exist_ok=True)
                write_json(path / "manifest.json", {"due": False} if step % 5 else {})
                (path / "COMMITTED").write_text("")
                os.utime(path / "COMMITTED", ns=(len(left), len(left)))        # a clock of files may tick slowly
            return TrainError("no", cause=cause) if cause else None

        monkeypatch.setattr(driver, "_launch", launch)
        cause = ""
        try:
            driver._to_the_end(recipe, folder, Records(), [])
        except TrainError as error:
            cause = error.cause
        assert bool(cause) == bool(left), "nothing is launched after an end"
        return cause, [(event["cause"], event["attempt"]) for event in folder.events()]

    given = spec(corpus, retry={"worker_died": 2, "hang": 1, "preempted": 2})
    recipe = make_recipe(given, Storage(tmp_path))
    monkeypatch.setattr(driver, "_resume_point", lambda *_: None)
    monkeypatch.setattr(driver, "_following", lambda *_: contextlib.nullcontext())
    died, hang, preempted = (("worker_died", None), ("hang", None), ("preempted", None))
    assert run("three", died, died, died) == ("worker_died", [("worker_died", 1), ("worker_died", 2)])
    assert run("weeks", died, died, ("worker_died", 5), died, ("worker_died", 10), died) == (
        "", [("worker_died", n) for n in (1, 2, 1, 2, 1, 2)])
    assert run("again", died, ("worker_died", 5), died, died)[0] == "worker_died", "what is committed once counts once"
    assert run("anew", ("worker_died", 5), died, ("worker_died", 5), died) == ("", [("worker_died", n) for n in (1, 2, 1, 2)])
    assert run("hangs", hang, hang) == ("hang", [("hang", 1)])
    assert run("slowly", hang, ("hang", 5), died, died, preempted) == (
        "", [("hang", 1), ("hang", 1), ("worker_died", 1), ("worker_died", 2), ("preempted", 1)])
    assert run("other", ("oom", 5)) == ("oom", [])
    assert run("taken", ("preempted", 3), ("preempted", 4), ("preempted", 6)) == ("preempted", [("preempted", 1), ("preempted", 2)]), \
        "what it saves itself does not count"
    with pytest.raises(TrainError), monkeypatch.context() as patch:
        patch.setattr(driver, "_launch", lambda *_: TrainError("the trial's process ends", cause="worker_died"))
        driver._to_the_end(recipe, folder := make_run(tmp_path / "stopped", given), Records(), [], wanted=lambda: False)
    assert not folder.events(), "what a sweep has stopped is not taken up again"
    assert run("goes on", ("preempted", 4), ("preempted", 5), ("preempted", 7)) == ("", [("preempted", n) for n in (1, 1, 2)])


@pytest.mark.slow
def test_a_failure_that_comes_back_ends_the_run_with_its_cause(cluster: str, corpus: Path, tmp_path: Path) -> None:
    given = spec(corpus, optimizer={"lr": 1e30, "clip": 0.0}, duration={"steps": 30})
    folder = make_run(tmp_path, given)
    with pytest.raises(TrainError, match=r"the (loss|gradient's norm) is .*nan.*lower optimizer\.lr"), folder.running():
        train(given, folder, Storage(tmp_path), Records())
    assert folder.state() == ("failed", "nonfinite_loss")
    assert not (folder.path / "export").exists()
    wait_for(lambda: not workers() and all(group["state"] == "REMOVED" for group in placement_group_table().values()),
             "the end of all that the run had started", 20)


def test_what_a_step_measured_is_shown_at_the_cluster_s_metrics_endpoint(cluster: str) -> None:
    gauges("one-run")({"step": 7, "loss": 2.5, "tokens_per_s": 1000.0, "time": 1.0})
    url = f"http://127.0.0.1:{ray.nodes()[0]['MetricsExportPort']}/metrics"

    def shown() -> dict[str, float]:                       # other runs of this cluster may be there already
        lines = [line for line in httpx.get(url).text.splitlines() if line.startswith("ray_distlm_train_") and 'run="one-run"' in line]
        return {line.split("{")[0].removeprefix("ray_distlm_train_"): float(line.split()[-1]) for line in lines}

    wait_for(lambda: len(shown()) == 3, "the endpoint's first report of this run")
    assert shown() == {"step": 7, "loss": 2.5, "tokens_per_s": 1000}


@pytest.mark.slow
def test_a_profile_tells_where_ten_steps_go_and_saves_nothing_else(cluster: str, corpus: Path, tmp_path: Path) -> None:
    shown = Records()
    given = dump(spec(corpus, scale={"workers": 2}, sharding={"zero": 2}, schedule={"warmup_steps": 20}))
    made = profile({**given, "kind": "train"}, storage=tmp_path, progress=shown)
    run = Path(made[""])
    assert run.name.startswith("run-profile-") and RunFolder(run).state() == ("succeeded", "completed")
    parts = [made[name] for name in ("data", "forward", "backward", "optimizer", "other")]
    assert all(part > 0 for part in parts[:4]) and sum(parts) == pytest.approx(made["step_ms"], rel=0.05)
    trace = json.loads((run / "profile" / "trace.json").read_text())["traceEvents"]
    for name, times in (("distlm.forward", 30), ("distlm.backward", 30), ("distlm.optimizer", 10), ("distlm.data", 10)):
        assert len([one for one in trace if one.get("name") == name and one.get("cat") == "user_annotation"]) == times, name
    assert not (run / "checkpoints").exists() and not (run / "export").exists()
    with pytest.raises(SpecError, match="only a training job has steps"):
        profile({"kind": "prepare", "name": "x", "sources": [str(tmp_path)]}, storage=tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(1500)                                 # it launches workers five times
def test_micro_batches_are_as_large_as_the_memory_of_a_worker_allows(cluster: str, tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path / "c", context=256)
    wide = {"config": {"model_type": "llama", "hidden_size": 256, "intermediate_size": 2048, "num_hidden_layers": 4,
                       "num_attention_heads": 4}}

    def given(name: str, micro: object, **scale: object) -> TrainSpec:
        return spec(corpus, name=name, model=wide, batch={"global_sequences": 16, "micro_sequences": micro}, duration={"steps": 3},
                    scale=scale, evaluate={"every_steps": 3}, checkpoint={"every_steps": 3})

    folder = make_run(tmp_path, given("auto", "auto", memory_gib=1.3))
    train(given("auto", "auto", memory_gib=1.3), folder, Storage(tmp_path), Records())
    chosen = json.loads((folder.path / "micro-sequences.json").read_text())
    assert 1 <= chosen["micro_sequences"] < 16 and 0.3e9 < chosen["bytes"] <= 1.3 * 2**30, chosen
    assert any(event.get("message", "").startswith("16 sequences in a micro-batch: 1") for event in folder.events())
    fixed = make_run(tmp_path, given("fixed", chosen["micro_sequences"]))
    train(given("fixed", chosen["micro_sequences"]), fixed, Storage(tmp_path), Records())
    assert losses(folder.path) == losses(fixed.path)


def test_workers_on_cpu_have_the_memory_of_a_machine_that_is_the_whole_cluster(cluster: str, corpus: Path,
                                                                               monkeypatch: pytest.MonkeyPatch) -> None:
    assert driver.machine_room(spec(corpus, scale={"workers": 2})) == machine_memory()
    assert driver.machine_room(spec(corpus, scale={"gpus_per_worker": 1})) is None
    nodes = ray.nodes()
    for others, room in ([{"Alive": True}], None), ([{"Alive": False}], machine_memory()):
        monkeypatch.setattr(ray, "nodes", lambda others=others: [*nodes, *others])
        assert driver.machine_room(spec(corpus)) == room


def test_a_job_that_the_cluster_can_never_hold_is_refused(cluster: str, corpus: Path, tmp_path: Path) -> None:
    given = spec(corpus, scale={"workers": 12}, batch={"global_sequences": 12})
    with pytest.raises(ClusterError, match=r"12 workers and the data stream need 13 CPUs, and the cluster has 6"):
        train(given, make_run(tmp_path, given), Storage(tmp_path), Records())


@pytest.mark.slow
@pytest.mark.parametrize("keys", [("tensor_parallel",), ("sequence_parallel",), ("tensor_parallel", "sequence_parallel")])
def test_what_is_divided_over_workers_trains_as_by_plain_processes(cluster: str, corpus: Path, tmp_path: Path,
                                                                   keys: tuple[str, ...]) -> None:
    given = spec(corpus, duration={"steps": 6}, scale={"workers": 4}, sharding={**dict.fromkeys(keys, 2), "zero": 2}, model={"config": {
        "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}})
    run_ranks({tmp_path / "plain": given})
    folder, shown = make_run(tmp_path, given), Records()
    with folder.running():
        train(given, folder, Storage(tmp_path), shown)
    assert losses(folder.path) == losses(tmp_path / "plain")
    ours, theirs = ((run / "export" / "model.safetensors").read_bytes() for run in (folder.path, tmp_path / "plain"))
    assert ours == theirs
    assert any(f"4 workers in groups of {2 ** len(keys)} under ZeRO-2" in note for note in shown.notes)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["dpo", "distill", "classify"])
def test_other_objectives_train_as_by_plain_processes(cluster: str, corpus: Path, tmp_path: Path, objective: str) -> None:
    run_ranks({tmp_path / "base": spec(corpus, duration={"steps": 4})})
    base = str(tmp_path / "base" / "export")
    of, sections = {"dpo": (make_pairs, {"model": {"from": base}}), "distill": (make_corpus, {"distill": {"teacher": base}}),
                    "classify": (make_labelled_corpus, {})}[objective]
    given = spec(of(tmp_path / "c"), objective=objective, duration={"steps": 8}, evaluate={"every_steps": 4}, checkpoint={"every_steps": 4},
                 scale={"workers": 2}, sharding={"zero": 2}, **sections)
    run_ranks({tmp_path / "plain": given})
    folder = make_run(tmp_path, given)
    with folder.running():
        outputs = train(given, folder, Storage(tmp_path), Records())
    assert losses(folder.path) == losses(tmp_path / "plain")
    ours, theirs = ((run / "export" / "model.safetensors").read_bytes() for run in (folder.path, tmp_path / "plain"))
    assert ours == theirs and outputs["steps"] == 8
    ours, theirs = ([{name: value for name, value in record.items() if name.startswith("val_")} for record in metrics(run)]
                    for run in (folder.path, tmp_path / "plain"))
    assert ours == theirs and sum(map(bool, ours)) == 3


@pytest.mark.parametrize(("world", "group", "marked"), [pytest.param(1, 1, False, marks=pytest.mark.slow), (2, 1, True), (3, 1, False),
                                                        (4, 2, False)])       # one rank: the trial of a sweep in tests/test_quickstart.py
def test_ray_data_deals_the_planned_blocks_to_the_ranks(cluster: str, corpus: Path, world: int, group: int, marked: bool,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distlm.corpus.stream.MAX_CHUNK_STEPS", 1)             # 28 blocks for each rank, of which tasks end in any order
    plan = Plan(str(corpus), 12, world, 35, 0, marked=marked, group=group)
    got: dict[int, list[np.ndarray]] = {}

    def consume(rank: int, shard: "ray.data.DataIterator") -> None:
        got[rank] = list(ordered_steps(shard.iter_batches(batch_size=plan.piece, batch_format="numpy"), plan, rank, 7))

    with plan_streams(plan, 7, 3) as streams:
        threads = [Thread(target=consume, args=pair) for pair in enumerate(streams)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
    for rank in range(world):
        np.testing.assert_array_equal(got[rank], got[rank // group * group])
    got = {rank // group: got[rank] for rank in range(0, world, group)}
    one = Plan(str(corpus), 12, 1, 35, 0, marked=marked)
    if marked:
        marks = [tokens[:, 1] for rank in got for tokens in got[rank]]
        got = {rank: [tokens[:, 0] for tokens in steps] for rank, steps in got.items()}
        assert (np.concatenate(marks) == [START, *[0] * 16]).all(), "every window of this corpus begins with a document"
    for step, expected in enumerate(local_steps(one, 0, 7)):
        np.testing.assert_array_equal(np.concatenate([got[rank][step] for rank in range(world // group)]), expected["tokens"])
    numbers = np.concatenate([tokens[:, 0] * VOCABULARY + tokens[:, 1] for rank in got for tokens in got[rank]])
    assert len(numbers) == 28 * 12 and set(np.bincount(numbers)) <= {6, 7, 8}, "each of 48 windows once an epoch"
