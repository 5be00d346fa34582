"""The blocks of a plan as streams of Ray Data: one task reads each. It needs Ray, which `corpus.stream` does not.

    with plan_streams(plan, first_step=120, tasks=2) as streams:
        ...                                                # rank r iterates over streams[r], in whatever process
"""

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import ray
import ray.data
from ray.data.block import Block, BlockAccessor, BlockMetadata
from ray.data.datasource import Datasource, ReadTask

from distlm.corpus.manifest import read_manifest
from distlm.corpus.stream import Plan, read_block


@contextlib.contextmanager
def plan_streams(plan: Plan, first_step: int, tasks: int) -> Iterator[list[ray.data.DataIterator]]:
    """A stream for each rank, until the block ends, of the blocks from `first_step` on, in order, block j for rank j mod world, of which
    `tasks` are read at a time. Each task is a process that Ray starts first, seconds of a core."""
    blocks = Blocks(plan, first_step)
    dataset = ray.data.read_datasource(blocks, num_cpus=0.25, concurrency=tasks, override_num_blocks=len(blocks.chunks) * plan.world)
    dataset.context.enable_progress_bars = False
    dataset.context.execution_no_progress_timeout_s = -1   # a step may be slower than Ray's idea of progress
    dataset.context.execution_options = ray.data.ExecutionOptions(preserve_order=True)
    streams: list[Any] = dataset.streaming_split(plan.world, equal=True)       # begins as an actor's process at once
    try:
        yield streams
    finally:
        with contextlib.suppress(Exception):               # the cluster may have gone, which is not to hide why
            ray.kill(streams[0]._coord_actor)


class Blocks(Datasource):
    """What Ray Data reads. `chunks` are the steps of as many blocks as there are ranks."""

    def __init__(self, plan: Plan, first_step: int) -> None:
        self.plan = plan
        size = plan.chunk_steps(read_manifest(plan.corpus).context)
        self.chunks = [range(first, min(first + size, plan.num_steps)) for first in range(first_step, plan.num_steps, size)]

    def estimate_inmemory_data_size(self) -> None:
        return None

    def get_read_tasks(self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None) -> list[ReadTask]:
        """One for each block, however many Ray asks for."""
        unknown = BlockMetadata(num_rows=None, size_bytes=None, exec_stats=None, input_files=None)
        return [ReadTask(partial(_read, self.plan, steps, rank), unknown) for steps in self.chunks for rank in range(self.plan.world)]


def _read(plan: Plan, steps: range, rank: int) -> Iterator[Block]:
    yield BlockAccessor.batch_to_block(read_block(plan, steps, rank))
