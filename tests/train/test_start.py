"""Under stage 3 no device has the whole model as a run begins, and one rank alone draws it."""

from pathlib import Path
from typing import Any

import numpy as np

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


def test_a_checkpoint_is_loaded_on_each_rank_and_divided_before_there_is_an_engine(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path / "c")
    plain = spec(corpus)
    config = model_config(plain.model, make_recipe(plain, Storage(tmp_path)).shape)
    export_model(build_model(plain.model, config, 3), None, corpus / "tokenizer", tmp_path / "base", {})
    source = {"model": {"from": str(tmp_path / "base")}, "precision": "bf16", **SHORT}
    printed = run_ranks({tmp_path / "from": spec(corpus, sharding=SHARDED, **source),
                         tmp_path / "adapter": spec(corpus, sharding=SHARDED, adapter={"rank": 4}, **source)}, start=True)
    assert printed.count("['torch.bfloat16'], 0 whole, 0.50 held") == 4 and "not drawn" not in printed, printed
