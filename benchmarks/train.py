"""Tokens per second of `distlm.run` beside a bare PyTorch loop and transformers' Trainer: same model, batch and machine, in one run.

    python benchmarks/train.py                 # 12.2 M parameters, 256 tokens of context, 32 sequences a step, bf16, 2 threads
    python benchmarks/train.py --quick         # one round of a few steps: does it work
    python benchmarks/train.py --preset llama-1b --vocab 32000 --context 2048 --sequences 32 --micro 8      # on a GPU

Each side runs in a process of its own, in turn, several rounds. A side's figure is the median time from the end of one step
to the end of the next, so that waiting for data counts; the first steps, and those that evaluate or save, are left out.
MFU is of a GPU's peak by its data sheet, or of what products of matrices reach on this CPU.
They differ in what they keep: distlm and Trainer hold fp32 weights and compute in bf16, the bare loop holds bf16 alone. `kept` is the
bare loop with the settings of the C library that distlm gives to its workers on CPU. `twin` is a loop of distlm's own parts, fp32
weights, loss, attention and those settings, without Ray, DeepSpeed, stream and records: what is left between the two is their cost.
`twin-workers` is that loop compiled, in a process a core that add up their gradients over gloo: so for `workers-compiled`. `engine` is
distlm's own training in such processes, DeepSpeed, stream, records and all, without Ray: it tells what of the difference is distlm's.
`gpt` and `nanogpt` train another model, a GPT-2 of nanoGPT's size on bytes: distlm as in `workers-compiled`, and fp32 throughout, as
nanoGPT does on a CPU. Their MFU is not shown, as it would be of that model.
"""

import argparse
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

WARM_UP = 3
SIDES = {"distlm": "distlm run", "compiled": "distlm run, compile: true", "fp8": "the same in fp8",
         "workers": "distlm run, a worker a core", "workers-zero2": "the same, ZeRO-2",
         "workers-compiled": "the same, compile: true", "engine": "the same in plain processes, without Ray",
         "bare": "bare loop, pure bf16", "kept": "bare loop, memory kept", "twin": "bare loop, distlm's parts",
         "twin-workers": "the same, a process a core, compiled", "trainer": "transformers Trainer, bf16",
         "gpt": "GPT-2: distlm, a worker a core, compiled", "nanogpt": "GPT-2: bare loop in fp32"}
GPT = ("gpt", "nanogpt")
GPT_CONFIG = {"model_type": "gpt2", "n_layer": 6, "n_head": 6, "n_embd": 384, "activation_function": "gelu", "resid_pdrop": 0.0,
              "embd_pdrop": 0.0, "attn_pdrop": 0.0}
"""nanoGPT's size for Shakespeare, and its GELU: config/train_shakespeare_char.py, model.py."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=24, help="steps of each side in each round")
    parser.add_argument("--rounds", type=int, default=3, help="times that the sides run in turn")
    parser.add_argument("--quick", action="store_true", help="one round of 8 steps")
    parser.add_argument("--preset", default="llama-10m")
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--sequences", type=int, default=32, help="sequences of a step")
    parser.add_argument("--micro", type=int, help="sequences of one forward pass; default: all of a step")
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=2, help="threads of matrix products on CPU")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=default_sides())
    parser.add_argument("--json", action="store_true", help="print figures, not a table")
    parser.add_argument("--side", choices=[*SIDES, "corpus", "bytes"], help=argparse.SUPPRESS)
    parser.add_argument("--storage", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick:
        options.steps, options.rounds = 8, 1
    options.micro = options.micro or options.sequences
    if options.side:
        print(json.dumps({"seconds": SIDE[options.side](options)}))
        return
    with tempfile.TemporaryDirectory(prefix="distlm-bench-") as folder:
        found: dict[str, list[float]] = {side: [] for side in options.sides}
        for name in ["corpus"] * bool({*options.sides} - {*GPT}) + ["bytes"] * bool({*options.sides} & {*GPT}):
            measure(name, folder, options)
        for number in range(options.rounds):
            for side in options.sides:
                seconds = measure(side, folder, options)[WARM_UP:]
                found[side].append(options.sequences * options.context / statistics.median(seconds))
                print(f"round {number + 1}: {SIDES[side]} {found[side][-1]:,.0f} tokens/s", file=sys.stderr, flush=True)
    if options.json:
        print(json.dumps(found))
        return
    print(f"{options.preset}, {options.sequences} sequences of {options.context} tokens a step, {options.threads} threads, "
          f"{options.rounds} rounds of {options.steps} steps; median over rounds")
    print(f"{'':40} {'tokens/s':>10} {'lowest':>10} {'highest':>10} {'MFU':>7} {'ratio':>7}")
    first, full = statistics.median(found[options.sides[0]]), tokens_at_peak(options)
    for side, speeds in found.items():
        middle = statistics.median(speeds)
        of_peak = "" if side in GPT else f"{middle / full:.1%}"
        ratio = statistics.median(found["gpt"]) / middle if side in GPT and "gpt" in found else first / middle
        print(f"{SIDES[side]:40} {middle:10,.0f} {min(speeds):10,.0f} {max(speeds):10,.0f} {of_peak:>7} {ratio:7.2f}")
    print(f"ratio: {SIDES[options.sides[0]]} over this one{', of the GPT-2s distlm' if {*GPT} & {*options.sides} else ''}")


def measure(side: str, storage: str, options: argparse.Namespace) -> list[float]:
    """Seconds of every step of one side, in a process of its own."""
    settings = {name: getattr(options, name) for name in ("steps", "preset", "context", "sequences", "micro", "vocab", "threads")}
    from distlm.head import HUGE_PAGES
    from distlm.train.driver import KEEP_MEMORY

    # a loop alone gains 1 to 2 % by huge pages, distlm's workers do not
    tunables = {"kept": KEEP_MEMORY, "engine": KEEP_MEMORY, **dict.fromkeys(("twin", "twin-workers"), f"{KEEP_MEMORY}:{HUGE_PAGES}")}
    return run_side(__file__, side, storage, settings, tunables.get(side))["seconds"]


def run_side(script: str, side: str, storage: str, settings: dict[str, Any], tunables: str | None = None) -> dict[str, Any]:
    """What a script prints as JSON of one side, in a process of its own. `tunables`: settings of the C library."""
    kept = {"GLIBC_TUNABLES": tunables} if tunables else {}
    environment = {**os.environ, **kept, "OMP_NUM_THREADS": str(settings["threads"]), "DISTLM_STORAGE": storage, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, script, f"--side={side}", f"--storage={storage}",
                           *(f"--{name}={value}" for name, value in settings.items())], env=environment, text=True, capture_output=True)
    if done.returncode:
        sys.exit(f"{side} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def prepare_corpus(options: argparse.Namespace) -> list[float]:
    """A corpus of made-up words, or of their bytes: enough windows for every step of a side."""
    import distlm

    say = made_up(options.vocab)
    folder = options.storage / f"text-{options.side}"
    folder.mkdir()
    for number in range(200):
        (folder / f"{number}.txt").write_text(say(4000))
    distlm.run({"kind": "prepare", "name": corpus_of(options.side), "sources": [str(folder)], "context": options.context,
                "tokenizer": {"train": "bytes"} if options.side == "bytes" else {"vocab_size": options.vocab}},
               storage=options.storage, progress=quiet())
    return []


def corpus_of(side: str) -> str:
    return "bench-bytes" if side in (*GPT, "bytes") else "bench"


def made_up(vocab: int) -> Callable[[int], str]:
    """A function that says so many made-up words, which are as rare as Zipf has them."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 9))) for _ in range(5 * vocab)]
    weights = list(itertools.accumulate(1 / rank for rank in range(1, len(words) + 1)))        # added up once, not at each call
    return lambda count: " ".join(draw.choices(words, cum_weights=weights, k=count))


def run_distlm(options: argparse.Namespace) -> list[float]:
    """Step ends as rank 0 writes them to metrics.jsonl."""
    import distlm

    spec = job(options)
    distlm.run(spec, storage=options.storage, progress=quiet())
    return recorded(options.storage / "runs" / spec["name"])


def job(options: argparse.Namespace) -> dict[str, Any]:
    workers = options.threads if options.side.startswith("workers") or options.side in ("gpt", "engine") else 1
    model = {"config": GPT_CONFIG} if options.side == "gpt" else {"preset": options.preset}
    return {"kind": "train", "name": f"bench-{time.time_ns()}", "corpus": corpus_of(options.side), "model": model,
            "batch": {"global_sequences": options.sequences, "micro_sequences": options.micro // workers},
            "duration": {"steps": options.steps},
            "compile": options.side in ("fp8", "gpt", "engine") or options.side.endswith("compiled"),
            "sharding": {"zero": 2 if options.side == "workers-zero2" else 0},
            "scale": {"workers": workers, "threads_per_worker": options.threads // workers, "gpus_per_worker": int(device() == "cuda")},
            "evaluate": {"every_steps": options.steps}, "checkpoint": {"every_steps": options.steps},
            "precision": "fp8" if options.side == "fp8" else "bf16"}


def recorded(run: Path) -> list[float]:
    """Seconds from the end of one step to that of the next, but for the last, which evaluates and saves."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return intervals([record["time"] for record in map(json.loads, lines) if "loss" in record][:-1])


def run_engine(options: argparse.Namespace) -> list[float]:
    """What `distlm run` gives to each of its workers, in processes of one thread that nothing watches."""
    import torch

    spec = job(options)
    run = options.storage / "runs" / spec["name"]
    run.mkdir(parents=True)
    os.environ |= {"DS_ACCELERATOR": "cpu", "WORLD_SIZE": str(options.threads)}
    torch.multiprocessing.spawn(engine, (spec, options.storage, run), options.threads)           # raises where one has failed
    return recorded(run)


def engine(rank: int, spec: dict[str, Any], storage: Path, run: Path) -> None:
    """A rank of a run, as `train/worker.py` has it inside Ray Train."""
    import torch
    from torch import distributed

    from distlm.corpus.stream import local_steps, ordered_steps
    from distlm.runs import RunFolder
    from distlm.spec.load import load_spec
    from distlm.storage import Storage
    from distlm.train.loop import fit
    from distlm.train.recipe import make_recipe

    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    distributed.init_process_group("gloo", init_method=f"file://{run}/ranks", rank=rank, world_size=spec["scale"]["workers"])
    recipe = make_recipe(load_spec(spec).spec, Storage(storage))
    plan = recipe.plan()
    fit(recipe, RunFolder(run), ordered_steps(local_steps(plan, rank, 0), plan, rank, 0), rank=rank, device=torch.device("cpu"))


def run_bare(options: argparse.Namespace) -> list[float]:
    """The loop that anybody would write: fused AdamW, clipping, weights in bf16, or as nanoGPT has them on a CPU."""
    import torch

    model, vocab = make_model(options)
    model = model.to(device(), torch.float32 if options.side == "nanogpt" else torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    ends = []
    for _ in range(options.steps):
        for x in torch.randint(0, vocab, (options.sequences, options.context)).to(device()).split(options.micro):
            loss = model(input_ids=x, labels=x).loss * len(x) / options.sequences
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        ends.append(time.time())
    return intervals(ends)


def run_twin(options: argparse.Namespace) -> list[float]:
    """What `train/loop.py` computes in a step, by hand."""
    return twin(0, 1, options)


def run_twin_workers(options: argparse.Namespace) -> list[float]:
    """A process of one thread for each of `threads`."""
    import torch

    options.threads, workers = 1, options.threads
    results = torch.multiprocessing.get_context("spawn").SimpleQueue()
    torch.multiprocessing.spawn(twin, (workers, options, results), workers)            # raises where one has failed
    seconds: list[float] = results.get()
    return seconds


def twin(rank: int, world: int, options: argparse.Namespace, results: Any = None) -> list[float]:
    """A rank's part of the steps, compiled where there are several; the first one's seconds."""
    import torch
    from torch import distributed

    from distlm.model.attention import use_cpu_attention
    from distlm.model.build import buffers, decoder_layers, restore_buffers
    from distlm.model.loss import CausalLoss

    if world > 1:
        distributed.init_process_group("gloo", init_method=f"file://{options.storage}/twin-{os.getppid()}", rank=rank, world_size=world)
    model, vocab = make_model(options)
    if device() == "cpu":
        use_cpu_attention(model)
    exact, loss_of = buffers(model), CausalLoss(model)
    model = model.to(device())
    masters = [p.detach().clone() for p in model.parameters()]
    model = model.to(torch.bfloat16)
    restore_buffers(model, exact)
    if world > 1:
        for layer in decoder_layers(model):
            layer.compile()
    optimizer = torch.optim.AdamW(masters, lr=1e-3, fused=True)
    ends = []
    for _ in range(options.steps):
        tokens = torch.randint(0, vocab, (options.sequences // world, options.context + 1)).to(device())
        for x in tokens.split(options.micro // world):
            loss = loss_of(x) / (options.sequences * options.context)
            loss.backward()
        for master, p in zip(masters, model.parameters(), strict=True):
            assert p.grad is not None
            master.grad, p.grad = p.grad.float(), None
        if world > 1:
            together = torch.cat([master.grad.flatten() for master in masters if master.grad is not None])
            distributed.all_reduce(together)
            for master, part in zip(masters, together.split([master.numel() for master in masters]), strict=True):
                master.grad = part.view_as(master)
        torch.nn.utils.clip_grad_norm_(masters, 1.0)
        optimizer.step()
        torch._foreach_copy_([p.data for p in model.parameters()], masters)
        loss.item()
        ends.append(time.time())
    if rank == 0 and results is not None:
        results.put(intervals(ends))
    if world > 1:
        distributed.destroy_process_group()
    return intervals(ends)


def run_trainer(options: argparse.Namespace) -> list[float]:
    """transformers' Trainer with its bf16, nothing logged or saved."""
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments

    model, vocab = make_model(options)
    ends: list[float] = []

    class Samples(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return options.steps * options.sequences

        def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
            x = torch.randint(0, vocab, (options.context,), generator=torch.Generator().manual_seed(i))
            return {"input_ids": x, "labels": x}

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            if device() == "cuda":
                torch.cuda.synchronize()
            ends.append(time.time())

    arguments = TrainingArguments(output_dir=str(options.storage / "trainer"), per_device_train_batch_size=options.micro, bf16=True,
                                  gradient_accumulation_steps=options.sequences // options.micro,
                                  max_steps=options.steps, use_cpu=device() == "cpu", report_to=[], save_strategy="no",
                                  logging_strategy="no", optim="adamw_torch_fused", learning_rate=1e-3, disable_tqdm=True)
    Trainer(model=model, args=arguments, train_dataset=Samples(), callbacks=[Clock()]).train()
    return intervals(ends)


def make_model(options: argparse.Namespace) -> tuple[Any, int]:
    """The model that distlm trains here, and its vocabulary: that of the corpus."""
    import torch

    from distlm.corpus.manifest import read_manifest
    from distlm.model.build import Shape, build_model, model_config
    from distlm.spec.train import ModelSpec

    torch.set_num_threads(options.threads)
    manifest = read_manifest(options.storage / "corpora" / corpus_of(options.side))
    spec = ModelSpec(config=GPT_CONFIG) if options.side in GPT else ModelSpec(preset=options.preset)
    return build_model(spec, model_config(spec, Shape(manifest.vocab_size, options.context, manifest.eos_id)), 0), manifest.vocab_size


def tokens_at_peak(options: argparse.Namespace) -> float:
    """Tokens a second at an MFU of 1."""
    import torch

    from distlm.model.build import Shape, model_config, parameter_sizes
    from distlm.spec.train import ModelSpec
    from distlm.train.flops import config_flops, measured_peak, peak_flops

    torch.set_num_threads(options.threads)
    config = model_config(ModelSpec(preset=options.preset), Shape(options.vocab, options.context, 0))
    peak = peak_flops(torch.cuda.get_device_name()) if device() == "cuda" else measured_peak("bf16")
    return (peak or float("nan")) / config_flops(config, parameter_sizes(config), options.context)


def intervals(ends: list[float]) -> list[float]:
    return [after - before for before, after in itertools.pairwise(ends)]


def default_sides() -> list[str]:
    """Those that this machine can run, and that tell something there."""
    from importlib.util import find_spec

    import torch

    from distlm.model.float8 import CAPABILITY

    if device() == "cpu":
        return [side for side in SIDES if side != "fp8"]
    fp8 = find_spec("torchao") is not None and torch.cuda.get_device_capability() >= CAPABILITY
    return ["distlm", "compiled", *(["fp8"] if fp8 else []), "bare", "twin", "trainer"]          # a worker a core is for CPUs


def device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def quiet() -> Any:
    from distlm.progress import Progress

    return Progress()


SIDE: dict[str, Callable[[argparse.Namespace], list[float]]] = {
    "corpus": prepare_corpus, "bytes": prepare_corpus, "gpt": run_distlm, "nanogpt": run_bare, "twin-workers": run_twin_workers,
    "distlm": run_distlm, "compiled": run_distlm, "fp8": run_distlm, "workers": run_distlm,
    "workers-zero2": run_distlm, "workers-compiled": run_distlm, "engine": run_engine,
    "bare": run_bare, "kept": run_bare, "twin": run_twin,
    "trainer": run_trainer}

if __name__ == "__main__":
    main()
