"""A run goes on with other ranks, another ZeRO stage and a model divided in another way as if nothing had changed."""

import itertools
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from distlm.errors import CheckpointError, SpecError
from distlm.spec import TrainSpec
from distlm.storage import Storage, read_json, write_json
from distlm.train import checkpoint, reshard
from distlm.train.recipe import make_recipe
from distlm.train.reshard import WEIGHTS, Fragment, Saved, load_resharded
from tests.train.ranks import losses, make_corpus, metrics, run_ranks, spec, windows_seen

SHARDED = {"zero": 3, "deepspeed": {"zero_optimization": {"stage3_param_persistence_threshold": 0, "sub_group_size": 5000}}}
"""Small parameters are sharded too, and a group has several partitions on a rank."""


SIZES = {"hidden_size": 40, "intermediate_size": 52, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = {"config": {"model_type": "llama", **SIZES, "num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True}}
NEOX = {"config": {"model_type": "gpt_neox", **SIZES}}
At = tuple[int, ...]
"""Workers, the ZeRO stage, and how many hold a model together if not one."""


def layout(workers: int, zero: int, tensor: int = 1) -> dict[str, Any]:
    sharding = {30: {"zero": 3}, 3: SHARDED}.get(zero, {"zero": zero})
    return {"scale": {"workers": workers}, "sharding": {**sharding, "tensor_parallel": tensor}}


def case(corpus: Path, *at: int, **sections: Any) -> TrainSpec:
    """Six steps, a checkpoint after three; parameters that do not divide evenly over the ranks."""
    model = {"config": {"model_type": "gpt2", "n_embd": 36, "n_layer": 2, "n_head": 4}}
    return spec(corpus, **{"duration": {"steps": 6}, "evaluate": {"every_steps": 3}, "checkpoint": {"every_steps": 3}, "model": model,
                           "batch": {"global_sequences": 12, "micro_sequences": 1}, **layout(*at), **sections})


def check(tmp_path: Path, moves: Sequence[tuple[At, At]], rtol: float = 1e-5, **sections: Any) -> None:
    """Each run begun in one layout and gone on with in another has the losses of the run that did not move."""
    corpus = make_corpus(tmp_path / "c")
    begun = {at: tmp_path / f"begun-{told(at)}" for at in dict.fromkeys(at for at, _ in moves)}
    for ranks in sorted({together(at) for at in begun}):
        run_ranks({run: case(corpus, *at, **sections) for at, run in begun.items() if together(at) == ranks})
    moved: dict[At, list[Path]] = {}
    for at, to in moves:
        run = tmp_path / f"{told(at)}-to-{told(to)}"
        shutil.copytree(begun[at], run)
        shutil.rmtree(run / "checkpoints" / "step-000006")
        shutil.rmtree(run / "export")
        for file in run.glob("windows-*.txt"):             # of the steps that are done again
            file.write_text("".join(line for line in file.read_text().splitlines(True) if int(line.split(":")[0]) < 3))
        moved.setdefault(to, []).append(run)
    for ranks in sorted({together(to) for to in moved}):
        run_ranks({run: case(corpus, *to, **sections) for to, runs in moved.items() if together(to) == ranks for run in runs})
    for at, to in moves:
        run = tmp_path / f"{told(at)}-to-{told(to)}"
        ours, theirs = windows_seen(run), windows_seen(begun[at])
        if together(at)[1] > 1 or together(to)[1] > 1:     # those that hold a model together read the same
            ours, theirs = ({step: sorted({*seen}) for step, seen in one.items()} for one in (ours, theirs))
        assert ours == theirs, run.name
        for key in ("loss", "val_loss", "grad_norm"):
            values = [[record[key] for record in metrics(path) if key in record] for path in (run, begun[at])]
            np.testing.assert_allclose(*values, rtol=rtol, err_msg=f"{run.name}: {key}")
        assert losses(run)[-1] < losses(run)[0]


def together(at: At) -> tuple[int, int]:
    """Runs that are alike in it can be of the same processes: DeepSpeed keeps its groups of ranks."""
    return at[0], at[2] if len(at) > 2 else 1


def told(at: At) -> str:
    return "-".join(map(str, at))


def test_ranks_and_stages_change(tmp_path: Path) -> None:
    check(tmp_path, [((2, 1), (1, 3)), ((2, 3), (1, 0)), ((1, 0), (2, 2)), ((1, 2), (2, 1)), ((2, 3), (2, 30))], ema={"decay": 0.9})


def test_a_model_is_divided_over_more_or_fewer(tmp_path: Path) -> None:
    """Rows and columns of a part are found in the whole, those of the averages too; groups come and go."""
    check(tmp_path, [((1, 0), (2, 1, 2)), ((2, 1, 2), (1, 3)), ((2, 3), (2, 0, 2))], model=LLAMA, ema={"decay": 0.9})


@pytest.mark.slow
def test_the_mean_of_checkpoints_of_two_divisions_is_that_of_one(tmp_path: Path) -> None:
    sections = {"model": LLAMA, "checkpoint": {"every_steps": 3, "average": 2}}
    check(tmp_path, [((2, 1, 2), (1, 3)), ((1, 0), (2, 3, 2))], **sections)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("precision", "rtol"), [("fp32", 1e-5), ("bf16", 1e-2)])
def test_every_stage_divides_a_model_in_another_way(tmp_path: Path, precision: str, rtol: float) -> None:
    moves: list[tuple[At, At]] = [((4, a, 2), (2, b)) for a, b in ((1, 3), (2, 1), (3, 2))]
    moves += [((2, a), (4, b, 2)) for a, b in ((1, 2), (2, 3), (3, 1))]
    moves += [((4, 3, 2), (2, 3, 2)), ((2, 1, 2), (4, 2, 4)), ((4, 2, 4), (4, 1, 2)), ((4, 3, 4), (4, 3)), ((4, 2), (4, 2, 2))]
    if precision == "fp32":
        moves += [((2, 0, 2), (4, 0, 2)), ((4, 0, 2), (2, 1)), ((4, 0, 4), (4, 0, 2)), ((4, 0, 2), (1, 0))]
    check(tmp_path, moves, rtol, model=LLAMA, precision=precision, ema={"decay": 0.9})


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("optimizer", "rate"), [("lion", 0.001), ("sgd", 0.1)])
def test_other_optimizers_are_divided_over_more_or_fewer(tmp_path: Path, optimizer: str, rate: float) -> None:
    check(tmp_path, [((2, 2, 2), (1, 1)), ((2, 3), (2, 2, 2)), ((1, 0), (2, 3, 2))], model=NEOX, optimizer={"name": optimizer, "lr": rate})


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("optimizer", "precision"),
                         [("adamw", "fp32"), ("adamw", "bf16"), ("lion", "bf16"), ("sgd", "fp32")])
def test_every_stage_to_every_other(tmp_path: Path, optimizer: str, precision: str) -> None:
    moves = [((2, a), (1, b)) for a in range(4) for b in range(4)]
    moves += [((1, 3), (2, 3)), ((1, 1), (2, 3)), ((2, 1), (4, 3)), ((2, 3), (4, 2))]
    rate = {"lion": 0.001, "sgd": 0.1}.get(optimizer, 0.01)
    rtol = 1e-5 if precision == "fp32" else 1e-2           # products in bf16 round anew
    check(tmp_path, moves, rtol, precision=precision, optimizer={"name": optimizer, "lr": rate})


@pytest.mark.slow
@pytest.mark.parametrize(("optimizer", "rtol"), [("muon", 5e-3), ("adafactor", 1e-5)])
def test_without_zero_any_optimizer_takes_other_ranks(tmp_path: Path, optimizer: str, rtol: float) -> None:
    options = {"name": optimizer, "lr": 0.01, **({"clip": 0} if optimizer == "muon" else {})}
    check(tmp_path, [((2, 0), (1, 0)), ((1, 0), (2, 0))], rtol, optimizer=options, ema={"decay": 0.9})


@pytest.mark.parametrize("size", [1, 3, 8])
def test_columns_of_a_matrix_are_found_in_the_whole_and_in_other_parts(size: int) -> None:
    """Cut anywhere, also within a row: every element of a matrix that is its own number."""
    import torch

    name, shape, random = "model.layers.0.mlp.down_proj.weight", torch.Size((7, 24)), np.random.default_rng(size)
    whole = torch.arange(shape.numel(), dtype=torch.float32).view(shape)

    def cut(parts: int) -> list[tuple[Fragment, torch.Tensor]]:
        """Each part by so many ranks, of which each has other elements before and behind."""
        found = []
        for index in range(parts):
            part = whole.chunk(parts, 1)[index].reshape(-1)
            ends = [0, *sorted(random.integers(0, len(part) + 1, size - 1).tolist()), len(part)]
            for first, last in itertools.pairwise(ends):
                at = Fragment(name, first, 2, last - first).in_whole(index, parts, shape)
                found.append((at, torch.cat([torch.full((2,), -1.0), part[first:last], torch.full((3,), -1.0)])))
        return found

    for parts, others in itertools.product((1, 2, 3, 4), repeat=2):
        saved = [Saved(at, {WEIGHTS: flat}) for at, flat in cut(parts)]
        for to, expected in cut(others):
            master = torch.full_like(expected, -1.0)
            for move in (move for piece in saved for move in reshard._moves(piece, to)):
                reshard._copy(move, master, {}, None)
            assert torch.equal(master, expected), (parts, others, to)


@pytest.mark.parametrize(("keys", "sections", "why"), [
    ({"partition": {"round_robin_gradients": True}}, {}, "with round_robin_gradients DeepSpeed does not tell"),
    ({}, {"optimizer": {"name": "muon", "clip": 0}}, "DeepSpeed's Muon keeps whole matrices"),
    ({"partition": {"offload_optimizer": {"device": "nvme"}}}, {}, "what lies on disks is not divided anew")])
def test_a_state_that_cannot_be_divided_anew_is_refused_with_the_reason(tmp_path: Path, keys: dict[str, Any], sections: dict[str, Any],
                                                                         why: str) -> None:
    corpus = make_corpus(tmp_path / "c")
    saved = {**checkpoint.facts(make_recipe(case(corpus, 2, 2, **sections), Storage(tmp_path))), "anneal": None, **keys}
    moved = make_recipe(case(corpus, 1, 1, **sections), Storage(tmp_path))
    with pytest.raises(CheckpointError, match=f"was saved with workers 2, and the spec says 1; {why}"):
        checkpoint.check_fits(checkpoint.Checkpoint(tmp_path, 3, saved), moved)
    if not sections:
        checkpoint.check_fits(checkpoint.Checkpoint(tmp_path, 3, {**saved, "partition": {}}), moved)


@pytest.mark.parametrize(("to", "changes"), [((1, 2), "workers 2 -> 1, zero 0 -> 2"), ((2, 0, 2), "tensor_parallel 1 -> 2"), ((1, 0), "")])
def test_one_of_an_older_version_without_zero_is_refused_before_any_work_where_it_would_be_divided_anew(tmp_path: Path, to: At,
                                                                                                      changes: str) -> None:
    """By its manifest alone, which does not tell the parameters' names."""
    corpus, path = make_corpus(tmp_path / "c"), tmp_path / "run" / "checkpoints" / "step-000003"
    path.mkdir(parents=True)
    saved = {**checkpoint.facts(make_recipe(case(corpus, 2, 0, model=LLAMA), Storage(tmp_path))), "base": None, "teacher": None, "step": 3}
    moved = make_recipe(case(corpus, *to, model=LLAMA), Storage(tmp_path))
    (path / checkpoint.MARKER).touch()
    write_json(path / "manifest.json", {**saved, "parameters": []})
    checkpoint.check_resume(tmp_path / "run", moved)
    write_json(path / "manifest.json", saved)
    if not changes:
        checkpoint.check_resume(tmp_path / "run", moved)   # each rank takes the same file
        return
    with pytest.raises(SpecError, match=rf"step-000003: is of an older version, .* anew: {changes}; resume with zero 0 and "
                                        "tensor_parallel 1, or start a new run"):
        checkpoint.check_resume(tmp_path / "run", moved)


def test_a_checkpoint_that_lacks_elements_is_refused(tmp_path: Path) -> None:
    """Never half of the weights: by another name, or with a rank's part gone."""
    import torch

    run = tmp_path / "run"
    run_ranks({run: case(make_corpus(tmp_path / "c"), 2, 1, duration={"steps": 3})})
    [path] = (run / "checkpoints").glob("step-*")
    manifest = read_json(path / "manifest.json")
    model = torch.nn.Linear(3, 3)
    rank = {"zero_optimization_stage": lambda: 0, "autotp_size": lambda: 0, "global_rank": 0, "world_size": 1}
    engine = SimpleNamespace(module=model, optimizer=torch.optim.SGD(model.parameters()), **rank)
    with pytest.raises(CheckpointError, match=r"holds model\.transformer\.wte\.weight, which the model has not"):
        load_resharded(engine, path, manifest, None)
    whole = {name: torch.nn.Parameter(torch.zeros(size)) for name, size in sizes(path).items()}
    engine = SimpleNamespace(module=SimpleNamespace(named_parameters=lambda: whole.items()), optimizer=torch.optim.SGD(whole.values()),
                             **rank)
    with pytest.raises(CheckpointError, match=r"holds [\d,]+ of [\d,]+ elements of model"):
        load_resharded(engine, path, {**manifest, "workers": 1}, None)


def sizes(path: Path) -> dict[str, int]:
    import torch

    shapes = torch.load(path / "state" / "mp_rank_00_model_states.pt", weights_only=False)["param_shapes"]
    return {name: shape.numel() for group in shapes for name, shape in group.items()}
