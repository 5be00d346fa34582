"""A rank that has stopped, or hangs, cannot say so: the others find it, and all end with the same error.

    with Watchdog(folder.path, rank, timeout_s) as dog:
        dog.beat(step)                                     # at every point that a rank comes to

A rank that waits longer than the timeout writes all its threads' stacks to its log, and asks the others, by files, how far they are.
Whoever does not answer is stopped; if all do, the one that hangs is behind the others, and has been there for longer than the timeout
too. To evaluate, to save and to export takes as long as it takes: there a rank asks first, and writes the stacks where one does not
answer. If all do, an exchange that one does not come to fails after `collective_timeout`: shortly before, those that wait in it ask again,
and who has begun the fewest exchanges hangs, as in a write to storage that never returns. Nothing else is written while a run goes well.
"""

import contextlib
import faulthandler
import math
import os
import shutil
import socket
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import psutil
from torch import distributed
from torch.distributed import distributed_c10d

from distlm.errors import StorageError, TrainError
from distlm.storage import read_json, write_json

FOLDER = "hang"
REST = 1 << 30
"""In place of a micro-batch: what follows a step."""
LOOK_S, ANSWER_S = 5.0, 90.0
"""Seconds between a rank's looks for a question, and for which who asks waits: a network file system may show a file a minute late."""
EXCHANGE_S = 1800
"""Seconds that an exchange may take at the least."""
Phase = Literal["", "evaluation", "save", "export"]
"""Of what follows a step; empty for the rest of it."""


def collective_timeout(step_timeout_s: float) -> int:
    """Seconds that an exchange between ranks may take, saves and exports on rank 0 included: longer than the watchdog waits, which names
    who hangs."""
    return max(EXCHANGE_S, round(2 * step_timeout_s)) if step_timeout_s else 7 * 24 * 3600


class Watchdog:
    """Watches this rank from a thread of its own, from the first beat on. All ranks make one at the same time, when all groups exist: an
    exchange of any may take `collective_timeout` from then on, as DeepSpeed makes its groups with the defaults of their backends."""

    def __init__(self, run: Path, rank: int, timeout_s: float) -> None:
        self._folder, self._rank, self._timeout_s = run / FOLDER, rank, timeout_s
        if rank == 0:
            shutil.rmtree(self._folder, ignore_errors=True)
        me = {"host": socket.gethostname(), "pid": os.getpid(), "started": psutil.Process().create_time()}
        self._processes: list[Any] = [None] * distributed.get_world_size()
        distributed.all_gather_object(self._processes, me)
        for group in list[Any](distributed_c10d._world.pg_map):
            with contextlib.suppress(AttributeError, RuntimeError, ValueError):            # a backend that takes none keeps its own
                distributed_c10d._set_pg_timeout(timedelta(seconds=collective_timeout(timeout_s)), group)
        self._at, self._beaten = (0, 0), 0.0
        """(step, micro-batches begun) and when; 0.0 before the first."""
        self._phase: Phase = ""
        self._patience_s = collective_timeout(timeout_s) - 2 * min(ANSWER_S, timeout_s)
        """Seconds that this rank waits in one exchange before it asks for the last time."""
        self._before = self._exchanges(0)
        self._begun, self._since = 0, time.monotonic()
        """The exchanges that this rank has begun, as it last looked, and since when there was none more."""
        self._quiet_until = 0.0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")

    def __enter__(self) -> "Watchdog":
        if self._timeout_s:
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._end.set()
        if isinstance(error, Exception) and (found := verdict(self._folder.parent)):
            raise found from error                         # a collective failed because a rank was given up

    def beat(self, step: int, micro: int = 0) -> None:
        """This rank begins the `micro`-th micro-batch of a step, counted from 1; 0 stands for the wait for its samples."""
        self._at, self._beaten = (step, micro), time.monotonic()

    def rest(self, step: int, phase: Phase = "") -> None:
        """This rank begins what follows a step, or a phase of that. It has no limit, as long as all ranks answer and none waits in one
        exchange for too long."""
        self._phase = phase
        self.beat(step, REST)

    def _watch(self) -> None:
        while not self._end.wait(min(LOOK_S, self._timeout_s / 4)):
            if (begun := self._exchanges(self._before)) != self._begun:
                self._begun, self._since = begun, time.monotonic()
            at, beaten = self._at, self._beaten
            if self._late() and time.monotonic() > self._quiet_until and self._bark(at, beaten):
                return
            self._answer()

    def _late(self) -> bool:
        """Whether this rank has been where it is for longer than the timeout."""
        return bool(self._beaten) and time.monotonic() - self._beaten > self._timeout_s

    def _stalled(self) -> bool:
        """Whether this rank has begun no exchange for so long that one which it waits in would fail soon."""
        return time.monotonic() - max(self._since, self._beaten) > self._patience_s

    @staticmethod
    def _exchanges(before: int) -> int:
        """How many exchanges this rank has begun since there were `before`, over all groups. All ranks make as many in the same order, in
        groups of their own: the others may be at different ones where they wait, and who keeps them waiting has begun the fewest."""
        count, groups = 0, list[Any](distributed_c10d._world.pg_map)
        for group in groups:
            with contextlib.suppress(RuntimeError):        # a backend that does not count
                count += group._get_sequence_number_for_group()
        return count - before

    def _answer(self) -> None:
        """Tell who asks how far this rank is."""
        with contextlib.suppress(StorageError, OSError):
            if any(name.startswith("ask-") for name in os.listdir(self._folder)):
                self._tell()
            else:
                self._place(self._rank).unlink(missing_ok=True)

    def _tell(self) -> None:
        """Write how far this rank is, and first its stacks, where another asks for the last time."""
        if self._place(self._rank).exists():
            return
        others = [file for file in self._folder.glob("ask-*.json") if file.name != f"ask-{self._rank}.json"]
        if any(read_json(file)["stalled"] for file in others):
            self._dump(self._at, time.monotonic() - self._beaten)
        resting = self._at[1] == REST
        write_json(self._place(self._rank), {"at": self._at, "late": not resting and self._late(), "phase": self._phase if resting else "",
                                             "exchanges": self._exchanges(self._before)})

    def _place(self, rank: int) -> Path:
        return self._folder / f"rank-{rank}.json"

    def _bark(self, at: tuple[int, int], beaten: float) -> bool:
        """Say how far this rank is, hear the others, and end. False where this rank has gone on meanwhile, or nobody hangs."""
        stalled, begun = self._stalled(), self._begun
        if at[1] != REST:
            self._dump(at, self._timeout_s)
        answers = self._ask(at, stalled)
        gone_on = self._end.is_set() or (self._at, self._beaten) != (at, beaten)
        stalled = stalled and begun == self._exchanges(self._before)
        hanging = None if gone_on else self._hanging(at, answers, stalled)
        if hanging is None:
            with contextlib.suppress(OSError):
                for file in (self._folder / f"ask-{self._rank}.json", self._place(self._rank)):
                    file.unlink(missing_ok=True)
            now, last = time.monotonic(), max(self._since, self._beaten) + self._patience_s
            self._quiet_until = min(now + self._timeout_s, last if last > now else math.inf)   # then it asks again
            return False
        seconds = self._patience_s if stalled else self._timeout_s
        if at[1] == REST:
            self._dump(at, seconds)
        with contextlib.suppress(StorageError, OSError):   # on a full disk all end all the same, without a name
            self._judge(at, answers, hanging, seconds)
            for process in read_json(self._folder / "verdict.json")["processes"]:
                if process["host"] == socket.gethostname():                    # a stopped process ends at nothing else
                    _kill(process)
        for group in list(distributed_c10d._world.pg_map):
            with contextlib.suppress(Exception):           # what this rank waits for fails now, and its error becomes the verdict
                group.abort()
        if not self._end.wait(30):                         # it waits for something else
            os._exit(1)
        return True

    def _dump(self, at: tuple[int, int], seconds: float) -> None:
        """Write what each thread is in to this rank's log."""
        part = {0: "its samples", REST: self._phase or "what follows it"}.get(at[1], f"micro-batch {at[1]}")
        print(f"no progress for {seconds:.3g} s in step {at[0] + 1} ({part}); all threads:", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(sys.stderr, all_threads=True)

    def _ask(self, at: tuple[int, int], stalled: bool) -> dict[int, dict[str, Any]]:
        """What each rank answers: how far it is, and whether it is late there. Empty where nobody could be asked."""
        answers: dict[int, dict[str, Any]] = {}
        try:
            for file in self._folder.glob("rank-*.json"):  # what was answered to an earlier question
                file.unlink(missing_ok=True)
            write_json(self._folder / f"ask-{self._rank}.json", {"at": at, "stalled": stalled})
        except (StorageError, OSError):
            return answers
        deadline = time.monotonic() + min(ANSWER_S, self._timeout_s)
        while len(answers) < len(self._processes) and time.monotonic() < deadline and not self._end.wait(0.2):
            with contextlib.suppress(StorageError, OSError):
                self._tell()                               # again, where another has asked meanwhile
                for rank in range(len(self._processes)):
                    if rank not in answers and self._place(rank).exists():
                        answers[rank] = read_json(self._place(rank))
        return answers

    def _hanging(self, at: tuple[int, int], answers: dict[int, dict[str, Any]], stalled: bool) -> list[int] | None:
        """The ranks that hang: who does not answer, or else is behind. None where this rank may be waiting for one that is not late."""
        places = {rank: tuple(answer["at"]) for rank, answer in answers.items()}
        silent = [rank for rank in range(len(self._processes)) if rank not in answers]
        if silent and answers:
            return silent
        if stalled and answers:
            begun = {rank: answer["exchanges"] for rank, answer in answers.items()}
            if begun[self._rank] > (least := min(begun.values())):
                return [rank for rank, count in begun.items() if count == least]
        if at[1] == REST or any(not answer["late"] and places[rank] <= at for rank, answer in answers.items() if rank != self._rank):
            return None
        return [rank for rank, place in places.items() if place < max(places.values())]

    def _judge(self, at: tuple[int, int], answers: dict[int, dict[str, Any]], hanging: list[int], seconds: float) -> None:
        """Write the verdict, where no other rank has: the first holds for all."""
        mine = self._folder / f"verdict-{self._rank}.json"
        write_json(mine, {"ranks": hanging, "silent": not set(hanging) <= answers.keys(), "rest": at[1] == REST, "phase": self._phase,
                          "phases": [answers[rank]["phase"] if rank in answers else "" for rank in hanging],
                          "step": max([at[0], *(answer["at"][0] for answer in answers.values())]), "seconds": seconds,
                          "exchange_s": collective_timeout(self._timeout_s), "processes": [self._processes[rank] for rank in hanging]})
        try:
            os.link(mine, self._folder / "verdict.json")
        except FileExistsError:
            pass
        except OSError:                                    # no hard links here: the last one holds, which says nearly the same
            mine.replace(self._folder / "verdict.json")


def verdict(run: Path) -> TrainError | None:
    """What the ranks of a run have found, where they have."""
    try:
        found = read_json(run / FOLDER / "verdict.json")
    except StorageError:
        return None
    who = " and ".join(f"rank {rank} (process {process['pid']} on {process['host']}{f', in its {phase}' if phase else ''})"
                       for rank, process, phase in zip(found["ranks"], found["processes"], found["phases"], strict=True))
    what = f"{who} {'does not answer' if found['silent'] else 'is behind the others'}" if who else "no rank is behind the others"
    step = f"step {found['step'] + 1}"
    stacks = f"the stacks of {'the others' if found['silent'] else 'all ranks'} are in {run / 'logs'}"
    slow = next(filter(None, found["phases"]), "rank" if found["rest"] else "")
    if slow and not found["silent"]:
        enough = found["exchange_s"]
        remedy = (f"{stacks}; a slow {slow} needs a longer limit: ranks wait for each other for twice that, and half an hour at least, so "
                  f"{enough} gives it {2 * enough / 60:.3g} minutes")
    else:
        remedy = stacks if found["rest"] else f"{stacks}; a slow micro-batch needs a longer limit"
    if found["rest"]:
        part = f"the {found['phase']} after" if found["phase"] else "what follows"
        return TrainError(f"{part} {step} stood still for {found['seconds']:g} s: {what}", where="guard.step_timeout_s", cause="hang",
                          remedy=remedy)
    return TrainError(f"{step} stood still for {found['seconds']:g} s: {what}", where="guard.step_timeout_s", cause="hang",
                      remedy=remedy)


def _kill(process: dict[str, Any]) -> None:
    with contextlib.suppress(psutil.Error):
        found = psutil.Process(process["pid"])
        if abs(found.create_time() - process["started"]) < 2:
            found.kill()
