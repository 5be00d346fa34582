"""Jobs of all kinds by name, and how they stand.

    job = locate("py-10m")

A job's folder is the truth about it; Ray's job API is asked for what only it knows: whether the process still lives.
"""

import os
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from distlm import cluster as clusters
from distlm.errors import PREFIX, ClusterError, InputError
from distlm.head import client, speaks_for
from distlm.process import living
from distlm.runs.folder import ENDED, RunFolder
from distlm.serve.client import healthy
from distlm.spec.load import nearest
from distlm.storage import FOLDERS, Storage, read_json

ENDED_IN_RAY = ("SUCCEEDED", "FAILED", "STOPPED")
SEND_S = 600
"""So long files may be on their way from another host."""


@dataclass(frozen=True)
class Submission:
    """A job as Ray knows it."""

    id: str
    dashboard_url: str
    token_file: str | None
    folder: Path
    left_out: tuple[str, ...] = ()
    """Folders that did not go along though they might be wanted, each with the reason."""


@dataclass(frozen=True)
class Job:
    """A job as its folder tells."""

    kind: str
    name: str
    folder: Path
    state: str
    cause: str
    message: str
    started: float | None
    ended: float | None
    """Seconds since the epoch; None while it runs."""
    metrics: dict[str, Any]
    """The last values of loss, val_loss, step."""
    submission: str
    """Ray's id of it, empty for one that was not submitted."""

    @property
    def duration_s(self) -> float | None:
        return (self.ended or time.time()) - self.started if self.started else None

    @property
    def active(self) -> bool:
        return self.state not in ENDED


def jobs(storage: str | Path | Storage | None = None) -> list[Job]:
    """Every job under the storage root, of all kinds, the latest first."""
    storage = Storage.given(storage)
    found = [reconcile(read(RunFolder(path))) for folder in dict.fromkeys(FOLDERS.values())
             for path in sorted((storage.root / folder).glob("*")) if RunFolder(path).exists()]
    return sorted(found, key=lambda job: -(job.started or 0))


def locate(name: str | Path, storage: str | Path | Storage | None = None) -> Job:
    """The job of that name, `runs/name` where several kinds share it, or that of a folder. Raises InputError with the nearest name."""
    name, storage = str(name), Storage.given(storage)
    paths = [storage.root / folder / name for folder in FOLDERS.values()] + [storage.root / name, Path(name).absolute()]
    found = {path.resolve(): RunFolder(path) for path in paths if RunFolder(path).exists()}
    if not found:
        known = [path.name for folder in FOLDERS.values() for path in (storage.root / folder).glob("*") if RunFolder(path).exists()]
        near = nearest(name, known)
        raise InputError(f"there is no job {name!r}", where=str(storage.root),
                         remedy=f"did you mean {near}?" if near else "`distlm runs` lists them")
    candidates = [reconcile(read(folder)) for folder in found.values()]
    if len(candidates) > 1:
        active = [job for job in candidates if job.active]
        if len(active) != 1:
            names = ", ".join(f"{job.folder.parent.name}/{job.name}" for job in candidates)
            raise InputError(f"{name!r} is the name of {len(candidates)} jobs", where=str(storage.root), remedy=f"say which: {names}")
        candidates = active
    return candidates[0]


def load_run(name: str | Path, storage: str | Path | Storage | None = None) -> RunFolder:
    """The folder of a job by name or path: its events, metrics, lineage, result. Raises InputError where there is none."""
    return RunFolder(locate(name, storage).folder)


def read(folder: RunFolder) -> Job:
    """A job as its folder tells, without asking anybody."""
    events = folder.events()
    state, cause = folder.state()
    attempt = events[max((i for i, e in enumerate(events) if e["state"] == "starting"), default=0):]
    last: dict[str, Any] = next((e for e in reversed(events) if e["state"] != "note"), {})
    submission, fresh = "", False
    for event in events:
        if event["state"] == "queued":
            submission, fresh = event.get("submission", ""), True
        elif event["state"] == "starting":                 # a second start was made by hand
            submission, fresh = submission if fresh else "", False
        elif event["state"] in ENDED:
            fresh = False
    metrics: dict[str, Any] = {}
    for record in folder.read_metrics():
        metrics.update({k: v for k, v in record.items() if v is not None})
    kinds = [kind for kind, name in FOLDERS.items() if name == folder.path.parent.name] or ["train"]
    made = folder.lineage().get("kind") if len(kinds) > 1 and (folder.path / "lineage.json").is_file() else None
    kind = str(made) if made in kinds else kinds[0]        # runs are made by several
    ended = None
    if state in ENDED:                                     # one that died without a word ended when it last wrote
        written = [p.stat().st_mtime for p in (folder.path / "events.jsonl", folder.path / "metrics.jsonl") if p.exists()]
        ended = last["time"] if last.get("state") in ENDED else max(written, default=None)
    message = last.get("message", "") or ("its process is gone" if cause == "head_lost" else "")
    return Job(kind, folder.name, folder.path, state, cause, message,
               attempt[0]["time"] if attempt else None, ended, metrics, submission)


def reconcile(job: Job) -> Job:
    """Ask Ray about a submitted job that has not ended, and record the end that the job could not record itself.

    A serve job has done its work when its endpoint stands: as long as that answers, it is shown as running, also where it could not be
    replaced by another."""
    endpoint = job.folder / "endpoint.json"
    if job.kind == "serve" and job.state in ENDED and endpoint.exists():
        if healthy(read_json(endpoint)):
            replaced = "" if job.state == "succeeded" else f"; its replacement has {job.state}: {job.message}"
            return replace(job, state="running", cause="", ended=None, message=f"answers at {read_json(endpoint)['url']}{replaced}")
        if job.state == "succeeded":
            return replace(job, state="failed", cause="head_lost", message="the endpoint does not answer")
    if not job.active or not job.submission:
        return job
    try:
        info = ray_job(submission_of(job))
    except ClusterError:                                   # nobody to ask: the folder's word stands
        if job.state == "queued":
            return replace(job, message=f"the cluster that it was submitted to does not answer: `distlm stop {job.name}` frees the name")
        return job
    folder = RunFolder(job.folder)
    if info is None and _being_sent(folder):
        return job
    if not _driver_may_live(folder, job.submission, known=info is not None):
        if info is None:
            folder.event("failed", "head_lost", "the cluster that it was submitted to has gone")
        elif info["status"] == "STOPPED":
            folder.event("stopped", "user", "its Ray job was stopped")
        elif info["status"] in ENDED_IN_RAY:
            folder.event("failed", *_last_words(info))
    return read(folder)


def _last_words(info: Mapping[str, Any]) -> tuple[str, str]:
    """(cause, message) of a job that ended before it could write: the error in its output, by its exit code, where Ray has kept them."""
    text = str(info.get("message") or "").strip()
    said = [line.partition(PREFIX)[2] for line in text.splitlines() if PREFIX in line]
    if said:
        return {2: "bad_input", 4: "storage", 130: "user"}.get(info.get("driver_exit_code") or 0, "internal"), said[-1][:2000]
    return "internal", f"its Ray job has {info['status']}: {' '.join(text.split())}"[:2000]


def _driver_may_live(folder: RunFolder, submission: str, known: bool) -> bool:
    """Whether the folder has ended by its own word, or has a driver that Ray's word is not about: then nobody else ends it.

    A driver on another host is the one that Ray speaks of where it began as this submission and Ray knows of that."""
    state, _ = folder.state()
    if state == "queued":
        return False
    last: dict[str, Any] = next((event for event in reversed(folder.events()) if event.get("owner")), {})
    elsewhere = last.get("owner", {}).get("host") != socket.gethostname()
    began_as = next((event.get("submission") for event in reversed(folder.events()) if event["state"] == "starting"), None)
    return state in ENDED or not (known and elsewhere and began_as == submission)


def _being_sent(folder: RunFolder) -> bool:
    """Whether another process has queued the job and may still upload its files: Ray does not know of it yet."""
    last: dict[str, Any] = next((event for event in reversed(folder.events()) if event["state"] != "note"), {})
    owner = last.get("owner") or {}
    if last.get("state") != "queued" or owner.get("pid") == os.getpid():
        return False
    if owner.get("host") != socket.gethostname():          # whose processes cannot be seen from here
        return time.time() - last["time"] < SEND_S
    return living(owner["pid"], owner["started"]) is not None


def submission_of(job: Job) -> Submission:
    """Where a submitted job can be asked for: the cluster that it was sent to. Raises ClusterError where that cannot be asked from here."""
    queued: dict[str, Any] = next((event for event in reversed(RunFolder(job.folder).events()) if event["state"] == "queued"), {})
    url, host = queued.get("dashboard"), queued.get("owner", {}).get("host")
    if not url:
        at = clusters.dashboard(clusters.require())
        return Submission(job.submission, at.dashboard_url, at.token_file, job.folder)
    if urlsplit(url).hostname in ("127.0.0.1", "localhost", "::1") and host != socket.gethostname():
        raise ClusterError(f"{job.name} was submitted on {host}, to a cluster that only that machine reaches", where=url,
                           remedy="ask there")
    if (file := queued.get("token_file")) and not speaks_for(file, url):
        raise ClusterError(f"the cluster that {job.name} was submitted to has gone: its token is sent to nobody else", where=url,
                           remedy="`distlm cluster status` shows what is up")
    return Submission(job.submission, url, queued.get("token_file"), job.folder)


def ray_job(submission: Submission) -> dict[str, Any] | None:
    """What Ray's job API says of a job: status, message, driver_exit_code; None where it knows of none. Raises ClusterError."""
    with client(submission.dashboard_url, submission.token_file) as http:
        answer = http.get(f"/api/jobs/{submission.id}")
        if answer.status_code == 404:
            return None
        if answer.status_code != 200:
            raise clusters.refusal(submission.dashboard_url, answer.status_code)
        return answer.json()


def to_dict(job: Job) -> dict[str, Any]:
    """For `--json`."""
    return {"kind": job.kind, "name": job.name, "state": job.state, "cause": job.cause, "message": job.message, "started": job.started,
            "ended": job.ended, "duration_s": job.duration_s, "metrics": job.metrics, "folder": str(job.folder),
            "submission": job.submission}
