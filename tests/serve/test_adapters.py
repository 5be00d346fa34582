"""Adapters over one model: each as its merged export, the model itself to the bit, whatever is decoded beside; and what is refused."""

import asyncio
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from distlm import execute, plan
from distlm.errors import InputError, ServeError, SpecError
from distlm.model.adapter_folder import AdapterFolder, check_adapters, find_adapter
from distlm.serve.engine import Request
from distlm.serve.metrics import Metrics
from distlm.serve.torch_engine import TorchEngine
from distlm.spec.load import load_spec
from distlm.storage import Storage, read_json, write_json
from tests.serve.test_api import Server
from tests.serve.test_torch_engine import collect, ids, prompts, reference, run
from tests.serve.tiny_models import FAMILIES, make_adapter, make_classifier, make_model

KINDS: dict[str, dict[str, Any]] = {"lora": {"rank": 4}, "wide": {"rank": 7, "alpha": 3}, "dora": {"method": "dora", "rank": 3, "alpha": 9},
                                    "few": {"rank": 2, "alpha": 8}}
"""Of different ranks, and the last for a few layers alone."""


class Made:
    """A base and its adapters."""

    def __init__(self, root: Path, family: str) -> None:
        self.base = make_model(root / "base", FAMILIES[family], chat=True)
        few = ["c_attn"] if family == "gpt2" else ["q_proj", "down_proj"]
        self.runs = {name: make_adapter(root / "runs" / name, self.base, seed=seed, **options,
                                        **({"target_modules": few} if name == "few" else {}))
                     for seed, (name, options) in enumerate(KINDS.items())}
        self.adapters = {name: path / "export" / "adapter" for name, path in self.runs.items()}

    def export(self, name: str) -> Path:
        return self.runs[name] / "export" if name else self.base

    def engine(self, *names: str, **options: Any) -> TorchEngine:
        return TorchEngine(self.base, threads=1, adapters={name: self.adapters[name] for name in names}, **options)


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def llamas(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("llamas"), "llama")


def spied(engine: TorchEngine) -> list[tuple[list[str], torch.Tensor]]:
    """The adapters of the rows of each step of decoding, with its logits, as they come."""
    steps, forward = list[tuple[list[str], torch.Tensor]](), engine.model.forward

    def spy(*args: Any, **kwargs: Any) -> Any:
        found = forward(*args, **kwargs)
        if "attention_mask" in kwargs:                     # a step of decoding, and no prompt
            steps.append((list(engine._lora.rows), found.logits[:, -1].clone()))
        return found

    engine.model.forward = spy
    return steps


MIXES = {"with dora": ["lora", "", "wide", "dora", "lora", "few"], "lora alone": ["lora", "", "wide", "", "lora", "few"]}


@torch.inference_mode()
@pytest.mark.parametrize("mix", MIXES)
def test_each_row_of_a_mixed_batch_has_the_logits_of_its_merged_export(mix: str, made: Made) -> None:
    names = MIXES[mix]
    merged = {name: AutoModelForCausalLM.from_pretrained(made.export(name), local_files_only=True, dtype=torch.float32).eval()
              for name in set(names)}
    engine = made.engine(*set(names) - {""}, max_sequences=len(names))
    engine.ends = frozenset()
    steps = spied(engine)
    try:
        given = [Request(prompt, 12, logprobs=3, echo=True, adapter=name) for prompt, name in zip(prompts(6), names, strict=True)]
        found = run(collect(engine, *given))
        together = [logits for rows, logits in steps if rows == names]
        assert len(together) == 11, "all are decoded in one batch"
        for row, (request, chunks) in enumerate(zip(given, found, strict=True)):
            tokens = torch.tensor([[*request.prompt, *ids(chunks)]])
            logits = merged[request.adapter](tokens).logits[0]
            bound = 1e-5 * float(logits.abs().max())
            for place, mixed in enumerate(together, len(request.prompt)):
                torch.testing.assert_close(mixed[row], logits[place], rtol=0, atol=bound)
            scored = [token for chunk in chunks for token in chunk.tokens][1:]
            wanted = logits.log_softmax(-1)
            assert [token.logprob for token in scored] == pytest.approx(
                [float(wanted[place, token.id]) for place, token in enumerate(scored)], abs=bound)
            assert ids(chunks) == logits[len(request.prompt) - 1:-1].argmax(-1).tolist()
        others = {name: merged[name](torch.tensor([prompts(1)[0]])).logits for name in merged}
        assert all(not torch.allclose(others[name], others[""], atol=1) for name in merged if name), "an adapter must change much"
    finally:
        engine.close()


@pytest.mark.parametrize("beside", ["dora", "wide"])
def test_the_model_without_an_adapter_keeps_its_bits_beside_others(beside: str, made: Made) -> None:
    names, given = ["", beside, "", "lora"], prompts(4)
    found = []
    for engine in (made.engine("lora", beside), made.engine()):
        engine.ends = frozenset()
        steps = spied(engine)
        mixed = [name if name in engine.adapters else "" for name in names]
        try:
            chunks = run(collect(engine, *(Request(prompt, 9, logprobs=0, echo=True, adapter=name)
                                           for prompt, name in zip(given, mixed, strict=True))))
        finally:
            engine.close()
        found.append(([logits[::2] for rows, logits in steps if rows == mixed], [chunks[0], chunks[2]]))
    assert len(found[0][0]) == 8 and all(map(torch.equal, *(one for one, _ in found)))
    assert found[0][1] == found[1][1], "log-probabilities of prompt and completion too"


def test_greedy_tokens_are_those_of_the_merged_export_as_rows_come_and_go(made: Made) -> None:
    engine = made.engine(*KINDS, max_sequences=3)
    wishes = [Request(prompt, 5 + 4 * place, adapter=name) for place, (prompt, name) in
              enumerate(zip(prompts(8), ["lora", "", "dora", "lora", "wide", "few", "", "dora"], strict=True))]
    wanted = [reference(made.export(wish.adapter), wish.prompt, wish.max_tokens) for wish in wishes]
    try:
        alone = [ids(run(collect(engine, wish))[0]) for wish in wishes]

        async def together() -> list[list[int]]:
            return [ids(found[0]) for found in await asyncio.gather(*(collect(engine, wish) for wish in wishes))]

        assert alone == wanted and run(together()) == wanted
    finally:
        engine.close()


def test_scaling_is_that_of_peft(llamas: Made, tmp_path: Path) -> None:
    folder = shutil.copytree(llamas.adapters["lora"], tmp_path / "adapter")
    write_json(folder / "adapter_config.json", {**read_json(folder / "adapter_config.json"), "use_rslora": True,
                                                "alpha_pattern": {"layers.1.self_attn.q_proj": 2, "up_proj": 3}})
    plain = AutoModelForCausalLM.from_pretrained(llamas.base, local_files_only=True, dtype=torch.float32)
    tokens = torch.tensor([prompts(2)[1]])
    engine = TorchEngine(llamas.base, adapters={"x": folder})
    try:
        with torch.inference_mode():
            wanted = PeftModel.from_pretrained(plain, folder).eval()(tokens).logits[0]
            _, found = engine._forward(tokens[0].tolist(), 0, "x")
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))
    finally:
        engine.close()


def test_memory_grows_by_the_adapters_alone(llamas: Made) -> None:
    engine = llamas.engine(*KINDS)
    try:
        assert sum(parameter.numel() for parameter in engine.model.parameters()) == sum(
            value.numel() for value in load_file(llamas.base / "model.safetensors").values())
        hooks = [hook for module in engine.model.modules() for hook in module._forward_hooks.values()]
        held = sum(tensor.numel() for hook in hooks for tensor in (hook.a, hook.b, hook.gain) if tensor is not None)
        assert held == sum(AdapterFolder.read(folder).num_parameters for folder in llamas.adapters.values()), "as the plan says"
        assert len({id(variant.tokenizer) for variant in engine.adapters.values()} | {id(engine.tokenizer)}) == 1, "equal tokenizers once"
    finally:
        engine.close()


def with_config(folder: Path, **changed: Any) -> None:
    write_json(folder / "adapter_config.json", {**read_json(folder / "adapter_config.json"), **changed})


def with_tensors(folder: Path, change: Any) -> None:
    save_file(change(load_file(folder / "adapter_model.safetensors")), folder / "adapter_model.safetensors")


def with_tokenizer(folder: Path, change: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(read_json(folder / "adapter_config.json")["base_model_name_or_path"], local_files_only=True)
    change(tokenizer)
    tokenizer.save_pretrained(folder)


Q = "base_model.model.model.layers.0.self_attn.q_proj.lora"
Q_A, Q_B = f"{Q}_A.weight", f"{Q}_B.weight"
CASES: dict[str, tuple[Any, str]] = {
    "modules": (lambda f: with_config(f, modules_to_save=["lm_head"]), "modules_to_save: lm_head would be whole layers of its own; serve"),
    "bias": (lambda f: with_config(f, bias="all"), "bias: all trains what is the base's; serve the model that it makes, merged"),
    "pissa": (lambda f: with_config(f, init_lora_weights="pissa"), "init_lora_weights: pissa changes the base's own weights; serve"),
    "kind": (lambda f: with_config(f, peft_type="IA3"), "peft_type: IA3 is no low-rank adapter"),
    "unknown": (lambda f: with_config(f, use_what_comes_next=True), "use_what_comes_next: True is not supported; serve"),
    "replication": (lambda f: with_config(f, layer_replication=[[0, 1]]), r"layer_replication: \[\[0, 1\]\] is not supported"),
    "embedding": (lambda f: with_tensors(f, lambda t: {**t, "base_model.model.model.embed_tokens.lora_embedding_A": torch.zeros(4, 300)}),
                  "embed_tokens.lora_embedding_A is no part of a low-rank adapter of a linear layer; serve"),
    "half": (lambda f: with_tensors(f, lambda t: {name: value for name, value in t.items() if name != f"{Q}_B.weight"}),
             "does not hold lora_A, lora_B of model.layers.0.self_attn.q_proj; copy the adapter again"),
    "dora": (lambda f: with_config(f, use_dora=True), "does not hold lora_A, lora_B, lora_magnitude_vector of model.layers"),
    "list": (lambda f: write_json(f / "adapter_config.json", [1]), "adapter_config.json: is no mapping; copy the adapter again"),
    "modules by text": (lambda f: with_config(f, modules_to_save="lm_head"), "modules_to_save: lm_head would be whole layers"),
    "no alpha": (lambda f: with_config(f, lora_alpha=None), "lora_alpha: None is no number; copy"),
    "alpha": (lambda f: with_config(f, lora_alpha="x"), "lora_alpha: 'x' is no number; copy"),
    "pattern": (lambda f: with_config(f, alpha_pattern={"(q": 1}), r"alpha_pattern: '\(q' is no regular expression: missing \)"),
    "patterns": (lambda f: with_config(f, alpha_pattern=["q"]), r"alpha_pattern: \['q'\] is no mapping"),
    **{f"{a} and {b}": (lambda f, a=a, b=b: with_tensors(f, lambda t: {**t, Q_A: torch.zeros(a), Q_B: torch.zeros(b)}),
                        f"q_proj has tensors of the shapes {re.escape(f'{a}, {b}')}, which are not .rank, inputs., .outputs, rank.; copy")
       for a, b in (([4, 64], [64, 1]), ([4, 64], [64, 3]), ([0, 64], [64, 0]), ([64], [64, 4]), ([4, 64, 1], [64, 4]), ([], [64, 4]))},
    "magnitude": (lambda f: (with_config(f, use_dora=True), with_tensors(f, lambda t: t | {
        name.replace("lora_A.weight", "lora_magnitude_vector"): torch.ones(1) for name in t if "lora_A" in name})),
        r"has tensors of the shapes \[4, 128\], \[64, 4\], \[1\], which are not .rank, inputs., .outputs, rank. and .outputs."),
    "shape": (lambda f: with_tensors(f, lambda t: {**t, f"{Q}_A.weight": torch.zeros(4, 65)}),
              "q_proj takes 65 and gives 64 numbers, and 64 and 64 in the model; serve it over the model that it was trained on"),
    "not finite": (lambda f: with_tensors(f, lambda t: {**t, Q_B: t[Q_B] / 0}), "q_proj has weights that are not finite; train it again"),
    "tokens": (lambda f: with_tokenizer(f, lambda one: one.add_tokens(["<a>", "<b>"])),
               "its tokenizer has 302 tokens, and the model 300; serve the model that it makes, merged"),
    "no tokenizer.json": (lambda f: write_json(f / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"}),
                          "its tokenizer cannot be read: .*; copy its files again"),
    "layer": (lambda f: with_tensors(f, lambda t: {name.replace("layers.1", "layers.9"): value for name, value in t.items()}),
              "the model has no linear layer model.layers.9"),
    "empty": (lambda f: with_tensors(f, lambda t: {}), "does not hold lora_A, lora_B of every layer"),
    "torn": (lambda f: (f / "adapter_model.safetensors").write_bytes(b"x" * 20), "adapter_model.safetensors cannot be read"),
    "pickle": (lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"), "no adapter_model.safetensors beside"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_cannot_be_served_beside_others_is_refused_with_the_reason(case: str, llamas: Made, tmp_path: Path) -> None:
    folder = shutil.copytree(llamas.adapters["lora"], tmp_path / "mine")
    check_adapters({"x": folder}, llamas.base)
    CASES[case][0](folder)
    with pytest.raises(InputError, match=rf"adapters.x: {folder}: .*{CASES[case][1]}") as error:
        check_adapters({"x": folder}, llamas.base)
    assert "\n" not in str(error.value)


def test_an_adapter_of_another_base_is_refused_by_plan_and_before_a_deployment(llamas: Made, tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    shutil.copytree(llamas.base, storage.run("base") / "export")
    make_model(storage.run("other") / "export", FAMILIES["llama"], seed=5)
    shutil.copytree(llamas.runs["lora"], storage.run("poems"))
    spec: dict[str, Any] = {"kind": "serve", "name": "e", "model": "base", "adapters": {"a": "poems", "b": str(llamas.adapters["dora"])}}
    rows = dict(plan.needs(execute.resolve(spec), storage))
    assert rows["adapters.a"].startswith(f"{storage.run('poems')}/export/adapter, rank 4, ") and "of memory" in rows["adapters.b"]
    assert execute.inputs(load_spec(spec).spec, storage)["adapters"]["a"] == str(storage.run("poems") / "export" / "adapter")
    wrong = {**spec, "model": "other"}
    said = r"adapters.a: .*poems/export/adapter: was trained on .*base, whose weights are not those of .*other"
    with pytest.raises(InputError, match=said):
        plan.needs(execute.resolve(wrong), storage)
    with pytest.raises(InputError, match=said):
        execute.inputs(load_spec(wrong).spec, storage)
    alone = shutil.copytree(llamas.adapters["lora"], tmp_path / "alone")       # of peft's: it names its base, by a path
    check_adapters({"x": alone}, storage.run("base") / "export")
    with pytest.raises(InputError, match=r"whose weights are not those of .*; its files are compared by name and content"):
        check_adapters({"x": alone}, storage.run("other") / "export")
    assert "only the shapes" not in rows["adapters.a"] + rows["adapters.b"] and not AdapterFolder.read(alone).caveat


@pytest.mark.parametrize(("base", "said"), [("somebody/a-model", "somebody/a-model"), (None, r"(it names none)")])
def test_an_adapter_whose_base_is_not_here_is_served_and_that_is_said(base: str | None, said: str, llamas: Made, tmp_path: Path) -> None:
    storage, alone = Storage(tmp_path), shutil.copytree(llamas.adapters["lora"], tmp_path / "alone")
    with_config(alone, base_model_name_or_path=base)
    spec = {"kind": "serve", "name": "e", "model": str(llamas.base), "adapters": {"x": str(alone)}}
    [row] = [how_much for what, how_much in plan.needs(execute.resolve(spec), storage) if what == "adapters.x"]
    assert row.endswith(f" of memory in a replica; its base {said} is not here: only the shapes were compared")


def test_a_tokenizer_of_an_adapters_own_says_what_ends_its_rows(llamas: Made, tmp_path: Path) -> None:
    own = shutil.copytree(llamas.adapters["lora"], tmp_path / "own")
    wishes = [Request(prompts(1)[0], 8, adapter=name) for name in ("own", "lora")]
    whole = reference(llamas.export("lora"), wishes[0].prompt, 8)
    end = next(place for place, token in enumerate(whole) if place and token not in whole[:place])
    with_tokenizer(own, lambda one: setattr(one, "eos_token", one.convert_ids_to_tokens(whole[end])))
    engine = TorchEngine(llamas.base, threads=1, adapters={"own": own, "lora": llamas.adapters["lora"]})
    try:
        found = run(collect(engine, *wishes))
        assert [ids(chunks) for chunks in found] == [whole[:end + 1], whole]
        assert found[0][-1].finish_reason == "stop"
    finally:
        engine.close()


def test_an_adapter_that_cannot_be_decoded_is_named(llamas: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    prove = TorchEngine._prove

    def fail(self: TorchEngine, samples: Any, adapter: str, num_layers: int) -> None:
        prove(self, samples, adapter, num_layers)
        if adapter == "wide":
            raise ValueError("logits are off")

    monkeypatch.setattr(TorchEngine, "_prove", fail)
    with pytest.raises(ServeError, match="models of the family llama with the adapter wide cannot be decoded in slots: logits are off"):
        llamas.engine("lora", "wide")


def test_where_an_adapter_is_looked_for(llamas: Made, tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    shutil.copytree(llamas.runs["lora"], storage.run("poems"))
    shutil.copytree(llamas.base, storage.run("base") / "export")
    folder = storage.run("poems") / "export" / "adapter"
    assert {find_adapter(str(text), storage, "adapters.x") for text in ("poems", storage.run("poems"), folder.parent, folder)} == {folder}
    with pytest.raises(InputError, match=r"adapters.x: .*base: there is no adapter in it; name a run with `adapter:`"):
        find_adapter("base", storage, "adapters.x")
    with pytest.raises(InputError, match=r"adapters.x: there is no run and no folder 'poem'; did you mean poems?"):
        find_adapter("poem", storage, "adapters.x")
    rows = dict(plan.needs(execute.resolve({"kind": "serve", "name": "e", "model": "base", "adapters": {"x": "poem"}}), storage))
    assert "not there yet" in rows["adapters.x"]


def test_a_classifier_and_a_quantized_model_take_none(llamas: Made, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="adapters: the model is a classifier"):
        check_adapters(llamas.adapters, make_classifier(tmp_path / "sorter"))
    rounded = shutil.copytree(llamas.base, tmp_path / "rounded")
    write_json(rounded / "config.json", {**read_json(rounded / "config.json"), "quantization_config": {"quant_method": "torchao"}})
    with pytest.raises(InputError, match="its weights are quantized; take the model that it was made from"):
        check_adapters(llamas.adapters, rounded)


def test_an_adapter_is_not_named_as_its_endpoint() -> None:
    with pytest.raises(SpecError, match=r"adapters.e: is the name by which requests choose the model without an adapter"):
        load_spec({"kind": "serve", "name": "e", "model": "m", "adapters": {"e": "run"}})


def test_the_field_model_chooses_and_metrics_tell_them_apart(llamas: Made, tmp_path: Path) -> None:
    poet = make_adapter(tmp_path / "poet", llamas.base, chat=True)
    server = Server(llamas.base, adapters={"poet": poet / "export" / "adapter", "dora": llamas.adapters["dora"]}, max_sequences=4)
    try:
        cards = {card["id"]: card for card in server.http.get("/v1/models").json()["data"]}
        assert list(cards) == ["tiny", "poet", "dora"] and cards["tiny"]["parent"] is None
        assert {cards[name][key] for name in ("poet", "dora") for key in ("root", "parent")} == {"tiny"}
        assert cards["poet"]["lineage"]["val_loss"] == 1.25 and cards["poet"]["lineage"]["run"] == "poet"
        assert server.http.get("/v1/models/dora").json() == cards["dora"]
        assert cards["poet"]["vocabulary_hash"] == cards["tiny"]["vocabulary_hash"]

        prompt = server.engine.tokenizer("the cat")["input_ids"]
        for name, folder in (("tiny", llamas.base), ("poet", poet / "export"), ("dora", llamas.export("dora"))):
            answer = server.complete(model=name, max_tokens=10, return_tokens_as_token_ids=True, logprobs=0)
            assert answer["model"] == name
            found = [int(text.removeprefix("token_id:")) for text in answer["choices"][0]["logprobs"]["tokens"]]
            assert found == reference(folder, tuple(prompt), 10)
        status, problem = server.refused(model="poems")
        assert (status, problem["code"]) == (404, "model_not_found") and "'tiny', 'poet', 'dora'" in problem["message"]

        lengths = {name: len(server.events("chat/completions", model=name, max_tokens=2, stream_options={"include_usage": True})) and
                   server.http.post("/v1/chat/completions", json={"model": name, "messages": [{"role": "user", "content": "hi"}],
                                                                  "max_tokens": 2}).json()["usage"]["prompt_tokens"] for name in cards}
        assert lengths["poet"] != lengths["dora"] == lengths["tiny"], "the chat template is that of the adapter's run"
        text = server.http.get("/metrics").text
        assert 'vllm:request_success_total{finished_reason="length",model_name="poet",replica="r0"}' in text
        assert 'vllm:num_requests_running{model_name="dora",replica="r0"} 0.0' in text
    finally:
        server.close()


def test_what_an_engine_counts_adds_up_over_its_models(llamas: Made) -> None:
    metrics = Metrics("base", "r")
    engine = llamas.engine("lora", max_sequences=4, metrics=metrics)
    engine.ends = frozenset()
    seen = []
    forward = engine.model.forward

    def spy(*args: Any, **kwargs: Any) -> Any:
        seen.append((metrics.running._value.get(), metrics.of("lora").running._value.get()))
        return forward(*args, **kwargs)

    engine.model.forward = spy
    try:
        run(collect(engine, *(Request(prompt, 6, adapter=name) for prompt, name in zip(prompts(3), ["", "lora", "lora"], strict=True))))
    finally:
        engine.close()
    assert (1, 2) in seen
    assert (metrics.generation_tokens._value.get(), metrics.of("lora").generation_tokens._value.get()) == (6, 12)
    assert metrics.of("lora").cache_usage._value.get() == metrics.cache_usage._value.get() == 0
    assert json.dumps(sorted(metrics._adapters)) == '["lora"]'


def test_the_folder_reads_as_written(llamas: Made) -> None:
    folder = AdapterFolder.read(llamas.adapters["wide"])
    assert folder.rank == 7 and folder.scaling("model.layers.0.mlp.up_proj", 7) == pytest.approx(3 / 7)
    held = load_file(llamas.adapters["wide"] / "adapter_model.safetensors")
    assert folder.num_parameters == sum(value.numel() for value in held.values())
