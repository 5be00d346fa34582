"""A job's folder and its append-only journals.

    folder = RunFolder.create(path, spec_yaml, lineage(...))      # refuses a name that is taken
    with folder.running():                                        # records how it ends, whatever happens
        folder.metrics({"step": 1, "loss": 8.3})
"""

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from distlm.errors import CAUSES, DistlmError, InputError
from distlm.process import living
from distlm.storage import locked, read_json, write_atomic, write_json, writing

STATES = ("queued", "starting", "running", "succeeded", "failed", "stopped")
ENDED = ("succeeded", "failed", "stopped")
SUBMISSION = "DISTLM_SUBMISSION"
"""Environment variable that tells a submitted job which one it is: a queued folder is for that one alone."""
CLAIM_S = 60
"""So long a claim from another host holds, whose process cannot be seen from here."""


@dataclass(frozen=True)
class RunFolder:
    """`spec.yaml`, `lineage.json`, `events.jsonl`, `metrics.jsonl` and what the job makes."""

    path: Path

    @staticmethod
    def create(path: Path, spec_yaml: str, lineage: dict[str, Any], *, resume: bool = False) -> "RunFolder":
        """Make the folder of a new job, or take an ended one up again with `resume`. Raises InputError for a name that is taken.

        Of several at once one gets it: the claim holds until the first event, or until its process is gone.
        """
        folder = RunFolder(path)
        with locked(path / ".claim") as claim:
            folder._check_free(claim, resume)
            with writing(path):
                text = json.dumps({"owner": _me(), "time": time.time(), "events": len(folder.events())}).encode()
                os.ftruncate(claim, 0)
                os.pwrite(claim, text, 0)
                (path / "logs").mkdir(parents=True, exist_ok=True)
            write_atomic(path / "spec.yaml", spec_yaml)
            write_json(path / "lineage.json", lineage)
        return folder

    @staticmethod
    def open(path: Path) -> "RunFolder":
        """Raises InputError where there is no job."""
        if not RunFolder(path).exists():
            raise InputError("there is no such job", where=str(path), remedy="`distlm runs` lists them")
        return RunFolder(path)

    @property
    def name(self) -> str:
        return self.path.name

    def exists(self) -> bool:
        return (self.path / "spec.yaml").exists() or (self.path / "events.jsonl").exists()

    def queue(self, message: str, *, submission: str, resume: bool = False, **more: Any) -> None:
        """Take the name for a job that is to be submitted. Raises InputError for a name that is taken; a job that failed before it began
        does not take it."""
        with locked(self.path / ".claim") as claim:
            self._check_free(claim, resume, begun=(self.path / "lineage.json").exists())
            self.event("queued", message=message, submission=submission, **more)

    def _check_free(self, claim: int, resume: bool, begun: bool = True) -> None:
        """Raises InputError for a name that is taken. `claim` is locked: what is free stays so until it is let go."""
        events, (state, _) = self.events(), self.state() if self.exists() else ("", "")
        ends_it = f"`distlm status {self.name}` shows it, `distlm stop {self.name}` ends it"
        if state in ("starting", "running"):
            raise InputError(f"{self.name} is {state}", where=str(self.path), remedy=ends_it)
        if state in ENDED and begun and not resume:
            raise InputError(f"the name {self.name} is taken by a job that has {state}", where=str(self.path),
                             remedy="take another name, or go on with --resume")
        waiting = _last(events).get("submission") if state == "queued" else None
        if waiting and waiting != os.environ.get(SUBMISSION):
            raise InputError(f"{self.name} is queued as {waiting}", where=str(self.path), remedy=ends_it)
        if _claimed(claim, events, resume):
            raise InputError(f"{self.name} is being started by another process", where=str(self.path), remedy=ends_it)

    def event(self, state: str, cause: str = "", message: str = "", **more: Any) -> None:
        """Append to events.jsonl: time in seconds since the epoch, state, cause and what else matters."""
        assert state in (*STATES, "note") and (not cause or cause in CAUSES), (state, cause)
        if state == "starting" and os.environ.get(SUBMISSION):
            more.setdefault("submission", os.environ[SUBMISSION])
        self._append("events.jsonl", {"time": time.time(), "state": state, "cause": cause, "message": message, **more,
                                      **({} if state in (*ENDED, "note") else {"owner": _me()})})

    def events(self) -> list[dict[str, Any]]:
        """Those that are whole; a line that was torn, or that is no event, is passed over."""
        return [event for event in _lines(self.path / "events.jsonl") if event.get("state") in (*STATES, "note") and "time" in event]

    def state(self) -> tuple[str, str]:
        """(state, cause) as it is now: a job whose process is gone without a word has failed, whatever it last wrote."""
        last = _last(self.events())
        if not last:
            return "queued", ""
        if last["state"] in ("starting", "running") and not _alive(last.get("owner")):
            return "failed", "head_lost"
        return last["state"], last.get("cause", "")

    def launches(self) -> int:
        """How often the job has begun to run, restarts after a failure included."""
        return sum(event["state"] == "running" for event in self.events())

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Record starting, and how the block ends: succeeded, stopped by the user, or failed with a cause."""
        self.event("starting")
        try:
            yield
        except BaseException as error:
            end = ("stopped", "user", "interrupted") if isinstance(error, KeyboardInterrupt) else (
                "failed", error.cause if isinstance(error, DistlmError) else "internal", f"{type(error).__name__}: {error}"[:2000])
            with contextlib.suppress(DistlmError):         # a full disk must not hide what has ended the job
                self.event(*end)
            raise
        self.event("succeeded", "completed")

    def metrics(self, values: dict[str, Any]) -> None:
        """Append a record to metrics.jsonl."""
        self._append("metrics.jsonl", values)

    def read_metrics(self) -> list[dict[str, Any]]:
        """By step: an evaluation may be recorded after later steps. Of a step, in the order of their writing."""
        return sorted(_lines(self.path / "metrics.jsonl"), key=lambda record: record.get("step", 0))

    def metrics_size(self) -> int:
        """Bytes of metrics.jsonl so far."""
        path = self.path / "metrics.jsonl"
        return path.stat().st_size if path.exists() else 0

    def metrics_from(self, position: int) -> tuple[list[dict[str, Any]], int]:
        """(whole records written since byte `position`, the position after them)."""
        if self.metrics_size() <= position:
            return [], position
        with open(self.path / "metrics.jsonl", "rb") as file:
            file.seek(position)
            whole = file.read()
        whole = whole[:whole.rfind(b"\n") + 1]
        return _records(whole.decode(errors="replace")), position + len(whole)

    def trim_metrics(self, last_step: int) -> None:
        """Drop the records after `last_step`: the run resumes there and writes them again."""
        records = self.read_metrics()
        kept = [record for record in records if record.get("step", 0) <= last_step]
        if len(kept) < len(records):
            write_atomic(self.path / "metrics.jsonl", "".join(json.dumps(record) + "\n" for record in kept))

    def result(self, values: dict[str, Any]) -> None:
        """Write result.json: what the job made, for tables and for other jobs."""
        write_json(self.path / "result.json", values)

    def read_result(self) -> dict[str, Any]:
        return read_json(self.path / "result.json")

    def lineage(self) -> dict[str, Any]:
        return read_json(self.path / "lineage.json")

    def _append(self, name: str, value: dict[str, Any]) -> None:
        with writing(self.path / name):
            self.path.mkdir(parents=True, exist_ok=True)
            line = (json.dumps(value) + "\n").encode()
            handle = os.open(self.path / name, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            try:                                           # a torn last line, from a kill, is closed and not joined to
                size = os.fstat(handle).st_size
                if size and os.pread(handle, 1, size - 1) != b"\n":
                    line = b"\n" + line
                while line:                                # a full disk takes a part and says so at the next write
                    line = line[os.write(handle, line):]
            finally:
                os.close(handle)


def _lines(path: Path) -> list[dict[str, Any]]:
    return _records(path.read_text(errors="replace")) if path.exists() else []


def _records(text: str) -> list[dict[str, Any]]:
    found = []
    for line in text.splitlines():
        with contextlib.suppress(ValueError):              # a torn line
            found.append(json.loads(line))
    return [value for value in found if isinstance(value, dict)]


def _last(events: list[dict[str, Any]]) -> dict[str, Any]:
    """The last event that is no note, empty where there is none."""
    return next((event for event in reversed(events) if event["state"] != "note"), {})


def _me() -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid(), "started": psutil.Process().create_time()}


def _claimed(claim: int, events: list[dict[str, Any]], resume: bool) -> bool:
    """Whether somebody has claimed the folder, lives, and has not ended since: that a submission waits for it is no end. One may resume
    what oneself has claimed."""
    try:
        found = json.loads(os.pread(claim, 4096, 0))
        owner, mine, since = found["owner"], _me(), events[found["events"]:]
        if any(event["state"] in ENDED for event in since):
            return False
        if resume and owner["pid"] == mine["pid"] and owner["host"] == mine["host"]:
            return False
        began = any(event.get("owner") == owner and event["state"] != "queued" for event in since)
        return _alive(owner) and (owner["host"] == mine["host"] or began or time.time() - found["time"] < CLAIM_S)
    except (ValueError, KeyError, TypeError):              # empty, or torn by a kill
        return False


def _alive(owner: dict[str, Any] | None) -> bool:
    if not owner or owner["host"] != socket.gethostname():
        return True                                        # another node's process cannot be seen from here
    return living(owner["pid"], owner["started"]) is not None
