"""Checkpoints are written beside the steps: each rank copies its state to the host's memory, a thread of its own writes and hashes the
files, and once all ranks have theirs, rank 0 commits.

    with Saver(engine, recipe, run, rank) as saver:
        saver.save(step, beside=True)                      # the steps stand still for a copy
        ...                                                # steps, whose exchange adds up `saver.written` over the ranks
        saver.commit()                                     # where all have written; or else
        saver.finish()                                     # wait until it is committed

All ranks make the same calls. They speak to each other on the loop's thread alone: beside a step's exchanges, those of a save could come
in another order on each rank. At most one save is on its way, and the next one waits for it.
"""

import contextlib
import copy
import hashlib
import math
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import distributed

from distlm.errors import StorageError, TrainError, out_of_memory
from distlm.storage import flush_folder, write_atomic, write_json, writing
from distlm.train import checkpoint
from distlm.train.average import Ema
from distlm.train.failures import REMOVED, peer_lost, timed_out
from distlm.train.recipe import Recipe
from distlm.train.reshard import parameter_names
from distlm.train.zero import loss_scale

Write = Callable[[Any, Path], None]
SHARED_CAUSES = ("nonfinite_loss", "loss_spike", "bad_input")
"""Of errors that all ranks end with at the same step."""
REMOVE_S = 10.0
"""How long a rank tries to take away what it could not write."""


@dataclass
class Save:
    """A checkpoint that is being made, and what it takes."""

    step: int
    path: Path
    manifest: dict[str, Any]
    beside: bool
    """Steps go on while it is written."""
    began: float
    files: list[Future[dict[str, Any]]] = field(default_factory=list)
    """This rank's, as the manifest has them."""
    commit: Future[None] | None = None
    """Where all ranks have written; done by rank 0, of no meaning elsewhere."""
    stall_s: float = 0.0
    """The steps have stood still for so long."""
    seconds: float = 0.0
    """From its begin to its marker."""
    written_s: float = 0.0
    """From its begin to the last of this rank's files."""
    alone_s: float = 0.0
    """What it takes without the wait between those and the commit, for a step that goes on beside it."""


class Saver:
    """Makes a run's checkpoints. It is left with none on its way, but where a rank has gone or cannot write: that one is not committed,
    and nothing is left of what could not be written."""

    def __init__(self, engine: Any, recipe: Recipe, run: Path, rank: int) -> None:
        self._engine, self._recipe, self._run, self._rank = engine, recipe, run, rank
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._ended = threading.Event()
        self._now: Save | None = None
        """All ranks have one or none."""
        self._done: list[Save] = []
        self._base: dict[str, str | None] | None = None    # the first commit reads it, beside the steps
        write = engine.checkpoint_engine.save
        engine.checkpoint_engine.save = lambda state_dict, path: self._put(write, state_dict, Path(path))

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        failed = error
        if error is None or (isinstance(error, TrainError) and error.cause in SHARED_CAUSES):
            try:
                self.finish()
            except (StorageError, RuntimeError) as found:
                failed = found
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._ended.set()
        if (self._now and isinstance(failed, StorageError) and failed.where.startswith(str(self._now.path)) and failed.message != REMOVED
                and self._remove(self._now)):
            failed.message += ", and what there was of it is removed"
        if error is None and failed:                       # else the first error is the one to tell
            raise failed

    def save(self, step: int, ema: Ema | None = None, recent_losses: list[float] | None = None, val_loss: float | None = None,
             due: bool = True, beside: bool = False) -> None:
        """Save the state after `step` steps, and prune. `recent_losses` are those that the next ones are judged by, `val_loss` is what the
        state comes to; one that is not `due` is made only to go on from. It is committed when this returns, but `beside` the steps. Raises
        StorageError."""
        began = time.perf_counter()
        self.finish()
        path = checkpoint.checkpoint_path(self._run, step)
        if self._rank == 0:
            with writing(path):
                shutil.rmtree(path, ignore_errors=True)
                path.mkdir(parents=True)
        distributed.barrier()
        self._now = now = Save(step, path, _manifest(self._engine, self._recipe, step, recent_losses, val_loss, due), beside, began)
        self._take(path, ema)
        now.files[-1].add_done_callback(lambda _: setattr(now, "written_s", time.perf_counter() - began))
        if not beside:
            self.finish()
        now.stall_s = time.perf_counter() - began

    def rehearse(self, folder: Path, ema: Ema | None) -> None:
        """Copy the state as a save beside the steps does, and hold the copy to the end: of its files none is written, and what DeepSpeed
        makes beside them goes to `folder`. Raises what `save` raises."""
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        self._now = Save(0, folder, {}, True, 0.0)
        self._thread.submit(self._ended.wait)              # behind which the copies lie
        self._take(folder, ema)
        self._now = None

    def _take(self, path: Path, ema: Ema | None) -> None:
        """Put each part of the state on its way to a file."""
        with _told(path):
            self._engine.save_checkpoint(str(path), tag=checkpoint.TAG, client_state={}, save_latest=False,  # calls _put
                                         exclude_frozen_parameters=self._recipe.spec.adapter is not None)
        cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else torch.empty(0, dtype=torch.uint8)
        self._put(torch.save, {"cpu": torch.get_rng_state(), "cuda": cuda}, path / f"rng-{self._rank:05d}.pt")
        if ema:
            self._put(torch.save, ema.values, path / f"ema-{self._rank:05d}.pt")

    @property
    def written(self) -> bool:
        """Whether this rank has written its part of a save that is still to be committed. Raises StorageError for what could not be
        written, as soon as that is known."""
        if self._now is None:
            return False
        if self._now.commit:
            if self._now.commit.done():
                self._now.commit.result()
            return False
        return len([file.result() for file in self._now.files if file.done()]) == len(self._now.files)

    def commit(self) -> None:
        """Let rank 0 commit what all ranks have written, on its thread."""
        now = self._now
        assert now and not now.commit
        began, mine = time.perf_counter(), [file.result() for file in now.files]
        everyone: list[Any] = [None] * self._recipe.world
        distributed.all_gather_object(everyone, mine)
        entries = [entry for entries in everyone for entry in entries]
        now.commit = self._thread.submit(self._seal, now, entries) if self._rank == 0 else Future()
        now.stall_s += time.perf_counter() - began

    def finish(self) -> None:
        """Wait until nothing is on its way."""
        if self._now is None:
            return
        if not self._now.commit:
            self.commit()
        if self._rank == 0:
            assert self._now.commit
            self._now.commit.result()
        distributed.barrier()
        self._now = None

    def done(self) -> Save | None:
        """The next one that rank 0 has committed, each once."""
        return self._done.pop(0) if self._done else None

    def _put(self, write: Write, state: Any, path: Path) -> None:
        """Let the thread write a file; where steps go on, of a copy."""
        assert self._now
        if self._now.beside:
            try:
                state = on_host(state)
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                raise TrainError(f"there is no memory for a copy of the state: {str(error).splitlines()[0]}", cause="oom",
                                 remedy="set checkpoint.asynchronous: false") from error
        file = self._thread.submit(_write, write, state, path, self._now.path)
        self._now.files.append(file)
        if not self._now.beside:
            file.result()

    def _remove(self, now: Save) -> bool:
        """Give back the room that a save takes which has failed on this rank: a disk that is full needs it. Returns whether it is gone.
        What this rank has not brought to the commit, none commits."""
        if now.commit and self._rank:
            return False
        pending: list[Future[Any]] = [one for one in (*now.files, now.commit) if one and not one.done()]
        wait(pending, timeout=60)
        deadline = time.monotonic() + REMOVE_S
        while not (now.path / checkpoint.MARKER).exists() and now.path.exists() and time.monotonic() < deadline:
            shutil.rmtree(now.path, ignore_errors=True)    # not all goes where another rank begins a file meanwhile; its next one fails
            time.sleep(0.02)
        return not now.path.exists()

    def _seal(self, now: Save, entries: list[dict[str, Any]]) -> None:
        """Manifest, then marker, then what is to go. Files that DeepSpeed has copied itself are not among `entries`."""
        began = time.perf_counter()
        with _told(now.path):
            known = {entry["file"] for entry in entries}
            more = [checkpoint.entry(file, now.path) for file in now.path.rglob("*") if file.is_file()
                    and str(file.relative_to(now.path)) not in known]
            self._base = self._base or checkpoint.base_of(self._recipe)
            files = sorted([*entries, *more], key=lambda one: one["file"])
            write_json(now.path / "manifest.json", {**now.manifest, **self._base, "files": files})
            text = (now.path / "manifest.json").read_bytes()
            write_atomic(now.path / checkpoint.MARKER, hashlib.sha256(text).hexdigest() + "\n")
            for folder in (*(path for path in now.path.rglob("*") if path.is_dir()), now.path, now.path.parent):
                flush_folder(folder)                       # before an earlier one goes
            now.seconds, now.alone_s = time.perf_counter() - now.began, now.written_s + time.perf_counter() - began
        kept = self._recipe.spec.checkpoint
        checkpoint.prune(self._run, kept.keep, kept.milestone_steps, kept.keep_best)
        self._done.append(now)


def on_host(state: Any) -> Any:
    """A copy of what a file of a checkpoint holds, tensors in the host's memory, so that it gives the same file whatever is done to the
    state: what shares storage still does."""
    copies: dict[int, Any] = {}
    storages: dict[int, torch.Tensor] = {}

    def visit(value: Any) -> None:
        if isinstance(value, torch.Tensor) and id(value) not in copies:
            storage = value.untyped_storage()
            if storage._cdata not in storages:
                whole = torch.empty(0, dtype=torch.uint8, device=value.device).set_(storage)
                storages[storage._cdata] = whole.to("cpu", copy=True)
            new = torch.empty(0, dtype=value.dtype).set_(storages[storage._cdata].untyped_storage(), value.storage_offset(), value.shape,
                                                         value.stride())
            if isinstance(value, torch.nn.Parameter):
                new = torch.nn.Parameter(new, value.requires_grad)
            copies[id(value)] = new.requires_grad_(value.requires_grad)
            visit(value.__dict__)                          # what DeepSpeed notes on a tensor is in the file too
            new.__dict__.update(copy.deepcopy(value.__dict__, copies))
        elif isinstance(value, dict | list | tuple):
            for one in value.values() if isinstance(value, dict) else value:
                visit(one)

    visit(state)
    return copy.deepcopy(state, copies)


def _write(write: Write, state: Any, path: Path, root: Path) -> dict[str, Any]:
    with _told(root):
        write(state, path)
        return checkpoint.entry(path, root)


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    """Turn what the block fails of into a StorageError."""
    try:
        yield
    except (OSError, RuntimeError) as error:               # torch reports a full disk as a RuntimeError
        if peer_lost(error) or timed_out(error) or out_of_memory(error):
            raise                                          # no fault of the disk
        if path.parent.exists() and not path.exists():     # a rank that has met it first says why
            raise StorageError(REMOVED, where=str(path), remedy="the run goes on from the checkpoint before") from error
        raise StorageError(f"the checkpoint cannot be written: {str(error).splitlines()[0]}", where=str(path),
                           remedy="free space; the run goes on from the checkpoint before") from error


def _manifest(engine: Any, recipe: Recipe, step: int, recent_losses: list[float] | None, val_loss: float | None,
              due: bool) -> dict[str, Any]:
    """All of it but the files."""
    return {"format": 1, "step": step, "samples": recipe.sizes.before(step), "tokens": recipe.tokens(step),
            **checkpoint.facts(recipe), **({"anneal": recipe.mix.anneal} if recipe.mix and recipe.mix.final_weights else {}),
            **({} if loss_scale(engine) is None else {"loss_scale": loss_scale(engine)}),
            **({"recent_losses": recent_losses} if recent_losses else {}),
            **({"val_loss": val_loss} if val_loss is not None and math.isfinite(val_loss) else {}),
            **({} if due else {"due": False}),
            **({"parameters": parameter_names(engine)} if not engine.zero_optimization_stage() else {})}
