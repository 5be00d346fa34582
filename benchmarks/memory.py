"""The plan's memory of a worker beside what a worker takes: seven shapes under ZeRO 0 to 3, plain ranks over gloo or NCCL.

    python benchmarks/memory.py                       # on CPU two ranks share the machine; on GPU one rank per GPU
    python benchmarks/memory.py --shapes wide --zero 0 3

Measured is rank 0: on GPU `torch.cuda.max_memory_allocated`; on CPU the growth of its resident memory, at the most, from before the model
is built, with glibc giving back what is freed (MALLOC_MMAP_THRESHOLD_, MALLOC_TRIM_THRESHOLD_). Building the model in fp32 is not counted:
the peak is that of the last two of three steps.
"""

import argparse
import gc
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"width": 64, "layers": 1, "context": 32, "micro": 1, "vocab": 512},
    "narrow": {"width": 256, "layers": 6, "context": 256, "micro": 8, "vocab": 4096},
    "wide": {"width": 768, "layers": 4, "context": 64, "micro": 2, "vocab": 4096},
    "long": {"width": 256, "layers": 4, "context": 1024, "micro": 2, "vocab": 4096},
    "vocabulary": {"width": 256, "layers": 3, "context": 128, "micro": 4, "vocab": 49152},
    "accumulated": {"width": 512, "layers": 4, "context": 128, "micro": 4, "vocab": 4096, "accumulation": 2},
    "recomputed": {"width": 512, "layers": 6, "context": 256, "micro": 4, "vocab": 4096, "recompute": 1},
    "long-recomputed": {"width": 512, "layers": 4, "context": 4096, "micro": 1, "vocab": 4096, "recompute": 1},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES)[1:], help="default: all but tiny")
    parser.add_argument("--zero", nargs="+", type=int, choices=range(4), default=[0, 1, 2, 3])
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--reduce", choices=["fp32", "same"], help="in what gradients are added up; default: as the spec has it")
    parser.add_argument("--compile", action="store_true", help="compiled layers, which stage 3 cannot have")
    parser.add_argument("--ranks", type=int, help="default: the GPUs, or 2 on CPU")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    import torch

    ranks = options.ranks or torch.cuda.device_count() or 2
    options.zero = [zero for zero in options.zero if not (options.compile and zero == 3)]
    if options.rank is not None:
        print(json.dumps(measured(options, ranks)))
        return
    sums = f", sums in {options.reduce}" if options.reduce else ""
    print(f"{options.precision}{sums}{', compiled' * options.compile}, {ranks} ranks; MB of rank 0")
    print(f"{'shape':<13}{'ZeRO':>5}{'measured':>10}{'plan':>8}{'ratio':>7}  parts of the plan")
    within = 0
    for shape in options.shapes:
        for zero in options.zero:
            peak, plan = measure(shape, zero, ranks, options), estimate(shape, zero, ranks, options)
            parts = ", ".join(f"{name} {value / 1e6:,.0f}" for name, value in plan.parts().items() if value)
            within += abs(plan.total / peak - 1) <= 0.15
            print(f"{shape:<13}{zero:>5}{peak / 1e6:>10,.0f}{plan.total / 1e6:>8,.0f}{plan.total / peak:>7.2f}  {parts}", flush=True)
    print(f"{within} of {len(options.shapes) * len(options.zero)} within 15 %")


def make(shape: str, zero: int, ranks: int, options: argparse.Namespace) -> tuple[Any, Any, Any]:
    """(spec, configuration of the model, shape)"""
    import torch

    from distlm.model.build import Shape, model_config
    from distlm.spec import TrainSpec

    one = SHAPES[shape]
    spec = TrainSpec.model_validate({
        "name": "x", "corpus": "x", "duration": {"steps": 3}, "precision": options.precision,
        "reduce_precision": options.reduce, "activation_checkpointing": one.get("recompute", 0), "sharding": {"zero": zero},
        "compile": options.compile,
        "checkpoint": {"asynchronous": False},             # nothing is saved here
        "scale": {"workers": ranks, "gpus_per_worker": int(torch.cuda.is_available())},
        "batch": {"global_sequences": one["micro"] * one.get("accumulation", 1) * ranks, "micro_sequences": one["micro"]},
        "model": {"config": {"model_type": "llama", "hidden_size": one["width"], "num_hidden_layers": one["layers"],
                             "num_attention_heads": one["width"] // 64, "num_key_value_heads": one["width"] // 128 or 1,
                             "intermediate_size": one["width"] * 3, "tie_word_embeddings": True}}})
    size = Shape(one["vocab"], one["context"], 0)
    return spec, model_config(spec.model, size), size


def estimate(shape: str, zero: int, ranks: int, options: argparse.Namespace) -> Any:
    from distlm.model.build import num_parameters
    from distlm.train.memory import make_load, peak_memory

    spec, config, size = make(shape, zero, ranks, options)
    one = SHAPES[shape]
    return peak_memory(make_load(spec, config, size, num_parameters(config), one["micro"], one.get("accumulation", 1)))


def measure(shape: str, zero: int, ranks: int, options: argparse.Namespace) -> float:
    """Bytes of rank 0, in processes of their own."""
    import torch

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
                   "HF_HUB_OFFLINE": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1",
                   "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])}
    if not torch.cuda.is_available():
        environment["DS_ACCELERATOR"] = "cpu"
    words = [sys.executable, __file__, "--shapes", shape, "--zero", str(zero), "--precision", options.precision, "--ranks", str(ranks),
             *(["--compile"] if options.compile else []), *(["--reduce", options.reduce] if options.reduce else [])]
    started = [subprocess.Popen([*words, "--rank", str(rank)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(ranks)]
    ended = [process.communicate() for process in started]
    if any(process.returncode for process in started):
        sys.exit("\n".join(error[-2000:] for _, error in ended))
    return float(ended[0][0].splitlines()[-1])


def measured(options: argparse.Namespace, ranks: int) -> float:
    """One rank: three steps, as `train.loop` makes them, after those of a tiny model, so that libraries have loaded what they load."""
    import torch
    from torch import distributed

    device = torch.device("cuda", options.rank) if torch.cuda.is_available() else torch.device("cpu")
    torch.set_num_threads(1)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    train("tiny", options, ranks, device)
    gc.collect()
    before = 0 if device.type == "cuda" else resident("VmRSS")
    peak = train(options.shapes[0], options, ranks, device) - before
    distributed.barrier()
    distributed.destroy_process_group()
    return peak


def train(shape: str, options: argparse.Namespace, ranks: int, device: Any) -> float:
    """The peak of the last two of three steps, of all that the process holds."""
    import torch

    from distlm.model.attention import use_cpu_attention
    from distlm.model.build import buffers, build_model, compile_layers, recompute, restore_buffers
    from distlm.model.loss import CausalLoss
    from distlm.train.batch import TokenBatch
    from distlm.train.guard import SpikeGuard
    from distlm.train.loop import train_step
    from distlm.train.phases import Phases
    from distlm.train.zero import deepspeed_config, make_engine

    one = SHAPES[shape]
    spec, config, _ = make(shape, options.zero[0], ranks, options)
    accumulation = one.get("accumulation", 1)
    cut: Any = SimpleNamespace(micro_batches=lambda step: accumulation, world=ranks, micro_sequences=one["micro"], marked=False, spec=spec,
                               tokens_of=lambda step: ranks * accumulation * one["micro"] * one["context"])
    # what `train_step` reads of a recipe
    model = build_model(spec.model, config, 0)
    if device.type == "cpu":
        use_cpu_attention(model)
    if spec.activation_checkpointing:
        recompute(model, spec.activation_checkpointing)
    if spec.compile:
        compile_layers(model)
    kept = buffers(model)
    engine = make_engine(spec, CausalLoss(model), deepspeed_config(spec, one["micro"], accumulation))
    restore_buffers(engine.module.model, kept)
    del model
    engine.train()
    peak, unwatched = 0.0, cast(Any, SimpleNamespace(beat=lambda *_: None, rest=lambda *_: None))
    for step in range(3):
        batch = TokenBatch(torch.randint(0, one["vocab"], (one["micro"] * accumulation, one["context"] + 1)))
        if step:
            reset(device)
        train_step(engine, batch, cut, 1e-4, step, SpikeGuard(None, []), unwatched, Phases(False))
        if step:
            peak = max(peak, torch.cuda.max_memory_allocated() if device.type == "cuda" else resident("VmHWM"))
    engine.destroy()
    return peak


def reset(device: Any) -> None:
    """Forget the peak so far."""
    import torch

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def resident(key: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key)]
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
