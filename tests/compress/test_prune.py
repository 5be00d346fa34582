"""Pruning: what is taken away is the least, the export is a plain smaller model, and zeros are the smallest weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from distlm import execute
from distlm.compress import prune
from distlm.compress.task import task_of
from distlm.errors import DistlmError
from distlm.model.build import decoder_layers, load_model, num_parameters
from distlm.model.export import export_model
from distlm.storage import Storage, read_json, write_json
from tests.compress.made import compressed, spec
from tests.corpus.made import Doc, make
from tests.evaluate.models import make_model
from tests.records import Records


def test_channels_and_layers_go_and_transformers_loads_what_is_left(root: Path, tmp_path: Path) -> None:
    done, before, after = compressed(root, "structured", tmp_path / "export", channels=0.5, layers=1)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    assert model.config.intermediate_size == done["channels"] == 64 and model.config.num_hidden_layers == done["layers"] == 2
    assert len(done["dropped_layers"]) == 1 and after["bytes"] < 0.7 * before["bytes"] and after["loss"] != before["loss"]
    whole = load_model(root / "runs" / "m" / "export", "model", torch.float32)
    kept = [i for i in range(3) if i not in done["dropped_layers"]]
    for new, old in enumerate(kept):
        a, b = model.model.layers[new], whole.model.layers[old]
        assert torch.equal(a.self_attn.q_proj.weight, b.self_attn.q_proj.weight)
        norms = sum(m.weight.square().sum(1) for m in (b.mlp.up_proj, b.mlp.gate_proj)) + b.mlp.down_proj.weight.square().sum(0)
        rows = norms.argsort()[64:].sort().values
        assert torch.equal(a.mlp.up_proj.weight, b.mlp.up_proj.weight[rows])
        assert torch.equal(a.mlp.gate_proj.weight, b.mlp.gate_proj.weight[rows])
        assert torch.equal(a.mlp.down_proj.weight, b.mlp.down_proj.weight[:, rows])


def test_the_layer_that_goes_is_the_one_that_does_nothing(root: Path, tmp_path: Path) -> None:
    idle = make_model(tmp_path / "idle", root / "corpora" / "text", hidden_size=64, intermediate_size=128, num_hidden_layers=3)
    model: Any = load_model(idle, "model", torch.float32)
    for weight in (model.model.layers[1].self_attn.o_proj.weight, model.model.layers[1].mlp.down_proj.weight):
        torch.nn.init.zeros_(weight)
    one = spec("structured", layers=1, model=str(idle))
    task, _ = task_of(one, Storage(root))
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        wanted = model(tokens).logits
        assert prune.structured(model, one, task)["dropped_layers"] == [1]
        for i, layer in enumerate(decoder_layers(model)):
            layer.self_attn.layer_idx = i
        assert torch.allclose(model(tokens, use_cache=False).logits, wanted, atol=1e-5)
    assert num_parameters(model.config) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(("family", "lists"), [
    ("smollm3", {"no_rope_layers": [1, 0, 1], "layer_types": ["full_attention", "sliding_attention", "full_attention"]}),
    ("qwen2_moe", {"mlp_only_layers": [0, 1, 2]}), ("qwen2_moe", {"mlp_only_layers": [1]}), ("qwen2_moe", {"mlp_only_layers": []})])
def test_of_each_layer_its_own_goes_and_lists_of_their_numbers_are_refused(family: str, lists: dict[str, list[Any]]) -> None:
    config = AutoConfig.for_model(family, vocab_size=64, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_experts=2,
                                  shared_expert_intermediate_size=16, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
                                  sliding_window=8, use_sliding_window=family == "smollm3", pad_token_id=0, **lists)
    model: Any = AutoModelForCausalLM.from_config(config)
    if lists.get("mlp_only_layers"):
        with pytest.raises(DistlmError, match="layers: it is not known what mlp_only_layers in the configuration of the qwen2_moe family"):
            prune.drop_layers(model, [1])
        return
    assert prune.drop_layers(model, [1]) == [1] and model.config.num_hidden_layers == 2
    for key, value in lists.items():
        assert getattr(model.config, key) == [value[i] for i in (0, 2) if value]


@pytest.mark.parametrize(("files", "told"), [(torch.float32, "bfloat16"), (torch.bfloat16, "float32")])
def test_weights_keep_the_precision_of_the_files_whatever_the_configuration_says(root: Path, tmp_path: Path, files: torch.dtype,
                                                                               told: str) -> None:
    source = root / "runs" / "m" / "export"
    export_model(load_model(source, "model", files), None, source, tmp_path / "model", {})
    write_json(tmp_path / "model" / "config.json", {**read_json(tmp_path / "model" / "config.json"), "dtype": told})
    compressed(root, "magnitude", tmp_path / "export", sparsity=0.5, model=str(tmp_path / "model"))
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("model", "export"))
    assert {one.dtype for one in before.values()} == {one.dtype for one in after.values()} == {files}
    assert all(torch.equal(after[name], torch.where(after[name] == 0, 0, value)) for name, value in before.items())
    assert f"torch.{read_json(tmp_path / 'export' / 'config.json')['dtype']}" == str(files)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_smallest_weights_of_each_matrix_are_zero_and_no_others(family: str) -> None:
    sizes = {"llama": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
             "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4}}[family]
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, vocab_size=64, **sizes)).requires_grad_(False)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    done = prune.magnitude(model, 0.25)
    for name, weight in model.named_parameters():
        if weight.dim() == 2 and ".layers." in name.replace(".h.", ".layers."):
            zero, least = weight == 0, before[name].abs()
            assert int(zero.sum()) == round(0.25 * weight.numel()) and least[zero].max() <= least[~zero].min()
            assert torch.equal(weight[~zero], before[name][~zero])
        else:
            assert torch.equal(weight, before[name])
    assert done["zeros"] == sum(int((w == 0).sum()) for n, w in model.named_parameters() if w.dim() == 2)


def test_magnitude_is_served_as_it_is_and_measured(root: Path, tmp_path: Path) -> None:
    done, before, after = compressed(root, "magnitude", tmp_path / "export", sparsity=0.3)
    assert done["sparsity"] == 0.3 and after["bytes"] == before["bytes"] and after["loss"] != before["loss"]


@pytest.mark.parametrize(("keys", "message"), [
    ({"layers": 3}, "layers: 3 of the model's 3 layers; set it to 2 at most"),
    ({"channels": 0.01}, r"channels: 0.01 of 128 channels is less than 8, in whose multiples they go; raise it"),
    ({"method": "int8_dynamic", "model": "gpt2"}, "method: no linear layer of the gpt2 family can be quantized so; take a family"),
    ({"channels": 0.5, "model": "gpt2"}, "channels: the gpt2 family has not the same number of channels")])
def test_what_cannot_be_pruned_is_refused_before_any_work(keys: dict[str, Any], message: str, root: Path, tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    make(tmp_path / "corpora" / "text", [Doc("train " * 20), Doc("def one(): return 1\n" * 3, split="val")])
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "m").symlink_to(root / "runs" / "m")
    if "model" in keys:
        config = AutoConfig.for_model("gpt2", vocab_size=300, n_embd=32, n_layer=1, n_head=4, n_positions=16)
        model = AutoModelForCausalLM.from_config(config)
        export_model(model, None, tmp_path / "corpora" / "text" / "tokenizer", tmp_path / "runs" / "gpt2", {})
    given = {"kind": "compress", "name": "no", "model": "m", "method": "structured", "corpus": "text", **keys}
    with pytest.raises(DistlmError, match=message) as error:
        execute.run(given, storage=storage, progress=Records())
    assert error.value.exit_code == 2 and not storage.folder("compress", "no").exists()
