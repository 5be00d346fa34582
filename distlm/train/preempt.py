"""SIGTERM, by which a scheduler takes a machine back: the ranks agree on it at the end of a step, save, and end.

    install()                                              # on the main thread of every rank's process
    told()                                                 # whether this rank has been asked to end
"""

import signal
import threading

from distlm.runs import RunFolder

_told = threading.Event()
FLAG = "preempt"
"""The file in a run's folder by which the driver passes on its own SIGTERM; rank 0 looks for it."""


def install() -> None:
    """Take SIGTERM as a request. Only the main thread may set a handler, and it serves the whole process."""
    _told.clear()
    signal.signal(signal.SIGTERM, lambda *_: _told.set())


def told() -> bool:
    return _told.is_set()


def abandoned(folder: RunFolder, launches: int) -> bool:
    """Whether the driver of this rank has gone, or another one has started ranks since these, the `launches`-th: Ray's SIGTERM is then the
    end, and not a request to save beside those that go on."""
    return folder.state() == ("failed", "head_lost") or folder.launches() != launches
