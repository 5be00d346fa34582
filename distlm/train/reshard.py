"""A checkpoint of one layout in an engine of another: other ranks, another ZeRO stage, the same run.

A layout puts every parameter's elements into flat tensors: DeepSpeed's partitions on each rank, or whole parameters without ZeRO. Weights,
the optimizer's states and the average of `ema` lie in the same places, so one list of fragments describes them all, and reading is to
find, for each fragment of the new layout, the old ones that overlap it. A rank reads only what it needs: files are mapped.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed

from distlm.errors import CheckpointError
from distlm.train.average import masters, spread

if TYPE_CHECKING:
    from distlm.train.average import Ema

WEIGHTS, EMA = "weights", "ema"
REMEDY = "resume with the workers and the sharding that it was saved with"


@dataclass(frozen=True)
class Fragment:
    """Some elements of a parameter, in flat tensors of one rank."""

    name: str
    offset: int
    """In the parameter."""
    start: int
    """In the flat tensors."""
    numel: int


@dataclass(frozen=True)
class Saved:
    """A fragment of a checkpoint: the flat tensors by what they are, and scalars such as Adam's step as they are."""

    at: Fragment
    values: dict[str, Any]


@torch.no_grad()
def load_resharded(engine: Any, folder: Path, manifest: dict[str, Any], ema: "Ema | None") -> None:
    """Fill the engine's weights and optimizer, and `ema`, from the checkpoint `folder` of another layout. All ranks take part. Raises
    CheckpointError where it lacks what is asked for."""
    saved: dict[str, list[Saved]] = {}
    for piece in _saved(folder, manifest, ema is not None):
        saved.setdefault(piece.at.name, []).append(piece)
    if unknown := saved.keys() - {name for name, _ in engine.module.named_parameters()}:
        raise CheckpointError(f"holds {min(unknown)}, which the model has not", where=str(folder), cause="bad_spec", remedy=REMEDY)
    states = getattr(engine.optimizer, "optimizer", engine.optimizer).state
    for i, (master, fragments) in enumerate(zip(masters(engine), _fragments(engine), strict=True)):
        for to in fragments:
            there = [piece for piece in saved.get(to.name, ()) if _overlap(piece.at, to)]
            found = sum(len(_overlap(piece.at, to)) for piece in there)
            if found != to.numel or any(piece.values.keys() != there[0].values.keys() for piece in there):
                raise CheckpointError(f"holds {found:,} of {to.numel:,} elements of {to.name}, or not all of their states",
                                      where=str(folder), cause="storage", remedy=REMEDY)
            for piece in there:
                _copy(piece, to, master, states[master], ema.values[i] if ema else None)
    spread(engine)
    engine.global_steps = manifest["step"]


def _overlap(one: Fragment, other: Fragment) -> range:
    """The elements of their parameter that both hold."""
    return range(max(one.offset, other.offset), min(one.offset + one.numel, other.offset + other.numel))


def _copy(piece: Saved, to: Fragment, master: torch.Tensor, state: dict[str, Any], average: torch.Tensor | None) -> None:
    """What the piece holds of `to`: weights into `master`, the optimizer's into its `state`, and the average."""
    both = _overlap(piece.at, to)
    there, here = (slice(both.start - one.offset + one.start, both.stop - one.offset + one.start) for one in (piece.at, to))
    for key, value in piece.values.items():
        if key == EMA:
            if average is not None:
                average.view(-1)[here] = value[there].to(average.device)
        elif key == WEIGHTS:
            master.view(-1)[here] = value[there].to(master.device)
        elif not torch.is_tensor(value) or not value.dim():
            state[key] = value.clone() if torch.is_tensor(value) else value
        else:
            if key not in state or state[key].shape != master.shape:
                state[key] = torch.zeros_like(master, dtype=value.dtype)
            state[key].view(-1)[here] = value[there].to(master.device)


def parameter_names(engine: Any) -> list[str]:
    """The parameters' names in the order in which the optimizer without ZeRO has them; a checkpoint of it tells them by number."""
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    groups = getattr(engine.optimizer, "fp16_groups", None) or [group["params"] for group in engine.optimizer.param_groups]
    return [names[id(parameter)] for group in groups for parameter in group]


def _fragments(engine: Any) -> Iterator[list[Fragment]]:
    """What each of this rank's `masters` holds."""
    optimizer, names = engine.optimizer, {id(parameter): name for name, parameter in engine.module.named_parameters()}
    if engine.zero_optimization_stage() == 0:
        for name, master in zip(parameter_names(engine), masters(engine), strict=True):
            yield [Fragment(name, 0, 0, master.numel())]
    elif engine.zero_optimization_stage() < 3:
        for group in optimizer.bit16_groups:
            found = [(names[id(parameter)], parameter._hp_mapping) for parameter in group if parameter._hp_mapping is not None]
            yield [Fragment(name, it.lp_fragment_address.start, it.hp_fragment_address.start, it.lp_fragment_address.numel)
                   for name, it in found]
    else:
        rank, world = distributed.get_rank(), distributed.get_world_size()
        for group in optimizer.fp16_groups:
            yield list(_partitions([(names[id(parameter)], parameter.ds_numel) for parameter in group], rank, world))


def _partitions(sizes: list[tuple[str, int]], rank: int, world: int) -> Iterator[Fragment]:
    """ZeRO-3 gives each rank an equal part of every parameter, one after the other; the last one is padded."""
    start = 0
    for name, numel in sizes:
        part = math.ceil(numel / world)
        yield Fragment(name, rank * part, start, max(0, min(part, numel - rank * part)))
        start += part


def _saved(folder: Path, manifest: dict[str, Any], with_ema: bool) -> Iterator[Saved]:
    """Every fragment of the checkpoint."""
    state, zero = folder / "state", manifest["zero"]
    averages = [read_file(folder / f"ema-{rank:05d}.pt") if with_ema else [] for rank in range(manifest["workers"] if zero else 1)]
    if zero == 0:
        yield from _saved_whole(read_file(state / "mp_rank_00_model_states.pt"), manifest, averages[0])
        return
    files = [one_file(state, f"*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt") for rank in range(manifest["workers"])]
    optimizers = [read_file(file)["optimizer_state_dict"] for file in files]
    if zero == 3:
        shapes = read_file(one_file(state, "*zero_pp_rank_0_mp_rank_00_model_states.pt"))["param_shapes"]
        sizes = [(name, shape.numel()) for group in shapes for name, shape in group.items()]
        for rank, (optimizer, average) in enumerate(zip(optimizers, averages, strict=True)):
            fragments = list(_partitions(sizes, rank, len(files)))
            for i, flat in enumerate(optimizer["fp32_flat_groups"]):          # a group may be cut into several flat tensors
                values = _values(flat, optimizer["optimizer_state_dict"]["state"].get(i, {}), average, i)
                first = fragments[0].start
                while fragments and fragments[0].start - first < len(flat):
                    one = fragments.pop(0)
                    yield Saved(Fragment(one.name, one.offset, one.start - first, one.numel), values)
        return
    done: dict[str, int] = {}
    for optimizer, average in zip(optimizers, averages, strict=True):         # in the order of the ranks parameters go on
        for i, (flat, places) in enumerate(zip(optimizer["single_partition_of_fp32_groups"], optimizer["param_slice_mappings"],
                                               strict=True)):
            values = _values(flat, optimizer["base_optimizer_state"]["state"].get(i, {}), average, i)
            for name, place in places.items():
                yield Saved(Fragment(name, done.get(name, 0), place.start, place.numel), values)
                done[name] = done.get(name, 0) + place.numel


def _saved_whole(model: dict[str, Any], manifest: dict[str, Any], average: list[torch.Tensor]) -> Iterator[Saved]:
    if "parameters" not in manifest:
        raise CheckpointError("does not tell its parameters' names, as those of older versions", where="checkpoint", cause="bad_spec",
                              remedy=REMEDY)
    optimizer = model["optimizer"]
    precise = [part for group in optimizer.get("fp32_groups", []) for part in group]
    states = optimizer["optimizer_state_dict" if precise else "state"]
    states = states["state"] if precise else states
    for i, name in enumerate(manifest["parameters"]):
        weights = precise[i] if precise else model["module"][name]
        yield Saved(Fragment(name, 0, 0, weights.numel()), _values(weights, states.get(i, {}), average, i))


def _values(weights: torch.Tensor, state: dict[str, Any], average: list[torch.Tensor], i: int) -> dict[str, Any]:
    flat = {key: value.view(-1) if torch.is_tensor(value) and value.dim() else value for key, value in state.items()}
    return {WEIGHTS: weights.view(-1), **flat, **({EMA: average[i].view(-1)} if average else {})}


def one_file(folder: Path, pattern: str) -> Path:
    """The file of a checkpoint's folder that is like `pattern`. Raises CheckpointError for none or several."""
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise CheckpointError(f"holds {len(found)} files like {pattern}, and one is needed", where=str(folder), cause="storage")
    return found[0]


def read_file(file: Path) -> Any:
    """A file of a checkpoint whose hashes hold: DeepSpeed keeps objects of its own in it."""
    return torch.load(file, map_location="cpu", mmap=True, weights_only=False)
