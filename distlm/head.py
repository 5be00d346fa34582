"""One Ray head on this machine: started, recorded, and ended by its own record.

    head, fresh = up(LocalCluster(), storage)      # everything under <storage root>/clusters/<name>
    down(head)                                     # the processes that `up` started, and no others: never `ray stop`

Every process of a cluster carries DISTLM_CLUSTER_ID in its environment or belongs to the session that `up` opened, so that
several clusters, ours and others', live side by side.
"""

import contextlib
import hashlib
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import httpx
import psutil
from pydantic import Field

from distlm.errors import ClusterError, InputError
from distlm.process import living, signals_held
from distlm.spec.base import Name, Part
from distlm.storage import Storage, locked, read_json, write_json, writing

MARK = "DISTLM_CLUSTER_ID"
LONGEST_RAY_FOLDER = 40
"""Bytes. Ray puts sockets some 64 bytes below its folder, and the path of a socket may have 107."""
START_TIMEOUT_S = 90
NOT_IN_TIME = "node timed out during startup"
"""What Ray says of a raylet that did not come up in 30 s, which no setting of Ray's changes."""
STOP_GRACE_S = 5
KILL_GRACE_S = 30
"""So long what was killed is waited for: one that waits for a disk does not end before that answers."""
HUGE_PAGES = "glibc.malloc.hugetlb=1"
"""For glibc: tokenizing loses a third of its speed within a minute as the heap breaks into pieces, and with huge pages it does not
(docs/experiments.md)."""
LOST_AFTER = {"RAY_gcs_rpc_server_reconnect_timeout_s": "15"}
"""For what has joined a head that starts here: one that is gone does not come back, and Ray would wait a minute (docs/experiments.md)."""
RAY_SETTINGS = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_idle_worker_killing_time_threshold_ms": "20000", "RAY_num_workers_soft_limit": "1"}
"""Of every cluster that starts here. Worker processes wait 20 s for more work, not one: the next stage of a job need not start new ones.
Then all end but one, not one for each CPU: each wakes up a hundred times a second, which training on few cores feels."""
PORTS = ("port", "dashboard_port", "dashboard_agent_listen_port", "dashboard_agent_grpc_port", "metrics_export_port",
         "runtime_env_agent_port", "node_manager_port", "object_manager_port", "ray_client_server_port")
"""Options of `ray start`, in the same words."""


class LocalCluster(Part):
    """What a local cluster file may say. Ports that are left out are chosen among the free ones."""

    name: Name = "local"
    """The cluster's name: that of its folder under <storage root>/clusters."""
    cpus: Annotated[int | None, Field(ge=1)] = None
    """Logical CPUs: numbers to schedule by, not cores. Default: four per core, 8 at least."""
    gpus: Annotated[int | None, Field(ge=0)] = None
    """GPUs. Default: those that Ray finds."""
    object_store_bytes: Annotated[int | None, Field(ge=80_000_000)] = None
    """Shared memory of the object store. Default: a fifth of the free memory, 4 GiB at most."""
    host: Annotated[str, Field(min_length=1)] = "127.0.0.1"
    """The address of the head and its dashboard. Ray's own daemons listen on every interface in any case: the token guards them."""
    port: Annotated[int | None, Field(ge=1024, le=65535)] = None
    """Port of the head (GCS)."""
    dashboard_port: Annotated[int | None, Field(ge=1024, le=65535)] = None
    """Port of the dashboard and the job API."""


@dataclass(frozen=True)
class Head:
    """The record of a head, as cluster.json keeps it."""

    name: str
    id: str
    folder: str
    ray_folder: str
    address: str
    dashboard_url: str
    token_file: str
    cpus: int
    host: str
    pid: int
    started: float

    def here(self) -> bool:
        """Whether it was started on this host: another's processes cannot be seen, where hosts share the storage root."""
        return self.host == socket.gethostname()

    def alive(self) -> bool:
        """Whether the head process is still the one that was started: false after a reboot, though the record remains, and on another
        host."""
        return self.here() and living(self.pid, self.started) is not None


def recorded(storage: Storage) -> list[Head]:
    """Every head that has a record under the storage root, alive or not."""
    found = []
    for path in sorted((storage.root / "clusters").glob("*/cluster.json")):
        with contextlib.suppress(TypeError):               # a record of another version
            found.append(Head(**read_json(path)))
    return found


def same_address(one: str, other: str) -> bool:
    """Whether two addresses, host:port, name one port of this machine: Ray calls a head on loopback by another interface's address."""
    if one == other:
        return True
    mine = {"localhost", *(address.address.split("%")[0] for addresses in psutil.net_if_addrs().values() for address in addresses)}
    (host, _, port), (other_host, _, other_port) = one.rpartition(":"), other.rpartition(":")
    return bool(port) and port == other_port and host.strip("[]") in mine and other_host.strip("[]") in mine


def default_cpus() -> int:
    return max(8, 4 * (psutil.cpu_count() or 1))


def default_object_store_bytes() -> int:
    return max(80_000_000, min(4 << 30, psutil.virtual_memory().available // 5))


def up(config: LocalCluster, storage: Storage) -> tuple[Head, bool]:
    """Start a head and wait until it answers. Returns (head, whether it was started just now).

    Raises InputError for a port that is taken, ClusterError where Ray does not come up or another host has the name. Whatever interrupts
    it, nothing remains.
    Of several at once one starts it, and the others find it up.
    """
    with locked(storage.root / "clusters" / f".{config.name}.lock"):
        try:
            return _up(config, storage)
        except ClusterError as error:
            if NOT_IN_TIME not in error.message:
                raise
            return _up(config, storage)                    # on other ports: a raylet that does not come up may have found one taken


def _up(config: LocalCluster, storage: Storage) -> tuple[Head, bool]:
    folder = storage.root / "clusters" / config.name
    for found in recorded(storage):
        if found.name == config.name:
            if found.alive():
                return found, False
            down(found)                                    # what a head that crashed left behind; refused for one of another host
    ports = _ports(config)
    ray_folder = _ray_folder(folder)
    token_file = folder / "token"
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        token_file.unlink(missing_ok=True)
        token_file.touch(mode=0o600)
        token_file.write_text(secrets.token_hex(32))
    identity = secrets.token_hex(16)
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats",
               f"--node-ip-address={config.host}", f"--dashboard-host={config.host}", f"--temp-dir={ray_folder}",
               f"--num-cpus={config.cpus or default_cpus()}",
               f"--object-store-memory={config.object_store_bytes or default_object_store_bytes()}",
               *(f"--{name.replace('_', '-')}={ports[name]}" for name in PORTS)]
    if config.gpus is not None:
        command.append(f"--num-gpus={config.gpus}")
    head: Head | None = None
    try:
        with signals_held():                               # a head that is not on record would be nobody's to end
            with writing(folder / "head.log"), open(folder / "head.log", "wb") as log:
                process = subprocess.Popen(command, env=_environment(identity, token_file, ray_folder, ports), start_new_session=True,
                                           cwd=folder, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
            head = Head(config.name, identity, str(folder), str(ray_folder), f"{config.host}:{ports['port']}",
                        f"http://{config.host}:{ports['dashboard_port']}", str(token_file), config.cpus or default_cpus(),
                        socket.gethostname(), process.pid, psutil.Process(process.pid).create_time())
            write_json(folder / "cluster.json", asdict(head))
        _wait_until_ready(head, process)
    except BaseException:
        if head:
            down(head)
        raise
    return head, True


def down(head: Head) -> int:
    """End the processes of this head, and remove its record and token. Returns how many there were.

    Logs in the cluster's own folder stay until the next `up`; a short folder of Ray's elsewhere goes.
    Raises ClusterError for a head on another host, whose life cannot be seen from here, and where a process cannot be ended: the record
    stays.
    """
    if not head.here():
        raise ClusterError(f"cluster {head.name} was started on {head.host}, not here", where=head.folder,
                           remedy=f"run it there, or take another name, or, where that machine is gone, `distlm cluster down --name "
                           f"{head.name} --force` forgets the record")
    ended: set[int] = set()
    deadline = time.monotonic() + STOP_GRACE_S
    with contextlib.suppress(psutil.Error):
        if head.alive():                                   # `ray start --block` takes its children along
            psutil.Process(head.pid).terminate()
    while found := processes(head):
        if time.monotonic() > deadline + KILL_GRACE_S:
            left = ", ".join(f"{process.pid} ({_shown(process)})" for process in found)
            raise ClusterError(f"processes of cluster {head.name} do not end: {left}", where=head.folder,
                               remedy="one in disk-sleep waits for a disk or a network file system, one of another user is theirs to end; "
                               "then `distlm cluster down` again")
        for process in found:
            with contextlib.suppress(psutil.Error):
                if time.monotonic() > deadline:
                    process.kill()
                elif process.pid not in ended:
                    process.terminate()
            ended.add(process.pid)
        psutil.wait_procs(found, timeout=0.5)
    forget(head)
    folder = Path(head.folder)
    if folder not in Path(head.ray_folder).parents:
        shutil.rmtree(head.ray_folder, ignore_errors=True)
        with contextlib.suppress(OSError):                 # the short one is empty then
            Path(head.ray_folder).parent.rmdir()
    return len(ended)


def _shown(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return f"{process.name()}, {process.username()}, {process.status()}"
    return "ended just now"


def forget(head: Head) -> None:
    """Remove a head's record and token, and touch no process."""
    for name in ("cluster.json", "token"):
        (Path(head.folder) / name).unlink(missing_ok=True)


def processes(head: Head) -> list[psutil.Process]:
    """The living processes of a head: by its mark, its session, and what descends from either."""
    if not head.here():
        return []
    session = _has_session(head)
    found: dict[int, psutil.Process] = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            if process.pid == os.getpid() or process.status() == psutil.STATUS_ZOMBIE:
                continue
            if _belongs(process, head, session):
                for one in (process, *process.children(recursive=True)):
                    if one.pid != os.getpid() and one.status() != psutil.STATUS_ZOMBIE:
                        found[one.pid] = one
    return list(found.values())


def _has_session(head: Head) -> bool:
    """Whether a session of the head's number can be its own: not where another process has that number by now, which the system gives to
    nobody as long as the session has members, nor where this machine has been started since."""
    if head.started < psutil.boot_time() - 2:
        return False
    try:
        return abs(psutil.Process(head.pid).create_time() - head.started) < 2
    except psutil.NoSuchProcess:
        return True


def _belongs(process: psutil.Process, head: Head, session: bool) -> bool:
    if process.create_time() < head.started - 2:
        return False
    if session and os.getsid(process.pid) == head.pid:
        return True
    try:
        return process.environ().get(MARK) == head.id
    except (psutil.AccessDenied, OSError):
        return False


def free_ports(count: int, host: str = "127.0.0.1") -> list[int]:
    """Different ports that nothing listens on."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind((host, 0))
        return [one.getsockname()[1] for one in sockets]


def token(token_file: str | None) -> str:
    """The token in the file, else the one that Ray itself would take; empty where there is none."""
    if not token_file and os.environ.get("RAY_AUTH_TOKEN"):
        return os.environ["RAY_AUTH_TOKEN"].strip()
    path = Path(token_file or os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()
    with contextlib.suppress(OSError):
        return path.read_text().strip()
    return ""


def speaks_for(token_file: str, dashboard_url: str) -> bool:
    """Whether the token belongs to the cluster that had this dashboard: after its end anybody may listen there. A head that lives on
    another host is believed by its record."""
    root = Storage(Path(token_file).parent / "../..")       # it lies in <storage root>/clusters/<name>
    return any((head.token_file, head.dashboard_url) == (token_file, dashboard_url) and (head.alive() or not head.here())
               for head in recorded(root))


@contextlib.contextmanager
def client(dashboard_url: str, token_file: str | None) -> Iterator[httpx.Client]:
    """An HTTP client of a cluster's dashboard, with its token. Connection errors become ClusterError."""
    secret = token(token_file)
    headers = {"Authorization": f"Bearer {secret}"} if secret else {}
    try:
        with httpx.Client(base_url=dashboard_url, headers=headers, timeout=10, trust_env=False) as http:
            yield http
    except httpx.HTTPError as error:
        raise ClusterError(f"does not answer: {error}", where=dashboard_url, remedy="`distlm cluster status` shows what is up") from None


def _ports(config: LocalCluster) -> dict[str, int]:
    for key in ("port", "dashboard_port"):
        port = getattr(config, key)
        if port is not None:
            try:
                with socket.socket() as one:
                    one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    one.bind((config.host, port))
            except OSError as error:
                raise InputError(f"port {port} cannot be had: {error.strerror}", where=key,
                                 remedy="leave it out to take a free one, or name another") from None
    try:
        free = iter(free_ports(len(PORTS) + 2, config.host))
    except OSError as error:
        raise InputError(f"{config.host!r} is no address of this machine: {error.strerror}", where="host") from None
    return {name: getattr(config, name, None) or next(free) for name in (*PORTS, "autoscaler", "dashboard_metrics")}


def _ray_folder(folder: Path) -> Path:
    """Where Ray keeps sockets and logs: `ray` in the cluster's folder, or, where that path is too long for sockets, in a short one."""
    home = folder
    if len(os.fsencode(folder / "ray")) > LONGEST_RAY_FOLDER:
        digest = hashlib.sha256(os.fsencode(folder)).hexdigest()[:8]
        home = Path("/tmp" if os.path.isdir("/tmp") else tempfile.gettempdir()) / f"distlm-{os.getuid()}-{digest}"
    with writing(home):
        home.mkdir(parents=True, mode=0o700, exist_ok=True)
        if home != folder and (home.is_symlink() or home.stat().st_uid != os.getuid()):
            raise ClusterError("belongs to somebody else", where=str(home), remedy="remove it")
        shutil.rmtree(home / "ray", ignore_errors=True)
        (home / "ray").mkdir(mode=0o700)
    return home / "ray"


def _environment(identity: str, token_file: Path, ray_folder: Path, ports: dict[str, int]) -> dict[str, str]:
    """The environment of every process of the cluster. `python` and `distlm` of a job are those of this installation.

    RAY_TMPDIR is where Ray's own clean-up of a stopped Train run looks for the cluster's address: beside another Ray it would find two."""
    kept = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_JOB_CONFIG_JSON_ENV_VAR")}
    return {"GLIBC_TUNABLES": HUGE_PAGES, **LOST_AFTER, **kept, **RAY_SETTINGS, MARK: identity, "RAY_TMPDIR": str(ray_folder.parent),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token_file), "AUTOSCALER_METRIC_PORT": str(ports["autoscaler"]),
            "DASHBOARD_METRIC_PORT": str(ports["dashboard_metrics"]),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"}


def _wait_until_ready(head: Head, process: "subprocess.Popen[bytes]") -> None:
    """Until the job API answers and a node is alive."""
    deadline = time.monotonic() + START_TIMEOUT_S
    log = Path(head.folder) / "head.log"
    while time.monotonic() < deadline:
        if process.poll() is not None:
            lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
            raise ClusterError(f"Ray ended while it started: {lines[-1] if lines else 'without a word'}", where=str(log))
        with contextlib.suppress(ClusterError, ValueError, KeyError, TypeError):
            with client(head.dashboard_url, head.token_file) as http:
                if http.get("/api/jobs/").status_code == 200 and _nodes(http):
                    return
        time.sleep(0.2)
    raise ClusterError(f"Ray did not come up in {START_TIMEOUT_S} s", where=str(log), remedy="the log may say why")


def _nodes(http: httpx.Client) -> list[Any]:
    nodes = http.get("/nodes", params={"view": "summary"}).json()["data"]["summary"]
    return [node for node in nodes if node["raylet"].get("state") == "ALIVE"]
