"""ZeRO++: weights that are kept over groups of workers make the same steps; what cannot be is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distlm.errors import SpecError
from distlm.spec.load import dump, load_spec
from distlm.train.zero import deepspeed_config
from tests.train.ranks import losses, make_corpus, run_ranks, spec
from tests.train.test_resume import case, check_going_on

SHARDED = {"zero": 3, "deepspeed": {"zero_optimization": {"stage3_param_persistence_threshold": 0}}}


@pytest.mark.slow
def test_a_second_partition_over_groups_of_workers_changes_no_step(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path / "c")
    scale = {"workers": 4}
    check_going_on({tmp_path / "whole": case(corpus, "adamw", "bf16", 3, scale=scale, sharding=SHARDED,
                                             batch={"global_sequences": 12, "micro_sequences": 1}),
                    tmp_path / "groups": case(corpus, "adamw", "bf16", 3, scale=scale, ema={"decay": 0.9},
                                              batch={"global_sequences": 12, "micro_sequences": 1},
                                              sharding={**SHARDED, "zeropp": {"hierarchical_partition": 2}})})
    np.testing.assert_allclose(losses(tmp_path / "groups"), losses(tmp_path / "whole"), rtol=1e-6)


@pytest.mark.slow
def test_muon_makes_the_same_steps_with_a_second_partition(tmp_path: Path) -> None:
    corpus, batch = make_corpus(tmp_path / "c"), {"global_sequences": 12, "micro_sequences": 1}
    run_ranks({tmp_path / name: case(corpus, "muon", "bf16", 3, scale={"workers": 4}, batch=batch, sharding={**SHARDED, **zeropp})
               for name, zeropp in (("whole", {}), ("groups", {"zeropp": {"hierarchical_partition": 2}}))})
    np.testing.assert_allclose(losses(tmp_path / "groups"), losses(tmp_path / "whole"), rtol=1e-6)


def test_deepspeed_takes_the_configuration() -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    keys = {"hierarchical_partition": 8, "quantized_weights": True, "quantized_gradients": True}
    given = spec(Path("c"), sharding={"zero": 3, "zeropp": keys}, scale={"workers": 16, "gpus_per_worker": 1},
                 batch={"global_sequences": 32})
    zero = DeepSpeedZeroConfig(**deepspeed_config(given, 1, 1)["zero_optimization"])
    assert (zero.zero_hpz_partition_size, zero.zero_quantized_weights, zero.zero_quantized_gradients) == (8, True, True)
    assert deepspeed_config(spec(Path("c")), 1, 1)["zero_optimization"] == {"stage": 0}


@pytest.mark.parametrize(("sections", "message"), [
    ({"sharding": {"zero": 2, "zeropp": {"hierarchical_partition": 2}}, "scale": {"workers": 2}}, "sharding.zeropp: "),
    ({"sharding": {"zero": 3, "zeropp": {"hierarchical_partition": 3}}, "scale": {"workers": 4}},
     "sharding.zeropp.hierarchical_partition: 3 does not divide 4 workers; try 1, 2, 4"),
    ({"sharding": {"zero": 3, "zeropp": {"quantized_weights": True}}}, "zeropp.quantized_weights: DeepSpeed has its kernels for GPUs"),
    ({"sharding": {"zero": 3, "zeropp": {"hierarchical_partition": 2}, "deepspeed": {"zero_optimization": {"zero_hpz_partition_size": 4}}},
      "scale": {"workers": 4}}, "zero_hpz_partition_size: contradicts sharding.zeropp.hierarchical_partition")])
def test_what_cannot_be_is_refused_by_key(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError) as error:
        load_spec({**dump(spec(Path("c"))), **sections})
    assert message in str(error.value)
