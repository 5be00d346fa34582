"""The arithmetic of a step, and what share of a processor's peak it reaches.

    mfu(tokens_per_s=410_000, flops_per_token=7.6e9, peak=8 * peak_flops("NVIDIA H100 80GB HBM3"))      # 0.39
"""

import functools
import time
from typing import Any

from distlm.spec.gpus import find_gpu


def peak_flops(name: str, precision: str = "bf16") -> float | None:
    """Operations a second of a GPU by its name, None where the table does not know it. For fp8 they are those of bf16, in which attention
    and the last layer compute: so MFU tells what fp8 gains."""
    gpu = find_gpu(name)
    return None if gpu is None else gpu.fp32_flops if precision == "fp32" else gpu.bf16_flops


def flops_per_token(parameters: float, layers: int, width: int, context: int) -> float:
    """Forward and backward: 6 N, and causal attention's 6 L T d (Chowdhery et al. 2022, appendix B, with half of the scores masked). N: the
    parameters that are multiplied by; what is computed again in the backward pass does not count."""
    return 6.0 * parameters + 6.0 * layers * context * width


def config_flops(config: Any, sizes: dict[str, int], context: int, trained: dict[str, int] | None = None) -> float:
    """`flops_per_token` of a model by its configuration and its parameters' sizes. Where those `trained` with an adapter are given, the
    others have no gradient, which is a third of their arithmetic."""
    text, parameters = config.get_text_config(), float(multiplied(config, sizes))
    if trained is not None:
        parameters = parameters * 2 / 3 + sum(size / 3 if name in sizes else size for name, size in trained.items())
    return flops_per_token(parameters, text.num_hidden_layers, text.hidden_size, context)


def forward_flops(config: Any, sizes: dict[str, int], context: int) -> float:
    """Of a forward pass alone: a third of what `config_flops` counts."""
    return config_flops(config, sizes, context) / 3


def multiplied(config: Any, sizes: dict[str, int]) -> int:
    """The parameters that a token is multiplied by: all but looked-up embeddings, and of a mixture of experts those that a token goes to.

    `sizes`: the elements of each parameter by name, tied ones once, as `model.build.parameter_sizes` has them."""
    text = config.get_text_config()
    tied = bool(getattr(text, "tie_word_embeddings", False))
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    experts = next((getattr(text, name) for name in names if getattr(text, name, None)), 0)
    share = min(1.0, (getattr(text, "num_experts_per_tok", None) or experts) / experts) if experts else 1.0
    total = 0.0
    for name, size in sizes.items():
        looked_up = name.endswith(("wpe.weight", "embed_positions.weight")) or (
            not tied and name.endswith(("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")))
        total += 0 if looked_up else size * (share if ".experts." in name else 1.0)
    return round(total)


def mfu(tokens_per_s: float, flops_per_token: float, peak: float) -> float:
    """Model FLOPs utilization (Chowdhery et al. 2022, section 4.1): what the model needs over what the processors could do. `peak` is that
    of all workers together."""
    return tokens_per_s * flops_per_token / peak


@functools.lru_cache
def measured_peak(precision: str = "fp32") -> float:
    """Operations a second that this machine's processor reaches in a product of matrices of 1,024 rows, with all its cores: the best of
    three after one to warm up, a few tenths of a second in all."""
    import torch

    a = torch.randn(1024, 1024).to(torch.bfloat16 if precision == "bf16" else torch.float32)
    best = float("inf")
    for i in range(4):
        started = time.perf_counter()
        torch.mm(a, a)
        if i:
            best = min(best, time.perf_counter() - started)
    return 2 * 1024**3 / best
