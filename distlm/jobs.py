"""Jobs of all kinds by name: send one to a cluster, stop it, see how it stands.

    submission = submit("jobs/train.yaml", storage=Storage.find())
    stop("py-10m")

A job's folder is the truth about it; Ray's job API is asked for what only it knows: whether the process still lives.
"""

import contextlib
import logging
import os
import shlex
import signal
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil

from distlm import cluster as clusters
from distlm import upload
from distlm.errors import PREFIX, ClusterError, InputError, ServeError
from distlm.head import Head, client, recorded, same_address, speaks_for
from distlm.process import living
from distlm.runs.folder import ENDED, SUBMISSION, RunFolder
from distlm.serve.client import forget, gone, healthy
from distlm.spec import PipelineSpec, TuneSpec
from distlm.spec.load import Spec, dump, load_spec, located, nearest, to_yaml
from distlm.storage import FOLDERS, Storage, read_json

ENDED_IN_RAY = ("SUCCEEDED", "FAILED", "STOPPED")
STOP_GRACE_S = 30
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


def submit(source: str | Path | Mapping[str, Any], *, overrides: Sequence[str] = (), resume: bool = False,
           storage: str | Path | Storage | None = None, working_dir: str | Path | None = None) -> Submission:
    """Check a spec here, then run it as a Ray job with the files of `working_dir` (default: the present one).

    Raises SpecError and InputError before anything is sent (what only a cluster elsewhere can read is checked there), ClusterError where
    no cluster answers.
    """
    from distlm.execute import check_resume, inputs, resolve

    loaded = resolve(source, overrides)
    spec = loaded.spec
    shared, storage = Storage.given(storage), Storage.given(storage, spec.storage)
    folder = RunFolder(storage.folder(spec.kind, spec.name))
    here = Path(working_dir or Path.cwd()).absolute()
    _check_name(folder, resume or spec.kind == "pipeline")
    if resume and (folder.path / "spec.yaml").exists():
        check_resume(folder, spec)
    at = clusters.dashboard(clusters.require(shared))      # not under the spec's own root: `run` looks where this looks
    if here == Path.cwd() and any(head.alive() and head.dashboard_url == at.dashboard_url for head in recorded(shared)):
        with located(loaded):                              # a cluster of this machine reads what this process can read
            inputs(spec, storage)
    with client(at.dashboard_url, at.token_file) as http:  # a wrong token is told before anything is recorded
        code = http.get("/api/version").status_code
        if code in (401, 403):
            raise clusters.refusal(at.dashboard_url, code)
    path = Path(source).absolute() if isinstance(source, str | Path) else None
    words = ["python", "-m", "distlm", "run"]
    extra: dict[str, str] = {}
    alone = not names_files(load_spec(source, list(overrides)).spec)
    if path and alone and here in path.parents and path in set(upload.files(here, storage.root)):
        words += [path.relative_to(here).as_posix(), *(f"--set={text}" for text in overrides)]
    else:                                                  # a mapping, a file from elsewhere or with others travels as it was resolved
        extra[f".distlm/{spec.name}.yaml"] = to_yaml(dump(spec))
        words += [*extra]
    if spec.storage and Path(spec.storage).expanduser().absolute() != Path(spec.storage):
        words.append(f"--set=storage={storage.root}")      # a relative path would mean another folder over there
    if resume:
        words.append("--resume")
    with tempfile.TemporaryDirectory() as scratch:
        archive = Path(scratch) / "working_dir.zip"
        left_out = upload.pack(here, archive, storage.root, extra)
        submission = Submission(f"{spec.kind}-{spec.name}-{time.strftime('%Y%m%d-%H%M%S')}-{os.urandom(2).hex()}", at.dashboard_url,
                                at.token_file, folder.path, tuple(left_out))
        variables = {"DISTLM_STORAGE": str(storage.root), "DISTLM_PROGRESS": "json", "PYTHONUNBUFFERED": "1",
                     SUBMISSION: submission.id, "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_GRACE_S)}
        folder.queue(f"submitted to {at.dashboard_url}", submission=submission.id, resume=resume or spec.kind == "pipeline",
                     dashboard=at.dashboard_url, token_file=at.token_file)
        try:
            if left_out:
                folder.event("note", message=f"not taken along: {', '.join(left_out)}")
            send(submission, shlex.join(words), archive, variables, {"kind": spec.kind, "name": spec.name, "folder": str(folder.path)})
        except KeyboardInterrupt:
            folder.event("stopped", "user", "interrupted while it was submitted")
            with contextlib.suppress(ClusterError):        # which may have taken it already
                _end_ray_job(submission)
            raise
        except BaseException as error:
            folder.event("failed", "head_lost" if isinstance(error, ClusterError) else "internal", f"could not be submitted: {error}")
            raise
    return submission


def names_files(spec: Spec) -> bool:
    """Whether a spec names other specs as files, which need not lie in the working directory."""
    if isinstance(spec, PipelineSpec):
        return any("file" in step or isinstance(step.get("train"), str) for step in spec.steps.values())
    return isinstance(spec, TuneSpec) and isinstance(spec.train, str)


def send(submission: Submission, entrypoint: str, archive: Path, variables: dict[str, str], metadata: dict[str, str]) -> None:
    """Hand a command with its files to Ray's job API. Raises ClusterError."""
    from ray.job_submission import JobSubmissionClient

    with clusters.authenticated(submission.token_file), clusters.environment({"RAY_ADDRESS": None, "RAY_API_SERVER_ADDRESS": None}):
        logging.disable(logging.INFO)                      # Ray tells of its upload
        try:
            JobSubmissionClient(submission.dashboard_url).submit_job(
                entrypoint=entrypoint, submission_id=submission.id, metadata=metadata,
                runtime_env={"working_dir": str(archive), "env_vars": variables})
        except (RuntimeError, ConnectionError, OSError) as error:
            raise ClusterError(f"did not take the job: {str(error).strip().splitlines()[-1]}", where=submission.dashboard_url) from error
        finally:
            logging.disable(logging.NOTSET)


def _check_name(folder: RunFolder, resume: bool) -> None:
    """Raises InputError for a name that is taken, in the words of RunFolder.create."""
    if not folder.exists():
        return
    job = reconcile(read(folder))
    if job.active:
        raise InputError(f"{folder.name} is {job.state}", where=str(folder.path),
                         remedy=f"`distlm status {folder.name}` shows it, `distlm stop {folder.name}` ends it")
    never_began = not (folder.path / "lineage.json").exists()
    if not resume and not never_began:
        raise InputError(f"the name {folder.name} is taken by a job that has {job.state}", where=str(folder.path),
                         remedy="take another name, or go on with --resume")


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


def _end_ray_job(submission: Submission) -> None:
    with client(submission.dashboard_url, submission.token_file) as http:
        http.post(f"/api/jobs/{submission.id}/stop")


def _stop_ray_job(submission: Submission, grace_s: float) -> None:
    _end_ray_job(submission)
    deadline = time.monotonic() + grace_s + 10
    while time.monotonic() < deadline:
        info = ray_job(submission)
        if info is None or info["status"] in ENDED_IN_RAY:
            return
        time.sleep(0.2)
    raise ClusterError(f"Ray did not stop the job within {grace_s + 10:.0f} s", where=submission.id)


def _owner(job: Job) -> dict[str, Any]:
    return next((e["owner"] for e in reversed(RunFolder(job.folder).events()) if e.get("owner")), {})


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


def query(name: str, prompt: str, max_tokens: int | None = None, *, model: str | None = None, temperature: float = 0.0, chat: bool = False,
          storage: str | Path | Storage | None = None) -> Iterator[str]:
    """What an endpoint makes of `prompt`, or answers it in a chat, piece by piece. `model` is the name of one of its adapters. Raises
    InputError where there is no endpoint of that name, ServeError where it does not prove itself: then it is sent neither the key nor the
    prompt."""
    from distlm.serve.client import query as ask

    endpoint = _proven(name, storage)
    return ask(endpoint["url"], _key(endpoint), prompt, max_tokens, model=model or endpoint.get("model"), temperature=temperature,
               chat=chat)


def classify(name: str, texts: Sequence[str], *, storage: str | Path | Storage | None = None) -> list[dict[str, Any]]:
    """What the endpoint of a classifier says of each text: `label`, or where a text may have several `labels`, and `probabilities` by
    label. Raises as `query` does."""
    from distlm.serve.client import classify as ask

    endpoint = _proven(name, storage)
    return ask(endpoint["url"], _key(endpoint), texts, model=endpoint.get("model"))


def serves_classifier(name: str, storage: str | Path | Storage | None = None) -> bool:
    """Whether an endpoint is a classifier's, by its record. Raises InputError where there is none of that name."""
    return bool(_endpoint(name, storage).get("classifier"))


def _endpoint(name: str, storage: str | Path | Storage | None) -> dict[str, Any]:
    path = Storage.given(storage).endpoint(name) / "endpoint.json"
    if not path.exists():
        raise InputError(f"there is no endpoint {name!r}", where=str(path.parent), remedy="`distlm runs` lists those that serve")
    return dict(read_json(path))


def _proven(name: str, storage: str | Path | Storage | None) -> dict[str, Any]:
    endpoint = _endpoint(name, storage)
    if not healthy(endpoint):
        raise ServeError("no endpoint answers there that knows the key", where=endpoint["url"],
                         remedy=f"`distlm status {name}` shows how it stands, `distlm run` or `submit` with its spec brings it up")
    return endpoint


def _key(endpoint: Mapping[str, Any]) -> str:
    return Path(endpoint["api_key_file"]).read_text().strip()


def to_dict(job: Job) -> dict[str, Any]:
    """For `--json`."""
    return {"kind": job.kind, "name": job.name, "state": job.state, "cause": job.cause, "message": job.message, "started": job.started,
            "ended": job.ended, "duration_s": job.duration_s, "metrics": job.metrics, "folder": str(job.folder),
            "submission": job.submission}
