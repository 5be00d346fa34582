"""What a command tells a person, and what it asks one."""

import contextlib
import json
import re
import signal
import sys
from collections.abc import Iterator
from typing import Any

import typer

from distlm.errors import PREFIX, InputError

PREAMBLE = re.compile(r"^Running entrypoint for job |job_manager\.py:\d+ -- Runtime env is setting up")
"""What Ray says before a job says anything."""


def report_error(text: str) -> None:
    say("\n".join(f"{PREFIX}{line}" for line in text.splitlines()))


def say(text: str) -> None:
    """Tell on standard error, where somebody still reads it."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr)


def show(lines: Iterator[str]) -> None:
    """Records as bars and tables, everything else as it is."""
    from distlm.progress import PlainProgress, RichProgress, parse

    with RichProgress() if sys.stdout.isatty() else PlainProgress() as progress:
        for line in lines:
            record = parse(line)
            if record:
                progress.show(record)
            elif not PREAMBLE.search(line):
                print(line, flush=True)


def show_rows(rows: list[tuple[str, str]]) -> None:
    for key, value in rows:
        print(f"  {key:<10} {value}")


def shown(value: Any) -> str:
    """A value of a spec or of a document, in a line."""
    return value if isinstance(value, str) else json.dumps(value)


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=2))


def confirm(question: str) -> None:
    """Go on after a yes. Raises InputError where nobody can answer, Abort after a no or Ctrl-C."""
    try:
        if sys.stdin is None:
            raise EOFError
        typer.confirm(question, abort=True)
    except (typer.Abort, EOFError) as error:
        if not isinstance(error.__context__ or error, EOFError):
            raise
        print()
        raise InputError(f"{question} Nobody answers, standard input has ended", remedy="--yes goes on without asking") from None


def interrupt(*_: Any) -> None:
    """SIGTERM, with which Ray and schedulers end a job, stops it as Ctrl-C does."""
    raise KeyboardInterrupt


def hang_up(*_: Any) -> None:
    """A terminal that is closed stops a job as Ctrl-C does, also where a part of it handles that in its own way; where that is ignored, as
    in the background of a script, as SIGTERM does."""
    signal.raise_signal(signal.SIGTERM if signal.getsignal(signal.SIGINT) == signal.SIG_IGN else signal.SIGINT)
