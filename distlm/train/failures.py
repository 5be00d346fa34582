"""Why a worker group ended: Ray's exceptions to one error with a cause."""

import re
import socket
from collections.abc import Container
from pathlib import Path
from typing import Any

from distlm.errors import ClusterError, DistlmError, TrainError, out_of_memory
from distlm.train.worker import worker_log

PEER_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Connection refused", "remote process exited",
             "NCCL communicator was aborted")
REMOVED = "another rank could not write it, and has removed it"
"""What a rank says of a checkpoint whose folder has gone under it."""
RAYS_LOG = "its log is in Ray's log folder"
CUT_SHORT = re.compile(r"(/\S+\.so): (?:file too short|invalid ELF header)")
"""What the loader says of a library whose compiler was ended as it wrote it. It stays in torch.compile's cache, for all later runs."""
ANSWER_S = 2
"""Within which a node's raylet takes a connection, if there is one."""


def diagnose(error: BaseException, folder: Path | None = None, process: str = "a worker process") -> DistlmError:
    """The error of ours that tells most: our own one from a rank first, then a lost node, a killed worker, memory, the rest.

    A rank that survives another reports a broken connection: that counts as a worker that died. One that died without a word has its
    log named, where it lies in the run's `folder`. What no rank failed of is `process`'s.
    """
    ranks = {rank: _explain(inner, "a worker process") for rank, inner in getattr(error, "worker_failures", {}).items()}
    if not ranks:
        return _explain(getattr(error, "controller_failure", None) or error, process)[1]
    rank = min(ranks, key=lambda rank: ranks[rank][0])
    _, explained = ranks[rank]
    if folder and explained.remedy == RAYS_LOG and (log := worker_log(folder, rank)).exists():
        explained.remedy = f"its log is {log}"
    return explained


def alive_nodes() -> set[str]:
    """The ids of the nodes that Ray takes for alive."""
    import ray

    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}


def lost_nodes(before: Container[str]) -> list[str]:
    """Addresses of the nodes that were alive `before`, or that Ray still takes for alive, and are no more: it notices after many seconds
    what a connection that is refused tells at once."""
    import ray

    return [node["NodeManagerAddress"] for node in ray.nodes()
            if (node["Alive"] or node["NodeID"] in before) and not (node["Alive"] and _answers(node))]


def _answers(node: dict[str, Any]) -> bool:
    try:
        socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), ANSWER_S).close()
    except OSError:
        return False
    return True


def peer_lost(error: BaseException) -> bool:
    """Whether a collective operation failed because another rank has gone."""
    return any(text in str(error) for text in PEER_LOST)


def timed_out(error: BaseException) -> bool:
    """Whether a collective operation failed because another rank did not come to it."""
    text = str(error).lower()
    return "application timeout" in text or ("timed out" in text and ("gloo" in text or "nccl" in text))


def _explain(error: BaseException, process: str) -> tuple[int, DistlmError]:
    """(how little it tells, the error of ours), of what `process` ended by."""
    import ray.exceptions

    error = getattr(error, "_base_exc", error)
    cause = getattr(error, "cause", None)
    if isinstance(error, ray.exceptions.RayTaskError) and isinstance(cause, BaseException):
        return _explain(cause, process)
    if isinstance(failure := getattr(error, "health_check_failure", None), BaseException):
        return _explain(failure, process)                  # Ray Train was polling the worker when it ended
    line = next((text for text in reversed(str(error).splitlines()) if text.strip()), type(error).__name__).strip()[:300]
    if isinstance(error, DistlmError):
        return int(REMOVED in error.message), error        # the other rank's error says why
    if out_of_memory(error):
        return 1, TrainError(f"out of memory: {line}", remedy="lower batch.micro_sequences, or raise sharding.zero", cause="oom")
    if library := CUT_SHORT.search(str(error)):
        return 1, TrainError(f"{library[1]} was cut short as it was compiled", cause="storage", remedy="delete it: it is compiled anew")
    if isinstance(error, ray.exceptions.NodeDiedError) or (isinstance(error, ray.exceptions.RayActorError)
                                                          and "node has died" in str(error).lower()):
        return 2, TrainError(f"a node was lost: {line}", cause="node_lost")
    if isinstance(error, ray.exceptions.RayActorError | ray.exceptions.WorkerCrashedError):
        return 3, TrainError(f"{process} ended unexpectedly", cause="worker_died", remedy=RAYS_LOG)
    if peer_lost(error):
        return 4, TrainError(f"a worker lost another: {line}", cause="worker_died")
    if timed_out(error):
        return 4, TrainError(f"a worker stopped answering: {line}", cause="hang")
    if type(error).__name__ == "WorkerHealthCheckTimeoutError":
        return 4, TrainError(f"a worker stopped answering: {str(error).splitlines()[0]}", cause="hang")
    if type(error).__name__ == "WorkerGroupStartupTimeoutError":
        return 5, ClusterError(f"the workers could not be started in time: {line}", cause="timeout",
                               remedy="see `distlm cluster status` for what the cluster is busy with")
    return 6, TrainError(f"{type(error).__name__}: {line}", cause="internal")
