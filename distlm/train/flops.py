"""The arithmetic of a step, and what share of a processor's peak it reaches.

    mfu(tokens_per_s=410_000, flops_per_token=7.6e9, peak=8 * peak_flops("NVIDIA H100 80GB HBM3"))      # 0.39
"""

import functools
import time
from dataclasses import dataclass
from typing import Any

GIB = 1 << 30


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU: dense products in bfloat16 with float32 sums, a second; float32 products as PyTorch makes them unless told otherwise,
    without TF32; memory."""

    bf16_flops: float
    fp32_flops: float
    memory_gib: int


GPUS = {
    "B200": Gpu(2250e12, 75e12, 180),
    "H200 NVL": Gpu(835e12, 60e12, 141),
    "H200": Gpu(989e12, 67e12, 141),
    "H100 PCIe": Gpu(756e12, 51e12, 80),
    "H100 NVL": Gpu(835e12, 60e12, 94),
    "H100": Gpu(989e12, 67e12, 80),
    "L40S": Gpu(362e12, 91.6e12, 48),
    "L4": Gpu(121e12, 30.3e12, 24),
    "A100-SXM4-80GB": Gpu(312e12, 19.5e12, 80),
    "A100 80GB": Gpu(312e12, 19.5e12, 80),
    "A100": Gpu(312e12, 19.5e12, 40),
    "A10G": Gpu(70e12, 35e12, 24),
    "V100": Gpu(125e12, 15.7e12, 16),
    "RTX 4090": Gpu(165.2e12, 82.6e12, 24),
    "RTX 3090": Gpu(71e12, 35.6e12, 24),
}
"""Part of a GPU's name, as `torch.cuda.get_device_name` says it -> what NVIDIA's data sheet of it says, without sparsity: of B200 (HGX),
H200 and H100 (SXM, NVL, PCIe), L40S, L4, A100, A10G (as AWS states it), V100 SXM2 (its tensor cores take fp16: bfloat16 is slower there),
and of the RTX 4090 and 3090 the whitepapers of Ada and GA102 (tensor TFLOPS with FP32 accumulate). The first that is found counts."""


def find_gpu(name: str) -> Gpu | None:
    """The row of GPUS for a device's name; None for one that the table does not know."""
    words = name.replace("-", " ").split()
    for key, gpu in GPUS.items():
        parts = key.replace("-", " ").split()
        if any(words[i:i + len(parts)] == parts for i in range(len(words))):
            return gpu
    return None


def peak_flops(name: str, precision: str = "bf16") -> float | None:
    """Operations a second of a GPU by its name, None where the table does not know it."""
    gpu = find_gpu(name)
    return None if gpu is None else gpu.bf16_flops if precision == "bf16" else gpu.fp32_flops


def flops_per_token(parameters: int, layers: int, width: int, context: int) -> float:
    """Forward and backward: 6 N, and causal attention's 6 L T d (Chowdhery et al. 2022, appendix B, with half of the scores masked). N: the
    parameters that are multiplied by; what is computed again in the backward pass does not count."""
    return 6.0 * parameters + 6.0 * layers * context * width


def config_flops(config: Any, sizes: dict[str, int], context: int) -> float:
    """`flops_per_token` of a model by its configuration and its parameters' sizes."""
    text = config.get_text_config()
    return flops_per_token(multiplied(config, sizes), text.num_hidden_layers, text.hidden_size, context)


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
