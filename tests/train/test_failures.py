"""The cause of an end is the one that a person would name."""

import ctypes
import threading
from datetime import timedelta
from pathlib import Path

import pytest
import ray.exceptions
import torch
from ray.train import WorkerGroupError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError, WorkerHealthCheckTimeoutError
from torch import distributed

from distlm.errors import CheckpointError, StorageError
from distlm.train.failures import REMOVED, diagnose
from distlm.train.saver import _told

GLOO = RuntimeError("[pair.cc:537] Read error [127.0.0.1]:1: Connection reset by peer. This is typically caused by a remote worker")


def too_much() -> RuntimeError:
    """What PyTorch says where the host has no such memory."""
    with pytest.raises(RuntimeError) as error:
        torch.empty(10**14)
    return error.value


def timeout() -> RuntimeError:
    """What gloo says where the other rank does not come."""
    groups, store = dict[int, distributed.ProcessGroupGloo](), distributed.HashStore()

    def join(rank: int) -> None:
        groups[rank] = distributed.ProcessGroupGloo(store, rank, 2, timedelta(seconds=0.5))

    threads = [threading.Thread(target=join, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    with pytest.raises(RuntimeError) as error:
        groups[0].barrier().wait()
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
    ({0: timeout()}, "hang"),
    ({0: RuntimeError("Application timeout caused pair closure")}, "hang"),
    ({0: too_much(), 1: GLOO}, "oom"),
    ({0: MemoryError()}, "oom"),
    ({0: RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")}, "oom"),
    ({0: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")}, "oom"),
    ({0: OSError(12, "Cannot allocate memory")}, "oom"),
    ({0: ValueError("a bug")}, "internal"),
    ({0: RuntimeError("mat1 and mat2 shapes cannot be multiplied")}, "internal"),
    ({0: StorageError(REMOVED)}, "storage"),
    ({0: CheckpointError("damaged")}, "storage")])
def test_the_cause_is_what_came_first(failures: dict[int, Exception], cause: str) -> None:
    assert diagnose(WorkerGroupError("failed", failures)).cause == cause


def test_the_log_of_the_rank_that_died_is_named_where_there_is_one(tmp_path: Path) -> None:
    error = WorkerGroupError("failed", {0: GLOO, 1: ray.exceptions.ActorDiedError()})
    assert diagnose(error, tmp_path).remedy == "its log is in Ray's log folder"
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "worker-1.log").touch()
    assert diagnose(error, tmp_path).remedy == f"its log is {tmp_path}/logs/worker-1.log"


def test_what_no_rank_failed_of_is_not_laid_to_one(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "worker-0.log").touch()
    found = diagnose(ray.exceptions.ActorDiedError(), tmp_path, "Ray Train's controller")
    assert (found.message, found.cause, found.remedy) == ("Ray Train's controller ended unexpectedly", "worker_died",
                                                          "its log is in Ray's log folder")
    assert diagnose(ray.exceptions.OutOfMemoryError("killed"), tmp_path).cause == "oom"


def test_ours_comes_through_as_it_was() -> None:
    error = StorageError("full", where="/x", remedy="free space")
    assert diagnose(WorkerGroupError("failed", {0: GLOO, 1: error})) is error
    assert diagnose(WorkerGroupError("failed", {0: StorageError(REMOVED), 1: error})) is error


@pytest.mark.parametrize("error", [GLOO, timeout(), too_much()])
def test_what_is_no_fault_of_the_disk_is_not_told_as_one(error: RuntimeError, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError) as told, _told(tmp_path):
        raise error
    assert told.value is error
    with pytest.raises(StorageError, match=f"{tmp_path}: the checkpoint cannot be written: file write failed; free space"), _told(tmp_path):
        raise RuntimeError("file write failed")
    with pytest.raises(StorageError, match="another rank could not write it, and has removed it"), _told(tmp_path / "gone"):
        (tmp_path / "gone" / "shard").write_bytes(b"x")


def test_a_library_that_was_cut_short_as_it_was_compiled_is_named(tmp_path: Path) -> None:
    path = tmp_path / "kernel.so"
    path.write_bytes(b"\x7fELF")
    with pytest.raises(OSError) as error:
        ctypes.CDLL(str(path))
    compiler = RuntimeError(f"InductorError: {error.value}\n\nSet TORCHDYNAMO_VERBOSE=1 for the internal stack trace")
    found = diagnose(WorkerGroupError("failed", {0: GLOO, 1: compiler}))
    assert (found.cause, found.message) == ("storage", f"{path} was cut short as it was compiled")
    assert found.remedy == "delete it: it is compiled anew"
