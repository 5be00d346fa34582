"""What `sharding.offload` lays on the disks of a node: DeepSpeed's files of the optimizer's states and of the fp32 weights.

    check_disks(zero_options(spec))                        # before any work
    with own_disks(config["zero_optimization"], run, rank):
        ...
    load_from_disks(engine, checkpoint / TAG, rank, step)  # what DeepSpeed does not bring back itself
"""

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distlm.errors import TrainError

if TYPE_CHECKING:
    import torch


def on_disks(options: dict[str, Any]) -> list[dict[str, Any]]:
    """The parts of DeepSpeed's `zero_optimization` that lay something on disks."""
    return [one for one in options.values() if isinstance(one, dict) and one.get("device") == "nvme"]


def check_disks(options: dict[str, Any]) -> None:
    """Raises TrainError where this worker's node cannot build or load what DeepSpeed reads and writes disks with, which takes a minute or
    two the first time, and where it cannot write to a folder past its cache, as that does."""
    parts = on_disks(options)
    if not parts:
        return
    from deepspeed.ops.op_builder import AsyncIOBuilder

    where = "sharding.offload"
    remedy = "install {} there (Debian and Ubuntu: apt install libaio-dev g++ ninja-build; with GPUs the CUDA toolkit too), or take cpu"
    if not AsyncIOBuilder().is_compatible(verbose=False):
        raise TrainError("a worker's node lacks libaio, with which DeepSpeed reads and writes disks, or a C compiler", where=where,
                         cause="bad_input", remedy=remedy.format("them"))
    try:
        AsyncIOBuilder().load(verbose=False)
    except (RuntimeError, ImportError, OSError, TypeError) as error:           # the last where a GPU's node has no CUDA toolkit
        lines = str(error).splitlines() or [type(error).__name__]
        raise TrainError("a worker's node cannot build what DeepSpeed reads and writes disks with: "
                         f"{next((line for line in lines if ' error: ' in line), lines[0])}", where=where, cause="bad_input",
                         remedy=remedy.format("what is missing")) from error
    for path in sorted({str(one.get("nvme_path")) for one in parts}):
        try:
            os.makedirs(path, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=path) as file:
                os.close(os.open(file.name, os.O_WRONLY | os.O_DIRECT))
        except OSError as error:
            raise TrainError(f"a worker's node cannot write there: {error.strerror}", where=f"sharding.offload.path: {path}",
                             cause="bad_input", remedy="name a folder on a local disk that may be written to, or take cpu") from None


@contextlib.contextmanager
def own_disks(options: dict[str, Any], run: Path, rank: int) -> Iterator[None]:
    """Let what lies on disks lie in a folder of the run's own: names of files there are numbers, which those of another run are too. Files
    of this rank go at the end of the block, however it ends: they are of no use to a run that goes on, which has its checkpoint."""
    own = f"{run.name}-{hashlib.sha256(str(run.resolve()).encode()).hexdigest()[:8]}"
    parts = on_disks(options)
    for one in parts:
        one["nvme_path"] = str(Path(one["nvme_path"], own))
    try:
        yield
    finally:
        for folder in {Path(one["nvme_path"]) for one in parts}:
            for place, *_ in os.walk(folder, topdown=False):                   # of which other ranks remove some meanwhile
                if Path(place).name == f"rank{rank}":
                    shutil.rmtree(place, ignore_errors=True)
                with contextlib.suppress(OSError):         # gone, or another rank still has files in it
                    os.rmdir(place)


def load_from_disks(engine: Any, state: Path, rank: int, step: int) -> None:
    """Fill the engine, new and of the same layout, from a checkpoint's folder `state`, which was saved after `step` steps. DeepSpeed 0.19
    itself brings back files of weights alone: no states of the optimizer, and nothing of what is too small to lie on a disk. All ranks
    take part."""
    import torch

    from distlm.train.reshard import one_file, read_file

    optimizer = engine.optimizer
    saved = read_file(one_file(state, f"*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"))["optimizer_state_dict"]
    states = saved["optimizer_state_dict"]["state"]
    files = state / "offloaded_tensors" / f"rank{rank:0>2d}"
    with torch.no_grad():
        optimizer._partition_all_parameters()
        for i, part in enumerate(optimizer.fp32_partitioned_groups_flat):
            away = optimizer._swappable_optimizer_subgroup(i)
            if away:
                optimizer._prepare_sub_group(i, set())     # room in memory for it
            part.data.copy_(_whole(saved["fp32_flat_groups"][i], files, part))
            for key, value in states.get(i, {}).items():
                optimizer.optimizer.state[part][key] = _whole(value, files, part).clone() if torch.is_tensor(value) else value
            optimizer._reassign_or_swap_out_partitioned_parameters(i)
            if away:
                optimizer._release_sub_group(i, set())
        optimizer._post_step([])
    optimizer.loss_scaler = saved["loss_scaler"]
    engine.global_steps = step


def _whole(value: Any, files: Path, part: "torch.Tensor") -> Any:
    """A tensor of a checkpoint, or what its file holds, with as many elements as `part`, where it lay on a disk."""
    import torch

    if value.numel():
        return value
    return torch.from_file(str(files / f"{value.ds_id}.tensor.swp"), size=part.numel(), dtype=value.dtype)
