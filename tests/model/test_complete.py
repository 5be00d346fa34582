"""Completions take the likeliest token each time, whatever the model's generation_config.json says."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from distlm.model.complete import complete, generate, unheeded


class Numbers:
    """A tokenizer whose texts are the tokens' own numbers."""

    eos_token_id = None

    def decode(self, tokens: torch.Tensor, skip_special_tokens: bool) -> str:
        return " ".join(map(str, tokens.tolist()))

    def batch_decode(self, rows: torch.Tensor) -> list[str]:
        return [self.decode(row, False) for row in rows]


@pytest.mark.parametrize("setting", [{"repetition_penalty": 9.0}, {"no_repeat_ngram_size": 1}, {"suppress_tokens": [*range(20)]},
                                     {"min_new_tokens": 4}, {"num_beams": 3}])
def test_no_setting_of_generate_makes_another_token_the_likeliest(setting: dict[str, object]) -> None:
    torch.manual_seed(3)
    config = AutoConfig.for_model("llama", vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
                                  num_key_value_heads=2, initializer_range=0.5, eos_token_id=None, bos_token_id=None)
    model = AutoModelForCausalLM.from_config(config).eval()
    tokens = [5, 7]
    for _ in range(12):
        tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    assert len(set(tokens[2:])) < 12                       # which a penalty on what was there before would change
    model.generation_config.eos_token_id = tokens[4]
    ends = tokens.index(tokens[4], 2)
    model.generation_config.update(**setting)
    assert generate(model, Numbers(), [[5, 7]], 12, []) == [tokens[2:ends]]
    assert complete(model, Numbers(), [[5, 7]], 12) == [" ".join(map(str, tokens[2:ends + 1]))]


def test_settings_of_generate_that_are_not_applied_are_known(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"repetition_penalty": 1.1, "no_repeat_ngram_size": 0, "top_k": 5}))
    assert unheeded(tmp_path) == {"repetition_penalty": 1.1}
