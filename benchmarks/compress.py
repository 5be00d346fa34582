"""What each method of `kind: compress` gains and costs beside the model in bf16: bytes and speed of a large model of random weights, whose
decoding waits for memory, and the loss of a small one that is trained here on the standard library.

    python benchmarks/compress.py [--width 1024] [--layers 12] [--threads 2] [--rounds 5] [--steps 200]
    python benchmarks/compress.py --only speed
    python benchmarks/compress.py --only loss
"""

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch
from transformers import AutoConfig, AutoModelForCausalLM

import distlm
from distlm.compress.methods import compress
from distlm.compress.speed import file_bytes, held_bytes, speeds
from distlm.compress.task import task_of
from distlm.compress.worker import Compressor
from distlm.evaluate.driver import outcome
from distlm.model.build import load_model
from distlm.model.export import export_model
from distlm.progress import Progress
from distlm.spec import CompressSpec

METHODS: dict[str, dict[str, Any]] = {
    "int8_weight_only": {}, "int8_dynamic": {}, "int4_weight_only": {}, "structured, channels 0.25": {"channels": 0.25},
    "magnitude, sparsity 0.5": {"sparsity": 0.5}}
VOCABULARY, CONTEXT = 32_000, 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    for name, value in {"--width": 1024, "--layers": 12, "--threads": 2, "--rounds": 5, "--steps": 200}.items():
        parser.add_argument(name, type=int, default=value)
    parser.add_argument("--only", choices=["speed", "loss"])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory(prefix="distlm-bench-") as folder:
        if options.only != "loss":
            speed(Path(folder), options)
        if options.only != "speed":
            loss(Path(folder), options)


def spec_of(title: str, **keys: Any) -> CompressSpec:
    return CompressSpec.model_validate({"name": "c", "model": "m", "corpus": "c", "method": title.split(",")[0], "dtype": "bf16",
                                        **METHODS[title], **keys})


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
    storage = distlm.Storage.find(str(folder))
    distlm.run({"kind": "prepare", "name": "c", "sources": ["stdlib"], "tokenizer": {"train": "bpe", "vocab_size": 4096}, "context": 256},
               storage=storage, progress=Progress())
    distlm.run({"kind": "train", "name": "m", "corpus": "c", "model": {"preset": "llama-4m"}, "batch": {"global_sequences": 16},
                "duration": {"steps": options.steps}, "optimizer": {"lr": 0.002}, "schedule": {"warmup_steps": options.steps // 10},
                "scale": {"threads_per_worker": options.threads}}, storage=storage, progress=Progress())
    print(f"llama-4m after {options.steps} steps on the standard library, in bf16, {spec_of('int8_dynamic').windows} windows of val")
    print(f"{'':28} {'loss':>8} {'x':>7} {'accuracy':>9} {'MB file':>8}")
    for title in METHODS:
        spec = spec_of(title, threads=options.threads)
        task, source = task_of(spec, storage)
        worker = Compressor(spec, task, source, folder / "export" / title)
        worker.load()
        worker.compress({})
        before, after = (outcome(task, side, [worker.score(side, i) for i in range(len(task.batches))]) for side in ("before", "after"))
        for name, one, place in ([] if title != next(iter(METHODS)) else [("bf16", before, source)]) + [(title, after, worker.target)]:
            print(f"{name:28} {one['loss']:8.4f} {one['loss'] / before['loss']:7.4f} {one['accuracy']:9.2%} {file_bytes(place) / 1e6:8.1f}",
                  flush=True)


if __name__ == "__main__":
    main()
