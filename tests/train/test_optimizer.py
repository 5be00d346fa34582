"""Each optimizer makes the steps that its paper or PyTorch makes."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from distlm.model.loss import CausalLoss
from distlm.spec import TrainSpec
from distlm.spec.train import OPTIMIZER_KEYS
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
    matrices = muon_matrices(theirs)
    names = {name for name, p in theirs.model.named_parameters() if p in matrices}
    assert len(names) == 7 and all(".layers.0." in name for name in names), "not the embeddings, nor the last layer"
    muon = torch.optim.Muon([p for p in theirs.parameters() if p in matrices], weight_decay=0.5, adjust_lr_fn="match_rms_adamw")
    rest = [p for p in theirs.parameters() if p not in matrices]
    adamw = torch.optim.AdamW([{"params": [p for p in rest if p.dim() >= 2], "weight_decay": 0.5},
                               {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0}], betas=(0.9, 0.95))
    expected = steps(theirs, muon, adamw)
    for name in expected:
        torch.testing.assert_close(after[name], expected[name], rtol=0, atol=8e-4 if name in names else 1e-7, msg=name)


def test_adafactor_and_sgd_are_pytorchs() -> None:
    for name, keys, make in (("adafactor", {}, torch.optim.Adafactor), ("sgd", {"momentum": 0.8}, torch.optim.SGD)):
        ours, theirs = model(), model()
        after = steps(ours, make_optimizer(spec(name=name, weight_decay=0.0, **keys), ours))
        expected = steps(theirs, make(theirs.parameters(), **keys))
        for parameter in expected:
            torch.testing.assert_close(after[parameter], expected[parameter], msg=f"{name} {parameter}")
