"""Training without Ray: a corpus made in place, ranks as plain processes over gloo, or on this machine's GPU, results in files."""

import json
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from distlm.corpus.bestfit import best_fit_bytes
from distlm.corpus.manifest import file_xxh3, tokenizer_hash, write_manifest
from distlm.corpus.split import HASH_BYTES, content_hash
from distlm.spec import TrainSpec
from distlm.spec.load import dump, to_yaml
from distlm.train.determinism import ENVIRONMENT

VOCABULARY, CONTEXT = 64, 16


def make_corpus(folder: Path, windows: tuple[int, ...] = (20, 17, 11), val: int = 7, context: int = CONTEXT,
                starts: tuple[int, ...] = (0,)) -> Path:
    """A corpus folder of random windows: every window's first token pair tells its number, so that windows can be counted. `starts`: where
    documents begin in each."""
    random = np.random.default_rng(0)
    tokenizer = Tokenizer(models.WordLevel({f"t{i}": i for i in range(VOCABULARY)}, unk_token="t0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="t0").save_pretrained(folder / "tokenizer")
    splits = {}
    number = 0
    for split, sizes in (("train", windows), ("val", (val,) if val else ())):
        (folder / split).mkdir(parents=True)
        shards = []
        for i, size in enumerate(sizes):
            tokens = random.integers(0, VOCABULARY, (size, context + 1), dtype=np.uint16)
            tokens[:, 2::2] = tokens[:, 1:-1:2]            # something to learn: every other token repeats
            tokens[:, 0], tokens[:, 1] = np.divmod(np.arange(number, number + size), VOCABULARY)
            number += size
            column = pa.FixedSizeListArray.from_arrays(pa.array(tokens.reshape(-1)), context + 1)
            begins = pa.array([starts] * size, type=pa.list_(pa.int32()))
            batch = pa.record_batch([column, begins], names=["tokens", "starts"])
            file = folder / split / f"{i:05d}.arrow"
            with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
                writer.write_batch(batch)
            shards.append({"file": f"{split}/{i:05d}.arrow", "windows": size, "bytes": file.stat().st_size, "xxh3": file_xxh3(file)})
        total = sum(sizes)
        splits[split] = {"documents": 1, "bytes": total * context * 3, "tokens": total * context, "dropped_tokens": 0, "windows": total,
                         "shards": shards}
    write_manifest(folder, {"name": folder.name, "context": context, "dtype": "uint16", "seed": 0, "sources": [], "steps": [],
                            "tokenizer": {"kind": "given", "vocab_size": VOCABULARY, "eos_id": 0,
                                          "hash": tokenizer_hash(folder / "tokenizer")}, "split": {}, "splits": splits})
    return folder


def make_packed_corpus(folder: Path, lengths: tuple[int, ...] = (3, 9, 1, 40, 16, 17, 2, 5, 18, 12), times: int = 12,
                       conversations: bool = False, silent: int = 0) -> Path:
    """A corpus of random documents, some longer than windows, that are packed by best-fit; each ends with token 0. Of conversations about
    half of the tokens give loss, and of every `silent`-th none."""
    random, splits = np.random.default_rng(1), []
    for repeats in (times, 2):
        sizes = np.asarray(random.permutation(np.repeat(lengths, repeats)), np.int64)
        starts = np.cumsum(sizes) - sizes
        tokens = random.integers(1, VOCABULARY, sizes.sum(), dtype=np.uint16)
        tokens[np.append(starts[1:], len(tokens)) - 1] = 0
        loss = random.integers(0, 2, sizes.sum()).astype(bool) if conversations else None
        if loss is not None and silent:
            loss[np.repeat(np.arange(len(sizes)) % silent == 0, sizes)] = False
        splits.append((tokens, starts, loss))
    return pack_corpus(folder, *splits)


def pack_corpus(folder: Path, train: tuple[Any, ...], val: tuple[Any, ...]) -> Path:
    """A corpus of documents that are packed by best-fit. Of a split: its tokens, where documents begin in them, and of conversations which
    tokens give loss, else None."""
    make_corpus(folder, windows=(1,), val=1)
    data = json.loads((folder / "manifest.json").read_text())
    del data["format"]
    padding = 0
    for split, (tokens, starts, loss) in (("train", train), ("val", val)):
        content, windows, repeated = best_fit_bytes(tokens, starts, 0, CONTEXT, "uint16", 0, loss)
        file = folder / split / "00000.arrow"
        file.write_bytes(content)
        padded = windows * (CONTEXT + 1) - len(tokens) - repeated
        shard = {"file": f"{split}/00000.arrow", "windows": windows, "bytes": len(content), "xxh3": file_xxh3(file)}
        data["splits"][split] = {"documents": len(starts), "bytes": 3 * len(tokens), "tokens": len(tokens), "dropped_tokens": 0,
                                 "windows": windows, "padding_tokens": padded, "repeated_tokens": repeated, "shards": [shard]}
        padding += padded
    said = {} if train[2] is None else {"conversations": {"loss": "assistant", "loss_share": 0.5}}
    write_manifest(folder, {**data, **said, "pack": {"method": "best_fit", "padding_tokens": padding, "padding_share": 0.1,
                                                     "repeated_tokens": 0}})
    return folder


def make_labelled_corpus(folder: Path, documents: tuple[int, int] = (60, 21), multiple: bool = False, sources: Sequence[str] = (),
                         names: Sequence[str] = ("zero", "one", "two")) -> Path:
    """A corpus of random documents for training and validation, each of up to a window, whose label is the remainder of its last token by
    three, or by two where there are so many names, or labels, its last two. Rare labels are 2. Each ends with token 0. Documents are of
    the sources in turns."""
    make_corpus(folder, windows=(1,), val=1)
    random, data = np.random.default_rng(1), json.loads((folder / "manifest.json").read_text())
    del data["format"]
    of, counts, lists = min(3, len(names)), {}, []
    for split, number in zip(("train", "val"), documents, strict=True):
        sizes = np.append(random.integers(3, CONTEXT + 2, number - 1), CONTEXT + 1)
        starts = np.cumsum(sizes) - sizes
        tokens = random.integers(1, VOCABULARY, sizes.sum(), dtype=np.uint16)
        ends = np.append(starts[1:], len(tokens))
        tokens[ends - 1] = 0
        tokens[ends - 2] -= (tokens[ends - 2] % 3 == 2) & (random.random(number) < 0.6) & (tokens[ends - 2] > 2)
        labels = [sorted({int(token) % of for token in tokens[end - (3 if multiple else 2):end - 1]}) for end in ends]
        content, windows, repeated = best_fit_bytes(tokens, starts, 0, CONTEXT, "uint16", 0, labels=labels)
        file = folder / split / "00000.arrow"
        file.write_bytes(content)
        shard = {"file": f"{split}/00000.arrow", "windows": windows, "bytes": len(content), "xxh3": file_xxh3(file)}
        data["splits"][split] = {"documents": number, "bytes": 3 * len(tokens), "tokens": len(tokens), "dropped_tokens": 0,
                                 "windows": windows, "padding_tokens": windows * (CONTEXT + 1) - len(tokens), "repeated_tokens": repeated,
                                 "shards": [shard]}
        counts[split] = {name: sum(i in one for one in labels) for i, name in enumerate(names)}
        origins = pa.array(np.arange(number) % max(1, len(sources)), pa.int32())
        lists.append(pa.table({"split": [split] * number, "origin": origins, "bytes": 3 * sizes, "tokens": sizes, "hash": pa.array([
            content_hash(tokens[start:end].tobytes()) for start, end in zip(starts, ends, strict=True)], pa.binary(HASH_BYTES))}))
    pq.write_table(pa.concat_tables(lists), folder / "documents.parquet")
    data["sources"] = [{"name": name, "format": "auto", "text_key": "text", "files": 1, "bytes": 100, "xxh3": name} for name in sources]
    write_manifest(folder, {**data, "labels": {"multiple": multiple, "names": [*names], **counts, "cut_documents": 0},
                            "pack": {"method": "document", "padding_tokens": 0, "padding_share": 0.1, "repeated_tokens": 0}})
    return folder


def spec(corpus: Path, **sections: object) -> TrainSpec:
    """A small training spec; `sections` replace whole keys."""
    base: dict[str, object] = {
        "name": "run", "corpus": str(corpus), "precision": "fp32", "duration": {"steps": 20},
        "model": {"config": {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
                             "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}},
        "batch": {"global_sequences": 12, "micro_sequences": 2}, "optimizer": {"lr": 0.01},
        "schedule": {"name": "cosine", "warmup_steps": 3},
        "evaluate": {"every_steps": 10}, "checkpoint": {"every_steps": 5}}
    return TrainSpec.model_validate({**base, **sections})


def run_ranks(runs: dict[Path, TrainSpec], *, device: str = "cpu", kill_before_step: int | None = None,
              full_before_step: int | None = None, preempt_before_step: int | None = None, stop_before_step: int | None = None,
              poison: dict[str, object] | None = None, hold: tuple[int, int] | None = None, slow_s: float = 0,
              watch: bool = False, dry: bool = False, inside: tuple[signal.Signals, str, int] | None = None,
              empty_step: int | None = None, gradients: bool = False, plain_disks: bool = False,
              environment: dict[str, str] | None = None, block_save: int | None = None, rests: bool = False, start: bool = False,
              waits: bool = False) -> str:
    """Train each run, one after the other in one group of `scale.workers` processes on `device`, from its last committed checkpoint.

    `kill_before_step`: the last rank is sent SIGKILL when it asks for that step. `full_before_step`: from
    that step on no file may grow beyond 10 kB, as on a full disk, and the ranks must fail. `preempt_before_step`: the last rank is sent
    SIGTERM when it asks for that step, and the ranks must fail. `stop_before_step`: the same with SIGSTOP, and it must end by SIGKILL,
    which nobody here sends. `slow_s`: the last rank is so many seconds late with each step. `poison`: what `add_poison` takes; every run
    goes on to the next one after the error that it then ends with. `hold`: (step, until): what is written of that step's checkpoint beside
    the steps is not, on any rank, before that rank asks for step `until`, or its run ends. `watch`: every rank prints what `watch_base`
    says. `dry`: the runs are dry runs. `inside`: (signal, place, n): the last rank is sent it inside the n-th step, counted from 1, or
    inside what follows it, as `strike` has it, and the ranks must end as with the others. `empty_step`: no token of
    that step gives loss, on any rank, and the ranks must fail; for corpora with marks. `gradients`: runs take their steps alone, and rank 0
    writes what `watch_gradients` says. `plain_disks`: disks are read and written by `use_plain_op`. `environment`: of the ranks, beside the
    test's. `block_save`: the step whose checkpoint the last of two ranks hangs at, as `faults.block_save` has it, and it must end by
    SIGKILL. `rests`: every rank prints what `faults.watch_rests` says. `start`: every rank is as `faults.watch_start` has it. `waits`:
    runs take their steps alone, of which every rank prints what `faults.watch_waits` says. Returns what the ranks printed."""
    for run, spec in runs.items():
        run.mkdir(parents=True, exist_ok=True)
        (run / "spec.yaml").write_text(to_yaml(dump(spec)))
    [world] = {spec.scale.workers for spec in runs.values()}
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)   # of this process: no other can take its port meanwhile
    context: Any = multiprocessing.get_context("forkserver" if device == "cpu" else "spawn")
    context.set_forkserver_preload(["tests.train.preload"])
    alone = {"kill": kill_before_step, "preempt": preempt_before_step, "stop": stop_before_step, "slow_s": slow_s, "inside": inside}
    ranks = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for rank in range(world):
                own = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "RANK": str(rank),
                       "LOCAL_RANK": str(rank), "TORCHELASTIC_USE_AGENT_STORE": "True", "DS_ACCELERATOR": device, **(environment or {}),
                       **(ENVIRONMENT if any(spec.deterministic for spec in runs.values()) else {})}
                ranks.append(context.Process(
                    target=rank_process, args=(list(runs), own, Path(folder, str(rank))),
                    kwargs={**(alone if rank == world - 1 else {}), "full": full_before_step, "poison": poison, "hold": hold,
                            "watch": watch, "dry": dry, "empty": empty_step, "gradients": gradients, "plain_disks": plain_disks,
                            "block": block_save, "rests": rests, "start": start, "waits": waits}))
                ranks[-1].start()
            deadline = time.monotonic() + 240
            for one in ranks:
                one.join(max(0, deadline - time.monotonic()))
            outputs = [Path(folder, str(rank)).read_text() for rank in range(world)]
            assert None not in [one.exitcode for one in ranks], "\n".join(["ranks that do not end:", *(one[-3000:] for one in outputs)])
        finally:
            for one in ranks:
                one.kill()
    codes = [one.exitcode for one in ranks]
    if {kill_before_step, stop_before_step, block_save} != {None} or (inside and inside[0] != signal.SIGTERM):
        assert codes[-1] == -signal.SIGKILL, outputs[-1][-3000:]
    else:
        fails = not {full_before_step, preempt_before_step, inside, empty_step} <= {None}
        assert any(codes) == fails, "\n".join(output[-3000:] for output in outputs)
    return "\n".join(outputs)


def metrics(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[float]:
    """The training loss of every step, in order; fails where a step is missing or there twice."""
    records = [record for record in metrics(run) if "loss" in record]
    assert [record["step"] for record in records] == list(range(1, len(records) + 1))
    return [record["loss"] for record in records]


def losses_by_hand(given: TrainSpec, corpus: Path) -> list[float]:
    """The losses of plain PyTorch over the same windows: mean cross-entropy, clipped to 1, AdamW, the schedule's rate."""
    import torch
    from torch.nn import functional

    from distlm.corpus.stream import Windows
    from distlm.model.adapter import add_adapter
    from distlm.model.build import build_model, model_config
    from distlm.storage import Storage
    from distlm.train.recipe import make_recipe
    from distlm.train.schedule import learning_rate

    recipe = make_recipe(given, Storage(corpus.parent))
    nf4 = given.adapter is not None and given.adapter.base == "nf4"
    model = build_model(given.model, model_config(given.model, recipe.shape), given.seed, torch.float32, nf4=nf4)
    if given.adapter:
        add_adapter(model, given.adapter, given.seed)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW([{"params": [p for p in trained if p.dim() >= 2], "weight_decay": 0.1},
                                   {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0}], betas=(0.9, 0.95))
    windows, plan, found = Windows(corpus), recipe.plan(), []
    for step in range(recipe.num_steps):
        samples = np.concatenate([plan.samples(step, rank) for rank in range(plan.world)])
        tokens = torch.from_numpy(windows.read(*windows.order(0).locate(samples)).astype(np.int64))
        logits = model(input_ids=tokens[:, :-1]).logits
        loss = functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(given.schedule, 0.01, step, recipe.num_steps)
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


def windows_seen(run: Path) -> dict[int, list[int]]:
    """The numbers of the windows that the ranks took, by step; of a step that was run again, the last time."""
    seen: dict[tuple[int, str], list[int]] = {}
    for file in sorted(run.glob("windows-*.txt")):
        for line in file.read_text().splitlines():
            step, numbers = line.split(": ")
            seen[int(step), file.name] = [int(number) for number in numbers.split()]
    return {step: sorted(n for (s, _), numbers in seen.items() if s == step for n in numbers) for step in sorted({s for s, _ in seen})}


def rank_process(runs: list[Path], environment: dict[str, str], output: Path, *, kill: int | None = None, preempt: int | None = None,
                 stop: int | None = None, full: int | None = None, poison: dict[str, Any] | None = None,
                 hold: tuple[int, int] | None = None, slow_s: float = 0, watch: bool = False, dry: bool = False,
                 inside: tuple[signal.Signals, str, int] | None = None, empty: int | None = None, gradients: bool = False,
                 plain_disks: bool = False, block: int | None = None, rests: bool = False, start: bool = False,
                 waits: bool = False) -> None:
    """One rank. What it prints goes to `output`."""
    os.environ |= environment
    log = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for number in (1, 2):
        os.dup2(log, number)
    import torch
    from deepspeed.accelerator import get_accelerator
    from torch import distributed

    from distlm.corpus.stream import NO_LOSS, local_steps, ordered_steps
    from distlm.errors import DistlmError
    from distlm.runs import RunFolder
    from distlm.spec import load_spec
    from distlm.storage import Storage
    from distlm.train import checkpoint, loop
    from distlm.train import preempt as preemption
    from distlm.train.dryrun import DryRun
    from distlm.train.recipe import make_recipe
    from tests.train.disks import use_plain_op
    from tests.train.faults import (
        block_save,
        hold_writes,
        strike,
        watch_base,
        watch_gradients,
        watch_poisoned,
        watch_rests,
        watch_start,
        watch_waits,
    )

    rank = int(environment["RANK"])
    torch.set_num_threads(1)
    preemption.install()
    device = torch.device(environment["DS_ACCELERATOR"])
    distributed.init_process_group("gloo" if device.type == "cpu" else "nccl")
    report = watch_poisoned(poison) if poison else None
    watched = watch_base() if watch else None
    write = watch_gradients() if gradients else None
    held, until = hold or (-1, -1)
    if inside:
        strike(*inside)
    if plain_disks:
        use_plain_op()
    if block is not None:
        block_save(block)
    if rests:
        watch_rests()
    if start:
        watch_start()
    if waits:
        watch_waits()
    hold_writes(held, released := threading.Event())
    for run in runs:
        recipe = make_recipe(load_spec(run / "spec.yaml").spec, Storage(run.parent))
        if recipe.spec.precision == "fp16" and device.type == "cpu":                # a rank on CPU stands for one on a GPU
            get_accelerator().is_fp16_supported = lambda: True  # type: ignore[method-assign]
        committed, _ = checkpoint.latest(run)
        first = committed.step if committed else 0
        if committed:
            checkpoint.check_fits(committed, recipe)
        if rank == 0:
            RunFolder(run).trim_metrics(first if committed else -1)
        plan = recipe.plan()
        (released.clear if recipe.spec.checkpoint.asynchronous else released.set)()

        def steps(run=run, plan=plan, first=first):
            for i, tokens in enumerate(ordered_steps(local_steps(plan, rank, first), plan, rank, first)):
                if first + i == kill:
                    os.kill(os.getpid(), signal.SIGKILL)
                time.sleep(slow_s)
                if first + i == stop:
                    os.kill(os.getpid(), signal.SIGSTOP)
                if first + i == preempt:
                    os.kill(os.getpid(), signal.SIGTERM)
                if first + i == full:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
                if first + i >= until:
                    released.set()
                if first + i == empty:
                    tokens = np.stack([tokens[:, 0], np.full_like(tokens[:, 1], NO_LOSS)], 1)
                with open(run / f"windows-{rank}.txt", "a") as file:
                    rows = tokens[:, 0] if plan.marked else tokens
                    file.write(f"{first + i}: {' '.join(str(row[0] * VOCABULARY + row[1]) for row in rows)}\n")
                yield tokens

        try:
            loop.fit(recipe, RunFolder(run), steps(), rank=rank, device=device, first_step=first,
                     resume_from=committed.path if committed else None,
                     look=DryRun(run / "dry-run", rank) if dry else SimpleNamespace(step=lambda: None) if write or waits else None)
        except DistlmError as error:
            if report is None:
                raise
            report(error)
        finally:
            released.set()
        if write:
            write(run)
        if watched:
            print(f"rank {rank} {run.name}: {watched()}")
    distributed.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)                                            # an engine that a traceback holds would be taken down beside its threads

