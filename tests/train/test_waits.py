"""A GPU is given a step without a wait and asked once, before the update. There is none here: a device without values, which can be asked
for nothing, stands for it, and then the calls that would wait are counted."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from distlm.corpus.stream import Windows, joined
from distlm.model.build import build_model, model_config
from distlm.model.distill import DistillationLoss, Teacher
from distlm.model.export import export_model
from distlm.model.loss import CausalLoss
from distlm.model.masks import document_numbers, documents_known, holds_several
from distlm.model.preference import PreferenceLoss, Reference
from distlm.spec import TrainSpec
from distlm.storage import Storage
from distlm.train.objectives import objective_of
from distlm.train.recipe import Recipe, make_recipe
from tests.train.faults import READ
from tests.train.ranks import CONTEXT, VOCABULARY, make_corpus, make_labelled_corpus, make_packed_corpus, run_ranks, spec
from tests.train.test_dpo import make_pairs

CPU, META = torch.device("cpu"), torch.device("meta")
TINY: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
                        "num_key_value_heads": 2, "head_dim": 8, "vocab_size": VOCABULARY, "max_position_embeddings": CONTEXT,
                        "pad_token_id": None}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {}, "qwen3": {}, "mistral": {"sliding_window": 4}, "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4}, "gpt_neox": {},
    "olmo2": {}, "mixtral": {"num_local_experts": 4}, "gemma2": {"sliding_window": 4},
    "gemma3_text": {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}}
"""With heads that are replaced and others, with experts, and with layers of two kinds of masks."""
KINDS = {"whole": "pretrain", "packed": "pretrain", "chats": "sft", "taught": "distill", "labels": "classify", "pairs": "dpo"}
"""Corpora, and what a run is trained for on each."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Corpora, and a model."""
    root = tmp_path_factory.mktemp("waits")
    make_corpus(root / "whole")
    make_packed_corpus(root / "packed")
    for name in ("chats", "taught"):
        make_packed_corpus(root / name, conversations=True, silent=4)
    make_labelled_corpus(root / "labels")
    make_pairs(root / "pairs")
    given = spec(root / "whole")
    model = build_model(given.model, model_config(given.model, make_recipe(given, Storage(root)).shape), 3)
    export_model(model, None, root / "whole" / "tokenizer", root / "base", {})
    return root


def given(root: Path, kind: str, **sections: Any) -> TrainSpec:
    objective, base = KINDS[kind], str(root / "base")
    more = {"dpo": {"model": {"from": base}}, "distill": {"distill": {"teacher": base}}}.get(objective, {})
    return spec(root / kind, **{"objective": objective, "duration": {"steps": 4}, "schedule": {"name": "constant"}, "evaluate": {},
                                "checkpoint": {}, "batch": {"global_sequences": 8, "micro_sequences": 8}, **more, **sections})


def recipe_and_rows(given: TrainSpec, root: Path) -> tuple[Recipe, np.ndarray]:
    """And the first windows as the stream has them."""
    recipe = make_recipe(given, Storage(root))
    windows = Windows(recipe.corpora[0])
    places = windows.first(8)
    return recipe, joined(windows.read(*places), windows.marks(*places) if recipe.marked else None,
                          windows.labels(*places) if recipe.shape.labels else None).astype(np.int64)


def passed_on_meta(module: Any, inputs: tuple[Any, ...]) -> None:
    """Forward and backward where any value that is asked for is an error."""
    loss = module.to(META)(*(one.to(META) if isinstance(one, torch.Tensor) else one for one in inputs))
    loss.backward()
    assert loss.device == META and all(p.grad is not None for p in module.parameters() if p.requires_grad)


@pytest.mark.parametrize("kind", KINDS)
def test_no_objective_asks_the_device_in_a_pass(kind: str, root: Path) -> None:
    spec = given(root, kind)
    recipe, rows = recipe_and_rows(spec, root)
    objective = objective_of(spec)
    module: Any = objective.module(build_model(spec.model, model_config(spec.model, recipe.shape), 0), recipe)
    if isinstance(module, PreferenceLoss):
        module.reference = Reference(torch.zeros(3, dtype=torch.int64, device=META), torch.zeros(3, 2, device=META))
    passed_on_meta(module.train(), objective.make_batch(rows, recipe).inputs(CPU))


@pytest.mark.parametrize("kind", ["whole", "packed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_no_family_asks_the_device_in_a_pass(family: str, kind: str, root: Path) -> None:
    spec = given(root, kind)
    recipe, rows = recipe_and_rows(spec, root)
    inputs = objective_of(spec).make_batch(rows, recipe).inputs(CPU)
    for loss in (CausalLoss, lambda model: DistillationLoss(model, Teacher(make(family)), 2.0, 0.5)):
        passed_on_meta(loss(make(family)).train(), inputs)


def make(family: str) -> Any:
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**TINY, **FAMILIES[family]}), dtype=torch.bfloat16)


def test_masks_are_those_that_transformers_makes_when_it_looks() -> None:
    from transformers import masking_utils

    look = masking_utils.find_packed_sequence_indices
    for positions in (torch.arange(6)[None], torch.arange(3, 9)[None], torch.tensor([[0, 1, 2, 3, 4, 5], [0, 1, 0, 0, 1, 2]]),
                      torch.tensor([[4, 5, 6, 0, 1, 2]]), torch.tensor([[0, 1, 5, 6, 7, 8]])):
        theirs = look(positions)
        assert (theirs is not None) == holds_several(positions)
        assert theirs is None or torch.equal(theirs, document_numbers(positions))
        with documents_known(holds_several(positions)):
            ours = masking_utils.find_packed_sequence_indices(positions)
            assert ours is theirs is None or torch.equal(ours, theirs)
        assert masking_utils.find_packed_sequence_indices is look


def asked(root: Path, which: dict[str, TrainSpec]) -> dict[str, dict[str, int]]:
    """What would wait for a GPU in the last step of each run, and how often, as `faults.watch_waits` says; the same on all ranks. In the
    first steps stage 3 compares the order of its modules over the ranks."""
    [ranks] = {one.scale.workers for one in which.values()}
    output = run_ranks({root / name: one for name, one in which.items()}, waits=True)
    lines = [json.loads(line) for line in re.findall(r"^waits: (.*)$", output, re.MULTILINE)]
    [steps] = {one.duration.steps for one in which.values()}
    assert steps and len(lines) == ranks * len(which) * steps
    last = lines[steps - 1::steps]
    assert last == last[:len(which)] * ranks
    return dict(zip(which, last, strict=False))


def test_the_host_asks_once_in_a_step_whatever_is_trained_and_however_many_micro_batches(root: Path, tmp_path: Path) -> None:
    which = {f"{kind}-{micro}": given(root, kind, precision="bf16", duration={"steps": 1}, batch={
        "global_sequences": 8, "micro_sequences": micro})
             for kind in KINDS for micro in (8, 2) if kind != "taught" or micro == 2}
    assert asked(tmp_path, which) == {name: {READ: 1} for name in which}


@pytest.mark.slow
def test_what_deepspeed_asks_beside_is_known(root: Path, tmp_path: Path) -> None:
    """Numbers of two groups of parameters, matrices and norms. docs/design.md tells of them."""
    both = {f"{zero}-{precision}": {"sharding": {"zero": zero}, "precision": precision} for zero in range(4)
            for precision in ("fp32", "bf16", "fp16") if zero or precision != "fp16"}
    found = asked(tmp_path, {name: given(root, "packed", scale={"workers": 2, "gpus_per_worker": int(name.endswith("fp16"))}, batch={
        "global_sequences": 8, "micro_sequences": 2}, **one) for name, one in both.items()})
    masks, norms = ("before deepspeed/runtime/utils.py:mask_nan_or_inf_with_val_inplace copy",
                    "before deepspeed/runtime/zero/stage3.py:get_grad_norm_direct copy")
    beside = {"0-bf16": {}, "0-fp32": {"after deepspeed/runtime/utils.py:clip_grad_norm_ copy": 2},
              **{f"{zero}-{precision}": {norms if zero == 3 else masks: 2} for zero in (1, 2, 3) for precision in ("fp32", "bf16", "fp16")}}
    assert found == {name: {READ: 1, **one} for name, one in beside.items()}


@pytest.mark.slow
def test_where_the_norm_is_made_in_the_step_deepspeed_and_the_loop_ask_for_it_there(root: Path, tmp_path: Path) -> None:
    away, muon = {"offload": {"optimizer": "cpu"}}, {"name": "muon", "lr": 0.01, "clip": 0}
    which = {"2-offload": given(root, "packed", precision="bf16", sharding={"zero": 2, **away}),
             "3-offload": given(root, "packed", precision="bf16", sharding={"zero": 3, **away}),
             "2-muon": given(root, "packed", precision="bf16", sharding={"zero": 2}, optimizer=muon),
             "3-muon": given(root, "packed", precision="bf16", sharding={"zero": 3}, optimizer=muon)}
    found = asked(tmp_path, which)
    late = {name: sorted({place.split()[1].rpartition(":")[2] for place in one if place.startswith("after")})
            for name, one in found.items()}
    assert all(one[READ] == 1 for one in found.values())
    assert late == {"2-muon": [], "3-muon": ["get_grad_norm_direct", "is_invalid_grad_norm", "train_step"],
                    "2-offload": ["complete_grad_norm_calculation_for_cpu_offload", "has_overflow", "is_invalid_grad_norm", "train_step"],
                    "3-offload": ["complete_grad_norm_calculation_for_cpu_offload", "is_invalid_grad_norm",
                                  "mask_nan_or_inf_with_val_inplace", "train_step"]}
