"""What a worker holds at the peak of a step, by part, before anything is allocated.

    load = make_load(spec, config, shape, num_parameters(config), micro_sequences=8, accumulation=4)
    found = peak_memory(load)
    print(found.total, found.parts(), advice(load, 80 * GIB))

The formulas follow what the code does: DeepSpeed 0.19 under `zero.deepspeed_config`, the loss of `model/loss.py`, attention of
`model/attention.py` on CPU and PyTorch's fused kernels on GPU. `benchmarks/memory.py` prints them beside what is measured.
"""

import contextlib
import functools
import itertools
import math
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from distlm.errors import SpecError
from distlm.model.adapter import adapter_sizes
from distlm.model.attention import num_products
from distlm.model.build import Shape, num_parameters, recomputable, skeleton
from distlm.model.distill import teacher_config
from distlm.model.encoder import is_encoder
from distlm.model.loss import BLOCK_ELEMENTS, CHUNK_ELEMENTS, PLAIN_HEADS
from distlm.model.nf4 import BITS, nf4_elements
from distlm.model.tensor import divide
from distlm.spec.base import Rule
from distlm.spec.batch import divisors
from distlm.spec.gpus import CUDA_GIB, find_gpu
from distlm.spec.optimizer import check_optimizer
from distlm.spec.sharding import check_tensor_parallel
from distlm.spec.train import TrainSpec, check_base, check_compile
from distlm.train.activations import Activations, measure_activations
from distlm.train.zero import divided_first, made_once, zero_options

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

STATE_BYTES = {"adamw": 8, "muon": 8, "lion": 4, "adafactor": 0, "sgd": 4}
"""What an optimizer keeps of a parameter, in float32: one moment or two; of muon the most, since its matrices have one. Adafactor's rows
and columns are too few to count."""
REDUCE_BUCKET, MAX_LIVE = 500_000_000, 1_000_000_000
"""Elements, DeepSpeed's defaults: zero_optimization.reduce_bucket_size, and stage3_max_live_parameters and stage3_max_reuse_distance."""
GIB = 1 << 30
CUDA_BYTES = CUDA_GIB * GIB
KERNEL_BYTES, MAX_KERNELS = 600_000, 1024
"""What oneDNN keeps of each shape of a product in bf16, on a CPU with AVX-512: the code that it makes for it, as measured
(docs/experiments.md); and of how many shapes, the last that were used (its ONEDNN_PRIMITIVE_CACHE_CAPACITY)."""
FRAGMENTATION = 0.05
"""Of all the rest: what the allocator holds and cannot use. An assumption."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one worker, rank 0, at the peak of a step, or at the start, where stage 3 takes more: then they are `start` alone."""

    weights: int
    gradients: int
    optimizer: int
    ema: int
    activations: int
    loss: int
    buffers: int
    """DeepSpeed's buckets, gathered parameters, and float32 copies of gradients; on CPU what oneDNN keeps of attention's products too."""
    snapshot: int
    """Of workers on CPU, the copy of the state out of which a checkpoint is written beside the steps; a GPU's lies in the host's memory."""
    fragmentation: int
    start: int = 0
    """Whole weights, before they are divided."""

    @property
    def total(self) -> int:
        return sum(self.parts().values())

    def parts(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


@dataclass(frozen=True)
class Load:
    """All that decides the memory of a worker."""

    spec: TrainSpec
    parameters: int
    """That a worker computes with: of a model that is divided over a group, its part."""
    count: Callable[[], Activations]
    """What a sequence keeps, counted when it is first asked for: where layers are compiled that takes seconds."""
    width: int
    vocab_size: int
    context: int
    """Of a sequence that is divided, a worker's part."""
    micro_sequences: int
    accumulation: int
    plain_head: bool
    """The loss never has whole logits (`model/loss.py`)."""
    recomputable: bool
    """Layers of the family can be computed again."""
    frozen: int = 0
    """Of the parameters, those that are not trained."""
    nf4: int = 0
    """Of these, those that are held in 4 bits."""
    teacher: int = 0
    """Parameters of a teacher, which each worker holds whole beside them."""
    heads: int = 0
    """Of attention, those that a worker computes; none where the family has none."""
    undivided: int = 0
    """Of a model that is divided over a group, the parameters of the whole one."""

    @property
    def activations(self) -> Activations:
        return self.count()

    @property
    def ranks(self) -> int:
        """Workers that have the same parameters, over which ZeRO divides."""
        return self.spec.scale.workers // self.spec.sharding.tensor_parallel

    @property
    def weight_bytes(self) -> int:
        """Of a weight as it is computed with."""
        return 4 if self.spec.precision == "fp32" else 2

    @property
    def gradient_bytes(self) -> int:
        """Of a gradient as it is added up."""
        return 4 if self.spec.fp32_sums else self.weight_bytes

    def varied(self, zero: int, recompute: int, micro_sequences: int, asynchronous: bool, sums: Literal["fp32", "same"] | None) -> "Load":
        """The same job under another sharding, another cut of the batch, and another way to save and to add gradients up."""
        spec = self.spec.model_copy(update={"sharding": self.spec.sharding.model_copy(update={"zero": zero}),
                                            "activation_checkpointing": recompute, "reduce_precision": sums,
                                            "checkpoint": self.spec.checkpoint.model_copy(update={"asynchronous": asynchronous})})
        return replace(self, spec=spec, micro_sequences=micro_sequences,
                       accumulation=self.accumulation * self.micro_sequences // micro_sequences)


def make_load(spec: TrainSpec, config: "PreTrainedConfig", shape: Shape, parameters: int, micro_sequences: int, accumulation: int,
              masked: bool = False, whole: bool = False) -> Load:
    """`parameters`: of the whole model, with its adapter. `whole`: as a dry run has it, whose pairs stand in windows and not in rows."""
    text, tensor, undivided = config.get_text_config(), spec.sharding.tensor_parallel, parameters
    around = shape.frame.size if is_encoder(config) else 0
    shape = replace(shape, context=(shape.context + around) // spec.sharding.sequence_parallel)
    if tensor > 1:
        parameters = sum(part.numel() for part in divide(skeleton(config), tensor).parameters())
    frozen = parameters - sum(adapter_sizes(config, spec.adapter).values()) if spec.adapter else 0
    nf4 = nf4_elements(config) if spec.adapter and spec.adapter.base else 0
    teacher = num_parameters(teacher_config(spec.distill.teacher, shape)) if spec.distill else 0
    packed = spec.objective == "dpo" and not spec.compile and not whole
    count = functools.cache(lambda: measure_activations(config, shape, spec.precision, bool(spec.scale.gpus_per_worker), masked, tensor,
                                                        spec.adapter, spec.sharding.sequence_parallel, packed, spec.compile))
    return Load(spec, parameters, count, text.hidden_size, (config.num_labels or 0) if config.problem_type else text.vocab_size,
                shape.context, micro_sequences, accumulation, config.model_type in PLAIN_HEADS and not config.problem_type,
                bool(recomputable(skeleton(config))), frozen, nf4, teacher,
                getattr(text, "num_attention_heads", 0) // (tensor * spec.sharding.sequence_parallel), undivided)


def memory_limit(spec: TrainSpec) -> int | None:
    """Bytes that the spec says a worker has, less what CUDA takes; None where it does not say."""
    scale = spec.scale
    gpu = find_gpu(scale.gpu) if scale.gpu else None
    gib = scale.memory_gib if scale.memory_gib is not None else gpu.memory_gib if gpu else None
    return None if gib is None else round(gib * GIB) - (CUDA_BYTES if scale.gpus_per_worker else 0)


def places(spec: TrainSpec) -> dict[str, str]:
    """Where parts lie that a worker's own memory does not hold: "parameters" and "optimizer" -> cpu, which is the node's memory, or nvme. A
    worker on CPU has its states in the node's memory anyhow."""
    options, found = zero_options(spec), {}
    for name, key in (("parameters", "offload_param"), ("optimizer", "offload_optimizer")):
        section = options.get(key)
        device = section.get("device") if isinstance(section, dict) else None
        if device == "nvme" or (device == "cpu" and spec.scale.gpus_per_worker):
            found[name] = device
    return found


def advice(load: Load, limit: int) -> str:
    """Of all ZeRO stages, with and without activation checkpointing, and cuts of the batch: the cheapest change with which the job fits, as
    `sharding.zero: 3 and activation_checkpointing: 1, at 61.0 GiB`; empty where none does. `reduce_precision: same`, which costs precision,
    is among them where nothing fits without, and stands behind the cheapest where it is enough by itself.

    Costs: stages 1 and 2 send as many bytes as none, stage 3 half as many again (Rajbhandari et al. 2020, section 7); a layer that is
    computed again takes a third of a step's arithmetic; halving a micro-batch is taken for 3 % of the time, and steps that wait for
    checkpoints for 2 %.
    """
    exact = _fitting(load, limit, load.spec.reduce_precision)
    if not rounds_sums(load.spec):
        return _cheapest(exact)
    if not exact:
        return _cheapest(_fitting(load, limit, "same"))
    total = peak_memory(replace(load, spec=load.spec.model_copy(update={"reduce_precision": "same"}))).total
    return _cheapest(exact) + (f", or with reduce_precision: same, at {total / GIB:.3g} GiB" if total <= limit else "")


def rounds_sums(spec: TrainSpec) -> bool:
    """Whether `reduce_precision: same` would be another way to add gradients up than that of the spec."""
    return spec.precision != "fp32" and spec.reduce_precision != "same"


def _fitting(load: Load, limit: int, sums: Literal["fp32", "same"] | None) -> list[tuple[float, int, str]]:
    """What `_change` says of each change with which the job fits, where gradients are added up so."""
    spec = load.spec
    smaller = [n for n in divisors(load.micro_sequences * load.accumulation) if n < load.micro_sequences]
    saving = dict.fromkeys((spec.checkpoint.asynchronous, spec.checkpoint.asynchronous and bool(spec.scale.gpus_per_worker)))
    found: list[tuple[float, int, str]] = []
    for zero in stages(spec):
        recomputing = dict.fromkeys((spec.activation_checkpointing, *((1,) if load.recomputable else ())))
        for again, beside in itertools.product(recomputing, saving):
            def takes(micro: int, zero: int = zero, again: int = again, beside: bool = beside) -> int:
                return peak_memory(load.varied(zero, again, micro, beside, sums)).total

            micro = load.micro_sequences                   # one micro-batch alone holds no gradients beside it, smaller ones do
            if takes(micro) > limit:
                number = bisect_right(smaller, limit, key=takes)
                if not number:
                    continue
                micro = smaller[number - 1]                # a still smaller one costs more
            found.append(_change(load, load.varied(zero, again, micro, beside, sums), takes(micro)))
    return found


def _change(load: Load, other: Load, total: int) -> tuple[float, int, str]:
    """(what it costs of a step's time, its `total` bytes, the keys that make it) of another load in place of one."""
    zero, spec, changed = other.spec.sharding.zero, load.spec, other.spec
    keys = {"sharding.zero": (spec.sharding.zero, zero), "batch.micro_sequences": (load.micro_sequences, other.micro_sequences),
            "activation_checkpointing": (spec.activation_checkpointing, changed.activation_checkpointing),
            "checkpoint.asynchronous": (spec.checkpoint.asynchronous, changed.checkpoint.asynchronous),
            "reduce_precision": (spec.reduce_precision, changed.reduce_precision)}
    new = {key: after for key, (before, after) in keys.items() if after != before}
    cost = (0.01 * zero + 0.1 * (zero == 3) + 0.03 * math.log2(load.micro_sequences / other.micro_sequences)
            + 0.33 * ("activation_checkpointing" in new) + 0.02 * ("checkpoint.asynchronous" in new))
    return cost, total, " and ".join(f"{key}: {str(value).lower()}" for key, value in new.items())


def _cheapest(found: list[tuple[float, int, str]]) -> str:
    if not found:
        return ""
    _, total, text = min(found)
    return f"{text}, at {total / GIB:.3g} GiB"


def stages(spec: TrainSpec) -> list[int]:
    """The spec's ZeRO stage, and those above it that it could have."""
    found = []
    for zero in range(spec.sharding.zero, 4):
        with contextlib.suppress(Rule):
            check_optimizer(spec.optimizer, zero)
            check_tensor_parallel(spec, zero)
            check_compile(spec, zero)
            check_base(spec, zero)
            found.append(zero)
    return found


def node_advice(load: Load, workers: int, limit: int) -> str:
    """As `advice`, of what lies in the memory of a node with so many of the workers."""
    spec, found = load.spec, list[tuple[float, int, str]]()
    for sums in (spec.reduce_precision, *(("same",) if rounds_sums(spec) else ())):
        for zero, beside in itertools.product(stages(spec), dict.fromkeys((spec.checkpoint.asynchronous, False))):
            other = load.varied(zero, spec.activation_checkpointing, load.micro_sequences, beside, sums)
            if (total := node_memory(other, workers)) <= limit:
                found.append(_change(load, other, total))
        if found:
            break
    return _cheapest(found)


def check_states(load: Load) -> None:
    """Raises SpecError where model states alone, which are arithmetic, exceed what the spec says that a worker has."""
    limit, states = memory_limit(load.spec), sum(own_states(load).values())
    if limit is not None and states > limit:
        found = advice(load, limit)
        key = "memory_gib" if load.spec.scale.memory_gib is not None else "gpu"
        raise SpecError(f"weights, gradients and the optimizer's states take {states / GIB:.3g} GiB of a worker, and it has "
                        f"{limit / GIB:.3g} GiB to give", where=f"scale.{key}",
                        remedy=f"it fits with {found}" if found else "take more workers, or a smaller model")


def peak_memory(load: Load) -> Memory:
    """The most that a worker holds, as its steps are made or at the start. What `places` has elsewhere does not count."""
    spec, step = load.spec, step_memory(load)
    if not spec.scale.gpus_per_worker:
        start = sum(start_bytes(load))
    else:                                                  # tensor parallelism moves each part there in float32
        start = 4 * load.parameters if spec.sharding.zero == 3 and not divided_first(spec) else 0
    return Memory(0, 0, 0, 0, 0, 0, 0, 0, 0, start) if start > step.total else step


def machine_bytes(load: Load) -> int:
    """Bytes that all workers on CPU take together: what rank 0 has beside its own counts once."""
    workers, beside, (each, first) = load.spec.scale.workers, snapshot_bytes(load)[1], start_bytes(load)
    return max(workers * (step_memory(load).total - beside) + beside, workers * each + first)


def step_memory(load: Load) -> Memory:
    """The most that a worker holds in a step: as a backward pass begins, as it is in the last layer or in the first, as gradients are sent,
    or as the optimizer steps.

    Model states: Rajbhandari et al. 2020, section 3, with p bytes of a weight: in fp32 p = 4, else p = 2 and the optimizer has the
    float32 weights too. In fp8 weights and activations are kept in bf16 all the same. What an adapter leaves as it is has its weights
    alone, in p bytes or in NF4.
    Activations: measured on the meta device (`train/activations.py`), where Korthikanti et al. 2022, equation 2, counts by hand. With a_i
    bytes that layer i of L keeps (its input, where it is computed again), o that is kept outside of layers, m of it a mask of documents,
    b_i that a layer takes on its way back, and G of gradients, a backward pass takes

        o + a_1 + ... + a_(L - 1) + b_L  in the last layer,  m + b_1 + G  in the first,

    and in those between, where all layers are alike, no more than the larger of both, as the one grows evenly and the other shrinks. Where
    they are not, such as a dense layer before those of experts, one between may take more, which is not counted. Beside it a CPU has the
    kernels of attention's products. What torch.compile leaves behind in a process, some 25 MB on a CPU, is not counted either.
    """
    spec, n, zero = load.spec, load.parameters - load.frozen, load.spec.sharding.zero
    world, p, g, on_gpu = load.ranks, load.weight_bytes, load.gradient_bytes, bool(spec.scale.gpus_per_worker)
    part, states, away = -(-n // world), own_states(load), places(spec)
    kept = load.micro_sequences * load.activations.kept(spec.activation_checkpointing)
    last, one = (load.micro_sequences * of for of in (load.activations.last(spec.activation_checkpointing), load.activations.first()))
    left = load.micro_sequences * load.activations.mask * (spec.sharding.sequence_parallel > 1)          # `model/sequence.py` keeps it
    loss = loss_bytes(load, p)
    raw = spec.sharding.deepspeed.get("zero_optimization", {})
    bucket_size = raw_number(raw, "reduce_bucket_size", REDUCE_BUCKET)
    bucket = min(bucket_size, n)
    # the buckets of stages 1 to 3 are allocated whole; on a CPU what is not written to takes no memory
    reserved = (bucket_size if on_gpu else bucket) * (p if zero == 2 else g)
    sent = 0                                               # copies of a bucket and of this worker's part, where they are summed in fp32
    if zero == 0:
        buffers, step = bucket * g if world > 1 else 0, 4 * n if g == 2 else 0
    elif zero < 3:
        buffers, step = reserved, part * (p + 4)
        if g > p:
            sent, step = 4 * part if zero == 1 else bucket * (p + 4), 0
    else:
        live = min(load.parameters, raw_number(raw, "stage3_max_live_parameters", MAX_LIVE))
        buffers, step, sent = reserved + live * p + 4 * part, 0, 4 * bucket if g > p else 0
    if "optimizer" in away:
        buffers, step = buffers - 4 * part if zero == 3 else buffers, 0
    gradients = states["gradients"]
    held = gradients if load.accumulation > 1 else 0       # the first backward pass begins without gradients
    early = buffers if zero == 3 or (zero and on_gpu) else 0                   # what there is before gradients fill buckets
    if zero and n > bucket_size:                           # buckets are sent while the backward pass goes on
        filled, beside = gradients, buffers + sent
    elif zero < 2:                                         # of stage 1 the bucket is the gradients' place; without ZeRO there is none yet
        filled, beside = gradients, reserved - bucket * g if zero else 0
    else:
        filled, beside = held if zero == 2 else gradients, buffers
    peaks = {
        "loss": (held, kept, loss, early),
        "last layer": (held, last, 0, early),
        "first layer": (filled, one, 0, beside),
        "sent": (gradients, left, 0, buffers + sent),
        "step": (gradients, left, 0, step + (buffers if zero == 3 else 0))}
    at = max(peaks.values(), key=sum)
    snapshot = 0 if on_gpu else sum(snapshot_bytes(load))
    products = num_products(load.context * spec.sharding.sequence_parallel, load.micro_sequences * load.heads)
    kernels = 0 if on_gpu or p == 4 else KERNEL_BYTES * min(products, MAX_KERNELS)
    whole = Memory(states["weights"], at[0], states["optimizer"], states["ema"], at[1], at[2], at[3] + kernels, snapshot, 0)
    return replace(whole, fragmentation=round(FRAGMENTATION * whole.total))


def own_states(load: Load) -> dict[str, int]:
    """What a worker's own memory holds whatever the batch: no estimate but arithmetic. A teacher is among the weights."""
    spec, states, away, zero = load.spec, all_states(load), places(load.spec), load.spec.sharding.zero
    weights = load.teacher * load.weight_bytes + (0 if "parameters" in away else states["weights"])
    group = raw_number(spec.sharding.deepspeed.get("zero_optimization", {}), "zero_hpz_partition_size",
                       spec.sharding.zeropp.hierarchical_partition)
    if zero == 3 and group > 1:                            # ZeRO++ keeps the weights once more, over the ranks of a node
        weights += -(-load.parameters * load.weight_bytes // group)
    if "optimizer" in away:                                # it is updated there, with gradients that stages 2 and 3 lay there too
        there = spec.scale.gpus_per_worker and (zero == 3 or (zero == 2 and not spec.fp32_sums))
        states |= {"optimizer": 0, "ema": 0, "gradients": 0 if there else states["gradients"]}
    return {**states, "weights": weights}


def all_states(load: Load) -> dict[str, int]:
    """Weights, gradients, the optimizer's states and averages of a worker, wherever they lie. A teacher is none of them."""
    spec, n, p = load.spec, load.parameters - load.frozen, load.weight_bytes
    states = model_states(n, spec.precision, spec.sharding.zero, load.ranks, STATE_BYTES[spec.optimizer.name], load.gradient_bytes)
    states["weights"] += -(-(load.frozen - load.nf4) * p // (load.ranks if spec.sharding.zero == 3 else 1)) + math.ceil(load.nf4 * BITS / 8)
    ema = model_states(n, "fp32", spec.sharding.zero, load.ranks, 4)["optimizer"] if spec.ema else 0
    return {**states, "ema": ema}


def snapshot_bytes(load: Load) -> tuple[int, int]:
    """(each rank's, what rank 0 has beside its own) of the copy of the state out of which a checkpoint is written beside the steps."""
    spec, n, zero, p = load.spec, load.parameters - load.frozen, load.spec.sharding.zero, load.weight_bytes
    if not spec.checkpoint.asynchronous:
        return 0, 0
    apart = zero > 0 or p == 2                             # fp32 weights are not the model's own
    own = (STATE_BYTES[spec.optimizer.name] + 4 * apart) * (-(-n // load.ranks) if zero else n)
    if places(spec).get("optimizer") == "nvme":            # from where it is copied as files
        own = 0
    ema = all_states(load)["ema"]                          # each rank saves its own
    return (own + ema, p * n if zero < 3 else 0) if zero else (ema, own + p * n)         # rank 0 saves what is whole


def start_bytes(load: Load) -> tuple[int, int]:
    """(each rank's, what rank 0 has beside its own) of the weights as the model is built under stage 3, on the host, whole, before they are
    divided: in float32, or with an adapter as they are computed with. Below stage 3 they are not counted."""
    if load.spec.sharding.zero < 3:
        return 0, 0
    built = (load.undivided or load.parameters) * (load.weight_bytes if load.spec.adapter else 4)
    return (0, built) if made_once(load.spec) else (built, 0)


def host_memory(load: Load) -> dict[str, int]:
    """Bytes that a worker on a GPU holds of its node's memory, by part, those of rank 0; none for a worker on CPU, whose own memory it is.
    What the start takes, buffers through which disks are read, and what a process takes before it trains do not count."""
    spec, part = load.spec, -(-(load.parameters - load.frozen) // load.ranks)
    if not spec.scale.gpus_per_worker:
        return {}
    states, away, host = all_states(load), places(spec), dict[str, int]()
    if away.get("parameters") == "cpu":
        host["weights"] = states["weights"]
    if "optimizer" in away:
        host["gradients"] = part * load.gradient_bytes
    if away.get("optimizer") == "cpu":                     # beside gradients as they are added up DeepSpeed has them in fp32 there
        kept = 0 if spec.fp32_sums and spec.sharding.zero < 3 else load.gradient_bytes
        host |= {"gradients": part * (kept + 4), "optimizer": states["optimizer"], "ema": states["ema"]}
    return {name: value for name, value in (host | {"snapshot": sum(snapshot_bytes(load))}).items() if value}


def node_memory(load: Load, workers: int) -> int:
    """Bytes of `host_memory` of a node that has so many of the workers, rank 0 among them, or of `start_bytes` if they are more."""
    if not load.spec.scale.gpus_per_worker:
        return 0
    beside, (each, first) = snapshot_bytes(load)[1], start_bytes(load)
    return max(workers * (sum(host_memory(load).values()) - beside) + beside, workers * each + first)


def raw_number(raw: dict[str, Any], key: str, default: int) -> int:
    """A key of `sharding.deepspeed.zero_optimization`, checked already, as DeepSpeed's configuration reads it: with or without stage3_ in
    front, and "auto" for the default."""
    value = raw.get(key, raw.get(key.removeprefix("stage3_"), "auto"))
    return default if value == "auto" else int(value)


def model_states(parameters: int, precision: str, zero: int, workers: int, states: int = 8, gradient: int = 0) \
        -> dict[str, int]:
    """Bytes of model states on one worker (Rajbhandari et al. 2020, section 3): with adamw in bf16 2 + 2 + 12 a parameter, in fp32
    4 + 4 + 8. `states`: bytes of the optimizer's own states of a parameter; `gradient`: of a gradient, if not a weight's."""
    weight, optimizer = (4, states) if precision == "fp32" else (2, 4 + states)

    def share(bytes_each: int, from_stage: int) -> int:
        return -(-parameters * bytes_each // (workers if zero >= from_stage else 1))

    return {"weights": share(weight, 3), "gradients": share(gradient or weight, 2), "optimizer": share(optimizer, 1)}


def loss_bytes(load: Load, p: int) -> int:
    """The most that the loss takes beside the activations, at the end of the forward pass or as the backward one begins.

    With a plain head, `_LinearCrossEntropy` has the gradient of the last matrix in float32, its product with the scale and the result; of
    the hidden states their gradient, and the same; in the forward pass a block of logits and float32 chunks of it. Any other head has the
    logits, their gradient, and its float32 product. A teacher has as many logits of its own, and as many chunks.
    """
    kind = "cuda" if load.spec.scale.gpus_per_worker else "cpu"
    rows, matrix = load.micro_sequences * load.context, load.vocab_size * load.width
    taught = 2 if load.teacher else 1
    chunk = taught * 4 * 4 * min(CHUNK_ELEMENTS[kind], rows * load.vocab_size)
    if not load.plain_head:
        return rows * load.vocab_size * ((1 + taught) * p + max(4, p)) + chunk
    block = taught * p * min(max(BLOCK_ELEMENTS[kind], load.vocab_size), rows * load.vocab_size)
    if load.frozen:                                        # the last matrix has no gradient
        return rows * load.width * 2 * p + block + chunk
    forward = 4 * matrix + p * matrix + rows * load.width * p + block + chunk
    backward = (4 + 4 + p) * matrix + rows * load.width * (2 * p)
    return max(forward, backward)
