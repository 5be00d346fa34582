"""What a person sees while a job runs: the same records on a terminal, in a log, and across the wire from a submitted job.

    progress = Progress.for_stdout()
    with progress:
        progress.stage("prepare", "stdlib")
        progress.update("documents", 120, 612)
        progress.update("steps", 40, 300, loss=4.21, tokens_per_s=5100)
        progress.note("3 documents rejected: not UTF-8")
        progress.table("result", [("tokens", "3,104,233")])
"""

import contextlib
import errno
import json
import os
import sys
import time
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Table
from rich.text import Text

from distlm.storage import writing

MARK = '{"distlm": '
"""Begins every line of a job that stands for a record, where DISTLM_PROGRESS=json."""
WIDTH = 120
"""Columns of a log's lines."""


class Progress:
    """Base: turns calls into records. A subclass shows them. Use as a context manager."""

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Take down what is shown."""

    def show(self, record: dict[str, Any]) -> None:
        """Show one record: {"distlm": stage | update | note | table, ...}."""

    def stage(self, kind: str, name: str) -> None:
        self.show({"distlm": "stage", "kind": kind, "name": name})

    def update(self, unit: str, done: int, total: int | None = None, **figures: float) -> None:
        self.show({"distlm": "update", "unit": unit, "done": done, "total": total, "figures": figures})

    def note(self, text: str) -> None:
        self.show({"distlm": "note", "text": text})

    def table(self, title: str, rows: list[tuple[str, ...]], header: tuple[str, ...] = ()) -> None:
        self.show({"distlm": "table", "title": title, "rows": rows, "header": header})

    @staticmethod
    def for_stdout() -> "Progress":
        """Bars on a terminal, records under DISTLM_PROGRESS=json, else plain lines."""
        if os.environ.get("DISTLM_PROGRESS") == "json":
            return JsonProgress()
        return RichProgress() if sys.stdout.isatty() else PlainProgress()


class Thinned:
    """Which records are worth a line: of updates one in so many seconds and each that completes its unit, but none that only repeats the
    line before it, as a sweep's do, which are made whenever anything happens to a trial."""

    def __init__(self, every_s: float) -> None:
        self._every_s, self._next = every_s, 0.0
        self._said: dict[str, Any] | None = None
        """The record before this one, where it became a line."""

    def takes(self, record: dict[str, Any]) -> bool:
        if record["distlm"] == "update":
            if record == self._said:
                return False
            self._said = None
            if record["done"] != record["total"] and time.monotonic() < self._next:
                return False
            self._next = time.monotonic() + self._every_s
        self._said = record
        return True


class JsonProgress(Progress):
    """One JSON line per record, updates twice a second at most: a follower shows them."""

    def __init__(self, file: TextIO | None = None) -> None:
        self._file = file                                  # default: standard output
        self._thinned = Thinned(0.5)

    def show(self, record: dict[str, Any]) -> None:
        if self._thinned.takes(record):
            print(json.dumps(record), file=self._file, flush=True)


class Logged(Progress):
    """Keeps the records in a file, from which `distlm logs` shows them, and passes them on to another, which stays its maker's to close.
    Where that one cannot show them any more, since the reader of a pipe or the terminal has gone, it is passed over: no display is worth
    the job."""

    def __init__(self, shown: Progress, path: Path) -> None:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "a")  # noqa: SIM115
        self._shown, self._records = shown, JsonProgress(self._file)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._file.close()

    def show(self, record: dict[str, Any]) -> None:
        self._keep(record)
        try:
            self._shown.show(record)
        except OSError as error:
            self._shown = Progress()                       # shows nothing
            self._keep({"distlm": "note", "text": f"nothing is shown any more, and the job goes on: {error}"})

    def _keep(self, record: dict[str, Any]) -> None:
        with contextlib.suppress(OSError, ValueError):     # a full disk, a thread that is late: no log is worth the job
            self._records.show(record)


class Shown(Console):
    """Rich's console, which would end the process where the reader of a pipe has gone. Raises BrokenPipeError, as print does."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


class PlainProgress(Progress):
    """Lines without control codes, for logs: an update every ten seconds, and the last one."""

    def __init__(self) -> None:
        self._console = Shown(width=WIDTH, highlight=False)
        self._thinned = Thinned(10)

    def show(self, record: dict[str, Any]) -> None:
        if not self._thinned.takes(record):
            return
        if record["distlm"] == "update":
            total = f"/{record['total']:,}" if record["total"] is not None else ""
            self._console.print(f"  {record['unit']} {record['done']:,}{total} {figures(record['figures'])}".rstrip(), markup=False)
        else:
            draw(self._console, record)


class RichProgress(Progress):
    """A live bar per unit of the present stage."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Shown(highlight=False)
        self._bars: Bars | None = None
        self._tasks: dict[str, TaskID] = {}

    def close(self) -> None:
        if self._bars:
            with contextlib.suppress(OSError):             # the terminal has gone
                self._bars.stop()
        self._bars, self._tasks = None, {}

    def show(self, record: dict[str, Any]) -> None:
        if record["distlm"] == "update":
            unit = record["unit"]
            if self._bars is None:
                self._bars = Bars(TextColumn("  {task.description:<9}"), BarColumn(10), MofNCompleteColumn(), TimeRemainingColumn(),
                                  TextColumn("[dim]{task.fields[figures]}"), console=self._console,
                                  redirect_stderr=False)   # in a job it goes to the log, which may be closed before the bars are
                self._bars.start()
            if unit not in self._tasks:
                self._tasks[unit] = self._bars.add_task(unit, total=record["total"], figures="")
            shown = {name: value for name, value in record["figures"].items() if name != "eta_s"}    # the bar has its own
            self._bars.update(self._tasks[unit], completed=record["done"], total=record["total"], figures=figures(shown))
            return
        if record["distlm"] in ("stage", "table"):
            self.close()
        draw(self._console, record)


def draw(console: Console, record: dict[str, Any]) -> None:
    """Print a stage, a note or a table."""
    if record["distlm"] == "stage":
        console.print(f"[bold]{record['kind']}[/bold] {escape(record['name'])}")
    elif record["distlm"] == "note":
        console.print(f"  {record['text']}", markup=False, soft_wrap=True)
    elif record["distlm"] == "table":
        table = Table(title=escape(record["title"]), title_justify="left", title_style="bold", show_header=bool(record["header"]),
                      header_style="dim", box=None, pad_edge=False, padding=(0, 2))
        width = max(len(row) for row in [*record["rows"], record["header"]])
        for i in range(width):
            table.add_column(record["header"][i] if i < len(record["header"]) else "", overflow="fold")
        for row in record["rows"]:
            table.add_row(*(Text(str(cell)) for cell in row))
        console.print(table)


def figures(values: dict[str, Any]) -> str:
    """`loss 4.21  tokens/s 5,100  mfu 41%  61.2 GB  eta 1:23:45`."""
    return "  ".join(figure(name, value) for name, value in values.items())


def figure(name: str, value: Any) -> str:
    """One value with its name, short: a training line has eight of them."""
    if name == "eta_s":
        minutes, seconds = divmod(round(value), 60)
        return f"eta {minutes // 60}:{minutes % 60:02}:{seconds:02}"
    if name == "memory_bytes":
        return f"{value / 1e9:.3g} GB"
    if name == "mfu":
        return f"mfu {value:.0%}"
    if name in ("lr", "grad_norm"):
        return f"{name.removeprefix('grad_')} {value:.3g}"
    return f"{name.replace('_loss', '').replace('_per_s', '/s').replace('_', ' ')} {number(value)}"


def number(value: Any) -> str:
    if not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) else str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def parse(line: str) -> dict[str, Any] | None:
    """The record that a line of a job's output stands for, or None."""
    if not line.startswith(MARK):
        return None
    try:
        return json.loads(line)
    except ValueError:
        return None
