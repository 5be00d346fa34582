"""An adapter alone is trained: the same however it is sharded, bit-equal when it goes on, and exported as it is and merged."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from distlm.errors import CheckpointError, SpecError
from distlm.model.adapter import add_adapter, merge
from distlm.model.build import build_model, model_config
from distlm.model.export import export_model, stored_dtype
from distlm.spec import TrainSpec, load_spec
from distlm.spec.adapter import Adapter
from distlm.spec.load import dump
from distlm.storage import Storage, read_json, write_json
from distlm.train import checkpoint
from distlm.train.loop import export
from distlm.train.memory import make_load, peak_memory
from distlm.train.recipe import make_recipe
from tests.train.ranks import losses, losses_by_hand, make_corpus, run_ranks, spec

SHARDED = {"zero": 3, "deepspeed": {"zero_optimization": {"stage3_param_persistence_threshold": 0}}}
TWO = {"workers": 2}
ADAPTER = "export/adapter/adapter_model.safetensors"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus and two bases."""
    root = tmp_path_factory.mktemp("adapter")
    corpus = make_corpus(root / "c")
    for name, seed in (("base", 3), ("other", 4)):
        given = spec(corpus)
        config = model_config(given.model, make_recipe(given, Storage(root)).shape)
        model = build_model(given.model, config, seed)
        export_model(model, None, corpus / "tokenizer", root / name, {})
    return root


def tuned(root: Path, base: str = "base", adapter: dict[str, Any] | None = None, **sections: Any) -> TrainSpec:
    return spec(root / "c", model={"from": str(root / base)}, adapter={"rank": 4, **(adapter or {})},
                **{"duration": {"steps": 8}, "evaluate": {"every_steps": 4}, "checkpoint": {"every_steps": 4}, **sections})


def exported(run: Path) -> list[bytes]:
    return [(run / file).read_bytes() for file in ("export/model.safetensors", ADAPTER)]


def test_every_stage_trains_the_same_adapter_and_leaves_the_base_alone(root: Path, tmp_path: Path) -> None:
    runs = {tmp_path / f"zero{zero}": tuned(root, scale=TWO, sharding=SHARDED if zero == 3 else {"zero": zero}) for zero in range(4)}
    dora = {tmp_path / f"dora{zero}": tuned(root, adapter={"method": "dora"}, scale=TWO, sharding=SHARDED if zero == 3 else {"zero": zero},
                                            duration={"steps": 2}, schedule={}, evaluate={}, checkpoint={}) for zero in range(4)}
    printed = run_ranks({**runs, **dora}, watch=True)
    for run in (*runs, *dora):
        said = f"{run.name}: loaded ['torch.float32'] held ['torch.float32'] kept"
        assert printed.count(said) == 2, "on both ranks: " + printed[-2000:]
    alone = load_file(tmp_path / "dora0" / ADAPTER)
    for run in dora:
        np.testing.assert_allclose(losses(run), losses(tmp_path / "dora0"), rtol=1e-5, err_msg=run.name)
        found = load_file(run / ADAPTER)
        assert found.keys() == alone.keys() and all(torch.allclose(found[name], alone[name], atol=1e-5) for name in alone), run.name
    expected = losses_by_hand(tuned(root), root / "c")
    base, first = load_file(root / "base" / "model.safetensors"), load_file(tmp_path / "zero0" / ADAPTER)
    for run in runs:
        np.testing.assert_allclose(losses(run), expected, rtol=1e-5, err_msg=run.name)
        found = load_file(run / ADAPTER)
        assert found.keys() == first.keys() and all(torch.allclose(found[name], first[name], atol=1e-5) for name in first), run.name
        merged = load_file(run / "export" / "model.safetensors")
        assert merged.keys() == base.keys()
        for name, weight in base.items():
            a, b = (found.get(f"base_model.model.{name.removesuffix('.weight')}.lora_{part}.weight") for part in "AB")
            if a is None or b is None:
                assert torch.equal(merged[name], weight), name
            else:
                assert torch.allclose(merged[name], weight + 8 * b @ a, atol=1e-6) and not torch.equal(merged[name], weight), name


@pytest.mark.slow
def test_ranks_that_divide_sequences_train_one_workers_adapter(root: Path, tmp_path: Path) -> None:
    run_ranks({tmp_path / "one": tuned(root)})
    runs = {tmp_path / f"zero{sharding.get('zero', 0)}": tuned(root, scale=TWO, sharding={**sharding, "sequence_parallel": 2})
            for sharding in ({}, {"zero": 2}, SHARDED)}
    run_ranks(runs)
    alone = load_file(tmp_path / "one" / ADAPTER)
    for run in runs:
        np.testing.assert_allclose(losses(run), losses(tmp_path / "one"), rtol=1e-5, err_msg=run.name)
        found = load_file(run / ADAPTER)
        assert found.keys() == alone.keys() and all(torch.allclose(found[name], alone[name], atol=1e-5) for name in alone), run.name
        for file in ("windows-0.txt", "windows-1.txt"):
            assert (run / file).read_text() == (tmp_path / "one" / "windows-0.txt").read_text(), "both read the same"


@pytest.mark.parametrize("method", ["lora", pytest.param("dora", marks=pytest.mark.slow)])
def test_the_exported_adapter_on_its_base_is_the_merged_model(root: Path, tmp_path: Path, method: str) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    run = tmp_path / method
    run_ranks({run: tuned(root, adapter={"method": method, "alpha": 64})})
    tokens = torch.arange(32).reshape(2, 16)
    plain, merged = (AutoModelForCausalLM.from_pretrained(path) for path in (root / "base", run / "export"))
    before, ours = plain(tokens).logits, merged(tokens).logits
    applied = PeftModel.from_pretrained(plain, run / "export" / "adapter")(tokens).logits
    assert torch.allclose(ours, applied, atol=1e-5) and not torch.allclose(ours, before, atol=1e-2)


CASES: dict[str, Any] = {"fp32-3": {"sharding": SHARDED, "adapter": {"dropout": 0.1}, "activation_checkpointing": 1},
                         "fp32-0": {}, "bf16-0": {"precision": "bf16", "ema": {"decay": 0.9}},
                         "bf16-2": {"precision": "bf16", "sharding": {"zero": 2}},
                         "bf16-3": {"precision": "bf16", "sharding": SHARDED, "adapter": {"method": "dora"}}}


@pytest.mark.parametrize("names", [("fp32-0",), pytest.param(("fp32-3", "bf16-0", "bf16-2", "bf16-3"), marks=pytest.mark.slow)])
def test_a_run_goes_on_bit_equal(root: Path, tmp_path: Path, names: tuple[str, ...]) -> None:
    runs = {tmp_path / name: tuned(root, scale=TWO, **CASES[name]) for name in names}
    run_ranks(runs)
    before = {run: (losses(run), *exported(run)) for run in runs}
    for run in runs:
        shutil.rmtree(run / "checkpoints" / "step-000008")
        shutil.rmtree(run / "export")
    run_ranks(runs)
    for run, (steps, *files) in before.items():
        assert losses(run) == steps and exported(run) == files, run.name


def test_a_base_in_bf16_is_loaded_and_held_so_and_the_optimizer_has_the_adapter_alone(root: Path, tmp_path: Path) -> None:
    runs = {tmp_path / f"zero{zero}": tuned(root, precision="bf16", sharding=SHARDED if zero == 3 else {"zero": zero},
                                           duration={"steps": 2}, schedule={}, evaluate={"every_steps": 2}, checkpoint={"every_steps": 2})
            for zero in range(4)}
    printed = run_ranks(runs, watch=True)
    size = sum(value.numel() for value in load_file(tmp_path / "zero0" / ADAPTER).values())
    for run in runs:
        assert f"{run.name}: loaded ['torch.bfloat16'] held ['torch.bfloat16'] kept, {size} in the optimizer" in printed, printed[-2000:]


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_an_adapter_is_added_in_float32_to_a_base_that_keeps_its_precision(root: Path, tmp_path: Path, method: str) -> None:
    given = spec(root / "c")
    half = build_model(given.model, model_config(given.model, make_recipe(given, Storage(root)).shape), 3, torch.bfloat16)
    export_model(half, None, root / "c" / "tokenizer", tmp_path / "half", {})
    given = tuned(root, str(tmp_path / "half"), {"alpha": 64, "method": method}, precision="bf16", ema={"decay": 0.9})
    run_ranks({tmp_path / "run": given})
    base, merged, found = (load_file(path) for path in (tmp_path / "half" / "model.safetensors", tmp_path / "run" / "export" /
                                                        "model.safetensors", tmp_path / "run" / ADAPTER))
    name = "model.layers.0.mlp.up_proj"
    a, b = (found[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
    expected = base[f"{name}.weight"].float() + 16 * (b @ a)
    if method == "dora":                                   # Liu et al. 2024, equation 5, a length for each row
        expected *= (found[f"base_model.model.{name}.lora_magnitude_vector"] / expected.norm(dim=1))[:, None]
    assert (merged[f"{name}.weight"] != expected.bfloat16()).float().mean() <= 0.01 * (method == "dora"), "but for a last bit of a norm"
    assert {value.dtype for value in merged.values()} == {torch.bfloat16}


def test_what_no_adapter_changes_is_exported_as_the_files_have_it_whatever_the_config_says(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "base", tmp_path / "base")
    config = read_json(tmp_path / "base" / "config.json")
    write_json(tmp_path / "base" / "config.json", {**config, "dtype": "bfloat16"})
    recipe = make_recipe(tuned(root, str(tmp_path / "base"), {"target_modules": ["q_proj"]}), Storage(root))
    assert recipe.spec.adapter
    model = build_model(recipe.spec.model, model_config(recipe.spec.model, recipe.shape), 0)
    add_adapter(model, recipe.spec.adapter, 0)
    export(recipe, model, {name: one.detach() for name, one in model.named_parameters() if one.requires_grad}, tmp_path / "export", {})
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "export"))
    assert all(torch.equal(after[name], weight) and after[name].dtype == weight.dtype for name, weight in before.items())
    assert read_json(tmp_path / "export" / "config.json")["dtype"] == "float32"


@pytest.mark.parametrize(("kinds", "dtype"), [((torch.bfloat16, torch.bfloat16), torch.bfloat16),
                                              ((torch.bfloat16, torch.float32), torch.float32),
                                              ((torch.bfloat16, torch.float16), torch.float32), ((torch.int8,), None), ((), None)])
def test_a_checkpoint_is_of_the_type_that_holds_all_its_weights(kinds: tuple[torch.dtype, ...], dtype: Any, tmp_path: Path) -> None:
    for i, kind in enumerate(kinds):
        save_file({str(i): torch.ones(1).to(kind)}, tmp_path / f"{i}.safetensors")
    write_json(tmp_path / "model.safetensors.index.json", {"weight_map": {str(i): f"{i}.safetensors" for i in range(len(kinds))}})
    assert stored_dtype(tmp_path) == dtype


def test_an_adapter_belongs_to_its_base(root: Path, tmp_path: Path) -> None:
    run_ranks({tmp_path / "run": tuned(root, adapter={"rank": 1}, duration={"steps": 1}, evaluate={}, checkpoint={}, schedule={})})
    start, _ = checkpoint.latest(tmp_path / "run")
    assert start and start.manifest["base"] == read_json(tmp_path / "run" / "export" / "distlm.json")["base_hash"]
    sizes = sum(file.stat().st_size for file in (start.path / "state").iterdir())
    assert sizes < (root / "base" / "model.safetensors").stat().st_size, "the base is no part of a checkpoint"
    for key, other in (("base", tuned(root, "other", {"rank": 1})), ("adapter", tuned(root))):
        with pytest.raises(CheckpointError, match=f"was saved with {key}"):
            checkpoint.check_fits(start, make_recipe(other, Storage(root)))


@pytest.mark.slow
def test_a_run_goes_on_under_another_layout(root: Path, tmp_path: Path) -> None:
    run_ranks({tmp_path / "run": tuned(root, scale=TWO, sharding={"zero": 2})})
    before = losses(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-000008")
    run_ranks({tmp_path / "run": tuned(root, sharding={"zero": 1})})
    np.testing.assert_allclose(losses(tmp_path / "run"), before, rtol=1e-5)


def test_plan_counts_what_is_trained(root: Path) -> None:
    whole, part = (make_recipe(one, Storage(root)) for one in (spec(root / "c", model={"from": str(root / "base")}), tuned(root)))
    added = part.parameters - whole.parameters
    assert added == 2 * 4 * (32 + 32 + 32 + 16 + 32 + 16 + 32 + 32 + 3 * (32 + 64))
    assert part.flops_per_token == pytest.approx(whole.flops_per_token - 2 * (whole.parameters - 32 * 0) + 6 * added, rel=0.05)
    loads = [make_load(one.spec, model_config(one.spec.model, one.shape), one.shape, one.parameters, 2, 1) for one in (whole, part)]
    assert loads[1].frozen == whole.parameters and loads[0].frozen == 0
    memory = [peak_memory(load).parts() for load in loads]
    assert memory[1]["optimizer"] == 8 * added and memory[0]["optimizer"] == 8 * whole.parameters


@pytest.mark.parametrize(("sections", "message"), [
    ({"model": {"preset": "llama-tiny"}}, "adapter: needs a model that is trained already; set model.from"),
    ({"optimizer": {"name": "muon"}}, "optimizer.name: muon would make"),
    ({"sharding": {"tensor_parallel": 2}, "scale": TWO}, "sharding.tensor_parallel: is not proved to make the same steps with an adapter"),
    ({"adapter": {"target_modules": []}}, "adapter.target_modules: [] would train nothing"),
    ({"adapter": {"rank": 0}}, "adapter.rank: 0: must be at least 1")])
def test_what_cannot_be(sections: dict[str, Any], message: str, root: Path) -> None:
    with pytest.raises(SpecError) as error:
        load_spec({**dump(tuned(root)), **sections})
    assert message in str(error.value)


def test_modules_that_are_not_there_are_told_at_plan(root: Path) -> None:
    with pytest.raises(SpecError, match=r"adapter.target_modules: .*; the model's linear layers are down_proj, gate_proj, k_proj"):
        make_recipe(tuned(root, adapter={"target_modules": ["query"]}), Storage(root))


@pytest.mark.parametrize(("family", "tied", "targets", "said"), [
    ("llama", True, ["lm_head"], "lm_head is that of model.embed_tokens too"),
    ("llama", True, ["q_proj", "embed_tokens"], "model.embed_tokens is that of lm_head too"),
    ("gpt2", True, ["lm_head"], "lm_head is that of transformer.wte too"), ("llama", False, ["lm_head", "embed_tokens"], "")])
def test_an_adapter_that_cannot_be_merged_is_refused_and_the_others_are_what_was_applied(family: str, tied: bool, targets: list[str],
                                                                                        said: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2} if family == "gpt2" else {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, vocab_size=64, tie_word_embeddings=tied, **sizes)).eval()
    given = Adapter(target_modules=targets)
    if said:
        with pytest.raises(SpecError, match=f"adapter.target_modules: the matrix of {said}, .*; name other layers"):
            add_adapter(model, given, 0)
        return
    add_adapter(model, given, 0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    tokens = torch.arange(16)[None]
    applied = model(tokens).logits
    merge(model)
    assert torch.allclose(model(tokens).logits, applied, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_a_base_that_is_let_go_at_once_trains_the_same_adapter(root: Path, tmp_path: Path, method: str) -> None:
    """As of a large model under ZeRO-3: what a layer needs is gathered for it alone."""
    at_once = {**SHARDED["deepspeed"]["zero_optimization"], "stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0}  # type: ignore[index]
    runs = {tmp_path / name: tuned(root, adapter={"method": method}, scale=TWO, sharding=sharding, duration={"steps": 4}) for name, sharding
            in (("whole", {}), ("divided", {"zero": 3, "deepspeed": {"zero_optimization": at_once}}))}
    run_ranks(runs)
    whole, divided = runs
    np.testing.assert_allclose(losses(divided), losses(whole), rtol=1e-5)
    expected, found = (load_file(run / ADAPTER) for run in runs)
    assert all(torch.allclose(found[name], value, atol=1e-5) for name, value in expected.items())
