"""Each family of models trains, goes on from its checkpoint bit-equal, and exports what was trained."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distlm.corpus.stream import Windows
from distlm.storage import read_json
from tests.train.ranks import losses, make_corpus, metrics, run_ranks, spec

WIDTHS = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = {**WIDTHS, "num_key_value_heads": 2}
HEADS = {**GROUPED, "head_dim": 8}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": GROUPED, "mistral": GROUPED, "qwen3": HEADS, "gemma": HEADS, "olmo2": GROUPED, "gpt_neox": WIDTHS,
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4}, "mixtral": {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {**GROUPED, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1}}
SOME = ("gpt2", "mixtral")
EXPORTED = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "distlm.json"}
"""What transformers and vLLM load a model from, which is told apart by its `architectures`, and what it is made of."""


@pytest.mark.parametrize(("zero", "families"), [(0, SOME), pytest.param(0, tuple(sorted({*FAMILIES} - {*SOME})), marks=pytest.mark.slow),
                                                pytest.param(3, tuple(FAMILIES), marks=pytest.mark.slow)])
def test_every_family_trains_goes_on_and_exports_what_was_trained(zero: int, families: tuple[str, ...], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    corpus = make_corpus(tmp_path / "c")
    runs = {tmp_path / family: spec(corpus, model={"config": {"model_type": family, **FAMILIES[family]}}, duration={"steps": 4},
                                    schedule={}, scale={"workers": 2}, sharding={"zero": zero}, evaluate={"every_steps": 2},
                                    checkpoint={"every_steps": 2}) for family in families}
    run_ranks(runs)
    before = {run: (losses(run), (run / "export" / "model.safetensors").read_bytes()) for run in runs}
    for run in runs:
        shutil.rmtree(run / "checkpoints" / "step-000004")
        shutil.rmtree(run / "export")
    run_ranks(runs)
    tokens = torch.from_numpy(Windows(corpus, "val").head(7).astype(np.int64))
    for run, (expected, weights) in before.items():
        assert losses(run) == expected and losses(run)[-1] < losses(run)[0], run.name
        assert (run / "export" / "model.safetensors").read_bytes() == weights, run.name
        model = AutoModelForCausalLM.from_pretrained(run / "export").eval()
        assert {path.name for path in (run / "export").iterdir()} == EXPORTED, run.name
        assert read_json(run / "export" / "config.json")["architectures"] == [type(model).__name__], run.name
        assert model.config.model_type == run.name
        with torch.no_grad():
            logits = model(input_ids=tokens[:, :-1]).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).item()
            assert loss == pytest.approx(metrics(run)[-1]["val_loss"], rel=1e-5), run.name
            if zero == 0:
                file = run / "checkpoints" / "step-000004" / "state" / "mp_rank_00_model_states.pt"
                state = torch.load(file, weights_only=False)["module"]
                names = model.load_state_dict({name.removeprefix("model."): value for name, value in state.items()}, strict=False)
                tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
                assert not names.unexpected_keys and {*names.missing_keys} <= tied, run.name
                assert torch.equal(model(input_ids=tokens[:, :-1]).logits, logits), run.name
