"""Sequences that are divided over a group of ranks make one worker's steps; what cannot be divided is refused at plan."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from distlm.errors import SpecError
from distlm.model.build import Shape, model_config
from distlm.model.sequence import FAMILIES, document_mask
from distlm.spec import TrainSpec
from distlm.spec.load import dump, load_spec
from distlm.storage import Storage
from distlm.train.batch import TokenBatch
from distlm.train.memory import make_load, own_states, peak_memory
from distlm.train.recipe import make_recipe
from tests.train.ranks import CONTEXT, VOCABULARY, losses, make_corpus, make_packed_corpus, metrics, run_ranks, spec
from tests.train.test_resume import check_going_on, records
from tests.train.test_tensor_parallel import CLIPPED, GROUPED, MODELS, SHORT, check_equal, check_export, weights

TWO, FOUR = {"workers": 2}, {"workers": 4}
SHARDED = {"deepspeed": {"zero_optimization": {"stage3_param_persistence_threshold": 0}}}
GROUPED_CONFIGS: dict[str, dict[str, Any]] = {**MODELS, "mistral": GROUPED, "olmo2": GROUPED, "phi3": {**GROUPED, "pad_token_id": 0},
                                              "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4}}
SOME = ("llama", "gpt2")


def divided(zero: int, degree: int = 2, **more: Any) -> dict[str, Any]:
    return {"sequence_parallel": degree, "zero": zero, **(SHARDED if zero == 3 else {}), **more}


def cases(corpus: Path, root: Path, names: tuple[str, ...], scale: dict[str, int], degree: int = 2) -> dict[Path, TrainSpec]:
    """Runs by precision and ZeRO stage."""
    return {root / name: spec(corpus, precision=name[:4], scale=scale, sharding=divided(int(name[5:]), degree), **SHORT) for name in names}


def check_one_workers_steps(corpus: Path, one_worker: Path, runs: dict[Path, TrainSpec],
                            train: Callable[[dict[Path, TrainSpec]], object] = run_ranks) -> None:
    train(runs)
    for run in runs:
        if run.name.startswith("fp32"):
            check_equal(run, one_worker / "fp32")
            check_export(corpus, run, one_worker / "fp32")
        else:
            check_equal(run, one_worker / "bf16", 5e-3, 2e-2)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus") / "c")


@pytest.fixture(scope="module")
def one_worker(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("one")
    run_ranks({root / precision: spec(corpus, precision=precision, **SHORT) for precision in ("fp32", "bf16")})
    assert all(record["grad_norm"] > 0.3 for record in metrics(root / "fp32") if "loss" in record)
    return root


def test_two_ranks_make_one_workers_steps_and_go_on_bit_equal(corpus: Path, one_worker: Path, tmp_path: Path) -> None:
    runs = cases(corpus, tmp_path, ("fp32-0", "bf16-2"), TWO)
    check_one_workers_steps(corpus, one_worker, runs, check_going_on)
    for run in runs:
        first, second = ((run / f"windows-{rank}.txt").read_text() for rank in (0, 1))
        assert first == second, "both read the same"


@pytest.mark.slow
def test_four_ranks_make_one_workers_steps_under_any_stage_and_change_their_groups(corpus: Path, one_worker: Path, tmp_path: Path) -> None:
    """Weights and states lie as without it: a run that is resumed may divide its sequences in another way, or not at all."""
    runs = cases(corpus, tmp_path, ("fp32-0", "fp32-1", "fp32-2", "fp32-3", "bf16-1", "bf16-3"), FOUR)
    check_one_workers_steps(corpus, one_worker, runs)
    before = {run: records(run) for run in runs}
    for run in runs:
        shutil.rmtree(run / "checkpoints" / "step-000006")
        shutil.rmtree(run / "export")
    run_ranks(runs)
    assert {run: records(run) for run in runs} == before
    run = tmp_path / "fp32-2"
    shutil.rmtree(run / "checkpoints" / "step-000006")
    shutil.rmtree(run / "export")
    run_ranks({run: spec(corpus, sharding={"zero": 2}, scale=TWO, **SHORT)})
    check_equal(run, one_worker / "fp32")


@pytest.mark.slow
def test_what_is_offloaded_makes_one_workers_steps(corpus: Path, one_worker: Path, tmp_path: Path) -> None:
    optimizer = {"optimizer": "cpu"}
    offloads = {"fp32-1": optimizer, "fp32-2": optimizer, "fp32-3": {**optimizer, "parameters": "cpu"}, "bf16-2": optimizer}
    check_one_workers_steps(corpus, one_worker, {
        tmp_path / name: spec(corpus, precision=name[:4], scale=TWO, sharding=divided(int(name[5:]), offload=offload), **SHORT)
        for name, offload in offloads.items()})


@pytest.mark.slow
def test_options_make_the_same_steps_and_go_on_bit_equal(tmp_path: Path) -> None:
    """Conversations of which not all tokens give loss, averages, Muon, recomputation, penalties, dropout."""
    plain, packed = make_corpus(tmp_path / "c"), make_packed_corpus(tmp_path / "p", times=1, conversations=True)
    whole = {"global_sequences": 12, "micro_sequences": 2, "mask_documents": False}
    options: dict[str, dict[str, Any]] = {
        "3-sft": {"objective": "sft", "batch": whole, "ema": {"decay": 0.9}},
        "0-muon": {"optimizer": {"name": "muon", "lr": 0.01}, "checkpoint": {"every_steps": 3, "average": 2}},
        "1-recomputed": {"regularization": {"label_smoothing": 0.1, "z_loss": 1e-4}, "activation_checkpointing": 1},
        "2-dropout": {"model": {"config": {"model_type": "gpt2", **GROUPED_CONFIGS["gpt2"]}}, "regularization": {"dropout": 0.1}}}
    corpora = {name: packed if "objective" in one else plain for name, one in options.items()}
    check_going_on({tmp_path / name: spec(corpora[name], scale=TWO, sharding=divided(int(name[0])), **{**SHORT, **one})
                    for name, one in options.items()})
    alike = {name: one for name, one in options.items() if name != "2-dropout"}
    run_ranks({tmp_path / "one" / name: spec(corpora[name], **{**SHORT, **one}) for name, one in alike.items()})
    for name in alike:
        check_equal(tmp_path / name, tmp_path / "one" / name, 5e-3 if "muon" in name else 5e-6, 2e-2 if "muon" in name else 1e-4)


@pytest.mark.parametrize("name", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_attention_keeps_to_documents_that_lie_over_several_ranks(tmp_path: Path, name: str) -> None:
    """Packed conversations: documents that begin on one rank and end on another, padding, answers alone give loss."""
    packed = make_packed_corpus(tmp_path / "p", conversations=True)
    short = {**SHORT, "objective": "sft"}
    model = {"config": {"model_type": name, **GROUPED_CONFIGS[name]}}
    over = spec(packed, model=model, batch={"global_sequences": 12, "micro_sequences": 2, "mask_documents": False}, **short)
    run_ranks({tmp_path / "one": spec(packed, model=model, **short), tmp_path / "over": over})
    run_ranks({tmp_path / "two": spec(packed, model=model, scale=TWO, sharding=divided(0 if name == "gpt2" else 3),
                                      activation_checkpointing=int(name == "llama"), **short)})
    assert not np.allclose(losses(tmp_path / "over"), losses(tmp_path / "one"), rtol=1e-4), "documents matter in this corpus"
    check_equal(tmp_path / "two", tmp_path / "one")


@pytest.mark.parametrize("families", [SOME, pytest.param(tuple(sorted({*FAMILIES} - {*SOME})), marks=pytest.mark.slow)])
def test_every_family_has_one_workers_gradients_and_steps(corpus: Path, tmp_path: Path, families: tuple[str, ...]) -> None:
    """AdamW's first step with an epsilon far above the gradient moves a weight by a hundred times its gradient."""
    first = {"duration": {"steps": 1}, "schedule": {"name": "constant"}, "evaluate": {}, "checkpoint": {},
             "optimizer": {"lr": 1e6, "eps": 1e4, "weight_decay": 0, "clip": 0}}
    some = {"duration": {"steps": 5}, "schedule": {}, "optimizer": CLIPPED}
    for workers, sharding in ((1, {}), (2, divided(1))):
        run_ranks({tmp_path / f"{name}-{kind}-{workers}": spec(corpus, model={"config": {"model_type": name, **GROUPED_CONFIGS[name]}},
                                                               scale={"workers": workers}, sharding=sharding, **keys)
                   for name in families for kind, keys in (("first", first), ("some", some))})
    for name in families:
        check_equal(tmp_path / f"{name}-some-2", tmp_path / f"{name}-some-1")
        ours, theirs = weights(tmp_path / f"{name}-first-2"), load_file(tmp_path / f"{name}-first-1" / "export" / "model.safetensors")
        assert ours.keys() == theirs.keys() and losses(tmp_path / f"{name}-some-2")
        for key, value in ours.items():
            assert torch.allclose(value, theirs[key], rtol=1e-5, atol=1e-5), (name, key)


@pytest.mark.parametrize(("sections", "message"), [
    ({"scale": {"workers": 3}}, "sharding.sequence_parallel: 2 does not divide 3 workers; try 1, 3"),
    ({"compile": True}, "compile: is not proved to make the same steps with sequence_parallel: 2"),
    ({"sharding": divided(0, deepspeed={"sequence_parallel_size": 2})}, "sequence_parallel_size: contradicts sharding.sequence_parallel")])
def test_what_cannot_be_is_refused_by_key(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError) as error:
        load_spec({**dump(spec(Path("c"), scale=TWO, sharding=divided(0))), **sections})
    assert message in str(error.value)


@pytest.mark.parametrize(("sections", "message"), [
    ({"model": {"config": {"model_type": "falcon", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}}},
     "it is not known whether the falcon family"),
    ({"model": {"config": {"model_type": "llama", **GROUPED, "num_key_value_heads": 1}}}, "2 does not divide the 1 key-value heads"),
    ({"model": {"config": {"model_type": "mistral", **GROUPED, "sliding_window": 8}}}, "a sliding window of 8 tokens is not kept"),
    ({"model": {"config": {"model_type": "llama", **GROUPED, "attn_implementation": "eager"}}}, "eager attention is not known"),
    ({"scale": {"workers": 3}, "sharding": divided(0, 3)}, "3 does not divide the 16 tokens of context; try 1, 2, 4, 8, 16")])
def test_what_cannot_be_divided_is_refused_at_plan(corpus: Path, sections: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError) as error:
        make_recipe(spec(corpus, **{"scale": TWO, "sharding": divided(0), **sections}), Storage(corpus.parent))
    assert message in str(error.value) and error.value.where == "sharding.sequence_parallel"


def test_the_parts_of_a_batch_are_all_its_predictions_once() -> None:
    whole = TokenBatch(torch.arange(2 * (CONTEXT + 1)).reshape(2, -1))
    parts = [whole.part(i, 4) for i in range(4)]
    assert torch.equal(torch.cat([part.tokens[:, 1:] for part in parts], 1), whole.tokens[:, 1:])
    assert all(part.targets is not None and torch.equal(part.targets, part.tokens[:, 1:]) for part in parts)
    assert [part.positions[1].tolist() for part in parts if part.positions is not None] == np.arange(CONTEXT).reshape(4, -1).tolist()
    assert whole.part(0, 1) is whole
    placed = TokenBatch(whole.tokens, positions=torch.arange(CONTEXT).remainder(5).expand(2, -1))
    assert torch.cat([part.positions for part in (placed.part(i, 4) for i in range(4)) if part.positions is not None], 1).equal(
        placed.positions)


def test_plan_counts_the_activations_of_a_part() -> None:
    shape, config = Shape(VOCABULARY, CONTEXT, 0), spec(Path("c")).model
    one, two = (make_load(spec(Path("c"), scale={"workers": degree}, sharding=divided(0, degree)), model_config(config, shape), shape,
                          1000, 2, 3) for degree in (1, 2))
    assert two.activations.layers[0] * 2 == one.activations.layers[0] and two.context * 2 == one.context
    assert own_states(one) == own_states(two)


@pytest.mark.parametrize("gpus", [0, 1])
def test_plan_counts_the_mask_of_whole_sequences_on_each_rank(gpus: int) -> None:
    """It stays until the next one is made."""
    shape, config = Shape(VOCABULARY, CONTEXT, 0), spec(Path("c")).model
    made = document_mask(torch.zeros(1, CONTEXT, dtype=torch.int64)).untyped_storage().nbytes()
    for degree in (1, 2):
        given = spec(Path("c"), scale={"workers": degree, "gpus_per_worker": gpus}, sharding=divided(0, degree))
        plain, masked = (make_load(given, model_config(config, shape), shape, 1000, 2, 3, wanted) for wanted in (False, True))
        assert masked.activations.mask == made == masked.activations.outside - plain.activations.outside
        assert masked.activations.layers[0] - plain.activations.layers[0] == 4 * made * gpus
    sending = [peak_memory(replace(one, parameters=10**8)).activations for one in (plain, masked)]       # the most is held then
    assert sending == [0, 2 * made]
