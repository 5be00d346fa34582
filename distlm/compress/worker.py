"""The worker of a compression: a process with the model as it was, and then with what was made of it. So are a student and its teacher
measured too, or a model that was mended after pruning.
"""

from pathlib import Path
from typing import Any

from distlm.evaluate.task import Task
from distlm.evaluate.worker import Worker, default_threads
from distlm.spec import CompressSpec
from distlm.train.totals import Sums


class Sides:
    """Models in one process: the same windows, arithmetic and threads for all. Each is loaded first, and scored and measured then."""

    def __init__(self, task: Task, device: str, dtype: str, threads: int | None, log: Path | None = None) -> None:
        """Without `threads`, as many as this node has cores."""
        self.task, self.device, self.dtype, self.log = task, device, dtype, log
        self.threads = threads or default_threads(1)
        self.sides: dict[str, Worker] = {}

    def add(self, side: str, folder: Path) -> None:
        """Load a model. Raises what `evaluate.worker.Worker.load` does."""
        worker = Worker(self.task, self.device, self.dtype, self.threads, None if self.sides else self.log)
        worker.load(folder)
        self.sides[side] = worker

    def score(self, side: str, batch: int) -> Sums:
        """The sums of a batch by one of the models."""
        return self.sides[side].score(batch)

    def measure(self, rounds: int = 5) -> dict[str, dict[str, float]]:
        """Speeds, bytes and parameters of all; parameters are those of a model that is not quantized."""
        from distlm.compress.speed import file_bytes, held_bytes, speeds
        from distlm.evaluate.task import context_of
        from distlm.model.build import parameter_sizes

        contexts = [context_of(side.folder) or 512 for side in self.sides.values()]
        found = speeds({name: side.model for name, side in self.sides.items()}, min(contexts), rounds)
        for name, side in self.sides.items():
            found[name] |= {"bytes": file_bytes(side.folder), "memory_bytes": held_bytes(side.model),
                            "parameters": sum(parameter_sizes(side.model.config).values())}
        return found


class Compressor(Sides):
    """See the module. `load` comes first, then `compress`."""

    def __init__(self, spec: CompressSpec, task: Task, source: Path, target: Path, log: Path | None = None) -> None:
        dtype = spec.dtype if spec.dtype != "auto" else "bf16" if spec.gpus else "fp32"
        super().__init__(task, "cuda" if spec.gpus else "cpu", dtype, spec.threads, log)
        self.spec, self.source, self.target = spec, source, target

    def load(self) -> None:
        """The model as it was, `before`. Raises what `add` does."""
        self.add("before", self.source)

    def compress(self, lineage: dict[str, Any]) -> dict[str, Any]:
        """Write what is made of it, in the precision of its files, and load that, `after`. Returns what was done, for the records. Raises
        InputError where it cannot be done."""
        import torch

        from distlm.compress.methods import compress
        from distlm.model.build import load_model
        from distlm.model.export import export_model, stored_dtype

        model: Any = load_model(self.source, f"model: {self.source}", stored_dtype(self.source), exact=False).requires_grad_(False)
        with torch.no_grad():
            done = compress(model, self.spec, self.task)
        export_model(model, None, self.source, self.target, {**lineage, "compression": done})
        del model
        self.add("after", self.target)
        return done
