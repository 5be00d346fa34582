"""A rank that has stopped, or hangs, cannot say so: the others find it, and all end with the same error.

    with Watchdog(folder.path, rank, timeout_s) as dog:
        dog.beat(step)                                     # at every point that a rank comes to

A rank that waits longer than the timeout writes all its threads' stacks to its log, and to a file how far it is. Whoever writes none is
stopped; if all do, the one that hangs is behind the others. Nothing is written while a run goes well.
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


class Watchdog:
    """Watches this rank from a thread of its own, between the first beat and `rest`. All ranks make one at the same time."""

    def __init__(self, run: Path, rank: int, timeout_s: float) -> None:
        self._folder, self._rank, self._timeout_s = run / FOLDER, rank, timeout_s
        if rank == 0:
            shutil.rmtree(self._folder, ignore_errors=True)
        me = {"host": socket.gethostname(), "pid": os.getpid(), "started": psutil.Process().create_time()}
        self._processes: list[Any] = [None] * distributed.get_world_size()
        distributed.all_gather_object(self._processes, me)
        self._at, self._beaten = (0, 0), 0.0
        """(step, micro-batches begun) and when; 0.0 while nothing is watched."""
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")

    def __enter__(self) -> "Watchdog":
        if self._timeout_s:
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._end.set()
        if isinstance(error, RuntimeError) and (found := verdict(self._folder.parent)):
            raise found from error                         # a collective failed because a rank was given up

    def beat(self, step: int, micro: int = 0) -> None:
        """This rank begins the `micro`-th micro-batch of a step, counted from 1; 0 stands for the wait for its samples."""
        self._at, self._beaten = (step, micro), time.monotonic()

    def rest(self) -> None:
        """What comes now has no limit of its own: evaluation, a checkpoint, the export."""
        self._beaten = 0.0

    def _watch(self) -> None:
        while not self._end.wait(min(1.0, self._timeout_s / 4)):
            at, beaten = self._at, self._beaten
            if beaten and time.monotonic() - beaten > self._timeout_s and self._bark(at, beaten):
                return

    def _bark(self, at: tuple[int, int], beaten: float) -> bool:
        """Say how far this rank is, hear the others, and end. False where this rank has gone on meanwhile."""
        part = f"micro-batch {at[1]}" if at[1] else "its samples"
        print(f"no progress for {self._timeout_s:g} s in step {at[0] + 1} ({part}); all threads:", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(sys.stderr, all_threads=True)
        with contextlib.suppress(StorageError):
            write_json(self._folder / f"rank-{self._rank}.json", at)
        deadline = time.monotonic() + min(30.0, self._timeout_s)
        ranks = range(len(self._processes))
        while time.monotonic() < deadline and not all((self._folder / f"rank-{rank}.json").exists() for rank in ranks):
            if self._end.wait(0.2):
                break
        if self._end.is_set() or (self._at, self._beaten) != (at, beaten):
            (self._folder / f"rank-{self._rank}.json").unlink(missing_ok=True)
            return False
        with contextlib.suppress(StorageError, OSError):   # on a full disk all end all the same, without a name
            self._judge()
            for process in read_json(self._folder / "verdict.json")["processes"]:
                if process["host"] == socket.gethostname():                    # a stopped process ends at nothing else
                    _kill(process)
        for group in list(distributed_c10d._world.pg_map):
            with contextlib.suppress(Exception):           # what this rank waits for fails now, and its error becomes the verdict
                group.abort()
        if not self._end.wait(30):                         # it waits for something else
            os._exit(1)
        return True

    def _judge(self) -> None:
        """Write the verdict, where no other rank has: the first holds for all."""
        places = {}
        for rank in range(len(self._processes)):
            with contextlib.suppress(StorageError):
                places[rank] = tuple(read_json(self._folder / f"rank-{rank}.json"))
        silent = [rank for rank in range(len(self._processes)) if rank not in places]
        last = max(places.values(), default=self._at)
        hanging = silent or [rank for rank, at in places.items() if at < last]
        mine = self._folder / f"verdict-{self._rank}.json"
        write_json(mine, {"ranks": hanging, "silent": bool(silent), "step": last[0], "timeout_s": self._timeout_s,
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
    return TrainError(f"step {found['step'] + 1} stood still for {found['timeout_s']:g} s: {what}", where="guard.step_timeout_s",
                      cause="hang", remedy=f"the stacks of the others are in {run / 'logs'}; a slow micro-batch needs a longer limit")


def _kill(process: dict[str, Any]) -> None:
    with contextlib.suppress(psutil.Error):
        found = psutil.Process(process["pid"])
        if abs(found.create_time() - process["started"]) < 2:
            found.kill()
