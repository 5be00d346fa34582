"""A model is what the spec says, drawn from the seed, with positions that keep their precision."""

import functools
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from distlm.errors import InputError, SpecError
from distlm.model.build import (
    DROPOUTS,
    Shape,
    blank_model,
    buffers,
    build_model,
    model_config,
    num_parameters,
    recompute,
    restore_buffers,
)
from distlm.model.export import INDEX, export_lacks, export_model, weight_files
from distlm.spec.presets import PRESETS
from distlm.spec.train import ModelSpec
from distlm.storage import Storage, read_json, write_json
from distlm.train.recipe import make_recipe
from tests.train.ranks import make_corpus, spec

SHAPE = Shape(vocab_size=4096, context=256, eos_id=0)
TINY = ModelSpec(preset="llama-tiny")


@pytest.mark.parametrize("preset", [name for name in PRESETS if name.startswith("llama")])
def test_llama_presets_have_the_parameters_of_their_shape(preset: str) -> None:
    config, shape = model_config(ModelSpec(preset=preset), SHAPE), PRESETS[preset]
    width, ffn = shape["hidden_size"], shape["intermediate_size"]
    kv = width * shape["num_key_value_heads"] // shape["num_attention_heads"]
    layer = 2 * width * width + 2 * width * kv + 3 * width * ffn + 2 * width
    tables = 4096 * width * (1 if shape["tie_word_embeddings"] else 2)
    assert num_parameters(config) == tables + shape["num_hidden_layers"] * layer + width
    assert (config.vocab_size, config.max_position_embeddings, config.eos_token_id) == (4096, 256, 0)


@pytest.mark.parametrize("preset", PRESETS)
def test_nothing_drops_out_unless_the_spec_says_so(preset: str) -> None:
    config = model_config(ModelSpec(preset=preset), SHAPE).to_dict()
    assert not any(config.get(name) for name in DROPOUTS)


def test_gpt2_124m_has_124_million_with_its_own_vocabulary() -> None:
    assert num_parameters(model_config(ModelSpec(preset="gpt2-124m"), Shape(50257, 1024, 0))) == 124_439_808


def test_the_seed_decides_the_weights_and_nothing_else_does() -> None:
    config = model_config(TINY, SHAPE)
    torch.manual_seed(99)
    first, before = build_model(TINY, config, 1), torch.rand(1)
    torch.manual_seed(99)
    assert torch.equal(before, torch.rand(1)), "the caller's random numbers are left alone"
    second, other = build_model(TINY, config, 1), build_model(TINY, config, 2)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(next(first.parameters()), next(other.parameters()))


BLOCKS = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}
HEADS = {**BLOCKS, "num_key_value_heads": 4}
FAMILIES = [
    {"model_type": "llama", **HEADS}, {"model_type": "qwen3", "tie_word_embeddings": True, **HEADS}, {"model_type": "gpt_neox", **BLOCKS},
    {"model_type": "gemma3_text", "head_dim": 8, **HEADS}, {"model_type": "gpt2", "n_embd": 32, "n_head": 4, "n_layer": 2},
    {"model_type": "mamba", "hidden_size": 32, "num_hidden_layers": 2},
    {"model_type": "gpt_neo", "hidden_size": 32, "num_heads": 4, "num_layers": 2, "attention_types": [[["global", "local"], 1]]},
    {"model_type": "deepseek_v3", "n_routed_experts": 4, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2, "kv_lora_rank": 16,
     "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16, **HEADS}]


@pytest.mark.parametrize("config", FAMILIES, ids=lambda config: config["model_type"])
def test_a_model_without_weights_has_all_else_as_it_is_drawn(config: dict[str, Any]) -> None:
    given = ModelSpec(config=config)
    found = model_config(given, Shape(64, 16, 0))
    random = torch.get_rng_state()
    blank, drawn = blank_model(found), build_model(given, found, 0)
    assert torch.equal(torch.get_rng_state(), random)
    shapes = [{name: (one.shape, one.dtype, one.requires_grad, one.device) for name, one in model.named_parameters()}
              for model in (blank, drawn)]
    assert shapes[0] == shapes[1] and [*shapes[0]] == [*shapes[1]], "tied ones once, in the same order"
    ours, theirs = dict(blank.named_buffers()), dict(drawn.named_buffers())
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert blank.training == drawn.training and type(blank) is type(drawn)


def test_rotary_frequencies_survive_the_cast_to_bf16() -> None:
    model = build_model(TINY, model_config(TINY, SHAPE), 0)
    kept = buffers(model)
    assert any("inv_freq" in name for name in kept)
    model.to(torch.bfloat16)
    assert not torch.equal(model.model.rotary_emb.inv_freq.float(), kept["model.rotary_emb.inv_freq"])
    restore_buffers(model, kept)
    assert torch.equal(model.model.rotary_emb.inv_freq, kept["model.rotary_emb.inv_freq"])


@pytest.mark.parametrize(("config", "text"), [
    ({"model_type": "llamma"}, r"model\.config\.model_type: transformers knows no model_type 'llamma'; did you mean llama\?"),
    ({"model_type": "llama", "hidden_sizee": 64}, r"model\.config\.hidden_sizee: .* no such key; did you mean hidden_size\?"),
    ({"model_type": "llama", "hidden_size": 65, "num_attention_heads": 4}, r"does not accept .*hidden size \(65\)"),
    ({"model_type": "bert"}, r"model\.config\.is_decoder: bert is an encoder.*; set is_decoder: true"),
    ({"model_type": "t5"}, r"^model: t5 is no causal language model; take a causal family such as llama, qwen3 or gpt2$"),
    ({"model_type": "xyzzy"}, r"transformers knows no model_type 'xyzzy'; take a causal family such as llama"),
    ({"model_type": "llama", "vocab_size": 7}, r"model\.config\.vocab_size: 7 is less than the corpus needs, 4096"),
    ({"model_type": "llama", "max_position_embeddings": 8}, "8 is less than the corpus needs, 256")])
def test_a_configuration_that_cannot_be_is_an_error(config: dict[str, object], text: str) -> None:
    with pytest.raises(SpecError, match=text):
        num_parameters(model_config(ModelSpec(config=config), SHAPE))


def test_a_run_goes_on_from_an_exported_model(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path / "c")
    given = spec(corpus)
    from distlm.storage import Storage

    storage = Storage(tmp_path)
    recipe = make_recipe(given, storage)
    model = build_model(given.model, model_config(given.model, recipe.shape), 5)
    export_model(model, dict(model.named_parameters()), corpus / "tokenizer", storage.run("first") / "export", {"run": "first"})
    second = make_recipe(spec(corpus, model={"from": "first"}), storage).spec.model
    assert second.source == str(storage.run("first") / "export")
    loaded = build_model(second, model_config(second, recipe.shape), 0)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
    with pytest.raises(InputError, match="the checkpoint has 64 tokens and the corpus 4096"):
        model_config(second, SHAPE)
    with pytest.raises(InputError, match="the checkpoint takes 16 tokens of context and the corpus has windows of 17"):
        model_config(second, Shape(64, 17, 0))
    tokenizer = storage.run("first") / "export" / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace('"t5"', '"u5"'))
    with pytest.raises(InputError, match=r"the tokenizer of the checkpoint is not that of the corpus c; prepare the corpus with"):
        make_recipe(spec(corpus, model={"from": "first"}), storage)
    shutil.rmtree(storage.run("first"))
    with pytest.raises(InputError, match=r"model\.from: there is no run and no folder 'first'"):
        make_recipe(spec(corpus, model={"from": "first"}), storage)


def test_an_export_in_several_files_is_as_whole_as_one_in_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel

    corpus, folder, inner = make_corpus(tmp_path / "c"), tmp_path / "export", PreTrainedModel.save_pretrained
    given = spec(corpus).model
    model = build_model(given, model_config(given, Shape(64, 16, 0)), 5).eval()
    monkeypatch.setattr(PreTrainedModel, "save_pretrained", functools.partialmethod(inner, max_shard_size="20KB"))
    export_model(model, None, corpus / "tokenizer", folder, {"run": "first"})
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(files) > 2 and files == weight_files(folder) == sorted(set(read_json(folder / INDEX)["weight_map"].values()))
    assert not export_lacks(folder) and read_json(folder / "distlm.json") == {"run": "first"}
    assert GenerationConfig.from_pretrained(folder).eos_token_id == 0 and len(AutoTokenizer.from_pretrained(folder)) == 64
    tokens = torch.arange(15)[None]
    with torch.no_grad():
        assert torch.equal(AutoModelForCausalLM.from_pretrained(folder)(tokens).logits, model(tokens).logits)
    (folder / files[1]).unlink()
    assert files[1] in export_lacks(folder)


def test_the_tokens_that_end_a_turn_of_a_checkpoint_stay(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path / "c")
    given = spec(corpus)
    shape = Shape(64, 16, 0)
    model = build_model(given.model, model_config(given.model, shape), 5)
    export_model(model, None, corpus / "tokenizer", tmp_path / "first", {})
    config = tmp_path / "first" / "generation_config.json"
    assert read_json(config)["eos_token_id"] == 0
    write_json(config, {**read_json(config), "eos_token_id": [0, 9]})
    source = ModelSpec(**{"from": str(tmp_path / "first")})
    export_model(build_model(source, model_config(source, shape), 0), None, corpus / "tokenizer", tmp_path / "second", {})
    assert read_json(tmp_path / "second" / "generation_config.json")["eos_token_id"] == [0, 9]


def test_a_checkpoint_that_lacks_weights_is_an_error(tmp_path: Path) -> None:
    spec = ModelSpec(config={"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
                             "num_attention_heads": 4})
    model = build_model(spec, model_config(spec, Shape(64, 16, 0)), 0)
    model.save_pretrained(tmp_path)
    source = ModelSpec(**{"from": str(tmp_path)})
    text = (tmp_path / "config.json").read_text()
    for change, message in (('"num_hidden_layers": 3', "has no weights for model.layers.2"),
                            ('"num_hidden_layers": 1', "the model has not: model.layers.1")):
        (tmp_path / "config.json").write_text(text.replace('"num_hidden_layers": 2', change))
        with pytest.raises(InputError, match=message):
            build_model(source, model_config(source, Shape(64, 16, 0)), 0)
    (tmp_path / "config.json").write_text(text)
    (tmp_path / "model.safetensors").write_bytes(b"short")
    with pytest.raises(InputError, match="cannot load the weights"):
        build_model(source, model_config(source, Shape(64, 16, 0)), 0)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(InputError, match="no weights beside"):
        model_config(source, Shape(64, 16, 0))


def test_dropout_is_set_wherever_the_family_has_it() -> None:
    assert model_config(ModelSpec(preset="llama-tiny"), SHAPE, 0.1).attention_dropout == 0.1
    assert model_config(ModelSpec(config={"model_type": "seed_oss"}), SHAPE).residual_dropout == 0, "0.1 by its own default"
    gpt2 = model_config(ModelSpec(preset="gpt2-124m"), Shape(50257, 1024, 0), 0.2)
    assert (gpt2.resid_pdrop, gpt2.embd_pdrop, gpt2.attn_pdrop) == (0.2, 0.2, 0.2)
    assert model_config(ModelSpec(preset="gpt2-124m"), Shape(50257, 1024, 0)).resid_pdrop == 0.0
    opt = model_config(ModelSpec(config={"model_type": "opt", "num_attention_heads": 4}), SHAPE, 0.3)
    assert (opt.dropout, opt.layerdrop) == (0.3, 0.0)
    with pytest.raises(SpecError, match=r"regularization.dropout: the mamba family has no dropout; leave it out"):
        model_config(ModelSpec(config={"model_type": "mamba"}), SHAPE, 0.1)
    with pytest.raises(SpecError, match=r"regularization.dropout: stands beside model.config.attention_dropout"):
        model_config(ModelSpec(config={"model_type": "llama", "attention_dropout": 0.2}), SHAPE, 0.1)


@pytest.mark.parametrize("family", [{"model_type": "llama", "intermediate_size": 32}, {"model_type": "gpt2"}])
@pytest.mark.parametrize("every", [0, 1, 2, 3])
def test_every_nth_layer_is_computed_again_in_the_backward_pass(family: dict[str, object], every: int) -> None:
    given = ModelSpec(config={**family, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2})
    model = build_model(given, model_config(given, Shape(64, 16, 0)), 0)
    if every:
        recompute(model, every)
    begun = list[str]()
    for name, module in model.named_modules():
        if name.endswith(".mlp"):
            module.register_forward_pre_hook(lambda *_, name=name: begun.append(name.split(".")[-2]))
    model.train()
    model(input_ids=torch.arange(16)[None], use_cache=False).logits.sum().backward()
    assert [begun.count(str(i)) for i in range(3)] == [2 if every and i % every == 0 else 1 for i in range(3)]


def test_layers_that_cannot_be_computed_again_are_an_error(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path / "c")
    with pytest.raises(SpecError, match=r"activation_checkpointing: 3 is more than the model's 2 layers; set it to 1 to 2"):
        make_recipe(spec(corpus, activation_checkpointing=3), Storage(tmp_path))
