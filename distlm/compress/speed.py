"""How fast models read prompts and write tokens, and what they weigh."""

import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

BATCHES = (1, 8)
"""Sequences that are decoded together."""
PROMPT, DECODED = 256, 32
"""Tokens of a prompt, and of what follows it, where the context holds them."""


def speeds(models: Mapping[str, Any], context: int, rounds: int = 5) -> dict[str, dict[str, float]]:
    """Tokens per second of each model: `prefill` of a prompt of up to PROMPT tokens, `decode_1` and `decode_8` of so many sequences behind
    it. They take turns, so that a slow spell of the machine meets all, and the middle of all rounds counts; the first warms up."""
    prompt = max(1, min(PROMPT, context // 2))
    decoded = max(1, min(DECODED, context - prompt))
    found: dict[str, dict[str, list[float]]] = {name: {} for name in models}
    for number in range(rounds + 1):
        for name, model in models.items():
            for what, value in once(model, prompt, decoded).items():
                found[name].setdefault(what, []).extend([value] if number else [])
    return {name: {what: statistics.median(values) for what, values in each.items()} for name, each in found.items()}


@torch.inference_mode()
def once(model: Any, prompt: int, decoded: int) -> dict[str, float]:
    """Tokens per second, once each."""
    device = model.get_input_embeddings().weight.device
    tokens = (torch.arange(prompt, device=device) * 7 % model.config.get_text_config().vocab_size).expand(max(BATCHES), -1)
    model(input_ids=tokens[:1, :1], use_cache=False)
    result = {"prefill": prompt / seconds_of(device, model, input_ids=tokens[:1], use_cache=False, logits_to_keep=1)}
    for batch in BATCHES:
        cache = DynamicCache()
        model(input_ids=tokens[:batch], past_key_values=cache, use_cache=True, logits_to_keep=1)
        result[f"decode_{batch}"] = batch * decoded / seconds_of(device, decode, model, tokens[:batch, :1], cache, decoded)
    return result


def decode(model: Any, last: torch.Tensor, cache: DynamicCache, steps: int) -> None:
    """So many steps, each with the likeliest token of the one before."""
    for _ in range(steps):
        last = model(input_ids=last, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)


def seconds_of(device: torch.device, do: Callable[..., Any], *arguments: Any, **more: Any) -> float:
    """What a call takes, with what it leaves for a GPU to do."""
    start = time.perf_counter()
    do(*arguments, **more)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def held_bytes(model: torch.nn.Module) -> int:
    """Bytes of parameters and buffers, tied ones once."""
    tensors = {tensor.data_ptr(): tensor for tensor in [*model.parameters(), *model.buffers()]}
    return sum(tensor.nbytes for tensor in tensors.values())


def file_bytes(folder: Path) -> int:
    """Bytes of a checkpoint's files of weights."""
    return sum(file.stat().st_size for file in [*folder.glob("*.safetensors"), *folder.glob("*.bin")])
