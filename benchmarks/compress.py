"""What each method of `kind: compress` gains and costs beside the model in bf16: bytes and speed of a large model of random weights, whose
decoding waits for memory, and the loss of a small one that is trained here on the standard library; what training wins back of a model
that was pruned, and what a smaller model gains by having it as its teacher.

    python benchmarks/compress.py [--width 1024] [--layers 12] [--threads 2] [--rounds 5] [--steps 200] [--recovery 50] [--sequences 16]
    python benchmarks/compress.py --only speed
    python benchmarks/compress.py --only loss
    python benchmarks/compress.py --only recovery --steps 600 --recovery 100 --sequences 8
    python benchmarks/compress.py --only distillation --steps 600 --sequences 8

All losses are those of the first 512 validation windows, in bf16, and all runs of one table see the same batches in the same order. With
--storage what is trained stays there, and the same command goes on with it.
"""

import argparse
import contextlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

import distlm
from distlm import cluster
from distlm.compress.methods import compress
from distlm.compress.speed import file_bytes, held_bytes, speeds
from distlm.compress.task import task_of
from distlm.compress.worker import Compressor
from distlm.evaluate.tokens import outcome
from distlm.evaluate.worker import Worker
from distlm.model.build import load_model
from distlm.model.export import export_model
from distlm.progress import Progress
from distlm.spec import CompressSpec
from distlm.spec.presets import PRESETS

PRUNED: dict[str, dict[str, Any]] = {
    "magnitude, sparsity 0.7": {"sparsity": 0.7}, "magnitude, sparsity 0.5": {"sparsity": 0.5},
    **{f"structured, channels {share}": {"channels": share} for share in (0.25, 0.5, 0.75)}}
METHODS: dict[str, dict[str, Any]] = {
    "int8_weight_only": {}, "int8_dynamic": {}, "int4_weight_only": {},
    **{title: PRUNED[title] for title in ("structured, channels 0.25", "magnitude, sparsity 0.5")}}
STUDENT = {"config": {**PRESETS["llama-4m"], "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
                      "intermediate_size": 352}}
"""Half as wide as llama-4m, and half as deep."""
LR, AGAIN = 2e-3, 5e-4
"""Of a model that begins with nothing, and of one that goes on."""
VOCABULARY, CONTEXT = 32_000, 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    for name, value in {"--width": 1024, "--layers": 12, "--threads": 2, "--rounds": 5, "--steps": 200, "--recovery": 50,
                        "--sequences": 16}.items():
        parser.add_argument(name, type=int, default=value)
    parser.add_argument("--only", choices=PARTS)
    parser.add_argument("--storage", type=Path, help="a folder that stays; default: a temporary one")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with contextlib.nullcontext(options.storage) if options.storage else tempfile.TemporaryDirectory(prefix="distlm-bench-") as folder:
        for name, part in PARTS.items():
            if options.only in (None, name):
                part(Path(folder), options)


def spec_of(title: str, **keys: Any) -> CompressSpec:
    return CompressSpec.model_validate({"name": "c", "model": "m", "corpus": "c", "method": title.split(",")[0], "dtype": "bf16",
                                        **{**METHODS, **PRUNED}[title], **keys})


def speed(folder: Path, options: argparse.Namespace) -> None:
    """All methods but magnitude, whose model has the shape that it had, in turns."""
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", vocab_size=VOCABULARY, hidden_size=options.width, intermediate_size=options.width * 11 // 4,
                                  num_hidden_layers=options.layers, num_attention_heads=options.width // 64,
                                  num_key_value_heads=options.width // 64, max_position_embeddings=CONTEXT, tie_word_embeddings=False)
    whole = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    (folder / "tokenizer").mkdir()
    export_model(whole, None, folder / "tokenizer", folder / "bf16", {})
    names = ["bf16", *(title for title in METHODS if not title.startswith("magnitude"))]
    for title in names[1:]:
        model: Any = load_model(folder / "bf16", "model", torch.bfloat16).requires_grad_(False)
        with torch.no_grad():
            compress(model, spec_of(title), None)  # type: ignore[arg-type]
        export_model(model, None, folder / "tokenizer", folder / title, {})
    models = {name: load_model(folder / name, "model", torch.bfloat16).eval() for name in names}
    found = speeds(models, CONTEXT, options.rounds)
    print(f"{sum(p.numel() for p in whole.parameters()) / 1e6:.0f} M parameters, {options.threads} threads, medians of {options.rounds} "
          "rounds; tokens/s, and times those of bf16")
    print(f"{'':28} {'MB file':>8} {'MB held':>8} {'decode 1':>14} {'decode 8':>14} {'prefill':>14}")
    for name, one in found.items():
        cells = " ".join(f"{one[key]:8.1f} {one[key] / found['bf16'][key]:5.2f}" for key in ("decode_1", "decode_8", "prefill"))
        print(f"{name:28} {file_bytes(folder / name) / 1e6:8.1f} {held_bytes(models[name]) / 1e6:8.1f} {cells}", flush=True)


def loss(folder: Path, options: argparse.Namespace) -> None:
    """A model of 4 M parameters, trained for so many steps, on the validation windows."""
    storage = trained(folder, options)
    print(f"llama-4m after {options.steps} steps on the standard library, in bf16, {spec_of('int8_dynamic').windows} windows of val")
    print(f"{'':28} {'loss':>8} {'x':>7} {'accuracy':>9} {'MB file':>8}")
    for title in METHODS:
        worker = compressed(title, folder / "export" / title, storage, options)
        before, after = (outcome(worker.task, side, [worker.score(side, i) for i in range(len(worker.task.batches))])
                         for side in ("before", "after"))
        first = [("bf16", before, worker.source)] if title == next(iter(METHODS)) else []
        for name, one, place in [*first, (title, after, worker.target)]:
            print(f"{name:28} {one['loss']:8.4f} {one['loss'] / before['loss']:7.4f} {one['accuracy']:9.2%} {file_bytes(place) / 1e6:8.1f}",
                  flush=True)


def recovery(folder: Path, options: argparse.Namespace) -> None:
    """Pruned models before and after so many steps more, beside the whole model, which trains on for as many."""
    with cluster.connect(folder / "driver.log"):
        storage = trained(folder, options)
        whole = storage.run("m") / "export"
        print(f"llama-4m after {options.steps} steps on the standard library, pruned, and after {options.recovery} steps more")
        print(f"{'':33} {'loss':>8} {'x':>7} {'then':>8} {'x':>7} {'MB file':>8} {'zeros':>7}")
        first = scored(whole, storage, options)
        rows: list[tuple[str, Path, dict[str, Any]]] = [("whole", whole, {})]
        for title in PRUNED:
            place = folder / "pruned" / title
            compressed(title, place, storage, options)
            rows.append((title, place, {"keep_zeros": True} if title.startswith("magnitude") else {}))
        rows.append((f"{title}, taught", place, {"objective": "distill", "distill": {"teacher": "m"}}))
        for number, (title, place, more) in enumerate(rows):
            made = train(storage, f"again-{number}", options.recovery, AGAIN, options, model={"from": str(place)}, **more)
            before, after = scored(place, storage, options), scored(Path(made["export"]), storage, options)
            print(f"{title:33} {before:8.4f} {before / first:7.4f} {after:8.4f} {after / first:7.4f} "
                  f"{file_bytes(Path(made['export'])) / 1e6:8.1f} {zeros(Path(made['export'])):7.1%}", flush=True)


def distillation(folder: Path, options: argparse.Namespace) -> None:
    """A smaller model, new, after as many steps as its teacher, with it and without."""
    with cluster.connect(folder / "driver.log"):
        storage = trained(folder, options)
        whole = storage.run("m") / "export"
        print(f"a student half as wide and half as deep as its teacher, a llama-4m, {options.steps} steps each on the standard library")
        print(f"{'':28} {'loss':>8} {'tokens/s':>9} {'MB file':>8}")
        print(f"{'the teacher':28} {scored(whole, storage, options):8.4f} {'':9} {file_bytes(whole) / 1e6:8.1f}", flush=True)
        for alpha in (0, 0.5, 0.9):
            taught = {"objective": "distill", "distill": {"teacher": "m", "alpha": alpha}} if alpha else {}
            made = train(storage, f"student-{int(10 * alpha)}", options.steps, LR, options, model=STUDENT, **taught)
            print(f"{f'taught, alpha {alpha}' if alpha else 'alone':28} {scored(Path(made['export']), storage, options):8.4f} "
                  f"{made['tokens_per_s']:9,.0f} {file_bytes(Path(made['export'])) / 1e6:8.1f}", flush=True)


def trained(folder: Path, options: argparse.Namespace) -> distlm.Storage:
    """A storage with a corpus `c` of the standard library and a run `m` over it."""
    storage = distlm.Storage.find(str(folder))
    distlm.run({"kind": "prepare", "name": "c", "sources": ["stdlib"], "tokenizer": {"train": "bpe", "vocab_size": 4096}, "context": 256},
               storage=storage, progress=Progress(), resume=True)
    train(storage, "m", options.steps, LR, options, model={"preset": "llama-4m"})
    return storage


def train(storage: distlm.Storage, name: str, steps: int, lr: float, options: argparse.Namespace, **more: Any) -> dict[str, Any]:
    """What a run over the corpus `c` makes, or has made."""
    return distlm.run({"kind": "train", "name": name, "corpus": "c", "batch": {"global_sequences": options.sequences},
                       "duration": {"steps": steps}, "optimizer": {"lr": lr}, "schedule": {"warmup_steps": steps // 10},
                       "scale": {"threads_per_worker": options.threads}, "evaluate": {"every_steps": 100, "max_windows": 16},
                       "checkpoint": {"every_steps": 100}, **more}, storage=storage, progress=Progress(), resume=True)


def compressed(title: str, target: Path, storage: distlm.Storage, options: argparse.Namespace) -> Compressor:
    """Write to `target` what a method makes of the run `m`."""
    spec = spec_of(title, threads=options.threads)
    task, source = task_of(spec, storage)
    worker = Compressor(spec, task, source, target)
    worker.load()
    worker.compress({})
    return worker


def scored(folder: Path, storage: distlm.Storage, options: argparse.Namespace) -> float:
    """The loss of a checkpoint."""
    task, _ = task_of(spec_of(next(iter(PRUNED))), storage)
    worker = Worker(task, "cpu", "bf16", options.threads)
    worker.load(folder)
    value: float = outcome(task, "", [worker.score(i) for i in range(len(task.batches))])["loss"]
    return value


def zeros(folder: Path) -> float:
    """The share of a checkpoint's weights that are zero."""
    state = load_file(folder / "model.safetensors")
    return sum(int((value == 0).sum()) for value in state.values()) / sum(value.numel() for value in state.values())


PARTS: dict[str, Callable[[Path, argparse.Namespace], None]] = {
    "speed": speed, "loss": loss, "recovery": recovery, "distillation": distillation}

if __name__ == "__main__":
    main()
