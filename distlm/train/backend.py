"""Ray Train for the ranks of a run, without the processes that a run has no use for: each takes seconds of a core to start, 200 MB, and
wakes up a hundred times a second while steps go on. Imports Ray, and PyTorch in the ranks alone, not in the controller."""

import contextlib
import importlib
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray._raylet import PlacementGroupID
from ray.exceptions import GetTimeoutError
from ray.train.backend import Backend, BackendConfig
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.util import placement_group_table, remove_placement_group
from ray.util.placement_group import PlacementGroup

from distlm.train import drain, preempt

SHUTDOWN_S = 30
"""So long the controller waits for ranks that leave their process group."""
ABORT_S = 2
"""So long an interrupted driver waits for its controller to end the ranks, before it ends both."""
logger = logging.getLogger(__name__)


class RankBackend(Backend):
    """The ranks' process group of PyTorch, and what only the main thread of a worker may do: the training function runs on another."""

    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        world = len(worker_group)
        address, port = ray.get([worker_group.execute_single_async(rank, meet, rank) for rank in range(world)])[0]
        ray.get([worker_group.execute_single_async(rank, join, backend_config, rank, world, address, port) for rank in range(world)])
        drain.write_nodes(backend_config.run, worker_group.execute(drain.node_id))

    def on_shutdown(self, worker_group: Any, backend_config: Any) -> None:
        try:
            ray.get(worker_group.execute_async(leave, len(worker_group)), timeout=SHUTDOWN_S)
        except GetTimeoutError:                            # Ray Train ends their processes
            logger.warning("the ranks did not leave their process group within %d s", SHUTDOWN_S)


@dataclass
class RankConfig(BackendConfig):
    """`group` is "nccl" or "gloo", whose operations end after `timeout_s`. On which nodes the ranks are is written to the run's folder,
    `run`."""

    group: str
    timeout_s: int
    run: Path

    @property
    def backend_cls(self) -> type[Backend]:
        return RankBackend


_stores: list[Any] = []
"""Of rank 0, between `meet` and `join`."""


def meet(rank: int) -> tuple[str, int]:
    """In a worker's process: load what `join` needs, which takes seconds, and where this is rank 0, begin the store at which all meet.
    Returns its address and port. A port that is chosen and left again may be another process's when it is needed."""
    from torch.distributed import TCPStore

    importlib.import_module("ray.train.torch.config")
    address = ray.util.get_node_ip_address()
    if rank:
        return address, 0
    # PyTorch's rendezvous of this process, `env://`, takes a store of several tenants at that port, and makes none
    _stores[:] = [store := TCPStore(address, 0, is_master=True, wait_for_workers=False, multi_tenant=True)]
    return address, store.port


def join(config: RankConfig, rank: int, world: int, address: str, port: int) -> None:
    """In a worker's process: be `rank` of `world`, which meet at `address` and `port`, and take SIGTERM as a request."""
    from ray.train.torch import config as torch_config

    os.environ.update(MASTER_ADDR=address, MASTER_PORT=str(port))
    torch_config._set_torch_distributed_env_vars()
    torch_config._setup_torch_process_group(backend=config.group, world_rank=rank, world_size=world, init_method="env://",
                                            timeout_s=config.timeout_s)
    _stores.clear()
    preempt.install()


def leave(world: int) -> None:
    """In a worker's process: leave the process group, if there are others in it, and free what PyTorch keeps of a GPU's memory."""
    from ray.train.torch import config as torch_config

    torch_config._shutdown_torch(destroy_process_group=world > 1)


class Trainer(DataParallelTrainer):
    """Without the actor that divides datasets among workers, which the driver has done by `corpus.blocks.plan_streams`, and without the one
    that waits for the controller's death to give back what it had reserved, where the driver can do that: `given_back`. Ctrl-C raises
    KeyboardInterrupt, as it does elsewhere, and the ranks end before; Ray Train's own handler ends the process by SystemExit, or loses it
    where no rank is there yet."""

    _controller: Any = None

    def fit(self) -> Any:
        try:
            return super().fit()
        except KeyboardInterrupt:
            with contextlib.suppress(Exception):           # it has ended by that, or is busy, or not there yet
                ray.get(self._controller.abort.remote(), timeout=ABORT_S)
            with contextlib.suppress(Exception):
                ray.kill(self._controller)
            raise

    def _register_sigint_handler(self, controller: Any) -> None:
        self._controller = controller

    def _create_default_callbacks(self) -> list[Any]:
        without = (DatasetsCallback, PlacementGroupCleanerCallback) if drives() else DatasetsCallback
        return [callback for callback in super()._create_default_callbacks() if not isinstance(callback, without)]


def drives() -> bool:
    """Whether this process is a job's driver, at whose end Ray gives back all that the job has reserved. The trial of a sweep is an actor,
    and may end long before the job does."""
    mode: int = ray.get_runtime_context().worker.mode
    return mode == ray.SCRIPT_MODE


@contextlib.contextmanager
def given_back(told: Callable[[str], None]) -> Iterator[None]:
    """At the end of the block remove the placement groups that this job has made in it, and not removed: Ray keeps what a controller
    reserved that was killed until the job ends, and the next controller would wait for it. A driver has one such block at a time; where
    this process is none, it does nothing. `told` hears why it could not."""
    if not drives():
        yield
        return
    before = reserved()
    try:
        yield
    finally:
        try:
            for name in reserved() - before:
                remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(name))))
        except Exception as error:                         # the cluster may have gone, which is not to hide why the block has ended
            told(f"what the workers had reserved is not given back: {type(error).__name__}: {error}"[:300])


def reserved() -> set[str]:
    """The placement groups of this job."""
    job = ray.get_runtime_context().get_job_id()           # an id ends with that of the job which made it
    return {name for name, group in placement_group_table().items() if name.endswith(job) and group["state"] != "REMOVED"}
