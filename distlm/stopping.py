"""End a job, by itself or with the cluster that it is in.

    stop("py-10m")
"""

import contextlib
import signal
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil

from distlm import cluster as clusters
from distlm.errors import ClusterError, InputError
from distlm.head import Head, client, same_address
from distlm.jobs import ENDED_IN_RAY, Job, Submission, jobs, locate, ray_job, read, submission_of
from distlm.process import living
from distlm.runs.folder import ENDED, RunFolder
from distlm.serve.client import forget, gone, healthy
from distlm.storage import Storage, read_json

STOP_GRACE_S = 30


def stop(job: Job | str | Path, storage: str | Path | Storage | None = None, grace_s: float = STOP_GRACE_S, *, force: bool = False) -> Job:
    """End a job: its endpoint, its Ray job or its process, gently first. Returns it as it then stands.

    With `force` the end is recorded even where the process cannot be reached.
    Raises InputError where it has ended already, ClusterError where its process cannot be reached.
    """
    storage = Storage.given(storage)
    job = job if isinstance(job, Job) else locate(job, storage)
    said = "stopped"
    if job.kind == "serve" and (job.folder / "endpoint.json").exists():
        taken_down = _take_down(job, storage, force)
        if not read(RunFolder(job.folder)).active:
            RunFolder(job.folder).event("stopped", "user", taken_down)
    elif not job.active:
        raise InputError(f"{job.name} has already {job.state}", where=str(job.folder))
    job = read(RunFolder(job.folder))
    if job.active:
        RunFolder(job.folder).event("note", message="stop was asked for")
        try:
            said = _stop_submitted(job, grace_s) if job.submission else _stop_process(job, grace_s)
        except ClusterError as error:
            if not force:
                raise
            said = f"ended in this record only, its process was not reached: {error.message}"
    folder = RunFolder(job.folder)
    if folder.events()[-1]["state"] not in ENDED:
        folder.event("stopped", "user", said)
    return read(folder)


def _take_down(job: Job, storage: Storage, force: bool) -> str:
    """Delete an endpoint from the cluster that it lives in, where that is up; else its record alone. Returns what to say of it."""
    path = job.folder / "endpoint.json"
    address = read_json(path).get("cluster", "")
    at = clusters.of_endpoint(address, storage)
    try:
        if at is not None:
            from distlm.serve import deploy

            with clusters.connect(job.folder / "logs" / "stop.log", cluster=at):
                if not address or same_address(address, clusters.joined()):
                    deploy.undeploy(job.name, storage)
                    return "the endpoint was taken down"
    except ClusterError:
        if not force:
            raise
    answers = healthy(read_json(path))
    if answers and not force:
        raise ClusterError(f"{job.name} answers, and the cluster that it is in is not one that can be joined from here", where=address,
                           remedy=f"name it in RAY_ADDRESS, or `distlm stop {job.name} --force` forgets the endpoint and leaves it running")
    if not gone(read_json(path)):                          # its replicas may need their files again
        path.unlink()
    else:
        forget(job.folder)
    return "its record was removed: the cluster that it was in is not up here"


def _stop_submitted(job: Job, grace_s: float) -> str:
    """Through Ray where that knows the job; else the driver that the folder names, where it has one."""
    try:
        submission = submission_of(job)
        info = ray_job(submission)
    except ClusterError as error:
        if job.state == "queued":
            return f"never began: its cluster {error.message}"
        if _owner(job).get("host") != socket.gethostname():
            raise
        info = None
    if info is not None and info["status"] not in ENDED_IN_RAY:
        _stop_ray_job(submission, grace_s)
        return "stopped"
    return "never began" if job.state == "queued" else _stop_process(job, grace_s)


def _stop_ray_job(submission: Submission, grace_s: float) -> None:
    end_ray_job(submission)
    deadline = time.monotonic() + grace_s + 10
    while time.monotonic() < deadline:
        info = ray_job(submission)
        if info is None or info["status"] in ENDED_IN_RAY:
            return
        time.sleep(0.2)
    raise ClusterError(f"Ray did not stop the job within {grace_s + 10:.0f} s", where=submission.id)


def end_ray_job(submission: Submission) -> None:
    with client(submission.dashboard_url, submission.token_file) as http:
        http.post(f"/api/jobs/{submission.id}/stop")


def _stop_process(job: Job, grace_s: float) -> str:
    owner = _owner(job)
    if not owner:
        return "stopped"
    if owner["host"] != socket.gethostname():
        raise ClusterError(f"{job.name} runs on {owner['host']}, not here", where=str(job.folder),
                           remedy=f"stop it there, or, where that is gone, `distlm stop {job.name} --force` ends it in the record")
    process = living(owner["pid"], owner["started"])
    if process is None:
        return "stopped"
    with contextlib.suppress(psutil.NoSuchProcess):
        children = process.children(recursive=True)
        process.send_signal(signal.SIGINT)
        _, alive = psutil.wait_procs([process], timeout=grace_s)
        if alive:
            for one in (process, *children):
                with contextlib.suppress(psutil.Error):
                    one.kill()
            psutil.wait_procs([process], timeout=5)
    return "stopped"


def in_cluster(head: Head, storage: Storage) -> list[Job]:
    """What ends with a local cluster: jobs that were submitted to it or have joined it, and endpoints that live in it."""
    return [job for job in jobs(storage) if job.active and _inside(job, head)]


def others_in_cluster(head: Head, ending: Sequence[Job]) -> list[str]:
    """What else ends with a head, as Ray tells: jobs by id and command, and endpoints, of other storage roots or not distlm's at all. Empty
    where the head does not answer."""
    found = {}
    with contextlib.suppress(ClusterError), client(head.dashboard_url, head.token_file) as http:
        for path in ("/api/jobs/", "/api/serve/applications/"):
            answer = http.get(path)
            found[path] = answer.json() if answer.status_code == 200 else {}
    submissions, drivers = {job.submission for job in ending}, {str(_owner(job).get("pid")) for job in ending}
    running = [f"{one['submission_id'] or one['job_id']} ({one['entrypoint']})" for one in found.get("/api/jobs/", ())
               if one["status"] in ("PENDING", "RUNNING") and one["submission_id"] not in submissions
               and (one["driver_info"] or {}).get("pid") not in drivers]
    applications = found.get("/api/serve/applications/", {}).get("applications", {})
    return running + [f"endpoint {name}" for name in applications if name not in {job.name for job in ending if job.kind == "serve"}]


def _inside(job: Job, head: Head) -> bool:
    loopback = urlsplit(head.dashboard_url).hostname in ("127.0.0.1", "localhost", "::1")
    if loopback and _owner(job).get("host", head.host) != head.host:
        return False                                       # the same address there is another cluster
    if job.kind == "serve" and (job.folder / "endpoint.json").exists():
        return same_address(read_json(job.folder / "endpoint.json").get("cluster", ""), head.address)
    for event in reversed(RunFolder(job.folder).events()):  # the latest attempt's word, from where it has joined
        if "cluster" in event:
            return same_address(event["cluster"], head.address)
        if event["state"] == "queued":
            return bool(job.submission) and event.get("dashboard") == head.dashboard_url
        if event["state"] == "starting" and not job.submission:
            return False
    return False


def end_with_cluster(job: Job, grace_s: float = STOP_GRACE_S) -> None:
    """Before its cluster is taken down, stop a job whose driver is no process of the cluster: it would wait for what does not come back."""
    folder = RunFolder(job.folder)
    if not job.submission and folder.state()[0] not in ENDED:
        folder.event("note", message="its cluster is taken down")
        with contextlib.suppress(ClusterError, psutil.Error):  # on another host, or of another user
            _stop_process(job, grace_s)


def ended_with_cluster(job: Job) -> None:
    """Record the end of a job whose cluster was taken down."""
    folder = RunFolder(job.folder)
    if job.kind == "serve":
        forget(job.folder)
    if job.kind == "serve" or folder.state()[0] not in ENDED or folder.state() == ("failed", "head_lost"):
        folder.event("stopped", "user", "its cluster was taken down")


def _owner(job: Job) -> dict[str, Any]:
    return next((e["owner"] for e in reversed(RunFolder(job.folder).events()) if e.get("owner")), {})
