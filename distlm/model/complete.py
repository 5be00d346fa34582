"""What a model adds to a text, taking the likeliest token each time.

    prompts = encode_prompts(tokenizer_folder, ["Once upon a time"])
    check_prompts(prompts, max_tokens=64, context=256)
    complete(model, tokenizer, prompts, max_tokens=64)
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distlm.errors import InputError


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
                              synced_gpus=together)
        texts.append(str(tokenizer.decode(made[0, len(prompt):], skip_special_tokens=True)))
    return texts
