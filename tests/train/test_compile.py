"""Layers that are compiled make the same steps, and a run of theirs goes on bit-equal."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from distlm.errors import SpecError, TrainError
from distlm.spec import load_spec
from distlm.train.zero import check_node
from tests.train.ranks import losses, make_corpus, run_ranks, spec

compiler = pytest.mark.skipif(not shutil.which("g++") and not shutil.which("clang++"), reason="there is no C++ compiler")


@compiler
def test_compiled_layers_give_the_same_losses(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path / "c")
    short = {"duration": {"steps": 8}}
    run_ranks({tmp_path / "eager": spec(corpus, **short), tmp_path / "compiled": spec(corpus, compile=True, **short)})
    assert losses(tmp_path / "compiled") != losses(tmp_path / "eager"), "nothing was compiled"
    np.testing.assert_allclose(losses(tmp_path / "compiled"), losses(tmp_path / "eager"), rtol=1e-6)


@compiler
@pytest.mark.slow
@pytest.mark.parametrize("sections", [{"sharding": {"zero": 2}}, {"activation_checkpointing": 1}, {"precision": "bf16"},
                                      {"optimizer": {"name": "muon", "lr": 0.01}}], ids=lambda one: "-".join(one))
def test_a_compiled_run_goes_on_bit_equal(sections: dict[str, object], tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path / "c")
    given, names = spec(corpus, compile=True, scale={"workers": 2}, **sections), ("whole", "stopped")
    run_ranks({tmp_path / "whole": given})
    run_ranks({tmp_path / "stopped": given}, kill_before_step=13)
    run_ranks({tmp_path / "stopped": given})
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")
    ours, theirs = ((tmp_path / run / "export" / "model.safetensors").read_bytes() for run in names)
    assert ours == theirs


def test_a_node_without_a_compiler_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", str(tmp_path / "none"))
    with pytest.raises(TrainError, match="compile: there is no C\\+\\+ compiler on a worker's node; install"):
        check_node(spec(tmp_path, compile=True))


def test_stage_3_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "spec.yaml"
    file.write_text("kind: train\nname: x\ncorpus: c\nmodel: {preset: llama-tiny}\nduration: {steps: 1}\ncompile: true\n"
                    "sharding: {zero: 3}\n")
    with pytest.raises(SpecError, match="compile: true cannot be with ZeRO stage 3"):
        load_spec(file)
