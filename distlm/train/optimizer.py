"""The optimizer by name, over a model's parameters in groups. PyTorch's and DeepSpeed's own where they have one.

    optimizer = make_optimizer(spec, module)               # before DeepSpeed wraps it
    set_rate(optimizer, 1e-3)
"""

from collections.abc import Callable
from typing import Any, cast

import torch

from distlm.model.mup import rate_factor
from distlm.spec.optimizer import ParameterGroup, group_of
from distlm.spec.train import TrainSpec


def make_optimizer(spec: TrainSpec, module: torch.nn.Module) -> torch.optim.Optimizer:
    """Over the parameters of what `module` holds as `model`: those of less than two dimensions (norms, biases) do not decay. The loop sets
    the rate at every step; it is 0 until then, because DeepSpeed steps once with empty gradients to allocate states, which would decay the
    weights."""
    options = spec.optimizer
    groups = make_groups(spec, module)
    if options.name == "muon":
        return _muon(spec, groups)
    if options.name == "lion":
        return Lion(groups, lr=0.0, betas=options.betas)
    if options.name == "adafactor":
        return torch.optim.Adafactor(groups, lr=0.0, beta2_decay=options.beta2_decay)
    if options.name == "sgd":
        return torch.optim.SGD(groups, lr=0.0, momentum=options.momentum, fused=True)
    return torch.optim.AdamW(groups, lr=0.0, betas=options.betas, eps=options.eps, fused=True)


def make_groups(spec: TrainSpec, module: torch.nn.Module) -> list[dict[str, Any]]:
    """Groups of parameters that are treated alike, none empty: matrices first."""
    options, model = spec.optimizer, cast(Any, module.model)
    orthogonal = muon_matrices(model) if options.name == "muon" else set()
    factors = rate_factor(model, spec.model.mup.base_width) if spec.model.mup else {}
    groups: dict[Any, dict[str, Any]] = {}
    for name, parameter in sorted(model.named_parameters(), key=lambda pair: pair[1].dim() < 2):
        if not parameter.requires_grad:
            continue
        own = group_of(name, options.groups) or ParameterGroup(match=".")
        decay = options.weight_decay if parameter.dim() >= 2 else 0.0
        settings: dict[str, Any] = {"weight_decay": decay if own.weight_decay is None else own.weight_decay, "lr_factor": own.lr_factor}
        if parameter in factors:                           # the decay is multiplied by the rate
            settings["lr_factor"] *= factors[parameter]
            settings["weight_decay"] /= factors[parameter]
        if options.name == "muon":
            _add_muon(settings, parameter, parameter in orthogonal)
        groups.setdefault(tuple(settings.items()), {"params": [], **settings})["params"].append(parameter)
    return list(groups.values())


def set_rate(optimizer: Any, rate: float) -> None:
    """Set the learning rate of every group, each by its factor."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_factor"]


def muon_matrices(model: Any) -> set[torch.nn.Parameter]:
    """The parameters that Muon is made for: the matrices of hidden layers. A mixture of experts holds one of each expert in a parameter of
    three dimensions, and their biases in one of two. Embeddings, the last layer and convolutions are not among them."""
    found, last = set[torch.nn.Parameter](), model.get_output_embeddings() or model.score
    for module in model.modules():
        own = [] if isinstance(module, (torch.nn.Embedding, torch.nn.Conv1d)) or module is last else [*module.parameters(recurse=False)]
        dims = 3 if any(p.dim() == 3 for p in own) else 2
        found |= {p for p in own if p.dim() == dims}
    return found


def _add_muon(settings: dict[str, Any], parameter: torch.nn.Parameter, orthogonal: bool) -> None:
    """The rate and decay of AdamW hold for Muon too where an update is scaled to the same size, 0.2 sqrt(max(rows, columns)) (Liu et al.
    2025, equation 4). DeepSpeed scales by sqrt(max(1, rows / columns)), and multiplies the decay by the rate: the factor mends both."""
    settings["use_muon"] = orthogonal
    if orthogonal:
        rows, columns = parameter.shape[-2:]
        factor = 0.2 * max(rows, columns) ** 0.5 / max(1.0, rows / columns) ** 0.5
        settings["lr_factor"] *= factor
        settings["weight_decay"] /= factor


def _muon(spec: TrainSpec, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """DeepSpeed's Muon (Jordan et al. 2024), which its ZeRO stages know and take apart, with AdamW for what is no hidden matrix; without
    ZeRO the same over matrices together. Its kernels would be compiled when they are first used, which takes a compiler and minutes;
    products of matrices gain nothing by it."""
    if not spec.compile:
        torch.compiler.set_stance("force_eager")
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

    from distlm.train.muon import Muon

    options = spec.optimizer
    for group in groups:
        own = {"momentum": options.momentum, "ns_method": "standard"} if group["use_muon"] else {"betas": options.betas, "eps": options.eps}
        group.update(own, lr=0.0)
        for parameter in group["params"]:
            parameter.use_muon = group["use_muon"]
    make = MuonWithAuxAdam if spec.sharding.zero else Muon
    return make(groups, adam_optimizer=torch.optim.AdamW, adam_optimizer_kwargs={"fused": True, "lr": 0.0})


class Lion(torch.optim.Optimizer):
    """Chen et al. 2023, algorithm 2: the sign of an interpolation of momentum and gradient, with decoupled decay. PyTorch has none, and
    DeepSpeed's needs a compiler. Elementwise, so it is the same on a partition of flattened parameters."""

    def __init__(self, params: Any, lr: float, betas: tuple[float, float]) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            gradients, (one, two), rate = [p.grad for p in params], group["betas"], group["lr"]
            for p in params:
                self.state[p].setdefault("exp_avg", torch.zeros_like(p))
            momenta = [self.state[p]["exp_avg"] for p in params]
            updates = torch._foreach_lerp(gradients, momenta, one)
            torch._foreach_sign_(updates)
            torch._foreach_mul_(params, 1 - rate * group["weight_decay"])
            torch._foreach_add_(params, updates, alpha=-rate)
            torch._foreach_lerp_(momenta, gradients, 1 - two)
