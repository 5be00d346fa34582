"""A rank that has stopped, or hangs, cannot say so: the others find it, and all end with the same error.

    with Watchdog(folder.path, rank, timeout_s) as dog:
        dog.beat(step)                                     # at every point that a rank comes to

A rank that waits longer than the timeout writes all its threads' stacks to its log, and asks the others, by files, how far they are.
Whoever does not answer is stopped; if all do, the one that hangs is behind the others, and has been there for longer than the timeout
too. To evaluate, to save and to export takes as long as it takes: there a rank asks first, and writes the stacks where one does not
answer. Nothing else is written while a run goes well.
"""

import contextlib
import faulthandler
import os
import shutil
import socket
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

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


class Watchdog:
    """Watches this rank from a thread of its own, from the first beat on. All ranks make one at the same time."""

    def __init__(self, run: Path, rank: int, timeout_s: float) -> None:
        self._folder, self._rank, self._timeout_s = run / FOLDER, rank, timeout_s
        if rank == 0:
            shutil.rmtree(self._folder, ignore_errors=True)
        me = {"host": socket.gethostname(), "pid": os.getpid(), "started": psutil.Process().create_time()}
        self._processes: list[Any] = [None] * distributed.get_world_size()
        distributed.all_gather_object(self._processes, me)
        self._at, self._beaten = (0, 0), 0.0
        """(step, micro-batches begun) and when; 0.0 before the first."""
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

    def rest(self, step: int) -> None:
        """This rank begins what follows a step: evaluation, a checkpoint, the export. That has no limit, as long as all ranks answer."""
        self.beat(step, REST)

    def _watch(self) -> None:
        while not self._end.wait(min(LOOK_S, self._timeout_s / 4)):
            at, beaten = self._at, self._beaten
            if self._late() and time.monotonic() > self._quiet_until and self._bark(at, beaten):
                return
            self._answer()

    def _late(self) -> bool:
        """Whether this rank has been where it is for longer than the timeout."""
        return bool(self._beaten) and time.monotonic() - self._beaten > self._timeout_s

    def _answer(self) -> None:
        """Tell who asks how far this rank is."""
        with contextlib.suppress(StorageError, OSError):
            if any(name.startswith("ask-") for name in os.listdir(self._folder)):
                self._tell()
            else:
                self._place(self._rank).unlink(missing_ok=True)

    def _tell(self) -> None:
        if not self._place(self._rank).exists():
            write_json(self._place(self._rank), {"at": self._at, "late": self._at[1] != REST and self._late()})

    def _place(self, rank: int) -> Path:
        return self._folder / f"rank-{rank}.json"

    def _bark(self, at: tuple[int, int], beaten: float) -> bool:
        """Say how far this rank is, hear the others, and end. False where this rank has gone on meanwhile, or nobody hangs."""
        if at[1] != REST:
            self._dump(at)
        answers = self._ask(at)
        gone_on = self._end.is_set() or (self._at, self._beaten) != (at, beaten)
        hanging = None if gone_on else self._hanging(at, answers)
        if hanging is None:
            with contextlib.suppress(OSError):
                for file in (self._folder / f"ask-{self._rank}.json", self._place(self._rank)):
                    file.unlink(missing_ok=True)
            self._quiet_until = time.monotonic() + self._timeout_s             # then it asks again
            return False
        if at[1] == REST:
            self._dump(at)
        with contextlib.suppress(StorageError, OSError):   # on a full disk all end all the same, without a name
            self._judge(at, answers, hanging)
            for process in read_json(self._folder / "verdict.json")["processes"]:
                if process["host"] == socket.gethostname():                    # a stopped process ends at nothing else
                    _kill(process)
        for group in list(distributed_c10d._world.pg_map):
            with contextlib.suppress(Exception):           # what this rank waits for fails now, and its error becomes the verdict
                group.abort()
        if not self._end.wait(30):                         # it waits for something else
            os._exit(1)
        return True

    def _dump(self, at: tuple[int, int]) -> None:
        """Write what each thread is in to this rank's log."""
        part = {0: "its samples", REST: "what follows it"}.get(at[1], f"micro-batch {at[1]}")
        print(f"no progress for {self._timeout_s:g} s in step {at[0] + 1} ({part}); all threads:", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(sys.stderr, all_threads=True)

    def _ask(self, at: tuple[int, int]) -> dict[int, dict[str, Any]]:
        """What each rank answers: how far it is, and whether it is late there. Empty where nobody could be asked."""
        answers: dict[int, dict[str, Any]] = {}
        try:
            for file in self._folder.glob("rank-*.json"):  # what was answered to an earlier question
                file.unlink(missing_ok=True)
            write_json(self._folder / f"ask-{self._rank}.json", at)
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

    def _hanging(self, at: tuple[int, int], answers: dict[int, dict[str, Any]]) -> list[int] | None:
        """The ranks that hang: who does not answer, or else is behind. None where this rank may be waiting for one that is not late."""
        places = {rank: tuple(answer["at"]) for rank, answer in answers.items()}
        silent = [rank for rank in range(len(self._processes)) if rank not in answers]
        if silent and answers:
            return silent
        if at[1] == REST or any(not answer["late"] and places[rank] <= at for rank, answer in answers.items() if rank != self._rank):
            return None
        return [rank for rank, place in places.items() if place < max(places.values())]

    def _judge(self, at: tuple[int, int], answers: dict[int, dict[str, Any]], hanging: list[int]) -> None:
        """Write the verdict, where no other rank has: the first holds for all."""
        mine = self._folder / f"verdict-{self._rank}.json"
        write_json(mine, {"ranks": hanging, "silent": not set(hanging) <= answers.keys(), "rest": at[1] == REST,
                          "step": max([at[0], *(answer["at"][0] for answer in answers.values())]), "timeout_s": self._timeout_s,
                          "processes": [self._processes[rank] for rank in hanging]})
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
    who = " and ".join(f"rank {rank} (process {process['pid']} on {process['host']})"
                       for rank, process in zip(found["ranks"], found["processes"], strict=True))
    what = f"{who} {'does not answer' if found['silent'] else 'is behind the others'}" if who else "no rank is behind the others"
    step, stacks = f"step {found['step'] + 1}", f"the stacks of the others are in {run / 'logs'}"
    if found["rest"]:
        return TrainError(f"what follows {step}, evaluation, checkpoint or export, stood still for {found['timeout_s']:g} s: {what}",
                          where="guard.step_timeout_s", cause="hang", remedy=stacks)
    return TrainError(f"{step} stood still for {found['timeout_s']:g} s: {what}", where="guard.step_timeout_s", cause="hang",
                      remedy=f"{stacks}; a slow micro-batch needs a longer limit")


def _kill(process: dict[str, Any]) -> None:
    with contextlib.suppress(psutil.Error):
        found = psutil.Process(process["pid"])
        if abs(found.create_time() - process["started"]) < 2:
            found.kill()
