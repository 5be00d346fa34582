"""An adapter is trained through a base in NF4: the base stays, the adapter is the same however it is sharded, goes on bit-equal, and is
exported with the base as its checkpoint has it."""

import importlib.util
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional

from distlm.corpus.stream import Windows
from distlm.errors import SpecError, TrainError
from distlm.model.adapter import add_adapter, put_adapter
from distlm.model.build import build_model, load_model, model_config
from distlm.model.export import export_model
from distlm.model.nf4 import BITS
from distlm.plan import of_model
from distlm.spec import TrainSpec, load_spec
from distlm.spec.load import dump
from distlm.storage import Storage, read_json
from distlm.train.memory import advice, make_load, peak_memory
from distlm.train.recipe import make_recipe
from distlm.train.zero import check_node
from tests.train.ranks import losses, losses_by_hand, make_corpus, make_packed_corpus, run_ranks, spec

pytestmark = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
TWO = {"workers": 2}
LONG: dict[str, Any] = {"duration": {"steps": 20}, "evaluate": {"every_steps": 20}, "checkpoint": {"every_steps": 20}}
"""A base of random weights leaves little for an adapter to learn."""
ADAPTER = "export/adapter/adapter_model.safetensors"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two corpora, one of packed documents, and a base in fp32 and in bf16."""
    root = tmp_path_factory.mktemp("qlora")
    corpus = make_corpus(root / "c")
    make_packed_corpus(root / "packed")
    given = spec(corpus)
    config = model_config(given.model, make_recipe(given, Storage(root)).shape)
    for name, dtype in (("base", torch.float32), ("base-bf16", torch.bfloat16)):
        export_model(build_model(given.model, config, 3, dtype), None, corpus / "tokenizer", root / name, {})
    return root


def tuned(root: Path, base: str = "base", adapter: dict[str, Any] | None = None, corpus: str = "c", **sections: Any) -> TrainSpec:
    return spec(root / corpus, model={"from": str(root / base)}, adapter={"rank": 8, "alpha": 8, "base": "nf4", **(adapter or {})},
                **{"duration": {"steps": 8}, "evaluate": {"every_steps": 4}, "checkpoint": {"every_steps": 4}, **sections})


def test_every_stage_trains_the_same_adapter_through_a_base_that_stays(root: Path, tmp_path: Path) -> None:
    runs = {tmp_path / f"zero{zero}": tuned(root, scale=TWO, sharding={"zero": zero}, **LONG) for zero in range(3)}
    printed = run_ranks(runs, watch=True)
    expected, first = losses_by_hand(tuned(root, **LONG), root / "c"), load_file(tmp_path / "zero0" / ADAPTER)
    whole = losses_by_hand(tuned(root, adapter={"base": None}), root / "c")
    assert not np.allclose(expected[:8], whole, rtol=1e-4), "the base is rounded"
    size = sum(one.numel() for one in first.values())
    for run in runs:
        np.testing.assert_allclose(losses(run), expected, rtol=1e-5, err_msg=run.name)
        found = load_file(run / ADAPTER)
        assert found.keys() == first.keys() and all(torch.allclose(found[name], first[name], atol=1e-5) for name in first), run.name
        sharded = r"\d+" if run.name != "zero0" else str(size)
        seen = re.findall(rf"rank \d {run.name}: loaded (.*) held (.*) kept, {sharded} in the optimizer", printed)
        assert seen == [("['torch.float32', 'torch.uint8']",) * 2] * 2, printed[-3000:]
    assert np.mean(expected[-5:]) < np.mean(expected[:5]) - 0.02
    shares = [int(count) for count in re.findall(r"zero1: .* (\d+) in the optimizer", printed)]
    assert sum(shares) == pytest.approx(size, abs=4) and len(shares) == 2


def test_packed_documents_train_the_same_adapter_at_any_stage(root: Path, tmp_path: Path) -> None:
    runs = {tmp_path / f"zero{zero}": tuned(root, corpus="packed", scale=TWO, precision="bf16", sharding={"zero": zero},
                                           duration={"steps": 4}, batch={"global_sequences": 12, "micro_sequences": micro})
            for zero, micro in ((0, 2), (1, 2), (2, 6))}
    printed = run_ranks(runs, watch=True)
    assert len(re.findall("loaded .'torch.bfloat16', 'torch.uint8'. held .'torch.bfloat16', 'torch.uint8'. kept", printed)) == 6
    first = load_file(tmp_path / "zero0" / ADAPTER)
    for run in runs:
        found = load_file(run / ADAPTER)
        for name, value in first.items():
            assert (found[name] - value).norm() < 0.1 * value.norm() + 1e-3, (run.name, name)
        np.testing.assert_allclose(losses(run), losses(tmp_path / "zero0"), rtol=2e-3, err_msg=run.name)


CASES: dict[str, Any] = {"fp32-0": {"adapter": {"dropout": 0.1}, "activation_checkpointing": 1,
                                    "evaluate": {"every_steps": 4, "prompts": ["t1 t2"], "max_tokens": 3}},
                         "bf16-2": {"precision": "bf16", "sharding": {"zero": 2}, "ema": {"decay": 0.9}},
                         "dora-1": {"sharding": {"zero": 1}, "adapter": {"method": "dora"}}}


def test_a_run_goes_on_bit_equal_and_its_checkpoints_hold_no_base(root: Path, tmp_path: Path) -> None:
    runs = {tmp_path / name: tuned(root, scale=TWO, **sections) for name, sections in CASES.items()}
    plain = {tmp_path / f"whole-{name}": tuned(root, scale=TWO, **{**sections, "adapter": {**sections.get("adapter", {}), "base": None}})
             for name, sections in CASES.items()}
    run_ranks({**runs, **plain})
    before = {run: (losses(run), *((run / file).read_bytes() for file in ("export/model.safetensors", ADAPTER))) for run in runs}
    for run in runs:
        sizes = [sum(file.stat().st_size for file in (one / "checkpoints" / "step-000008" / "state").iterdir())
                 for one in (run, tmp_path / f"whole-{run.name}")]
        assert sizes[0] <= sizes[1] * 1.01, run.name
        shutil.rmtree(run / "checkpoints" / "step-000008")
        shutil.rmtree(run / "export")
    run_ranks(runs)
    for run, (steps, *files) in before.items():
        assert losses(run) == steps and [(run / file).read_bytes() for file in ("export/model.safetensors", ADAPTER)] == files, run.name


@pytest.mark.parametrize("base", ["base", "base-bf16"])
def test_the_export_is_the_base_as_it_was_with_the_adapter(root: Path, tmp_path: Path, base: str) -> None:
    """The merged model differs from the trained one by the rounding of the base alone: here by less than 2 % of the loss."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    run, given = tmp_path / "run", tuned(root, base, **LONG)
    run_ranks({run: given})
    before, merged, alone = (load_file(path) for path in (root / base / "model.safetensors", run / "export" / "model.safetensors",
                                                          run / ADAPTER))
    assert merged.keys() == before.keys()
    changed = 0
    for name, weight in before.items():
        a, b = (alone.get(f"base_model.model.{name.removesuffix('.weight')}.lora_{part}.weight") for part in "AB")
        assert merged[name].dtype == weight.dtype, name
        if a is None or b is None:
            assert torch.equal(merged[name], weight), name
        else:
            assert torch.equal(merged[name], (weight.float() + b @ a).to(weight.dtype)), name
            changed += 1
    assert changed == 14 and read_json(run / "export" / "adapter" / "adapter_config.json")["base_model_name_or_path"] == str(root / base)
    told = read_json(run / "export" / "distlm.json")
    assert told["base_held_in"] == "nf4" and told["val_loss"] is None, "which is not that of what was trained"
    windows = [Windows(root / "c"), Windows(root / "c", "val")]
    trained_on, held_out = (torch.from_numpy(one.read(*one.first(len(one))).astype(np.int64)) for one in windows)

    def loss(model: Any, tokens: torch.Tensor = trained_on) -> float:
        with torch.no_grad():
            return float(functional.cross_entropy(model.eval()(input_ids=tokens[:, :-1]).logits.float().flatten(0, 1),
                                                  tokens[:, 1:].flatten()))

    trained: Any = load_model(root / base, "x", torch.float32, nf4=True)
    assert given.adapter
    add_adapter(trained, given.adapter, 0)
    put_adapter(trained, {name[len("base_model.model."):].replace("weight", "default.weight"): value for name, value in alone.items()})
    ours = AutoModelForCausalLM.from_pretrained(run / "export", dtype=torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(root / base, dtype=torch.float32)
    first = loss(plain)
    applied = loss(PeftModel.from_pretrained(plain, run / "export" / "adapter"))
    assert loss(ours) == pytest.approx(applied, rel=1e-6 if base == "base" else 3e-3)
    assert loss(ours) == pytest.approx(loss(trained), rel=0.02) and loss(trained) < first - 0.02
    assert loss(trained, held_out) == pytest.approx(told["val_loss_as_held"], rel=1e-4)


def test_plan_counts_the_bits_of_the_base(root: Path) -> None:
    loads = []
    for adapter in ({"base": None}, {}):
        given = tuned(root, adapter=adapter, precision="bf16")
        recipe = make_recipe(given, Storage(root))
        config = model_config(recipe.spec.model, recipe.shape)
        loads.append(make_load(recipe.spec, config, recipe.shape, recipe.parameters, 2, 1))
        rows = dict(of_model(recipe.spec, recipe.shape, None))
        assert ("held in 4 bits" in rows["parameters"]) == (not adapter)
    matrices = 2 * (32 * 32 + 16 * 32 + 16 * 32 + 32 * 32 + 3 * 32 * 64)
    whole, held = (peak_memory(load).weights for load in loads)
    assert loads[1].nf4 == matrices and whole - held == 2 * matrices - -(-matrices * BITS // 8)
    assert "zero: 3" not in advice(loads[1], 10**4) and BITS == 4 + 8 / 64 + 32 / 64 / 256


@pytest.mark.parametrize(("sections", "message"), [
    ({"sharding": {"zero": 3}}, "sharding.zero: 3 divides weights, and those in nf4 have scales"),
    ({"adapter": {"base": "int4"}}, "adapter.base: 'int4' is not one of nf4")])
def test_what_cannot_be(sections: dict[str, Any], message: str, root: Path) -> None:
    with pytest.raises(SpecError) as error:
        load_spec({**dump(tuned(root)), **sections})
    assert message in str(error.value)


def test_a_run_without_the_package_is_refused_at_plan(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "bitsandbytes" else find(name, *more))
    with pytest.raises(SpecError, match=r"adapter.base: the package bitsandbytes is not installed; pip install 'distlm\[qlora\]'"):
        make_recipe(tuned(root), Storage(root))


def test_a_node_without_the_package_is_told(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_node(tuned(root))
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "bitsandbytes" else find(name, *more))
    check_node(tuned(root, adapter={"base": None}))
    with pytest.raises(TrainError, match=r"adapter.base: the package bitsandbytes is not installed on a worker's node; pip install"):
        check_node(tuned(root))
