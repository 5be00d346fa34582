"""What a run completes while it trains is what its export completes, however the model is divided."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from distlm import execute, plan
from distlm.errors import InputError
from distlm.model.complete import complete, encode_prompts
from distlm.runs import RunFolder
from distlm.runs.report import write_report
from distlm.spec import TrainSpec
from distlm.storage import Storage
from tests.train.ranks import make_corpus, metrics, run_ranks, spec

PROMPTS = ["t5", "t17"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus") / "c")


def asks(corpus: Path, **more: Any) -> TrainSpec:
    return spec(corpus, **{"duration": {"steps": 2}, "evaluate": {"every_steps": 1, "prompts": PROMPTS, "max_tokens": 6}, "checkpoint": {},
                           "schedule": {"name": "constant"}, "optimizer": {"lr": 0.03},
                           "model": {"config": {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
                                                "num_attention_heads": 4, "num_key_value_heads": 2}}, **more})


@pytest.mark.parametrize(("world", "sharding"), [(1, {}), (2, {"zero": 3}), (2, {"tensor_parallel": 2})])
def test_samples_are_those_of_the_export(corpus: Path, tmp_path: Path, world: int, sharding: dict[str, Any]) -> None:
    folder = tmp_path / "run"
    run_ranks({folder: asks(corpus, sharding=sharding, scale={"workers": world})})
    told = [record for record in metrics(folder) if "samples" in record]
    assert [record["step"] for record in told] == [0, 1, 2]
    model = AutoModelForCausalLM.from_pretrained(folder / "export").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "export")
    texts = complete(model, tokenizer, encode_prompts(folder / "export", PROMPTS), 6)
    assert told[-1]["samples"] == [{"prompt": prompt, "completion": text} for prompt, text in zip(PROMPTS, texts, strict=True)]
    assert all(len(text) > 6 for text in texts) and told[0]["samples"] != told[-1]["samples"]
    steps = [record for record in metrics(folder) if "loss" in record]
    assert all(0 < one["forward_s"] + one["backward_s"] < one["step_s"] and one["data_s"] > 0 < one["evaluate_s"] for one in steps)
    page = write_report(RunFolder(folder)).read_text()
    assert texts[0] in page and "as it was before" in page and "forward pass" in page


def test_prompts_that_cannot_be_completed_are_told_before_the_run(corpus: Path, tmp_path: Path) -> None:
    given = asks(corpus, evaluate={"prompts": ["t5", "t6"], "max_tokens": 16})
    for early in (execute.inputs, plan.of_train):
        with pytest.raises(InputError, match=r"evaluate\.prompts\.0: 1 tokens and 16 of max_tokens are more than the 16"):
            early(given, Storage(tmp_path))
    with pytest.raises(ValueError, match="without prompts"):
        asks(corpus, evaluate={"max_tokens": 3})
    with pytest.raises(ValueError, match=r"cannot be with sharding\.sequence_parallel"):
        asks(corpus, sharding={"sequence_parallel": 2}, scale={"workers": 2})
