"""One spec generates the DeepSpeed configuration: nothing is set in two places."""

from typing import TYPE_CHECKING, Any

from distlm.errors import SpecError, TrainError
from distlm.model.build import precision_dtype
from distlm.model.find import TORCHAO
from distlm.model.float8 import CAPABILITY
from distlm.model.nf4 import BITSANDBYTES
from distlm.model.tensor import layer_specs
from distlm.spec.load import nearest
from distlm.spec.sharding import ZEROPP_KEYS
from distlm.spec.train import TrainSpec
from distlm.train.disks import check_disks

if TYPE_CHECKING:
    import torch


def deepspeed_config(spec: TrainSpec, micro_sequences: int, accumulation: int) -> dict[str, Any]:
    """The configuration for `deepspeed.initialize`."""
    config: dict[str, Any] = {"train_micro_batch_size_per_gpu": micro_sequences, "gradient_accumulation_steps": accumulation,
              "gradient_clipping": spec.optimizer.clip, "bf16": {"enabled": spec.precision in ("bf16", "fp8")},
              "fp16": {"enabled": spec.precision == "fp16", "initial_scale_power": spec.loss_scale.initial_power,
                       "loss_scale_window": 2**31 - 1},   # `update` looks after that
              "zero_optimization": {"stage": spec.sharding.zero}, "steps_per_print": 2**31 - 1,
              "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}       # ours are tested, and need no compiler
    if spec.fp32_sums:
        config["communication_data_type"] = "fp32"
        if spec.sharding.zero:                             # without ZeRO DeepSpeed knows none; `make_engine` sees to it
            config["data_types"] = {"grad_accum_dtype": "fp32"}
    if spec.sharding.tensor_parallel > 1:
        config["tensor_parallel"] = {"autotp_size": spec.sharding.tensor_parallel,
                                     "partition_config": {"use_default_specs": False, "layer_specs": layer_specs()}}
    if spec.optimizer.name == "muon" and spec.sharding.zero == 3:
        config["zero_optimization"]["reduce_scatter"] = False                     # DeepSpeed's Muon asks for it
    return _merge(_merge(config, {"zero_optimization": zero_options(spec)}), spec.sharding.deepspeed)


def zero_options(spec: TrainSpec) -> dict[str, Any]:
    """What the spec asks of DeepSpeed's `zero_optimization` beside the stage: it decides what lies where."""
    options: dict[str, Any] = {}
    if offload := spec.sharding.offload:
        for key, device in (("offload_optimizer", offload.optimizer), ("offload_param", offload.parameters)):
            if device:
                options[key] = {"device": device, **({"nvme_path": offload.path} if device == "nvme" else {})}
    for ours, theirs in ZEROPP_KEYS.items():
        field = type(spec.sharding.zeropp).model_fields[ours]
        if (value := getattr(spec.sharding.zeropp, ours)) != field.default:
            options[theirs] = value
    return _merge(options, spec.sharding.deepspeed.get("zero_optimization", {}))


SECTIONS = {"zero_optimization", "flops_profiler", "comms_logger", "activation_checkpointing", "tensorboard", "wandb", "csv_monitor",
            "compile", "tensor_parallel", "autotuning"}
"""Keys of DeepSpeed's configuration that are no constants of its own."""


def check_raw(spec: TrainSpec) -> None:
    """Raises SpecError for a raw key that DeepSpeed does not know: it would ignore one at the top, and fail on every rank below."""
    import os

    os.environ.setdefault("DS_ACCELERATOR", "cpu" if not spec.scale.gpus_per_worker else "cuda")
    from deepspeed.runtime import constants
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    known = {value for value in vars(constants).values() if isinstance(value, str)} | SECTIONS
    for key in spec.sharding.deepspeed:
        if key not in known:
            near = nearest(key, known)
            raise SpecError("DeepSpeed has no such key", where=f"sharding.deepspeed.{key}", remedy=f"did you mean {near}?" if near else "")
    try:
        DeepSpeedZeroConfig(**spec.sharding.deepspeed.get("zero_optimization", {}))
    except ValidationError as error:
        first = error.errors()[0]
        raise SpecError(f"DeepSpeed does not accept it: {first['msg']}",
                        where=".".join(map(str, ("sharding.deepspeed.zero_optimization", *first["loc"])))) from None


def _merge(base: dict[str, Any], raw: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in raw.items():
        merged[key] = _merge(base[key], value) if isinstance(value, dict) and isinstance(base.get(key), dict) else value
    return merged


def check_node(spec: TrainSpec) -> None:
    """Raises TrainError where this worker's node lacks what the spec needs there."""
    import importlib.util
    import os
    import shutil

    if spec.compile and not spec.scale.gpus_per_worker and not shutil.which(os.environ.get("CXX", "g++")):
        raise TrainError("there is no C++ compiler on a worker's node", where="compile", cause="bad_input",
                         remedy="install g++ there (Debian and Ubuntu: apt install g++), or leave compile out")
    if spec.precision == "fp8":
        check_fp8()
    if spec.adapter and spec.adapter.base and importlib.util.find_spec("bitsandbytes") is None:
        raise TrainError("the package bitsandbytes is not installed on a worker's node", where="adapter.base", cause="bad_input",
                         remedy=BITSANDBYTES)
    check_disks(zero_options(spec))


def check_fp8() -> None:
    """Raises TrainError where this worker's node lacks torchao, or its GPU products in float8."""
    import importlib.util

    import torch

    if importlib.util.find_spec("torchao") is None:
        raise TrainError("the package torchao is not installed on a worker's node", where="precision", cause="bad_input", remedy=TORCHAO)
    if torch.cuda.is_available() and (has := torch.cuda.get_device_capability()) < CAPABILITY:
        raise TrainError(f"fp8 needs a GPU of compute capability {CAPABILITY[0]}.{CAPABILITY[1]}, and a worker's "
                         f"{torch.cuda.get_device_name()} has {has[0]}.{has[1]}", where="precision", cause="bad_input", remedy="take bf16")


def make_engine(spec: TrainSpec, module: "torch.nn.Module", config: dict[str, Any]) -> Any:
    """A DeepSpeed engine over an objective's `module`. All ranks take part; the process group exists already."""
    import logging
    import os

    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")     # else it warns on every rank
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.ERROR)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False   # an inference op; building it costs 20 s and a compiler
    from distlm.train.optimizer import make_optimizer

    # for stage 1 with sums in fp32 DeepSpeed has an optimizer apart, whose checkpoints are others; its ZeRO does the same, as for fp16
    deepspeed.DeepSpeedEngine._configure_bf16_optimizer = deepspeed.DeepSpeedEngine._configure_zero_optimizer
    optimizer = make_optimizer(spec, module)               # by the shapes of parameters, which are then divided
    if divided_first(spec):
        _divide(spec, module, config)
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config, dist_init_required=False)
    if hasattr(engine.optimizer, "optimizer") and not engine.zero_optimization_stage():
        engine.optimizer.optimizer.state.clear()           # bf16 without ZeRO: that empty step would count in bias corrections
    if spec.fp32_sums and not engine.zero_optimization_stage():
        _add_up_in_fp32(engine)
    if spec.fp32_sums and spec.optimizer.name == "muon" and engine.zero_optimization_stage() == 2:
        tensors = engine.optimizer.get_all_grad_tensors    # which DeepSpeed adds up as they are, not in their `dtype`
        engine.optimizer.get_all_grad_tensors = lambda parts, dtype: [part.to(dtype) for part in tensors(parts, dtype)]
    return engine


def divided_first(spec: TrainSpec) -> bool:
    """Whether parameters are divided over the ranks before a device has the whole model. Matrices that tensor parallelism cuts are divided
    by DeepSpeed's engine alone, which has each rank's part of the model whole on its device first."""
    return spec.sharding.zero == 3 and spec.sharding.tensor_parallel == 1


def made_once(spec: TrainSpec) -> bool:
    """Whether rank 0 alone draws the weights or reads them: where they are divided first, all ranks have their parts from it. What stands
    still beside an adapter, and zeros that are to stay, each rank has from the checkpoint itself."""
    return divided_first(spec) and spec.adapter is None and not spec.keep_zeros


def settle_blank(model: Any) -> bool:
    """Give the `blank_model` of each rank but 0 what a checkpoint has decided of rank 0's beside its weights. Returns whether it has the
    same parameters: a checkpoint may hold two that its configuration ties. All ranks take part."""
    from torch import distributed

    kept, mine = set(model.state_dict()), [(name, one.shape) for name, one in model.named_parameters()]
    told: list[Any] = [mine, {name: one for name, one in model.named_buffers() if name in kept}, getattr(model, "generation_config", None)]
    distributed.broadcast_object_list(told)
    if told[0] != mine:
        return False
    for name, one in told[1].items():
        model.get_buffer(name).copy_(one)
    if told[2] is not None:                                # an encoder has none
        model.generation_config = told[2]
    return True


def _divide(spec: TrainSpec, module: "torch.nn.Module", config: dict[str, Any]) -> None:
    """Give each rank its part of every parameter, in the precision that the steps are computed in, as DeepSpeed's engine would once it had
    moved the whole module to the device. Here one parameter after the other is moved, sent by rank 0 and divided. All ranks take part."""
    import deepspeed
    import torch
    from deepspeed.accelerator import get_accelerator
    from deepspeed.utils import groups

    deepspeed.init_distributed(get_accelerator().communication_backend_name(), dist_init_required=False)
    init = deepspeed.zero.Init(torch.nn.Module(), config_dict_or_path=config,
                               zero_param_parallel_group=groups._get_zero_param_intra_parallel_group())
    for parameter in module.parameters():                  # what was drawn is whole in this precision for one at a time, on the host too
        parameter.data = parameter.data.to(precision_dtype(spec.precision))
        init._convert_to_zero_parameters([parameter])
    for buffer in module.buffers():
        buffer.data = buffer.data.to(init.local_device)


def _add_up_in_fp32(engine: Any) -> None:
    """Let autograd add gradients up in float32, which DeepSpeed without ZeRO then reduces and gives to the optimizer as they are."""
    import torch

    trained, reduced = [p for p in engine.module.parameters() if p.requires_grad], engine._get_gradients_for_reduction
    for parameter in trained:
        parameter.grad_dtype = torch.float32

    def whole() -> Any:
        for parameter in trained:                          # DeepSpeed would fill in what has no gradient, in the weights' precision
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter, dtype=torch.float32)
        return reduced()

    engine._get_gradients_for_reduction = whole


def tensor_group() -> Any:
    """The ranks that hold one model together with this one."""
    from deepspeed.utils import groups

    return groups.get_tensor_model_parallel_group()


def gather_parts(part: "torch.Tensor", dim: int) -> "torch.Tensor":
    """A parameter that is cut in `dim`, whole. All ranks take part."""
    import torch
    from torch import distributed

    group = tensor_group()
    parts = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(distributed.get_world_size(group))]
    distributed.all_gather(parts, part.contiguous(), group=group)
    return torch.cat(parts, dim)


def loss_scale(engine: Any) -> float | None:
    """What fp16's losses are multiplied by; None with another precision."""
    return float(engine.optimizer.loss_scale) if engine.fp16_enabled() else None


def set_accumulation(engine: Any, micro_batches: int) -> None:
    """Let the step that begins have so many micro-batches: DeepSpeed counts those of all steps, and ZeRO keeps a number of its own."""
    if micro_batches == engine.gradient_accumulation_steps():
        return
    engine.set_train_batch_size(micro_batches * engine.train_micro_batch_size_per_gpu() * engine.dp_world_size)
    engine.micro_steps = 0
    if hasattr(engine.optimizer, "gradient_accumulation_steps"):
        engine.optimizer.gradient_accumulation_steps = micro_batches


def update(engine: Any, window: int) -> bool:
    """The engine's step at the end of a batch, after which fp16's loss scale doubles where there was no overflow in `window` steps:
    DeepSpeed would double it before it divides the gradients by it. Returns whether fp16 skipped the step, since gradients overflowed.
    Raises OverflowError where no scale helps any more. All ranks take part."""
    try:
        engine.step()
    except Exception as error:                             # DeepSpeed has no class for it
        if "loss scale already at minimum" not in str(error):
            raise
        raise OverflowError("the gradients overflow at a loss scale of 1") from None
    if not engine.fp16_enabled() or engine.optimizer.overflow:
        return engine.fp16_enabled()
    scaler = engine.optimizer.loss_scaler
    if (scaler.cur_iter - 1 - scaler.last_overflow_iter) % window == 0:
        scaler.cur_scale, scaler.cur_hysteresis = scaler.cur_scale * scaler.scale_factor, scaler.delayed_shift
    return False
