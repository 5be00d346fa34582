"""A checkpoint of one layout in an engine of another: other ranks, another ZeRO stage, a model divided in another way, the same run.

A layout puts every parameter's elements into flat tensors: DeepSpeed's partitions on each rank, or whole parameters without ZeRO, or those
of the rows or columns that tensor parallelism gives to a rank. Weights, the optimizer's states and the average of `ema` lie in the same
places, so one list of fragments describes them all, and reading is to find, for each fragment of the new layout, the old ones that have
elements of it. A rank reads only what it needs: files are mapped.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from distlm.errors import CheckpointError
from distlm.model.tensor import dimension
from distlm.train.average import masters, spread
from distlm.train.checkpoint import saved_fact

if TYPE_CHECKING:
    from distlm.train.average import Ema

WEIGHTS, EMA = "weights", "ema"
REMEDY = "resume with the workers and the sharding that it was saved with"


@dataclass(frozen=True)
class Columns:
    """The columns of a matrix that tensor parallelism gives to a rank."""

    part: int
    parts: int
    width: int
    """Of one part."""


class Block(NamedTuple):
    """Some rows and columns of a matrix."""

    rows: range
    columns: range


@dataclass(frozen=True)
class Fragment:
    """Some elements of a parameter, one after the other in flat tensors of one rank."""

    name: str
    offset: int
    """In the parameter, or among the elements of `columns`."""
    start: int
    """In the flat tensors."""
    numel: int
    columns: Columns | None = None

    def in_whole(self, index: int, parts: int, shape: torch.Size) -> "Fragment":
        """The same of a rank that tensor parallelism gives one of `parts` of a parameter of this `shape`."""
        dim = dimension(self.name) if parts > 1 else None
        if dim is None:
            return self
        if dim == 0:
            return replace(self, offset=index * (shape.numel() // parts) + self.offset)
        return replace(self, columns=Columns(index, parts, shape[1] // parts))

    def row(self, width: int) -> tuple[int, int]:
        """What it has of a row of a matrix that is `width` wide: how much, and from which column on."""
        return (self.columns.width, self.columns.part * self.columns.width) if self.columns else (width, 0)

    def blocks(self, width: int) -> Iterator[Block]:
        """Its elements in a matrix that is `width` wide: rows that it has whole, and what it has of one before and behind them."""
        size, first = self.row(width)
        at, stop = self.offset, self.offset + self.numel
        while at < stop:
            row, column = divmod(at, size)
            rows = max(1, (stop - at) // size) if column == 0 else 1
            end = min(size, column + stop - at)
            yield Block(range(row, row + rows), range(first + column, first + end))
            at += rows * (end - column)

    def place(self, row: int, column: int, width: int) -> int:
        """Where in the flat tensors an element of a matrix is that is `width` wide."""
        size, first = self.row(width)
        return self.start - self.offset + row * size + column - first


@dataclass(frozen=True)
class Saved:
    """A fragment of a checkpoint: the flat tensors by what they are, and scalars such as Adam's step as they are."""

    at: Fragment
    values: dict[str, Any]


class Rows(NamedTuple):
    """Where rows of equal length lie in flat tensors."""

    start: int
    stride: int
    """From the beginning of one row to that of the next."""

    def of(self, flat: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
        flat = flat.view(-1)
        return flat.as_strided(shape, (self.stride, 1), flat.storage_offset() + self.start)


@dataclass(frozen=True)
class Move:
    """Elements of a checkpoint's fragment that a fragment of the engine asks for."""

    saved: Saved
    shape: tuple[int, int]
    there: Rows
    here: Rows


@torch.no_grad()
def load_resharded(engine: Any, folder: Path, manifest: dict[str, Any], ema: "Ema | None") -> None:
    """Fill the engine's weights and optimizer, and `ema`, from the checkpoint `folder` of another layout. All ranks take part. Raises
    CheckpointError where it lacks what is asked for."""
    shapes = _shapes(engine)
    saved: dict[str, list[Saved]] = {}
    for piece in _saved(folder, manifest, shapes, ema is not None):
        saved.setdefault(piece.at.name, []).append(piece)
    states = getattr(engine.optimizer, "optimizer", engine.optimizer).state
    for i, (master, fragments) in enumerate(zip(masters(engine), _fragments(engine, shapes), strict=True)):
        for to in fragments:
            moves = [move for piece in saved.get(to.name, ()) for move in _moves(piece, to)]
            _check_whole(to.name, sum(math.prod(move.shape) for move in moves), to.numel, folder)
            if any(move.saved.values.keys() != moves[0].saved.values.keys() for move in moves):
                raise CheckpointError(f"does not hold all states of {to.name}", where=str(folder), cause="storage", remedy=REMEDY)
            for move in moves:
                _copy(move, master, states[master], ema.values[i] if ema else None)
    spread(engine)
    engine.global_steps = manifest["step"]


@torch.no_grad()
def load_weights(folder: Path, manifest: dict[str, Any], parameters: dict[str, torch.Tensor], average: bool) -> None:
    """Give whole `parameters`, by their names in a run's module, the weights of the checkpoint `folder`, or their `average` over steps, in
    one process without an engine. Raises CheckpointError where it lacks some."""
    found = dict.fromkeys(parameters, 0)
    for piece in _saved(folder, manifest, {name: parameter.shape for name, parameter in parameters.items()}, average):
        name = piece.at.name
        for move in _moves(piece, Fragment(name, 0, 0, parameters[name].numel())):
            there = piece.values[EMA if average else WEIGHTS]
            move.here.of(parameters[name], move.shape).copy_(move.there.of(there, move.shape))
            found[name] += math.prod(move.shape)
    for name, parameter in parameters.items():
        _check_whole(name, found[name], parameter.numel(), folder)


def _check_whole(name: str, found: int, numel: int, folder: Path) -> None:
    if found != numel:
        raise CheckpointError(f"holds {found:,} of {numel:,} elements of {name}", where=str(folder), cause="storage", remedy=REMEDY)


def _moves(piece: Saved, to: Fragment) -> Iterator[Move]:
    """What both hold of their parameter. Where one has columns of it that the other has not, a block of rows at a time."""
    one = piece.at
    if one.columns == to.columns:
        start, stop = max(one.offset, to.offset), min(one.offset + one.numel, to.offset + to.numel)
        if start < stop:
            yield Move(piece, (1, stop - start), *(Rows(start - it.offset + it.start, 0) for it in (one, to)))
        return
    width = next(it.parts * it.width for it in (one.columns, to.columns) if it)
    for theirs in one.blocks(width):
        for ours in to.blocks(width):
            rows, columns = (range(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(theirs, ours, strict=True))
            if rows and columns:
                yield Move(piece, (len(rows), len(columns)),
                           *(Rows(it.place(rows.start, columns.start, width), it.row(width)[0]) for it in (one, to)))


def _copy(move: Move, master: torch.Tensor, state: dict[str, Any], average: torch.Tensor | None) -> None:
    """Weights into `master`, the optimizer's into its `state`, and the average."""
    for key, value in move.saved.values.items():
        if key in (WEIGHTS, EMA):
            target = master if key == WEIGHTS else average
        elif not torch.is_tensor(value) or not value.dim():
            state[key] = value.clone() if torch.is_tensor(value) else value
            continue
        else:
            if key not in state or state[key].shape != master.shape:
                state[key] = torch.zeros_like(master, dtype=value.dtype)
            target = state[key]
        if target is not None:
            move.here.of(target, move.shape).copy_(move.there.of(value, move.shape))


def parameter_names(engine: Any) -> list[str]:
    """The parameters' names in the order in which the optimizer without ZeRO has them; a checkpoint of it tells them by number."""
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    groups = getattr(engine.optimizer, "fp16_groups", None) or [group["params"] for group in engine.optimizer.param_groups]
    return [names[id(parameter)] for group in groups for parameter in group]


def _shapes(engine: Any) -> dict[str, torch.Size]:
    """The shape of each parameter as the undivided model has it."""
    found, parts = {}, max(1, engine.autotp_size())
    for name, parameter in engine.module.named_parameters():
        shape, dim = list(getattr(parameter, "ds_shape", parameter.shape)), dimension(name) if parts > 1 else None
        if dim is not None:
            shape[dim] *= parts
        found[name] = torch.Size(shape)
    return found


def _fragments(engine: Any, shapes: dict[str, torch.Size]) -> Iterator[list[Fragment]]:
    """What each of this rank's `masters` holds."""
    parts = max(1, engine.autotp_size())
    group, index = divmod(engine.global_rank, parts)
    for fragments in _own_fragments(engine, group, engine.world_size // parts):
        yield [one.in_whole(index, parts, shapes[one.name]) for one in fragments]


def _own_fragments(engine: Any, rank: int, world: int) -> Iterator[list[Fragment]]:
    """The same in the places of this rank's part of the model, which `world` ranks have, of which it is number `rank`."""
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
        for group in optimizer.fp16_groups:
            yield list(_partitions([(names[id(parameter)], parameter.ds_numel) for parameter in group], rank, world))


def _partitions(sizes: list[tuple[str, int]], rank: int, world: int) -> Iterator[Fragment]:
    """ZeRO-3 gives each rank an equal part of every parameter, one after the other; the last one is padded."""
    start = 0
    for name, numel in sizes:
        part = math.ceil(numel / world)
        yield Fragment(name, rank * part, start, max(0, min(part, numel - rank * part)))
        start += part


def _saved(folder: Path, manifest: dict[str, Any], shapes: dict[str, torch.Size], with_ema: bool) -> Iterator[Saved]:
    """Every fragment of the checkpoint; what each rank of a group has whole under tensor parallelism once."""
    parts = saved_fact(manifest, "tensor_parallel")
    groups = manifest["workers"] // parts if manifest["zero"] else 1
    for index in range(parts):
        averages = [read_file(folder / f"ema-{group * parts + index:05d}.pt") if with_ema else [] for group in range(groups)]
        for piece in _saved_part(folder / "state", manifest, index, averages):
            if piece.at.name not in shapes:
                raise CheckpointError(f"holds {piece.at.name}, which the model has not", where=str(folder), cause="bad_spec", remedy=REMEDY)
            if index == 0 or dimension(piece.at.name) is not None:
                yield replace(piece, at=piece.at.in_whole(index, parts, shapes[piece.at.name]))


def _saved_part(state: Path, manifest: dict[str, Any], index: int, averages: list[list[torch.Tensor]]) -> Iterator[Saved]:
    """The fragments of those ranks that hold one part of the model under tensor parallelism, all of it without, in this part's own places.
    `averages`: of each of them."""
    zero, model = manifest["zero"], f"mp_rank_{index:02d}_model_states.pt"
    if zero == 0:
        yield from _saved_whole(read_file(state / model), manifest, averages[0])
        return
    files = [one_file(state, f"*zero_pp_rank_{rank}_mp_rank_{index:02d}_optim_states.pt") for rank in range(len(averages))]
    optimizers = [read_file(file)["optimizer_state_dict"] for file in files]
    if zero == 3:
        shapes = read_file(one_file(state, f"*zero_pp_rank_0_{model}"))["param_shapes"]
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
    assert "parameters" in manifest, "one of an older version, which check_fits refuses"
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
