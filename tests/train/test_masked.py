"""Not every token of a window gives loss: what is evaluated and counted then, and what cannot be. test_gradients.py has the gradients."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distlm.errors import SpecError
from distlm.spec import TrainSpec
from distlm.storage import Storage
from distlm.train.recipe import make_recipe
from tests.train.ranks import make_packed_corpus, metrics, run_ranks, spec
from tests.train.test_gradients import descend, documents, precise


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_packed_corpus(tmp_path_factory.mktemp("packed") / "p")


def one_step(corpus: Path, **sections: Any) -> TrainSpec:
    return spec(corpus, **{"duration": {"steps": 1}, "schedule": {"name": "constant"}, "evaluate": {}, "checkpoint": {},
                           "batch": {"global_sequences": 16, "micro_sequences": 8}, **sections})


@pytest.mark.parametrize("conversations", [False, True])
def test_what_is_evaluated_and_counted_is_that_of_the_documents_one_by_one(conversations: bool, tmp_path: Path) -> None:
    corpus = make_packed_corpus(tmp_path / "c", conversations=conversations)
    given = one_step(corpus, objective="sft" if conversations else "pretrain")
    recipe = make_recipe(given, Storage(tmp_path))
    assert recipe.mask_documents and recipe.marked, "the default for a best-fit corpus"
    run_ranks({tmp_path / "run": given})
    [part] = recipe.val
    [expected] = descend(precise(recipe), [documents(corpus, np.arange(part.windows), "val")])
    before, step = metrics(tmp_path / "run")[0], next(record for record in metrics(tmp_path / "run") if "loss" in record)
    assert before["val_loss"] == pytest.approx(expected.loss, rel=1e-6)
    assert 0 < step["loss_tokens"] < step["tokens"]


def test_a_step_without_a_token_that_gives_loss_is_an_error(corpus: Path, tmp_path: Path) -> None:
    output = run_ranks({tmp_path / "run": one_step(corpus, duration={"steps": 3})}, empty_step=2)
    assert "TrainError: no token gives loss at step 3, samples 32 to 47" in output
    assert [record["step"] for record in metrics(tmp_path / "run") if "loss" in record] == [1, 2]


def test_sft_asks_for_conversations(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"objective: sft needs conversations, and the corpus p has texts.*prepare it with conversations"):
        make_recipe(one_step(corpus, objective="sft"), Storage(tmp_path))
