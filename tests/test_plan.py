"""What a plan says is what the job will do; nothing is allocated and no cluster is touched."""

import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from distlm import plan
from distlm.corpus.manifest import write_manifest
from distlm.errors import InputError, SpecError
from distlm.execute import resolve
from distlm.model.build import Shape, build_model, model_config, num_parameters
from distlm.spec import TrainSpec
from distlm.spec.train import ModelSpec
from distlm.storage import Storage
from distlm.train import flops
from distlm.train.memory import STATE_BYTES, model_states

MODEL = {"config": {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
                    "intermediate_size": 64, "tie_word_embeddings": True}}

SPECS = Path(__file__).parents[1] / "jobs"


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    split = {"documents": 10, "bytes": 5000, "tokens": 4000, "dropped_tokens": 0, "windows": 250, "shards": []}
    storage = Storage(tmp_path)
    storage.corpus("c").mkdir(parents=True)
    write_manifest(storage.corpus("c"), {"name": "c", "context": 16, "dtype": "uint16", "seed": 0, "steps": [],
                                         "tokenizer": {"vocab_size": 300, "eos_id": 0}, "splits": {"train": split, "val": split}})
    return storage


def needs(storage: Storage, **keys: Any) -> dict[str, str]:
    return dict(plan.needs(resolve({"name": "x", **keys}), storage))


def test_training_is_planned_from_the_corpus(storage: Storage) -> None:
    given = {"kind": "train", "corpus": "c", "model": MODEL, "duration": {"epochs": 2}, "batch": {"global_tokens": 160},
             "scale": {"workers": 2, "cpus_per_worker": 2}}
    rows = needs(storage, **given)
    assert rows["steps"].startswith("50 of 10 sequences, 5 in a micro-batch")
    assert rows["tokens"] == "8,000" and rows["CPUs"].startswith("5:")
    spec = resolve({"name": "x", **given}).spec
    assert isinstance(spec, TrainSpec)
    model = build_model(spec.model, model_config(spec.model, Shape(300, 16, 0)), 0)
    assert rows["parameters"] == f"{sum(p.numel() for p in model.parameters()):,}"


def test_a_group_that_holds_one_model_counts_once(storage: Storage) -> None:
    given = {"kind": "train", "corpus": "c", "model": MODEL, "duration": {"steps": 5}, "precision": "fp32"}
    rows = needs(storage, **given, batch={"global_sequences": 12}, scale={"workers": 4}, sharding={"tensor_parallel": 2, "zero": 1})
    assert rows["workers"] == "4 in groups of 2, ZeRO stage 1, fp32"
    assert rows["steps"].startswith("5 of 12 sequences, 6 in a micro-batch")
    with pytest.raises(SpecError, match=r"sharding\.tensor_parallel: 4 does not divide the model's 2 key-value heads; try 1, 2"):
        needs(storage, **given, scale={"workers": 4}, sharding={"tensor_parallel": 4})


def test_zero_divides_model_states_over_the_workers() -> None:
    assert model_states(1000, "bf16", 0, 4) == {"weights": 2000, "gradients": 2000, "optimizer": 12000}
    assert model_states(1000, "bf16", 1, 4) == {"weights": 2000, "gradients": 2000, "optimizer": 3000}
    assert model_states(1000, "fp32", 2, 4) == {"weights": 4000, "gradients": 1000, "optimizer": 2000}
    assert model_states(1000, "bf16", 2, 4, STATE_BYTES["lion"])["optimizer"] == 2000
    assert model_states(1000, "bf16", 3, 4) == {"weights": 500, "gradients": 500, "optimizer": 3000}


GPU = {"kind": "train", "corpus": "c", "model": {"preset": "llama-8b"}, "duration": {"steps": 1000},
       "batch": {"global_sequences": 64, "micro_sequences": 8}}


def test_speed_hours_and_price_follow_from_the_table_and_a_stated_mfu(storage: Storage) -> None:
    rows = needs(storage, **{**GPU, "model": MODEL}, scale={"workers": 8, "gpus_per_worker": 1, "gpu": "H100", "price_per_worker_hour": 3})
    flops = float(rows["arithmetic"].split(", ")[1].split()[0])
    speed = float(rows["speed"].split()[0].replace(",", ""))
    assert speed == pytest.approx(0.4 * 8 * 989e12 / flops, rel=0.01) and "if the MFU is 40% of 8 x 9.89e+14" in rows["speed"]
    hours = float(rows["time"].split()[0])
    assert hours == pytest.approx(64 * 16 * 1000 / speed / 3600, rel=0.01) and float(rows["price"].split(",")[0]) == round(24 * hours, 2)
    assert "tokens/s, if the MFU is 4%" in needs(storage, **{**GPU, "model": MODEL})["speed"], "32 wide, on a CPU"
    assert "tokens/s, if the MFU is 50%" in needs(storage, **{**GPU, "model": {"preset": "llama-10m"}})["speed"]
    assert "not known" in needs(storage, **{**GPU, "model": MODEL}, scale={"gpus_per_worker": 1})["speed"] or torch.cuda.is_available()


def test_a_cpu_s_speed_goes_by_the_cores_that_its_workers_have(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(flops, "measured_peak", lambda precision, threads: threads * 1e11)

    def speed(**scale: int) -> float:
        row = needs(storage, kind="train", corpus="c", model=MODEL, duration={"steps": 5}, scale=scale)["speed"]
        assert "of this machine's 8 cores" in row
        return float(row.split()[0].replace(",", ""))

    assert speed(workers=8, threads_per_worker=1) == pytest.approx(8 * speed(workers=1, threads_per_worker=1), rel=1e-3)
    assert speed(workers=2, threads_per_worker=2) == pytest.approx(4 * speed(workers=1, threads_per_worker=1), rel=1e-3)
    assert speed(workers=1) == speed(workers=8) == speed(workers=16, threads_per_worker=4), "all cores, and no more"


def test_compiled_layers_take_less_memory(storage: Storage) -> None:
    given = {"kind": "train", "corpus": "c", "model": MODEL, "duration": {"steps": 5}, "batch": {"global_sequences": 8}}
    plain, compiled = (needs(storage, **given, compile=wanted)["memory a worker"] for wanted in (False, True))
    assert plain != compiled


def test_what_does_not_fit_is_told_with_the_cheapest_change_that_does(storage: Storage) -> None:
    scale = {"workers": 8, "gpus_per_worker": 1, "gpu": "H100"}
    with pytest.raises(SpecError, match=r"scale\.gpu: .* take 117 GiB of a worker, .* 79 GiB to give; it fits with sharding.zero: 1, at"):
        needs(storage, **GPU, scale=scale)                 # 18 bytes of 7 billion parameters: no estimate
    rows = needs(storage, **GPU, scale=scale, sharding={"zero": 1})
    assert "warning" not in rows
    rows = needs(storage, **GPU, scale={**scale, "memory_gib": 52}, sharding={"zero": 1})
    assert "does not fit: " in rows["warning"] and "GiB; it would with sharding.zero: 2" in rows["warning"]
    with pytest.raises(SpecError, match=r"scale\.gpu: 'H99' is not in the table"):
        needs(storage, **GPU, scale={**scale, "gpu": "H99"})
    with pytest.raises(SpecError, match="no effect where gpus_per_worker is 0"):
        needs(storage, **GPU, scale={"gpu": "H100"})
    for gib in (0.5, 1):
        with pytest.raises(SpecError, match=rf"scale\.memory_gib: {gib} leaves a model nothing: CUDA and NCCL take about 1 GiB"):
            needs(storage, **GPU, scale={"gpus_per_worker": 1, "memory_gib": gib})
    assert "parameters" in needs(storage, **{**GPU, "model": MODEL}, scale={"memory_gib": 0.5}), "a worker on CPU may have so little"


def test_what_does_not_fit_is_told_with_offload_too(storage: Storage) -> None:
    scale = {"workers": 8, "gpus_per_worker": 1, "memory_gib": 40}
    offload = {"zero": 2, "offload": {"optimizer": "cpu"}}
    assert "warning" not in needs(storage, **GPU, scale=scale, sharding=offload), "but 104 GiB of states without"
    rows = needs(storage, **GPU, scale={**scale, "memory_gib": 16}, sharding=offload)
    assert re.search(r"does not fit: [\d.]+ of 15 GiB; it would with batch.micro_sequences: \d", rows["warning"])
    with pytest.raises(SpecError, match=r"take 13.* GiB of a worker, and it has 9 GiB to give; it fits with sharding.zero: 3"):
        needs(storage, **GPU, scale={**scale, "memory_gib": 10}, sharding=offload)


def test_host_memory_is_judged_by_this_machine_where_the_job_s_gpus_are_its_own(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {**GPU, "sharding": {"zero": 2, "offload": {"optimizer": "cpu"}}}
    scale = {"workers": 8, "gpus_per_worker": 1}
    monkeypatch.setattr(plan, "local_gpu", lambda: ("NVIDIA H100 80GB HBM3", 80 << 30, 8))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=150 << 30))
    rows = needs(storage, **given, scale=scale)
    assert "(gradients " in rows["host memory a worker"] and "snapshot" in rows["host memory a worker"]
    assert re.fullmatch(r"does not fit: 2\d\d of the 150 GiB of this machine with 8 of the workers; it would with checkpoint.asynchronous: "
                        r"false, at 11\d GiB", rows["warning of host memory"])
    still = {**given, "checkpoint": {"asynchronous": False}}
    assert "warning of host memory" not in needs(storage, **still, scale=scale)
    assert "warning of host memory" not in needs(storage, **given, scale={**scale, "gpu": "A100-SXM4-80GB"}), "other machines"
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=50 << 30))
    assert "take fewer workers a node, or lay on nvme" in needs(storage, **given, scale=scale)["warning of host memory"]


def test_workers_on_cpu_have_this_machine_s_memory_where_the_job_would_run_here(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "machine_memory", lambda: 1 << 20)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    given = {"kind": "train", "corpus": "c", "model": MODEL, "duration": {"steps": 5}, "batch": {"global_sequences": 8}}
    for workers, room in ((1, "0.000977 GiB of this machine"), (2, "0.000977 GiB of this machine with all 2 workers")):
        text = needs(storage, **given, scale={"workers": workers})["warning"]
        assert re.match(rf"does not fit: [\d.]+ of {room}; ", text), text
    assert "warning" not in needs(storage, **given, scale={"memory_gib": 1}), "what the spec says comes first"
    assert "warning" not in needs(storage, **given, scale={"workers": 8, "cpus_per_worker": 1000}), "which no cluster here would hold"
    for address, here in (("127.0.0.1:6379", True), ("localhost:6379", True), ("10.0.0.5:6379", False), ("http://127.0.0.1:8265", False)):
        monkeypatch.setenv("RAY_ADDRESS", address)
        assert ("warning" in needs(storage, **given)) == here, address
    monkeypatch.delenv("RAY_ADDRESS")
    monkeypatch.setattr(plan, "machine_memory", lambda: 8 << 30)
    assert "warning" not in needs(storage, **given)


def test_a_context_that_is_not_the_corpus_s_is_refused(storage: Storage) -> None:
    with pytest.raises(SpecError, match="32 is not the context of the corpus c, 16"):
        needs(storage, kind="train", corpus="c", model={**MODEL, "context": 32}, duration={"steps": 1})


def test_a_corpus_that_is_not_there_yet_leaves_open_what_depends_on_it(storage: Storage) -> None:
    rows = needs(storage, kind="train", corpus="d", model=MODEL, duration={"steps": 5})
    assert "not there yet" in rows["corpus"] and "parameters" not in rows and rows["CPUs"].startswith("2:")


def test_preparation_counts_the_files_it_finds(storage: Storage, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x" * 1500)
    rows = needs(storage, kind="prepare", sources=[str(tmp_path / "a.txt")], tokenizer={"train": "bytes"})
    assert (rows["files"], rows["bytes"], rows["vocabulary"]) == ("1", "1.5 kB", "256 bytes")
    with pytest.raises(InputError):
        needs(storage, kind="prepare", sources=[str(tmp_path / "b.txt")])


def test_an_evaluation_tells_what_it_reads_and_asks_for(storage: Storage) -> None:
    given = {"kind": "evaluate", "corpus": "c", "model": "m"}
    rows = needs(storage, **given, workers=3, gpus_per_worker=1)
    assert "what is not there yet" in rows["it reads"] and rows["CPUs"] == rows["GPUs"] == rows["workers"] == "3"
    assert needs(storage, kind="evaluate", corpus="c", endpoint="e", concurrent=4)["endpoint"] == "e, 4 requests at once"
    steps = {"prepare": {"kind": "prepare", "sources": ["stdlib"]}, "evaluate": {**given, "corpus": "${prepare}"}}
    rows = needs(storage, kind="pipeline", steps=steps)
    assert rows["evaluate: it reads"] == "${prepare}, which other steps make" and rows["evaluate: CPUs"] == "1"


def test_a_sweep_counts_its_trials_and_a_pipeline_plans_step_by_step(storage: Storage) -> None:
    train = {"corpus": "c", "model": MODEL, "duration": {"steps": 5}}
    tune = {"kind": "tune", "train": train, "space": {"optimizer.lr": {"loguniform": [1e-4, 1e-2]}}, "trials": 3,
            "asha": {"grace_steps": 2}}
    rows = needs(storage, **tune)
    assert rows["trials"].startswith("3, ") and rows["optimizer.lr"] == "loguniform: 0.0001 to 0.01" and rows["a trial's tokens"] == "2,560"
    steps = {"prepare": {"kind": "prepare", "sources": ["stdlib"], "tokenizer": {"vocab_size": 300}, "context": 16},
             "tune": {**tune, "train": {**train, "corpus": "${prepare}"}},
             "train": {**train, "kind": "train", "corpus": "${prepare}", "optimizer": {"lr": "${tune.best.optimizer.lr}"}},
             "serve": {"kind": "serve", "model": "${train}"}}
    rows = needs(storage, kind="pipeline", steps=steps)
    assert int(rows["prepare: files"].replace(",", "")) > 100 and rows["tune: trials"].startswith("3, ")
    assert rows["train: parameters"] == rows["tune: a trial's parameters"] and "address" in "".join(rows)
    steps = {"train": {**train, "kind": "train"}, "recover": {**train, "kind": "train", "model": {"from": "${train}"}}}
    rows = needs(storage, kind="pipeline", steps=steps)
    assert rows["recover: model"] == "${train}, which other steps make" and rows["recover: workers"] == rows["train: workers"]


@pytest.mark.parametrize("tokenizer", [{}, {"train": "bytes"}])
def test_a_step_that_leaves_defaults_out_is_planned_with_those_of_the_spec(tokenizer: dict[str, str], storage: Storage) -> None:
    def parameters(**prepare: Any) -> str:
        train = {"kind": "train", "corpus": "${prepare}", "model": MODEL, "duration": {"steps": 5}}
        steps = {"prepare": {"kind": "prepare", "sources": ["stdlib"], **prepare}, "train": train}
        return needs(storage, kind="pipeline", steps=steps)["train: parameters"]

    vocabulary = 260 if tokenizer else 4096
    assert parameters(tokenizer=tokenizer) == parameters(tokenizer={"vocab_size": vocabulary}, context=256)


@pytest.mark.parametrize("line, text", [
    ("batch: {global_tokens: 100}", r"train\.yaml:6: batch\.global_tokens: 100 is no multiple"),
    ("batch: {global_sequences: 100000000000, micro_sequences: 3}", r"3 does not divide .*; try 1, 2, 4, 5"),
    ("batch: {global_sequences: 10}\nschedule: {name: wsd, warmup_steps: 50}", r"train\.yaml:7: schedule\.warmup_steps: 50 "),
    ("batch: {global_sequences: 10}\nschedule: {warmup_tokens: 1601}", r"schedule\.warmup_steps: 11 are more than the \d+ of"),
    ("batch: {global_sequences: 10}\noptimizer:\n  groups: [{match: norm}, {match: mlpp}]",
     r"train\.yaml:8: optimizer\.groups\.1\.match: 'mlpp' matches no parameter; their names are like model\.embed_tokens\.weight, model"),
    ("batch: {global_sequences: 10}\noptimizer:\n  groups: [{match: norm}, {match: input_layernorm}]",
     r"'input_layernorm' matches only what an earlier group holds; leave it out, or put it first"),
    ("batch: {global_sequences: 10}\nsharding: {deepspeed: {zero_optimisation: {}}}",
     r"train\.yaml:7: .*no such key; did you mean zero_optim"),
    ("batch: {global_sequences: 10}\nsharding: {deepspeed: {zero_optimization: {stagee: 2}}}",
     r"zero_optimization\.stagee: DeepSpeed does not"),
    ("batch: {global_sequences: 10}\nsharding: {deepspeed: {zero_optimization: 3}}", r"3 is no mapping"),
    ("batch: {global_sequences: 10}\nsharding: {deepspeed: {torch_autocast: {enabled: true}}}", r"contradicts precision"),
    ("batch: {global_sequences: 10}\nsharding: {deepspeed: {gradient_accumulation_steps: null}}", r"contradicts batch\.micro_sequences"),
])
def test_what_the_corpus_or_deepspeed_refuses_is_found_at_its_line(line: str, text: str, storage: Storage, tmp_path: Path) -> None:
    (tmp_path / "train.yaml").write_text("kind: train\nname: x\ncorpus: c\nmodel: {preset: llama-tiny}\nduration: {epochs: 0.1}\n" + line)
    with pytest.raises(SpecError, match=text):
        plan.needs(resolve(tmp_path / "train.yaml"), storage)


def test_raw_keys_of_a_step_are_checked_before_its_corpus_is_there(storage: Storage) -> None:
    def rows(value: Any) -> dict[str, str]:
        train = {"kind": "train", "corpus": "${prepare}", "model": MODEL, "duration": {"steps": 5},
                 "sharding": {"zero": 2, "deepspeed": {"zero_optimization": {"reduce_bucket_size": value}}}}
        return needs(storage, kind="pipeline", steps={"prepare": {"kind": "prepare", "sources": ["stdlib"]}, "train": train})

    assert "memory" in "".join(rows("auto"))
    with pytest.raises(SpecError, match=r"zero_optimization\.reduce_bucket_size: DeepSpeed does not accept it"):
        rows("5e8")


def test_a_large_batch_is_planned_at_once(storage: Storage) -> None:
    given = {"kind": "train", "corpus": "c", "model": MODEL, "duration": {"steps": 1}, "batch": {"global_sequences": 99_999_999_999}}
    assert "in a micro-batch" in needs(storage, **given)["steps"]


@pytest.mark.parametrize("sequences", [10**9, 10**15])
def test_a_large_micro_batch_is_planned_at_once_and_one_that_fits_is_found(sequences: int, storage: Storage) -> None:
    given = {"kind": "train", "corpus": "c", "model": MODEL, "duration": {"steps": 1}, "scale": {"memory_gib": 1}}
    rows = needs(storage, **given, batch={"global_sequences": sequences, "micro_sequences": sequences})
    micro = int(rows["warning"].split("batch.micro_sequences: ")[1].split()[0].rstrip(","))
    assert sequences % micro == 0 and 100 < micro < 10**5
    assert "warning" not in needs(storage, **given, batch={"global_sequences": sequences, "micro_sequences": micro})


def test_a_tokenizer_that_is_not_there_is_found(storage: Storage, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(InputError, match=r"tokenizer\.from"):
        needs(storage, kind="prepare", sources=[str(tmp_path / "a.txt")], tokenizer={"from": str(tmp_path / "none")})


THEIR_OWN = ("classify-stdlib.yaml", "docstrings.yaml", "prepare-chat.yaml", "prepare-preferences.yaml", "prepare-web.yaml",
             "shakespeare.yaml", "shakespeare-gpu.yaml")
"""Read what only the reader has; planned below over files of the tests' own."""


def test_a_pipeline_with_a_classifier_is_planned_before_its_corpus_is_there(tmp_path: Path) -> None:
    records = tmp_path / "records.jsonl"
    records.write_text('{"text": "a", "label": "b"}\n')
    loaded = resolve(SPECS / "classify-stdlib.yaml", [f'steps.prepare.sources=["{records}"]'])
    rows = dict(plan.needs(loaded, Storage(tmp_path)))
    language = num_parameters(model_config(ModelSpec(preset="llama-tiny"), Shape(4096, 256, 0)))
    assert rows["prepare: labels"] == "label" and rows["train: parameters"] == f"{language + 2 * 64:,}", "with a head of two labels"


@pytest.mark.parametrize(("name", "train"), [
    ("shakespeare.yaml", {"parameters": "304,512", "workers": "1, ZeRO stage 0, bf16", "CPUs": "2: 1 a worker, 1 for data"}),
    ("shakespeare-gpu.yaml", {"parameters": "10,747,392", "workers": "1, ZeRO stage 0, bf16", "GPUs": "1"})])
def test_specs_of_two_files_are_planned_where_those_lie(name: str, train: dict[str, str], tmp_path: Path,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    """Any two will do, and no GPU is needed for it."""
    monkeypatch.chdir(tmp_path)
    for file in ("train.txt", "val.txt"):
        (tmp_path / file).write_text("ROMEO:\nBut soft!\n" * 50)
    rows = dict(plan.needs(resolve(SPECS / name), Storage(tmp_path)))
    assert rows["prepare: files"] == "2" and rows["prepare: bytes"] == "1.7 kB" and rows["prepare: vocabulary"] == "256 bytes"
    assert {key: rows[f"train: {key}"] for key in train} == train


@pytest.mark.parametrize(("name", "overrides", "expected"), [
    ("prepare-chat.yaml", ["sources=[records.jsonl]", "tokenizer={train: bytes}"], {"files": "1", "loss": "conversations: assistant"}),
    ("prepare-preferences.yaml", ["sources=[records.jsonl]", "tokenizer={train: bytes}"], {"files": "1", "context": "2,048 tokens"}),
    ("prepare-web.yaml", ["sources=[records.jsonl]"], {"files": "1", "vocabulary": "32,000 tokens, trained"}),
    ("docstrings.yaml", ["steps.prepare.sources.0.path=records.jsonl", "steps.prepare.tokenizer={train: bytes}"],
     {"prepare: files": "1", "train: workers": "1, ZeRO stage 0, bf16", "serve: model": "what another step makes"})])
def test_specs_of_other_places_are_planned_over_a_file(name: str, overrides: list[str], expected: dict[str, str], tmp_path: Path,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "records.jsonl").write_text("{}\n")
    rows = dict(plan.needs(resolve(SPECS / name, overrides), Storage(tmp_path)))
    assert {key: rows[key] for key in expected} == expected


@pytest.mark.parametrize("name", sorted(path.name for path in SPECS.glob("*.yaml") if path.name not in THEIR_OWN))
def test_the_ready_specs_are_planned_as_they_are(name: str, tmp_path: Path) -> None:
    loaded = resolve(SPECS / name)
    rows = dict(plan.needs(loaded, Storage(tmp_path)))
    assert rows
    if name == "quickstart.yaml":
        kinds = {step: data["kind"] for step, data in loaded.spec.steps.items()}  # type: ignore[union-attr]
        assert kinds == {kind: kind for kind in ("prepare", "tune", "train", "serve")}
        assert int(rows["prepare: files"].replace(",", "")) > 100 and int(rows["train: parameters"].replace(",", "")) > 10**6
        assert rows["tune: trials"].startswith("3") and rows["train: workers"].startswith("2, ZeRO stage 2")
        assert rows["serve: model"] == "what another step makes"
        cpus = max(float(how_much.split(":")[0]) for what, how_much in rows.items() if what in ("train: CPUs", "tune: a trial's CPUs"))
        assert cpus <= 8, "a cluster on this machine has 8 logical CPUs at least"
