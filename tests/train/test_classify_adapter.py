"""Classifiers by an adapter: the base stands still, the last layer is trained whole, and both are exported, merged and alone."""

import importlib.util
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from distlm import plan
from distlm.corpus.stream import Windows
from distlm.errors import InputError, SpecError
from distlm.model.adapter import adapter_sizes, add_adapter
from distlm.model.adapter_folder import AdapterFolder
from distlm.model.build import build_model, model_config, parameter_sizes
from distlm.model.export import export_model
from distlm.serve.classifier import TorchClassifier
from distlm.spec import TrainSpec
from distlm.storage import Storage, read_json
from distlm.train.memory import make_load
from distlm.train.recipe import make_recipe
from distlm.train.schedule import learning_rate
from tests.serve.test_classify import answer
from tests.train.ranks import losses, make_labelled_corpus, metrics, run_ranks, spec
from tests.train.test_classify import by_hand, documents, exported

SHARDED = {"zero": 3, "deepspeed": {"zero_optimization": {"stage3_param_persistence_threshold": 0}}}
TWO = {"workers": 2}
ADAPTER = "export/adapter/adapter_model.safetensors"
HEAD = "base_model.model.score.weight"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus with labels, one with several of a document, and a language model."""
    root = tmp_path_factory.mktemp("classify-adapter")
    corpus = make_labelled_corpus(root / "c")
    make_labelled_corpus(root / "many", multiple=True)
    given = spec(corpus)
    model = build_model(given.model, model_config(given.model, make_recipe(given, Storage(root)).shape), 3)
    export_model(model, None, corpus / "tokenizer", root / "base", {})
    return root


def tuned(root: Path, base: str = "base", corpus: str = "c", adapter: dict[str, Any] | None = None, **sections: Any) -> TrainSpec:
    return spec(root / corpus, model={"from": str(root / base)}, adapter={"rank": 4, **(adapter or {})}, objective="classify",
                **{"duration": {"steps": 8}, "evaluate": {"every_steps": 4}, "checkpoint": {"every_steps": 4}, **sections})


def losses_alone(given: TrainSpec, corpus: Path) -> list[float]:
    """The losses of plain PyTorch, a document at a time by transformers' own loss; clipped to 1, AdamW, the schedule's rate."""
    recipe = make_recipe(given, Storage(corpus.parent))
    model = build_model(given.model, model_config(given.model, recipe.shape), given.seed)
    assert given.adapter
    add_adapter(model, given.adapter, given.seed)
    trained = [one for one in model.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(trained, betas=(0.9, 0.95), weight_decay=0.1)
    order, plan_, found = Windows(corpus).order(0), recipe.plan(), []
    for step in range(recipe.num_steps):
        samples = np.concatenate([plan_.samples(step, rank) for rank in range(plan_.world)])
        texts = documents(corpus, "train", order.locate(samples)[1])
        outputs = [model(input_ids=tokens[None], labels=torch.tensor(labels)) for tokens, labels in texts]
        loss = torch.stack([one.loss for one in outputs]).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(given.schedule, 0.01, step, recipe.num_steps)
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


@pytest.mark.parametrize("zeros", [(0, 3), pytest.param((0, 1, 2), marks=pytest.mark.slow)])
def test_every_stage_trains_the_same_adapter_and_last_layer_and_leaves_the_base_alone(zeros: tuple[int, ...], root: Path,
                                                                                    tmp_path: Path) -> None:
    runs = {tmp_path / f"zero{zero}": tuned(root, scale=TWO, sharding=SHARDED if zero == 3 else {"zero": zero}) for zero in zeros}
    printed = run_ranks(runs, watch=True)
    expected, base, first = losses_alone(tuned(root), root / "c"), load_file(root / "base" / "model.safetensors"), load_file(
        tmp_path / "zero0" / ADAPTER)
    for run in runs:
        np.testing.assert_allclose(losses(run), expected, rtol=1e-5, err_msg=run.name)
        found, merged = load_file(run / ADAPTER), load_file(run / "export" / "model.safetensors")
        assert found.keys() == first.keys() and all(torch.allclose(found[name], first[name], atol=1e-5) for name in first), run.name
        assert merged.keys() == {*base, "score.weight"} - {"lm_head.weight"} and torch.equal(merged["score.weight"], found[HEAD])
        for name in merged.keys() & base.keys():
            a, b = (found.get(f"base_model.model.{name.removesuffix('.weight')}.lora_{part}.weight") for part in "AB")
            if a is None or b is None:
                assert torch.equal(merged[name], base[name]), name
            else:
                assert torch.allclose(merged[name], base[name] + 8 * b @ a, atol=1e-6) and not torch.equal(merged[name], base[name]), name
        if run.name != "zero3":                            # which divides the base
            assert printed.count(f"{run.name}: loaded ['torch.float32'] held ['torch.float32'] kept") == 2
    size = sum(value.numel() for value in first.values())
    assert f"zero0: loaded ['torch.float32'] held ['torch.float32'] kept, {size} in the optimizer" in printed, "the base is not in it"


@pytest.mark.parametrize(("method", "corpus"), [("lora", "c"), ("dora", "many")])
def test_the_exported_adapter_on_its_base_is_the_classifier_that_is_evaluated_and_served(root: Path, tmp_path: Path, method: str,
                                                                                         corpus: str) -> None:
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    run = tmp_path / method
    run_ranks({run: tuned(root, corpus=corpus, adapter={"method": method, "alpha": 64}, precision="fp32")})
    plain = AutoModelForSequenceClassification.from_pretrained(root / "base", num_labels=3, pad_token_id=0)
    applied, merged = PeftModel.from_pretrained(plain, run / "export" / "adapter").eval(), exported(run)
    texts = documents(root / corpus, "val")
    loss, logits = by_hand(merged, texts)
    for (tokens, _), ours in zip(texts, logits, strict=True):
        assert torch.allclose(applied(input_ids=tokens[None]).logits[0], torch.from_numpy(ours), atol=1e-5)
    last = [record for record in metrics(run) if "val_loss" in record][-1]
    assert loss == pytest.approx(last["val_loss"], rel=1e-5)
    told = read_json(run / "export" / "adapter" / "adapter_config.json")
    assert (told["task_type"], told["modules_to_save"]) == ("SEQ_CLS", ["score"])
    engine = TorchClassifier(run / "export", threads=1)
    status, served = answer(engine, input="t5")
    engine.close()
    wanted = applied(input_ids=torch.tensor([[5]])).logits[0].detach()
    chances = dict(zip(("zero", "one", "two"), (wanted.sigmoid() if corpus == "many" else wanted.softmax(0)).tolist(), strict=True))
    assert status == 200 and served["data"][0]["probabilities"] == pytest.approx(chances, abs=1e-5)


CASES: dict[str, Any] = {"fp32-3": {"sharding": SHARDED, "adapter": {"dropout": 0.1}},
                         "bf16-2": {"precision": "bf16", "sharding": {"zero": 2}, "ema": {"decay": 0.9}}}


@pytest.mark.parametrize("name", ["fp32-3", pytest.param("bf16-2", marks=pytest.mark.slow)])
def test_a_run_goes_on_bit_equal(name: str, root: Path, tmp_path: Path) -> None:
    runs = {tmp_path / name: tuned(root, scale=TWO, **CASES[name])}
    run_ranks(runs)
    before = {run: (losses(run), *((run / file).read_bytes() for file in ("export/model.safetensors", ADAPTER))) for run in runs}
    for run in runs:
        sizes = sum(file.stat().st_size for file in (run / "checkpoints" / "step-000008" / "state").iterdir())
        assert sizes < (root / "base" / "model.safetensors").stat().st_size * 2, "the base is no part of a checkpoint"
        shutil.rmtree(run / "checkpoints" / "step-000008")
        shutil.rmtree(run / "export")
    run_ranks(runs)
    for run, (steps, *files) in before.items():
        assert losses(run) == steps and [(run / file).read_bytes() for file in ("export/model.safetensors", ADAPTER)] == files, run.name


def test_a_merged_classifier_has_the_precision_of_its_bases_files(root: Path, tmp_path: Path) -> None:
    given = spec(root / "c")
    half = build_model(given.model, model_config(given.model, make_recipe(spec(root / "c"), Storage(root)).shape), 3, torch.bfloat16)
    export_model(half, None, root / "c" / "tokenizer", tmp_path / "half", {})
    run_ranks({tmp_path / "run": tuned(root, str(tmp_path / "half"), precision="bf16", ema={"decay": 0.9})})
    merged, alone = load_file(tmp_path / "run" / "export" / "model.safetensors"), load_file(tmp_path / "run" / ADAPTER)
    assert {value.dtype for value in merged.values()} == {torch.bfloat16} and alone[HEAD].dtype == torch.float32
    assert torch.equal(merged["score.weight"], alone[HEAD].bfloat16())


def test_a_classifier_is_tuned_further_from_its_own_last_layer(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "base", tmp_path / "runs" / "base")
    run_ranks({tmp_path / "runs" / "first": tuned(root, duration={"steps": 2}, schedule={}, evaluate={}, checkpoint={})})
    further = make_recipe(tuned(root, str(tmp_path / "runs" / "first")), Storage(tmp_path))
    model = build_model(further.spec.model, model_config(further.spec.model, further.shape), 5)
    assert further.spec.adapter
    add_adapter(model, further.spec.adapter, 5)
    assert torch.equal(model.get_parameter("score.weight"), exported(tmp_path / "runs" / "first").score.weight)
    assert model.get_parameter("score.weight").requires_grad


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
def test_the_last_layer_is_whole_over_a_base_in_nf4(root: Path, tmp_path: Path) -> None:
    runs = {tmp_path / f"zero{zero}": tuned(root, adapter={"base": "nf4"}, scale=TWO, sharding={"zero": zero}) for zero in (0, 2)}
    run_ranks(runs)
    np.testing.assert_allclose(losses(tmp_path / "zero2"), losses(tmp_path / "zero0"), rtol=1e-5)
    ours = make_recipe(tuned(root, adapter={"base": "nf4"}), Storage(root))
    config = model_config(ours.spec.model, ours.shape)
    load = make_load(ours.spec, config, ours.shape, ours.parameters, 2, 1)
    assert load.nf4 == 2 * (32 * 32 + 16 * 32 + 16 * 32 + 32 * 32 + 3 * 32 * 64), "and is not counted so"
    merged, alone = load_file(tmp_path / "zero0" / "export" / "model.safetensors"), load_file(tmp_path / "zero0" / ADAPTER)
    assert torch.equal(merged["score.weight"], alone[HEAD])


def test_plan_counts_the_last_layer_once(root: Path) -> None:
    recipe = make_recipe(tuned(root), Storage(root))
    config = model_config(recipe.spec.model, recipe.shape)
    sizes = parameter_sizes(config)
    assert recipe.spec.adapter
    trained = adapter_sizes(config, recipe.spec.adapter)
    added = sum(trained.values()) - sizes["score.weight"]
    assert trained["score.weight"] == 3 * 32 and recipe.parameters == sum(sizes.values()) + added
    assert make_load(recipe.spec, config, recipe.shape, recipe.parameters, 2, 1).frozen == sum(sizes.values()) - 3 * 32
    rows = dict(plan.of_model(recipe.spec, recipe.shape, None))
    assert rows["parameters"] == f"{recipe.parameters:,}, {added + 3 * 32:,} of them trained"
    multiplied = sum(sizes.values()) - sizes["model.embed_tokens.weight"]      # a classifier has no last layer that they could be tied to
    assert recipe.flops_per_token == pytest.approx(4 * (multiplied - 96) + 6 * (added + 96) + 6 * 2 * 16 * 32)


def test_what_cannot_be_is_told(root: Path, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"adapter.target_modules: the last layer of a classifier, score, is trained whole; name other"):
        make_recipe(tuned(root, adapter={"target_modules": ["q_proj", "score"]}), Storage(root))
    run_ranks({tmp_path / "run": tuned(root, adapter={"rank": 1}, duration={"steps": 1}, evaluate={}, checkpoint={}, schedule={})})
    with pytest.raises(InputError, match="modules_to_save: score would be whole layers of its own; serve the model that it makes, merged"):
        AdapterFolder.read(tmp_path / "run" / "export" / "adapter")
