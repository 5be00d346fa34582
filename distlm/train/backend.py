"""Ray Train for the ranks of a run, without the processes that a run has no use for: each takes seconds of a core to start, 200 MB, and
wakes up a hundred times a second while steps go on. Imports Ray, and PyTorch in the ranks alone, not in the controller."""

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError
from ray.train._internal.utils import get_address_and_port
from ray.train.backend import Backend, BackendConfig
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.util import placement_group_table, remove_placement_group
from ray.util.placement_group import PlacementGroup

from distlm.train import drain, preempt

SHUTDOWN_S = 30
"""So long the controller waits for ranks that leave their process group."""


class RankBackend(Backend):
    """The ranks' process group of PyTorch, and what only the main thread of a worker may do: the training function runs on another."""

    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        address, port = worker_group.execute_single(0, get_address_and_port)
        world = len(worker_group)
        ray.get([worker_group.execute_single_async(rank, join, backend_config, rank, world, address, port) for rank in range(world)])
        drain.write_nodes(backend_config.run, worker_group.execute(drain.node_id))

    def on_shutdown(self, worker_group: Any, backend_config: Any) -> None:
        with contextlib.suppress(GetTimeoutError):         # Ray Train ends their processes
            ray.get(worker_group.execute_async(leave, len(worker_group)), timeout=SHUTDOWN_S)


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


def join(config: RankConfig, rank: int, world: int, address: str, port: int) -> None:
    """In a worker's process: be `rank` of `world`, which meet at `address` and `port`, and take SIGTERM as a request."""
    from ray.train.torch import config as torch_config

    os.environ.update(MASTER_ADDR=address, MASTER_PORT=str(port))
    torch_config._set_torch_distributed_env_vars()
    torch_config._setup_torch_process_group(backend=config.group, world_rank=rank, world_size=world, init_method="env://",
                                            timeout_s=config.timeout_s)
    preempt.install()


def leave(world: int) -> None:
    """In a worker's process: leave the process group, if there are others in it."""
    from ray.train.torch import config as torch_config

    torch_config._shutdown_torch(destroy_process_group=world > 1)


class Trainer(DataParallelTrainer):
    """Without the actor that divides datasets among workers, which the driver has done by `corpus.blocks.plan_streams`, and without the one
    that waits for the controller's death to give back what it had reserved, where the driver can do that: `give_back`."""

    def _create_default_callbacks(self) -> list[Any]:
        without = (DatasetsCallback, PlacementGroupCleanerCallback) if drives() else DatasetsCallback
        return [callback for callback in super()._create_default_callbacks() if not isinstance(callback, without)]


def drives() -> bool:
    """Whether this process is a job's driver, at whose end Ray gives back all that the job has reserved. The trial of a sweep is an actor,
    and may end long before the job does."""
    return ray.get_runtime_context().get_actor_id() is None


def reserved() -> set[str]:
    """The placement groups of this job."""
    job = ray.get_runtime_context().get_job_id()           # an id ends with that of the job which made it
    return {name for name, group in placement_group_table().items() if name.endswith(job) and group["state"] != "REMOVED"}


def give_back(groups: set[str]) -> None:
    """Remove placement groups: Ray keeps what a controller reserved that was killed until the job ends, and the next would wait for it."""
    from ray._raylet import PlacementGroupID

    for name in groups:
        remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(name))))
