"""Checkpoints that commit: shards first, then a manifest with sizes and hashes, then the marker COMMITTED, last.

A folder without the marker is no checkpoint; hashes are verified before anything is unpickled; DeepSpeed's own `latest`
file is neither written nor read.

    checkpoints/step-000100/state/...  rng-00000.pt ...  ema-00000.pt ...  manifest.json  COMMITTED
"""

import contextlib
import hashlib
import math
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from distlm.errors import CheckpointError, SpecError, StorageError
from distlm.model.adapter import base_hash
from distlm.runs import RunFolder
from distlm.spec.train import TrainSpec
from distlm.storage import read_json
from distlm.train.disks import load_from_disks, on_disks
from distlm.train.recipe import Recipe
from distlm.train.zero import zero_options

if TYPE_CHECKING:
    from distlm.train.average import Ema

MARKER = "COMMITTED"
NAME = re.compile(r"step-(\d{6,})")
TAG = "state"
EVALUATIONS = "evaluations"
"""The folder of a run with what a worker of its own has measured of checkpoints, and has no record yet (train/validation.py)."""
MEASURING = f"{EVALUATIONS}/measuring"
"""The file with the name of the checkpoint that it measures."""


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint: all that decides the future of a run."""

    path: Path
    step: int
    """Optimizer steps done: the next one is this, counted from 0."""
    manifest: dict[str, Any]


def checkpoint_path(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:06d}"


def committed(run: Path) -> list[Path]:
    """The folders that carry the marker, oldest first."""
    return [path for path in _steps(run) if (path / MARKER).is_file()]


def commits(run: Path) -> set[tuple[str, int]]:
    """The names of those that the schedule has made, each with `committed_at`."""
    return {(path.name, committed_at(path)) for path in due(run)}


def committed_at(path: Path) -> int:
    """The time of its marker in nanoseconds, 0 where it has gone: a step that is committed again is another one."""
    try:
        return (path / MARKER).stat().st_mtime_ns
    except OSError:
        return 0


def _steps(run: Path) -> list[Path]:
    """The folders that are named as checkpoints are, oldest first; a copy under another name is its maker's own."""
    found = {int(match[1]): path for path in (run / "checkpoints").glob("step-*") if (match := NAME.fullmatch(path.name))}
    return [found[step] for step in sorted(found)]


def due(run: Path) -> list[Path]:
    """Those that were made by the schedule, and not because a run had to end."""
    return [path for path in committed(run) if _manifest(path).get("due", True)]


def _manifest(path: Path) -> dict[str, Any]:
    """Unverified; empty where it cannot be read."""
    try:
        found = read_json(path / "manifest.json")
    except StorageError:
        return {}
    return found if isinstance(found, dict) else {}


def step_of(path: Path) -> int:
    """The step whose state a folder holds, by its name."""
    match = NAME.fullmatch(path.name)
    assert match
    return int(match[1])


def latest(run: Path) -> tuple[Checkpoint | None, list[CheckpointError]]:
    """The newest checkpoint whose every hash holds, and an error for each newer one that was refused."""
    refused: list[CheckpointError] = []
    for path in reversed(committed(run)):
        try:
            return verified(path), refused
        except CheckpointError as error:
            refused.append(error)
    return None, refused


def verified(path: Path) -> Checkpoint:
    """Check marker, manifest, and the size and hash of each file. Raises CheckpointError."""
    try:
        marker, text = (path / MARKER).read_bytes().strip(), (path / "manifest.json").read_bytes()
        manifest = read_json(path / "manifest.json")
    except (OSError, StorageError) as error:
        raise CheckpointError(f"is not readable: {error}", where=str(path)) from None
    if hashlib.sha256(text).hexdigest().encode() != marker:
        raise CheckpointError("the manifest is not the one that was committed", where=str(path))
    if path.name != checkpoint_path(path, manifest["step"]).name:
        raise CheckpointError(f"holds the state of step {manifest['step']}", where=str(path))
    for entry in manifest["files"]:
        file = path / entry["file"]
        size = file.stat().st_size if file.is_file() else -1
        if size != entry["bytes"]:
            raise CheckpointError("is missing" if size < 0 else f"has {size:,} bytes, not {entry['bytes']:,}", where=str(file))
        if _hash(file) != entry["xxh3"]:
            raise CheckpointError("its bytes are not those that were committed", where=str(file))
    return Checkpoint(path, manifest["step"], manifest)


def check_fits(checkpoint: Checkpoint, recipe: Recipe) -> None:
    """Raises CheckpointError where a run cannot go on exactly from this checkpoint."""
    ours = {**facts(recipe), **base_of(recipe)}
    if checkpoint.step > recipe.num_steps:
        raise CheckpointError(f"has {checkpoint.step} steps done, and the spec asks for {recipe.num_steps}", where=str(checkpoint.path),
                              cause="bad_spec", remedy=f"set duration to {checkpoint.step} steps or more, or start a new run")
    for key, value in ours.items():
        saved = saved_fact(checkpoint.manifest, key)
        why = _keeps_layout(checkpoint, recipe) if key in LAYOUT else ""
        if saved != value and (key not in LAYOUT or why):
            raise CheckpointError(f"was saved with {key} {saved}, and the spec says {value}" + f"; {why}" * bool(why),
                                  where=str(checkpoint.path), cause="bad_spec", remedy=f"resume with {key} {saved}, or start a new run")
    if divided_anew(checkpoint.manifest, recipe) and not checkpoint.manifest["zero"] and "parameters" not in checkpoint.manifest:
        tensor, changes = saved_fact(checkpoint.manifest, "tensor_parallel"), ", ".join(layout_changes(checkpoint.manifest, recipe))
        raise CheckpointError(f"is of an older version, which does not tell its parameters' names, and would be divided anew: {changes}",
                              where=str(checkpoint.path), cause="bad_spec",
                              remedy=f"resume with zero 0 and tensor_parallel {tensor}, or start a new run")
    check_annealing(checkpoint, recipe)


def layout_changes(manifest: dict[str, Any], recipe: Recipe) -> list[str]:
    """What a run divides its state anew for, as people read it: key, what a checkpoint's manifest has, what the recipe has."""
    ours = facts(recipe)
    return [f"{key} {saved_fact(manifest, key)} -> {ours[key]}" for key in LAYOUT if saved_fact(manifest, key) != ours[key]]


def divided_anew(manifest: dict[str, Any], recipe: Recipe) -> bool:
    """Whether the ranks of a run cannot take the files of a checkpoint as they are. Without ZeRO each rank has the same one."""
    ours = facts(recipe)
    moved = {key for key in LAYOUT if saved_fact(manifest, key) != ours[key]}
    return bool(moved if ours["zero"] else moved & {"zero", "tensor_parallel"})


def saved_fact(manifest: dict[str, Any], key: str) -> Any:
    """What a manifest tells of the run, of older versions too."""
    return manifest.get(key, OLDER[key]) if key in OLDER else manifest[key]


def check_resume(run: Path, recipe: Recipe) -> None:
    """`check_fits` for the newest checkpoint of a run by its manifest alone, before any work. Raises SpecError."""
    for path in reversed(committed(run)):
        try:
            manifest = read_json(path / "manifest.json")
            check_fits(Checkpoint(path, manifest["step"], manifest), recipe)
        except CheckpointError as error:
            raise SpecError(error.message, where=error.where, remedy=error.remedy) from None
        except (StorageError, KeyError, TypeError):        # a damaged one: the one before it would be taken
            continue
        return


def check_annealing(checkpoint: Checkpoint, recipe: Recipe) -> None:
    """Raises CheckpointError where another duration would move the annealing of a mixture's weights under samples that are done."""
    if recipe.mix is None or not recipe.mix.final_weights:
        return
    saved, ours = checkpoint.manifest["anneal"], list(recipe.mix.anneal)
    done = recipe.sizes.before(checkpoint.step) + len(recipe.corpora)           # samples are taken early by less than one a corpus
    if saved != ours and done > min(saved[0], ours[0]):
        before, size = [[recipe.sizes.steps(n) for n in part] for part in (saved, ours)], recipe.sizes.steps(saved[1])
        raise CheckpointError(f"has annealed the weights of its corpora from step {before[0][0]} to {before[0][1]}, and the spec says from "
                              f"{before[1][0]} to {before[1][1]}", where=str(checkpoint.path), cause="bad_spec",
                              remedy=f"set duration to {size} steps, or start a new run")


OLDER: dict[str, Any] = {"partition": {}, "tensor_parallel": 1, "batch_warmup": [], "adapter": None, "base": None, "teacher": None,
                         "reduce_precision": "same"}
"""What a manifest says that says nothing of it, as those of older versions."""
LAYOUT = ("workers", "zero", "tensor_parallel", "partition")
"""What may differ: the state is then divided anew."""


def _keeps_layout(checkpoint: Checkpoint, recipe: Recipe) -> str:
    """Why the state cannot be divided anew; empty where it can be."""
    options = zero_options(recipe.spec), checkpoint.manifest.get("partition", {})
    if any(on_disks(one) for one in options):
        return "what lies on disks is not divided anew"
    if any(one.get("round_robin_gradients") for one in options):
        return "with round_robin_gradients DeepSpeed does not tell where its parts lie"
    if recipe.spec.optimizer.name == "muon" and (checkpoint.manifest["zero"] or recipe.spec.sharding.zero):
        return "DeepSpeed's Muon keeps whole matrices of what a partition touches"
    return ""


def _partition(spec: TrainSpec) -> dict[str, Any]:
    """What decides where the state lies, but for the folder on a disk, which is another one on another machine."""
    return {key: {name: one for name, one in value.items() if name != "nvme_path"} if isinstance(value, dict) else value
            for key, value in zero_options(spec).items()}


def facts(recipe: Recipe) -> dict[str, Any]:
    """What a manifest tells of the run."""
    return {"workers": recipe.world, "zero": recipe.spec.sharding.zero, "tensor_parallel": recipe.spec.sharding.tensor_parallel,
            "partition": _partition(recipe.spec), "precision": recipe.spec.precision,
            "reduce_precision": "fp32" if recipe.spec.fp32_sums else "same",
            "global_sequences": recipe.global_sequences, "batch_warmup": [list(stage) for stage in recipe.warmup], "seed": recipe.spec.seed,
            "corpus_hash": recipe.corpus_hash, "adapter": recipe.spec.adapter and recipe.spec.adapter.model_dump(exclude_none=True)}


def base_of(recipe: Recipe) -> dict[str, str | None]:
    """The same of an adapter's base, or of what preferences are measured by, and of a teacher, all of which is read for it."""
    stays = recipe.spec.adapter or recipe.spec.objective == "dpo"
    return {"base": base_hash(recipe.spec.model.source) if stays and recipe.spec.model.source else None,
            "teacher": base_hash(recipe.spec.distill.teacher) if recipe.spec.distill else None}


def load(engine: Any, checkpoint: Path, recipe: Recipe, rank: int, ema: "Ema | None" = None) -> None:
    """Restore the engine, this rank's random numbers and its part of `ema` from a verified checkpoint, of any number of ranks, ZeRO stage
    and tensor parallelism. With another number of ranks, or of those that hold a model together, the random numbers begin anew, a function
    of the seed that the engine began with, the step and the rank. All ranks take part."""
    import torch

    from distlm.train.reshard import load_resharded

    manifest = read_json(checkpoint / "manifest.json")
    ours, tensor = facts(recipe), recipe.spec.sharding.tensor_parallel
    same_ranks = all(saved_fact(manifest, key) == ours[key] for key in ("workers", "tensor_parallel"))
    if divided_anew(manifest, recipe):
        load_resharded(engine, checkpoint, manifest, ema)
        if "loss_scale" in manifest:
            engine.optimizer.loss_scaler.cur_scale = manifest["loss_scale"]
    elif on_disks(zero_options(recipe.spec)):
        load_from_disks(engine, checkpoint / TAG, rank, manifest["step"])
    else:
        path, _ = engine.load_checkpoint(str(checkpoint), tag=TAG, load_module_strict=recipe.spec.adapter is None)
        if path is None:
            raise CheckpointError("DeepSpeed found nothing to load", where=str(checkpoint), cause="internal")
        if ema:
            saved = torch.load(checkpoint / f"ema-{rank if same_ranks else rank % tensor:05d}.pt", weights_only=True, map_location="cpu")
            for value, part in zip(ema.values, saved, strict=True):
                value.copy_(part)
    if not same_ranks:
        torch.manual_seed((torch.initial_seed() + (manifest["step"] << 8)) % 2**63)
        return
    states = torch.load(checkpoint / f"rng-{rank:05d}.pt", weights_only=True)
    torch.set_rng_state(states["cpu"])
    if len(states["cuda"]) and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def recent_losses(checkpoint: Path) -> list[float]:
    """The losses of the steps before a verified checkpoint that it holds, to the bit."""
    return [float(loss) for loss in read_json(checkpoint / "manifest.json").get("recent_losses", [])]


def prune(run: Path, keep: int, milestone_steps: int | None = None, keep_best: int = 0) -> None:
    """Delete what was never committed, and all committed checkpoints but the newest `keep`, those of every `milestone_steps`, and the
    `keep_best` with the lowest val_loss: that of metrics.jsonl where it was not known yet, and the one that is measured just now. One that
    was not due counts as none of these, and is kept while it is the newest. The marker goes first."""
    newest, found = committed(run)[-1:], due(run)
    kept = {*newest, *found[-keep:], *(path for path in found if milestone_steps and step_of(path) % milestone_steps == 0)}
    if keep_best:
        later = {record["step"]: record["val_loss"] for record in RunFolder(run).read_metrics()
                 if "val_loss" in record and "averaged" not in record}
        for file in (run / EVALUATIONS).glob("step-*.json"):
            with contextlib.suppress(StorageError):        # rank 0 may take it just now
                record = read_json(file)
                later[record["step"]] = record.get("val_loss")
        with contextlib.suppress(OSError):
            measured = (run / MEASURING).read_text()
            kept.update(path for path in found if path.name == measured)
        kept.update(sorted(found, key=lambda path: _val_loss(path, later))[:keep_best])
    for path in _steps(run):
        if path not in kept:
            (path / MARKER).unlink(missing_ok=True)
            shutil.rmtree(path, ignore_errors=True)


def _val_loss(path: Path, later: dict[int, Any]) -> float:
    """What a checkpoint's manifest says, or else what was found for its step `later`; infinity for none that is finite."""
    value = _manifest(path).get("val_loss", later.get(step_of(path)))
    return value if isinstance(value, float) and math.isfinite(value) else math.inf


def entry(file: Path, root: Path) -> dict[str, Any]:
    """What a manifest tells of a file, which is on the disk when this returns."""
    handle = os.open(file, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
    return {"file": str(file.relative_to(root)), "bytes": file.stat().st_size, "xxh3": _hash(file)}


def _hash(file: Path) -> str:
    digest = xxhash.xxh3_128()
    with file.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
