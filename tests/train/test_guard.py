"""What is not finite, or far from usual, is found before it does harm, the same on every rank."""

import itertools
import json
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest

from distlm.corpus.stream import local_steps, ordered_steps
from distlm.errors import TrainError
from distlm.runs import RunFolder
from distlm.spec import TrainSpec
from distlm.spec.train import Spike
from distlm.storage import Storage
from distlm.train import checkpoint
from distlm.train.guard import SpikeGuard
from distlm.train.preempt import abandoned
from distlm.train.recipe import make_recipe
from distlm.train.watchdog import REST, Watchdog, verdict
from tests.train.ranks import VOCABULARY, losses, make_corpus, metrics, run_ranks, spec

TWO = {"workers": 2}
STEP, RANK, ROW = 3, 1, 4
"""Where the poisoned window is read first: the last of three micro-batches, samples 46 and 47."""
SOME = ("fp32-0", "bf16-2", "fp32-3")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus") / "c")


def windows_of(given: TrainSpec, rank: int) -> list[list[int]]:
    """The numbers of the windows that a rank reads, by step."""
    plan = make_recipe(given, Storage(Path())).plan()
    return [[int(row[0]) * VOCABULARY + int(row[1]) for row in rows] for rows in ordered_steps(local_steps(plan, rank, 0), plan, rank, 0)]


@pytest.mark.parametrize("layouts", [SOME, pytest.param(("fp32-1", "fp32-2", "bf16-0", "bf16-1", "bf16-3"), marks=pytest.mark.slow)])
@pytest.mark.parametrize("gradient", [False, True])
def test_what_is_not_finite_ends_the_run_before_the_update_and_is_found(corpus: Path, tmp_path: Path, gradient: bool,
                                                                         layouts: tuple[str, ...]) -> None:
    dropout = {"model": {"config": {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
                                    "num_attention_heads": 4}}, "regularization": {"dropout": 0.1}}
    runs = {tmp_path / name: spec(corpus, scale=TWO, precision=name[:4], sharding={"zero": int(name[5:])}, **dropout) for name in layouts}
    window = windows_of(next(iter(runs.values())), RANK)[STEP][ROW]
    output = run_ranks(runs, poison={"window": window, "module": "model.layers.1.mlp.down_proj", "gradient": gradient})
    ends = re.findall(r"rank (\d) ended: (.*) \[(.*)\], weights (\w+)", output)
    assert [(rank, cause, weights) for rank, _, cause, weights in ends] == [
        (rank, "nonfinite_loss", "kept") for rank in "01" for _ in runs], output[-4000:]
    what = (r"the gradient's norm is (nan|inf) at step 4 on rank 1, first in the gradient of model\.layers\.1\.mlp\.down_proj\.weight, "
            if gradient else r"the loss is nan at step 4 on rank 1, first in the output of model\.layers\.1\.mlp\.down_proj, ")
    for _, error, *_ in ends:
        assert re.match(what + "samples 46 to 47", error), error
    assert [error for rank, error, *_ in ends if rank == "0"] == [error for rank, error, *_ in ends if rank == "1"]
    assert not list(tmp_path.glob("*/checkpoints")) and not list(tmp_path.glob("*/export"))


def test_a_spike_is_what_is_far_above_the_median_of_a_full_window() -> None:
    guard = SpikeGuard(Spike(window=8, factor=3), [])
    usual = [2.0, 2.1, 1.9, 2.0, 2.2, 1.8, 2.0, 2.1]
    assert [guard.limit(loss) for loss in [9.0, *usual]] == [None] * 9, "the window was not full"
    assert guard.limit(2.4) is None
    assert guard.limit(2.6) == pytest.approx(2.05 + 3 * 1.4826 * 0.1)
    assert [guard.limit(5.0) is None for _ in range(6)] == [False] * 3 + [True] * 3, "a level that stays becomes the usual one"
    assert len(guard.losses) == 8
    assert SpikeGuard(None, []).limit(1e9) is None
    equal = SpikeGuard(Spike(window=8, factor=3), [2.0] * 8)
    assert equal.limit(2.001) is None and equal.limit(2.1) is not None


@pytest.mark.slow
def test_a_spike_is_skipped_or_ends_the_run_and_a_resumed_run_decides_the_same(corpus: Path, tmp_path: Path) -> None:
    def case(action: str, zero: int, precision: str = "fp32") -> TrainSpec:
        return spec(corpus, scale=TWO, precision=precision, sharding={"zero": zero}, checkpoint={"every_steps": 5, "keep": 4},
                    guard={"spike": {"window": 8, "factor": 8, "action": action}})

    skipping = {tmp_path / "skip-0": case("skip", 0), tmp_path / "skip-2": case("skip", 2), tmp_path / "skip-b3": case("skip", 3, "bf16")}
    runs = {**skipping, tmp_path / "warn": case("warn", 0), tmp_path / "stop": case("stop", 0)}
    window = windows_of(runs[tmp_path / "stop"], RANK)[STEP][ROW]
    poison = {"window": window, "module": "model.norm", "factor": 1000.0}
    read = zip(*(windows_of(runs[tmp_path / "stop"], rank) for rank in (0, 1)), strict=True)
    steps = [i + 1 for i, (one, other) in enumerate(read) if i >= 8 and window in one + other]       # nothing is judged before the ninth
    assert len(steps) == 3, "once in each epoch of four steps"
    output = run_ranks(runs, poison=poison)
    spikes = re.findall(r"rank (\d) spike at step (\d+): weights (\w+)", output)
    assert spikes == [(rank, str(step), kept) for rank in "01" for kept in ("kept", "kept", "kept", "changed") for step in steps]
    ends = re.findall(r"rank \d ended: (.*) \[(.*)\], weights (\w+)", output)
    assert len(ends) == 2 and ends[0] == ends[1] and ends[0][1:] == ("loss_spike", "kept")
    first = 12 * (steps[0] - 1)
    assert re.match(rf"guard\.spike: the loss is [\d.e+]+ at step {steps[0]}, samples {first} to {first + 11}, and at most [\d.]+ was",
                    ends[0][0])
    assert not (tmp_path / "stop" / "export").exists()
    np.testing.assert_allclose(losses(tmp_path / "skip-0"), losses(tmp_path / "skip-2"), rtol=1e-5)
    for run in skipping:
        marked = {record["step"]: record.get("skipped", False) for record in metrics(run) if "spike_above" in record}
        assert marked == dict.fromkeys(steps, True)
        notes = [event for event in RunFolder(run).events() if event["cause"] == "loss_spike"]
        assert [note["step"] for note in notes] == steps and "no update was made" in notes[0]["message"]
    before = {run: (losses(run), (run / "export" / "model.safetensors").read_bytes()) for run in skipping}
    assert steps[0] <= 15, "it is judged by losses from before the checkpoint"
    for run in skipping:
        for step in (15, 20):
            shutil.rmtree(run / "checkpoints" / f"step-{step:06d}")
    run_ranks(skipping, poison=poison)
    assert before == {run: (losses(run), (run / "export" / "model.safetensors").read_bytes()) for run in skipping}


@pytest.mark.slow
def test_a_rank_that_is_stopped_is_named_and_ended_and_the_others_leave_their_stacks(corpus: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    output = run_ranks({run: spec(corpus, scale=TWO, guard={"step_timeout_s": 15})}, stop_before_step=7)
    what = r"TrainError: guard\.step_timeout_s: step 8 stood still for 15 s: rank 1 \(process (\d+) on .*\) (.*)"
    [[pid, text]] = set(re.findall(what, output))
    assert text == f"does not answer; the stacks of the others are in {run / 'logs'}; a slow micro-batch needs a longer limit"
    assert not psutil.pid_exists(int(pid))
    _, stacks = output.split("no progress for 15 s in step 8 (micro-batch 3); all threads:\n")
    assert re.search(r"loop\.py.* in train_step", stacks), "what it waits in is among them"
    assert (found := verdict(run)) and found.cause == "hang" and text in str(found)
    assert len(losses(run)) == 7 and not (run / "export").exists()


@pytest.mark.slow
def test_a_rank_that_is_slow_costs_nothing_but_time(corpus: Path, tmp_path: Path) -> None:
    """All of its delays are longer than a step may stand still, each is shorter."""
    given = spec(corpus, scale=TWO, duration={"steps": 12}, guard={"step_timeout_s": 2})
    quick, slow = tmp_path / "quick", tmp_path / "slow"
    run_ranks({quick: given})
    output = run_ranks({slow: given}, slow_s=0.5)
    assert losses(slow) == losses(quick) and "no progress" not in output and verdict(slow) is None
    late = [record["forward_s"] + record["backward_s"] for record in metrics(slow) if "loss" in record]
    assert max(late) < 2, "rank 0 waits for the slow one where gradients meet"


@pytest.mark.slow
@pytest.mark.parametrize(("place", "step"), [("measure", 10), ("save", 10), ("export", 20)])
def test_a_rank_that_is_stopped_between_steps_is_named_and_ended_too(corpus: Path, tmp_path: Path, place: str, step: int) -> None:
    run = tmp_path / "run"
    given = spec(corpus, scale=TWO, sharding={"zero": 3}, guard={"step_timeout_s": 8},
                 checkpoint={"every_steps": 10, "asynchronous": False})
    output = run_ranks({run: given}, inside=(signal.SIGSTOP, place, step))
    phase = "evaluation" if place == "measure" else place
    what = (rf"TrainError: guard\.step_timeout_s: the {phase} after step {step} stood still for 8 s: "
            r"rank 1 \(process (\d+) on .*\) does not answer; the stacks of the others are in ")
    [pid] = set(re.findall(what, output))
    assert not psutil.pid_exists(int(pid))
    assert (found := verdict(run)) and found.cause == "hang"
    assert len(losses(run)) == (9 if place == "measure" else step)
    assert [path.name for path in checkpoint.committed(run)] == {"measure": [], "save": [], "export": ["step-000010", "step-000020"]}[place]


@pytest.mark.parametrize("beside", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_rank_whose_write_to_storage_never_returns_is_named_with_the_save(corpus: Path, tmp_path: Path, beside: bool) -> None:
    """Its process answers all the while. Beside the steps it is found by the next save, which waits for it."""
    run = tmp_path / "run"
    given = spec(corpus, scale=TWO, guard={"step_timeout_s": 8}, checkpoint={"every_steps": 5, "asynchronous": beside})
    output = run_ranks({run: given}, block_save=5)
    step = 10 if beside else 5
    what = (rf"TrainError: guard\.step_timeout_s: the save after step {step} stood still for 8 s: "
            r"rank 1 \(process (\d+) on .*, in its save\) is behind the others; the stacks of all ranks are in ")
    [pid] = set(re.findall(what, output))
    assert not psutil.pid_exists(int(pid))
    assert (found := verdict(run)) and found.cause == "hang"
    others, mine = output.split("process of rank 1\n")
    stacks = rf"no progress for [\d.]+ s in step {step} \(save\); all threads:\n"
    assert re.search(stacks, mine) and "in entered" in mine and re.search(stacks, others) and "distributed_c10d.py" in others
    assert len(losses(run)) == step and not checkpoint.committed(run) and not (run / "export").exists()


@pytest.fixture(scope="module")
def told(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """What `faults.watch_rests` prints of a run that commits beside its steps."""
    given = spec(corpus, scale=TWO, duration={"steps": 8}, evaluate={"every_steps": 4}, checkpoint={"every_steps": 4},
                 guard={"step_timeout_s": 1200})
    return run_ranks({tmp_path_factory.mktemp("told") / "run": given}, slow_s=0.3, rests=True)


def test_what_follows_a_step_is_told_by_its_phase(told: str) -> None:
    calls = re.findall(r"rank 0: (\w+) in '(\w*)'", told)
    assert set(calls) == {("lacks_evaluation", ""), ("measure", "evaluation"), ("start", ""), ("step", ""), ("save", "save"),
                          ("commit", "save")}
    assert (("step", ""), ("commit", "save")) in itertools.pairwise(calls), "one is committed beside the steps"


def test_an_exchange_may_take_as_long_in_every_group_of_the_engine(told: str) -> None:
    found = re.findall(r"rank (\d): (\d+) groups, (.*)", told)
    assert sorted(rank for rank, *_ in found) == ["0", "1"]
    assert all(int(number) > 1 and seconds == "[2400.0]" for _, number, seconds in found), found


def test_ranks_on_cpu_are_forked_with_what_they_import(told: str) -> None:
    """In the server an import that fails is silent."""
    assert re.findall(r"rank (\d): preloaded (\w+)", told) == [("0", "True"), ("1", "True")]


def watchdogs(run: Path, *places: tuple[int, int], timeout_s: float = 0.5) -> list[Watchdog]:
    """One of each rank, at the given places, on hosts of their own: nobody is killed. None runs."""
    dogs = [object.__new__(Watchdog) for _ in places]
    for rank, (dog, at) in enumerate(zip(dogs, places, strict=True)):
        dog._folder, dog._rank, dog._timeout_s = run / "hang", rank, timeout_s
        dog._at, dog._beaten, dog._quiet_until = at, time.monotonic(), 0.0
        dog._phase, dog._patience_s, dog._before, dog._begun, dog._since = "", 3600.0, 0, 0, 0.0
        dog._processes, dog._end = [{"host": f"host-{i}", "pid": 100 + i} for i in range(len(places))], threading.Event()
        dog._thread = threading.Thread(target=dog._watch, daemon=True)
    return dogs


def judged(run: Path, dogs: list[Watchdog], alive: tuple[int, ...], until: Callable[[], bool] = lambda: False) -> TrainError | None:
    """What the dogs of the ranks that are alive find, None where `until` comes first."""
    for rank in alive:
        dogs[rank]._thread.start()
    deadline = time.monotonic() + 20
    while (found := verdict(run)) is None and not until():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    for rank in alive:
        dogs[rank]._end.set()
        dogs[rank]._thread.join(30)
    return found


def test_what_hangs_while_its_threads_live_is_behind_the_others(tmp_path: Path) -> None:
    """As a rank that waits for its samples for ever: it says how far it is, and the others are further."""
    dogs = watchdogs(tmp_path, (7, 3), (7, 0), (7, 3))
    found = judged(tmp_path, dogs, (0, 1, 2))
    assert "step 8 stood still for 0.5 s: rank 1 (process 101 on host-1) is behind the others" in str(found)
    dogs[0]._judge((7, 3), {0: {"at": (7, 3), "late": True}}, [2], 0.5)
    assert "rank 1 (" in str(verdict(tmp_path)), "the first verdict holds"


def test_a_rank_that_comes_later_has_as_long_as_the_others(tmp_path: Path) -> None:
    """They wait for it at the end of a micro-batch, and it has begun that one when they were late already."""
    dogs = watchdogs(tmp_path, (7, 3), (7, 3))
    dogs[1]._beaten += 3600
    assert judged(tmp_path, dogs, (0, 1), lambda: dogs[0]._quiet_until > 0) is None, "one is late, and has heard that the other is not"
    dogs = watchdogs(tmp_path, (7, 3), (7, 3))
    dogs[0]._beaten -= 0.3
    assert "step 8 stood still for 0.5 s: no rank is behind the others" in str(judged(tmp_path, dogs, (0, 1)))


@pytest.mark.parametrize("others", [[(7, REST), (7, REST)], [(8, 2), (8, 2)]])
def test_an_evaluation_a_save_or_an_export_may_take_long_as_long_as_all_answer(tmp_path: Path, others: list[tuple[int, int]],
                                                                               capfd: pytest.CaptureFixture[str]) -> None:
    """Rank 0 is at one, and the others wait for it there, or in the step that comes next."""
    dogs = watchdogs(tmp_path / "alive", (7, REST), *others)
    heard: list[set[float]] = [set(), set(), set()]

    def twice() -> bool:
        for dog, times in zip(dogs, heard, strict=True):
            times.add(dog._quiet_until)
        return all(len(times - {0.0}) >= 2 for times in heard)

    assert judged(tmp_path / "alive", dogs, (0, 1, 2), twice) is None, "each has asked, and asked again"
    assert "(what follows it)" not in capfd.readouterr().err, "while all answer there is nothing to write"
    assert not list((tmp_path / "alive" / "hang").glob("verdict*"))
    found = judged(tmp_path / "stopped", watchdogs(tmp_path / "stopped", (7, REST), *others), (1, 2))
    what = "what follows step 8" if others[0] == (7, REST) else "step 9"
    assert f"{what} stood still for 0.5 s: rank 0 (process 100 on host-0) does not answer" in str(found)
    place = "step 8 (what follows it)" if others[0] == (7, REST) else "step 9 (micro-batch 2)"
    assert f"no progress for 0.5 s in {place}; all threads:\n" in capfd.readouterr().err


@pytest.mark.parametrize("place", [(7, REST), (8, 2)])
def test_who_does_not_come_to_an_exchange_that_another_has_waited_in_for_long_is_behind(tmp_path: Path, place: tuple[int, int]) -> None:
    """Ranks 0 and 2 wait in their fifth exchange, and rank 1 has begun four."""
    def dogs(run: Path, patience_s: float) -> list[Watchdog]:
        made = watchdogs(run, place, (7, REST), place, timeout_s=2)       # for which answers are waited for too, on a machine that is busy
        for dog, begun in zip(made, (5, 4, 5), strict=True):
            dog._exchanges = lambda before, begun=begun: begun  # type: ignore[method-assign, misc]
            dog._begun, dog._phase = begun, "save"
            dog._patience_s = patience_s if begun == 5 else 0.1            # rank 1 has been busy for long, which is no fault yet
        return made

    found = judged(tmp_path / "long", dogs(tmp_path / "long", 1.0), (0, 1, 2))
    what = "the save after step 8" if place == (7, REST) else "step 9"
    assert f"{what} stood still for 1 s: rank 1 (process 101 on host-1, in its save) is behind the others; the stacks of all" in str(found)
    short = dogs(tmp_path / "short", 3600.0)
    assert judged(tmp_path / "short", short, (0, 1, 2), lambda: all(dog._quiet_until for dog in short)) is None, "they have just begun"


def test_where_groups_wait_for_groups_only_who_has_begun_the_fewest_exchanges_is_behind(tmp_path: Path) -> None:
    """Rank 1 of two pairs never comes to an exchange with rank 0, and so rank 0 not to that with the other pair."""
    for asked in (0, 2, 3):
        dogs = watchdogs(tmp_path / str(asked), *[(7, REST)] * 4)
        answers = {rank: {"at": (7, REST), "late": False, "exchanges": count} for rank, count in enumerate((11, 10, 12, 12))}
        assert dogs[asked]._hanging((7, REST), answers, stalled=True) == [1]
        assert dogs[1]._hanging((7, REST), answers, stalled=True) is None


def test_what_is_slow_between_steps_is_told_a_limit_that_would_do(tmp_path: Path) -> None:
    """Rank 0 exports for longer than the others may wait for it; they rest, or are in a step beside a save."""
    for place, phase in (((7, REST), "export"), ((8, 2), "save")):
        [_, dog] = watchdogs(tmp_path / phase, (7, REST), place, timeout_s=1200)
        dog._folder.mkdir(parents=True)
        dog._judge(place, {0: {"at": (7, REST), "late": False, "phase": phase}, 1: {"at": place, "late": True, "phase": ""}}, [0], 2220)
        assert str(verdict(tmp_path / phase)).endswith(
            f"; a slow {phase} needs a longer limit: ranks wait for each other for twice that, and half an hour at least, so 2400 gives it "
            "80 minutes")


def test_a_rank_that_rests_or_ends_while_it_hears_the_others_harms_none(tmp_path: Path) -> None:
    for ended in (False, True):
        [dog, _] = watchdogs(tmp_path, (7, 3), (7, 3), timeout_s=0.3)
        dog._beaten = 5.0
        later = threading.Timer(0.1, dog._end.set if ended else dog.rest, () if ended else (7,))
        later.start()
        assert not dog._bark((7, 3), 5.0)
        assert verdict(tmp_path) is None and not list((tmp_path / "hang").iterdir())


def test_ranks_whose_driver_is_gone_or_replaced_do_not_save(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.event("running")
    assert folder.launches() == 1 and not abandoned(folder, 1)
    folder.event("running")
    assert abandoned(folder, 1) and not abandoned(folder, 2)
    owner = json.loads((tmp_path / "events.jsonl").read_text().splitlines()[-1])["owner"]
    (tmp_path / "events.jsonl").write_text(json.dumps({**folder.events()[0], "owner": {**owner, "pid": 2**22 + 1}}) + "\n")
    assert folder.state() == ("failed", "head_lost") and abandoned(folder, 1)
