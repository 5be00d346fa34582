"""Encoders as classifiers: the same steps however they are sharded, transformers' own loss, resumed bit-equal, and one number from
training, evaluation and endpoint."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from distlm import execute, plan
from distlm.attribution import explain
from distlm.corpus.manifest import tokenizer_hash, write_manifest
from distlm.corpus.stream import Windows
from distlm.errors import InputError, SpecError
from distlm.evaluate import labels
from distlm.evaluate.task import check_generates, make_task
from distlm.evaluate.worker import Worker
from distlm.model.adapter import add_adapter
from distlm.model.build import build_model, model_config
from distlm.serve.classifier import TorchClassifier
from distlm.spec import EvaluateSpec, ServeSpec, TrainSpec
from distlm.spec.load import load_spec
from distlm.storage import Storage, read_json, write_json
from distlm.train.recipe import make_recipe
from tests.model.encoders import CLS, PAD, SEP, make_encoder, make_tokenizer
from tests.serve.test_classify import answer
from tests.train.ranks import losses, make_corpus, make_labelled_corpus, make_packed_corpus, metrics, run_ranks, spec
from tests.train.test_classify import SCORES, documents, exported

FAMILIES = ("bert", "roberta", "modernbert")
MORE = ("distilbert", "deberta-v2", "electra", "albert")
STILL = {"dropout": 0.0}
SHARDED = {"zero": 3, "deepspeed": {"zero_optimization": {"stage3_param_persistence_threshold": 0}}}
TWO = {"workers": 2}


def labelled(folder: Path, **more: Any) -> Path:
    """A corpus with labels, of a tokenizer that puts [CLS] before a text and [SEP] behind it."""
    make_labelled_corpus(folder, **more)
    data = read_json(folder / "manifest.json")
    del data["format"]
    for file in (folder / "tokenizer").iterdir():
        file.unlink()
    make_tokenizer(folder / "tokenizer")
    write_manifest(folder, {**data, "tokenizer": {**data["tokenizer"], "hash": tokenizer_hash(folder / "tokenizer")}})
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("encoders")
    labelled(root / "corpora" / "c")
    labelled(root / "corpora" / "many", multiple=True)
    for family in (*FAMILIES, *MORE):
        make_encoder(root / family, family)
    return root


def tuned(root: Path, family: str, corpus: str = "c", **sections: Any) -> TrainSpec:
    return spec(root / "corpora" / corpus, **{"model": {"from": str(root / family)}, "objective": "classify", "duration": {"steps": 4},
                                              "evaluate": {"every_steps": 4}, "checkpoint": {"every_steps": 2}, "regularization": STILL,
                                              **sections})


@pytest.fixture(scope="module")
def runs(root: Path) -> Path:
    """Finished runs of each family."""
    run_ranks({root / "runs" / family: tuned(root, family) for family in FAMILIES})
    return root / "runs"


def framed(tokens: torch.Tensor) -> torch.Tensor:
    return torch.cat([torch.tensor([CLS]), tokens, torch.tensor([SEP])])


def by_hand(model: Any, texts: list[tuple[torch.Tensor, list[int]]]) -> tuple[float, np.ndarray]:
    """(mean loss, logits) by transformers' own forward pass, a document at a time, as its tokenizer writes it."""
    total, found = 0.0, []
    for tokens, given in texts:
        truth = torch.tensor(given) if model.config.problem_type == "single_label_classification" else \
            torch.eye(model.config.num_labels)[given].sum(0)[None]
        with torch.no_grad():
            output = model(input_ids=framed(tokens)[None], labels=truth)
        total += output.loss.item()
        found.append(output.logits[0].numpy())
    return total / len(texts), np.stack(found)


def last_of(run: Path) -> dict[str, Any]:
    return [record for record in metrics(run) if "val_loss" in record][-1]


def observed(root: Path, model: Path, corpus: str = "c") -> np.ndarray:
    """[documents, labels and logits]: by the worker of an evaluation."""
    given = EvaluateSpec.model_validate({"name": "e", "model": str(model), "corpus": str(root / "corpora" / corpus), "batch_windows": 5})
    task = make_task(given, Storage(root))
    worker = Worker(task, "cpu", "fp32", 1)
    worker.load(model)
    return labels.outcome(task, "m", every := [worker.observe(batch) for batch in range(len(task.batches))]), \
        np.concatenate([one.rows for one in every])


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_scores_evaluation_and_endpoint_are_those_of_transformers_a_document_at_a_time(family: str, root: Path, runs: Path) -> None:
    given, texts = tuned(root, family), documents(root / "corpora" / "c", "val")
    recipe = make_recipe(given, Storage(root))
    start = build_model(recipe.spec.model, model_config(recipe.spec.model, recipe.shape, 0.0), given.seed).eval()
    _, rows = Windows(root / "corpora" / "c").order(0).locate(np.arange(recipe.global_sequences))
    first, step = metrics(runs / family)[:2]
    assert first["val_loss"] == pytest.approx(by_hand(start, texts)[0], rel=1e-5)
    assert step["loss"] == pytest.approx(by_hand(start, documents(root / "corpora" / "c", "train", rows))[0], rel=1e-5)
    last, model = last_of(runs / family), exported(runs / family)
    loss, logits = by_hand(model, texts)
    assert last["val_loss"] == pytest.approx(loss, rel=1e-5) and last["val_loss"] != pytest.approx(first["val_loss"], rel=1e-3)
    assert last["accuracy"] == pytest.approx(np.mean(logits.argmax(1) == [given[0] for _, given in texts]))
    tokenizer = AutoTokenizer.from_pretrained(runs / family / "export")
    words = " ".join(f"t{token}" for token in texts[0][0].tolist())
    assert tokenizer(words)["input_ids"] == framed(texts[0][0]).tolist()
    assert tokenizer.pad_token_id == model.config.pad_token_id == PAD and model.config.id2label == {0: "zero", 1: "one", 2: "two"}
    outcome, rows_ = observed(root, runs / family / "export")
    np.testing.assert_allclose(rows_[:, 1:], logits, atol=1e-5)
    assert outcome["loss"] == pytest.approx(last["val_loss"], rel=1e-5) and outcome["confusion"] == last["confusion"]
    for name in SCORES:
        assert outcome[name] == pytest.approx(last[name], abs=1e-9), name
    engine = TorchClassifier(runs / family / "export", threads=1, max_sequences=3)
    wanted = torch.from_numpy(logits).double().softmax(1).tolist()
    told = answer(engine, input=[tokens.tolist() for tokens, _ in texts])[1]["data"]
    for one, chances in zip(told, wanted, strict=True):
        assert list(one["probabilities"].values()) == pytest.approx(chances, abs=1e-5)
    assert answer(engine, input=words)[1]["data"][0]["probabilities"] == pytest.approx(told[0]["probabilities"], abs=1e-6)
    engine.close()


@pytest.mark.parametrize(("family", "zeros"), [("bert", (3,)), *(pytest.param(family, (0, 3), marks=pytest.mark.slow)
                                                                 for family in (*FAMILIES, *MORE))])
def test_two_workers_under_stages_0_and_3_give_one_workers_losses(family: str, zeros: tuple[int, ...], root: Path, runs: Path,
                                                                 tmp_path: Path) -> None:
    every = {tmp_path / f"zero{zero}": tuned(root, family, scale=TWO, sharding=SHARDED if zero else {"zero": 0}) for zero in zeros}
    run_ranks(every)
    if family in MORE:
        run_ranks({runs / family: tuned(root, family)})
    for run in every:
        np.testing.assert_allclose(losses(run), losses(runs / family), rtol=1e-5)
        for name in ("val_loss", *SCORES):
            assert last_of(run)[name] == pytest.approx(last_of(runs / family)[name], rel=1e-5), name


@pytest.mark.parametrize("family", ["roberta", *(pytest.param(one, marks=pytest.mark.slow) for one in ("bert", "modernbert"))])
def test_a_killed_run_goes_on_bit_equal(family: str, root: Path, runs: Path, tmp_path: Path) -> None:
    again = {tmp_path / family: tuned(root, family)}
    run_ranks(again, kill_before_step=3)
    assert not (tmp_path / family / "export").exists()
    run_ranks(again)
    assert losses(tmp_path / family) == losses(runs / family)
    ours, theirs = ((path / family / "export" / "model.safetensors").read_bytes() for path in (tmp_path, runs))
    assert ours == theirs


def test_texts_may_have_several_labels_and_dropout_is_the_checkpoints_own(root: Path, tmp_path: Path) -> None:
    given = tuned(root, "roberta", "many", regularization={})
    assert given.regularization.dropout is None
    run_ranks({tmp_path / "many": given, tmp_path / "still": tuned(root, "roberta", "many")})
    assert losses(tmp_path / "many") != losses(tmp_path / "still")
    texts, model = documents(root / "corpora" / "many", "val"), exported(tmp_path / "many")
    loss, logits = by_hand(model, texts)
    assert model.config.problem_type == "multi_label_classification"
    assert last_of(tmp_path / "many")["val_loss"] == pytest.approx(loss, rel=1e-5)
    engine = TorchClassifier(tmp_path / "many" / "export", threads=1)
    told = answer(engine, input=texts[0][0].tolist())[1]["data"][0]["probabilities"]
    assert list(told.values()) == pytest.approx(torch.from_numpy(logits[0]).sigmoid().tolist(), abs=1e-5)
    engine.close()


@pytest.mark.parametrize("family", ["bert", *(pytest.param(one, marks=pytest.mark.slow) for one in (*FAMILIES[1:], "deberta-v2"))])
def test_an_adapter_leaves_the_base_alone_trains_the_head_and_merged_is_applied(family: str, root: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    from peft import PeftModel

    run, given = tmp_path / "run", tuned(root, family, adapter={"rank": 4})
    run_ranks({run: given})
    recipe = make_recipe(given, Storage(root))
    config = model_config(recipe.spec.model, recipe.shape, 0.0)
    start = build_model(recipe.spec.model, config, given.seed)
    merged, before = exported(run), start.state_dict()
    head, after = {name for name in before if any(part in name for part in ("classifier", "pooler", "head"))}, merged.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before if "orm" in name.split(".")[-2] and name not in head)
    assert head and not any(torch.equal(before[name], after[name]) for name in head if name.endswith("weight") and "norm" not in name)
    base = AutoModelForSequenceClassification.from_pretrained(root / family, config=config)
    applied = PeftModel.from_pretrained(base, run / "export" / "adapter").eval()
    texts = documents(root / "corpora" / "c", "val")
    with torch.no_grad():
        for tokens, _ in texts[:5]:
            ours, theirs = (model(input_ids=framed(tokens)[None]).logits for model in (merged, applied))
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert by_hand(merged, texts)[0] == pytest.approx(last_of(run)["val_loss"], rel=1e-5)
    names = load_file(run / "export" / "adapter" / "adapter_model.safetensors").keys()
    trained = {f"base_model.model.{name}" for name, one in adapted(start, given).items() if one.requires_grad and "lora" not in name}
    assert trained <= names and all("lora" in name or name in trained for name in names)


def adapted(model: Any, given: TrainSpec) -> dict[str, torch.nn.Parameter]:
    assert given.adapter
    add_adapter(model, given.adapter, 0)
    return dict(model.named_parameters())


def test_an_endpoint_puts_special_tokens_around_a_text_itself(runs: Path) -> None:
    engine = TorchClassifier(runs / "bert" / "export", threads=1)
    assert engine.context == 98
    status, found = answer(engine, input=[CLS, 3, 4, SEP])
    assert status == 400 and "the special ones that the endpoint itself puts around a text" in found["error"]["message"]
    status, found = answer(engine, input=[3] * 99)
    assert status == 400 and "maximum context length is 98 tokens" in found["error"]["message"]
    engine.close()


def test_what_an_encoder_cannot_do_is_refused_before_any_work(root: Path, tmp_path: Path) -> None:
    storage, encoder, plain = Storage(root), str(root / "bert"), make_corpus(root / "corpora" / "plain")
    sees = "the checkpoint is an encoder of the bert family: it sees the tokens that it would predict"
    for work in (lambda: make_recipe(spec(plain, model={"from": encoder}), storage),
                 lambda: make_recipe(spec(make_packed_corpus(tmp_path / "said", conversations=True), objective="sft",
                                          model={"from": encoder}), storage),
                 lambda: make_recipe(spec(plain, objective="distill", distill={"teacher": encoder}), storage),
                 lambda: make_task(EvaluateSpec(name="e", model=encoder, corpus=str(plain)), storage),
                 lambda: execute.inputs(ServeSpec(name="s", model=encoder), storage),
                 lambda: plan.of_serve(ServeSpec(name="s", model=encoder), storage), lambda: explain(encoder, "t1 t2"),
                 lambda: check_generates(Path(encoder))):
        with pytest.raises(InputError, match=sees):
            work()
    with pytest.raises(SpecError, match=r"adapter\.base: only causal models are held in 4 bits, and this is an encoder"):
        make_recipe(tuned(root, "bert", adapter={"base": "nf4"}), storage)
    given = {"kind": "train", "name": "c", "corpus": "c", "model": {"from": encoder}, "objective": "classify", "duration": {"steps": 1}}
    for key in ("tensor_parallel", "sequence_parallel"):
        with pytest.raises(SpecError, match=rf"sharding\.{key}: is not proved with objective: classify; leave one of them out"):
            load_spec({**given, "precision": "fp32", "sharding": {key: 2}, "scale": TWO})
    bare = read_json(make_encoder(tmp_path / "bare") / "tokenizer.json")
    write_json(tmp_path / "bare" / "tokenizer.json", {**bare, "post_processor": None})
    with pytest.raises(InputError, match="the tokenizer of the checkpoint is not that of the corpus c"):
        make_recipe(tuned(root, "bert", model={"from": str(tmp_path / "bare")}), storage)
    served = stripped(make_encoder(tmp_path / "served", loader=AutoModelForSequenceClassification))
    for work in (lambda: TorchClassifier(served), lambda: execute.inputs(ServeSpec(name="s", model=str(served)), storage)):
        with pytest.raises(InputError, match="its tokenizer puts no special token before a text"):
            work()


def stripped(folder: Path) -> Path:
    write_json(folder / "tokenizer.json", {**read_json(folder / "tokenizer.json"), "post_processor": None})
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_attributions_of_a_text_add_up_and_are_of_the_label_that_the_encoder_gives(family: str, runs: Path) -> None:
    words = "t5 t7 t11 t13 t17"
    found = explain(str(runs / family / "export"), words, steps=128)
    with torch.no_grad():
        chances = exported(runs / family)(input_ids=framed(torch.tensor([5, 7, 11, 13, 17]))[None]).logits[0].softmax(0)
    assert found.probability == pytest.approx(chances.max().item(), rel=1e-4) and found.target == ("zero", "one", "two")[chances.argmax()]
    assert [one.text.strip() for one in found.tokens] == words.split() and abs(found.gap) < 0.01 * max(1, abs(found.added))


def test_a_plan_counts_an_encoder(root: Path) -> None:
    rows = dict(plan.of_train(tuned(root, "bert"), Storage(root)))
    assert rows["parameters"].startswith(f"{sum(one.numel() for one in built(root, 'bert').parameters()):,}")
    assert "activations" in rows["memory a worker"]


def built(root: Path, family: str) -> Any:
    recipe = make_recipe(tuned(root, family), Storage(root))
    return build_model(recipe.spec.model, model_config(recipe.spec.model, recipe.shape, 0.0), 0)
