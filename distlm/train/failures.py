"""Why a worker group ended: Ray's exceptions to one error with a cause."""

from distlm.errors import ClusterError, DistlmError, TrainError

PEER_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Connection refused", "remote process exited",
             "NCCL communicator was aborted")


def diagnose(error: BaseException) -> DistlmError:
    """The error of ours that tells most: our own one from a rank first, then a lost node, a killed worker, memory, the rest.

    A rank that survives another reports a broken connection: that counts as a worker that died.
    """
    found = sorted((_explain(inner) for inner in _causes(error)), key=lambda pair: pair[0])
    return found[0][1]


def peer_lost(error: BaseException) -> bool:
    """Whether a collective operation failed because another rank has gone."""
    return any(text in str(error) for text in PEER_LOST)


def _causes(error: BaseException) -> list[BaseException]:
    failures = getattr(error, "worker_failures", None) or {}
    inner = list(failures.values()) or [getattr(error, "controller_failure", None) or error]
    return [getattr(item, "_base_exc", item) for item in inner]


def _explain(error: BaseException) -> tuple[int, DistlmError]:
    import ray.exceptions

    cause = getattr(error, "cause", None)
    if isinstance(error, ray.exceptions.RayTaskError) and isinstance(cause, BaseException):
        return _explain(cause)
    if isinstance(failure := getattr(error, "health_check_failure", None), BaseException):
        return _explain(failure)                           # Ray Train was polling the worker when it ended
    line = next((text for text in reversed(str(error).splitlines()) if text.strip()), type(error).__name__).strip()[:300]
    if isinstance(error, DistlmError):
        return 0, error
    if isinstance(error, ray.exceptions.OutOfMemoryError) or type(error).__name__ == "OutOfMemoryError":
        return 1, TrainError(f"out of memory: {line}", remedy="lower batch.micro_sequences, or raise sharding.zero", cause="oom")
    if isinstance(error, ray.exceptions.NodeDiedError) or (isinstance(error, ray.exceptions.RayActorError)
                                                          and "node has died" in str(error).lower()):
        return 2, TrainError(f"a node was lost: {line}", cause="node_lost")
    if isinstance(error, ray.exceptions.RayActorError | ray.exceptions.WorkerCrashedError):
        return 3, TrainError("a worker process ended unexpectedly", cause="worker_died", remedy="its log is in Ray's log folder")
    if peer_lost(error):
        return 4, TrainError(f"a worker lost another: {line}", cause="worker_died")
    if "timed out" in str(error).lower() and "gloo" in str(error).lower():
        return 4, TrainError(f"a worker stopped answering: {line}", cause="hang")
    if type(error).__name__ == "WorkerHealthCheckTimeoutError":
        return 4, TrainError(f"a worker stopped answering: {str(error).splitlines()[0]}", cause="hang")
    if type(error).__name__ == "WorkerGroupStartupTimeoutError":
        return 5, ClusterError(f"the workers could not be started in time: {line}", cause="timeout",
                               remedy="see `distlm cluster status` for what the cluster is busy with")
    return 6, TrainError(f"{type(error).__name__}: {line}", cause="internal")
