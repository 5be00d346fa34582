"""Checkpoints that a worker of its own evaluates while the steps go on (`evaluate.worker`).

    with Validation(recipe, folder, progress) as validation:
        ...                                                # ranks train, and pick up what `arrived`
        validation.finish()                                # once they have ended: what is still to come

The driver gives each committed checkpoint for which an evaluation is due to one actor, which reads the weights alone, and lays what that
has measured into the run's folder. Rank 0 makes a record of it: while ranks train nobody else writes metrics.jsonl.
"""

import contextlib
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from distlm.errors import EvaluationError, StorageError
from distlm.progress import Progress
from distlm.runs import RunFolder
from distlm.spec.sharding import Sharding
from distlm.storage import read_json, write_atomic, write_json
from distlm.train import checkpoint
from distlm.train.checkpoint import EVALUATIONS as FOLDER
from distlm.train.failures import diagnose
from distlm.train.recipe import Recipe
from distlm.train.worker import log_to

if TYPE_CHECKING:
    import torch

LOOK_S = 0.5
"""Seconds between looks for a new checkpoint, and for an answer."""
LAST_S = 1800
"""Seconds that an evaluation may take once the run has ended, its wait for a place in the cluster included."""


def due(recipe: Recipe, done: int) -> bool:
    """Whether the worker evaluates the checkpoint after so many steps. After the last those that train do: no step waits for them."""
    return (recipe.spec.evaluate.worker is not None and done % recipe.checkpoint_every == 0 and 0 < done < recipe.num_steps
            and (done % recipe.evaluate_every == 0 or bool(recipe.spec.checkpoint.keep_best)))


def arrived(folder: RunFolder) -> Iterator[dict[str, Any]]:
    """The records that have come since, each once: it is gone from the folder when the next one is asked for."""
    for file in sorted((folder.path / FOLDER).glob("step-*.json")):
        with contextlib.suppress(StorageError):            # a network file system may be late with it
            record = read_json(file)
            yield record
            file.unlink(missing_ok=True)


def settle(folder: RunFolder, last_step: int) -> None:
    """Before ranks begin: record what has come, but for what was measured after `last_step`, from where the run goes on."""
    known = _recorded(folder)
    (folder.path / checkpoint.MEASURING).unlink(missing_ok=True)
    for record in arrived(folder):
        if record["step"] <= last_step and record["step"] not in known:
            folder.metrics(record)


def _recorded(folder: RunFolder) -> set[int]:
    return {record["step"] for record in folder.read_metrics() if not record.keys().isdisjoint(("val_loss", "samples"))}


class Validation:
    """Has checkpoints evaluated, from a thread of the driver. An evaluation that fails is noted in the events, and fails nothing else."""

    def __init__(self, recipe: Recipe, folder: RunFolder, progress: Progress) -> None:
        self._recipe, self._folder, self._progress = recipe, folder, progress
        self._log = folder.path / "logs" / "evaluation.log"
        self._measured = _recorded(folder)
        self._failed: Counter[tuple[str, int]] = Counter()
        """How often, by the name of a checkpoint and the time of its marker: one that is made again is another."""
        self._worker: Any = None
        self._ending, self._stopped = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True, name="validation")

    def __enter__(self) -> "Validation":
        if self._recipe.spec.evaluate.worker:
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stopped.set()
        self._ending.set()
        if self._thread.is_alive():
            self._thread.join(timeout=10)

    def finish(self) -> None:
        """Wait for what is still to come, and record it: no rank writes any more. SIGTERM ends the wait; what is not measured then is when
        the run is taken up again."""
        if not self._recipe.spec.evaluate.worker:
            return
        if waiting := self._waiting():
            self._progress.note(f"waiting for the evaluation of {', '.join(path.name for path in waiting)}")
        self._ending.set()
        main = threading.current_thread() is threading.main_thread()
        before = signal.signal(signal.SIGTERM, lambda *_: self._stopped.set()) if main else None
        while self._thread.is_alive():
            self._thread.join(timeout=LOOK_S)              # Ctrl-C comes through
        if main:
            signal.signal(signal.SIGTERM, before)
        if any((self._folder.path / FOLDER).glob("step-*.json")):
            from distlm.train.metrics import MetricsWriter

            writer = MetricsWriter(self._folder, self._recipe, 0)
            writer.arrived()
            writer.close()
        shutil.rmtree(self._folder.path / FOLDER, ignore_errors=True)
        kept = self._recipe.spec.checkpoint
        checkpoint.prune(self._folder.path, kept.keep, kept.milestone_steps, kept.keep_best)

    def _waiting(self) -> list[Path]:
        """Checkpoints that are to be evaluated, oldest first. A worker that has died is given one once more."""
        return [path for path in checkpoint.committed(self._folder.path)
                if (step := checkpoint.step_of(path)) not in self._measured and due(self._recipe, step)
                and self._failed[path.name, checkpoint.committed_at(path)] < 2]

    def _work(self) -> None:
        try:
            while not self._stopped.is_set():
                if waiting := self._waiting():
                    self._evaluate(waiting[0], checkpoint.committed_at(waiting[0]))
                elif self._ending.is_set():
                    return
                else:
                    self._ending.wait(LOOK_S)
        finally:
            self._end_worker()

    def _evaluate(self, path: Path, committed_at: int) -> None:
        import ray

        step, key = checkpoint.step_of(path), (path.name, committed_at)
        try:
            write_atomic(self._folder.path / checkpoint.MEASURING, path.name)
            if self._worker is None:
                self._worker = self._start_worker()
            measured = self._answer(self._worker.measure.remote(path))
            if measured is not None:
                write_json(self._folder.path / FOLDER / f"{path.name}.json", {"step": step, **measured, "time": time.time()})
                self._measured.add(step)
        except Exception as error:                         # whatever it is, no step is to end for it
            found, died = diagnose(error) if isinstance(error, ray.exceptions.RayError) else error, False
            if not isinstance(error, ray.exceptions.RayTaskError):
                died = isinstance(error, ray.exceptions.RayError)
                self._end_worker()
            gone = checkpoint.committed_at(path) != committed_at
            self._failed[key] += 1 if died else 2
            again = not gone and self._failed[key] < 2
            why = "it has made room for newer ones: evaluate less often, or raise checkpoint.keep" if gone else f"{found}"
            self._progress.note(told := f"{path.name} is not evaluated{' yet' * again}: {why}")
            self._folder.event("note", "" if gone else getattr(found, "cause", "internal"), told, step=step)

    def _answer(self, reference: Any) -> dict[str, Any] | None:
        """What the worker answers; None where nobody waits for it any more. Raises what it raises, and EvaluationError where it does not
        answer in time, once the run has ended."""
        import ray

        since = None
        while not ray.wait([reference], timeout=LOOK_S)[0]:
            if self._stopped.is_set():
                return None
            if self._ending.is_set():
                since = since or time.monotonic()
                if time.monotonic() - since > LAST_S:
                    self._stopped.set()
                    raise EvaluationError(f"the worker has not answered in {LAST_S / 60:.0f} minutes", cause="timeout",
                                          remedy=f"its log is {self._log}; --resume evaluates what is left")
        found: dict[str, Any] = ray.get(reference)
        return found

    def _start_worker(self) -> Any:
        import ray

        asked = self._recipe.spec.evaluate.worker
        assert asked
        environment = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        actor = ray.remote(num_cpus=asked.cpus, num_gpus=asked.gpus, runtime_env={"env_vars": environment})(Validator)
        return actor.remote(self._recipe, self._folder.path, self._log)

    def _end_worker(self) -> None:
        import ray

        if self._worker is not None:
            with contextlib.suppress(Exception):           # the cluster may have gone
                ray.kill(self._worker)
            self._worker = None


class Validator:
    """One process with the whole model, which it gives the weights of one checkpoint after the other."""

    def __init__(self, recipe: Recipe, folder: Path, log: Path) -> None:
        log_to(log)
        import torch
        from torch import distributed

        from distlm.model.build import buffers, precision_dtype, restore_buffers
        from distlm.train.evaluate import Evaluator
        from distlm.train.model import trained_model
        from distlm.train.objectives import objective_of

        asked = recipe.spec.evaluate.worker
        assert asked
        torch.set_num_threads(max(1, int(asked.cpus)))
        self._recipe = recipe = alone(recipe)
        self._device = torch.device("cuda" if asked.gpus else "cpu")
        distributed.init_process_group("cpu:gloo,cuda:nccl" if asked.gpus else "gloo", store=distributed.HashStore(), rank=0, world_size=1)
        objective, model = objective_of(recipe.spec), trained_model(recipe, 0, self._device)
        kept = buffers(model)
        module = objective.module(model, recipe).to(self._device, precision_dtype(recipe.spec.precision))
        restore_buffers(model, kept)
        self._engine = Undivided(module)
        objective.begin(self._engine, recipe, RunFolder(folder), 0, self._device)
        self._evaluator = Evaluator(recipe, 0, self._device)

    def measure(self, path: Path) -> dict[str, Any]:
        """What `Evaluator.measure` has of a checkpoint, and the seconds that it took. Raises CheckpointError, TrainError."""
        from distlm.train.reshard import load_weights

        began = time.perf_counter()
        found = checkpoint.verified(path)
        parameters = {name: one.data for name, one in self._engine.module.named_parameters() if one.requires_grad}
        load_weights(path, found.manifest, parameters, self._recipe.spec.ema is not None)
        return {**self._evaluator.measure(self._engine, found.step), "evaluation_s": time.perf_counter() - began}


class Undivided:
    """What Evaluator asks of an engine, of a module that one process holds whole."""

    def __init__(self, module: "torch.nn.Module") -> None:
        self.module = module
        self.train, self.eval = module.train, module.eval

    def __call__(self, *inputs: Any) -> Any:
        return self.module(*inputs)


def alone(recipe: Recipe) -> Recipe:
    """The same run in one process that holds the model whole."""
    scale = recipe.spec.scale.model_copy(update={"workers": 1})
    return replace(recipe, spec=recipe.spec.model_copy(update={"scale": scale, "sharding": Sharding(zero=0)}))
