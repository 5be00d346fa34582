"""What training measures of its validation windows is what `kind: evaluate` measures of the checkpoint, however the run is divided."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from distlm.corpus.stream import Windows
from distlm.model.loss import LossHead, TokenScores, blank_scores
from distlm.runs import RunFolder
from distlm.runs.report import write_report
from distlm.spec import EvaluateSpec, TrainSpec
from distlm.spec.load import dump
from distlm.storage import Storage
from distlm.train.recipe import make_recipe
from distlm.train.track import numbers
from tests.corpus.made import Doc, make
from tests.evaluate.models import evaluated
from tests.evaluate.test_evaluate import DOCS, SOURCES
from tests.train.ranks import VOCABULARY, make_corpus, make_labelled_corpus, make_packed_corpus, metrics, run_ranks, spec

KEYS = ("loss", "perplexity", "bits_per_byte", "accuracy", "ece")
FEW: dict[str, Any] = {"duration": {"steps": 2}, "schedule": {}, "evaluate": {}, "checkpoint": {}}
TWO = {"workers": 2}
SHARDED = {"zero": 3, "deepspeed": {"zero_optimization": {"stage3_param_persistence_threshold": 0}}}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Corpora, and runs by their names: one of a corpus that tells its sources, and so on."""
    root = tmp_path_factory.mktemp("measures")
    make(root / "two", [Doc("train " * 20), *DOCS], sources=SOURCES)
    plain, packed, chat = make_corpus(root / "plain", val=9), make_packed_corpus(root / "packed"), make_packed_corpus(
        root / "chat", conversations=True)
    mixture = {**dump(spec(plain, **{**FEW, "evaluate": {"max_windows": 40}})),
               "corpus": {"mix": [{"corpus": str(plain), "weight": 0.75}, {"corpus": str(packed), "weight": 0.25}]}}
    run_ranks({root / "sources": spec(root / "two", **FEW), root / "mixture": TrainSpec.model_validate(mixture),
               root / "sft": spec(chat, **{**FEW, "objective": "sft"}),
               root / "whole": spec(root / "two", **FEW, model={"config": {"model_type": "gemma2", "hidden_size": 32, "head_dim": 8,
                                                                         "intermediate_size": 64, "num_hidden_layers": 2,
                                                                         "num_attention_heads": 4, "num_key_value_heads": 2}})})
    return root


@pytest.fixture(scope="module")
def others(root: Path) -> Path:
    """Runs beside them: with compiled layers, with a teacher, and of two ranks."""
    run_ranks({root / "compiled": spec(root / "two", **FEW, compile=True),
               root / "distilled": spec(root / "two", **FEW, objective="distill", distill={"teacher": str(root / "sources" / "export")})})
    run_ranks({root / "zero3": spec(root / "two", **FEW, scale=TWO, sharding=SHARDED),
               root / "sequence": spec(root / "two", **FEW, scale=TWO, sharding={"sequence_parallel": 2}),
               root / "sft-2": spec(root / "chat", **{**FEW, "objective": "sft"}, scale=TWO)})
    run_ranks({root / "tensor": spec(root / "two", **FEW, scale=TWO, sharding={"tensor_parallel": 2})})
    return root


def last(run: Path) -> dict[str, Any]:
    return [record for record in metrics(run) if "val_loss" in record][-1]


def measured(run: Path, corpus: Path, **keys: Any) -> dict[str, Any]:
    given = EvaluateSpec.model_validate({"name": "e", "model": str(run / "export"), "corpus": str(corpus), **keys})
    return evaluated(given, Storage(run.parent))


def check(ours: dict[str, Any], theirs: dict[str, Any], prefix: str = "") -> None:
    assert [ours[f"{prefix}{key}"] for key in KEYS] == pytest.approx([theirs[key] for key in KEYS], rel=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["compiled", "distilled", "zero3", "tensor", "sequence"])
def test_others_are_measured_as_an_evaluation_does(others: Path, name: str) -> None:
    test_a_corpus_and_its_sources_are_measured_as_an_evaluation_does(others, name)


@pytest.mark.parametrize("name", ["sources", "whole"])
def test_a_corpus_and_its_sources_are_measured_as_an_evaluation_does(root: Path, name: str) -> None:
    ours, theirs = last(root / name), measured(root / name, root / "two")
    check(ours, theirs, "val_")
    assert ours["val_perplexity"] == pytest.approx(np.exp(ours["val_loss"])) and 0 < ours["val_ece"] < 1
    sources = theirs["corpora"]["two"]["sources"]
    assert [*ours["val_by_source"]] == ["two: code", "two: web"] and len(sources) == 2
    for source, found in sources.items():
        check(ours["val_by_source"][f"two: {source}"], found)


@pytest.mark.slow
def test_tokens_that_give_no_loss_are_left_out_on_each_rank(others: Path) -> None:
    test_tokens_that_give_no_loss_are_left_out(others, "sft-2")


@pytest.mark.parametrize("name", ["sft"])
def test_tokens_that_give_no_loss_are_left_out(root: Path, name: str) -> None:
    check(last(root / name), measured(root / name, root / "chat"), "val_")
    assert "val_by_source" not in last(root / name), "one corpus that does not tell its sources"


def test_a_mixture_has_each_corpus_and_is_measured_by_their_shares(root: Path) -> None:
    given, ours = TrainSpec.model_validate({**dump(spec(root / "plain")), "corpus": {"mix": [
        {"corpus": str(root / "plain"), "weight": 0.75}, {"corpus": str(root / "packed"), "weight": 0.25}]}}), last(root / "mixture")
    parts = make_recipe(given.model_copy(update={"evaluate": given.evaluate.model_copy(update={"max_windows": 40})}), Storage(root)).val
    assert [(part.name, part.windows, part.share) for part in parts] == [("plain", 9, 0.75), ("packed", 10, 0.25)], "not by their shares"
    each = {part.name: measured(root / "mixture", Path(part.corpus), windows=part.windows, mask_documents=True) for part in parts}
    for name, theirs in each.items():
        check(ours["val_by_source"][name], theirs)
    for key in ("loss", "accuracy"):
        assert ours[f"val_{key}"] == pytest.approx(0.75 * each["plain"][key] + 0.25 * each["packed"][key], rel=2e-5)
    gaps = [0.75 * one["tokens"] / each["plain"]["tokens"] * (one["accuracy"] - one["confidence"]) if one["tokens"] else 0.0
            for one in each["plain"]["reliability"]]
    others = [0.25 * one["tokens"] / each["packed"]["tokens"] * (one["accuracy"] - one["confidence"]) if one["tokens"] else 0.0
              for one in each["packed"]["reliability"]]
    assert ours["val_ece"] == pytest.approx(sum(abs(a + b) for a, b in zip(gaps, others, strict=True)), rel=1e-4)
    bits = ours["val_loss"] / np.log(2) / sum(share * one["loss"] / np.log(2) / one["bits_per_byte"] for share, one in
                                              zip((0.75, 0.25), each.values(), strict=True))
    assert ours["val_bits_per_byte"] == pytest.approx(bits, rel=2e-5)


def test_measures_are_curves_of_the_page_of_tensorboard_and_of_trackers(root: Path) -> None:
    folder, ours = RunFolder(root / "sources"), last(root / "sources")
    page = write_report(folder).read_text()
    for text in ("Validation loss by corpus and source", f"two: web {ours['val_by_source']['two: web']['loss']:.6g}", "Next-token accuracy",
                 f"val accuracy {ours['val_accuracy']:.6g}", "Bits per byte", "Calibration error", f"<b>{ours['val_perplexity']:,.2f}</b>"):
        assert text in page, text
    board = EventAccumulator(str(folder.path / "tensorboard")).Reload()
    for tag, value in (("val/accuracy", ours["val_accuracy"]), ("val_loss/two/web", ours["val_by_source"]["two: web"]["loss"])):
        events = board.Scalars(tag)
        assert [event.step for event in events] == [0, 1, 2] and events[-1].value == pytest.approx(value)
    sent = numbers(ours)
    assert sent["val_ece"] == ours["val_ece"] and sent["val_accuracy/two/code"] == ours["val_by_source"]["two: code"]["accuracy"]
    assert numbers({"val_by_source": {"a: b: ü?": {"loss": 1.0}}}) == {"val_loss/a/b/ü_": 1.0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_is_the_same_to_the_bit_whether_tokens_are_told_apart_or_not(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    head, hidden, targets = LossHead(nn.Linear(16, 3000)).to(dtype).eval(), torch.randn(1, 7000, 16, dtype=dtype), torch.randint(
        0, 3000, (7000,))

    def loss(told: TokenScores | None) -> float:
        head.targets, head.told = targets, told
        with torch.no_grad():
            return float(head(hidden))

    told = blank_scores(targets)
    assert loss(told) == loss(None)
    logits = nn.functional.linear(hidden[0], head.weight, head.bias).float()
    highest, best = logits.max(1)
    assert torch.equal(told.best, best), "of equal ones the first"
    torch.testing.assert_close(told.logprobs, logits.log_softmax(1).gather(1, targets[:, None])[:, 0])
    torch.testing.assert_close(told.confidences, (highest - logits.logsumexp(1)).exp())


@pytest.mark.parametrize("objective", ["pretrain", "classify"])
def test_a_validation_loss_that_is_not_finite_ends_the_run_on_all_ranks(tmp_path: Path, objective: str) -> None:
    corpus = make_labelled_corpus(tmp_path / "c") if objective == "classify" else make_corpus(tmp_path / "c")
    tokens = Windows(corpus, "val").head(3)[2]
    run = tmp_path / "run"
    output = run_ranks({run: spec(corpus, **FEW, objective=objective, scale=TWO)}, poison={
        "window": int(tokens[0]) * VOCABULARY + int(tokens[1]), "module": "score" if objective == "classify" else "model.layers.1.mlp"})
    ends = re.findall(r"rank (\d) ended: (.*) \[(.*)\], weights (\w+)", output)
    said = "the validation loss is nan before the first step, on windows of c; lower optimizer.lr, or look at these windows"
    assert sorted(ends) == [(rank, said, "nonfinite_loss", "kept") for rank in "01"], output[-3000:]
    assert not (run / "metrics.jsonl").exists() and not (run / "export").exists()
