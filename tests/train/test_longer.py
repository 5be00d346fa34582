"""A checkpoint goes on with longer windows than it was made for, where its family's positions go on."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from distlm.corpus.stream import Windows
from distlm.errors import InputError, SpecError
from distlm.model.build import build_model, model_config
from distlm.model.export import export_model
from distlm.spec.adapter import Adapter
from distlm.storage import Storage, read_json, write_json
from distlm.train.recipe import make_recipe
from tests.train.ranks import CONTEXT, losses, losses_by_hand, make_corpus, metrics, run_ranks, spec

SHORT: dict[str, Any] = {"duration": {"steps": 6}, "schedule": {}, "evaluate": {"every_steps": 6}, "checkpoint": {}}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Corpora with windows of one length and of twice as much."""
    root = tmp_path_factory.mktemp("longer")
    make_corpus(root / "short")
    make_corpus(root / "long", context=2 * CONTEXT)
    return root


def test_a_run_goes_on_with_a_longer_context_and_its_export_says_so(root: Path) -> None:
    run_ranks({root / "base": spec(root / "short", **SHORT)})
    assert read_json(root / "base" / "export" / "config.json")["max_position_embeddings"] == CONTEXT
    source = {"from": str(root / "base")}
    with pytest.raises(InputError, match=r"takes 16 tokens of context and the corpus has windows of 32; prepare the corpus with context: "
                                         r"16, or set model\.context: 32 where its positions are rotary"):
        make_recipe(spec(root / "long", model=source), Storage(root))
    with pytest.raises(SpecError, match=r"model\.context: 64 is not the context of the corpus long, 32"):
        make_recipe(spec(root / "long", model={**source, "context": 64}), Storage(root))
    given = spec(root / "long", model={"from": str(root / "base" / "export"), "context": 2 * CONTEXT}, **SHORT)
    adapted = given.model_copy(update={"adapter": Adapter(rank=4)})
    run_ranks({root / "longer": given, root / "adapted": adapted})
    np.testing.assert_allclose(losses(root / "longer"), losses_by_hand(given, root / "long"), rtol=1e-5)
    model = AutoModelForCausalLM.from_pretrained(root / "base" / "export")
    windows = Windows(root / "long", "val")
    tokens = torch.from_numpy(windows.read(*windows.first(len(windows))).astype(np.int64))
    with torch.no_grad():
        first = model(input_ids=tokens, labels=tokens).loss.item()
    for run in ("longer", "adapted"):
        assert read_json(root / run / "export" / "config.json")["max_position_embeddings"] == 2 * CONTEXT
        assert metrics(root / run)[0]["val_loss"] == pytest.approx(first, rel=1e-5), "the weights that it begins with are the base's"


def test_positions_that_end_are_refused(root: Path, tmp_path: Path) -> None:
    families: dict[str, dict[str, Any]] = {
        "gpt2": {"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 4},
        "yarn": {"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}}
    for name, config in families.items():
        given = spec(root / "short", model={"config": config})
        shape = make_recipe(given, Storage(root)).shape
        export_model(build_model(given.model, model_config(given.model, shape), 0), None, root / "short" / "tokenizer", tmp_path / name, {})
    file = tmp_path / "yarn" / "config.json"
    write_json(file, {**read_json(file), "rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0,
                                                             "original_max_position_embeddings": 8}})
    for name, message in (("gpt2", r"model\.context: the gpt2 family has learned a row of transformer\.wpe\.weight for each of its tokens "
                                   "of context, and no more; leave it out, and prepare the corpus with context: 16, or take a family with"),
                          ("yarn", "its rotations are scaled by yarn, which goes by the tokens that it takes")):
        longer = spec(root / "long", model={"from": str(tmp_path / name), "context": 2 * CONTEXT})
        with pytest.raises(InputError, match=message):
            make_recipe(longer, Storage(root))
        fits = spec(root / "short", model={"from": str(tmp_path / name), "context": CONTEXT})
        assert make_recipe(fits, Storage(root)).shape.context == CONTEXT
