"""However a step of ragged windows is sharded, cut and divided, its gradient is that of the documents one by one."""

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch.nn import functional

from distlm.corpus.stream import NO_LOSS, Windows
from distlm.errors import SpecError, TrainError
from distlm.model.build import build_model, model_config
from distlm.model.loss import CausalLoss
from distlm.spec import TrainSpec
from distlm.storage import Storage
from distlm.train import loop
from distlm.train.batch import make_batch
from distlm.train.recipe import Recipe, make_recipe
from tests.train.ranks import make_packed_corpus, metrics, run_ranks, spec

RATIO = 100.0
"""AdamW's first step with an epsilon far above the gradient moves a weight by RATIO times its gradient."""
ALL = list(itertools.product((0, 1, 2, 3), (1, 4), (1, 2)))
SOME = [(0, 1, 2), (3, 4, 2)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_packed_corpus(tmp_path_factory.mktemp("packed") / "p")


def one_step(corpus: Path, zero: int = 0, accumulation: int = 1, world: int = 1, **batch: Any) -> TrainSpec:
    sequences = 16
    return spec(corpus, duration={"steps": 1}, schedule={"name": "constant"}, sharding={"zero": zero}, scale={"workers": world},
                optimizer={"lr": RATIO * 1e4, "eps": 1e4, "weight_decay": 0, "clip": 0}, evaluate={}, checkpoint={},
                batch={"global_sequences": sequences, "micro_sequences": sequences // world // accumulation, **batch})


def start(recipe: Recipe) -> Any:
    return build_model(recipe.spec.model, model_config(recipe.spec.model, recipe.shape), recipe.spec.seed)


def documents(corpus: Path, rows: np.ndarray, split: str = "train") -> list[torch.Tensor]:
    """The pieces of documents in these windows."""
    table = pa.ipc.open_file(corpus / split / "00000.arrow").get_batch(0).take(pa.array(rows)).to_pylist()
    return [torch.tensor(row["tokens"][at:end]) for row in table
            for at, end in zip(row["starts"], [*row["starts"][1:], row["filled"]], strict=True)]


def reference(corpus: Path, recipe: Recipe) -> tuple[float, dict[str, torch.Tensor], int]:
    """(loss, gradients, tokens that give loss) of the first step, every document by itself."""
    model = start(recipe)
    _, rows = Windows(corpus).order(0).locate(np.arange(recipe.global_sequences))
    loss, count = by_documents(model, documents(corpus, rows))
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters()}, count


def by_documents(model: Any, texts: list[torch.Tensor]) -> tuple[torch.Tensor, int]:
    """(mean loss, tokens that give loss)."""
    total, count = torch.zeros(()), 0
    for text in texts:
        if len(text) > 1:
            total = total + functional.cross_entropy(model(input_ids=text[None, :-1]).logits[0], text[1:], reduction="sum")
            count += len(text) - 1
    return total / count, count


def check(corpus: Path, root: Path, cases: list[tuple[int, int, int]]) -> None:
    for world in sorted({ranks for _, _, ranks in cases}):
        run_ranks({root / f"{zero}-{accumulation}-{world}": one_step(corpus, zero, accumulation, world)
                   for zero, accumulation, ranks in cases if ranks == world})
    recipe = make_recipe(one_step(corpus), Storage(root))
    assert recipe.mask_documents and recipe.marked, "the default for a best-fit corpus"
    loss, gradients, count = reference(corpus, recipe)
    model = start(recipe)
    begin = dict(model.named_parameters())
    [part] = recipe.val
    val_loss, _ = by_documents(model, documents(corpus, np.arange(part.windows), "val"))
    norm = math.sqrt(sum(float(g.norm()) ** 2 for g in gradients.values()))
    for zero, accumulation, world in cases:
        run = root / f"{zero}-{accumulation}-{world}"
        [record] = [record for record in metrics(run) if "loss" in record]
        assert metrics(run)[0]["val_loss"] == pytest.approx(val_loss.item(), rel=1e-6)
        assert record["loss"] == pytest.approx(loss, rel=1e-6) and record["loss_tokens"] == count < record["tokens"]
        assert record["grad_norm"] == pytest.approx(norm, rel=1e-5), run.name
        weights = exported(run)
        for name, gradient in gradients.items():
            moved = (begin[name].detach() - weights[name]) / RATIO
            assert (moved - gradient).norm() <= 2e-4 * gradient.norm() + 1e-7, (run.name, name)


def test_a_step_without_a_token_that_gives_loss_is_an_error(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop.distributed, "all_reduce", lambda count: count)
    rows = np.zeros((3, 2, 17), np.int64)
    rows[:, 1] = NO_LOSS
    with pytest.raises(TrainError, match="no token gives loss at step 3, samples 32 to 47"):
        loop.count_targets(make_batch(rows, True, torch.device("cpu")), make_recipe(one_step(corpus), Storage(corpus.parent)), 2)


def test_the_loss_of_conversations_is_that_of_the_tokens_that_give_it(tmp_path: Path) -> None:
    corpus = make_packed_corpus(tmp_path / "c", (3, 9, 16, 17, 2, 12), conversations=True)
    recipe = make_recipe(one_step(corpus).model_copy(update={"objective": "sft"}), Storage(tmp_path))
    assert recipe.marked and recipe.mask_documents
    shards, rows = Windows(corpus).order(0).locate(np.arange(recipe.global_sequences))
    reader, model, total, count = Windows(corpus), start(recipe), 0.0, 0
    for row in pa.ipc.open_file(corpus / "train" / "00000.arrow").get_batch(0).take(pa.array(rows)).to_pylist():
        for at, end in zip(row["starts"], [*row["starts"][1:], row["filled"]], strict=True):
            text, gives = torch.tensor(row["tokens"][at:end]), torch.tensor(row["loss"][at:end])
            if len(text) > 1 and gives[1:].any():
                logits = model(input_ids=text[None, :-1]).logits[0][gives[1:]]
                total += float(functional.cross_entropy(logits, text[1:][gives[1:]], reduction="sum").detach())
                count += int(gives[1:].sum())
    batch = make_batch(np.stack([reader.read(shards, rows).astype(np.int64), reader.marks(shards, rows)], 1), True, torch.device("cpu"))
    assert batch.num_targets() == count > 0
    assert float(CausalLoss(start(recipe))(*batch.inputs).detach()) == pytest.approx(total, rel=1e-5)


def test_sft_asks_for_conversations(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"objective: sft needs conversations, and the corpus p has texts.*prepare it with conversations"):
        make_recipe(one_step(corpus).model_copy(update={"objective": "sft"}), Storage(tmp_path))


def exported(run: Path) -> dict[str, torch.Tensor]:
    from transformers import AutoModelForCausalLM

    return dict(AutoModelForCausalLM.from_pretrained(run / "export").named_parameters())


def test_ragged_counts_give_the_gradient_of_the_documents_one_by_one(corpus: Path, tmp_path: Path) -> None:
    check(corpus, tmp_path, SOME)


@pytest.mark.slow
def test_ragged_counts_do_so_however_the_step_is_sharded_cut_and_divided(corpus: Path, tmp_path: Path) -> None:
    check(corpus, tmp_path, ALL)
