"""SIGTERM, by which a scheduler takes a machine back: the ranks agree on it in a step and around an evaluation, save, and end.

    install()                                              # on the main thread of every rank's process
    request = Request(folder, rank, device)
    request()                                              # whether this rank has been asked to end
    request.of_any()                                       # whether any has
"""

import signal
import threading
from typing import TYPE_CHECKING

from distlm.errors import TrainError
from distlm.runs import RunFolder

if TYPE_CHECKING:
    import torch

_told = threading.Event()
FLAG = "preempt"
"""The file in a run's folder by which the driver passes on its own SIGTERM; rank 0 looks for it."""


def install() -> None:
    """Take SIGTERM as a request. Only the main thread may set a handler, and it serves the whole process."""
    _told.clear()
    signal.signal(signal.SIGTERM, lambda *_: _told.set())


class Request:
    """To end, of a rank: by its own SIGTERM, and of rank 0 by the driver's too."""

    def __init__(self, folder: RunFolder, rank: int, device: "torch.device") -> None:
        self._folder, self._rank, self._device, self._launches = folder, rank, device, folder.launches()

    def __call__(self) -> bool:
        """Raises TrainError where nobody waits for this rank any more."""
        leaving = _told.is_set() or (self._rank == 0 and (self._folder.path / FLAG).exists())
        if leaving and abandoned(self._folder, self._launches):
            raise TrainError("the driver of this run has gone", cause="head_lost")
        return leaving

    def of_any(self) -> bool:
        """All ranks take part."""
        import torch
        from torch import distributed

        asked = torch.tensor(float(self()), device=self._device)
        distributed.all_reduce(asked)
        return bool(asked)


def abandoned(folder: RunFolder, launches: int) -> bool:
    """Whether the driver of this rank has gone, or another one has started ranks since these, the `launches`-th: Ray's SIGTERM is then the
    end, and not a request to save beside those that go on."""
    return folder.state() == ("failed", "head_lost") or folder.launches() != launches
