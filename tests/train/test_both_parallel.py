"""A model and its sequences that are both divided over a group of four ranks make one worker's steps; what cannot be is refused at plan."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from distlm.errors import SpecError
from distlm.model.build import Shape, model_config
from distlm.model.tensor import FAMILIES
from distlm.spec.load import dump, load_spec
from distlm.storage import Storage
from distlm.train.memory import make_load, own_states
from distlm.train.recipe import make_recipe
from tests.train.ranks import CONTEXT, VOCABULARY, make_corpus, make_packed_corpus, metrics, run_ranks, spec
from tests.train.test_resume import check_going_on, records
from tests.train.test_sequence_parallel import SHARDED
from tests.train.test_tensor_parallel import MODELS, SHORT, check_equal, check_export, check_families, exported

FOUR = {"workers": 4}
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4}
"""Each rank has one key-value head in attention."""
SOME = ("llama", "qwen3")


def divided(zero: int, tensor: int = 2, sequence: int = 2, **more: Any) -> dict[str, Any]:
    return {"tensor_parallel": tensor, "sequence_parallel": sequence, "zero": zero, **(SHARDED if zero == 3 else {}), **more}


def model(family: str) -> dict[str, Any]:
    heads = {"num_attention_heads": 4} if family == "gpt_neox" else HEADS
    return {"config": {"model_type": family, **MODELS[family], **heads, **({"sliding_window": None} if family == "mistral" else {})}}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus") / "c")


@pytest.fixture(scope="module")
def one_worker(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("one")
    run_ranks({root / precision: spec(corpus, model=model("llama"), precision=precision, **SHORT) for precision in ("fp32", "bf16")})
    assert all(record["grad_norm"] > 0.3 for record in metrics(root / "fp32") if "loss" in record)
    return root


@pytest.mark.parametrize("names", [("fp32-3",), pytest.param(("fp32-0", "fp32-1", "fp32-2", "bf16-1", "bf16-2", "bf16-3"),
                                                             marks=pytest.mark.slow)])
def test_four_ranks_make_one_workers_steps_and_go_on_bit_equal(corpus: Path, one_worker: Path, tmp_path: Path,
                                                               names: tuple[str, ...]) -> None:
    runs = {tmp_path / name: spec(corpus, model=model("llama"), precision=name[:4], scale=FOUR, sharding=divided(int(name[5:])), **SHORT)
            for name in names}
    check_going_on(runs)
    for run in runs:
        if run.name.startswith("fp32"):
            check_equal(run, one_worker / "fp32")
            check_export(corpus, run, one_worker / "fp32")
        else:
            check_equal(run, one_worker / "bf16", 5e-3, 2e-2)
        files = {(run / f"windows-{rank}.txt").read_text() for rank in range(4)}
        assert len(files) == 1, "all four read the same"


@pytest.mark.slow
def test_a_run_goes_on_with_whole_sequences_and_the_same_parts_of_the_model(corpus: Path, one_worker: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for sharding in (divided(2), divided(2, sequence=1)):
        run_ranks({run: spec(corpus, model=model("llama"), scale=FOUR, sharding=sharding, **SHORT)})
        check_equal(run, one_worker / "fp32")
        shutil.rmtree(run / "checkpoints" / "step-000006")
        shutil.rmtree(run / "export")


@pytest.mark.slow
def test_eight_ranks_are_two_groups_of_four_and_a_killed_run_goes_on(corpus: Path, one_worker: Path, tmp_path: Path) -> None:
    given = spec(corpus, model=model("llama"), scale={"workers": 8}, sharding=divided(1), **SHORT)
    run_ranks({tmp_path / "whole": given})
    check_equal(tmp_path / "whole", one_worker / "fp32")
    files = [(tmp_path / "whole" / f"windows-{rank}.txt").read_text() for rank in range(8)]
    assert len({*files[:4]}) == len({*files[4:]}) == 1 and files[0] != files[4]
    run_ranks({tmp_path / "killed": given}, kill_before_step=4)
    assert not (tmp_path / "killed" / "export").exists()
    run_ranks({tmp_path / "killed": given})
    assert records(tmp_path / "killed") == records(tmp_path / "whole") and exported(tmp_path / "killed") == exported(tmp_path / "whole")


@pytest.mark.slow
def test_options_make_the_same_steps(tmp_path: Path) -> None:
    """Conversations whose documents lie over several ranks, averages, recomputation, penalties; dropout goes on bit-equal."""
    packed = make_packed_corpus(tmp_path / "p", times=1, conversations=True)
    options: dict[str, dict[str, Any]] = {
        "3-sft": {"objective": "sft", "activation_checkpointing": 1, "ema": {"decay": 0.9}},
        "0-whole": {"objective": "sft", "batch": {"global_sequences": 12, "micro_sequences": 2, "mask_documents": False},
                    "checkpoint": {"every_steps": 3, "average": 2}},
        "1-penalties": {"objective": "sft", "regularization": {"label_smoothing": 0.1, "z_loss": 1e-4}},
        "2-dropout": {"objective": "sft", "model": {"config": {**model("llama")["config"], "attention_dropout": 0.1}}}}
    check_going_on({tmp_path / name: spec(packed, scale=FOUR, sharding=divided(int(name[0])), **{**SHORT, "model": model("llama"), **one})
                    for name, one in options.items()})
    alike = {name: one for name, one in options.items() if name != "2-dropout"}
    run_ranks({tmp_path / "one" / name: spec(packed, **{**SHORT, "model": model("llama"), **one}) for name, one in alike.items()})
    for name in alike:
        check_equal(tmp_path / name, tmp_path / "one" / name, 5e-6)


@pytest.mark.slow
@pytest.mark.parametrize("families", [SOME, tuple(sorted({*FAMILIES} - {*SOME}))])
def test_every_family_has_one_workers_gradients_and_steps(corpus: Path, tmp_path: Path, families: tuple[str, ...]) -> None:
    check_families(lambda name, keys: spec(corpus, **{"model": model(name), "scale": {"workers": 4}, "sharding": divided(1), **keys}),
                   families, tmp_path, 4)


def test_workers_that_cannot_be_put_into_groups_are_refused_by_key() -> None:
    with pytest.raises(SpecError) as error:
        load_spec({**dump(spec(Path("c"))), "scale": {"workers": 6}, "sharding": divided(0)})
    assert ("sharding.sequence_parallel: 2 does not divide 3 groups of 2 workers that hold a model together; try 1, 3"
            in str(error.value))


@pytest.mark.parametrize(("heads", "what"), [({"num_attention_heads": 8, "num_key_value_heads": 2}, "key-value"),
                                             ({"num_attention_heads": 2, "num_key_value_heads": 2}, "attention")])
def test_heads_of_which_a_rank_would_have_none_are_refused_at_plan(corpus: Path, heads: dict[str, int], what: str) -> None:
    given = spec(corpus, scale=FOUR, sharding=divided(0), model={"config": {**model("llama")["config"], **heads}})
    with pytest.raises(SpecError) as error:
        make_recipe(given, Storage(corpus.parent))
    assert f"2 does not divide the 1 {what} heads of a part by tensor_parallel: 2; try 1" in str(error.value)
    assert error.value.where == "sharding.sequence_parallel"


def test_neighbours_hold_one_model_and_the_next_ones_the_next_part_of_a_sequence(corpus: Path) -> None:
    given = spec(corpus, scale={"workers": 8}, sharding=divided(0), model=model("llama"))
    recipe = make_recipe(given, Storage(corpus.parent))
    assert [recipe.part(rank) for rank in range(8)] == [(0, 2), (0, 2), (1, 2), (1, 2)] * 2
    assert [recipe.plan().samples(1, rank).tolist() for rank in range(8)] == [[*range(12, 18)]] * 4 + [[*range(18, 24)]] * 4


def test_plan_counts_a_part_of_the_model_and_of_its_activations() -> None:
    shape, loads = Shape(VOCABULARY, CONTEXT, 0), {}
    for tensor, sequence in ((1, 1), (2, 1), (2, 2)):
        given = spec(Path("c"), scale=FOUR, sharding=divided(2, tensor, sequence), model=model("llama"),
                     batch={"global_sequences": 12, "micro_sequences": 1})
        loads[tensor, sequence] = make_load(given, model_config(given.model, shape), shape, 1000, 2, 3)
    parts, both = loads[2, 1], loads[2, 2]
    assert both.activations.layers[0] * 2 == parts.activations.layers[0] < loads[1, 1].activations.layers[0]
    assert both.parameters == parts.parameters and own_states(both) == own_states(parts)
