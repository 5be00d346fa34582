"""What rank 0 writes while it trains: metrics.jsonl and TensorBoard."""

import time
from typing import Any

from distlm.runs import RunFolder
from distlm.train.recipe import Recipe


class MetricsWriter:
    """Appends a record per step. After a resume, what lies beyond the checkpoint has been trimmed by the driver."""

    def __init__(self, folder: RunFolder, recipe: Recipe, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._folder, self._recipe = folder, recipe
        self._board: Any = SummaryWriter(str(folder.path / "tensorboard"), purge_step=first_step + 1 if first_step else None)

    def start(self, val_loss: float | None) -> None:
        """Record step 0: the loss of the untrained model."""
        if val_loss is not None:
            self._folder.metrics({"step": 0, "val_loss": val_loss, "time": time.time()})
            self._board.add_scalar("loss/val", val_loss, 0)

    def step(self, done: int, loss: float, rate: float, norm: float, seconds: float, val_loss: float | None,
             num_targets: int, limit: float | None = None, skipped: bool = False) -> None:
        """Record a step: mean loss in nats, learning rate, gradient norm before clipping, seconds of the step alone, tokens that gave loss
        where not all do; of a loss spike the limit that it is above, and whether its update was left out."""
        tokens = self._recipe.tokens_per_step
        record = {"step": done, "loss": loss, "lr": rate, "grad_norm": norm, "tokens": done * tokens, "tokens_per_s": tokens / seconds,
                  "time": time.time(), **({} if val_loss is None else {"val_loss": val_loss}),
                  **({"loss_tokens": num_targets} if self._recipe.marked else {}),
                  **({} if limit is None else {"spike_above": limit, "skipped": skipped})}
        self._folder.metrics(record)
        if limit is not None:
            self._folder.event("note", "loss_spike", f"the loss is {loss:.4g} at step {done}, above {limit:.4g}: "
                                                     f"{'no update was made' if skipped else 'only noted'}", step=done)
        for name, value in (("loss/train", loss), ("loss/val", val_loss), ("optimizer/lr", rate), ("optimizer/grad_norm", norm),
                            ("speed/tokens_per_s", tokens / seconds)):
            if value is not None:
                self._board.add_scalar(name, value, done)

    def close(self) -> None:
        self._board.close()
