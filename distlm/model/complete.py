"""What a model adds to a text, taking the likeliest token each time.

    prompts = encode_prompts(tokenizer_folder, ["Once upon a time"])
    check_prompts(prompts, max_tokens=64, context=256)
    complete(model, tokenizer, prompts, max_tokens=64)
    generate(model, tokenizer, prompts, max_tokens=64, stops=["\\n"])          # tokens, of all prompts together
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distlm.errors import InputError
from distlm.storage import read_json

UNHEEDED = {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "encoder_repetition_penalty": 1.0, "min_new_tokens": 0, "min_length": 0,
            "num_beams": 1, "suppress_tokens": None, "begin_suppress_tokens": None, "bad_words_ids": None, "sequence_bias": None,
            "forced_eos_token_id": None, "exponential_decay_length_penalty": None}
"""Settings of generation_config.json by which another token than the likeliest is taken, with what turns them off. Neither what is here nor
an endpoint applies them: a model completes a text in the same way everywhere."""


def unheeded(model: Path) -> dict[str, Any]:
    """Those of UNHEEDED that a model's folder sets."""
    path = model / "generation_config.json"
    settings = read_json(path) if path.exists() else {}
    return {name: settings[name] for name, off in UNHEEDED.items() if settings.get(name) not in (None, off)}


def end_ids(told: int | Sequence[int] | None) -> list[int]:
    """Tokens that end a text, as a model's settings tell them: one, several or none."""
    return [] if told is None else [told] if isinstance(told, int) else [*told]


def encode_prompts(tokenizer: Path, texts: Sequence[str]) -> list[list[int]]:
    """The tokens of each text by a tokenizer's folder; special tokens are written into it by name, and none is added."""
    import tokenizers

    made = tokenizers.Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    return [list(made.encode(text, add_special_tokens=False).ids) for text in texts]


def check_prompts(prompts: list[list[int]], max_tokens: int, context: int | None, where: str = "prompts") -> None:
    """Raises InputError for a prompt that has no token, or that leaves no room for its completion."""
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise InputError("the tokenizer makes no token of it", where=f"{where}.{i}", remedy="write more, or leave it out")
        if context is not None and len(prompt) + max_tokens > context:
            raise InputError(f"{len(prompt)} tokens and {max_tokens} of max_tokens are more than the {context} of the model's context",
                             where=f"{where}.{i}", remedy="shorten it, or lower max_tokens")


def complete(model: Any, tokenizer: Any, prompts: list[list[int]], max_tokens: int, together: bool = False) -> list[str]:
    """The text that a transformers model, which is in evaluation mode, adds to each prompt. `together`: other ranks hold parts of the model
    and make the same calls."""
    import torch

    texts = []
    for prompt in prompts:
        tokens = torch.tensor([prompt], device=model.device)
        made = model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=max_tokens, do_sample=False, use_cache=True,
                              synced_gpus=together, **UNHEEDED)
        texts.append(str(tokenizer.decode(made[0, len(prompt):], skip_special_tokens=True)))
    return texts


def generate(model: Any, tokenizer: Any, prompts: list[list[int]], max_tokens: int, stops: Sequence[str]) -> list[list[int]]:
    """The tokens that a transformers model, which is in evaluation mode, adds to prompts that go through it together, filled up at their
    beginnings: until a token that ends a text, which is left out, or until the text holds any of `stops`, and it may go on behind that."""
    import torch
    from transformers import StoppingCriteria, StoppingCriteriaList

    width, told = max(map(len, prompts)), model.generation_config.eos_token_id
    ends = end_ids(tokenizer.eos_token_id if told is None else told)
    tokens = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)

    class Stopped(StoppingCriteria):                       # the library's own looks into the prompt as well
        def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
            texts = tokenizer.batch_decode(input_ids[:, width:])
            return torch.tensor([any(stop in text for stop in stops) for text in texts], device=input_ids.device)

    made = model.generate(tokens, attention_mask=mask, max_new_tokens=max_tokens, do_sample=False, use_cache=True,
                          eos_token_id=ends or None, pad_token_id=ends[0] if ends else 0,
                          stopping_criteria=StoppingCriteriaList([Stopped()]), **UNHEEDED)[:, width:].tolist()
    return [row[:next((i for i, token in enumerate(row) if token in ends), len(row))] for row in made]
