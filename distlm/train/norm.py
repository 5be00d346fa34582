"""The gradient's norm before the update, among what the host is told of a step at once.

    parts = norm_parts(engine)                             # on the device, after the last backward pass. All ranks take part
    values = torch.stack(parts).tolist()                   # with whatever else is asked: the GPU is waited for here
    with known_norm(engine, parts, values):
        engine.step()                                      # in which DeepSpeed would ask for them, more than once

They are computed by DeepSpeed's own functions, in their order: it clips by the same numbers.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import distributed

from distlm.model.tensor import dimension
from distlm.train.zero import tensor_group


def keeps_norm(engine: Any) -> bool:
    """Whether DeepSpeed has the global norm after its step: with ZeRO, or in half precision."""
    return bool(engine.zero_optimization_stage()) or hasattr(engine.optimizer, "_global_grad_norm")


def norm_parts(engine: Any) -> list[torch.Tensor]:
    """Scalars on the device: where DeepSpeed does not keep the norm, the norm; else what it makes its norm of. None where the norm is not
    known before DeepSpeed's step, which asks for it itself: that of gradients on the host, and of what Muon makes of them with ZeRO 3."""
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    if not keeps_norm(engine):
        return [_norm(engine)]
    if not stage:
        return [_squares(gradients) for gradients in _by_group(optimizer)]
    if stage == 3:
        return [] if optimizer.offload_optimizer or optimizer.use_muon else optimizer._get_norm_groups()
    return [] if optimizer.cpu_offload else [optimizer.scaled_global_norm()]


@contextlib.contextmanager
def known_norm(engine: Any, parts: list[torch.Tensor], values: list[float]) -> Iterator[None]:
    """A step of the engine inside takes the `values` of `norm_parts`. It does not look for overflows in each gradient beside: of one that
    is not finite the norm is not, and DeepSpeed makes no update of such a norm."""
    if not parts or not keeps_norm(engine):
        yield
        return
    from deepspeed.runtime.fp16 import unfused_optimizer

    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    told = [torch.tensor(value, dtype=part.dtype) for part, value in zip(parts, values, strict=True)]
    with contextlib.ExitStack() as inside:
        if not stage:
            norms = iter([_root(value) for value in values])
            inside.enter_context(_instead(optimizer.overflow_checker, "check", lambda: False))
            inside.enter_context(_instead(unfused_optimizer, "get_weight_norm", lambda *_, **__: next(norms)))
        else:
            inside.enter_context(_instead(optimizer, "check_overflow", lambda *_, **__: None))
            name = "_get_norm_groups" if stage == 3 else "scaled_global_norm"
            inside.enter_context(_instead(optimizer, name, lambda: told if stage == 3 else told[0]))
        yield


@contextlib.contextmanager
def _instead(owner: Any, name: str, call: Any) -> Iterator[None]:
    """An object's method, or a module's function, is another one inside."""
    own = vars(owner).get(name)
    setattr(owner, name, call)
    try:
        yield
    finally:
        if own is None:
            delattr(owner, name)
        else:
            setattr(owner, name, own)


def _norm(engine: Any) -> torch.Tensor:
    """Over all parameters, as PyTorch has it."""
    gradients: dict[bool, list[torch.Tensor]] = {True: [], False: []}
    for name, parameter in engine.module.named_parameters():
        if parameter.grad is not None:
            gradients[engine.autotp_size() > 1 and dimension(name) is not None].append(parameter.grad)
    norm = torch.nn.utils.get_total_norm(gradients[False])
    if gradients[True]:                                    # parts of matrices, on each rank of the group its own
        parts = torch.nn.utils.get_total_norm(gradients[True]).square()
        distributed.all_reduce(parts, group=tensor_group())
        norm = (norm.square() + parts).sqrt()
    return norm


def _by_group(optimizer: Any) -> list[list[torch.Tensor]]:
    """The gradients of each group of parameters that has any, as DeepSpeed's optimizer in half precision takes their norm."""
    from deepspeed.moe.utils import split_params_grads_into_shared_and_expert_params

    found = (split_params_grads_into_shared_and_expert_params(group)[0] for group in optimizer.fp16_groups)
    return [gradients for gradients in found if gradients]


def _squares(gradients: list[torch.Tensor]) -> torch.Tensor:
    """The sum of their norms' squares, in the order and the precision of DeepSpeed's `get_weight_norm`."""
    total = torch.zeros((), device=gradients[0].device)
    for gradient in gradients:
        total += gradient.float().norm(2.0)**2.0
    return total


def _root(square: float) -> float:
    """A group's norm as `get_weight_norm` returns it: -1 for one that is not finite."""
    return square**0.5 if square < float("inf") else -1.0
