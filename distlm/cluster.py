"""The cluster that a job runs in: the one that surrounds it, a named one, the local one, or an embedded one.

    with connect(log_file) as connection:          # ray is initialised inside the block
        print(connection.dashboard_url)
"""

import contextlib
import io
import logging
import os
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

import psutil

from distlm import head as heads
from distlm.errors import ClusterError, InputError, StorageError
from distlm.process import living, signals_held
from distlm.storage import Storage, read_json, write_json, writing

NAME_TOKEN = "RAY_AUTH_TOKEN_PATH must name the cluster's token"
CLEAR_S = 10
"""So long an embedded cluster's folder is tried to be removed."""
OWNER = "owner.json"
"""In an embedded cluster's folder: the process with which it ends."""


@dataclass(frozen=True)
class Cluster:
    """A cluster that was found: `address` for ray.init, or the http address of its dashboard, or both."""

    name: str
    address: str
    dashboard_url: str = ""
    token_file: str | None = None


@dataclass(frozen=True)
class Connection:
    """What `connect` gives. `embedded`: the cluster ends with the process."""

    address: str
    dashboard_url: str
    embedded: bool
    token_file: str | None = None


def find(storage: Storage | None = None) -> Cluster | None:
    """The cluster in $RAY_ADDRESS (a Ray job always has it), else the recorded local one that is alive, else None."""
    address = os.environ.get("RAY_ADDRESS", "").strip()
    alive = [head for head in heads.recorded(storage or Storage.find()) if head.alive()]
    if address and address != "local":
        for head in alive:
            if address == head.dashboard_url or heads.same_address(address, head.address):
                return of(head)
        return Cluster("$RAY_ADDRESS", address, address if "://" in address and not address.startswith("ray://") else "")
    named = os.environ.get("DISTLM_CLUSTER")
    if named or len(alive) > 1:
        chosen = [head for head in alive if head.name == (named or "local")]
        if not chosen:
            up = ", ".join(head.name for head in alive)
            if not named:
                raise InputError(f"several clusters are up: {up}", where="cluster", remedy="choose one with DISTLM_CLUSTER=name")
            raise InputError(f"no cluster {named!r} is up", where="DISTLM_CLUSTER", remedy=f"name one that is, {up}, or unset it" if up
                             else "unset it, or bring that one up with `distlm cluster up FILE`")
        alive = chosen
    return of(alive[0]) if alive else None


def of_endpoint(address: str, storage: Storage) -> Cluster | None:
    """The cluster in which an endpoint that has this address on record may be, where one is up; never one that would be started."""
    if mine := joined():
        return Cluster("joined", mine)
    alive = [head for head in heads.recorded(storage) if head.alive()]
    for head in alive:
        if heads.same_address(address, head.address):
            return of(head)
    if address and alive and not os.environ.get("RAY_ADDRESS"):
        return None
    found = find(storage)
    return None if found and address and found.address in [head.address for head in alive] else found


def joined() -> str:
    """The address of the cluster that this process has joined, empty where it has none."""
    ray = sys.modules.get("ray")
    return str(ray.get_runtime_context().gcs_address) if ray and ray.is_initialized() else ""


def require(storage: Storage | None = None) -> Cluster:
    """The cluster that `find` finds. Raises ClusterError where there is none."""
    found = find(storage)
    if found is None:
        raise ClusterError("no cluster is up", remedy="`distlm cluster up` starts one here; `distlm run` does without")
    return found


def dashboard(cluster: Cluster) -> Cluster:
    """The same with the address of its dashboard, which serves the job API. Raises ClusterError."""
    if cluster.dashboard_url:
        return cluster
    from ray.dashboard.utils import get_address_for_submission_client
    from ray.exceptions import RayError

    with authenticated(cluster.token_file):
        try:
            return replace(cluster, dashboard_url=get_address_for_submission_client(cluster.address))
        except (ConnectionError, OSError, RuntimeError, ValueError, RayError) as error:
            raise _unreachable(cluster, error) from error


def shown(dashboard_url: str, token_file: str | None) -> str:
    """A dashboard's address, with the place of the token that it asks for where that is known."""
    return f"{dashboard_url} (token in {token_file})" if dashboard_url and token_file else dashboard_url or "off"


@dataclass(frozen=True)
class Status:
    """A cluster as it stands: nodes alive, (used, total) per resource, jobs that are not done, Serve applications by state."""

    cluster: Cluster
    nodes: int
    resources: dict[str, tuple[float, float]]
    jobs: list[str]
    applications: dict[str, str]


def status(cluster: Cluster) -> Status:
    """Ask the dashboard. Raises ClusterError where it does not answer."""
    cluster = dashboard(cluster)
    with heads.client(cluster.dashboard_url, cluster.token_file) as http:
        answers = {}
        for path in ("/nodes?view=summary", "/api/cluster_status", "/api/jobs/", "/api/serve/applications/"):
            answer = http.get(path)
            if answer.status_code != 200:
                raise refusal(cluster.dashboard_url, answer.status_code, path)
            answers[path] = answer.json()
    nodes = [node["raylet"] for node in answers["/nodes?view=summary"]["data"]["summary"] if node["raylet"].get("state") == "ALIVE"]
    usage = ((answers["/api/cluster_status"]["data"]["clusterStatus"] or {}).get("loadMetricsReport") or {}).get("usage") or {}
    resources = {}
    for name in ("CPU", "GPU"):
        total = sum(node.get("resourcesTotal", {}).get(name, 0) for node in nodes)
        if total:
            resources[name] = (float(usage.get(name, (0, 0))[0]), total)
    jobs = [str(job.get("submission_id") or job.get("job_id")) for job in answers["/api/jobs/"] if job["status"] in ("PENDING", "RUNNING")]
    applications = {name: str(one["status"]) for name, one in answers["/api/serve/applications/"]["applications"].items()}
    return Status(cluster, len(nodes), resources, jobs, applications)


def refusal(dashboard_url: str, code: int, what: str = "") -> ClusterError:
    """The error for an answer that is not 200."""
    return ClusterError(f"{what} answers {code}".strip(), where=dashboard_url,
                        remedy=NAME_TOKEN if code in (401, 403) else "")


def _unreachable(cluster: Cluster, error: Exception) -> ClusterError:
    where, has_token = f"cluster {cluster.address}", heads.token(cluster.token_file)
    if "InvalidAuthToken" in str(error):
        said = "does not take this token" if has_token else "asks for a token, and there is none"
        return ClusterError(said, where=where, remedy=NAME_TOKEN)
    remedy = "unset RAY_ADDRESS, or bring one up with `distlm cluster up`"
    return ClusterError(f"cannot be reached: {_reason(error)}", where=where,
                        remedy=remedy if has_token else f"{remedy}; where it asks for a token, {NAME_TOKEN}")


def _reason(error: Exception) -> str:
    """The first line of what an error of Ray's says."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def of(head: heads.Head) -> Cluster:
    """The cluster of a local head."""
    return Cluster(head.name, head.address, head.dashboard_url, head.token_file)


@contextlib.contextmanager
def connect(log_file: Path | None = None, *, storage: Storage | None = None, cluster: Cluster | None = None) -> Iterator[Connection]:
    """Initialise Ray: in `cluster`, else in the one that `find` finds, else in an embedded one that ends with the block.

    What Ray and the libraries around it write to standard error goes to `log_file`. Where Ray is initialised already, that
    is used and left as it is. Raises ClusterError.
    """
    ray = import_ray()
    with quiet(log_file):
        if ray.is_initialized():
            context = ray.get_runtime_context()
            yield Connection(context.gcs_address, _dashboard_url(), False)
            return
        cluster = cluster or find(storage)
        if cluster and cluster.address.startswith(("http://", "https://")):
            raise ClusterError("RAY_ADDRESS names a dashboard", where=cluster.address, remedy="send the job with `distlm submit`, or name "
                               "the head as host:port")
        with _interruptible(), contextlib.ExitStack() as stack:
            if not cluster or any(heads.same_address(cluster.address, head.address) for head in heads.recorded(storage or Storage.find())):
                stack.enter_context(environment({name: os.environ.get(name, value) for name, value in heads.LOST_AFTER.items()}))
            if cluster:
                stack.enter_context(authenticated(cluster.token_file))
            with signals_held(), _sigterm_kept():
                connection = _join(cluster) if cluster else _embed(stack)
                stack.callback(_shutdown)                  # before the folder and the token go that it needs
            yield connection


def import_ray() -> Any:
    """Import Ray whole."""
    with signals_held():
        import ray
    return ray


def _shutdown() -> None:
    """Leave the cluster. The warnings that Ray has held back as repetitions it prints now, on whatever standard output is."""
    import ray

    if "ray.serve.context" in sys.modules:                 # Serve knows a cluster by a number that the next one gives again
        sys.modules["ray.serve.context"]._disconnect()
    with contextlib.redirect_stdout(sys.stderr):           # under `quiet` the log
        ray.shutdown()
    for logger in logging.Logger.manager.loggerDict.values():
        for handler in getattr(logger, "handlers", ()):
            if type(handler).__name__ == "SessionFileHandler":         # else the next cluster's log goes to this one's folder
                handler.close()


@contextlib.contextmanager
def _sigterm_kept() -> Iterator[None]:
    """ray.init takes SIGTERM for itself before it starts processes: what `signals_held` keeps off would come by that door, and stay."""
    from ray._private import utils

    take, utils.set_sigterm_handler = utils.set_sigterm_handler, lambda handler: None
    try:
        yield
    finally:
        utils.set_sigterm_handler = take


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """SIGTERM interrupts the block, as Ctrl-C does, where nobody handles it: the job's end is recorded."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _join(cluster: Cluster) -> Connection:
    if cluster.address.startswith("ray://"):               # what a job does with Ray wants a driver inside
        raise ClusterError("RAY_ADDRESS names a Ray Client server, through which no job can run", where=cluster.address,
                           remedy="send the job with `distlm submit` and RAY_ADDRESS=http://HOST:8265, or name the head as host:port")
    import ray

    try:
        ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.WARNING)
    except (ConnectionError, OSError, RuntimeError, ray.exceptions.RayError) as error:
        raise _unreachable(cluster, error) from error
    return Connection(cluster.address, cluster.dashboard_url or _dashboard_url(), False, cluster.token_file)


def _embed(stack: contextlib.ExitStack) -> Connection:
    """A cluster inside this process's life: token, dashboard on loopback, more logical CPUs than cores. Raises ClusterError where Ray does
    not start, StorageError where its folder cannot be written."""
    import ray

    base = "/tmp" if os.path.isdir("/tmp") else tempfile.gettempdir()
    with writing(base, "free space there, or use a cluster that is up"):
        _clear_orphans(Path(base))
        folder = Path(tempfile.mkdtemp(prefix="distlm-", dir=base))
        stack.callback(_clear, folder)
        write_json(folder / OWNER, {"host": socket.gethostname(), "pid": os.getpid(), "started": psutil.Process().create_time()})
        token_file = folder / "token"
        token_file.touch(mode=0o600)
        token_file.write_text(secrets.token_hex(32))
    stack.enter_context(authenticated(str(token_file)))
    port, *metrics = heads.free_ports(3)
    stack.enter_context(environment({
        **heads.RAY_SETTINGS, "GLIBC_TUNABLES": os.environ.get("GLIBC_TUNABLES", heads.HUGE_PAGES), "RAY_ADDRESS": None,
        "AUTOSCALER_METRIC_PORT": str(metrics[0]), "DASHBOARD_METRIC_PORT": str(metrics[1]), "RAY_TMPDIR": str(folder)}))
    try:
        with _hang_up_kept():
            context: Any = ray.init(
                address="local", num_cpus=heads.default_cpus(), object_store_memory=heads.default_object_store_bytes(),
                include_dashboard=True, dashboard_host="127.0.0.1", dashboard_port=port, _node_ip_address="127.0.0.1",
                _temp_dir=str(folder / "ray"), log_to_driver=False, logging_level=logging.WARNING)
        # Ray's own clean-up of a stopped Train run asks for the cluster without an address: beside another Ray it would find two.
        (folder / "ray" / "ray_current_cluster").write_text(context.address_info["gcs_address"])
    except Exception as error:                             # of many kinds: its processes, ports, memory, the disk
        ray.shutdown()                                     # what it has started so far
        log = getattr(sys.stderr, "name", "")              # under `quiet` the log
        raise ClusterError(f"Ray does not start: {_reason(error)}", where=log if isinstance(log, str) else "",
                           remedy="the log may say why; where time or memory was short, try again, or bring a cluster up first with "
                           "`distlm cluster up`") from error
    return Connection(context.address_info["gcs_address"], f"http://127.0.0.1:{port}", True, str(token_file))


@contextlib.contextmanager
def _hang_up_kept() -> Iterator[None]:
    """What starts in the block does not hear when the terminal is closed, which tells every process of a job: Ray's are needed until the
    job has ended, as with Ctrl-C. This thread hears it after the block."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _clear_orphans(base: Path) -> None:
    """Remove what embedded clusters of this host whose process was killed have left in `base`: their folders, and processes of Ray's, of
    which some live on for a minute."""
    for file in base.glob(f"distlm-*/{OWNER}"):
        with contextlib.suppress(StorageError, KeyError, TypeError):           # another user's, or one that goes just now
            owner = read_json(file)
            if owner["host"] == socket.gethostname() and living(owner["pid"], owner["started"]) is None:
                _clear(file.parent)


def _clear(folder: Path) -> None:
    """Remove the folder of an embedded cluster that was shut down. Ray waits for none of its processes: the dashboard's live on for seconds
    and write, so they end first, and what one has written while the folder went costs another round."""
    deadline = time.monotonic() + CLEAR_S
    while True:
        left = []
        mine = {child.pid for child in psutil.Process().children(recursive=True)}        # not Ray's, which were orphaned
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if process.pid not in mine and process.environ().get("RAY_TMPDIR") == str(folder):
                    process.kill()
                    left.append(process)
        psutil.wait_procs(left, timeout=CLEAR_S)
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        if time.monotonic() > deadline:
            logging.getLogger(__name__).warning("%s cannot be removed", folder)
            return
        time.sleep(0.1)


def _dashboard_url() -> str:
    from ray._private.worker import get_dashboard_url

    url = get_dashboard_url() or ""
    return url if not url or "://" in url else f"http://{url}"


@contextlib.contextmanager
def authenticated(token_file: str | None) -> Iterator[None]:
    """Inside the block this process, and what it starts, speaks to Ray with the token in `token_file`, or the user's own. Raises
    ClusterError where there is none and one is wanted: Ray would abort the process."""
    own: dict[str, str | None] = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": token_file, "RAY_AUTH_TOKEN": None}
    mode = os.environ.get("RAY_AUTH_MODE") or ("token" if heads.token(None) else None)
    if (token_file or mode == "token") and not heads.token(token_file):
        raise ClusterError("there is no token", where=token_file or "RAY_AUTH_MODE=token", remedy=NAME_TOKEN)
    with environment(own if token_file else {"RAY_AUTH_MODE": mode}):
        _reload_token()
        yield
    _reload_token()


def _reload_token() -> None:
    """Ray reads mode and token once per process and keeps them."""
    if "ray" in sys.modules:
        from ray import _raylet

        compiled: Any = _raylet
        compiled.Config.initialize("")
        compiled.AuthenticationTokenLoader.instance().reset_cache()


@contextlib.contextmanager
def environment(values: dict[str, str | None]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}

    def put(some: dict[str, str | None]) -> None:
        for name, value in some.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value

    put(values)
    try:
        yield
    finally:
        put(before)


@contextlib.contextmanager
def quiet(log_file: Path | None) -> Iterator[None]:
    """Send what is written to standard error inside the block, log records first, to `log_file` instead of the terminal; what
    Ray's threads print on standard output, too."""
    if log_file is None:
        yield
        return
    with writing(log_file):
        log_file.parent.mkdir(parents=True, exist_ok=True)
        log = open(log_file, "a", buffering=1, errors="replace")  # noqa: SIM115
    terminal = sys.stderr
    _redirect_handlers(terminal, log)
    out, sys.stderr, sys.stdout = sys.stdout, log, _Stdout(sys.stdout, log)
    try:
        yield
    finally:
        sys.stderr, sys.stdout = terminal, out
        _redirect_handlers(log, terminal)                  # handlers that were made inside the block outlive it
        with contextlib.suppress(OSError, io.UnsupportedOperation):
            log.close()


class _Stdout:
    """Standard output without what Ray's listener prints there of its own accord, in the middle of a progress bar."""

    def __init__(self, out: TextIO, log: TextIO) -> None:
        self._out, self._log = out, log

    def write(self, text: str) -> int:
        listener = threading.current_thread().name.startswith("ray_listen")
        return (self._log if listener else self._out).write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._out, name)


def _redirect_handlers(old: TextIO, new: TextIO) -> None:
    loggers: list[Any] = [logging.getLogger(), *logging.Logger.manager.loggerDict.values()]
    for logger in loggers:
        for handler in getattr(logger, "handlers", ()):
            follows = isinstance(getattr(type(handler), "stream", None), property)         # dill's writes to whatever sys.stderr is
            if isinstance(handler, logging.StreamHandler) and not follows and handler.stream is old:
                if old.closed:                             # it would be flushed first
                    handler.stream = new
                else:
                    handler.setStream(new)
