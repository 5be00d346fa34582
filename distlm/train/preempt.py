"""What takes a machine back: the ranks agree on it in a step and around an evaluation, save, and end.

    install()                                              # on the main thread of every rank's process
    request = Request(folder, rank, device)
    request()                                              # whether this rank has been asked to end
    request.of_any()                                       # whether any has
    raise request.ended(step, grace_s)                     # where all have saved

Schedulers send SIGTERM, to a rank or to the driver, and Ray drains a node (`drain.py`); the driver passes both on by files.
"""

import contextlib
import signal
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from distlm.errors import TrainError
from distlm.runs import RunFolder
from distlm.storage import read_json

if TYPE_CHECKING:
    import torch

    from distlm.progress import Progress

_told: list[float] = []
"""When this process was sent SIGTERM."""
FLAG = "preempt"
"""The file in a run's folder by which the driver passes on its own SIGTERM; rank 0 looks for it."""
DRAIN = "drain.json"
"""The one by which it passes on that Ray drains a node of a rank: `what`, `time` and `left_s`, as a Notice has them."""
RECENT = 20
"""Steps of which the longest is taken for one that may come."""


def install() -> None:
    """Take SIGTERM as a request. Only the main thread may set a handler, and it serves the whole process."""
    _told.clear()
    signal.signal(signal.SIGTERM, lambda *_: _told.append(time.time()))


@dataclass(frozen=True)
class Notice:
    """What a rank has been asked to end by."""

    what: str
    time: float
    """Since the epoch."""
    left_s: float | None = None
    """Seconds from then to the end of the machine, where it is said."""


class Request:
    """To end, of a rank: by its own SIGTERM, and of rank 0 by what the driver passes on too."""

    def __init__(self, folder: RunFolder, rank: int, device: "torch.device") -> None:
        self._folder, self._rank, self._device, self._launches = folder, rank, device, folder.launches()
        self._notice: Notice | None = None

    def __call__(self) -> bool:
        """Raises TrainError where nobody waits for this rank any more."""
        self._notice = self._notice or self._look()
        if self._notice and abandoned(self._folder, self._launches):
            raise TrainError("the driver of this run has gone", cause="head_lost")
        return self._notice is not None

    def _look(self) -> Notice | None:
        flag, drain = (self._folder.path / name for name in (FLAG, DRAIN))
        if _told:
            return Notice("a worker was sent SIGTERM", _told[0])
        if self._rank == 0 and flag.exists():
            return Notice("the driver was sent SIGTERM", flag.stat().st_mtime)
        return Notice(**read_json(drain)) if self._rank == 0 and drain.exists() else None

    def of_any(self) -> bool:
        """All ranks take part."""
        import torch
        from torch import distributed

        asked = torch.tensor(float(self()), device=self._device)
        distributed.all_reduce(asked)
        return bool(asked)

    def ended(self, done: int, grace_s: float | None) -> TrainError:
        """What all ranks end with, where one at least was asked to and the state after `done` steps is committed: by what it was asked, how
        long before that, and how long there was, if that is known. All ranks take part."""
        from torch import distributed

        mine = self._notice
        own = mine and (time.time() - mine.time, mine.what, mine.left_s)
        everyone: list[Any] = [None] * distributed.get_world_size()
        with contextlib.suppress(RuntimeError):            # a machine may have gone already: the state is saved all the same
            distributed.all_gather_object(everyone, own)
        told = [one for one in (*everyone, own) if one]
        if not told:
            return TrainError(f"another worker was asked to end, and the state after step {done} is saved", cause="preempted",
                              remedy="go on with --resume")
        seconds, what, left_s = max(told, key=lambda one: one[0])
        limit = grace_s if left_s is None else left_s
        return TrainError(f"{what}, and the state after step {done} is saved, {max(seconds, 0):.4g} s later"
                          + ("" if limit is None else f", where there were {limit:.4g} s"), cause="preempted", remedy="go on with --resume")


def abandoned(folder: RunFolder, launches: int) -> bool:
    """Whether the driver of this rank has gone, or another one has started ranks since these, the `launches`-th: Ray's SIGTERM is then the
    end, and not a request to save beside those that go on."""
    return folder.state() == ("failed", "head_lost") or folder.launches() != launches


class GraceCheck:
    """Takes a launch's records of metrics.jsonl, and says once of a run if what a rank may be in, a step or an evaluation, and the
    checkpoint after it take longer than the grace period. The first step of a launch, which loads and compiles, is left out."""

    def __init__(self, folder: RunFolder, progress: "Progress", grace_s: float) -> None:
        self._folder, self._progress, self._grace_s = folder, progress, grace_s
        self._steps: deque[float] | None = None
        self._evaluation_s = self._save_s = 0.0
        self._said = False

    def __call__(self, record: dict[str, Any]) -> None:
        if "step_s" not in record:
            return
        if self._steps is None:
            self._steps = deque(maxlen=RECENT)
        else:
            self._steps.append(record["data_s"] + record["step_s"])
        self._evaluation_s = record.get("evaluate_s", self._evaluation_s)
        self._save_s = record.get("checkpoint_alone_s", self._save_s)
        if self._steps and self._save_s and not self._said:
            self._say(max(self._steps))

    def _say(self, step_s: float) -> None:
        if max(step_s, self._evaluation_s) + self._save_s <= self._grace_s:
            return
        self._said = True
        if any(event.get("grace_period_s") == self._grace_s for event in self._folder.events()):
            return
        part, longest, less = ("a step", step_s, "fewer micro-batches in a step") if step_s >= self._evaluation_s else (
            "an evaluation", self._evaluation_s, "a lower evaluate.max_windows")
        text = (f"guard.grace_period_s: {self._grace_s:g} s are too few for {part} of {longest:.4g} s and a checkpoint of "
                f"{self._save_s:.4g} s: a preempted run may lose the steps since its last one; try more workers or {less}, or checkpoints "
                "after fewer steps")
        self._progress.note(text)
        self._folder.event("note", message=text, grace_period_s=self._grace_s)
