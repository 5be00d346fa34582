"""A run over a mixture: the same at any number of workers, and after a kill as if it had not been."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distlm.corpus.stream import Windows, read_samples
from distlm.spec import TrainSpec
from distlm.spec.load import dump
from distlm.storage import Storage
from distlm.train.recipe import Recipe, make_recipe
from tests.train.ranks import VOCABULARY, losses, make_corpus, metrics, run_ranks, spec, windows_seen


def train(**sections: Any) -> TrainSpec:
    return TrainSpec.model_validate({**dump(spec(Path("unused"))), **sections})


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Recipe]:
    """A folder with the same run by one worker, by two, and by two that were killed; and its recipe. The weights change at the end."""
    root = tmp_path_factory.mktemp("mixture")
    make_corpus(root / "a", val=7)
    make_corpus(root / "b", windows=(13,), val=40)
    corpus = {"mix": [{"corpus": str(root / "a"), "weight": 0.7, "final_weight": 0.2},
                      {"corpus": str(root / "b"), "weight": 0.3, "final_weight": 0.8}], "anneal_fraction": 0.5}
    sections = {"corpus": corpus, "sharding": {"zero": 2}, "evaluate": {"every_steps": 10, "max_windows": 20}}
    two = train(**sections, scale={"workers": 2})
    run_ranks({root / "killed": two}, kill_before_step=13)
    run_ranks({root / "killed": two, root / "two": two})
    run_ranks({root / "one": train(**sections)})
    return root, make_recipe(two, Storage(root))


def test_a_killed_run_goes_on_bit_equal(runs: tuple[Path, Recipe]) -> None:
    root, _ = runs
    assert losses(root / "killed") == losses(root / "two") and len(losses(root / "two")) == 20
    assert windows_seen(root / "killed") == windows_seen(root / "two")
    exports = [(root / name / "export" / "model.safetensors").read_bytes() for name in ("killed", "two")]
    assert exports[0] == exports[1]
    lineage = json.loads((root / "two" / "export" / "distlm.json").read_text())
    assert lineage["corpus"] == "a, b" and len(lineage["corpus_hash"]) == 64


def test_two_workers_give_one_workers_losses_over_the_planned_windows(runs: tuple[Path, Recipe]) -> None:
    root, recipe = runs
    np.testing.assert_allclose(losses(root / "two"), losses(root / "one"), rtol=2e-6)
    assert windows_seen(root / "two") == windows_seen(root / "one")
    for step, seen in windows_seen(root / "two").items():
        rows = read_samples(recipe.plan(), np.arange(12 * step, 12 * step + 12)).astype(int)
        assert seen == sorted(rows[:, 0] * VOCABULARY + rows[:, 1])


def test_the_validation_loss_is_the_mean_of_the_corpora_s_by_their_shares(runs: tuple[Path, Recipe]) -> None:
    from transformers import AutoModelForCausalLM

    root, recipe = runs
    model, expected = AutoModelForCausalLM.from_pretrained(root / "one" / "export"), 0.0
    for part in recipe.val:
        tokens = torch.from_numpy(Windows(part.corpus, "val").head(part.windows).astype(np.int64))
        with torch.no_grad():
            logits = model(input_ids=tokens[:, :-1]).logits
        expected += part.share * torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).item()
    assert [part.windows for part in recipe.val] == [7, 8] and recipe.val[0].share == pytest.approx(0.7 * 0.5 + 0.45 * 0.5)
    for name in ("one", "two"):
        assert metrics(root / name)[-1]["val_loss"] == pytest.approx(expected, rel=1e-5)
