"""What `deterministic: true` sets in a worker, and that nothing else changes on a CPU. What it is for runs in test_gpu.py."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from distlm.runs import RunFolder
from distlm.storage import Storage
from distlm.train import loop, model
from distlm.train.determinism import use_deterministic
from distlm.train.recipe import make_recipe
from tests.train.ranks import losses, make_corpus, run_ranks, spec


@pytest.fixture(autouse=True)
def back() -> Iterator[None]:
    yield
    use_deterministic(False)


def test_kernels_are_chosen_before_the_model_is_built_and_by_each_run_for_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Built(Exception):
        pass

    def build(*_: object) -> None:
        raise Built

    monkeypatch.setattr(model, "model_config", build)
    corpus = make_corpus(tmp_path / "c")
    for wanted in (True, False):
        recipe = make_recipe(spec(corpus, deterministic=wanted), Storage(tmp_path))
        with pytest.raises(Built):
            loop.fit(recipe, RunFolder(tmp_path), iter(()), rank=0, device=torch.device("cpu"))
        assert torch.are_deterministic_algorithms_enabled() == torch.backends.cudnn.deterministic == wanted
        assert not torch.is_deterministic_algorithms_warn_only_enabled(), "attention's kernels only warn then"
        assert not torch.backends.cudnn.benchmark


@pytest.mark.parametrize("sections", [{"precision": "bf16", "sharding": {"zero": 2}}, {"optimizer": {"name": "muon", "lr": 0.01}}])
def test_a_cpu_makes_the_same_steps(tmp_path: Path, sections: dict[str, object]) -> None:
    corpus = make_corpus(tmp_path / "c")
    run_ranks({tmp_path / str(wanted): spec(corpus, deterministic=wanted, duration={"steps": 6}, **sections) for wanted in (False, True)})
    assert losses(tmp_path / "True") == losses(tmp_path / "False")
    ours, theirs = ((tmp_path / run / "export" / "model.safetensors").read_bytes() for run in ("True", "False"))
    assert ours == theirs
