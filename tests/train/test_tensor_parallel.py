"""A model that is divided over a group of ranks makes one worker's steps; what cannot be divided is refused at plan."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from distlm.corpus.stream import Windows
from distlm.errors import SpecError
from distlm.model.build import Shape, model_config, skeleton
from distlm.model.tensor import FAMILIES, dimension, divide
from distlm.spec import TrainSpec
from distlm.spec.load import dump, load_spec
from distlm.storage import Storage
from distlm.train.memory import make_load, own_states
from distlm.train.recipe import make_recipe
from tests.train.ranks import CONTEXT, VOCABULARY, losses, make_corpus, make_packed_corpus, metrics, run_ranks, spec
from tests.train.test_resume import check_going_on, records

TWO, FOUR = {"workers": 2}, {"workers": 4}
SHARDED = {"deepspeed": {"zero_optimization": {"stage3_param_persistence_threshold": 0}}}
CLIPPED = {"lr": 0.01, "clip": 0.3}
"""Every step's norm is above it."""
SHORT: dict[str, Any] = {"duration": {"steps": 6}, "schedule": {}, "evaluate": {"every_steps": 3}, "checkpoint": {"every_steps": 3},
                         "optimizer": CLIPPED}
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = {**SIZES, "num_key_value_heads": 2}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {**GROUPED, "attention_bias": True, "mlp_bias": True}, "mistral": {**GROUPED, "sliding_window": 8}, "qwen2": GROUPED,
    "qwen3": {**GROUPED, "head_dim": 16, "tie_word_embeddings": True}, "smollm3": GROUPED, "olmo": GROUPED, "starcoder2": GROUPED,
    "gpt_neox": SIZES}
SOME = ("llama", "qwen3", "gpt_neox")


def divided(zero: int, degree: int = 2, **more: Any) -> dict[str, Any]:
    return {"tensor_parallel": degree, "zero": zero, **(SHARDED if zero == 3 else {}), **more}


def model(family: str) -> dict[str, Any]:
    return {"config": {"model_type": family, **MODELS[family]}}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus") / "c")


@pytest.fixture(scope="module")
def one_worker(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("one")
    run_ranks({root / precision: spec(corpus, precision=precision, **SHORT) for precision in ("fp32", "bf16")})
    return root


def check_equal(run: Path, other: Path, losses_within: float = 2e-6, norms_within: float = 1e-4) -> None:
    """The losses, validation losses and norms of two runs."""
    np.testing.assert_allclose(losses(run), losses(other), rtol=losses_within, err_msg=run.name)
    for key, within in (("val_loss", losses_within), ("grad_norm", norms_within)):
        np.testing.assert_allclose(*[[record[key] for record in metrics(path) if key in record] for path in (run, other)], rtol=within,
                                   err_msg=run.name)


def exported(run: Path) -> bytes:
    return (run / "export" / "model.safetensors").read_bytes()


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "export" / "model.safetensors")


def check_export(corpus: Path, run: Path, other: Path) -> None:
    """transformers alone loads it, its loss is the trainer's, and its weights are those of the other run."""
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(run / "export")
    tokens = torch.from_numpy(Windows(corpus, "val").head(7).astype(np.int64))
    with torch.no_grad():
        logits = loaded(input_ids=tokens[:, :-1]).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).item()
    assert loss == pytest.approx(metrics(run)[-1]["val_loss"], rel=1e-5)
    ours, theirs = weights(run), weights(other)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.allclose(ours[name], theirs[name], rtol=0, atol=2e-5), name


def test_two_ranks_make_one_workers_steps_and_go_on_bit_equal(corpus: Path, one_worker: Path, tmp_path: Path) -> None:
    runs = cases(corpus, tmp_path, ("fp32-0", "bf16-1"), TWO)
    check_one_workers_steps(corpus, one_worker, runs, check_going_on)
    for run in runs:
        first, second = ((run / f"windows-{rank}.txt").read_text() for rank in (0, 1))
        assert first == second, "both read the same"
        again = first.splitlines()
        assert len(again) == 9 and again[3:6] == again[6:], "and the same when they go on"


@pytest.mark.slow
def test_two_ranks_make_one_workers_steps_under_any_stage(corpus: Path, one_worker: Path, tmp_path: Path) -> None:
    check_one_workers_steps(corpus, one_worker, cases(corpus, tmp_path, ("fp32-1", "fp32-2", "fp32-3", "bf16-2", "bf16-3"), TWO))


@pytest.mark.slow
def test_two_groups_of_two_make_one_workers_steps_and_go_on(corpus: Path, one_worker: Path, tmp_path: Path) -> None:
    runs = cases(corpus, tmp_path, ("fp32-0", "fp32-1", "fp32-2", "fp32-3", "bf16-2"), FOUR)
    check_one_workers_steps(corpus, one_worker, runs)
    for run in runs:
        files = [(run / f"windows-{rank}.txt").read_text() for rank in range(4)]
        assert files[0] == files[1] != files[2] == files[3]
    before = {run: (records(run), exported(run)) for run in runs}
    for run in runs:
        shutil.rmtree(run / "checkpoints" / "step-000006")
        shutil.rmtree(run / "export")
    run_ranks(runs)
    for run in runs:
        assert (records(run), exported(run)) == before[run], run.name


def cases(corpus: Path, root: Path, names: tuple[str, ...], scale: dict[str, int]) -> dict[Path, TrainSpec]:
    """Runs by precision and ZeRO stage."""
    return {root / name: spec(corpus, precision=name[:4], scale=scale, sharding=divided(int(name[5:])), **SHORT) for name in names}


def check_one_workers_steps(corpus: Path, one_worker: Path, runs: dict[Path, TrainSpec],
                            train: Callable[[dict[Path, TrainSpec]], object] = run_ranks) -> None:
    assert all(record["grad_norm"] > 0.3 for record in metrics(one_worker / "fp32") if "loss" in record)
    train(runs)
    for run in runs:
        if run.name.startswith("fp32"):
            check_equal(run, one_worker / "fp32")
            check_export(corpus, run, one_worker / "fp32")
        else:
            check_equal(run, one_worker / "bf16", 5e-3, 2e-2)


@pytest.mark.slow
def test_options_make_the_same_steps_and_go_on_bit_equal(tmp_path: Path) -> None:
    """Averages, mup, penalties, recomputation, marked and masked windows, dropout on what every rank has whole."""
    plain, packed = make_corpus(tmp_path / "c"), make_packed_corpus(tmp_path / "p", times=1, conversations=True)
    untied = {"config": {"model_type": "llama", **GROUPED, "tie_word_embeddings": False}, "mup": {"base_width": 16}}
    options: dict[str, dict[str, Any]] = {
        "3-mup": {"optimizer": {"name": "lion", "lr": 0.001}, "model": untied, "ema": {"decay": 0.9}},
        "0-average": {"optimizer": {"name": "sgd", "lr": 0.1}, "checkpoint": {"every_steps": 3, "average": 2},
                      "regularization": {"label_smoothing": 0.1, "z_loss": 1e-4}, "activation_checkpointing": 1},
        "2-masked": {"objective": "sft", "ema": {"decay": 0.9}},
        "1-dropout": {"model": model("gpt_neox"), "regularization": {"dropout": 0.2}}}
    corpora = {name: packed if "objective" in one else plain for name, one in options.items()}
    check_going_on({tmp_path / name: spec(corpora[name], scale=TWO, sharding=divided(int(name[0])), **{**SHORT, **one})
                    for name, one in options.items()})
    alike = {name: one for name, one in options.items() if name != "1-dropout"}
    run_ranks({tmp_path / "one" / name: spec(corpora[name], **{**SHORT, **one}) for name, one in alike.items()})
    for name in alike:
        check_equal(tmp_path / name, tmp_path / "one" / name, 5e-6)
    states = [torch.load(tmp_path / "1-dropout" / "checkpoints" / "step-000006" / "state" / f"mp_rank_0{rank}_model_states.pt",
                         weights_only=False)["module"] for rank in (0, 1)]
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]) == (dimension(name) is None), name


@pytest.mark.slow
def test_fp16_keeps_its_scale_and_skips_alike(corpus: Path, tmp_path: Path) -> None:
    for workers, sharding in ((1, {"zero": 1}), (2, divided(1))):
        run_ranks({tmp_path / f"{power}-{workers}": spec(corpus, precision="fp16", optimizer=CLIPPED, loss_scale={"initial_power": power},
                                                         scale={"workers": workers, "gpus_per_worker": 1}, sharding=sharding)
                   for power in (8, 21)})
    for power in (8, 21):
        check_equal(tmp_path / f"{power}-2", tmp_path / f"{power}-1", 5e-3, 2e-2)
        skipped, scales = ([[record.get(key) for record in metrics(tmp_path / f"{power}-{workers}")] for workers in (1, 2)]
                           for key in ("skipped", "loss_scale"))
        assert skipped[0] == skipped[1] and any(skipped[0]) == (power == 21) and scales[0] == scales[1]


def check_families(run: Callable[[str, dict[str, Any]], TrainSpec], families: tuple[str, ...], folder: Path, workers: int) -> None:
    """Gradients and steps of each family are one worker's. `run`: the spec of a family, with more keys, for so many workers and for one.

    AdamW's first step with an epsilon far above the gradient moves a weight by a hundred times its gradient."""
    first = {"duration": {"steps": 1}, "schedule": {"name": "constant"}, "evaluate": {}, "checkpoint": {},
             "optimizer": {"lr": 1e6, "eps": 1e4, "weight_decay": 0, "clip": 0}}
    some = {"duration": {"steps": 5}, "schedule": {}, "optimizer": CLIPPED}
    for count in (1, workers):
        alone = {"scale": {"workers": 1}, "sharding": {}} if count == 1 else {}
        run_ranks({folder / f"{name}-{kind}-{count}": run(name, {**keys, **alone})
                   for name in families for kind, keys in (("first", first), ("some", some))})
    for name in families:
        check_equal(folder / f"{name}-some-{workers}", folder / f"{name}-some-1")
        ours, theirs = weights(folder / f"{name}-first-{workers}"), weights(folder / f"{name}-first-1")
        assert ours.keys() == theirs.keys() and any(dimension(key) == 0 for key in ours) and any(dimension(key) == 1 for key in ours), name
        for key, value in ours.items():
            assert torch.allclose(value, theirs[key], rtol=1e-5, atol=1e-5), (name, key)


@pytest.mark.parametrize("families", [SOME, pytest.param(tuple(sorted({*FAMILIES} - {*SOME})), marks=pytest.mark.slow)])
def test_every_family_has_one_workers_gradients_and_steps(corpus: Path, tmp_path: Path, families: tuple[str, ...]) -> None:
    check_families(lambda name, keys: spec(corpus, **{"model": model(name), "scale": {"workers": 2}, "sharding": divided(1), **keys}),
                   families, tmp_path, 2)


@pytest.mark.slow
@pytest.mark.parametrize("gradient", [True, False])
def test_what_is_not_finite_is_found_with_its_samples(corpus: Path, tmp_path: Path, gradient: bool) -> None:
    """On four ranks, the window that the second group reads last in its fourth step; all ranks end alike, before the update."""
    given = spec(corpus, scale=FOUR, sharding=divided(1), model=model("qwen3"))
    sample = 3 * 12 + 10
    row = Windows(corpus).read(*Windows(corpus).order(0).locate(np.asarray([sample])))[0]
    window = int(row[0]) * VOCABULARY + int(row[1])
    output = run_ranks({tmp_path / "run": given}, poison={"window": window, "module": "model.layers.1.mlp", "gradient": gradient})
    ends = re.findall(r"rank (\d) ended: (.*) \[(.*)\], weights (\w+)", output)
    assert [(rank, cause, kept) for rank, _, cause, kept in ends] == [(rank, "nonfinite_loss", "kept") for rank in "0123"], output[-3000:]
    assert len({error for _, error, *_ in ends}) == 1
    assert re.match(r".* at step 4 on rank 2, first in .*model\.layers\.1\.mlp.*, samples 46 to 47", ends[0][1]), ends[0][1]


@pytest.mark.parametrize(("sections", "message"), [
    ({"scale": {"workers": 3}}, "sharding.tensor_parallel: 2 does not divide 3 workers; try 1, 3"),
    ({"precision": "bf16"}, "sharding.zero: 0 cannot be with bf16 and tensor_parallel: 2"),
    ({"optimizer": {"name": "muon"}}, "optimizer.name: muon needs whole matrices"),
    ({"optimizer": {"name": "adafactor"}}, "optimizer.name: adafactor needs whole matrices"),
    ({"compile": True}, "compile: "),
    ({"sharding": divided(1, offload={"optimizer": "cpu"})}, "sharding.offload: "),
    ({"sharding": {"tensor_parallel": 2, "deepspeed": {"tensor_parallel": {"autotp_size": 2}}}},
     "sharding.deepspeed.tensor_parallel: contradicts sharding.tensor_parallel"),
    ({"scale": FOUR, "batch": {"global_sequences": 3}}, "batch.global_sequences: 3 sequences cannot be divided over 2 ")])
def test_what_cannot_be_is_refused_by_key(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError) as error:
        load_spec({**dump(spec(Path("c"), scale=TWO, sharding=divided(0))), **sections})
    assert message in str(error.value)


@pytest.mark.parametrize(("config", "message"), [
    ({"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4}, "is not known to divide the gpt2 family rightly"),
    ({"model_type": "olmo2", **GROUPED}, "is not known to divide the olmo2 family rightly"),
    ({"model_type": "llama", **SIZES, "num_key_value_heads": 1}, "2 does not divide the model's 1 key-value heads"),
    ({"model_type": "llama", **GROUPED, "intermediate_size": 63}, "2 does not divide the model's 63 units of a feed-forward layer; try 1"),
    ({"model_type": "gpt_neox", **SIZES, "hidden_size": 33, "num_attention_heads": 3}, "2 does not divide the model's 3 attention heads")])
def test_what_cannot_be_divided_is_refused_at_plan(corpus: Path, config: dict[str, Any], message: str) -> None:
    given = spec(corpus, scale=TWO, sharding=divided(0), model={"config": config})
    with pytest.raises(SpecError) as error:
        make_recipe(given, Storage(corpus.parent))
    assert message in str(error.value) and error.value.where == "sharding.tensor_parallel"


@pytest.mark.parametrize("family", FAMILIES)
def test_plan_counts_what_a_rank_holds(family: str) -> None:
    shape = Shape(VOCABULARY, CONTEXT, 0)
    loads = {}
    for degree in (1, 2):
        given = spec(Path("c"), scale={"workers": degree}, sharding=divided(0, degree), model=model(family))
        loads[degree] = make_load(given, model_config(given.model, shape), shape, sum(parameters(family).values()), 2, 3)
    whole = parameters(family)
    cut = sum(size for name, size in whole.items() if dimension(name) is not None)
    assert loads[2].parameters == sum(whole.values()) - cut // 2 and cut > sum(whole.values()) / 2
    one, two = loads[1].activations, loads[2].activations
    assert one.inputs == two.inputs and one.outside == two.outside and one.inputs < two.layers[0] < 0.8 * one.layers[0]
    assert sum(own_states(loads[2]).values()) == 16 * loads[2].parameters


def parameters(family: str) -> dict[str, int]:
    config = model_config(spec(Path("c"), model=model(family)).model, Shape(VOCABULARY, CONTEXT, 0))
    whole = {name: one.numel() for name, one in skeleton(config).named_parameters()}
    parts = dict(divide(skeleton(config), 2).named_parameters())
    assert {name: one.numel() for name, one in parts.items()} == {
        name: size // (1 if dimension(name) is None else 2) for name, size in whole.items()}
    return whole


def test_a_group_reads_the_same_samples_and_all_groups_the_batch(corpus: Path) -> None:
    plan = make_recipe(spec(corpus, scale=FOUR, sharding=divided(1)), Storage(corpus.parent)).plan()
    assert plan.share(0) == 6
    assert [plan.samples(1, rank).tolist() for rank in range(4)] == [[*range(12, 18)]] * 2 + [[*range(18, 24)]] * 2
