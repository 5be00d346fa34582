"""What rank 0 writes while it trains: metrics.jsonl and TensorBoard."""

import time
from typing import Any

import psutil

from distlm.runs import RunFolder
from distlm.train.flops import mfu, peak_flops
from distlm.train.recipe import Recipe


class MetricsWriter:
    """Appends a record per step. After a resume, what lies beyond the checkpoint has been trimmed by the driver."""

    def __init__(self, folder: RunFolder, recipe: Recipe, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._folder, self._recipe = folder, recipe
        self._peak = worker_peak(recipe.spec.precision)
        self._process = psutil.Process()
        self._board: Any = SummaryWriter(str(folder.path / "tensorboard"), purge_step=first_step + 1 if first_step else None)

    def start(self, val_loss: float | None) -> None:
        """Record step 0: the loss of the untrained model."""
        if val_loss is not None:
            self._folder.metrics({"step": 0, "val_loss": val_loss, "time": time.time()})
            self._board.add_scalar("loss/val", val_loss, 0)

    def step(self, done: int, loss: float, rate: float, norm: float | None, seconds: float, val_loss: float | None,
             num_targets: int, loss_scale: float | None = None) -> None:
        """Record a step: mean loss in nats, learning rate, gradient norm before clipping, None where fp16 skipped the step, seconds of the
        step alone, tokens that gave loss where not all do, and fp16's loss scale after the step; with them its memory, and its MFU where
        the processor's peak is known."""
        tokens = self._recipe.tokens_per_step
        record = {"step": done, "loss": loss, "lr": rate, **({"skipped": True} if norm is None else {"grad_norm": norm}),
                  **({} if loss_scale is None else {"loss_scale": loss_scale}), "tokens": done * tokens, "tokens_per_s": tokens / seconds,
                  "memory_bytes": self._memory(), **({} if self._peak is None else {
                      "mfu": mfu(tokens / seconds, self._recipe.flops_per_token, self._peak * self._recipe.world)}),
                  "time": time.time(), **({} if val_loss is None else {"val_loss": val_loss}),
                  **({"loss_tokens": num_targets} if self._recipe.marked else {})}
        self._folder.metrics(record)
        for name, value in (("loss/train", loss), ("loss/val", val_loss), ("optimizer/lr", rate), ("optimizer/grad_norm", norm),
                            ("optimizer/loss_scale", loss_scale), ("speed/tokens_per_s", tokens / seconds),
                            ("speed/mfu", record.get("mfu")), ("memory/bytes", record["memory_bytes"])):
            if value is not None:
                self._board.add_scalar(name, value, done)

    def _memory(self) -> int:
        """Of rank 0: the most that its GPU has held, or what the process holds now."""
        import torch

        return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else self._process.memory_info().rss

    def close(self) -> None:
        self._board.close()


def worker_peak(precision: str) -> float | None:
    """Operations a second of this process's GPU, None on a CPU and for a GPU that the table does not know: no peak is measured, which would
    cost time and tell more about the machine's other work than about the run."""
    import torch

    return peak_flops(torch.cuda.get_device_name(), precision) if torch.cuda.is_available() else None
