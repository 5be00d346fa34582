"""Ray Train for PyTorch, with what only the main thread of a worker may do, and without what a run has no use for. Imports Ray."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback

from distlm.train import drain, preempt


@dataclass
class RankConfig(TorchConfig):
    """The process group, and a handler for SIGTERM: the training function itself runs on another thread. On which nodes the ranks are is
    written to the run's folder, `run`."""

    run: Path = Path()

    @property
    def backend_cls(self) -> Any:
        class RankBackend(super().backend_cls):  # type: ignore[misc]
            def on_start(self, worker_group: Any, backend_config: Any) -> None:
                super().on_start(worker_group, backend_config)
                worker_group.execute(preempt.install)
                drain.write_nodes(backend_config.run, worker_group.execute(drain.node_id))

        return RankBackend


class Trainer(TorchTrainer):
    """Without the actor that divides datasets among workers, a process that takes seconds of a core to start: the driver has divided its
    own by `corpus.blocks.plan_streams`, beside the start of the workers."""

    def _create_default_callbacks(self) -> list[Any]:
        return [callback for callback in super()._create_default_callbacks()  # type: ignore[misc]
                if not isinstance(callback, DatasetsCallback)]
