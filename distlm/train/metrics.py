"""What rank 0 writes while it trains: metrics.jsonl and TensorBoard."""

import re
import time
from dataclasses import dataclass, field
from typing import Any

import psutil

from distlm.runs import RunFolder
from distlm.train.flops import mfu, peak_flops
from distlm.train.recipe import Recipe
from distlm.train.saver import Save
from distlm.train.validation import arrived


@dataclass(frozen=True)
class StepResult:
    """What a step came to, the same on all ranks."""

    loss: float
    """Mean in nats per token over the global batch."""
    norm: float | None
    """Of the global gradient, before clipping; None where fp16 overflowed."""
    num_targets: int
    """Tokens that gave loss."""
    limit: float | None = None
    """What the loss should have been at most, where it is a spike."""
    skipped: bool = False
    """Weights and the optimizer's states are those from before."""
    leaving: bool = False
    """A rank has been asked to end: all save and end after this step."""
    written: bool = False
    """All ranks have written the files of a checkpoint, which can be committed."""
    beside: dict[str, float] = field(default_factory=dict)
    """What the objective measures beside the loss, by name: means over the targets."""


class MetricsWriter:
    """Appends a record per step. After a resume, what lies beyond the checkpoint has been trimmed by the driver."""

    def __init__(self, folder: RunFolder, recipe: Recipe, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._folder, self._recipe = folder, recipe
        self._peak = worker_peak(recipe.spec.precision)
        self._process = psutil.Process()
        self._board: Any = SummaryWriter(str(folder.path / "tensorboard"), purge_step=first_step + 1 if first_step else None)

    def start(self, measured: dict[str, Any], first_step: int) -> None:
        """Record what is `measured` before any step of this launch: of step 0 the loss of the untrained model, of a later one what the run
        left when it had to end; empty where nothing is evaluated."""
        if measured:
            self._folder.metrics({"step": first_step, **measured, "time": time.time()})
            self._show(measured, first_step)

    def average(self, checkpoints: list[str], measured: dict[str, Any]) -> None:
        """Record what is `measured` of the mean of the last checkpoints, which is the run's model: a second record of the last step."""
        if measured:
            self._folder.metrics({"step": self._recipe.num_steps, "averaged": checkpoints, **measured, "time": time.time()})
            self._show(measured, self._recipe.num_steps)

    def arrived(self) -> None:
        """Record what a worker of its own has measured of checkpoints since."""
        for record in arrived(self._folder):
            self._folder.metrics(record)
            self._show(record, record["step"])

    def step(self, done: int, result: StepResult, rate: float, phases: dict[str, float], measured: dict[str, Any],
             loss_scale: float | None = None, save: Save | None = None) -> None:
        """Record a step: its loss, the gradient's norm before clipping, tokens that gave loss where not all do; of a spike the limit that
        it is above, and whether there was no update. With them learning rate, the seconds of the step alone, `step_s`, and those of its
        phases on rank 0, fp16's loss scale after it, its memory, and its MFU where the processor's peak is known. `measured` is what an
        evaluation after it found, empty without one. Of pairs, whose padding is not computed, tokens a second and MFU count `pair_tokens`,
        those of a pair on average. `save` is a checkpoint that has been committed since the step before: its step, its seconds from begin
        to marker, those for which the steps stood still, and those that it takes where it waits for no step."""
        seconds = phases["step_s"]
        tokens, targets = self._recipe.tokens_of(done - 1), "pairs" if self._recipe.spec.objective == "dpo" else "loss_tokens"
        if "pair_tokens" in result.beside:
            tokens = round(result.beside["pair_tokens"] * result.num_targets)
        record = {"step": done, "loss": result.loss, "lr": rate, **({} if result.norm is None else {"grad_norm": result.norm}),
                  **({"skipped": True} if result.skipped else {}), **({} if result.limit is None else {"spike_above": result.limit}),
                  **({} if loss_scale is None else {"loss_scale": loss_scale}), "tokens": self._recipe.tokens(done),
                  "tokens_per_s": tokens / seconds, **phases, "memory_bytes": self._memory(), **({} if self._peak is None else {
                      "mfu": mfu(tokens / seconds, self._recipe.flops_per_token, self._peak * self._recipe.world)}),
                  "time": time.time(), **measured, **result.beside,
                  **({targets: result.num_targets} if self._recipe.marked else {}),
                  **({} if save is None else {"checkpoint": save.step, "checkpoint_s": save.seconds, "checkpoint_stall_s": save.stall_s,
                                            "checkpoint_alone_s": save.alone_s})}
        self._folder.metrics(record)
        if result.limit is not None:
            self._folder.event("note", "loss_spike", f"the loss is {result.loss:.4g} at step {done}, above {result.limit:.4g}: "
                                                     f"{'no update was made' if result.skipped else 'only noted'}", step=done)
        for prefix, values in (("train", result.beside), ("phases", phases)):
            for name, each in values.items():
                self._board.add_scalar(f"{prefix}/{name}", each, done)
        for name, value in (("loss/train", result.loss), ("optimizer/lr", rate),
                            ("optimizer/grad_norm", result.norm), ("optimizer/loss_scale", loss_scale),
                            ("speed/tokens_per_s", tokens / seconds), ("speed/mfu", record.get("mfu")),
                            ("memory/bytes", record["memory_bytes"]), ("checkpoint/seconds", record.get("checkpoint_s")),
                            ("checkpoint/stall_seconds", record.get("checkpoint_stall_s"))):
            if value is not None:
                self._board.add_scalar(name, value, done)
        self._show(measured, done)

    def _show(self, measured: dict[str, Any], done: int) -> None:
        for name, value in measured.items():
            if isinstance(value, int | float) and name not in ("step", "time"):
                self._board.add_scalar("loss/val" if name == "val_loss" else f"val/{name.removeprefix('val_')}", value, done)
        for name, value in by_source(measured).items():
            self._board.add_scalar(name, value, done)

    def _memory(self) -> int:
        """Of rank 0: the most that its GPU has held, or what the process holds now."""
        import torch

        return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else self._process.memory_info().rss

    def close(self) -> None:
        self._board.close()


def by_source(record: dict[str, Any]) -> dict[str, float]:
    """What a record has of each corpus and source, as `val_loss/CORPUS/SOURCE`, in characters that TensorBoard and MLflow take."""
    return {re.sub(r"[^\w./ -]", "_", f"val_{name}/{source.replace(': ', '/')}"): value
            for source, found in record.get("val_by_source", {}).items() for name, value in found.items()}


def worker_peak(precision: str) -> float | None:
    """Operations a second of this process's GPU, None on a CPU and for a GPU that the table does not know: no peak is measured, which would
    cost time and tell more about the machine's other work than about the run."""
    import torch

    return peak_flops(torch.cuda.get_device_name(), precision) if torch.cuda.is_available() else None
