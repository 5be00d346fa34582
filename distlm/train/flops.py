"""The arithmetic of a step, and what share of a processor's peak it reaches.

    mfu(tokens_per_s=410_000, flops_per_token=7.6e9, peak=8 * peak_flops("NVIDIA H100 80GB HBM3"))      # 0.39
"""

import functools
import os
import time
from typing import Any

from distlm.model.encoder import is_encoder
from distlm.spec.gpus import find_gpu


def peak_flops(name: str, precision: str = "bf16") -> float | None:
    """Operations a second of a GPU by its name, None where the table does not know it or it has no such products. For fp8 they are those of
    bf16, in which attention and the last layer compute: so MFU tells what fp8 gains."""
    gpu = find_gpu(name)
    if gpu is None or (precision == "bf16" and not gpu.bf16):
        return None
    return gpu.fp32_flops if precision == "fp32" else gpu.half_flops


def config_flops(config: Any, sizes: dict[str, int], context: int, trained: dict[str, int] | None = None) -> float:
    """Operations of a token, forward and backward, of a model by its configuration and its parameters' sizes: 6 N, where N are the
    parameters that are multiplied by, and `attention_flops` (Chowdhery et al. 2022, appendix B). What is computed again in the backward
    pass does not count. Where those `trained` with an adapter are given, the others have no gradient, which is a third of their
    arithmetic."""
    parameters = float(multiplied(config, sizes))
    if trained is not None:
        parameters = parameters * 2 / 3 + sum(size / 3 if name in sizes else size for name, size in trained.items())
    return 6 * parameters + attention_flops(config, context)


def attention_flops(config: Any, context: int) -> float:
    """Operations of a token in attention's own products, forward and backward: 6 h (q + v) for each key that a token sees on average and
    each layer, with h heads whose queries have q numbers and values v: 12 h q, where both are alike. Causal, a token sees half of the
    `context`; the half that is masked does not count. With a sliding window of w < context tokens it sees w - w² / 2 context, in chunks of
    w tokens w / 2. In an encoder it sees what stands behind it too. Layers of another kind, such as recurrent ones, have no such
    products."""
    text = config.get_text_config()
    heads = getattr(text, "num_attention_heads", None) or 0
    width = getattr(text, "head_dim", None) or (text.hidden_size // heads if heads else 0)
    both = (getattr(text, "qk_head_dim", None) or width) + (getattr(text, "v_head_dim", None) or width)
    return 6.0 * heads * both * sum(keys_seen(config, context))


def keys_seen(config: Any, context: int) -> list[float]:
    """The keys that a token of a sequence sees on average, by layer."""
    text = config.get_text_config()
    window = getattr(text, "sliding_window", None)
    kinds = getattr(text, "layer_types", None) or ["sliding_attention" if window else "full_attention"] * text.num_hidden_layers
    seen, sides = [], 2 if is_encoder(config) else 1
    for kind in kinds:
        width = window if "sliding" in kind else getattr(text, "attention_chunk_size", None) if "chunked" in kind else None
        width = min(width or context, context)
        recurrent = "linear" in kind or not ("attention" in kind or kind == "hybrid")
        seen.append(0.0 if recurrent else width / 2 if "chunked" in kind else sides * (width - width**2 / (2 * context)))
    return seen


def forward_flops(config: Any, sizes: dict[str, int], context: int) -> float:
    """Of a forward pass alone: a third of what `config_flops` counts."""
    return config_flops(config, sizes, context) / 3


def multiplied(config: Any, sizes: dict[str, int]) -> int:
    """The parameters that a token is multiplied by: all but looked-up embeddings, and of a mixture of experts those that a token goes to.

    `sizes`: the elements of each parameter by name, tied ones once, as `model.build.parameter_sizes` has them."""
    text = config.get_text_config()
    tied = bool(getattr(text, "tie_word_embeddings", False)) and not config.problem_type   # a classifier has no such last layer
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    experts = next((getattr(text, name) for name in names if getattr(text, name, None)), 0)
    share = min(1.0, (getattr(text, "num_experts_per_tok", None) or experts) / experts) if experts else 1.0
    total = 0.0
    for name, size in sizes.items():
        looked_up = name.endswith(("wpe.weight", "embed_positions.weight", "position_embeddings.weight", "token_type_embeddings.weight")) \
            or (not tied and name.endswith(("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight",
                                            "tok_embeddings.weight")))
        total += 0 if looked_up else size * (share if ".experts." in name else 1.0)
    return round(total)


def mfu(tokens_per_s: float, flops_per_token: float, peak: float) -> float:
    """Model FLOPs utilization (Chowdhery et al. 2022, section 4.1): what the model needs over what the processors could do. `peak` is that
    of all workers together."""
    return tokens_per_s * flops_per_token / peak


@functools.lru_cache
def measured_peak(precision: str = "fp32", threads: int | None = None) -> float:
    """Operations a second that so many threads of this machine's processor, or one for each of its cores, reach in a product of matrices of
    1,024 rows: the best of those that fit into a quarter of a second, three at least, after one to warm up."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads or os.cpu_count() or 1)
    try:
        a = torch.randn(1024, 1024).to(torch.bfloat16 if precision == "bf16" else torch.float32)
        torch.mm(a, a)
        times, end = list[float](), time.perf_counter() + 0.25
        while len(times) < 3 or time.perf_counter() < end:
            started = time.perf_counter()
            torch.mm(a, a)
            times.append(time.perf_counter() - started)
    finally:
        torch.set_num_threads(before)
    return 2 * 1024**3 / min(times)
