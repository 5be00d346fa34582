"""Each optimizer makes the steps that its paper or PyTorch makes."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from distlm.model.loss import CausalLoss
from distlm.spec import TrainSpec
from distlm.spec.optimizer import OPTIMIZER_KEYS
from distlm.train.optimizer import Lion, make_optimizer, muon_matrices, set_rate
from tests.model.test_loss import TINY


def spec(**optimizer: object) -> TrainSpec:
    return TrainSpec.model_validate({"name": "a", "corpus": "c", "model": {"preset": "llama-tiny"}, "duration": {"steps": 9},
                                     "optimizer": optimizer})


def model(**config: object) -> CausalLoss:
    torch.manual_seed(0)
    return CausalLoss(AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **{**TINY, **config})))


def steps(model: CausalLoss, *optimizers: torch.optim.Optimizer, rate: float = 0.01, count: int = 3) -> dict[str, torch.Tensor]:
    """The model's parameters after some steps with gradients drawn at random, the same in each call."""
    torch.manual_seed(1)
    for _ in range(count):
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group.setdefault("lr_factor", 1.0)
            set_rate(optimizer, rate)
            optimizer.step()
    return {name: p.detach().clone() for name, p in model.model.named_parameters()}


@pytest.mark.parametrize("name", OPTIMIZER_KEYS)
def test_at_a_rate_of_0_nothing_moves_and_vectors_never_decay(name: str) -> None:
    """DeepSpeed steps once with empty gradients before the first step."""
    given = model()
    before = {n: p.detach().clone() for n, p in given.model.named_parameters()}
    optimizer = make_optimizer(spec(name=name), given)
    assert all(torch.equal(before[n], p) for n, p in steps(given, optimizer, rate=0.0).items())
    assert {group["weight_decay"] for group in optimizer.param_groups if group["params"][0].dim() < 2} == {0.0}
    assert all(group["weight_decay"] > 0 for group in optimizer.param_groups if group["params"][0].dim() >= 2)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(before)


def test_defaults_are_those_of_each_optimizer() -> None:
    assert spec(name="adamw").optimizer.betas == (0.9, 0.95) and spec(name="lion").optimizer.betas == (0.9, 0.99)
    assert spec(name="muon").optimizer.momentum == 0.95 and spec(name="sgd").optimizer.momentum == 0.9
    assert spec(name="lion", betas=[0.95, 0.98]).optimizer.betas == (0.95, 0.98)


def test_lion_is_algorithm_2_of_its_paper() -> None:
    torch.manual_seed(0)
    weights, gradients = torch.randn(5, 3), torch.randn(4, 5, 3)
    theta, momentum, p = weights.clone(), torch.zeros(5, 3), torch.nn.Parameter(weights.clone())
    optimizer = Lion([{"params": [p], "weight_decay": 0.1}], lr=0.02, betas=(0.9, 0.99))
    for gradient in gradients:
        update = torch.sign(0.9 * momentum + 0.1 * gradient)
        theta = theta - 0.02 * (update + 0.1 * theta)
        momentum = 0.99 * momentum + 0.01 * gradient
        p.grad = gradient.clone()
        optimizer.step()
    torch.testing.assert_close(p.detach(), theta)


def test_muon_steps_like_pytorchs_scaled_to_adamw_and_leaves_the_rest_to_adamw() -> None:
    ours, theirs = model(tie_word_embeddings=False), model(tie_word_embeddings=False)
    after = steps(ours, make_optimizer(spec(name="muon", weight_decay=0.5), ours))
    matrices = muon_matrices(theirs.model)
    names = {name for name, p in theirs.model.named_parameters() if p in matrices}
    assert len(names) == 7 and all(".layers.0." in name for name in names), "not the embeddings, nor the last layer"
    muon = torch.optim.Muon([p for p in theirs.parameters() if p in matrices], weight_decay=0.5, adjust_lr_fn="match_rms_adamw")
    rest = [p for p in theirs.parameters() if p not in matrices]
    adamw = torch.optim.AdamW([{"params": [p for p in rest if p.dim() >= 2], "weight_decay": 0.5},
                               {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0}], betas=(0.9, 0.95))
    expected = steps(theirs, muon, adamw)
    for name in expected:
        torch.testing.assert_close(after[name], expected[name], rtol=0, atol=8e-4 if name in names else 1e-7, msg=name)


EXPERTS = {"num_local_experts": 3, "num_experts_per_tok": 2}


def experts(family: str) -> CausalLoss:
    torch.manual_seed(0)
    return CausalLoss(AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**TINY, **EXPERTS, "head_dim": 8})))


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_muon_takes_the_matrix_of_each_expert(family: str) -> None:
    """transformers holds those of a layer's experts in one parameter, and the biases of some families too."""
    ours = experts(family)
    matrices = muon_matrices(ours.model)
    names = {name for name, p in ours.model.named_parameters() if p in matrices}
    assert {name.split(".")[-1] for name in names if ".experts." in name} == {"gate_up_proj", "down_proj"}
    assert not any(word in name for name in names for word in ("embed", "lm_head", "norm", "bias", "sinks"))
    before = {name: p.detach().clone() for name, p in ours.model.named_parameters()}
    after = steps(ours, make_optimizer(spec(name="muon", weight_decay=0.5), ours))
    torch.manual_seed(1)
    gradients = [{name: torch.randn_like(p) for name, p in before.items()} for _ in range(3)]
    for name in (name for name in names if ".experts." in name):
        alone = [torch.nn.Parameter(one.clone()) for one in before[name]]
        muon = torch.optim.Muon(alone, lr=0.01, weight_decay=0.5, adjust_lr_fn="match_rms_adamw")
        for drawn in gradients:
            for expert, one in zip(alone, drawn[name], strict=True):
                expert.grad = one.clone()
            muon.step()
        for expert, one in zip(alone, after[name], strict=True):
            torch.testing.assert_close(one, expert.detach(), rtol=0, atol=8e-4, msg=name)


def test_adafactor_and_sgd_are_pytorchs() -> None:
    for name, keys, make in (("adafactor", {}, torch.optim.Adafactor), ("sgd", {"momentum": 0.8}, torch.optim.SGD)):
        ours, theirs = model(), model()
        after = steps(ours, make_optimizer(spec(name=name, weight_decay=0.0, **keys), ours))
        expected = steps(theirs, make(theirs.parameters(), **keys))
        for parameter in expected:
            torch.testing.assert_close(after[parameter], expected[parameter], msg=f"{name} {parameter}")


def test_the_first_group_that_matches_sets_rate_and_decay_and_the_rest_keeps_the_rule() -> None:
    groups = [{"match": r"embed_tokens|lm_head", "lr_factor": 0.5, "weight_decay": 0}, {"match": r"layers\.0.*norm", "weight_decay": 0.3},
              {"match": r"\.(q|k)_proj", "lr_factor": 0.0}, {"match": "proj", "lr_factor": 2.0}]
    given = model()
    before = {name: p.detach().clone() for name, p in given.model.named_parameters()}
    optimizer = make_optimizer(spec(groups=groups), given)
    of = {id(p): (group["lr_factor"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    for name, p in given.model.named_parameters():
        expected = {"embed_tokens": (0.5, 0.0), "lm_head": (0.5, 0.0), "input_layernorm": (1.0, 0.3), "norm": (1.0, 0.0),
                    "post_attention_layernorm": (1.0, 0.3), "q_proj": (0.0, 0.1), "k_proj": (0.0, 0.1)}
        assert of[id(p)] == expected.get(name.split(".")[-2], (2.0, 0.1)), name
    after = steps(given, optimizer, rate=0.001, count=1)
    for part, factor in {"q_proj": 0.0, "embed_tokens": 0.5, "up_proj": 2.0}.items():
        name = next(name for name in before if part in name)
        assert (after[name] - before[name]).abs().median().item() == pytest.approx(0.001 * factor, rel=0.05), name


def test_muons_groups_scale_its_own_rate_and_not_its_decay() -> None:
    given = model()
    plain, scaled = (make_optimizer(spec(name="muon", groups=groups), given).param_groups
                     for groups in ([], [{"match": "mlp", "lr_factor": 3.0}]))
    of = [{id(p): group for group in groups for p in group["params"]} for groups in (plain, scaled)]
    for name, p in given.model.named_parameters():
        one, other = (groups[id(p)] for groups in of)
        assert other["lr_factor"] == pytest.approx(one["lr_factor"] * (3.0 if "mlp" in name else 1.0)), name
        assert other["weight_decay"] == one["weight_decay"]
