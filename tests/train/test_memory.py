"""The parts of a worker's memory, against what autograd keeps and what DeepSpeed documents."""

import itertools
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from distlm.model.adapter import add_adapter
from distlm.model.attention import use_cpu_attention
from distlm.model.build import Shape, build_model, compile_layers, model_config, num_parameters, recompute
from distlm.spec import TrainSpec
from distlm.spec.adapter import Adapter
from distlm.storage import Storage
from distlm.train.activations import BACKWARD, Activations, measure_activations
from distlm.train.driver import short_nodes
from distlm.train.memory import (
    GIB,
    KERNEL_BYTES,
    MAX_KERNELS,
    MAX_LIVE,
    REDUCE_BUCKET,
    Load,
    advice,
    check_states,
    host_memory,
    machine_bytes,
    make_load,
    node_advice,
    node_memory,
    own_states,
    peak_memory,
    start_bytes,
    step_memory,
)
from distlm.train.recipe import make_recipe
from tests.train.ranks import make_corpus
from tests.train.ranks import spec as tiny

LLAMA = {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
         "intermediate_size": 64, "tie_word_embeddings": True}
GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 3, "n_head": 4}
SHAPE = Shape(300, 64, 0)


def spec(**keys: Any) -> TrainSpec:
    return TrainSpec.model_validate({"name": "x", "corpus": "c", "model": {"config": LLAMA}, "duration": {"steps": 1}, **keys})


@pytest.mark.parametrize(("config", "tokens"), [
    (LLAMA, 64), (GPT2, 64), *(({**LLAMA, "num_attention_heads": 2, "num_key_value_heads": 1}, tokens) for tokens in (64, 40)),
    ({**LLAMA, "head_dim": 96}, 300)])                     # wide heads: see `keeps`; the last takes several blocks of queries
def test_activations_are_what_autograd_keeps_in_a_real_pass_on_the_cpu(config: dict[str, Any], tokens: int) -> None:
    given, shape = spec(model={"config": config}, precision="fp32"), replace(SHAPE, context=tokens)
    found = model_config(given.model, shape)
    model = build_model(given.model, found, 0).train()
    use_cpu_attention(model)
    seen = {p.untyped_storage().data_ptr(): 0 for p in model.parameters()}
    keep = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        keep.append(tensor)                                # so that no address is given twice
        seen.setdefault(tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.base_model(input_ids=torch.zeros(1, tokens, dtype=torch.int64), use_cache=False)
    counted = measure_activations(found, shape, "fp32", on_gpu=False)
    assert counted.kept(0) == pytest.approx(sum(seen.values()), rel=0.02)
    assert len(counted.layers) == 3 and counted.inputs == tokens * 32 * 4


def test_rows_of_pairs_keep_no_more_than_a_plan_counts() -> None:
    given = spec(model={"config": LLAMA}, precision="fp32")
    found = model_config(given.model, SHAPE)
    whole, counted = (measure_activations(found, SHAPE, "fp32", on_gpu=False, masked=True, packed=packed).kept(0)
                      for packed in (False, True))
    kept = {}
    for width in (64, 32, 16):                             # 32 tokens are the most whose probabilities are kept, with heads of 8
        model = build_model(given.model, found, 0).train()
        use_cpu_attention(model)
        seen = {p.untyped_storage().data_ptr(): 0 for p in model.parameters()}
        keep = []

        def pack(tensor: torch.Tensor, seen: dict[int, int] = seen, keep: list[torch.Tensor] = keep) -> torch.Tensor:
            keep.append(tensor)
            seen.setdefault(tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            positions = torch.arange(8).repeat(64 // width, width // 8)
            model.base_model(input_ids=torch.zeros(64 // width, width, dtype=torch.int64), position_ids=positions, use_cache=False)
        kept[width] = sum(seen.values())
    assert kept[64] <= whole < max(kept.values()) == kept[32] <= counted
    given = spec(model={"from": "m"}, objective="dpo", precision="fp32")
    sizes = [make_load(given, found, SHAPE, num_parameters(found), 1, 1, True, one).activations.kept(0) for one in (False, True)]
    assert sizes == [counted, whole]
    compiled = measure_activations(found, SHAPE, "fp32", on_gpu=False, masked=True, compiled=True)
    given = given.model_copy(update={"compile": True})
    assert make_load(given, found, SHAPE, num_parameters(found), 1, 1, True).activations == compiled, "of whole windows"


@pytest.mark.skipif(not shutil.which("g++") and not shutil.which("clang++"), reason="there is no C++ compiler")
def test_what_compiled_layers_keep_is_what_the_compiler_has_them_keep() -> None:
    given = spec(model={"config": LLAMA}, precision="fp32")
    found = model_config(given.model, SHAPE)
    model = build_model(given.model, found, 0).train()
    use_cpu_attention(model)
    compile_layers(model)
    seen = {p.untyped_storage().data_ptr(): 0 for p in model.parameters()}
    keep = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        keep.append(tensor)
        seen.setdefault(tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.base_model(input_ids=torch.zeros(1, 64, dtype=torch.int64), use_cache=False)
    counted, plain = (measure_activations(found, SHAPE, "fp32", on_gpu=False, compiled=wanted).kept(0) for wanted in (True, False))
    assert counted == pytest.approx(sum(seen.values()), rel=0.05) and counted < 0.9 * plain
    on_gpu = measure_activations(found, SHAPE, "bf16", on_gpu=True, compiled=True)
    assert on_gpu.layers[0] < measure_activations(found, SHAPE, "bf16", on_gpu=True).layers[0], "and is not counted by hand"


def test_compiled_layers_are_counted_however_often_a_process_has_counted() -> None:
    given = spec(model={"config": LLAMA})
    found = model_config(given.model, SHAPE)
    try:
        with torch._dynamo.config.patch(recompile_limit=1):
            counts = [measure_activations(found, SHAPE, "fp32", on_gpu=False, compiled=True) for _ in range(3)]
    finally:
        torch._dynamo.reset()
    assert counts[0] == counts[1] == counts[2] != measure_activations(found, SHAPE, "fp32", on_gpu=False)


def test_model_states_and_the_memory_of_nodes_are_told_without_a_count_of_activations() -> None:
    def count() -> Activations:
        raise AssertionError

    for keys in ({}, {"sharding": {"zero": 3, "offload": {"optimizer": "cpu", "parameters": "cpu"}}}):
        one = replace(load(**keys), count=count)
        check_states(one)
        assert node_memory(one, 4) >= sum(host_memory(one).values()) > 0
        node_advice(one, 4, 0)
        with pytest.raises(AssertionError):
            peak_memory(one)


def test_a_load_counts_once() -> None:
    given = spec()
    one = make_load(given, model_config(given.model, SHAPE), SHAPE, 1, 1, 1)
    assert one.activations is one.varied(1, 0, 1, True, None).activations


def test_a_layer_that_is_computed_again_keeps_its_input_alone() -> None:
    one = Activations((100, 100, 100), 10, 5, (180, 175, 170))
    assert (one.kept(0), one.kept(1), one.kept(2)) == (305, 35, 125)
    assert (one.last(0), one.last(1), one.last(2)) == (375, 205, 295), "one layer on its way back, beside what others keep"
    assert replace(one, layers=(100, 100), backward=(180, 170)).last(2) == 10 + 5 + 170, "the last is not computed again"


@pytest.mark.parametrize("every", [0, 1, 2])
@pytest.mark.parametrize("adapter", [None, {"rank": 2}])
def test_what_a_backward_pass_takes_is_what_a_real_one_allocates_on_the_cpu(every: int, adapter: dict[str, Any] | None) -> None:
    config, shape = {**LLAMA, "intermediate_size": 256, "num_attention_heads": 2, "num_key_value_heads": 1}, replace(SHAPE, context=128)
    given = spec(model={"config": config}, precision="fp32")
    found = model_config(given.model, shape)
    model = build_model(given.model, found, 0)
    if adapter:
        add_adapter(model, Adapter(**adapter), 0)
    if every:
        recompute(model, every)
    use_cpu_attention(model.train())
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    tokens = torch.zeros(4, 128, dtype=torch.int64)

    def run() -> int:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            model.base_model(input_ids=tokens, use_cache=False)[0].sum().backward()
        events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
        allocated = sorted((event.start_ns(), event.nbytes()) for event in events)
        return max(itertools.accumulate(nbytes for _, nbytes in allocated))

    counted = measure_activations(found, shape, "fp32", on_gpu=False, adapter=Adapter(**adapter) if adapter else None)
    run()
    assert 4 * counted.last(every) == pytest.approx(run(), rel=0.07)


def test_a_family_that_needs_values_is_counted_by_hand() -> None:
    config = model_config(spec(model={"config": {**LLAMA, "model_type": "mixtral", "num_local_experts": 4}}).model, SHAPE)
    plain, by_hand = (measure_activations(config, SHAPE, "bf16", on_gpu=True, adapter=adapter) for adapter in (None, Adapter(rank=2)))
    assert by_hand.layers == (34 * 64 * 32,) * 3 and plain.layers[0] != by_hand.layers[0], "adapters of experts look where tokens go"


def test_a_backward_pass_that_cannot_be_counted_leaves_the_forward_pass_s_count(monkeypatch: pytest.MonkeyPatch) -> None:
    config = model_config(spec().model, SHAPE)
    counted = measure_activations(config, SHAPE, "fp32", on_gpu=False)

    def fail(error: Exception) -> None:
        raise error

    monkeypatch.setattr(torch.Tensor, "backward", lambda _: fail(NotImplementedError()))
    found = measure_activations(config, SHAPE, "fp32", on_gpu=False)
    assert found == replace(counted, backward=tuple(BACKWARD * kept for kept in counted.layers)) != counted
    monkeypatch.setattr(torch.Tensor, "backward", lambda _: fail(KeyError()))
    with pytest.raises(KeyError):                          # a mistake of the count's
        measure_activations(config, SHAPE, "fp32", on_gpu=False)


def test_layers_that_go_from_token_to_token_are_not_passed_backward() -> None:
    mamba = {"model_type": "mamba", "hidden_size": 16, "num_hidden_layers": 1}
    ratios = []
    for tokens in (32, 300):
        shape = replace(SHAPE, context=tokens)
        found = measure_activations(model_config(spec(model={"config": mamba}).model, shape), shape, "bf16", on_gpu=False)
        ratios.append(found.backward[0] / found.layers[0])
    assert ratios[0] == pytest.approx(BACKWARD, rel=0.03) and ratios[0] != ratios[1] == BACKWARD


def test_each_layer_takes_what_is_its_own_on_its_way_back() -> None:
    def count(wide: int) -> Activations:
        deepseek = {"model_type": "deepseek_v3", "hidden_size": 32, "intermediate_size": wide, "moe_intermediate_size": 16,
                    "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 2, "n_routed_experts": 4, "n_group": 2,
                    "topk_group": 1, "num_experts_per_tok": 2, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
                    "qk_nope_head_dim": 8, "v_head_dim": 16, "first_k_dense_replace": 1}
        return measure_activations(model_config(spec(model={"config": deepseek}).model, SHAPE), SHAPE, "bf16", on_gpu=False)

    small, large = count(64), count(8192)                  # the first layer has the width, and no experts
    assert large.first() > large.layers[0] > 10 * small.first()
    assert small.last(0) - small.layers[0] == large.last(0) - large.layers[0] and small.last(1) == large.last(1)


@pytest.mark.parametrize("own_kernel", [True, False])
def test_the_mask_of_documents_takes_what_it_does_in_a_real_pass(own_kernel: bool) -> None:
    """PyTorch's kernel on CPU makes the same of a mask as those on GPU."""
    given = spec(model={"config": LLAMA}, precision="fp32")
    found = model_config(given.model, SHAPE)
    model, masks = build_model(given.model, found, 0).train(), list[torch.Tensor]()
    if own_kernel:
        use_cpu_attention(model)

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.shape == (1, 1, 64, 64):
            masks.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.base_model(input_ids=torch.zeros(1, 64, dtype=torch.int64), position_ids=torch.arange(16).repeat(1, 4), use_cache=False)
    kept = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in masks}
    assert [*kept.values()] == ([64**2] if own_kernel else [4 * 64**2] * 3)
    plain, masked = (measure_activations(found, SHAPE, "fp32", on_gpu=not own_kernel, masked=wanted) for wanted in (False, True))
    assert masked.kept(0) - plain.kept(0) == sum(kept.values()) + 64**2 * (not own_kernel), "and the boolean one, of which they are made"
    assert masked.kept(1) - plain.kept(1) == 64**2 == masked.mask, "a layer that is computed again makes its own again"


@pytest.mark.parametrize("config", [LLAMA, {**LLAMA, "model_type": "mixtral", "num_local_experts": 4}])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_gpu_s_layers_each_keep_a_mask_of_their_own(config: dict[str, Any], compiled: bool) -> None:
    found = model_config(spec(model={"config": config}).model, SHAPE)
    plain, masked = (measure_activations(found, SHAPE, "bf16", on_gpu=True, masked=wanted, compiled=compiled, adapter=Adapter(rank=2))
                     for wanted in (False, True))
    mine = 2 * 64**2
    assert masked.layers == tuple(one + mine for one in plain.layers) and masked.backward == tuple(one + mine for one in plain.backward)


def test_the_mask_of_documents_is_there_until_the_first_layer_has_been_passed_backward() -> None:
    config = model_config(spec().model, SHAPE)
    plain, masked = (measure_activations(config, SHAPE, "bf16", on_gpu=False, masked=wanted) for wanted in (False, True))
    assert masked == replace(plain, mask=64**2, outside=plain.outside + 64**2)
    eager = model_config(spec(model={"config": {**LLAMA, "attn_implementation": "eager"}}).model, SHAPE)
    assert measure_activations(eager, SHAPE, "bf16", on_gpu=True, masked=True).mask == 2 * 64**2
    one = load(activation_checkpointing=1)
    one = replace(one, accumulation=1, count=lambda: replace(load().activations, mask=GIB // 64))
    assert peak_memory(one).activations == 8 * (3 * GIB // 2 + GIB // 64), "as gradients are there"


def load(gpus: int = 1, parameters: int = 10**9, **keys: Any) -> Load:
    given = spec(scale={"workers": 8, "gpus_per_worker": gpus}, **keys)
    activations = Activations((GIB,) * 4, GIB // 32, GIB // 16, (3 * GIB // 2,) * 4)
    return Load(given, parameters, lambda: activations, 2048, 32000, 4096, 8, 2, True, True)


def test_every_part_follows_from_the_stage() -> None:
    parts = {zero: peak_memory(load(sharding={"zero": zero})) for zero in range(4)}
    assert [parts[zero].weights for zero in range(4)] == [2 * 10**9] * 3 + [2 * 10**9 // 8]
    assert [parts[zero].optimizer for zero in range(4)] == [12 * 10**9] + [12 * 10**9 // 8] * 3
    assert parts[0].total > parts[1].total > parts[2].total
    twice = peak_memory(load(sharding={"zero": 3, "zeropp": {"hierarchical_partition": 4}}))
    assert twice.weights == 2 * 10**9 // 8 + 2 * 10**9 // 4, "once over all ranks, and once over those of a node"
    assert parts[3].buffers >= 2 * 5 * 10**8 + 2 * 10**9, "its bucket, and the parameters that are gathered"
    plain, small = (peak_memory(load(reduce_precision="same", sharding={"zero": 2, "deepspeed": {"zero_optimization": raw}}))
                    for raw in ({}, {"reduce_bucket_size": 10**6}))
    assert plain.buffers - small.buffers == 2 * (5 * 10**8 - 10**6)
    assert peak_memory(load(ema={})).ema == 4 * 10**9
    again = peak_memory(load(parameters=10**7, activation_checkpointing=1))
    assert again.activations == 8 * (4 * GIB // 32 + GIB // 16 + 3 * GIB // 2), "all inputs, and one layer on its way back"


def test_activations_have_gone_when_a_bucket_is_sent_that_holds_all_gradients() -> None:
    for n, meanwhile in ((4 * 10**8, False), (10**9, True)):
        found = peak_memory(load(0, n, precision="fp32", activation_checkpointing=1, sharding={"zero": 1}))
        assert found.activations and bool(found.buffers) == meanwhile


def test_a_cpu_keeps_kernels_for_each_block_of_queries_of_a_window() -> None:
    def buffers(gpus: int, context: int, precision: str, heads: int = 16, **sharding: int) -> int:
        one = load(gpus, 10**6, activation_checkpointing=1, precision=precision, sharding=sharding)
        return peak_memory(replace(one, context=context, heads=heads, micro_sequences=1)).buffers

    assert buffers(0, 4096, "bf16") - buffers(0, 1024, "bf16") == 3 * (32 - 8) * KERNEL_BYTES
    assert buffers(0, 512, "bf16", sequence_parallel=2) == buffers(0, 1024, "bf16"), "attention has all tokens"
    assert buffers(0, 1024, "bf16", 18) - buffers(0, 1024, "bf16", 0) == 2 * 3 * 8 * KERNEL_BYTES, "4 at once, and a last block of 2"
    assert buffers(0, 1 << 20, "bf16") - buffers(0, 1 << 20, "bf16", 0) == MAX_KERNELS * KERNEL_BYTES, "the last of them"
    assert buffers(1, 4096, "bf16") == buffers(1, 1024, "bf16") and buffers(0, 4096, "fp32") == buffers(0, 1024, "fp32")


def test_sums_in_fp32_are_counted() -> None:
    n, part = 10**9, 10**9 // 8
    for zero in range(4):
        summed, same = (peak_memory(load(sharding={"zero": zero}, reduce_precision=how)) for how in ("fp32", "same"))
        assert peak_memory(load(sharding={"zero": zero})) == summed
        assert own_states(load(sharding={"zero": zero}))["gradients"] == (4 * n if zero < 2 else 4 * part)
        assert own_states(load(sharding={"zero": zero}, reduce_precision="same"))["gradients"] == (2 * n if zero < 2 else 2 * part)
        assert summed.total > same.total or zero == 0, "without ZeRO they are the optimizer's own copy too"


def test_auto_is_deepspeed_s_default() -> None:
    """DeepSpeed's configuration drops what is "auto", and takes its own names beside those of stage 3."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    from distlm.train.zero import check_raw

    keys = {"reduce_bucket_size": 10**6, "stage3_max_live_parameters": 10**7, "zero_hpz_partition_size": 4}
    plain = peak_memory(load(sharding={"zero": 3}))
    for key, value in keys.items():
        auto, given, unprefixed = (load(sharding={"zero": 3, "deepspeed": {"zero_optimization": raw}})
                                   for raw in ({key: "auto"}, {key: value}, {key.removeprefix("stage3_"): value}))
        for one in (auto, given, unprefixed):
            check_raw(one.spec)
        assert peak_memory(auto) == plain != peak_memory(given) == peak_memory(unprefixed), key
    defaults = DeepSpeedZeroConfig(**dict.fromkeys(keys, "auto"))
    assert (defaults.reduce_bucket_size, defaults.max_live_parameters, defaults.zero_hpz_partition_size) == (REDUCE_BUCKET, MAX_LIVE, 1)


def test_a_checkpoint_that_is_written_beside_the_steps_takes_a_copy_of_the_state_on_cpu() -> None:
    saved = {(zero, precision): peak_memory(load(0, precision=precision, sharding={"zero": zero})).snapshot
             for zero in (0, 2, 3) for precision in ("bf16", "fp32")}
    n, part = 10**9, 10**9 // 8
    assert saved == {(0, "bf16"): 14 * n, (0, "fp32"): 12 * n, (2, "bf16"): 2 * n + 12 * part, (2, "fp32"): 4 * n + 12 * part,
                     (3, "bf16"): 12 * part, (3, "fp32"): 12 * part}, "as files of small runs are large"
    assert peak_memory(load(0, ema={})).snapshot == (14 + 4) * n
    assert peak_memory(load(1)).snapshot == 0, "a GPU's lies in the host's memory"
    one, still = load(0), peak_memory(load(0, checkpoint={"asynchronous": False}))
    assert still.snapshot == 0 and peak_memory(one).total > still.total
    sharded = load(0, sharding={"zero": 3})
    assert advice(sharded, peak_memory(sharded).total - 1).startswith("checkpoint.asynchronous: false, at ")


def test_what_is_offloaded_lies_in_the_memory_of_the_node_and_not_of_the_gpu() -> None:
    n, part = 10**9, 10**9 // 8
    optimizer, both = {"optimizer": "cpu"}, {"optimizer": "cpu", "parameters": "cpu"}
    for zero in (1, 2, 3):
        whole, away = (peak_memory(one) for one in (load(sharding={"zero": zero}), load(sharding={"zero": zero, "offload": optimizer})))
        assert whole.optimizer == 12 * part and away.optimizer == 0 and away.weights == whole.weights
        assert away.gradients == (2 * n if zero == 1 else 0), "which stage 1 does not divide"
        assert away.total < whole.total and away.snapshot == 0
        host = host_memory(load(sharding={"zero": zero, "offload": optimizer}))
        assert host == {"gradients": (6 if zero < 3 else 8) * part, "optimizer": 12 * part, "snapshot": 12 * part + 2 * n * (zero < 3)}
    assert peak_memory(load(sharding={"zero": 3, "offload": both})).weights == 0
    assert host_memory(load(sharding={"zero": 3, "offload": both}, ema={}))["weights"] == 2 * part
    raw = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
    assert host_memory(load(sharding={"zero": 2, "deepspeed": raw})) == host_memory(load(sharding={"zero": 2, "offload": optimizer}))
    raw["zero_optimization"]["offload_optimizer"]["device"] = "auto"
    assert peak_memory(load(sharding={"zero": 2, "deepspeed": raw})) == peak_memory(load(sharding={"zero": 2})), "which is none"
    disks = load(sharding={"zero": 3, "offload": {"optimizer": "nvme", "parameters": "cpu", "path": "/d"}})
    assert host_memory(disks) == {"weights": 2 * part, "gradients": 4 * part} and sum(own_states(disks).values()) == 0
    summed = load(sharding={"zero": 2, "offload": optimizer}, reduce_precision="fp32")
    assert host_memory(summed)["gradients"] == own_states(summed)["gradients"] == 4 * part, "sums stay on the GPU until the end"
    on_cpu = [load(0, sharding={"zero": 2, **one}, reduce_precision="same") for one in ({}, {"offload": optimizer})]
    assert peak_memory(on_cpu[0]) == peak_memory(on_cpu[1]) and host_memory(on_cpu[1]) == {}, "it is the same memory"


def test_under_stage_3_the_start_takes_memory_of_rank_0_or_of_each_that_reads_an_adapter_s_base() -> None:
    n, still = 10**9, {"checkpoint": {"asynchronous": False}}
    drawn, read = load(sharding={"zero": 3}, **still), load(sharding={"zero": 3}, model={"from": "m"}, **still)
    assert start_bytes(drawn) == start_bytes(read) == (0, 4 * n) and node_memory(drawn, 4) == node_memory(read, 4) == 4 * n
    tuned = load(sharding={"zero": 3}, model={"from": "m"}, adapter={"rank": 4}, precision="bf16", **still)
    assert node_memory(tuned, 4) == 4 * 2 * n, "which is read in bf16"
    assert node_memory(load(sharding={"zero": 3}), 8) == 12 * n, "the copy of a checkpoint takes more than the start"
    assert peak_memory(drawn).total == peak_memory(read).total, "no GPU has it whole"
    own = peak_memory(load(0, parameters=10**11, sharding={"zero": 3}, **still))
    assert own.parts() == {**dict.fromkeys(own.parts(), 0), "start": 4 * 10**11}, "a worker on CPU has it in its own memory"
    several = load(0, parameters=10**10, sharding={"zero": 3}, **still)
    assert machine_bytes(several) == max(several.spec.scale.workers * step_memory(several).total, 4 * 10**10), "rank 0 alone draws it"
    half = replace(load(parameters=10**11, sharding={"zero": 3, "tensor_parallel": 2}, **still), undivided=2 * 10**11)
    half = replace(half, spec=half.spec.model_copy(update={"scale": half.spec.scale.model_copy(update={"workers": 64})}))
    assert start_bytes(half) == (8 * 10**11, 0), "each has the whole model first"
    assert peak_memory(half).total == 4 * 10**11 > peak_memory(replace(half, spec=half.spec.model_copy(update={
        "sharding": drawn.spec.sharding}))).total, "and its part of it in float32 on its GPU"


def test_a_checkpoint_beside_the_steps_takes_host_memory_once_for_each_worker_of_a_node() -> None:
    n, part = 10**9, 10**9 // 8
    assert node_memory(load(sharding={"zero": 2}), 4) == 4 * 12 * part + 2 * n, "whole weights are rank 0's alone"
    assert node_memory(load(), 4) == 14 * n and node_memory(load(ema={}), 4) == 14 * n + 4 * 4 * n
    assert node_memory(load(checkpoint={"asynchronous": False}), 4) == 0
    offloaded = load(sharding={"zero": 1, "offload": {"optimizer": "cpu"}})
    assert node_advice(load(), 4, 14 * n - 1).startswith("sharding.zero: 1, at "), "four of eight workers have half of the state"
    assert node_advice(offloaded, 8, node_memory(offloaded, 8) - 1).startswith("checkpoint.asynchronous: false, at ")
    assert node_advice(offloaded, 8, n) == ""


def test_a_run_tells_of_nodes_whose_memory_its_workers_on_gpus_exceed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = tiny(make_corpus(tmp_path / "c"), scale={"workers": 4, "gpus_per_worker": 1}, batch={"global_sequences": 8},
                 sharding={"zero": 2, "offload": {"optimizer": "cpu"}})
    recipe = make_recipe(given, Storage(tmp_path))
    need = node_memory(make_load(given, model_config(given.model, recipe.shape), recipe.shape, recipe.parameters, 2, 1), 2)
    rooms = [{"GPU": 2.0, "memory": need, "object_store_memory": 0}, {"CPU": 8.0, "memory": 1}, {"GPU": 2.0, "memory": need - 1}]
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": room} for room in rooms])
    [text] = short_nodes(recipe)
    assert text.startswith("a node with 2 of the workers has ") and "it would fit with " in text
    rooms.pop()
    assert short_nodes(recipe) == []


def test_advice_is_the_cheapest_change_that_fits() -> None:
    one = load()
    total = peak_memory(one).total
    assert advice(one, total - 1).startswith("sharding.zero: 1, at ")
    assert advice(load(sharding={"zero": 3}), peak_memory(load(sharding={"zero": 3})).total - 1).startswith("batch.micro_sequences: 4, at ")
    assert "activation_checkpointing: 1" in advice(load(parameters=10**8), 4 * GIB)
    assert advice(one, GIB) == ""
    assert advice(load(optimizer={"name": "adafactor"}), 16 * GIB).startswith("batch.micro_sequences"), "adafactor has no ZeRO"
    assert advice(load(parameters=8 * 10**9), 36 * GIB).startswith("sharding.zero: 3")
    for precision in ("bf16", "fp8"):
        compiled = load(parameters=8 * 10**9, compile=True, precision=precision)
        assert advice(compiled, 38 * GIB).startswith("sharding.zero: 2 and batch.micro_sequences: 1 and activation"), "no stage 3"


def test_sums_in_less_than_fp32_are_the_last_advice() -> None:
    one = load(sharding={"zero": 2})
    same = peak_memory(load(sharding={"zero": 2}, reduce_precision="same")).total
    for limit, alone in ((same, True), (same - 1, False)):
        text = advice(one, limit)
        first, _, other = text.partition(", or with ")
        assert "reduce_precision" not in first and first.count(", at ") == 1
        assert other == (f"reduce_precision: same, at {same / GIB:.3g} GiB" if alone else "")
    exact, rounded = (min(peak_memory(one.varied(zero, 1, 1, True, sums)).total for zero in (2, 3)) for sums in ("fp32", "same"))
    assert rounded < exact, "the least of each"
    assert "reduce_precision" not in advice(one, exact) and " and reduce_precision: same, at " in advice(one, exact - 1)
    assert advice(one, rounded - 1) == "" == advice(load(sharding={"zero": 2}, reduce_precision="same"), rounded - 1)
    for given in ({"reduce_precision": "same"}, {"precision": "fp32"}):
        whole = load(sharding={"zero": 2}, **given)
        assert not any("reduce" in advice(whole, peak_memory(whole).total - less) for less in (1, GIB, 2 * GIB, 4 * GIB, 8 * GIB))
    offloaded = load(sharding={"zero": 3, "offload": {"optimizer": "cpu"}}, checkpoint={"asynchronous": False})
    assert node_advice(offloaded, 8, node_memory(offloaded, 8) - 1).startswith("reduce_precision: same, at ")


def test_a_load_is_made_of_a_spec_and_half_a_batch_takes_half_the_activations() -> None:
    given = spec()
    config = model_config(given.model, SHAPE)
    both = [peak_memory(make_load(given, config, SHAPE, num_parameters(config), micro, 2)).activations for micro in (64, 32)]
    assert both[0] == 2 * both[1] > 0
