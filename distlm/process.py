"""A process that is on record: by id and start time, since an id alone is given again.

    living(record["pid"], record["started"])           # None where it has ended
"""

import contextlib

import psutil


def living(pid: int, started: float) -> psutil.Process | None:
    """The process of this host with that id, where it is the one that began at `started`, in seconds since the epoch, and has not ended."""
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        if abs(process.create_time() - started) < 2 and process.status() != psutil.STATUS_ZOMBIE:
            return process
    return None
