"""Tokens per second of fine-tuning: distlm beside transformers' Trainer (with peft, for LoRA) and, where it is installed, trl.

    python benchmarks/finetune.py              # 12.2 M parameters, 256 tokens of context, 32 sequences a step, bf16, 2 threads
    python benchmarks/finetune.py --quick      # one round of a few steps: does it work
    python benchmarks/finetune.py --preset llama-8b --vocab 32000 --context 2048 --sequences 8 --micro 4 --sides lora peft qlora   # a GPU

All sides train the same model on the same windows in the same order: conversations packed by best-fit, with the positions that keep them
apart and loss on the answers alone. Each side runs in a process of its own, in turn, several rounds. A side's figure is the median over
its steps of the step's tokens, without padding, over the time from the end of the step before to its own; the first steps, and those
that evaluate or save, are left out. Of these tokens so many give loss as the table's head says. Where an adapter is trained, each side
holds the base in bf16, or in NF4. On a GPU the base model is made there, in bf16, and the table has the most of its memory that each side's
process had allocated at once. Preferences are pairs of answers of made-up words, which distlm has in one window and computes in rows with
others, and trl in two rows; the reference is computed before the first step. trl recomputes activations unless it is told not to, as it
is here.
"""

import argparse
import itertools
import json
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from train import WARM_UP, device, intervals, made_up, quiet, run_side

SIDES = {"sft": "distlm run, objective: sft", "sft-workers": "a worker a core, compiled", "trainer": "transformers Trainer",
         "trl": "trl SFTTrainer", "lora": "distlm run, adapter", "lora-workers": "a worker a core",
         "lora-workers-compiled": "the same, compile: true", "peft": "transformers Trainer, peft", "trl-lora": "trl SFTTrainer, peft",
         "qlora": "distlm run, adapter on NF4", "peft-qlora": "transformers Trainer, on NF4",
         "dpo": "distlm run, objective: dpo", "trl-dpo": "trl DPOTrainer"}
_, HALF, QUANTIZED, PAIRED = GROUPS = (
    ("sft", "sft-workers", "trainer", "trl"), ("lora", "lora-workers", "lora-workers-compiled", "peft", "trl-lora"),
    ("qlora", "peft-qlora"), ("dpo", "trl-dpo"))
"""Sides of one kind, distlm's first: full fine-tuning, adapters on a base in bf16 and in NF4, and preferences."""
ADAPTED = (*HALF, *QUANTIZED)
BETA = 0.1
"""Of the loss of pairs."""
SETTINGS = ("steps", "preset", "context", "sequences", "micro", "vocab", "threads", "rank")


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
    parser.add_argument("--rank", type=int, default=16, help="of the adapter")
    parser.add_argument("--threads", type=int, default=2, help="threads of matrix products on CPU")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=[side for side in SIDES if is_there(side)])
    parser.add_argument("--json", action="store_true", help="print figures, not a table")
    parser.add_argument("--side", choices=[*SIDES, "corpus", "pairs"], help=argparse.SUPPRESS)
    parser.add_argument("--storage", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick:
        options.steps, options.rounds = 8, 1
    options.micro = options.micro or options.sequences
    if options.side:
        print(json.dumps(SIDE[options.side](options)))
        return
    settings = {name: getattr(options, name) for name in SETTINGS}
    found: dict[str, list[float]] = {side: [] for side in options.sides}
    memory: dict[str, int] = dict.fromkeys(options.sides, 0)
    with tempfile.TemporaryDirectory(prefix="distlm-bench-") as folder:
        counts = {"corpus": run_side(__file__, "corpus", folder, settings)}
        if {*PAIRED} & {*options.sides}:
            counts["pairs"] = run_side(__file__, "pairs", folder, settings)
        for number, side in itertools.product(range(options.rounds), options.sides):
            taken = run_side(__file__, side, folder, settings)
            tokens = counts["pairs" if side in PAIRED else "corpus"]["tokens"][1:]
            paces = [count / each for count, each in zip(tokens, taken["seconds"], strict=False)][WARM_UP:]
            found[side].append(statistics.median(paces))
            memory[side] = max(memory[side], taken["bytes"])
            print(f"round {number + 1}: {SIDES[side]} {found[side][-1]:,.0f} tokens/s{gib(memory[side])}", file=sys.stderr, flush=True)
    if options.json:
        print(json.dumps({side: {"tokens_per_s": found[side], "gpu_bytes": memory[side] or None} for side in found}))
        return
    print(f"{options.preset}, {options.sequences} windows of {options.context} tokens a step, {options.threads} threads, "
          f"{options.rounds} rounds of {options.steps} steps; medians")
    for name, found_of in counts.items():
        share = sum(found_of["loss"]) / sum(found_of["tokens"])
        padding = 1 - sum(found_of["tokens"]) / len(found_of["tokens"]) / options.sequences / (options.context + 1)
        kind = "conversations" if name == "corpus" else "pairs, one a window"
        print(f"{kind}: {padding:.1%} of the windows are padding, {share:.0%} of the rest gives loss")
    print(f"{'':28} {'tokens/s':>10} {'lowest':>10} {'highest':>10} {'ratio':>7}{', GPU memory' * any(memory.values())}")
    for group in GROUPS:
        first = next((side for side in group if side in found and not side.startswith(("trainer", "peft", "trl"))), "")
        for side in (side for side in group if side in found):
            middle = statistics.median(found[side])
            ratio = f"{statistics.median(found[first]) / middle:.2f}" if first else ""
            print(f"{SIDES[side]:28} {middle:10,.0f} {min(found[side]):10,.0f} {max(found[side]):10,.0f} {ratio:>7}{gib(memory[side])}")
    print("ratio: the first side of distlm over this one, of the same kind")


def gib(size: int) -> str:
    """A GPU's memory, to end a line; nothing of a CPU's."""
    return f", {size / 2**30:.1f} GiB" if size else ""


def is_there(side: str) -> bool:
    """Whether what the side needs is installed, and it is one for this machine."""
    from importlib.util import find_spec

    wanted = ["peft"] * (side in ADAPTED) + ["bitsandbytes"] * (side in QUANTIZED) + ["trl", "datasets"] * side.startswith("trl")
    return all(map(find_spec, wanted)) and not ("workers" in side and device() == "cuda")


def prepare(options: argparse.Namespace) -> dict[str, list[int]]:
    """Conversations of made-up words, enough of them for every step, and a base model; of each step the tokens, and those with loss."""
    import torch

    import distlm
    from distlm.corpus.manifest import read_manifest
    from distlm.model.build import Shape, build_model, model_config
    from distlm.model.export import export_model
    from distlm.spec.train import ModelSpec

    say, draw = made_up(options.vocab), random.Random(1)
    with (options.storage / "chats.jsonl").open("w") as file:
        for _ in range(max(500, options.steps * options.sequences * options.context // 100)):
            most = options.context // 6
            file.write(json.dumps({"prompt": say(draw.randint(5, most)), "completion": say(draw.randint(5, most))}) + "\n")
    distlm.run({"kind": "prepare", "name": "bench", "sources": [str(options.storage / "chats.jsonl")], "context": options.context,
                "conversations": {"prompt_key": "prompt", "completion_key": "completion"},
                "tokenizer": {"vocab_size": options.vocab}}, storage=options.storage, progress=quiet())
    manifest, spec = read_manifest(options.storage / "corpora" / "bench"), ModelSpec(preset=options.preset)
    place = (torch.bfloat16, torch.device("cuda")) if device() == "cuda" else ()
    model = build_model(spec, model_config(spec, Shape(manifest.vocab_size, options.context, manifest.eos_id)), 0, *place)
    export_model(model, None, manifest.tokenizer, options.storage / "base", {})
    return count(options)


def prepare_pairs(options: argparse.Namespace) -> dict[str, list[int]]:
    """Pairs of answers to prompts of made-up words, enough of them for every step; of each step the tokens, and those with loss."""
    import distlm

    say, draw = made_up(options.vocab), random.Random(2)
    with (options.storage / "pairs.jsonl").open("w") as file:
        for _ in range(2 * options.steps * options.sequences):      # the longest do not fit, and some are for validation
            most = options.context // 7
            file.write(json.dumps({key: say(draw.randint(5, most)) for key in ("prompt", "chosen", "rejected")}) + "\n")
    distlm.run({"kind": "prepare", "name": "pairs", "sources": [str(options.storage / "pairs.jsonl")], "context": options.context,
                "conversations": {"prompt_key": "prompt", "chosen_key": "chosen", "rejected_key": "rejected"},
                "tokenizer": {"from": str(options.storage / "corpora" / "bench" / "tokenizer")}}, storage=options.storage, progress=quiet())
    return count(options)


def count(options: argparse.Namespace) -> dict[str, list[int]]:
    """Of each step the tokens that are no padding, and those with loss."""
    from distlm.corpus.manifest import read_manifest
    from distlm.corpus.stream import NO_LOSS

    end, tokens, loss = read_manifest(options.storage / "corpora" / corpus_of(options)).eos_id, [], []
    for rows, marks in steps(options):
        tokens.append(int((~((rows == end) & (marks & NO_LOSS > 0))).sum()))
        loss.append(int((marks[:, 1:] & NO_LOSS == 0).sum()))
    return {"tokens": tokens, "loss": loss}


def corpus_of(options: argparse.Namespace) -> str:
    return "pairs" if options.side in ("pairs", *PAIRED) else "bench"


def spec_of(options: argparse.Namespace, name: str = "bench", **more: Any) -> dict[str, Any]:
    """The run of distlm's sides."""
    kind = {"objective": "dpo", "dpo": {"beta": BETA}} if corpus_of(options) == "pairs" else {"objective": "sft"}
    return {"kind": "train", "name": name, "corpus": corpus_of(options), "model": {"from": str(options.storage / "base")}, **kind,
            "batch": {"global_sequences": options.sequences, "micro_sequences": options.micro}, "duration": {"steps": options.steps},
            "scale": {"threads_per_worker": options.threads, "gpus_per_worker": int(device() == "cuda")},
            "evaluate": {"every_steps": options.steps}, "checkpoint": {"every_steps": options.steps}, "precision": "bf16", **more}


def steps(options: argparse.Namespace) -> list[tuple[Any, Any]]:
    """(windows, their marks) of every step, as distlm's sides train on them."""
    from distlm.corpus.stream import read_marks, read_samples
    from distlm.spec import TrainSpec
    from distlm.storage import Storage
    from distlm.train.recipe import make_recipe

    plan = make_recipe(TrainSpec.model_validate(spec_of(options)), Storage(options.storage)).plan()
    return [(read_samples(plan, own), read_marks(plan, own)) for step in range(options.steps) for own in [plan.samples(step, 0)]]


def run_distlm(options: argparse.Namespace) -> dict[str, Any]:
    """Step ends and memory as rank 0 writes them to metrics.jsonl. The run goes: its export is as large as the base."""
    import distlm

    name = f"bench-{time.time_ns()}"
    held = {"base": "nf4"} if options.side in QUANTIZED else {}
    more: dict[str, Any] = {"adapter": {"rank": options.rank, **held}} if options.side in ADAPTED else {}
    if "workers" in options.side:
        more |= {"scale": {"workers": options.threads, "threads_per_worker": 1}, "compile": options.side != "lora-workers",
                 "batch": {"global_sequences": options.sequences, "micro_sequences": options.micro // options.threads}}
    distlm.run(spec_of(options, name, **more), storage=options.storage, progress=quiet())
    folder = options.storage / "runs" / name
    records = [record for record in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if "loss" in record]
    shutil.rmtree(folder)
    return {"seconds": intervals([record["time"] for record in records][:-1]),
            "bytes": max(record["memory_bytes"] for record in records) if device() == "cuda" else 0}


def run_trainer(options: argparse.Namespace) -> dict[str, Any]:
    """transformers' Trainer, or trl's, with its bf16, nothing logged or saved."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainerCallback, TrainingArguments, default_data_collator

    torch.set_num_threads(options.threads)
    given: dict[str, Any] = {"dtype": torch.bfloat16 if options.side in ADAPTED else torch.float32, "device_map": device()}
    if options.side in QUANTIZED:
        given["quantization_config"] = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                                                          bnb_4bit_compute_dtype=torch.bfloat16)
    model: Any = AutoModelForCausalLM.from_pretrained(options.storage / "base", **given)
    if options.side in ADAPTED:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=options.rank, lora_alpha=2 * options.rank, target_modules="all-linear",
                                                 task_type="CAUSAL_LM"))
    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            if device() == "cuda":
                torch.cuda.synchronize()
            ends.append(time.time())

    kind: Any = Trainer
    settings: Any = TrainingArguments
    more: dict[str, Any] = {}
    collator: Any = default_data_collator
    data: Any = pairs(options) if options.side in PAIRED else samples(options)
    if options.side.startswith("trl"):
        from datasets import Dataset
        from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

        class Pairs(DPOTrainer):
            def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
                return dataset                             # tokens already

        kind, settings = SFTTrainer, SFTConfig
        more = {"max_length": None, "gradient_checkpointing": False}
        if options.side in PAIRED:
            kind, settings, collator = Pairs, DPOConfig, None
            more |= {"beta": BETA, "precompute_ref_log_probs": True}
        else:
            data = [{key: value.tolist() for key, value in one.items()} for one in data]
            more |= {"dataset_kwargs": {"skip_prepare_dataset": True}, "remove_unused_columns": False}       # else positions go
        data = Dataset.from_list(data)
    arguments = settings(output_dir=str(options.storage / "trainer"), per_device_train_batch_size=options.micro, bf16=True,
                         gradient_accumulation_steps=options.sequences // options.micro, max_steps=options.steps,
                         use_cpu=device() == "cpu", report_to=[], save_strategy="no", logging_strategy="no", optim="adamw_torch_fused",
                         learning_rate=1e-3, disable_tqdm=True, train_sampling_strategy="sequential", **more)
    kind(model=model, args=arguments, train_dataset=data, data_collator=collator, callbacks=[Clock()]).train()
    return {"seconds": intervals(ends), "bytes": torch.cuda.max_memory_allocated() if device() == "cuda" else 0}


def samples(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The windows in order, one after the other: their tokens, where in its conversation each stands, and what gives loss. A window has
    one prediction fewer than at distlm, whose last token is predicted too."""
    import numpy as np
    import torch

    from distlm.train.batch import make_batch

    found = []
    for rows, marks in steps(options):
        batch = make_batch(np.stack([rows, marks], 1).astype(np.int64), True)
        assert batch.targets is not None and batch.positions is not None
        labels = torch.cat([torch.full((len(rows), 1), -100), batch.targets[:, :-1]], 1)
        found += [{"input_ids": x, "labels": y, "position_ids": p}
                  for x, y, p in zip(batch.tokens[:, :-1], labels, batch.positions, strict=True)]
    return found


def pairs(options: argparse.Namespace) -> list[dict[str, list[int]]]:
    """The pairs in order: the tokens of the prompt, and of each answer those that give loss."""
    import numpy as np

    from distlm.corpus.stream import NO_LOSS, START

    found = []
    for rows, marks in steps(options):
        for tokens, own in zip(rows, marks, strict=True):
            begin, middle = np.flatnonzero(own & START)[:2]
            gives = np.flatnonzero(own & NO_LOSS == 0)
            chosen, rejected = gives[gives < middle], gives[gives >= middle]
            assert [*chosen, *rejected] == [*range(chosen[0], chosen[-1] + 1), *range(rejected[0], rejected[-1] + 1)]
            found.append({"prompt_ids": tokens[begin:chosen[0]].tolist(), "chosen_ids": tokens[chosen].tolist(),
                          "rejected_ids": tokens[rejected].tolist()})
    return found


SIDE: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {"corpus": prepare, "pairs": prepare_pairs, **{
    side: run_trainer if side.startswith(("trainer", "peft", "trl")) else run_distlm for side in SIDES}}

if __name__ == "__main__":
    main()
