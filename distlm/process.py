"""A process that is on record: by id and start time, since an id alone is given again; and the signals of this one.

    living(record["pid"], record["started"])           # None where it has ended
"""

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

import psutil


def living(pid: int, started: float) -> psutil.Process | None:
    """The process of this host with that id, where it is the one that began at `started`, in seconds since the epoch, and has not ended."""
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        if abs(process.create_time() - started) < 2 and process.status() != psutil.STATUS_ZOMBIE:
            return process
    return None


@contextlib.contextmanager
def signals_held() -> Iterator[None]:
    """An interrupt in the block is raised at its end, the second one at once. Ray's compiled modules would swallow it while they are
    imported; so would Python in the hooks around a fork, by which Ray starts processes, with logging's lock taken for ever."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    waiting: list[int] = []

    def hold(number: int, _: Any) -> None:
        waiting.append(number)
        if len(waiting) > 1:
            raise KeyboardInterrupt

    before = {number: signal.signal(number, hold) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    for received in waiting:
        signal.raise_signal(received)
