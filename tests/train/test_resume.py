"""Whatever decides a run's future is in its checkpoint: with any optimizer and option it goes on bit-equal."""

import re
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distlm.spec import TrainSpec
from distlm.spec.train import Duration
from distlm.train import checkpoint
from tests.train.ranks import losses, make_corpus, metrics, run_ranks, spec

RATES = {"lion": 0.001, "sgd": 0.1, "adafactor": 0.05}


def case(corpus: Path, optimizer: str, precision: str, zero: int, **sections: Any) -> TrainSpec:
    """Six steps of two ranks, a checkpoint after three."""
    options = {"name": optimizer, "lr": RATES.get(optimizer, 0.01), **({"clip": 0} if optimizer == "muon" else {}),
               "groups": [{"match": "embed_tokens|wte", "lr_factor": 0.5, "weight_decay": 0}]}
    return spec(corpus, precision=precision, duration={"steps": 6}, evaluate={"every_steps": 3},
                **{"scale": {"workers": 2}, "sharding": {"zero": zero}, "optimizer": options, "checkpoint": {"every_steps": 3}, **sections})


def records(run: Path) -> list[dict[str, float]]:
    measured = ("time", "tokens_per_s", "memory_bytes", "mfu", "checkpoint", "step_s", "data_s", "forward_s", "backward_s", "evaluate_s")
    return [{key: value for key, value in record.items() if not key.startswith(measured)} for record in metrics(run)]


def evaluations(run: Path) -> list[tuple[float, float]]:
    return [(record["step"], record["val_loss"]) for record in metrics(run) if "val_loss" in record]


def check_going_on(runs: dict[Path, TrainSpec]) -> None:
    """Every run, gone on from its checkpoint of step 3, records and exports the same again."""
    run_ranks(runs)
    before = {run: (records(run), (run / "export" / "model.safetensors").read_bytes()) for run in runs}
    for run in runs:
        shutil.rmtree(run / "checkpoints" / "step-000006")
        shutil.rmtree(run / "export")
    run_ranks(runs)
    for run, (expected, weights) in before.items():
        assert len(losses(run)) == 6 and records(run) == expected, run.name
        assert (run / "export" / "model.safetensors").read_bytes() == weights, run.name
        assert losses(run)[-1] < losses(run)[0], run.name


def test_a_run_that_is_made_longer_makes_the_steps_of_one_that_was_as_long(tmp_path: Path) -> None:
    """With a schedule that does not look at the end: every rate, sample and weight."""
    corpus, steady = make_corpus(tmp_path / "c"), {"schedule": {"name": "constant", "warmup_steps": 2}, "scale": {"workers": 1}}
    longer = case(corpus, "adamw", "fp32", 0, **steady)
    run_ranks({tmp_path / "whole": longer, tmp_path / "run": longer.model_copy(update={"duration": Duration(steps=3)})})
    shutil.rmtree(tmp_path / "run" / "export")
    run_ranks({tmp_path / "run": longer})
    assert len(losses(tmp_path / "run")) == 6 and losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert len((tmp_path / "run" / "windows-0.txt").read_text().splitlines()) == 6, "no step is made again"
    ours, theirs = ((tmp_path / name / "export" / "model.safetensors").read_bytes() for name in ("run", "whole"))
    assert ours == theirs


def test_every_optimizer_and_option(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path / "c")
    dropout = {"model": {"config": {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4}}, "regularization": {"dropout": 0.1}}
    ema, average = {"ema": {"decay": 0.9}}, {"checkpoint": {"every_steps": 3, "average": 2}}
    check_going_on({tmp_path / "muon": case(corpus, "muon", "bf16", 2, **ema),
                    tmp_path / "lion": case(corpus, "lion", "fp32", 3, **dropout, **ema),
                    tmp_path / "adafactor": case(corpus, "adafactor", "bf16", 0, **average),
                    tmp_path / "sgd": case(corpus, "sgd", "fp32", 1, regularization={"label_smoothing": 0.1, "z_loss": 1e-4}, **average)})
    one, other = ((tmp_path / "lion" / "checkpoints" / "step-000003" / f"rng-0000{rank}.pt").read_bytes() for rank in (0, 1))
    assert one != other, "each rank drops its own"


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "muon", "lion", "sgd", "adafactor"])
def test_every_stage_and_precision_gives_the_same_steps_and_goes_on(optimizer: str, tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path / "c")
    runs = {tmp_path / f"{precision}-{zero}": case(corpus, optimizer, precision, zero, ema={"decay": 0.9})
            for precision in ("fp32", "bf16") for zero in ((0,) if optimizer == "adafactor" else (0, 1, 2, 3))}
    check_going_on(runs)
    for run in runs:
        tight = run.name.startswith("fp32") and optimizer != "muon"     # its products are in bf16 always
        of = [[record.get("val_loss", record.get("loss")) for record in metrics(path)] for path in (run, tmp_path / "fp32-0")]
        np.testing.assert_allclose(*of, rtol=1e-5 if tight else 5e-3, err_msg=run.name)
        np.testing.assert_allclose([record.get("loss", 0) for record in metrics(run)],
                                   [record.get("loss", 0) for record in metrics(tmp_path / "fp32-0")], rtol=1e-5 if tight else 5e-3)


@pytest.mark.slow
def test_muon_makes_the_same_steps_of_experts_under_every_stage(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path / "c")
    model = {"config": {"model_type": "mixtral", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
                        "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 3, "num_experts_per_tok": 2}}
    runs = {tmp_path / str(zero): case(corpus, "muon", "fp32", zero, model=model) for zero in range(4)}
    runs |= {tmp_path / f"{zero}-cpu": case(corpus, "muon", "fp32", zero, model=model, sharding={
        "zero": zero, "offload": {"optimizer": "cpu"}}) for zero in (1, 2, 3)}
    run_ranks(runs)
    for run in runs:
        np.testing.assert_allclose(losses(run), losses(tmp_path / "0"), rtol=5e-3, err_msg=run.name)


def test_sigterm_to_a_rank_saves_after_its_step_and_costs_nothing(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path / "c")
    whole, run = tmp_path / "whole", tmp_path / "run"
    given = spec(corpus, scale={"workers": 2}, sharding={"zero": 2}, duration={"steps": 12}, checkpoint={"every_steps": 4, "average": 2},
                 guard={"grace_period_s": 30})
    run_ranks({whole: given})
    output = run_ranks({run: given}, preempt_before_step=9, hold=(8, 9))          # the one before is on its way, an evaluation is due
    text = r"TrainError: a worker was sent SIGTERM, and the state after step 10 is saved, (\S+) s later, where there were 30 s; go on with"
    seconds = [float(one) for one in re.findall(text, output)]
    assert len(seconds) >= 2 and len({*seconds}) == 1 and 0 < seconds[0] < 30, "on both ranks"
    assert [path.name for path in checkpoint.committed(run)] == ["step-000004", "step-000008", "step-000010"]
    assert len(losses(run)) == 10 and not (run / "export").exists()
    assert evaluations(run) == evaluations(whole)[:1], "there is no time for one"
    run_ranks({run: given})
    assert [path.name for path in checkpoint.committed(run)] == ["step-000008", "step-000012"], "what was due is kept"
    assert losses(run) == losses(whole) and evaluations(run) == evaluations(whole), "it is made up for"
    assert (run / "export" / "model.safetensors").read_bytes() == (whole / "export" / "model.safetensors").read_bytes()


@pytest.mark.parametrize(("where", "number", "saved", "measured"), [
    ("step", 7, 7, 1), pytest.param("measure", 8, 8, 2, marks=pytest.mark.slow), pytest.param("step", 12, 12, 2, marks=pytest.mark.slow)])
def test_sigterm_inside_a_step_or_an_evaluation_is_seen_at_its_end(tmp_path: Path, where: str, number: int, saved: int, measured: int
                                                                     ) -> None:
    corpus = make_corpus(tmp_path / "c")
    whole, run = tmp_path / "whole", tmp_path / "run"
    given = spec(corpus, scale={"workers": 2}, duration={"steps": 12}, evaluate={"every_steps": 8}, checkpoint={"every_steps": 5})
    run_ranks({whole: given})
    output = run_ranks({run: given}, inside=(signal.SIGTERM, where, number))
    assert f"was sent SIGTERM, and the state after step {saved} is saved" in output
    assert checkpoint.committed(run)[-1].name == f"step-{saved:06d}" and len(losses(run)) == saved and not (run / "export").exists()
    assert evaluations(run) == evaluations(whole)[:measured]
    run_ranks({run: given})
    assert losses(run) == losses(whole) and evaluations(run) == evaluations(whole)
    assert (run / "export" / "model.safetensors").read_bytes() == (whole / "export" / "model.safetensors").read_bytes()
