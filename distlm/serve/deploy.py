"""The serve job: from a model's folder to an endpoint that answers, on Ray Serve.

    outputs = serve(spec, folder, storage, progress)      # Ray is initialised; the endpoint stays when this returns
    undeploy("py", storage)

Every endpoint is a Serve application of its own name. A cluster has one HTTP port, so the first endpoint lies at the root of it
and later ones under /<name>.
"""

import contextlib
import errno
import os
import shutil
import socket
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import ray
from ray import serve as ray_serve
from ray.serve.exceptions import RayServeException

from distlm.autoscale import require, serve_bundles
from distlm.errors import DistlmError, InputError, ServeError
from distlm.model.adapter_folder import CONFIG, WEIGHTS, AdapterFolder, find_adapters, home_of, tokenizer_files
from distlm.model.build import is_classifier
from distlm.model.complete import unheeded
from distlm.model.find import find_model
from distlm.progress import Progress
from distlm.runs import RunFolder
from distlm.serve.api import Card, create_app
from distlm.serve.client import ADAPTERS, MODELS, forget
from distlm.serve.guard import make_key, read_key
from distlm.serve.metrics import Metrics
from distlm.spec import ServeSpec
from distlm.spec.load import dump, nearest
from distlm.storage import Storage, read_json, write_json, writing

START_TIMEOUT_S = 900
COPIED_BYTES = 1 << 20
"""Larger files are linked."""


class Replica:
    """One copy of the model, with the API in front."""

    def __init__(self, model: Path, card: Card, key_file: Path, spec: ServeSpec, adapters: Sequence[Card] = ()) -> None:
        from distlm.serve.classifier import TorchClassifier
        from distlm.serve.torch_engine import TorchEngine

        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self.key, self.card, self.spec, self.adapters = read_key(key_file), card, spec, adapters
        self.metrics = Metrics(card.id, ray_serve.get_replica_context().replica_id.unique_id)
        make: Any = TorchClassifier if is_classifier(model) else TorchEngine
        more = {"adapters": {adapter.id: model / ADAPTERS / adapter.id for adapter in adapters}} if adapters else {}
        self.engine = make(model, dtype=spec.dtype, device="cuda" if spec.gpus_per_replica else "cpu",
                           threads=spec.threads or max(1, cores // spec.replicas), max_sequences=spec.max_sequences,
                           max_queued=spec.max_queued, metrics=self.metrics, **more)

    def check_health(self) -> None:
        """Ray Serve replaces a replica for which this raises."""
        self.engine.check()

    def __serve_build_asgi_app__(self) -> Any:
        return create_app(self.engine, self.card, self.key, self.metrics, default_max_tokens=self.spec.max_tokens, adapters=self.adapters)


def serve(spec: ServeSpec, folder: RunFolder, storage: Storage, progress: Progress) -> dict[str, Any]:
    """Bring the endpoint up, or replace it, and wait until it answers. Returns url, api_key_file, model, and the names of its adapters.

    Raises InputError (no such model, adapter or key file), ClusterError (too few CPUs or GPUs) and ServeError (port taken, replica fails).
    """
    model = find_model(spec.model, storage)
    adapters = find_adapters(spec.adapters, storage)       # `execute.inputs` has held them against the model
    key_file = Path(spec.api_key_file).expanduser().absolute() if spec.api_key_file else make_key(folder.path / "api_key")
    read_key(key_file)
    for name, value in unheeded(model).items():
        progress.note(f"generation_config.json: {name}: {value} is not applied, the API has no field for it")
    for name, adapter in adapters.items():
        if caveat := AdapterFolder.read(adapter).caveat:
            progress.note(f"adapters.{name}: {caveat}")
    require(serve_bundles(spec), f"{spec.replicas} replica{'s' * (spec.replicas > 1)}", progress, where="replicas",
            remedy="lower replicas, cpus_per_replica or gpus_per_replica, or take a larger cluster")
    host, port = start(spec)
    prefix = route_prefix(spec.name)
    base = f"http://{reachable(host)}:{port}{prefix.rstrip('/')}"
    version = uuid4().hex
    own = folder.path / MODELS / version
    record = {"url": f"{base}/v1", "model": spec.name, "api_key_file": str(key_file), "app": spec.name, "folder": str(own),
              "source": str(model), "cluster": ray.get_runtime_context().gcs_address, "spec": dump(spec), "version": version}
    before, running = recorded(folder), is_running(spec.name)
    surge = has_room(spec)
    if running and not surge:
        progress.note("the cluster has no room for a second replica: the endpoint is silent while it is replaced")
    try:
        take(model.iterdir(), own)
        for name, adapter in adapters.items():
            home = home_of(adapter)
            take([adapter / CONFIG, adapter / WEIGHTS, home / "distlm.json", *tokenizer_files(home)], own / ADAPTERS / name)
        record["classifier"] = is_classifier(own)
        record["lineage"] = lineage_of(own)
        record["adapters"] = {name: lineage_of(own / ADAPTERS / name) for name in adapters}
        deploy(record, prefix, surge=surge)
        wait_until_running(spec.name, progress)
        wait_until_healthy(base)
        write_json(folder.path / "endpoint.json", record)
    except BaseException as error:                         # Ctrl-C too: nothing half-deployed stays behind
        if isinstance(error, ServeError):
            error.message = error.message.replace(str(own), str(model))
        if before:
            put_back(before, prefix, folder, progress)
        elif not running:                                  # what ran, and is not on record, is not taken down either
            abandon(spec.name, folder, progress)
        if before or not running:
            shutil.rmtree(own, ignore_errors=True)
        raise
    for other in own.parent.iterdir():                     # Serve has no replica of an earlier version any more
        if other != own:
            shutil.rmtree(other, ignore_errors=True)
    folder.event("running", message=f"serving at {base}/v1", url=f"{base}/v1")
    return {"": f"{base}/v1", "url": f"{base}/v1", "api_key_file": str(key_file), "model": spec.name,
            **({"classifier": True} if record["classifier"] else {}), **({"adapters": list(adapters)} if adapters else {})}


def lineage_of(folder: Path) -> dict[str, Any]:
    """What a model's folder, or an adapter's, tells of how it was made."""
    return dict(read_json(folder / "distlm.json")) if (folder / "distlm.json").exists() else {}


def take(files: Iterable[Path], own: Path) -> None:
    """Make the files of a model, or of an adapter, the endpoint's own, so that a replica that starts again finds what it had, whatever has
    become of the run: by links, which cost no space, or copies where there are none. Raises StorageError."""
    with writing(own):
        own.mkdir(parents=True)
        for path in files:
            file, name = path.resolve(), own / path.name
            if not file.is_file():
                continue
            if file.stat().st_size > COPIED_BYTES:         # the small ones are those that are edited in place
                with contextlib.suppress(OSError):
                    os.link(file, name)
                    continue
            shutil.copyfile(file, name)


def recorded(folder: RunFolder) -> dict[str, Any] | None:
    """The record of the endpoint that this cluster has before it is replaced. Whether it answers is not asked: it may be busy."""
    path = folder.path / "endpoint.json"
    record = read_json(path) if path.exists() else {}
    return record if "version" in record and applications().get(record["app"], {}).get("status", "DELETING") != "DELETING" else None


def is_running(app: str) -> bool:
    """Whether Serve has the application, up or on its way back."""
    return applications().get(app, {}).get("status") in ("RUNNING", "UNHEALTHY")


def has_room(spec: ServeSpec) -> bool:
    """Whether a replica can start, on one node, while those that it replaces still run."""
    from ray._private.state import available_resources_per_node  # Ray says it nowhere else

    return any(free.get("CPU", 0) >= spec.cpus_per_replica and free.get("GPU", 0) >= spec.gpus_per_replica
               for free in available_resources_per_node().values())


def put_back(before: dict[str, Any], prefix: str, folder: RunFolder, progress: Progress) -> None:
    """After a replacement has failed, make the endpoint what it was; replicas that still run are kept as they are. Raises nothing: the
    failure itself is what is to be told."""
    try:
        deploy(before, prefix, surge=True)
        wait_until_running(before["app"], progress)
        wait_until_healthy(before["url"].removesuffix("/v1"))
        said = f"not replaced: the endpoint as it was before answers at {before['url']}"
    except Exception as error:
        said = f"the endpoint as it was before could not be brought back: {error}; `distlm stop {before['app']}` takes it down"
    tell(said, folder, progress)


def abandon(app: str, folder: RunFolder, progress: Progress) -> None:
    """Take down what has failed to come up. Raises nothing, as `put_back`."""
    try:
        remove(app)
    except Exception as error:
        tell(f"what has failed could not be taken down: {error}", folder, progress)
    (folder.path / "endpoint.json").unlink(missing_ok=True)


def tell(said: str, folder: RunFolder, progress: Progress) -> None:
    """Beside an error that is being raised: a full disk must not hide it."""
    progress.note(said)
    with contextlib.suppress(OSError, DistlmError):
        folder.event("note", message=said)


def undeploy(name: str, storage: Storage) -> None:
    """Take an endpoint down; the last one takes Ray Serve and its port with it. Ray is initialised. Raises InputError."""
    record = storage.endpoint(name) / "endpoint.json"
    if not record.exists():
        near = nearest(name, [path.parent.name for path in storage.endpoint("x").parent.glob("*/endpoint.json")])
        raise InputError(f"there is no endpoint {name}", where=str(record.parent), remedy=f"did you mean {near}?" if near else "")
    remove(read_json(record)["app"])
    forget(record.parent)


def start(spec: ServeSpec) -> tuple[str, int]:
    """Start Ray Serve, or join the one that runs. Returns its host and port. Raises ServeError where the port cannot be had."""
    host, port = address(spec)
    if running_serve() is None:
        # no request_timeout_s: it would cut streams
        ray_serve.start(proxy_location="HeadOnly", http_options={"host": host, "port": port, "request_timeout_s": None})
    return host, port


def address(spec: ServeSpec) -> tuple[str, int]:
    """The host and port at which Serve listens, or can. Raises ServeError."""
    client = running_serve()
    if client is not None:
        host, port = str(client.http_config.host), int(client.http_config.port)
        if spec.port not in (0, port) or spec.host != host:
            raise ServeError(f"this cluster serves at {host}:{port}, and a cluster has one address", cause="bad_input",
                             where=f"{spec.host}:{spec.port}", remedy=f"set host: {host} and port: {port}, or stop the other endpoints")
        return host, port
    return spec.host, free_port(spec.host, spec.port)


def running_serve() -> Any:
    """Serve's own client, or None. There is no public way to ask for the port of a Serve that runs, or for its routes."""
    from ray.serve.context import _get_global_client

    return _get_global_client(raise_if_no_controller_running=False)


def free_port(host: str, port: int) -> int:
    """The port if it can be listened on; for 0, one that is free. Raises ServeError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise ServeError(f"port {port} is taken by another process", where=f"port: {port}", cause="bad_input",
                                 remedy="set port: 0 to take a free one, or end what listens there") from None
            raise ServeError(f"{host}:{port} cannot be listened on: {error.strerror or error}", where=f"host: {host}", cause="bad_input",
                             remedy="name an address of this machine and a port above 1023") from None
        return int(probe.getsockname()[1])


def route_prefix(name: str) -> str:
    """The application's own prefix where it runs already; the root where that is free; else /name."""
    taken = {app: status["route_prefix"] for app, status in applications().items()}
    if taken.get(name):
        return str(taken[name])
    return "/" if "/" not in taken.values() else f"/{name}"


def applications() -> dict[str, Any]:
    """Serve's applications with their route_prefix."""
    client = running_serve()
    return dict(client.get_serve_details()["applications"]) if client else {}


def deploy(record: dict[str, Any], prefix: str, *, surge: bool) -> None:
    """Hand what endpoint.json records to Serve, which brings it up in the background. With `surge` a replica that runs is stopped when
    another has taken its place, and none where that fails."""
    spec = ServeSpec(**record["spec"])
    options: dict[str, Any] = {"num_cpus": spec.cpus_per_replica, "num_gpus": spec.gpus_per_replica,
                               "runtime_env": {"env_vars": {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}}}
    # the engine counts and refuses by itself, in OpenAI's words; Serve's own limits lie outside, with room for /health and /metrics
    deployment = ray_serve.deployment(
        name="model", num_replicas=spec.replicas, ray_actor_options=options, max_constructor_retry_count=1, health_check_period_s=5,
        max_ongoing_requests=spec.max_sequences + spec.max_queued + 16, max_queued_requests=spec.max_queued + 16,
        max_surge_percent=20 if surge else 0,              # rounded up to whole replicas
        backpressure_config={"status_code": 429, "retry_after_s": 2})(ray_serve.ingress()(Replica))
    # Serve tells versions apart by a random word of its own; there is no public way to name the one that runs already
    application = deployment.options(version=record["version"], _internal=True).bind(
        Path(record["folder"]), Card(record["model"], record["lineage"]), Path(record["api_key_file"]), spec,
        [Card(name, lineage) for name, lineage in record.get("adapters", {}).items()])
    ray_serve.run_many([ray_serve.RunTarget(application, spec.name, prefix)], wait_for_ingress_deployment_creation=False,
                       wait_for_applications_running=False)


def wait_until_running(name: str, progress: Progress, timeout_s: float = START_TIMEOUT_S) -> None:
    """Raises ServeError with the replica's own words where it cannot start."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        status = ray_serve.status().applications.get(name)
        state = status.status.value if status else "DEPLOYING"
        if status and state == "RUNNING":
            return
        if status and state in ("DEPLOY_FAILED", "UNHEALTHY", "DELETING"):
            words = reason([status.message, *(one.message for one in status.deployments.values())])
            raise ServeError(f"the model cannot be served: {words}", where=name, remedy="see logs/ and the dashboard's Serve page",
                             cause="bad_input" if "InputError: " in words else "")
        if status:
            for one in status.deployments.values():
                states = {str(getattr(state, "value", state)): number for state, number in one.replica_states.items()}
                progress.update("replicas running", states.get("RUNNING", 0), sum(states.values()) or None)
        time.sleep(0.2)
    raise ServeError(f"no replica has come up in {timeout_s:.0f} s", where=name, cause="timeout", remedy="are its CPUs and GPUs free?")


def reason(words: list[str]) -> str:
    """The line of Serve's messages that says what went wrong: the last of a traceback."""
    lines = [line.strip() for text in words for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line.split(":")[0] or line.startswith("distlm.")]
    return (errors or lines or ["Serve does not say why"])[-1]


def wait_until_healthy(base: str, timeout_s: float = 60) -> None:
    """Until /health answers through the proxy. Raises ServeError."""
    deadline, last = time.monotonic() + timeout_s, ""
    while time.monotonic() < deadline:
        try:
            answer = httpx.get(f"{base}/health", timeout=10, trust_env=False)
            if answer.status_code == 200:
                return
            last = f"status {answer.status_code}"
        except httpx.HTTPError as error:
            last = str(error)
        time.sleep(0.1)
    raise ServeError(f"{base}/health does not answer: {last}", cause="timeout", remedy="see the dashboard's Serve page")


def reachable(host: str) -> str:
    """The address to tell clients."""
    address = ray.util.get_node_ip_address() if host in ("0.0.0.0", "::") else host
    return f"[{address}]" if ":" in address else address


def remove(app: str) -> None:
    """Delete an application; shut Serve down with the last one, so that its port is free again."""
    try:
        if app in applications():
            ray_serve.delete(app)
        if not applications():
            ray_serve.shutdown()
    except RayServeException as error:
        raise ServeError(f"the endpoint cannot be taken down: {error}", where=app) from error
