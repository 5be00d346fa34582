"""How a model, its states and its sequences are divided over workers, and what cannot be."""

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from distlm.spec.base import Part, Rule, without_effect

if TYPE_CHECKING:
    from distlm.spec.train import TrainSpec

DEEPSPEED_KEYS = {"train_batch_size": "batch.global_sequences", "train_micro_batch_size_per_gpu": "batch.micro_sequences",
         "gradient_accumulation_steps": "batch.micro_sequences", "gradient_clipping": "optimizer.clip", "optimizer": "optimizer",
         "scheduler": "schedule", "bf16": "precision", "fp16": "precision",
         "amp": "precision", "torch_autocast": "precision",
         "communication_data_type": "reduce_precision", "data_types.grad_accum_dtype": "reduce_precision",
         "activation_checkpointing": "activation_checkpointing", "zero_optimization.stage": "sharding.zero",
         "zero_optimization.cpu_offload": "sharding.offload", "zero_optimization.cpu_offload_param": "sharding.offload",
         "tensor_parallel": "sharding.tensor_parallel", "sequence_parallel_size": "sharding.sequence_parallel"}
"""DeepSpeed's keys that the spec sets elsewhere, and where."""


class Offload(Part):
    """What lies outside of the GPUs' memory (Ren et al. 2021; Rajbhandari et al. 2021): the same steps, slower. A run on CPUs makes them
    too and saves no memory."""

    optimizer: Literal["cpu", "nvme"] | None = None
    """Where the optimizer's states and the fp32 weights lie, which are updated on the CPU: cpu from ZeRO stage 1 on, nvme with stage 3."""
    parameters: Literal["cpu"] | None = None
    """Where the weights lie until a layer needs them; with ZeRO stage 3. Not on nvme: DeepSpeed's buffers for it fail."""
    path: Annotated[str | None, Field(min_length=1)] = None
    """A folder on a fast disk of every node, for nvme."""

    @model_validator(mode="after")
    def _rules(self) -> "Offload":
        if not self.optimizer and not self.parameters:
            raise Rule("", "neither optimizer nor parameters is given; give one of them, or leave offload out")
        if self.optimizer == "nvme" and not self.path:
            raise Rule("path", "optimizer: nvme needs a folder on a fast disk; give path, or set optimizer: cpu")
        if self.path and self.optimizer != "nvme":
            raise Rule("path", f"{self.path} has no effect where nothing lies on nvme; leave it out")
        return self


class ZeroPlusPlus(Part):
    """ZeRO++ (Wang et al. 2023): less traffic between nodes under ZeRO stage 3."""

    hierarchical_partition: Annotated[int, Field(ge=1)] = 1
    """Weights are kept a second time over groups of so many workers, those of a node, from which the backward pass gathers them. A divisor
    of scale.workers; 1 for none."""
    quantized_weights: bool = False
    """Weights are gathered in 8 bits, on GPUs; steps are no longer exactly those of other stages."""
    quantized_gradients: bool = False
    """Gradients are reduced in 4 bits, on GPUs; steps are no longer exactly those of other stages."""


class Sharding(Part):
    """How DeepSpeed divides the model over the workers."""

    zero: Literal[0, 1, 2, 3] = 0
    """ZeRO stage: 1 shards optimizer states, 2 gradients too, 3 parameters too (Rajbhandari et al. 2020)."""
    tensor_parallel: Annotated[int, Field(ge=1)] = 1
    """Neighbouring workers that hold one model together, a part of each layer's matrices on every one (Shoeybi et al. 2019), and read the
    same samples; embeddings and the last layer are whole on each. A divisor of scale.workers, of the model's attention and key-value heads
    and of its feed-forward width. ZeRO divides the states of each part over those workers that have it."""
    sequence_parallel: Annotated[int, Field(ge=1)] = 1
    """Neighbouring workers that divide each sequence among them (Jacobs et al. 2023): each computes with its part of the tokens, and in
    attention with its part of the heads over all of them. Activations take so much less memory, weights as much as without. A divisor of
    scale.workers, of the context and of the model's attention and key-value heads. With tensor_parallel, those that divide a sequence hold
    the same part of the model, and the product of both is a divisor of the workers and heads."""
    offload: Offload | None = None
    """What lies in the host's memory or on its disks. Left out, all is on the device that computes."""
    zeropp: ZeroPlusPlus = ZeroPlusPlus()
    """Less traffic between nodes, with ZeRO stage 3."""
    deepspeed: dict[str, Any] = {}
    """Raw DeepSpeed keys for experts. A key that the spec sets elsewhere is refused."""

    @model_validator(mode="after")
    def _rules(self) -> "Sharding":
        for key, ours in DEEPSPEED_KEYS.items():
            section, _, name = key.partition(".")
            raw = self.deepspeed.get(section, {})
            if name and not isinstance(raw, dict):
                raise Rule(f"deepspeed.{section}", f"{raw!r} is no mapping")
            if name in raw if name else section in self.deepspeed:
                raise Rule(f"deepspeed.{key}", f"contradicts {ours}, which sets it; leave it out and set {ours}")
        if self.zero < 3:
            without_effect(self, f"with zero: {self.zero}: only stage 3 shards weights", "zeropp")
        if self.offload is None:
            return self
        if self.offload.parameters and self.zero < 3:
            raise Rule("offload.parameters", f"{self.offload.parameters} needs weights that are sharded; set zero: 3, or leave it out")
        least = 3 if self.offload.optimizer == "nvme" else 1
        if self.offload.optimizer and self.zero < least:
            raise Rule("offload.optimizer", f"{self.offload.optimizer} needs ZeRO stage {least} at least, and zero is {self.zero}; set "
                                            f"zero: {least}, or leave it out")
        return self


ZEROPP_KEYS = {"hierarchical_partition": "zero_hpz_partition_size", "quantized_weights": "zero_quantized_weights",
               "quantized_gradients": "zero_quantized_gradients"}
"""Keys of `sharding.zeropp` and DeepSpeed's."""


def check_offload(spec: "TrainSpec") -> None:
    """Raises Rule where raw keys contradict `sharding.offload`, where what is offloaded cannot be averaged, and for what is not proved."""
    offload, averaged = spec.sharding.offload, spec.ema or spec.checkpoint.average > 1
    for ours, key in (("optimizer", "offload_optimizer"), ("parameters", "offload_param")):
        device = getattr(offload, ours, None)
        raw = spec.sharding.deepspeed.get("zero_optimization", {}).get(key, {})
        twice = [name for name in ("device", "nvme_path") if isinstance(raw, dict) and name in raw]
        if device and twice:
            raise Rule(f"sharding.deepspeed.zero_optimization.{key}.{twice[0]}",
                       f"contradicts sharding.offload.{ours}, which sets it; leave one of them out")
        on_disk = "nvme" in (device, raw.get("device") if isinstance(raw, dict) else None)
        where = f"sharding.offload.{ours}" if device else f"sharding.deepspeed.zero_optimization.{key}"
        if on_disk and spec.optimizer.name == "muon":
            raise Rule(where, "nvme is not proved to make the same steps with muon; lay it on cpu, or take adamw")
        if averaged and on_disk:
            raise Rule(where, "weights on disks cannot be averaged; leave out ema and checkpoint.average, or set it to cpu" if device else
                       "weights on disks cannot be averaged; leave out ema and checkpoint.average, or set device: cpu")
        if on_disk and not device and not raw.get("nvme_path"):
            raise Rule(where, "device: nvme needs nvme_path, a folder on a fast disk of every node")
        if on_disk and ours == "parameters":
            raise Rule(where, "nvme ends runs: DeepSpeed's buffers for weights from disks run out, or are taken twice; lay them on cpu")


def quantizes_gradients(spec: "TrainSpec") -> bool:
    """Whether gradients are reduced in 4 bits, also by raw keys."""
    return bool(spec.sharding.zeropp.quantized_gradients
                or spec.sharding.deepspeed.get("zero_optimization", {}).get("zero_quantized_gradients"))


def offloads_optimizer(spec: "TrainSpec") -> bool:
    """Whether the optimizer's states lie outside of the device, also by raw keys."""
    raw = spec.sharding.deepspeed.get("zero_optimization", {}).get("offload_optimizer", {})
    return bool((spec.sharding.offload and spec.sharding.offload.optimizer)
                or (isinstance(raw, dict) and raw.get("device") in ("cpu", "nvme")))


def check_divides(key: str, size: int, workers: int, what: str = "workers") -> None:
    """Raises Rule where workers, or what they are, cannot be put into groups of `size`."""
    if workers % size:
        near = [n for n in range(1, workers + 1) if workers % n == 0]
        raise Rule(key, f"{size} does not divide {workers} {what}; try {', '.join(map(str, near))}")


def check_zeropp(spec: "TrainSpec") -> None:
    """Raises Rule where ZeRO++ does not fit the workers, or raw keys contradict it."""
    zeropp, workers = spec.sharding.zeropp, spec.scale.workers
    check_divides("sharding.zeropp.hierarchical_partition", zeropp.hierarchical_partition, workers)
    for ours, theirs in ZEROPP_KEYS.items():
        if getattr(zeropp, ours) == type(zeropp).model_fields[ours].default:
            continue
        if ours != "hierarchical_partition" and not spec.scale.gpus_per_worker:
            raise Rule(f"sharding.zeropp.{ours}", "DeepSpeed has its kernels for GPUs alone, and scale.gpus_per_worker is 0; leave it out")
        if theirs in spec.sharding.deepspeed.get("zero_optimization", {}):
            raise Rule(f"sharding.deepspeed.zero_optimization.{theirs}", f"contradicts sharding.zeropp.{ours}, which sets it; leave one of "
                                                                         "them out")


def check_tensor_parallel(spec: "TrainSpec", zero: int) -> None:
    """Raises Rule where `sharding.tensor_parallel` does not fit the workers, or what else the spec asks for under a ZeRO stage."""
    degree, workers = spec.sharding.tensor_parallel, spec.scale.workers
    if degree == 1:
        return
    check_divides("sharding.tensor_parallel", degree, workers)
    if spec.precision != "fp32" and not zero:
        raise Rule("sharding.zero", f"0 cannot be with {spec.precision} and tensor_parallel: {degree}, where DeepSpeed's norm of the "
                                    "gradient has the parts of a group's first worker alone; set zero: 1, or take fp32")
    if spec.optimizer.name in ("muon", "adafactor"):
        raise Rule("optimizer.name", f"{spec.optimizer.name} needs whole matrices, and tensor_parallel: {degree} cuts them; take adamw, "
                                     "lion or sgd")
    raw = spec.sharding.deepspeed.get("zero_optimization", {})
    for where, given in (("compile", spec.compile), ("sharding.offload", spec.sharding.offload),
                         ("sharding.deepspeed.zero_optimization", any(key.startswith("offload") for key in raw))):
        if given:
            raise Rule(where, f"is not proved to make the same steps with tensor_parallel: {degree}; leave one of them out")


def check_sequence_parallel(spec: "TrainSpec") -> None:
    """Raises Rule where `sharding.sequence_parallel` does not fit the workers, or what else the spec asks for."""
    degree, tensor = spec.sharding.sequence_parallel, spec.sharding.tensor_parallel
    if degree == 1:
        return
    check_divides("sharding.sequence_parallel", degree, spec.scale.workers // tensor,
                  "workers" if tensor == 1 else f"groups of {tensor} workers that hold a model together")
    if spec.compile:
        raise Rule("compile", f"is not proved to make the same steps with sequence_parallel: {degree}; leave one of them out")
