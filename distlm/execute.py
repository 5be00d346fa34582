"""One spec to one finished job: the place where spec, storage, run folder, cluster and job function meet.

    outputs = run("jobs/train.yaml", overrides=["seed=1"])
    outputs = run({"kind": "prepare", "name": "mine", "sources": ["texts/"]}, storage="/data/distlm")
"""

import contextlib
import importlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from distlm import summary
from distlm.errors import DistlmError, InputError, ServeError, SpecError
from distlm.model.build import check_served
from distlm.model.find import check_loadable, check_name, find_model
from distlm.progress import Logged, Progress
from distlm.runs import RunFolder, lineage
from distlm.serve.client import forget, healthy
from distlm.spec import AverageSpec, CompressSpec, EvaluateSpec, PipelineSpec, PrepareSpec, ServeSpec, TrainSpec, TuneSpec
from distlm.spec.load import Loaded, Spec, dotted, dump, leaves, load_spec, located, locator, parse, to_yaml
from distlm.storage import Storage, read_json

JOBS = {"prepare": "distlm.corpus.prepare:prepare", "train": "distlm.train.driver:train", "tune": "distlm.tune.sweep:tune",
        "average": "distlm.average.driver:average", "evaluate": "distlm.evaluate.driver:evaluate",
        "compress": "distlm.compress.driver:compress",
        "serve": "distlm.serve.deploy:serve", "pipeline": "distlm.pipeline:pipeline", "profile": "distlm.train.driver:profile"}
"""Kind, or what is done in its place -> the function that does the job: (spec, folder, storage, progress) -> outputs."""

AFTERWARDS = {"train": "distlm.compress.beside:beside"}
"""Kind -> the function that measures more once its job has ended well, and fails nothing: (spec, folder, storage, progress) -> outputs."""

MAY_CHANGE = {"train": ("duration", "scale", "evaluate", "checkpoint", "retry", "track", "batch.micro_sequences",
                        "guard.step_timeout_s", "sharding", "compile", "activation_checkpointing", "reduce_precision"),
              "tune": ("concurrent",),
              "evaluate": ("workers", "cpus_per_worker", "threads_per_worker", "concurrent"), "prepare": ("workers",),
              "average": ("workers", "cpus_per_worker", "threads_per_worker"), "compress": ("cpus",),
              "serve": tuple(ServeSpec.model_fields), "pipeline": ("steps", "prompt", "chat")}
"""Kind -> keys that may differ when a job is taken up again: they leave what was done before as it is. An endpoint is replaced in place."""


def run(source: str | Path | Mapping[str, Any], *, overrides: Sequence[str] = (), resume: bool = False,
        storage: str | Path | Storage | None = None, progress: Progress | None = None) -> dict[str, Any]:
    """Do the job of a spec, a file or a mapping, and return its outputs, which also stand in the folder's result.json.

    Ray is used as it is where the process has already initialised it, else connected to for the time of the job: clusters are looked for
    under `storage` or the default root, whatever root the spec gives its own files. An endpoint in a
    cluster that this process has started ends with it: then this call returns by KeyboardInterrupt alone.
    Raises DistlmError: SpecError, InputError before any work; the job's own errors, recorded in its folder; ClusterError.
    """
    loaded = resolve(source, overrides)
    with progress or Progress.for_stdout() as shown:
        return run_loaded(loaded, Storage.given(storage, loaded.spec.storage), shown, resume=resume, clusters=Storage.given(storage))


def profile(source: str | Path | Mapping[str, Any], *, overrides: Sequence[str] = (), storage: str | Path | Storage | None = None,
            progress: Progress | None = None) -> dict[str, Any]:
    """Run ten steps of a training spec under PyTorch's profiler, in a run folder of their own, NAME-profile-TIME, whose `profile/` holds a
    trace; return milliseconds of a step and of its parts. Nothing is saved or exported. Raises what `run` raises."""
    loaded = resolve(source, overrides)
    if not isinstance(loaded.spec, TrainSpec):
        raise SpecError(f"{loaded.spec.kind}: only a training job has steps", where=f"{loaded.path}: kind",
                        remedy="take a spec of `kind: train`")
    name = f"{loaded.spec.name[:70]}-profile-{time.strftime('%Y%m%d-%H%M%S')}"
    loaded = replace(loaded, spec=loaded.spec.model_copy(update={"name": name}))
    with progress or Progress.for_stdout() as shown:
        return run_loaded(loaded, Storage.given(storage, loaded.spec.storage), shown, hold=False, clusters=Storage.given(storage),
                          do=imported(JOBS["profile"]), extra={"profile": True})


def run_loaded(loaded: Loaded, storage: Storage, progress: Progress, *, resume: bool = False, hold: bool = True,
               extra: Mapping[str, Any] | None = None, clusters: Storage | None = None,
               do: Callable[..., dict[str, Any]] | None = None) -> dict[str, Any]:
    """`run` for a spec that is loaded. Without `hold` an endpoint is left to the caller; `extra` goes into the lineage; `clusters` is the
    root under which a cluster is looked for, where it is not `storage`; `do` stands in for the function of the spec's kind."""
    from distlm.reads import missing  # here: it asks this module what a job reads

    spec = loaded.spec
    folder = RunFolder(storage.folder(spec.kind, spec.name))
    state, _ = folder.state() if folder.exists() else ("", "")
    if resume and state and spec.kind == "train" and folder.lineage().get("profile"):
        raise InputError("it is a profile, which is no run to go on with", where=str(folder.path), remedy="profile the spec again")
    resume = resume or spec.kind == "pipeline"             # a pipeline decides step by step what is still to be done
    changes = check_resume(folder, spec) if resume and state and state != "queued" else []
    if state == "succeeded" and resume and not changes and spec.kind not in ("serve", "pipeline"):
        outputs = folder.read_result()
        lacks = missing(spec.kind, outputs)
        if not lacks:
            progress.note(f"{spec.kind} {spec.name} has already succeeded: nothing to do")
            return outputs
        from distlm.train.checkpoint import committed

        if spec.kind != "train" or not committed(folder.path):
            why = ", and it has no checkpoint to write it from" if spec.kind == "train" else ""
            raise InputError(lacks + why, where=str(folder.path),
                             remedy=f"take another name to {spec.kind} again, or move the folder away")
        progress.note(f"{spec.kind} {spec.name} has succeeded before, but {lacks}: it goes on from its last checkpoint")
    with located(loaded):
        made_of = lineage(dump(spec), **inputs(spec, storage)) | dict(extra or {})
        if changes and isinstance(spec, TrainSpec):
            from distlm.train.checkpoint import check_resume as check_checkpoint
            from distlm.train.recipe import make_recipe

            check_checkpoint(folder.path, make_recipe(spec, storage))
    if state and state != "queued":
        with contextlib.suppress(DistlmError):             # the earlier attempts stay on record
            earlier = folder.lineage()
            made_of["earlier"] = [*earlier.pop("earlier", []), earlier]
    RunFolder.create(folder.path, spec_text(loaded, folder), made_of, resume=resume)
    interrupted = False
    with folder.running(), Logged(progress, folder.path / "logs" / "driver.log") as progress:
        if changes:
            folder.event("note", message="resumed with " + ", ".join(changes))
        with connected(folder, clusters or storage, progress) as embedded:
            progress.stage(spec.kind, spec.name)
            outputs = (do or imported(JOBS[spec.kind]))(spec, folder, storage, progress)
            folder.result(outputs)
            if spec.kind in AFTERWARDS and not do:
                try:
                    outputs |= imported(AFTERWARDS[spec.kind])(spec, folder, storage, progress)
                    folder.result(outputs)
                except KeyboardInterrupt:                  # the run itself has ended well
                    interrupted = True
            if hold and spec.kind != "pipeline":           # which shows its own
                summary.show_job(spec.kind, folder, outputs, progress)
            if embedded and hold:
                hold_endpoints(endpoints(spec, outputs), storage, progress)
    if interrupted and not hold:                           # a pipeline does not go on
        raise KeyboardInterrupt
    return outputs


def resolve(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> Loaded:
    """Load a spec with all that it names as files put in place, so that its dump stands alone. Raises SpecError."""
    from distlm import pipeline  # here: it runs steps through this module
    from distlm.tune import space

    loaded = load_spec(source, list(overrides))
    if isinstance(loaded.spec, TuneSpec):
        loaded = space.inline(loaded)
        assert isinstance(loaded.spec, TuneSpec)
        space.check(loaded.spec, locator(loaded))
    elif isinstance(loaded.spec, PipelineSpec):
        loaded = pipeline.inline(loaded)
        pipeline.check(loaded)
    return loaded


def imported(place: str) -> Callable[..., dict[str, Any]]:
    """A function of JOBS or AFTERWARDS, imported when it is needed: Ray and torch are slow to load."""
    module, name = place.split(":")
    return getattr(importlib.import_module(module), name)


@contextlib.contextmanager
def connected(folder: RunFolder, storage: Storage, progress: Progress) -> Iterator[bool]:
    """A Ray connection for the block; yields whether the cluster was started here and ends with the block."""
    from distlm import cluster

    if cluster.import_ray().is_initialized():
        folder.event("note", message=f"in cluster {cluster.joined()}", cluster=cluster.joined())
        yield False
        return
    with cluster.connect(folder.path / "logs" / "driver.log", storage=storage) as connection:
        place = "a cluster for this job alone" if connection.embedded else f"cluster {connection.address}"
        progress.note(f"{place}, dashboard {cluster.shown(connection.dashboard_url, connection.token_file)}")
        folder.event("note", message=f"in {place}", cluster=connection.address)
        yield connection.embedded


def inputs(spec: Spec, storage: Storage) -> dict[str, Any]:
    """What a job reads, by name and hash, for its lineage. Raises InputError for what does not exist, and for a name that is taken."""
    check_name(spec.kind, spec.name, storage)
    found: dict[str, Any] = {}
    trains = [spec] if isinstance(spec, TrainSpec) else []
    if isinstance(spec, PrepareSpec):
        from distlm.corpus.documents import check

        check(spec)                                        # the hashes of its files stand in inputs.json
    if isinstance(spec, TuneSpec):
        from distlm.tune import space

        trains = [space.trial_spec(spec, values, f"trial-{i}") for i, values in enumerate(space.samples(spec))]
        space.check_metric(spec, trains, storage)
    for train in reversed(trains):                         # the first trial's inputs stand for the sweep
        from distlm.train.recipe import inputs_of

        found = inputs_of(train, storage)
    if isinstance(spec, AverageSpec):
        from distlm.average.driver import inputs_of as averaged

        found = averaged(spec, storage)
    if isinstance(spec, EvaluateSpec):
        from distlm.evaluate.task import inputs_of as read_by

        found = read_by(spec, storage)
    if isinstance(spec, CompressSpec):
        from distlm.compress.task import inputs_of as compressed_of

        found = compressed_of(spec, storage)
    if isinstance(spec, ServeSpec):
        found["model"] = str(find_model(spec.model, storage))
        check_loadable(Path(found["model"]))
        check_served(Path(found["model"]))
        if spec.adapters:
            from distlm.model.adapter_folder import check_adapters, find_adapters

            folders = find_adapters(spec.adapters, storage)
            check_adapters(folders, Path(found["model"]))
            found["adapters"] = {name: str(folder) for name, folder in folders.items()}
        if spec.api_key_file:
            from distlm.serve.guard import read_key

            read_key(Path(spec.api_key_file).expanduser().absolute())
    return found


def check_resume(folder: RunFolder, spec: Spec) -> list[str]:
    """The keys in which `spec` differs from the recorded one, all of them such that may. Raises SpecError for others."""
    try:
        recorded = dict(leaves(dump(load_spec(folder.path / "spec.yaml").spec)))
    except DistlmError as error:
        raise SpecError(f"the recorded spec cannot be read: {error}", where=str(folder.path / "spec.yaml"),
                        remedy="take another name") from None
    if (kind := recorded.get(("kind",))) != spec.kind:
        raise SpecError(f"{folder.name} is of kind: {kind}, and the spec of kind: {spec.kind}", where=str(folder.path),
                        remedy="take another name")
    now = dict(leaves(dump(spec)))
    changed = [key for key in {**recorded, **now} if recorded.get(key) != now.get(key) and key != ("storage",)]
    text = {key: f"{dotted(key)}: {recorded.get(key)!r} -> {now.get(key)!r}" for key in changed}
    free = MAY_CHANGE[spec.kind]
    fixed = [text[key] for key in changed if not any(f"{dotted(key)}.".startswith(f"{name}.") for name in free)]
    if fixed:
        raise SpecError(f"the spec is not the one that {folder.name} began with: {'; '.join(fixed)}", where=str(folder.path),
                        remedy=("only " + ", ".join(free) + " may change; " if free else "") + "take another name for a changed job")
    return list(text.values())


def spec_text(loaded: Loaded, folder: RunFolder) -> str:
    """The resolved spec as YAML, the origin of every value beside it."""
    recorded = folder.path / "spec.yaml"
    if recorded.exists() and Path(loaded.path).absolute() == recorded and "--set" not in loaded.origins.values():
        return recorded.read_text()                        # a submitted job reads its own folder: the origins are there
    data = dump(loaded.spec)
    lines = to_yaml(data).splitlines()
    for key, line in parse("\n".join(lines))[1].items():
        if dotted(key) in loaded.origins:
            lines[line - 1] += f"  # {loaded.origins[dotted(key)]}"
    text = "\n".join(lines) + "\n"
    with contextlib.suppress(DistlmError):
        if parse(text)[0] == data:
            return text
    return to_yaml(data)                                   # a text of several lines takes no remark


def endpoints(spec: Spec, outputs: dict[str, Any]) -> dict[str, str]:
    """The names and addresses of the endpoints that a job has brought up."""
    if spec.kind == "serve":
        return {spec.name: outputs["url"]}
    return outputs.get("endpoints", {}) if spec.kind == "pipeline" else {}


def answering(spec: Spec, storage: Storage) -> dict[str, str]:
    """The names and addresses of those endpoints of a job that answer, whether or not it has ended: in a cluster that stays they outlive
    it."""
    steps = spec.steps.values() if isinstance(spec, PipelineSpec) else [{"kind": spec.kind, "name": spec.name}]
    paths = [storage.endpoint(step["name"]) / "endpoint.json" for step in steps if step["kind"] == "serve"]
    found = {path.parent.name: read_json(path) for path in paths if path.exists()}
    return {name: record["url"] for name, record in found.items() if healthy(record)}


def hold_endpoints(urls: Mapping[str, str], storage: Storage, progress: Progress, every_s: float = 10) -> None:
    """Keep the process, and with it the cluster that it started, until Ctrl-C. Raises ServeError when an endpoint falls silent."""
    if not urls:
        return
    progress.note(f"serving at {', '.join(urls.values())} as long as this process runs: Ctrl-C ends it "
                  "(`distlm cluster up` first gives a cluster that stays)")
    silent, records = 0, [read_json(storage.endpoint(name) / "endpoint.json") for name in urls]
    try:
        while silent < 3:
            time.sleep(every_s)
            silent = 0 if all(map(healthy, records)) else silent + 1
        raise ServeError(f"no answer from {', '.join(urls.values())} for {3 * every_s:.0f} s", cause="worker_died",
                         remedy="logs/ in its folder and the dashboard say more")
    finally:
        for name in urls:
            forget(storage.endpoint(name))
            if RunFolder(storage.endpoint(name)).state()[0] == "succeeded":
                RunFolder(storage.endpoint(name)).event("stopped", "user", "ended with the cluster of the process that brought it up")


