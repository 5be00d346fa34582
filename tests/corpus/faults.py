"""Filters of a user's that do harm, once."""

import os
import signal
from pathlib import Path


def die_once(text: str) -> None:
    """Kill the worker that judges a text of the form `die once: FILE`, unless the file is there, which is made first."""
    if text.startswith("die once: "):
        marker = Path(text.removeprefix("die once: ").split("\n")[0])
        if not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)


def die(text: str) -> None:
    """Kill the worker that judges a text that begins with `deadly`."""
    if text.startswith("deadly"):
        os.kill(os.getpid(), signal.SIGKILL)


def unlink(text: str) -> None:
    """Remove the file that a text of the form `unlink: FILE` names."""
    if text.startswith("unlink: "):
        Path(text.removeprefix("unlink: ").split("\n")[0]).unlink(missing_ok=True)
