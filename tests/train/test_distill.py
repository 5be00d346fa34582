"""A run learns of a teacher: the paper's steps on any number of ranks, bit-equal when it goes on, and of no teacher but its own."""

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional
from transformers import AutoModelForCausalLM

from distlm import pipeline, plan, reads
from distlm.corpus.stream import START, Windows, silent
from distlm.errors import InputError, SpecError
from distlm.model.adapter import add_adapter
from distlm.model.build import build_model, model_config
from distlm.model.export import export_model
from distlm.runs import RunFolder
from distlm.spec import TrainSpec, load_spec
from distlm.storage import Storage, read_json
from distlm.train import checkpoint
from distlm.train.driver import outcome
from distlm.train.flops import forward_flops
from distlm.train.memory import make_load, peak_memory
from distlm.train.objectives.distill import METRICS
from distlm.train.recipe import inputs_of, make_recipe
from distlm.train.schedule import learning_rate
from tests.train.ranks import CONTEXT, VOCABULARY, losses, make_corpus, make_packed_corpus, metrics, run_ranks, spec

TWO = {"workers": 2}
SHARDED = {"zero": 3, "deepspeed": {"zero_optimization": {"stage3_param_persistence_threshold": 0}}}
TEACHER = {"config": {"model_type": "gpt2", "n_embd": 48, "n_layer": 1, "n_head": 2}}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of windows, one of conversations, teachers, and a student that knows something already."""
    root = tmp_path_factory.mktemp("distill")
    make_corpus(root / "c")
    make_packed_corpus(root / "chats", conversations=True)
    for name, seed in (("teacher", 3), ("other", 4)):
        given = spec(root / "c", model=TEACHER)
        model = build_model(given.model, model_config(given.model, make_recipe(given, Storage(root)).shape), seed)
        torch.nn.init.normal_(model.get_output_embeddings().weight, std=0.3)
        export_model(model, None, root / "c" / "tokenizer", root / name, {})
    given = spec(root / "c")
    student = build_model(given.model, model_config(given.model, make_recipe(given, Storage(root)).shape), 5)
    export_model(student, None, root / "c" / "tokenizer", root / "student", {})
    return root


def taught(root: Path, corpus: str = "c", **sections: Any) -> TrainSpec:
    section = {"teacher": str(root / "teacher"), "temperature": 3.0, "alpha": 0.7, **sections.pop("distill", {})}
    return spec(root / corpus, **{"objective": "distill", "distill": section, "duration": {"steps": 8}, "evaluate": {"every_steps": 4},
                                  "checkpoint": {"every_steps": 4}, **sections})


def by_hand(given: TrainSpec, root: Path) -> list[tuple[float, float, float]]:
    """(loss, cross-entropy, divergence) of each step by plain PyTorch: whole logits, each document alone, AdamW."""
    recipe = make_recipe(given, Storage(root))
    assert given.distill
    student, t = build_model(given.model, model_config(given.model, recipe.shape), given.seed), given.distill.temperature
    if given.adapter:
        add_adapter(student, given.adapter, given.seed)
    teacher = AutoModelForCausalLM.from_pretrained(given.distill.teacher, dtype=torch.float32).eval()
    trained = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW([{"params": [p for p in trained if p.dim() >= 2], "weight_decay": 0.1},
                                   {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0}], betas=(0.9, 0.95))
    windows, order, found = Windows(recipe.corpus), recipe.plan(), []
    for step in range(recipe.num_steps):
        places = windows.order(0).locate(np.concatenate([order.samples(step, rank) for rank in range(order.world)]))
        rows = torch.from_numpy(windows.read(*places).astype(np.int64))
        marks = windows.marks(*places) if recipe.marked else np.zeros(rows.shape, np.uint8)
        hard = kl = torch.zeros(())
        count = 0
        for tokens, marked in zip(rows, marks, strict=True):
            cuts = [*(np.flatnonzero(marked & START) if recipe.mask_documents else [0]), len(tokens)]
            quiet = torch.from_numpy(silent(marked, recipe.mask_documents))
            for begin, end in itertools.pairwise(cuts):
                said = tokens[begin:end]
                kept = ~quiet[begin:end][1:]
                if not kept.any():
                    continue
                z, v = (one(input_ids=said[None, :-1]).logits[0][kept] for one in (student, teacher))
                p, q = (functional.log_softmax(one / t, 1) for one in (v.detach(), z))
                kl = kl + (p.exp() * (p - q)).sum()
                hard = hard + functional.cross_entropy(z, said[1:][kept], reduction="sum")
                count += int(kept.sum())
        total = ((1 - given.distill.alpha) * hard + given.distill.alpha * t**2 * kl) / count
        total.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(given.schedule, 0.01, step, recipe.num_steps)
        optimizer.step()
        optimizer.zero_grad()
        found.append((total.item(), hard.item() / count, kl.item() / count))
    return found


def check(run: Path, expected: list[tuple[float, float, float]]) -> None:
    steps = [record for record in metrics(run) if "loss" in record]
    np.testing.assert_allclose([[one["loss"], one["cross_entropy"], one["kl"]] for one in steps], expected, rtol=2e-4, err_msg=run.name)


def test_a_rank_makes_the_papers_steps(root: Path, tmp_path: Path) -> None:
    given = taught(root)
    run_ranks({tmp_path / "one": given})
    expected = by_hand(given, root)
    check(tmp_path / "one", expected)
    first, *_, last = [record for record in metrics(tmp_path / "one") if "val_loss" in record]
    assert abs(first["val_loss"] - expected[0][1]) < 0.1 and last["val_loss"] < first["val_loss"], "the plain cross-entropy"
    recipe = make_recipe(given, Storage(root))
    made, record = outcome(recipe, RunFolder(tmp_path / "one")), read_json(tmp_path / "one" / "export" / "distlm.json")
    assert made["perplexity"] == pytest.approx(np.exp(last["val_loss"])) and made["bits_per_byte"] > 0
    assert record["teacher"] == str(root / "teacher") and len(record["teacher_hash"]) == 64
    assert set(METRICS) <= {key for one in metrics(tmp_path / "one") for key in one}
    assert not [path for path in (tmp_path / "one" / "export").iterdir() if "teacher" in path.name]


@pytest.mark.parametrize("zeros", [(2,), pytest.param((0, 1, 3), marks=pytest.mark.slow)])
def test_an_adapter_learns_of_a_teacher_and_leaves_the_base_alone(zeros: tuple[int, ...], root: Path, tmp_path: Path) -> None:
    given = {"corpus": "chats", "model": {"from": str(root / "student")}, "adapter": {"rank": 4}, "scale": TWO}
    runs = {tmp_path / f"zero{zero}": taught(root, **given, sharding=SHARDED if zero == 3 else {"zero": zero}) for zero in zeros}
    printed = run_ranks(runs, watch=3 not in zeros)
    expected, base = by_hand(taught(root, **given), root), load_file(root / "student" / "model.safetensors")
    for run in runs:
        check(run, expected)
        merged, alone = (load_file(run / "export" / name) for name in ("model.safetensors", "adapter/adapter_model.safetensors"))
        for name, value in base.items():
            a, b = (alone.get(f"base_model.model.{name.removesuffix('.weight')}.lora_{part}.weight") for part in "AB")
            wanted = value if a is None or b is None else value + 8 * b @ a
            assert torch.allclose(merged[name], wanted, atol=1e-6) and torch.equal(merged[name], value) == (a is None), name
        told = read_json(run / "export" / "distlm.json")
        assert (told["base"], told["teacher"]) == (str(root / "student"), str(root / "teacher"))
        assert told["base_hash"] != told["teacher_hash"]
    assert 3 in zeros or printed.count("kept, ") == 2 * len(zeros)
    before = {run: (losses(run), (run / "export" / "adapter" / "adapter_model.safetensors").read_bytes()) for run in runs}
    for run in runs:
        shutil.rmtree(run / "checkpoints" / "step-000008")
        shutil.rmtree(run / "export")
    run_ranks(runs)
    for run, (steps, weights) in before.items():
        assert losses(run) == steps and (run / "export" / "adapter" / "adapter_model.safetensors").read_bytes() == weights, "it goes on so"


@pytest.mark.slow
@pytest.mark.parametrize("corpus", ["c", "chats"])
def test_every_layout_makes_the_papers_steps(corpus: str, root: Path, tmp_path: Path) -> None:
    runs = {tmp_path / f"zero{zero}": taught(root, corpus, scale=TWO, sharding=SHARDED if zero == 3 else {"zero": zero})
            for zero in (0, 2, 3)}
    run_ranks(runs)
    expected = by_hand(taught(root, corpus), root)
    for run in runs:
        check(run, expected)


@pytest.mark.slow
def test_a_run_goes_on_bit_equal_and_of_no_other_teacher(root: Path, tmp_path: Path) -> None:
    runs = {tmp_path / "bf16": taught(root, "chats", scale=TWO, sharding={"zero": 2}, precision="bf16", regularization={"dropout": 0.1}),
            tmp_path / "fp32": taught(root, scale=TWO, sharding=SHARDED)}
    run_ranks(runs)
    before = {run: (losses(run), (run / "export" / "model.safetensors").read_bytes()) for run in runs}
    for run in runs:
        shutil.rmtree(run / "checkpoints" / "step-000008")
        shutil.rmtree(run / "export")
    run_ranks(runs)
    for run, (steps, weights) in before.items():
        assert losses(run) == steps and (run / "export" / "model.safetensors").read_bytes() == weights, run.name
        recipe = make_recipe(runs[run], Storage(root))
        checkpoint.check_resume(run, recipe)
        with pytest.raises(SpecError, match=r"was saved with teacher \w+, and the spec says \w+; resume with teacher"):
            other = runs[run].model_copy(update={"distill": runs[run].distill.model_copy(update={"teacher": str(root / "other")})})
            checkpoint.check_resume(run, make_recipe(other, Storage(root)))


@pytest.mark.parametrize(("given", "message"), [
    ({"distill": None}, "objective: distill needs a teacher; set distill.teacher"),
    ({"objective": "sft"}, "distill: .* has no effect with objective: sft; leave it out"),
    ({"distill": {"teacher": "t", "temperature": 0}}, "distill.temperature: 0: must be above 0"),
    ({"distill": {"teacher": "t", "alpha": 1.5}}, "distill.alpha: 1.5: must be at most 1"),
    ({"scale": TWO, "sharding": {"tensor_parallel": 2, "zero": 1}}, "sharding.tensor_parallel: is not proved with objective: distill"),
    ({"scale": TWO, "sharding": {"sequence_parallel": 2}}, "sharding.sequence_parallel: is not proved with objective: distill"),
    ({"model": {"preset": "llama-tiny", "mup": {"base_width": 8}}}, "model.mup: is not proved with objective: distill")])
def test_what_cannot_be_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        load_spec({"kind": "train", "name": "d", "corpus": "c", "model": {"preset": "llama-tiny"}, "objective": "distill",
                   "distill": {"teacher": "t"}, "duration": {"steps": 2}, **given})


def changed(root: Path, place: Path, **config: Any) -> Path:
    """The teacher with other values in its config.json."""
    shutil.copytree(root / "teacher", place)
    (place / "config.json").write_text(json.dumps({**read_json(place / "config.json"), **config}))
    return place


def test_a_teacher_that_does_not_fit_is_refused_before_any_work(root: Path, tmp_path: Path) -> None:
    def refused(place: Path | str, message: str, corpus: str = "c", **sections: Any) -> None:
        with pytest.raises((InputError, SpecError), match=message):
            make_recipe(taught(root, corpus, distill={"teacher": str(place)}, **sections), Storage(root))

    refused("techer", "distill.teacher: there is no run and no folder 'techer'")
    refused(changed(root, tmp_path / "short", n_positions=8), "distill.teacher: .*takes 8 tokens of context and the corpus has .* of 16")
    refused(changed(root, tmp_path / "small", vocab_size=32), f"distill.teacher: .*has 32 tokens and the corpus {VOCABULARY}")
    refused(changed(root, tmp_path / "wide", vocab_size=80), "logits for 80 tokens and the model for 64; set model.config with .* 80")
    other = changed(root, tmp_path / "other")
    tokenizer = read_json(other / "tokenizer.json")
    tokenizer["model"]["vocab"] = {f"u{i}": i for i in range(VOCABULARY)}
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    refused(other, "distill.teacher: .*the tokenizer of the checkpoint is not that of the corpus c; prepare the corpus with tokenizer")


def test_a_teacher_counts_in_what_a_run_reads_and_needs(root: Path) -> None:
    given, storage = taught(root, scale=TWO), Storage(root)
    recipe, plain = make_recipe(given, storage), make_recipe(spec(root / "c"), storage)
    teacher = AutoModelForCausalLM.from_pretrained(root / "teacher")
    count = sum(one.numel() for one in teacher.parameters())
    sizes = {name: one.numel() for name, one in teacher.named_parameters()}
    assert recipe.flops_per_token - plain.flops_per_token == pytest.approx(forward_flops(teacher.config, sizes, CONTEXT))
    weights = [peak_memory(make_load(one.spec, model_config(one.spec.model, one.shape), one.shape, one.parameters, 2, 3)).weights
               for one in (recipe, plain)]
    assert weights[0] - weights[1] == 4 * count
    assert dict(plan.of_train(given, storage))["teacher"] == f"{root / 'teacher'}, {count:,} parameters"
    later = given.model_copy(update={"distill": given.distill and given.distill.model_copy(update={"teacher": "${train}"})})
    assert dict(plan.of_train(later, storage))["model"] == "${train}, which other steps make"
    inputs = inputs_of(given, storage)
    assert inputs["teacher"] == str(root / "teacher") and ("config.json", (root / "teacher" / "config.json").stat().st_size) in [
        one[:2] for one in reads.train_reads(inputs)]
    assert pipeline.takes("train", ("distill", "teacher")) == pipeline.takes("tune", ("train", "distill", "teacher")) == "model"
