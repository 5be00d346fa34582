"""What a step computes, and of which peak."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForSequenceClassification

from distlm.model.build import Shape, build_model, decoder_layers, model_config, parameter_sizes
from distlm.runs import RunFolder
from distlm.spec import TrainSpec
from distlm.spec.gpus import GPUS, find_gpu
from distlm.spec.train import ModelSpec
from distlm.storage import Storage
from distlm.train import flops, metrics
from distlm.train.memory import GIB, memory_limit
from distlm.train.metrics import MetricsWriter, StepResult
from distlm.train.recipe import make_recipe
from tests.model.encoders import config_of
from tests.train.ranks import make_corpus, spec

LLAMA = {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
         "intermediate_size": 64}
GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4}


QWEN3 = {**LLAMA, "model_type": "qwen3", "head_dim": 24}
GEMMA = {**LLAMA, "model_type": "gemma", "head_dim": 16}
MIXTRAL = {**LLAMA, "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
WINDOWS = {**LLAMA, "model_type": "gemma3_text", "head_dim": 16, "num_hidden_layers": 3, "sliding_window": 48,
           "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
LATENT = {"model_type": "deepseek_v3", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
          "intermediate_size": 64, "first_k_dense_replace": 2, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 16,
          "qk_rope_head_dim": 8, "v_head_dim": 12}


@pytest.mark.parametrize("config", [
    {**LLAMA, "tie_word_embeddings": True}, {**LLAMA, "tie_word_embeddings": False}, QWEN3, GEMMA, GPT2, MIXTRAL, LATENT, WINDOWS,
    {**LLAMA, "model_type": "mistral", "sliding_window": 100}], ids=lambda config: config["model_type"])
def test_the_arithmetic_is_what_torch_counts_in_products_less_the_scores_that_are_masked(config: dict[str, Any]) -> None:
    """Of a context at which most of it is attention's, whose masked scores torch counts too."""
    tokens = 512
    given = ModelSpec(config={**config, "attn_implementation": "eager"})
    found = model_config(given, Shape(300, tokens, 0))
    found._experts_implementation = "eager"                # torch does not count the products of other ones
    model = build_model(given, found, 0)
    masked = 0
    heads = config.get("num_attention_heads") or config["n_head"]
    both = 2 * (config.get("head_dim") or 32 // heads) if config is not LATENT else 16 + 8 + 12

    def look(_: Any, args: Any, kwargs: Any) -> None:
        nonlocal masked
        mask = next(one for one in [*args, *kwargs.values()] if isinstance(one, torch.Tensor) and one.shape[-2:] == (tokens, tokens))
        masked += int((mask != 0).sum())

    for layer in decoder_layers(model):
        layer.register_forward_pre_hook(look, with_kwargs=True)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=torch.zeros(1, tokens, dtype=torch.long)).logits.sum().backward()
    vectors = sum(p.numel() for p in model.parameters() if p.dim() < 2)        # norms and biases, which torch does not count
    expected = counter.get_total_flops() - 6 * heads * both * masked + 6 * tokens * vectors
    assert flops.config_flops(found, parameter_sizes(found), tokens) * tokens == pytest.approx(expected, rel=0.003)
    assert tokens * flops.attention_flops(found, tokens) > 0.25 * expected, "a mistake in attention's part would be seen"


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_the_arithmetic_of_an_encoder_is_what_torch_counts_less_the_scores_that_are_masked(family: str) -> None:
    """But for the head, which reads one token of a text, and is counted for each."""
    tokens, window = 256, 32
    config = config_of(family, hidden_size=64, intermediate_size=256, num_hidden_layers=4, max_position_embeddings=tokens,
                       local_attention=2 * window, num_labels=2, problem_type="single_label_classification",
                       attn_implementation="eager")
    model = AutoModelForSequenceClassification.from_config(config).train()
    with FlopCounterMode(display=False) as counter:
        model(input_ids=torch.full((1, tokens), 3), attention_mask=torch.ones(1, tokens, dtype=torch.long)).logits.sum().backward()
    vectors = sum(p.numel() for p in model.parameters() if p.dim() < 2)
    masked = 0 if family == "bert" else 2 * (tokens - window)**2               # of two layers of four, on either side
    expected = counter.get_total_flops() - 6 * 2 * 64 * masked + 6 * tokens * vectors
    assert flops.config_flops(config, parameter_sizes(config), tokens) * tokens == pytest.approx(expected, rel=0.02)


def test_of_a_mixture_of_experts_those_that_a_token_goes_to_count() -> None:
    family = {"model_type": "mixtral", **{key: value for key, value in LLAMA.items() if key != "model_type"}}
    sizes = {}
    for chosen in (1, 4):
        config = model_config(ModelSpec(config={**family, "num_local_experts": 4, "num_experts_per_tok": chosen}), Shape(300, 16, 0))
        sizes[chosen] = flops.multiplied(config, parameter_sizes(config))
    assert sizes[4] - sizes[1] == 2 * 3 * (3 * 32 * 64)    # layers, experts left out, an expert's matrices


@pytest.mark.parametrize("name, peak, memory", [
    ("NVIDIA H100 80GB HBM3", 989e12, 80), ("NVIDIA H100 PCIe", 756e12, 80), ("NVIDIA H200", 989e12, 141),
    ("NVIDIA A100-SXM4-40GB", 312e12, 40), ("NVIDIA A100-SXM4-80GB", 312e12, 80), ("NVIDIA A100 80GB PCIe", 312e12, 80),
    ("NVIDIA L4", 121e12, 24), ("NVIDIA L40S", 362e12, 48), ("Tesla V100-SXM2-16GB", 125e12, 16), ("Tesla V100-SXM2-32GB", 125e12, 32),
    ("NVIDIA GeForce RTX 4090", 165.2e12, 24), ("NVIDIA B200", 2250e12, 180), ("Tesla T4", 65e12, 16)])
def test_a_gpu_is_known_by_its_name(name: str, peak: float, memory: int) -> None:
    gpu = find_gpu(name)
    assert gpu and flops.peak_flops(name, "fp16") == flops.peak_flops(name, "fp8") == peak and gpu.memory_gib == memory


@pytest.mark.parametrize("precision", ["fp32", "half"])
@pytest.mark.parametrize("name", GPUS)
def test_a_job_may_name_each_gpu_of_the_table_with_what_it_multiplies_in(name: str, precision: str) -> None:
    def given(precision: str) -> TrainSpec:
        return TrainSpec.model_validate({"name": "x", "corpus": "c", "model": {"config": LLAMA}, "duration": {"steps": 1}, "compile": True,
                                         "sharding": {"zero": 1}, "precision": precision, "scale": {"gpus_per_worker": 1, "gpu": name}})

    gpu = find_gpu(name)
    assert gpu is GPUS[name], "no row before it has its name"
    if precision == "fp32":
        assert flops.peak_flops(name, "fp32") == gpu.fp32_flops < gpu.half_flops
        assert memory_limit(given("fp32")) == (gpu.memory_gib - 1) * GIB
        return
    able = [one for one in ("fp16", "bf16", "fp8") if gpu.multiplies(one)]
    assert {flops.peak_flops(name, one) for one in able} == {gpu.half_flops} and "fp16" in able
    for one in ("fp16", "bf16", "fp8"):
        if one in able:
            assert given(one).scale.gpu == name
        else:
            instead = "bf16" if "bf16" in able else "fp16 with sharding.zero: 1, or fp32"
            with pytest.raises(ValueError, match=f"{one} is not in the hardware of {name}; take {instead}, or one of B200"):
                given(one)


def test_a_gpu_without_bfloat16_has_no_peak_of_it() -> None:
    assert [name for name in GPUS if flops.peak_flops(name) is None] == ["V100-SXM2-32GB", "V100", "T4"]


def test_a_gpu_that_the_table_does_not_know_has_no_peak() -> None:
    for name in ("NVIDIA L400", "H100x", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA GeForce RTX 4090 Laptop GPU"):
        assert flops.peak_flops(name) is None


def test_half_of_the_peak_is_an_mfu_of_a_half() -> None:
    assert flops.mfu(1e3, 6e9, 12e12) == 0.5
    assert 1e8 < flops.measured_peak() < 1e16


@pytest.mark.parametrize("peak", [None, 1e9])
def test_a_record_has_mfu_where_the_peak_is_known_and_memory_always(peak: float | None, tmp_path: Path,
                                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "worker_peak", lambda precision: peak)
    recipe = make_recipe(spec(make_corpus(tmp_path / "c"), scale={"workers": 2}), Storage(tmp_path))
    writer = MetricsWriter(RunFolder(tmp_path / "run"), recipe, 0)
    writer.step(1, StepResult(4.0, 1.0, recipe.tokens_of(0)), 0.01, {"step_s": 0.5}, {})
    writer.close()
    [record] = RunFolder(tmp_path / "run").read_metrics()
    assert 1e7 < record["memory_bytes"] < 1e11
    assert record.get("mfu") == (None if peak is None else pytest.approx(12 * 16 / 0.5 * recipe.flops_per_token / 2e9))
