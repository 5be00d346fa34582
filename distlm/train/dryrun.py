"""`batch.micro_sequences: auto`: the largest micro-batch that the workers hold, found by steps of theirs of which nothing is kept.

    recipe = choose_micro(recipe, folder, progress, lambda trial: ...)          # runs the steps, returns what stopped them
"""

import resource
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from distlm.errors import DistlmError, TrainError
from distlm.model.build import model_config
from distlm.progress import Progress
from distlm.runs import RunFolder
from distlm.spec.batch import divisors
from distlm.storage import read_json, write_json
from distlm.train.memory import GIB, Load, machine_bytes, make_load, memory_limit, peak_memory
from distlm.train.recipe import Recipe

STEPS = 2
"""The second one has the optimizer's states from its beginning."""
CPU_SEQUENCES = 16
"""Larger micro-batches are no faster on a CPU."""
SLACK = 1.5
"""What is estimated at so many times the memory that there is, is not tried."""
FOLDER, CHOSEN = "dry-run", "micro-sequences.json"


class DryRun:
    """Follows the steps of one rank; the last one writes the most memory that they took. Before it the loop copies the state, as for a
    checkpoint that is written beside it. It holds so many more bytes meanwhile."""

    def __init__(self, folder: Path, rank: int, held: int = 0) -> None:
        import torch

        self.folder, self._file, self._done = folder, folder / f"{rank:05d}.json", 0
        self._held = torch.ones(held, dtype=torch.uint8)   # written to, or the machine would not give them

    def step(self) -> None:
        """One more step is done."""
        self._done += 1
        if self._done == STEPS:
            write_json(self._file, {"bytes": peak_bytes()})


def peak_bytes() -> int:
    """The most that this process has held: of its GPU's memory, or of the node's."""
    import torch

    return torch.cuda.max_memory_reserved() if torch.cuda.is_available() else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def choose_micro(recipe: Recipe, folder: RunFolder, progress: Progress, launch: Callable[[Recipe], DistlmError | None],
                 room: int | None = None) -> Recipe:
    """The recipe with the largest micro-batch whose steps run, inside the memory that the spec says a worker has, else all workers together
    in `room` bytes. A worker that is killed has not fitted: where memory is short a kernel gives no other sign. A run that goes on keeps
    its choice. Raises TrainError where not one sequence fits, and what `launch` returns if it is not for memory."""
    chosen, place = folder.path / CHOSEN, folder.path / FOLDER
    if chosen.exists() and recipe.plan().piece % (micro := read_json(chosen)["micro_sequences"]) == 0:
        return replace(recipe, micro_sequences=micro)
    limit = memory_limit(recipe.spec)
    room = room if limit is None else None
    error: DistlmError | None = None
    for micro in candidates(recipe, limit, room):
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        error = launch(trial(recipe, micro))
        if error is not None and error.cause not in ("oom", "worker_died"):
            raise error
        taken = [0] if error else [read_json(file)["bytes"] for file in place.glob("*.json")]
        peak = max(taken)
        fits = error is None and (limit is None or peak <= limit) and (room is None or sum(taken) <= room)
        over = "" if fits else (f", more than the {limit / GIB:.3g} there are" if limit else
                                f", and all workers {sum(taken) / GIB:.3g}, more than the {(room or 0) / GIB:.3g} of this machine")
        took = f"{peak / GIB:.3g} GiB{over}" if not error else "out of memory" if error.cause == "oom" else "a worker was killed"
        text = f"{micro} sequence{'s' * (micro > 1)} in a micro-batch: {took}"
        progress.note(text)
        folder.event("note", message=text)
        if fits:
            shutil.rmtree(place)
            write_json(chosen, {"micro_sequences": micro, "bytes": peak})
            return replace(recipe, micro_sequences=micro)
    if error is not None and error.cause == "worker_died":                     # it may have another reason, which its log tells
        raise error
    beside = ", or set checkpoint.asynchronous: false" if recipe.spec.checkpoint.asynchronous else ""
    known = f", or say scale.memory_gib: this machine has {room / GIB:.3g} GiB for all workers" if room else ""
    raise TrainError("not one sequence of the batch fits the memory of a worker", where="batch.micro_sequences", cause="oom",
                     remedy=f"set activation_checkpointing: 1, or raise sharding.zero{beside}{known}")


def candidates(recipe: Recipe, limit: int | None, room: int | None = None) -> Iterator[int]:
    """Divisors of a worker's share, the largest first, without those that are hopeless by the estimate. One is always there."""
    spec, share = recipe.spec, recipe.plan().piece
    load = _load(recipe)
    most = share if spec.scale.gpus_per_worker else CPU_SEQUENCES
    for micro in reversed([n for n in divisors(share) if n <= most]):
        hopeless = ((limit is not None and _estimate(load, micro) > SLACK * limit) or
                    (room is not None and machine_bytes(_cut(load, micro)) > SLACK * room))
        if micro == 1 or not hopeless:
            yield micro


def beyond(recipe: Recipe, micro: int) -> int:
    """Bytes that a micro-batch of pairs may take beyond those of a trial, by the plan: on a CPU attention keeps the probabilities of short
    rows, and of the trial's whole windows none."""
    if recipe.spec.objective != "dpo":
        return 0
    return max(0, _estimate(_load(recipe), micro) - _estimate(_load(recipe, whole=True), micro))


def _load(recipe: Recipe, whole: bool = False) -> Load:
    config = model_config(recipe.spec.model, recipe.shape, recipe.spec.regularization.dropout)
    return make_load(recipe.spec, config, recipe.shape, recipe.parameters, recipe.micro_sequences, recipe.accumulation,
                     recipe.mask_documents, whole)


def _estimate(load: Load, micro: int) -> int:
    """Bytes of a worker by the plan."""
    return peak_memory(_cut(load, micro)).total


def _cut(load: Load, micro: int) -> Load:
    spec = load.spec
    return load.varied(spec.sharding.zero, spec.activation_checkpointing, micro, spec.checkpoint.asynchronous, spec.reduce_precision)


def trial(recipe: Recipe, micro: int) -> Recipe:
    """A few steps of one or two micro-batches, which with what is held beside them take the memory of any number."""
    share = recipe.global_sequences // recipe.spec.data_workers
    return replace(recipe, micro_sequences=micro, global_sequences=recipe.spec.data_workers * min(share, 2 * micro), num_steps=STEPS,
                   warmup=(), whole=True, held=beyond(recipe, micro))
