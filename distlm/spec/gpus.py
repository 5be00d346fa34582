"""Kinds of GPUs: what they could compute in a second, and what they hold."""

from dataclasses import dataclass

CUDA_GIB = 1
"""What CUDA and NCCL take of a GPU's memory for themselves, about."""


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU: dense products in bfloat16, or in fp16 where it has none, with float32 sums, a second; float32 products as PyTorch
    makes them unless told otherwise, without TF32; memory."""

    half_flops: float
    fp32_flops: float
    memory_gib: int
    fp8: bool = True
    """It multiplies in float8: compute capability 8.9 and later."""
    bf16: bool = True
    """It multiplies in bfloat16: compute capability 8.0 and later."""

    def multiplies(self, precision: str) -> bool:
        """Whether products of a run in this precision are in its hardware. Those of fp8 are in bf16 too, outside of the hidden layers."""
        return {"fp8": self.fp8 and self.bf16, "bf16": self.bf16}.get(precision, True)


GPUS = {
    "B200": Gpu(2250e12, 75e12, 180),
    "H200 NVL": Gpu(835e12, 60e12, 141),
    "H200": Gpu(989e12, 67e12, 141),
    "H100 PCIe": Gpu(756e12, 51e12, 80),
    "H100 NVL": Gpu(835e12, 60e12, 94),
    "H100": Gpu(989e12, 67e12, 80),
    "L40S": Gpu(362e12, 91.6e12, 48),
    "L4": Gpu(121e12, 30.3e12, 24),
    "A100-SXM4-80GB": Gpu(312e12, 19.5e12, 80, fp8=False),
    "A100 80GB": Gpu(312e12, 19.5e12, 80, fp8=False),
    "A100": Gpu(312e12, 19.5e12, 40, fp8=False),
    "A10G": Gpu(70e12, 35e12, 24, fp8=False),
    "V100-SXM2-32GB": Gpu(125e12, 15.7e12, 32, fp8=False, bf16=False),
    "V100": Gpu(125e12, 15.7e12, 16, fp8=False, bf16=False),
    "T4": Gpu(65e12, 8.1e12, 16, fp8=False, bf16=False),
    "RTX 4090": Gpu(165.2e12, 82.6e12, 24),
    "RTX 3090": Gpu(71e12, 35.6e12, 24, fp8=False),
}
"""Part of a GPU's name, as `torch.cuda.get_device_name` says it -> what NVIDIA's data sheet of it says, without sparsity: of B200 (HGX),
H200 and H100 (SXM, NVL, PCIe), L40S, L4, A100, A10G (as AWS states it), V100 SXM2, T4,
and of the RTX 4090 and 3090 the whitepapers of Ada and GA102 (tensor TFLOPS with FP32 accumulate). The first that is found counts."""


def find_gpu(name: str) -> Gpu | None:
    """The row of GPUS for a device's name; None for one that the table does not know, as a part of a GPU or a laptop's."""
    words = name.replace("-", " ").split()
    if "MIG" in words or "Laptop" in words:
        return None
    for key, gpu in GPUS.items():
        parts = key.replace("-", " ").split()
        if any(words[i:i + len(parts)] == parts for i in range(len(words))):
            return gpu
    return None
