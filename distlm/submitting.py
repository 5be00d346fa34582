"""Send a job to a cluster: its spec is checked here, its files go along.

    submission = submit("jobs/train.yaml", storage=Storage.find())
"""

import contextlib
import logging
import os
import shlex
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from distlm import cluster as clusters
from distlm import upload
from distlm.errors import ClusterError, InputError
from distlm.head import client, recorded
from distlm.jobs import Submission, read, reconcile
from distlm.runs.folder import SUBMISSION, RunFolder
from distlm.spec import PipelineSpec, TuneSpec
from distlm.spec.load import Spec, dump, load_spec, located, to_yaml
from distlm.stopping import STOP_GRACE_S, end_ray_job
from distlm.storage import Storage


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
                end_ray_job(submission)
            raise
        except BaseException as error:
            folder.event("failed", "head_lost" if isinstance(error, ClusterError) else "internal", f"could not be submitted: {error}")
            raise
    return submission


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
