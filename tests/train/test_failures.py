"""The cause of an end is the one that a person would name."""

from pathlib import Path

import pytest
import ray.exceptions
import torch
from ray.train import WorkerGroupError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError, WorkerHealthCheckTimeoutError

from distlm.errors import CheckpointError, StorageError
from distlm.train.failures import diagnose

GLOO = RuntimeError("[pair.cc:537] Read error [127.0.0.1]:1: Connection reset by peer. This is typically caused by a remote worker")


def too_much() -> RuntimeError:
    """What PyTorch says where the host has no such memory."""
    with pytest.raises(RuntimeError) as error:
        torch.empty(10**14)
    return error.value


@pytest.mark.parametrize(("failures", "cause"), [
    ({0: ray.exceptions.ActorDiedError()}, "worker_died"),
    ({0: GLOO}, "worker_died"),
    ({0: WorkerHealthCheckFailedError("A worker health check failed.", ray.exceptions.ActorDiedError())}, "worker_died"),
    ({0: WorkerHealthCheckTimeoutError("A worker health check has been hanging for 600 seconds.")}, "hang"),
    ({0: GLOO, 1: StorageError("the checkpoint cannot be written")}, "storage"),
    ({0: GLOO, 1: ray.exceptions.ActorDiedError()}, "worker_died"),
    ({0: ray.exceptions.RayActorError(error_msg="The actor died because its node has died.")}, "node_lost"),
    ({0: ray.exceptions.OutOfMemoryError("killed"), 1: GLOO}, "oom"),
    ({0: too_much(), 1: GLOO}, "oom"),
    ({0: MemoryError()}, "oom"),
    ({0: RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")}, "oom"),
    ({0: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")}, "oom"),
    ({0: OSError(12, "Cannot allocate memory")}, "oom"),
    ({0: ValueError("a bug")}, "internal"),
    ({0: RuntimeError("mat1 and mat2 shapes cannot be multiplied")}, "internal"),
    ({0: CheckpointError("damaged")}, "storage")])
def test_the_cause_is_what_came_first(failures: dict[int, Exception], cause: str) -> None:
    assert diagnose(WorkerGroupError("failed", failures)).cause == cause


def test_the_log_of_the_rank_that_died_is_named_where_there_is_one(tmp_path: Path) -> None:
    error = WorkerGroupError("failed", {0: GLOO, 1: ray.exceptions.ActorDiedError()})
    assert diagnose(error, tmp_path).remedy == "its log is in Ray's log folder"
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "worker-1.log").touch()
    assert diagnose(error, tmp_path).remedy == f"its log is {tmp_path}/logs/worker-1.log"


def test_ours_comes_through_as_it_was() -> None:
    error = StorageError("full", where="/x", remedy="free space")
    assert diagnose(WorkerGroupError("failed", {0: GLOO, 1: error})) is error
