"""Under stage 3 no device has the whole model as a run begins, and one rank alone draws it or reads it."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file, save_file

from distlm.model.build import build_model, model_config
from distlm.model.export import export_model
from distlm.storage import Storage
from distlm.train.recipe import make_recipe
from tests.train.ranks import losses, make_corpus, run_ranks, spec

SHARDED = {"zero": 3, "deepspeed": {"zero_optimization": {"stage3_param_persistence_threshold": 0}}}
SHORT: dict[str, Any] = {"duration": {"steps": 2}, "schedule": {}, "evaluate": {}, "checkpoint": {}, "scale": {"workers": 2}}
ODD = {"config": {"model_type": "gpt2", "n_embd": 15, "n_layer": 2, "n_head": 3}}


def test_parameters_are_divided_before_there_is_an_engine_and_rank_0_alone_draws_them(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path / "c")
    away = {"offload": {"optimizer": "cpu", "parameters": "cpu"}}
    runs = {tmp_path / "plain": spec(corpus, sharding=SHARDED, **SHORT),
            tmp_path / "bf16": spec(corpus, sharding={**SHARDED, **away}, precision="bf16", **SHORT),
            tmp_path / "kept": spec(corpus, sharding={"zero": 3}, model=ODD, **SHORT)}
    printed = run_ranks(runs, start=True)
    for rank in (0, 1):
        own = [line for line in printed.splitlines() if line.startswith(f"rank {rank}: ")]
        assert own.count(f"rank {rank}: not drawn") == 3 * rank, own
        assert [line.partition("parameters in ")[2] for line in own if "parameters" in line] == [
            "['torch.float32'], 0 whole, 0.50 held", "['torch.bfloat16'], 0 whole, 0.50 held", "['torch.float32'], 0 whole, 0.50 held"], own
    whole = {tmp_path / f"{run.name}-0": given.model_copy(update={"sharding": spec(corpus).sharding}) for run, given in runs.items()}
    run_ranks(whole)
    for run in runs:
        rtol = 5e-3 if run.name == "bf16" else 2e-6
        np.testing.assert_allclose(losses(run), losses(tmp_path / f"{run.name}-0"), rtol=rtol, err_msg=run.name)


def test_rank_0_alone_reads_a_checkpoint_unless_it_holds_other_parameters_than_its_configuration_has(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path / "c")
    plain = spec(corpus)
    config = model_config(plain.model, make_recipe(plain, Storage(tmp_path)).shape)
    export_model(build_model(plain.model, config, 3), None, corpus / "tokenizer", tmp_path / "base", {})
    source = {"model": {"from": str(tmp_path / "base")}, "precision": "bf16", **SHORT}
    two = shutil.copytree(tmp_path / "base", tmp_path / "two-base")
    weights = load_file(two / "model.safetensors")
    save_file({**weights, "lm_head.weight": weights["model.embed_tokens.weight"] + 1}, two / "model.safetensors", {"format": "pt"})
    runs = {tmp_path / "from": spec(corpus, sharding=SHARDED, **source),
            tmp_path / "two": spec(corpus, sharding=SHARDED, **{**source, "model": {"from": str(two)}}),
            tmp_path / "adapter": spec(corpus, sharding=SHARDED, adapter={"rank": 4}, **source)}
    printed = run_ranks(runs, start=True)
    assert printed.count("['torch.bfloat16'], 0 whole, 0.50 held") == 6, printed
    own = [line for line in printed.splitlines() if line.startswith("rank 1: ")]
    assert [line == "rank 1: not drawn" for line in own if "parameters in" in line or "not drawn" in line] == [
        True, False, True, False, False], "it begins with a blank model twice"
    names = ("from", "two")
    run_ranks({tmp_path / f"{name}-0": runs[tmp_path / name].model_copy(update={"sharding": plain.sharding}) for name in names})
    for name in names:
        np.testing.assert_allclose(losses(tmp_path / name), losses(tmp_path / f"{name}-0"), rtol=5e-3, err_msg=name)
