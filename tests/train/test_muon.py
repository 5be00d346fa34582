"""Matrices that go through Newton-Schulz together make the steps that they make one by one."""

import copy
from typing import Any

import pytest
import torch
from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

from distlm.train import muon
from distlm.train.muon import Muon, together
from distlm.train.optimizer import make_optimizer
from tests.train.test_optimizer import model, spec, steps

LAYERS = {"num_hidden_layers": 3, "tie_word_embeddings": False}


def made(monkeypatch: pytest.MonkeyPatch, cls: type[Any]) -> tuple[Any, Any]:
    """A model and its optimizer, of the class that is given."""
    monkeypatch.setattr(muon, "Muon", cls)
    given = model(**LAYERS)
    return given, make_optimizer(spec(name="muon", weight_decay=0.5), given)


def test_steps_and_states_are_deepspeed_s_to_the_bit_and_each_goes_on_from_the_other_s(monkeypatch: pytest.MonkeyPatch) -> None:
    (ours, own), (theirs, other) = made(monkeypatch, Muon), made(monkeypatch, MuonWithAuxAdam)
    assert type(own) is Muon and type(other) is MuonWithAuxAdam
    for crossed in (False, True):
        after, expected = steps(ours, own), steps(theirs, other)
        assert all(torch.equal(after[name], expected[name]) for name in expected)
        states = copy.deepcopy([own.state_dict(), other.state_dict()])
        assert states[0]["param_groups"] == states[1]["param_groups"]
        assert states[0]["state"].keys() == states[1]["state"].keys() and len(states[0]["state"]) == len(expected)
        for i, one in states[0]["state"].items():
            assert one.keys() == states[1]["state"][i].keys()
            assert all(torch.equal(one[key], states[1]["state"][i][key]) for key in one)
        if not crossed:
            own.load_state_dict(states[1])
            other.load_state_dict(states[0])


def test_those_of_one_shape_go_together_as_far_as_memory_for_them_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    given, optimizer = made(monkeypatch, Muon)
    seen, newton_schulz = [], muon.zeropower_via_newtonschulz5

    def watched(matrices: torch.Tensor, steps: int) -> torch.Tensor:
        seen.append(tuple(matrices.shape))
        return newton_schulz(matrices, steps)

    monkeypatch.setattr(muon, "zeropower_via_newtonschulz5", watched)
    steps(given, optimizer, count=1)
    assert sum(shape[0] for shape in seen) == 3 * 7 and len(seen) == len({shape[1:] for shape in seen}) < 7
    matrices = [torch.zeros(2, 3), torch.zeros(3, 2), torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(9, 9)]
    monkeypatch.setattr(muon, "TOGETHER_ELEMENTS", 13)
    assert [[one.shape for one in part] for part in together(matrices)] == [[(2, 3)] * 2, [(2, 3)], [(3, 2)], [(9, 9)]]


def test_under_zero_it_is_deepspeed_s_own() -> None:
    sharded = spec(name="muon", clip=0)
    sharded = sharded.model_copy(update={"sharding": sharded.sharding.model_copy(update={"zero": 2})})
    assert type(make_optimizer(sharded, model())) is MuonWithAuxAdam
