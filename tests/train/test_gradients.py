"""However a step is sharded, cut and divided, its gradients are those of a plain loop in float64 over the documents, one by one."""

import itertools
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch.nn import functional

from distlm.corpus.stream import Windows
from distlm.errors import SpecError
from distlm.model.build import build_model, model_config
from distlm.spec import TrainSpec
from distlm.spec.load import dump, load_spec
from distlm.storage import Storage
from distlm.train.batch import make_batch
from distlm.train.recipe import Recipe, make_recipe
from distlm.train.zero import deepspeed_config
from tests.train.ranks import make_packed_corpus, pack_corpus, run_ranks, spec

SEQUENCES, STEPS, RATE = 16, 2, 0.5
"""The second step's gradients say what the first one's update was."""
MANY = 192
"""Windows of which each is a micro-batch."""


class Cell(NamedTuple):
    """How the steps are made."""

    zero: int
    accumulation: int
    precision: str
    ranks: int
    windows: str
    """packing: several documents, to which attention keeps; padding: a conversation, whose answers alone give loss, of every fourth
    nothing."""
    kind: str = "data"
    """tensor or sequence: what two neighbouring ranks divide; both: what four do."""
    recomputed: int = 0


def cells(ranks: Iterable[int], kind: str = "data") -> list[Cell]:
    """All of them, but what is refused: bf16 on divided matrices without ZeRO."""
    every = itertools.product(range(4), (1, 4), ("fp32", "bf16"), ranks, ("packing", "padding"), (kind,))
    return [Cell(*one) for one in every if kind not in ("tensor", "both") or (one[0], one[2]) != (0, "bf16")]


def recomputed(which: list[Cell]) -> list[Cell]:
    """The same with both layers computed again, or one of them."""
    return [cell._replace(recomputed=1 + cell.zero % 2) for cell in which]


SOME = [Cell(0, 1, "fp32", 1, "packing"), Cell(0, 4, "bf16", 2, "padding"), Cell(0, 1, "fp32", 4, "packing"),
        Cell(1, 4, "fp32", 1, "padding"), Cell(1, 1, "bf16", 2, "packing"), Cell(1, 4, "fp32", 4, "padding"),
        Cell(2, 1, "bf16", 1, "padding"), Cell(2, 4, "fp32", 2, "packing"), Cell(2, 1, "bf16", 4, "padding"),
        Cell(3, 4, "bf16", 1, "packing"), Cell(3, 1, "fp32", 2, "padding"), Cell(3, 4, "bf16", 4, "packing")]
"""Any value of one column is here with any of another."""
FIRST_DIVIDED = [Cell(1, 4, "fp32", 2, "packing", "tensor"), Cell(2, 1, "fp32", 2, "padding", "sequence")]
SOME_DIVIDED = [Cell(0, 1, "fp32", 2, "padding", "tensor"), Cell(3, 4, "bf16", 2, "padding", "tensor"),
                Cell(0, 4, "bf16", 2, "padding", "sequence"), Cell(3, 4, "fp32", 2, "packing", "sequence"),
                Cell(0, 4, "fp32", 4, "packing", "both"), Cell(2, 1, "bf16", 4, "padding", "both"),
                Cell(3, 1, "fp32", 4, "padding", "both")]
DIVIDED: dict[str, dict[str, int]] = {"data": {}, "tensor": {"tensor_parallel": 2}, "sequence": {"sequence_parallel": 2},
                                      "both": {"tensor_parallel": 2, "sequence_parallel": 2}}
"""Keys of `sharding`."""
MODEL = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8,
         "num_key_value_heads": 4, "tie_word_embeddings": True}
WITHIN = {"fp32": 1e-6, "bf16": math.sqrt(80) * 2**-8 / math.sqrt(3)}
"""How far each parameter's gradient may be from float64's, over its length. A rounding to bf16 is off by 2^-8 at most, by 2^-8/√3 in the
root mean square; some 80 lie one after the other between weights and gradients of these two layers, taken to be independent."""
BOTH_WITHIN = math.sqrt(100) * 2**-8 / math.sqrt(3)
"""In bf16, where models and sequences are divided: what is added up of parts, hidden states and gradients, is rounded in each part too."""
LOSSES_WITHIN = {"fp32": 1e-6, "bf16": 2**-12}
"""Of a loss, in which the roundings of many tokens' logits even out."""
LAYOUTS_WITHIN = {"data": 2**-7, "sequence": 2**-7, "tensor": 2**-6, "both": 2**-6}
"""How far a first step's gradient in bf16 may be from that of one rank: the same products, added up in parts that are rounded each; where
matrices are divided, hidden states are such sums too."""


class Step(NamedTuple):
    loss: float
    targets: int
    gradients: dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one of each kind of windows."""
    root = tmp_path_factory.mktemp("corpora")
    make_packed_corpus(root / "packing", lengths=(1, 2, 2, 2, 3, 3, 4, 5, 6, 7, 18))
    make_packed_corpus(root / "padding", lengths=(9, 10, 11, 12, 13, 15, 16, 17), conversations=True, silent=4)
    return root


@pytest.fixture(scope="module")
def expected(corpora: Path) -> dict[str, list[Step]]:
    return {windows: reference(corpora / windows) for windows in ("packing", "padding")}


@pytest.fixture(scope="module")
def one_rank(corpora: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """The steps of one rank in bf16 without ZeRO and accumulation, by kinds of windows."""
    found = run(corpora, tmp_path_factory.mktemp("one"), [Cell(0, 1, "bf16", 1, windows) for windows in ("packing", "padding")])
    return {cell.windows: steps for cell, steps in found.items()}


def given(corpus: Path, cell: Cell, **sections: Any) -> TrainSpec:
    packed, divided = cell.windows == "packing", DIVIDED[cell.kind]
    groups = cell.ranks // math.prod(divided.values())
    small = {"deepspeed": {"zero_optimization": {"stage3_param_persistence_threshold": 0}}} if cell.zero == 3 else {}
    return spec(corpus, **{
        "model": {"config": MODEL}, "objective": "pretrain" if packed else "sft", "precision": cell.precision,
        "duration": {"steps": STEPS}, "evaluate": {},
        "checkpoint": {}, "schedule": {"name": "constant"}, "activation_checkpointing": cell.recomputed,
        "optimizer": {"name": "sgd", "lr": RATE, "momentum": 0, "weight_decay": 0, "clip": 0}, "scale": {"workers": cell.ranks},
        "sharding": {"zero": cell.zero, **divided, **small},
        "batch": {"global_sequences": SEQUENCES, "micro_sequences": SEQUENCES // groups // cell.accumulation, "mask_documents": packed},
        **sections})


def run(corpora: Path, root: Path, which: list[Cell]) -> dict[Cell, list[dict[str, Any]]]:
    """What `watch_gradients` has of each cell."""
    runs = {cell: root / "-".join(map(str, cell)) for cell in which}
    for group in sorted({(cell.ranks, cell.kind) for cell in which}):
        run_ranks({runs[cell]: given(corpora / cell.windows, cell) for cell in which if (cell.ranks, cell.kind) == group}, gradients=True)
    return {cell: torch.load(path / "gradients.pt") for cell, path in runs.items()}


def reference(corpus: Path) -> list[Step]:
    """The steps of plain gradient descent in float64, every document by itself."""
    recipe = make_recipe(given(corpus, Cell(0, 1, "fp32", 1, corpus.name)), Storage(corpus.parent))
    order = Windows(corpus).order(recipe.spec.seed)
    samples = [np.arange(step * SEQUENCES, (step + 1) * SEQUENCES) for step in range(STEPS)]
    return descend(precise(recipe), [documents(corpus, order.locate(one)[1]) for one in samples])


def precise(recipe: Recipe) -> Any:
    """The model that is trained, in float64."""
    model = build_model(recipe.spec.model, model_config(recipe.spec.model, recipe.shape), recipe.spec.seed).double()
    for module in model.modules():
        if hasattr(module, "variance_epsilon"):            # transformers' norm is made in float32 whatever the model is in
            module.forward = lambda x, norm=module: functional.rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)
    return model


def descend(model: Any, steps: list[list[tuple[torch.Tensor, torch.Tensor]]]) -> list[Step]:
    """Of each step the documents: tokens, and which of those after the first give loss."""
    parameters, found = dict(model.named_parameters()), []
    for texts in steps:
        total, targets = torch.zeros((), dtype=torch.float64), 0
        for text, gives in texts:
            if gives.any():
                logits = model(input_ids=text[None, :-1]).logits[0]
                total = total + functional.cross_entropy(logits[gives], text[1:][gives], reduction="sum")
                targets += int(gives.sum())
        loss = total / targets
        gradients = torch.autograd.grad(loss, list(parameters.values()))
        found.append(Step(loss.item(), targets, dict(zip(parameters, gradients, strict=True))))
        with torch.no_grad():
            for parameter, gradient in zip(parameters.values(), gradients, strict=True):
                parameter -= RATE * gradient
    return found


def documents(corpus: Path, rows: np.ndarray, split: str = "train") -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(tokens, which of those after the first give loss) of each piece of a document in these windows."""
    table = pa.ipc.open_file(corpus / split / "00000.arrow").get_batch(0).take(pa.array(rows)).to_pylist()
    return [(torch.tensor(row["tokens"][at:end]), torch.tensor(row.get("loss", [True] * end)[at:end])[1:]) for row in table
            for at, end in zip(row["starts"], [*row["starts"][1:], row["filled"]], strict=True)]


def apart(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> dict[str, float]:
    """|ours - theirs| / |theirs| of each parameter's gradient, and of all together."""
    assert ours.keys() == theirs.keys()
    squares = {name: (float((ours[name].double() - value.double()).square().sum()), float(value.double().square().sum()))
               for name, value in theirs.items()}
    squares["all"] = (math.fsum(one for one, _ in squares.values()), math.fsum(one for _, one in squares.values()))
    return {name: math.sqrt(one / other) for name, (one, other) in squares.items()}


def check(found: dict[Cell, list[dict[str, Any]]], expected: dict[str, list[Step]], one_rank: dict[str, list[dict[str, Any]]]) -> None:
    """Losses, counts, norms and gradients, by parameters and together; of activations that are computed again, to the bit."""
    for cell, steps in found.items():
        within = BOTH_WITHIN if (cell.kind, cell.precision) == ("both", "bf16") else WITHIN[cell.precision]
        for ours, theirs in zip(steps, expected[cell.windows], strict=True):
            norm = math.sqrt(math.fsum(float(gradient.square().sum()) for gradient in theirs.gradients.values()))
            assert ours["targets"] == theirs.targets, cell
            assert ours["loss"] == pytest.approx(theirs.loss, rel=LOSSES_WITHIN[cell.precision]), cell
            assert ours["norm"] == pytest.approx(norm, rel=within), cell
            assert max(apart(ours["gradients"], theirs.gradients).values()) <= within, cell
        if cell.precision == "bf16":
            assert max(apart(steps[0]["gradients"], one_rank[cell.windows][0]["gradients"]).values()) <= LAYOUTS_WITHIN[cell.kind], cell
        for ours, kept in zip(steps, found[cell._replace(recomputed=0)], strict=True):
            assert all(torch.equal(ours["gradients"][name], gradient) for name, gradient in kept["gradients"].items()), cell


def test_windows_are_ragged(corpora: Path) -> None:
    """Micro-batches differ in how many tokens give loss, and one of conversations has none."""
    for windows in ("packing", "padding"):
        recipe = make_recipe(given(corpora / windows, Cell(0, 4, "fp32", 4, windows)), Storage(corpora))
        reader, order = Windows(corpora / windows), Windows(corpora / windows).order(recipe.spec.seed)
        shards, rows = order.locate(np.arange(SEQUENCES))
        marked = np.stack([reader.read(shards, rows).astype(np.int64), reader.marks(shards, rows)], 1)
        batch = make_batch(marked, recipe.mask_documents)
        counts = [one.num_targets() for one in batch.split(recipe.micro_sequences)]
        assert len(counts) == 16 and len(set(counts)) > 4 and (min(counts) == 0) == (windows == "padding"), counts
        assert recipe.mask_documents == (windows == "packing")


def test_some_cells(corpora: Path, expected: dict[str, list[Step]], one_rank: dict[str, list[dict[str, Any]]], tmp_path: Path) -> None:
    check(run(corpora, tmp_path, SOME + recomputed([cell for cell in SOME if cell.ranks == 2])), expected, one_rank)


def many_windows(corpus: Path, root: Path, cases: dict[str, tuple[Cell, str]]) -> dict[str, float]:
    """How far the first gradient of MANY windows is from float64's, over its length, of each cell and its `reduce_precision`."""
    runs = {root / name: given(corpus, cell, duration={"steps": 1}, reduce_precision=sums, batch={
        "global_sequences": MANY, "micro_sequences": MANY // cell.ranks // cell.accumulation, "mask_documents": True})
        for name, (cell, sums) in cases.items()}
    recipe = make_recipe(next(iter(runs.values())), Storage(root))
    rows = Windows(corpus).order(recipe.spec.seed).locate(np.arange(MANY))[1]
    [theirs] = descend(precise(recipe), [documents(corpus, rows)])
    for ranks in sorted({cell.ranks for cell, _ in cases.values()}):
        run_ranks({path: one for path, one in runs.items() if one.scale.workers == ranks}, gradients=True)
    return {path.name: apart(torch.load(path / "gradients.pt")[0]["gradients"], theirs.gradients)["all"] for path in runs}


@pytest.mark.parametrize("layouts", [
    pytest.param(((0, 2), (3, 2)), id="some"),
    pytest.param(((1, 1), (1, 2), (2, 1), (2, 2), (0, 1), (3, 1)), id="others", marks=pytest.mark.slow)])
def test_in_fp32_many_micro_batches_are_added_up_as_exactly_as_one(layouts: tuple[tuple[int, int], ...], tmp_path: Path) -> None:
    """And those of two ranks; in bf16 each sum is rounded. Layouts are ZeRO stages and ranks."""
    corpus = make_packed_corpus(tmp_path / "packing", lengths=(1, 2, 2, 2, 3, 3, 4, 5, 6, 7, 18), times=200)
    found = many_windows(corpus, tmp_path, {
        "one": (Cell(0, 1, "bf16", 1, "packing"), "fp32"), "same": (Cell(layouts[0][0], MANY, "bf16", 1, "packing"), "same"),
        **{f"{zero} on {ranks}": (Cell(zero, MANY // ranks, "bf16", ranks, "packing"), "fp32") for zero, ranks in layouts}})
    one, same = found.pop("one"), found.pop("same")
    assert one < 0.007 and same > 2 * one and max(found.values()) < one, (one, same, found)


@pytest.mark.parametrize(("sections", "message"), [
    ({"precision": "fp32", "reduce_precision": "fp32"}, "reduce_precision: fp32 has no effect with precision: fp32"),
    ({"precision": "bf16", "reduce_precision": "bf16"}, "reduce_precision: "),
    ({"precision": "bf16", "sharding": {"zero": 1, "deepspeed": {"data_types": {"grad_accum_dtype": "fp32"}}}},
     "sharding.deepspeed.data_types.grad_accum_dtype: contradicts reduce_precision"),
    ({"precision": "bf16", "sharding": {"deepspeed": {"communication_data_type": "fp32"}}},
     "sharding.deepspeed.communication_data_type: contradicts reduce_precision"),
    ({"precision": "bf16", "reduce_precision": "fp32", "scale": {"gpus_per_worker": 1},
      "sharding": {"zero": 3, "zeropp": {"quantized_gradients": True}}}, "fp32 cannot be with quantized gradients"),
    ({"precision": "bf16", "reduce_precision": "fp32", "optimizer": {"name": "muon", "clip": 0},
      "sharding": {"zero": 2, "offload": {"optimizer": "cpu"}}}, "fp32 cannot be with muon whose states are offloaded")])
def test_sums_that_cannot_be_are_refused_by_key(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError) as error:
        load_spec({**dump(spec(Path("c"))), **sections})
    assert message in str(error.value)


def test_sums_are_in_fp32_but_where_that_would_cost_what_was_to_be_saved() -> None:
    def asked(**sections: Any) -> tuple[Any, Any]:
        config = deepspeed_config(spec(Path("c"), **{"precision": "bf16", **sections}), 1, 1)
        return config.get("communication_data_type"), config.get("data_types")

    both = ("fp32", {"grad_accum_dtype": "fp32"})
    assert asked() == ("fp32", None) and asked(sharding={"zero": 1}) == asked(sharding={"zero": 3}) == both
    away = {"offload": {"optimizer": "cpu"}}
    assert asked(sharding={"zero": 3, **away}) == asked(sharding={"zero": 2, **away}, reduce_precision="fp32") == both
    for same in ({"precision": "fp32"}, {"reduce_precision": "same"}, {"sharding": {"zero": 2, **away}},
                 {"sharding": {"zero": 3, "zeropp": {"quantized_gradients": True}}, "scale": {"gpus_per_worker": 1}}):
        assert asked(**same) == (None, None), same


@pytest.mark.parametrize("which", [*([cell] for cell in FIRST_DIVIDED), pytest.param(SOME_DIVIDED, marks=pytest.mark.slow)],
                         ids=["tensor", "sequence", "some"])
def test_some_cells_of_divided_models_and_sequences(which: list[Cell], corpora: Path, expected: dict[str, list[Step]],
                                                    one_rank: dict[str, list[dict[str, Any]]], tmp_path: Path) -> None:
    check(run(corpora, tmp_path, which), expected, one_rank)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "ranks"), [("data", 1), ("data", 2), ("data", 4), ("tensor", 2), ("tensor", 4), ("sequence", 2),
                                             ("sequence", 4), ("both", 4)])
def test_all_cells(kind: str, ranks: int, corpora: Path, expected: dict[str, list[Step]], one_rank: dict[str, list[dict[str, Any]]],
                   tmp_path: Path) -> None:
    which = cells([ranks], kind)
    again = recomputed([cell for cell in which if (cell.accumulation, cell.ranks, cell.windows) == (4, 2, "packing")])
    check(run(corpora, tmp_path, which + again), expected, one_rank)


SAID = [([5, 9, 12, 31, 7, 44, 3, 18, 27, 8, 50, 13, 0], "....aaa.aaaaa"), ([21, 40, 6, 0], "..aa"),
        ([11, 2, 60, 33, 9, 25, 14, 7, 52, 0], "....aaaa.a")]
"""Conversations and their answers' tokens. The first two fill a window of 16 predictions, and the first one's second answer begins on one
of two ranks that divide it and ends on the other; the third stands before padding."""


def test_a_conversation_written_by_hand_gives_the_loss_of_its_marked_tokens_alone(tmp_path: Path) -> None:
    tokens = np.array([token for said, _ in SAID for token in said], np.uint16)
    marks = np.array([mark == "a" for _, each in SAID for mark in each])
    split = tokens, np.array([0, 13, 17]), marks
    corpus = pack_corpus(tmp_path / "c", split, split)
    runs = {tmp_path / str(zero): given(corpus, Cell(zero, 1, "fp32", 2, "padding", "sequence"), duration={"steps": 1}, batch={
        "global_sequences": 2, "micro_sequences": micro}) for zero, micro in ((0, 2), (3, 1))}
    run_ranks(runs, gradients=True)
    recipe = make_recipe(runs[tmp_path / "0"], Storage(tmp_path))
    assert recipe.mask_documents and recipe.plan().global_sequences == Windows(corpus).sizes[0] == 2
    model, total = precise(recipe), torch.zeros((), dtype=torch.float64)
    for said, each in SAID:
        logprobs = model(input_ids=torch.tensor([said])).logits[0].log_softmax(1)
        for i, mark in enumerate(each):
            if mark == "a":
                total = total - logprobs[i - 1, said[i]]
    (total / 15).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    for path in runs:
        [step] = torch.load(path / "gradients.pt")
        assert step["targets"] == 15 and step["loss"] == pytest.approx(total.item() / 15, rel=WITHIN["fp32"]), path.name
        assert max(apart(step["gradients"], gradients).values()) <= WITHIN["fp32"], path.name
