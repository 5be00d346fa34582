"""The memory of this machine.

    machine_memory()                                       # bytes
"""

import contextlib
from pathlib import Path

import psutil

CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
"""Where a container finds its limit, in version 2 of cgroups and in version 1."""


def machine_memory() -> int:
    """Bytes that this machine has, or that the container around this process may have of them."""
    found = [psutil.virtual_memory().total]
    for file in CGROUP_LIMITS:
        with contextlib.suppress(OSError, ValueError):     # there is none, or "max"
            found.append(int(file.read_text()))
    return min(found)
