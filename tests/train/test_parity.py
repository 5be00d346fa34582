"""However steps are sharded and divided, a run's losses are the same; and one that was killed goes on as if it had not been.
test_gradients.py has the gradients."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from distlm.corpus.stream import Windows
from distlm.model.attention import use_cpu_attention
from distlm.spec import TrainSpec
from tests.train.ranks import losses, losses_by_hand, make_corpus, metrics, run_ranks, windows_seen
from tests.train.ranks import spec as any_spec

SHARDED = {"zero": 3, "deepspeed": {"zero_optimization": {"stage3_param_persistence_threshold": 0}}}
"""So that small parameters are sharded too, which DeepSpeed else keeps whole."""
CASES = {"zero0": {"sharding": {"zero": 0}}, "zero1": {"sharding": {"zero": 1}}, "zero2": {"sharding": {"zero": 2}},
         "zero3": {"sharding": SHARDED},
         "bf16-zero0": {"sharding": {"zero": 0}, "precision": "bf16"},
         "bf16-zero2": {"sharding": {"zero": 2}, "precision": "bf16"}}
TWO = {"workers": 2}


def spec(corpus: Path, **sections: object) -> TrainSpec:
    """Ten steps of twelve windows."""
    return any_spec(corpus, **{"duration": {"steps": 10}, "evaluate": {"every_steps": 5}, "checkpoint": {"every_steps": 3}, **sections})


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus") / "c", windows=(10, 9, 5))


@pytest.fixture(scope="module")
def undisturbed(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of finished runs of two ranks, one for each case."""
    root = tmp_path_factory.mktemp("undisturbed")
    run_ranks({root / name: spec(corpus, scale=TWO, **case) for name, case in CASES.items()})
    return root


@pytest.fixture(scope="module")
def one_worker(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("one")
    run_ranks({root / "fp32": spec(corpus), root / "bf16": spec(corpus, precision="bf16")})
    return root


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_two_workers_under_any_stage_give_one_workers_losses(undisturbed: Path, one_worker: Path, zero: int) -> None:
    np.testing.assert_allclose(losses(undisturbed / f"zero{zero}"), losses(one_worker / "fp32"), rtol=2e-6)


@pytest.mark.parametrize("zero", [0, 2])
def test_bf16_agrees_within_its_rounding(undisturbed: Path, one_worker: Path, zero: int) -> None:
    np.testing.assert_allclose(losses(undisturbed / f"bf16-zero{zero}"), losses(one_worker / "bf16"), rtol=5e-3)
    assert losses(one_worker / "bf16") != losses(one_worker / "fp32")


@pytest.mark.slow
def test_layers_that_are_computed_again_make_equal_steps_under_stages_1_and_2_and_in_bf16(corpus: Path, tmp_path: Path) -> None:
    """All of them, and every second one."""
    short = {"duration": {"steps": 4}, "schedule": {}, "evaluate": {"every_steps": 4}, "checkpoint": {"every_steps": 4}}
    cases = [(precision, zero) for precision in ("fp32", "bf16") for zero in (0, 1, 2) if (precision, zero) != ("fp32", 0)]
    run_ranks({tmp_path / f"{precision}-{zero}-{every}": spec(corpus, scale=TWO, precision=precision, sharding={"zero": zero},
                                                              activation_checkpointing=every, **short)
               for precision, zero in cases for every in (0, 1, 2)})
    for precision, zero in cases:
        kept, every, second = (tmp_path / f"{precision}-{zero}-{every}" for every in (0, 1, 2))
        assert losses(every) == losses(second) == losses(kept), (precision, zero)
        assert metrics(every)[-1]["val_loss"] == metrics(second)[-1]["val_loss"] == metrics(kept)[-1]["val_loss"], (precision, zero)


def test_the_losses_are_those_of_a_loop_written_by_hand(corpus: Path, one_worker: Path) -> None:
    expected = losses_by_hand(spec(corpus), corpus)
    np.testing.assert_allclose(losses(one_worker / "fp32"), expected, rtol=1e-5)
    assert expected[-1] < expected[0] - 0.5


@pytest.mark.parametrize("names", [             # test_resume.py goes on at every stage, test_quickstart.py after a kill under zero2
    pytest.param(("zero3", "bf16-zero2"), id="some"),
    pytest.param(("zero0", "zero1", "zero2", "bf16-zero0"), id="others", marks=pytest.mark.slow)])
def test_a_killed_run_goes_on_bit_equal_and_sees_each_window_once(corpus: Path, undisturbed: Path, names: tuple[str, ...],
                                                                  tmp_path: Path) -> None:
    runs = {tmp_path / name: spec(corpus, scale=TWO, **CASES[name]) for name in names}
    for run, given in runs.items():
        run_ranks({run: given}, kill_before_step=8)
        assert not (run / "export").exists()
    run_ranks(runs)
    for run in runs:
        again = undisturbed / run.name
        assert losses(run) == losses(again), run.name
        assert windows_seen(run) == windows_seen(again)
        assert [r["val_loss"] for r in metrics(run) if "val_loss" in r] == [r["val_loss"] for r in metrics(again) if "val_loss" in r]
        ours, theirs = ((path / "export" / "model.safetensors").read_bytes() for path in (run, again))
        assert ours == theirs, run.name
        counted = [n for numbers in windows_seen(run).values() for n in numbers]
        assert len(counted) == 10 * 12 and all(counted.count(n) == 120 // 24 for n in range(24)), "each of 24 windows five times"


@pytest.mark.parametrize("name", ["zero0", "zero3", "bf16-zero2"])
def test_the_export_is_the_model_that_was_trained(corpus: Path, undisturbed: Path, name: str) -> None:
    """transformers alone loads it, and its validation loss is the trainer's own: in bf16 with the trainer's attention, and nearly so with
    PyTorch's, which rounds at other places."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = undisturbed / name / "export"
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert AutoTokenizer.from_pretrained(folder).eos_token_id == 0
    assert model.dtype == (torch.bfloat16 if name.startswith("bf16") else torch.float32) and model.config.use_cache
    tokens = torch.from_numpy(Windows(corpus, "val").head(7).astype(np.int64))
    for exact in (False, True):
        if exact:
            use_cpu_attention(model)
        with torch.no_grad():
            logits = model(input_ids=tokens[:, :-1]).logits.float()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).item()
        tolerance = 1e-5 if exact or model.dtype == torch.float32 else 3e-4
        assert loss == pytest.approx(metrics(undisturbed / name)[-1]["val_loss"], rel=tolerance)
    lineage = json.loads((folder / "distlm.json").read_text())
    assert lineage["run"] == name and lineage["checkpoint"] == "step-000010" and len(lineage["corpus_hash"]) == 64
