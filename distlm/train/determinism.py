"""`deterministic: true`: on a GPU every sum in one order, so that a run that goes on is bit-equal there too.

    RuntimeEnv(env_vars=ENVIRONMENT)                       # of a worker, before CUDA starts
    use_deterministic(True)                                # in the worker, before the model is built
"""

import torch

ENVIRONMENT = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "NCCL_ALGO": "^NVLS,NVLSTree,CollNetDirect,CollNetChain"}
"""cuBLAS has memory of its own for each stream, with which its products are bit-equal (cuBLAS documentation, "Results reproducibility");
NCCL adds on the GPUs and not in switches, whose order differs from call to call (NVIDIA/nccl#1497). Both are read once."""


def use_deterministic(on: bool) -> None:
    """Let PyTorch take kernels that add in one order from here on, or whichever are fastest.

    PyTorch then keeps cuDNN's attention out, divides no keys in its memory-efficient kernel (a document mask), lets FlashAttention's
    gradient be added up block after block, adds scattered gradients after sorting them, and lets the compiler choose nothing by timing.
    An operation that has no such kernel raises RuntimeError with its name. On CPU gradients are the same with and without.
    Read in PyTorch's sources (sdp_utils.cpp, attention_backward.cu), and not yet measured on a GPU (docs/experiments.md)."""
    torch.use_deterministic_algorithms(on)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # which costs time, and finds faults
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = on, False
