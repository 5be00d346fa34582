"""The worker of a compression: a process with the model as it was, and then with what was made of it."""

from pathlib import Path
from typing import Any

from distlm.evaluate.task import Task
from distlm.evaluate.worker import Worker, default_threads
from distlm.spec import CompressSpec
from distlm.train.totals import Sums


class Compressor:
    """See the module. `load` comes first, then `compress`; what either loads can be scored afterwards."""

    def __init__(self, spec: CompressSpec, task: Task, source: Path, target: Path, log: Path | None = None) -> None:
        self.spec, self.task, self.source, self.target, self.log = spec, task, source, target, log
        self.sides: dict[str, Worker] = {}

    def load(self) -> None:
        """The model as it was. Raises what `evaluate.worker.Worker.load` does."""
        self.sides["before"] = self._loaded(self.source, self.log)

    def compress(self, lineage: dict[str, Any]) -> dict[str, Any]:
        """Write what is made of it, in the precision of its files, and load that. Returns what was done, for the records. Raises InputError
        where it cannot be done."""
        import torch

        from distlm.compress.methods import compress
        from distlm.model.build import load_model
        from distlm.model.export import export_model, stored_dtype

        model: Any = load_model(self.source, f"model: {self.source}", stored_dtype(self.source), exact=False).requires_grad_(False)
        with torch.no_grad():
            done = compress(model, self.spec, self.task)
        export_model(model, None, self.source, self.target, {**lineage, "compression": done})
        del model
        self.sides["after"] = self._loaded(self.target)
        return done

    def score(self, side: str, batch: int) -> Sums:
        """The sums of a batch by the model `before` or `after`."""
        return self.sides[side].score(batch)

    def measure(self, rounds: int = 5) -> dict[str, dict[str, float]]:
        """Speeds and bytes of both."""
        from distlm.compress.speed import file_bytes, held_bytes, speeds
        from distlm.evaluate.task import context_of

        models = {name: side.model for name, side in self.sides.items()}
        found = speeds(models, context_of(self.source) or 512, rounds)
        for name, side in self.sides.items():
            found[name] |= {"bytes": file_bytes(side.folder), "memory_bytes": held_bytes(side.model)}
        return found

    def _loaded(self, folder: Path, log: Path | None = None) -> Worker:
        dtype = self.spec.dtype if self.spec.dtype != "auto" else "bf16" if self.spec.gpus else "fp32"
        worker = Worker(self.task, "cuda" if self.spec.gpus else "cpu", dtype, self.spec.threads or default_threads(1), log)
        worker.load(folder)
        return worker
