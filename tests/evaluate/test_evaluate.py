"""What an evaluation measures: the trainer's own loss, whoever takes the windows, by source; and what is refused before any work."""

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM

from distlm import execute, plan
from distlm.corpus.decode import Decoder
from distlm.corpus.manifest import read_manifest
from distlm.corpus.stream import Windows
from distlm.errors import DistlmError, EvaluationError, InputError
from distlm.evaluate.driver import answer
from distlm.evaluate.task import Reader, check_generates, context_of, make_task
from distlm.evaluate.worker import Worker
from distlm.runs import RunFolder
from distlm.spec import EvaluateSpec
from distlm.spec.load import dump
from distlm.storage import Storage
from tests.corpus.made import Doc, make
from tests.evaluate.models import evaluated, make_model, sums_of
from tests.records import Records
from tests.train.ranks import make_corpus, make_packed_corpus, metrics, run_ranks
from tests.train.ranks import spec as train_spec

TEXTS = ["def one():\n    return 1\n", "x", "Wide: größer 你好, and a text that is longer than a window of sixteen is", "a" * 15, "b" * 16,
         "end of it"]
DOCS = [Doc(TEXTS[i % len(TEXTS)] + str(i), split="val", origin=i % 3 % 2) for i in range(20)]
DOCS[7] = Doc("." * (-sum(len(doc.text.encode()) + 1 for doc in DOCS[:7]) % 16 + 15), split="val")
"""The one after it begins with the last token of a window, and with the first of the next."""
SOURCES = [{"name": name, "format": "auto", "text_key": "text", "files": 1, "bytes": 100, "xxh3": name} for name in ("code", "web")]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of two sources, three of random windows, and a model for each tokenizer."""
    root = tmp_path_factory.mktemp("evaluate")
    make(root / "two", [Doc("train " * 20), *DOCS], sources=SOURCES)
    make_corpus(root / "plain")
    make_packed_corpus(root / "packed")
    make_packed_corpus(root / "chat", conversations=True)
    make_model(root / "model", root / "two")
    make_model(root / "other", root / "plain")
    return root


def spec(root: Path, one: str = "two", model: str = "model", **keys: Any) -> EvaluateSpec:
    return EvaluateSpec.model_validate({"name": "e", "model": str(root / model), "corpus": str(root / one), **keys})


def test_the_loss_is_the_trainers_own_for_plain_packed_and_marked_corpora(root: Path, tmp_path: Path) -> None:
    sections = {"plain": {"evaluate": {"max_windows": 5}}, "packed": {}, "chat": {"objective": "sft"}}
    runs = {tmp_path / name: train_spec(root / name, duration={"steps": 2}, schedule={}, **{"evaluate": {}, **more})
            for name, more in sections.items()}
    run_ranks(runs)
    for run in runs:
        last = [record for record in metrics(run) if "val_loss" in record][-1]
        keys = {"windows": 5} if run.name == "plain" else {}
        found = evaluated(spec(root, run.name, str(run / "export"), **keys), Storage(root))
        assert found["loss"] == pytest.approx(last["val_loss"], abs=1e-5), run.name
        assert found["windows"] == (5 if run.name == "plain" else read_manifest(root / run.name).splits["val"].windows)
        masked = found["corpora"][run.name]["masked"]
        assert masked is (run.name != "plain")
        other = evaluated(spec(root, run.name, str(run / "export"), **keys, mask_documents=not masked), Storage(root))
        if run.name != "plain":                            # whose every window is one document to its shards
            assert abs(other["loss"] - found["loss"]) > 1e-4


def test_the_measures_are_those_of_whole_logits(root: Path) -> None:
    found = evaluated(spec(root, calibration_bins=7, batch_windows=3), Storage(root))
    windows = Windows(root / "two", "val")
    tokens = torch.from_numpy(windows.head(len(windows)).astype(np.int64))
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(root / "model")(input_ids=tokens[:, :-1]).logits.double()
    targets = tokens[:, 1:]
    loss = functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    sure, best = logits.softmax(-1).max(-1)
    size = sum(target >= 4 for target in targets.flatten().tolist())           # a byte each, but for the special tokens
    bins = np.ceil(sure.flatten().numpy() * 7).astype(int) - 1
    right = (best == targets).flatten().numpy()
    ece = sum(abs(right[bins == m].mean() - sure.flatten().numpy()[bins == m].mean()) * (bins == m).mean() for m in set(bins.tolist()))
    assert found["loss"] == pytest.approx(float(loss), abs=1e-6) and found["perplexity"] == pytest.approx(float(loss.exp()), rel=1e-5)
    assert found["accuracy"] == float(right.mean()) and found["ece"] == pytest.approx(ece, abs=1e-6) and found["tokens"] == targets.numel()
    assert found["bits_per_byte"] == pytest.approx(float(loss) * targets.numel() / size / np.log(2), rel=1e-6)


def test_each_token_counts_for_the_source_of_its_document(root: Path) -> None:
    windows, manifest = Windows(root / "two", "val"), read_manifest(root / "two")
    numbers = windows.documents(*windows.first(len(windows)))
    stream = np.concatenate([np.full(len(doc.text.encode()) + 1, i) for i, doc in enumerate(DOCS)])
    expected = np.lib.stride_tricks.sliding_window_view(stream, manifest.context + 1)[::manifest.context][:len(windows)]
    assert len(windows) > 2 * 4 and np.array_equal(numbers, expected)          # of several shards
    begins = np.flatnonzero(np.diff(stream)) + 1
    assert any(begins % manifest.context == 0)
    assert np.array_equal(windows.documents(*(places[5:9] for places in windows.first(9))), expected[5:9])
    found = evaluated(spec(root), Storage(root))["corpora"]["two"]["sources"]
    origins = np.asarray([doc.origin for doc in DOCS])[expected[:, 1:]]
    assert {name: one["tokens"] for name, one in found.items()} == {"code": int((origins == 0).sum()), "web": int((origins == 1).sum())}
    assert found["code"]["loss"] != found["web"]["loss"]


def test_each_token_of_a_packed_window_is_of_the_document_that_its_shard_names(root: Path) -> None:
    windows = Windows(root / "packed", "val")
    numbers = windows.documents(*windows.first(len(windows)))
    for pieces in Decoder(windows.manifest).pieces("val"):
        for window, begin, end, document in zip(pieces.windows, pieces.begins, pieces.ends, pieces.documents, strict=True):
            assert (numbers[window, begin:end] == document).all()


def test_several_corpora_are_measured_each_and_together(root: Path) -> None:
    given = [str(root / name) for name in ("plain", "packed", "chat")]
    found = evaluated(spec(root, model="other", corpus=given, windows=3), Storage(root))
    alone = [evaluated(spec(root, model="other", corpus=one, windows=3), Storage(root)) for one in given]
    assert [*found["corpora"]] == ["plain", "packed", "chat"] and found["windows"] == 9
    assert found["tokens"] == sum(one["tokens"] for one in alone) and found["corpora"]["plain"]["sources"] == {}
    assert found["loss"] == pytest.approx(sum(one["loss"] * one["tokens"] for one in alone) / found["tokens"], rel=1e-12)
    for name, one in zip(found["corpora"], alone, strict=True):
        assert found["corpora"][name]["loss"] == one["loss"]


def test_a_batch_comes_to_the_same_whoever_takes_it_and_in_whatever_order(root: Path) -> None:
    task, sums = sums_of(spec(root, batch_windows=3), Storage(root))
    assert len(sums) > 4 and sum(count for _, _, count in task.batches) == task.windows
    for number in (2, 4):
        found: dict[int, Any] = {}
        for rank in range(number):
            worker = Worker(task, "cpu", "fp32", None)
            worker.load(root / "model")
            found |= {batch: worker.score(batch) for batch in reversed(range(rank, len(sums), number))}
        assert all(np.array_equal(found[batch], one) for batch, one in enumerate(sums))


def test_bfloat16_comes_near_and_leaves_positions_whole(root: Path) -> None:
    task, sums = sums_of(spec(root), Storage(root))
    worker = Worker(task, "cpu", "bf16", None)
    worker.load(root / "model")
    found, whole = worker.score(0), sums[0]
    assert worker.model.dtype == torch.bfloat16 and worker.model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert found[:, 0].tolist() == whole[:, 0].tolist() and found[:, 1].sum() == pytest.approx(whole[:, 1].sum(), rel=0.02)
    assert found[:, 1].sum() != whole[:, 1].sum()


def test_a_model_whose_loss_is_not_finite_is_told(root: Path, tmp_path: Path) -> None:
    broken = AutoModelForCausalLM.from_pretrained(root / "model")
    torch.nn.init.constant_(broken.model.norm.weight, torch.nan)
    from distlm.model.export import export_model

    export_model(broken, None, root / "two" / "tokenizer", tmp_path / "broken", {})
    with pytest.raises(EvaluationError, match="not finite in a window of two") as error:
        sums_of(spec(root, model=str(tmp_path / "broken")), Storage(root))
    assert error.value.cause == "nonfinite_loss"


@pytest.mark.parametrize(("keys", "message"), [
    ({"corpus": "nowhere"}, r"corpus: there is no corpus nowhere"),
    ({"split": "test"}, "split: the corpus two has no split test; it has train"),
    ({"model": "no-model"}, "there is no run and no folder"), ({"corpus": ["two", "./two"]}, "is there twice"),
    ({"corpus": "empty"}, "split: the corpus empty has no window in its split val: the split has 0 documents"),
    ({"model": "narrow"}, "model: .*the checkpoint takes 8 tokens of context and the corpus has windows of 16"),
    ({"model": "small"}, r"model: .*the checkpoint has 64 tokens and the corpus \d+"),
    ({"model": "foreign"}, "model: .*the tokenizer of the checkpoint is not that of the corpus two")])
def test_what_cannot_be_evaluated_is_refused_before_any_work(keys: dict[str, Any], message: str, root: Path, tmp_path: Path,
                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    storage = Storage(tmp_path)
    (tmp_path / "corpora").mkdir()
    (tmp_path / "corpora" / "two").symlink_to(root / "two")
    monkeypatch.chdir(tmp_path / "corpora")
    make(tmp_path / "corpora" / "empty", [Doc("train " * 20)])
    make_model(tmp_path / "runs" / "narrow", root / "two", max_position_embeddings=8)
    make_model(tmp_path / "runs" / "small", root / "plain")
    foreign = make_model(tmp_path / "runs" / "foreign", root / "two")
    tokenizer = json.loads((foreign / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] = {token: number for number, token in enumerate(reversed(tokenizer["model"]["vocab"]))}
    (foreign / "tokenizer.json").write_text(json.dumps(tokenizer))
    given = {"kind": "evaluate", "name": "e", "model": str(root / "model"), "corpus": "two", **keys}
    with pytest.raises(InputError, match=message):
        execute.run(given, storage=storage, progress=Records())
    assert not storage.evaluation("e").exists()
    if keys.get("corpus") != "nowhere" and keys.get("model") != "no-model":    # what is not there yet may come
        with pytest.raises(InputError, match=message):
            plan.needs(execute.resolve(given), storage)


@pytest.fixture(scope="module")
def storage(root: Path, joined: None) -> Storage:
    (root / "runs").mkdir()
    (root / "corpora").mkdir()
    (root / "runs" / "m").symlink_to(root / "model")
    (root / "corpora" / "two").symlink_to(root / "two")
    return Storage(root)


def test_a_job_leaves_the_numbers_the_page_and_what_it_was_made_of(root: Path, storage: Storage) -> None:
    given = {"kind": "evaluate", "name": "job", "model": "m", "corpus": "two", "workers": 2, "batch_windows": 3,
             "prompts": ["<b>de", "x"], "max_tokens": 5}
    shown = Records()
    made = execute.run(given, storage=storage, progress=shown)
    task, sums = sums_of(spec(root, batch_windows=3), storage)
    expected = evaluated(spec(root, batch_windows=3), storage)
    assert {key: made[key] for key in ("loss", "accuracy", "ece", "reliability", "corpora", "tokens")} == \
        {key: expected[key] for key in ("loss", "accuracy", "ece", "reliability", "corpora", "tokens")}      # to the last bit
    folder = RunFolder(storage.evaluation("job"))
    assert folder.state() == ("succeeded", "completed") and json.loads((folder.path / "result.json").read_text()) == made
    lineage = folder.lineage()["inputs"]
    assert lineage["model"] == str(root / "runs" / "m") and [*lineage["corpora"]] == [str(root / "corpora" / "two")]

    page = (folder.path / "report.html").read_text()
    assert "two: code" in page and "two: web" in page and f"{made['corpora']['two']['sources']['web']['loss']:.4f}" in page
    tables = [made["reliability"], *(one["reliability"] for one in made["corpora"]["two"]["sources"].values())]
    assert len(tables) == page.count("<svg") == 3 and page.count("<rect") == sum(one["tokens"] > 0 for table in tables for one in table)
    assert [sum(bins) for bins in zip(*([one["tokens"] for one in table] for table in tables[1:]), strict=True)] == [
        one["tokens"] for one in made["reliability"]]
    assert "&lt;b&gt;de" in page and "<b>de" not in page
    assert not re.search(r"https?://|<script", page.replace("default-src", ""))
    model = AutoModelForCausalLM.from_pretrained(root / "model")
    prompt = torch.tensor([[byte + 4 for byte in b"x"]])
    added = model.generate(prompt, max_new_tokens=5, do_sample=False)[0, 1:].tolist()
    text = bytes(token - 4 for token in added if token >= 4).decode(errors="replace")
    assert made["samples"][1] == {"prompt": "x", "completion": text}
    [table] = [record for record in shown.records if record["distlm"] == "table"]
    rows = {row[0]: row[1] for row in table["rows"]}
    assert rows["loss"] == f"{made['loss']:.4f}" and rows["two: web"].startswith("loss ")

    again = Records()
    assert execute.run(given, storage=storage, progress=again, resume=True) == made and "nothing to do" in again.notes[0]
    assert dict(plan.needs(execute.resolve(given), storage))["corpus"].endswith(f"{task.windows} windows of val") and len(sums) > 1


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 4])
def test_any_number_of_workers_comes_to_the_same_bits(workers: int, root: Path, storage: Storage) -> None:
    made = execute.run({"kind": "evaluate", "name": f"by-{workers}", "model": "m", "corpus": "two", "workers": workers, "batch_windows": 2},
                       storage=storage, progress=Records())
    expected = evaluated(spec(root, batch_windows=2), storage)
    assert all(made[key] == expected[key] for key in ("loss", "accuracy", "ece", "reliability", "corpora"))


def test_a_prompt_that_does_not_fit_and_a_cluster_that_is_too_small_end_the_job(storage: Storage) -> None:
    given = {"kind": "evaluate", "name": "long", "model": "m", "corpus": "two"}
    for keys, message in ({"prompts": ["x" * 12], "max_tokens": 5}, "prompts.0: 12 tokens and 5 of max_tokens are more than the 16"), (
            {"workers": 1000}, "workers: 1000 workers need 1000 CPUs"):
        with pytest.raises(DistlmError, match=message):
            execute.run({**given, "name": f"bad-{len(keys)}", **keys}, storage=storage, progress=Records())


def test_a_worker_that_dies_or_fails_ends_the_job_with_its_cause(storage: Storage) -> None:
    import ray

    @ray.remote(max_retries=0)
    def die() -> None:
        os._exit(1)

    @ray.remote(max_retries=0)
    def fail(cause: str) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory") if cause == "oom" else InputError("a damaged corpus")

    with pytest.raises(EvaluationError, match=r"ended unexpectedly; its log is logs/worker-1\.log") as error:
        answer(ray, die.remote(), Path("logs/worker-1.log"))
    assert error.value.cause == "worker_died"
    with pytest.raises(EvaluationError, match=r"out of memory.*; lower batch_windows or workers") as error:
        answer(ray, fail.remote("oom"), Path("logs/worker-1.log"))
    assert error.value.cause == "oom"
    with pytest.raises(InputError, match="a damaged corpus"):
        answer(ray, fail.remote("input"), Path("logs/worker-1.log"))


def test_what_a_task_reads_is_checked(root: Path, tmp_path: Path) -> None:
    make(tmp_path / "c", [Doc("train"), *DOCS], sources=SOURCES[:1])           # of whose documents some are of a second source
    task = make_task(spec(root, corpus=str(tmp_path / "c")), Storage(root))
    with pytest.raises(DistlmError, match="lists other documents than the windows hold"):
        Reader(task).read(0)
    assert dump(spec(root))["windows"] is None


def test_a_model_whose_configuration_cannot_be_read_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    for ask in (check_generates, context_of):
        with pytest.raises(InputError, match=r"cannot read its config\.json"):
            ask(tmp_path)
