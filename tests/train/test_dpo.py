"""Preferences are trained on as the paper has it: the same on any number of ranks, from the model as it was at first, bit-equal when a run
goes on."""

import importlib.util
import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.nn import functional

from distlm.corpus.bestfit import best_fit_bytes
from distlm.corpus.manifest import file_xxh3, write_manifest
from distlm.corpus.stream import NO_LOSS, START, Windows
from distlm.errors import SpecError
from distlm.model.build import build_model, model_config
from distlm.model.export import export_model
from distlm.runs import RunFolder
from distlm.spec import TrainSpec, load_spec
from distlm.storage import Storage, read_json
from distlm.train import checkpoint
from distlm.train.driver import outcome
from distlm.train.dryrun import trial
from distlm.train.objectives import dpo
from distlm.train.objectives.dpo import METRICS
from distlm.train.recipe import make_recipe
from distlm.train.schedule import learning_rate
from tests.train.ranks import CONTEXT, VOCABULARY, losses, make_corpus, make_packed_corpus, metrics, run_ranks, spec

TWO = {"workers": 2}
SHARDED = {"zero": 3, "deepspeed": {"zero_optimization": {"stage3_param_persistence_threshold": 0}}}
PAIRS = {"train": 26, "val": 5}


def make_pairs(folder: Path, sources: Sequence[str] = ()) -> Path:
    """A corpus of random pairs: a prompt of two tokens, and answers of which the chosen one repeats its first token. Pairs are of the
    sources in turns."""
    make_corpus(folder, windows=(1,), val=1)
    random, data = np.random.default_rng(1), json.loads((folder / "manifest.json").read_text())
    del data["format"]
    for split, count in PAIRS.items():
        tokens, loss, starts = [], [], []
        for _ in range(count):
            prompt = random.integers(1, VOCABULARY, 2)
            for chosen in (True, False):
                size = int(random.integers(2, 6))
                answer = np.full(size, random.integers(1, VOCABULARY)) if chosen else random.integers(1, VOCABULARY, size)
                starts.append(sum(map(len, tokens)))
                tokens.append(np.concatenate([prompt, answer, [0]]))
                loss.append(np.arange(len(tokens[-1])) >= len(prompt))
        whole = np.concatenate(tokens).astype(np.uint16)
        content, windows, _ = best_fit_bytes(whole, np.asarray(starts), 0, CONTEXT, "uint16", 0, np.concatenate(loss), pairs=True)
        assert windows == count
        file = folder / split / "00000.arrow"
        file.write_bytes(content)
        padding = windows * (CONTEXT + 1) - len(whole)
        data["splits"][split] = {"documents": 2 * count, "bytes": 3 * len(whole), "tokens": len(whole), "dropped_tokens": 0,
                                 "windows": windows, "padding_tokens": padding, "repeated_tokens": 0,
                                 "shards": [{"file": f"{split}/00000.arrow", "windows": windows, "bytes": len(content),
                                             "xxh3": file_xxh3(file)}]}
    data["sources"] = [{"name": name, "format": "auto", "text_key": "text", "files": 1, "bytes": 100, "xxh3": name} for name in sources]
    if sources:
        pq.write_table(pa.concat_tables([
            pa.table({"split": [split] * 2 * count, "origin": pa.array(np.arange(count).repeat(2) % len(sources), pa.int32())})
            for split, count in PAIRS.items()]), folder / "documents.parquet")
    write_manifest(folder, {**data, "conversations": {"loss": "assistant", "loss_share": 0.5, "pairs": sum(PAIRS.values())},
                            "pack": {"method": "pair", "padding_tokens": 0, "padding_share": 0.1, "repeated_tokens": 0}})
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of pairs, and a model."""
    root = tmp_path_factory.mktemp("dpo")
    corpus = make_pairs(root / "c")
    given = spec(corpus)
    shape = make_recipe(spec(make_corpus(root / "texts")), Storage(root)).shape
    export_model(build_model(given.model, model_config(given.model, shape), 3), None, corpus / "tokenizer", root / "base", {})
    return root


def tuned(root: Path, **sections: Any) -> TrainSpec:
    return spec(Path(sections.pop("corpus", root / "c")), **{
        "model": {"from": str(root / "base")}, "objective": "dpo", "dpo": {"beta": 0.5, "label_smoothing": 0.1}, "duration": {"steps": 8},
        "evaluate": {"every_steps": 4}, "checkpoint": {"every_steps": 4}, **sections})


def by_hand(root: Path) -> list[tuple[float, float, float]]:
    """(loss, margin, tokens of a pair without padding) of each step by plain PyTorch: each conversation alone, equation 7, AdamW."""
    given = tuned(root)
    recipe = make_recipe(given, Storage(root))
    made = [build_model(recipe.spec.model, model_config(recipe.spec.model, recipe.shape), 0) for _ in range(2)]
    model, reference = made
    optimizer = torch.optim.AdamW([{"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": 0.1},
                                   {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0}], betas=(0.9, 0.95))
    windows, plan, found = Windows(root / "c"), recipe.plan(), []

    def log_prob(one: Any, said: torch.Tensor, gives: torch.Tensor) -> torch.Tensor:
        each = functional.log_softmax(one(said[None, :-1]).logits[0], -1).gather(1, said[1:, None])[:, 0]
        return each[gives[1:]].sum()

    for step in range(recipe.num_steps):
        places = windows.order(0).locate(plan.samples(step, 0))
        total, margins, read = torch.zeros(()), [], 0
        for tokens, marks in zip(windows.read(*places).astype(np.int64), windows.marks(*places), strict=True):
            begin, middle = np.flatnonzero(marks & START)
            rewards = []
            for part in (slice(begin, middle), slice(middle, None)):
                said, gives = torch.from_numpy(tokens[part]), torch.from_numpy(marks[part] & NO_LOSS == 0)
                read += int(gives.nonzero()[-1])           # the last one is predicted, and not read
                rewards.append(0.5 * (log_prob(model, said, gives) - log_prob(reference, said, gives).detach()))
            margin = rewards[0] - rewards[1]
            total = total - 0.9 * functional.logsigmoid(margin) - 0.1 * functional.logsigmoid(-margin)
            margins.append(float(margin.detach()))
        (total / len(margins)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(given.schedule, 0.01, step, recipe.num_steps)
        optimizer.step()
        optimizer.zero_grad()
        found.append((float(total.detach()) / len(margins), float(np.mean(margins)), read / len(margins)))
    return found


@pytest.mark.parametrize("zero", [0, pytest.param(3, marks=pytest.mark.slow)])
def test_prompts_are_completed_beside_the_pairs(root: Path, tmp_path: Path, zero: int) -> None:
    run = tmp_path / "run"
    run_ranks({run: tuned(root, scale=TWO, sharding=SHARDED if zero else {}, duration={"steps": 2}, schedule={}, checkpoint={},
                          evaluate={"every_steps": 2, "prompts": ["t5 t6"], "max_tokens": 4})})
    [samples] = [record["samples"] for record in metrics(run) if "samples" in record][-1:]
    assert [one["prompt"] for one in samples] == ["t5 t6"]  # type: ignore[attr-defined]


def test_every_layout_makes_the_papers_steps(root: Path, tmp_path: Path) -> None:
    runs = {tmp_path / f"zero{zero}": tuned(root, scale=TWO, sharding=SHARDED if zero == 3 else {"zero": zero}) for zero in (0, 2, 3)}
    run_ranks(runs)
    alone = tmp_path / "alone"
    run_ranks({alone: tuned(root)})
    expected = by_hand(root)
    assert expected[0][:2] == (pytest.approx(math.log(2)), 0) and expected[-1][1] > 0.05
    for run in (alone, *runs):
        np.testing.assert_allclose(losses(run), [loss for loss, *_ in expected], rtol=1e-4, err_msg=run.name)
        steps = [record for record in metrics(run) if "loss" in record]
        np.testing.assert_allclose([record["reward_margin"] for record in steps], [margin for _, margin, _ in expected], atol=1e-4)
        assert [record["pair_tokens"] for record in steps] == pytest.approx([read for *_, read in expected])
        assert all(record["pairs"] == 12 and record["tokens_per_s"] * record["step_s"] == pytest.approx(12 * record["pair_tokens"])
                   for record in steps)
        first, *_, last = [record for record in metrics(run) if "val_loss" in record]
        assert first["val_loss"] == pytest.approx(math.log(2)) and first["val_reward_margin"] == pytest.approx(0, abs=1e-6)
        assert last["val_reward_accuracy"] * PAIRS["val"] % 1 == pytest.approx(0) and last["val_chosen_log_prob"] < 0
        made = outcome(make_recipe(tuned(root), Storage(root)), RunFolder(run))
        assert {key: made[key] for key in last if key in METRICS and key != "loss" and key.startswith("val")} == {
            key: value for key, value in last.items() if key.startswith("val")} and set(steps[-1]) | set(last) >= set(METRICS)


def test_an_evaluation_has_the_values_of_each_source(root: Path, tmp_path: Path) -> None:
    corpus = make_pairs(root / "sourced", sources=("news", "mail"))
    run_ranks({tmp_path / "run": tuned(root, corpus=corpus, scale=TWO, batch={"global_sequences": 12, "micro_sequences": 1})})
    last = [record for record in metrics(tmp_path / "run") if "val_loss" in record][-1]
    news, mail = (last["val_by_source"][f"sourced: {name}"] for name in ("news", "mail"))
    assert news != mail and [*last["val_by_source"]] == ["sourced: news", "sourced: mail"]
    for name in ("loss", "reward_margin", "reward_accuracy", "chosen_log_prob", "rejected_log_prob"):
        assert (3 * news[name] + 2 * mail[name]) / PAIRS["val"] == pytest.approx(last[f"val_{name}"], rel=1e-5), name


def test_micro_batches_are_rows_but_where_shapes_must_not_change(root: Path) -> None:
    recipe, compiled = (make_recipe(tuned(root, **more), Storage(root)) for more in ({}, {"compile": True}))
    rows = np.zeros((1, 2, CONTEXT + 1), np.int64)
    assert [dpo.make_batch(rows, one).packed for one in (recipe, trial(recipe, 1), compiled)] == [True, False, False]


@pytest.mark.parametrize(("note_s", "counts"), [(0.0, range(0, 31, 2)), (1e9, [0])])
def test_the_reference_tells_how_far_it_is(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, note_s: float,
                                           counts: Sequence[int]) -> None:
    class Engine(torch.nn.Module):
        def forward(self, keys: torch.Tensor, *_: torch.Tensor) -> None:
            self.module = SimpleNamespace(observed=torch.zeros(len(keys), 4))

    monkeypatch.setattr(dpo, "NOTE_S", note_s)
    monkeypatch.setattr(torch.distributed, "gather_object", lambda mine, everyone: everyone.__setitem__(0, mine))
    folder = RunFolder(tmp_path / "run")
    table = dpo._score(Engine(), make_recipe(tuned(root), Storage(root)), folder, 0, torch.device("cpu"))
    assert table is not None and len(table[0]) == sum(PAIRS.values()) == 31
    assert [event["message"] for event in folder.events()] == [f"the reference: {count} of 31 pairs" for count in counts]


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
def test_preferences_are_learnt_through_a_base_in_4_bits(root: Path, tmp_path: Path) -> None:
    given = tuned(root, scale=TWO, adapter={"rank": 4, "base": "nf4"}, duration={"steps": 12})
    printed = run_ranks({tmp_path / "run": given}, watch=True)
    found = losses(tmp_path / "run")
    assert found[0] == pytest.approx(math.log(2), abs=1e-3) and found[-1] < found[0] - 0.02 and printed.count("kept, ") == 2
    assert read_json(tmp_path / "run" / "reference" / "reference.json")["base"] == "nf4", "of which the reference is"


def test_a_run_goes_on_bit_equal_from_the_reference_that_it_has_kept(root: Path, tmp_path: Path) -> None:
    runs = {tmp_path / "whole": tuned(root, scale=TWO, sharding={"zero": 2}, precision="bf16"),
            tmp_path / "adapter": tuned(root, scale=TWO, adapter={"rank": 2})}
    run_ranks(runs)
    before = {run: (losses(run), (run / "export" / "model.safetensors").read_bytes()) for run in runs}
    tables = {run: (run / "reference" / "log_probs.npz").stat().st_mtime_ns for run in runs}
    for run in runs:
        shutil.rmtree(run / "checkpoints" / "step-000008")
        shutil.rmtree(run / "export")
    run_ranks(runs)
    for run, (steps, weights) in before.items():
        assert losses(run) == steps and (run / "export" / "model.safetensors").read_bytes() == weights, run.name
        assert (run / "reference" / "log_probs.npz").stat().st_mtime_ns == tables[run]
        assert steps[0] == pytest.approx(math.log(2), abs=1e-3)
        with np.load(run / "reference" / "log_probs.npz") as table:
            assert len(table["keys"]) == sum(PAIRS.values()), "what is trained on, and what is evaluated"
    damaged = tmp_path / "adapter" / "reference" / "log_probs.npz"
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:-100])
    (damaged.parent / "reference.json").write_text("{")
    shutil.rmtree(tmp_path / "adapter" / "checkpoints" / "step-000008")
    run_ranks({tmp_path / "adapter": runs[tmp_path / "adapter"]})
    assert damaged.read_bytes() == whole and losses(tmp_path / "adapter") == before[tmp_path / "adapter"][0]
    given = runs[tmp_path / "whole"]
    other = shutil.copytree(str(given.model.source), tmp_path / "other")
    (other / "note.safetensors").write_bytes(b"another base")
    moved = given.model_copy(update={"model": given.model.model_copy(update={"source": str(other)})})
    checkpoint.check_resume(tmp_path / "whole", make_recipe(given, Storage(root)))
    with pytest.raises(SpecError, match=r"was saved with base .*start a new run"):          # it would be another reference
        checkpoint.check_resume(tmp_path / "whole", make_recipe(moved, Storage(root)))


@pytest.mark.parametrize(("given", "message"), [
    ({"dpo": {"beta": 0}}, "dpo.beta: 0: must be above 0"), ({"dpo": {"beta": -0.1}}, "dpo.beta: -0.1: must be above 0"),
    ({"dpo": {"label_smoothing": 0.5}}, "dpo.label_smoothing: 0.5: must be below 0.5"),
    ({"model": {"preset": "llama-tiny"}}, "objective: dpo needs a model that answers already; set model.from"),
    ({"objective": "sft", "dpo": {"beta": 0.2}}, "dpo: .* has no effect with objective: sft"),
    ({"regularization": {"label_smoothing": 0.1}}, "regularization.label_smoothing: 0.1 has no effect with objective: dpo; .*dpo.label"),
    ({"batch": {"global_sequences": 4, "mask_documents": False}}, "batch.mask_documents: false would let one answer see the other"),
    ({"scale": TWO, "sharding": {"sequence_parallel": 2}}, "sharding.sequence_parallel: cannot be with objective: dpo")])
def test_what_cannot_be_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        load_spec({"kind": "train", "name": "d", "corpus": "c", "model": {"from": "base"}, "objective": "dpo", "duration": {"steps": 2},
                   **given})


def test_a_corpus_is_for_its_objective(root: Path, tmp_path: Path) -> None:
    chats = make_packed_corpus(tmp_path / "chats", conversations=True)
    with pytest.raises(SpecError, match="dpo needs pairs of answers, and the corpus chats has conversations"):
        make_recipe(tuned(root, corpus=str(chats)), Storage(root))
    for objective in ("sft", "pretrain"):
        with pytest.raises(SpecError, match=f"{objective} would train on the rejected answers of the corpus c too"):
            make_recipe(tuned(root, objective=objective, dpo={}), Storage(root))
