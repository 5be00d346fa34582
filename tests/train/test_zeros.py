"""Recovery training leaves zeros zero, however it is sharded, and trains the others as if the zeros were not there."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from distlm.compress.prune import magnitude
from distlm.errors import SpecError, TrainError
from distlm.model.build import build_model, model_config
from distlm.model.export import export_model
from distlm.spec import TrainSpec, load_spec
from distlm.storage import Storage
from distlm.train.recipe import make_recipe
from distlm.train.zeros import keep_zeros
from tests.train.ranks import losses, make_corpus, run_ranks, spec

TWO = {"workers": 2}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus, and a model half of whose weights inside the layers are zero."""
    root = tmp_path_factory.mktemp("zeros")
    corpus = make_corpus(root / "c")
    given = spec(corpus)
    model: Any = build_model(given.model, model_config(given.model, make_recipe(given, Storage(root)).shape), 3).requires_grad_(False)
    magnitude(model, 0.5)
    export_model(model, None, corpus / "tokenizer", root / "pruned", {})
    return root


def recovered(root: Path, **sections: Any) -> TrainSpec:
    return spec(root / "c", **{"model": {"from": str(root / "pruned")}, "keep_zeros": True, "duration": {"steps": 6},
                               "evaluate": {"every_steps": 6}, "checkpoint": {"every_steps": 3}, **sections})


def zeros(folder: Path) -> dict[str, torch.Tensor]:
    return {name: weight == 0 for name, weight in load_file(folder / "model.safetensors").items()}


def test_zeros_stay_under_every_stage_and_the_rest_is_trained_alike(root: Path, tmp_path: Path) -> None:
    sharded = {"zero": 3, "deepspeed": {"zero_optimization": {"stage3_param_persistence_threshold": 0}}}
    runs = {tmp_path / f"zero{zero}": recovered(root, scale=TWO, sharding=sharded if zero == 3 else {"zero": zero}) for zero in range(4)}
    runs[tmp_path / "bf16"] = recovered(root, scale=TWO, sharding={"zero": 2}, precision="bf16")
    runs[tmp_path / "free"] = recovered(root, scale=TWO, keep_zeros=False)
    run_ranks(runs)
    before = load_file(root / "pruned" / "model.safetensors")
    pruned = zeros(root / "pruned")
    assert {round(float(mask.float().mean()), 2) for name, mask in pruned.items() if name.endswith("proj.weight")} == {0.5}
    for run in runs:
        after = load_file(run / "export" / "model.safetensors")
        kept = all(torch.equal(zero, after[name] == 0) for name, zero in pruned.items())
        assert kept is (run.name != "free"), run.name
        assert all(not torch.equal(after[name].float(), before[name]) for name in before), run.name
        if run.name.startswith("zero"):
            np.testing.assert_allclose(losses(run), losses(tmp_path / "zero0"), rtol=1e-5)
    assert losses(tmp_path / "zero0")[-1] < losses(tmp_path / "zero0")[0] and losses(tmp_path / "free") != losses(tmp_path / "zero0")


def test_a_run_that_goes_on_keeps_them(root: Path, tmp_path: Path) -> None:
    run_ranks({tmp_path / "whole": recovered(root), tmp_path / "cut": recovered(root, duration={"steps": 3})})
    run_ranks({tmp_path / "cut": recovered(root, schedule={"warmup_steps": 3})})
    assert all(torch.equal(zero, zeros(tmp_path / "cut" / "export")[name]) for name, zero in zeros(root / "pruned").items())


def test_biases_are_trained_and_a_model_without_zeros_is_refused() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4)).requires_grad_(True)
    torch.nn.init.zeros_(model[0].bias)
    with pytest.raises(TrainError, match="keep_zeros: no weight of the model is zero; prune it first"):
        keep_zeros(model)
    with torch.no_grad():
        model[0].weight[0, 0] = 0
    assert keep_zeros(model) == 1
    model(torch.ones(1, 4)).square().sum().backward()
    assert model[0].weight.grad[0, 0] == 0 and model[0].bias.grad.abs().sum() > 0


@pytest.mark.parametrize(("sections", "message"), [
    ({"model": {"preset": "llama-tiny"}}, "keep_zeros: keeps the zeros of a model that was pruned"),
    ({"optimizer": {"name": "muon", "lr": 0.01}}, "optimizer.name: muon mixes the gradients"),
    ({"adapter": {"rank": 2}}, "adapter: does not leave"),
    ({"sharding": {"tensor_parallel": 2}, "scale": TWO, "precision": "fp32"}, "sharding.tensor_parallel: does not leave")])
def test_what_would_not_keep_them_is_refused(sections: dict[str, Any], message: str) -> None:
    given = {"kind": "train", "name": "r", "corpus": "c", "model": {"from": "m"}, "keep_zeros": True, "duration": {"steps": 1}, **sections}
    with pytest.raises(SpecError, match=message):
        load_spec(given)
