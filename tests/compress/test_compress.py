"""A compression: an export that is smaller, its measures beside those of its model, and what is refused before any work."""

import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from distlm import cluster, execute
from distlm.compress.report import described
from distlm.errors import DistlmError
from distlm.model.build import load_model
from distlm.model.find import find_model
from distlm.plan import needs, of_compress
from distlm.runs import RunFolder
from distlm.serve import deploy
from distlm.serve.engine import Request
from distlm.serve.torch_engine import TorchEngine
from distlm.spec import load_spec
from distlm.storage import Storage, read_json
from tests.compress.made import compressed
from tests.compress.test_beside import spec as training
from tests.evaluate.models import evaluated, make_model
from tests.evaluate.test_evaluate import spec as evaluation
from tests.records import Records
from tests.serve.test_torch_engine import collect, ids, run
from tests.train.ranks import run_ranks

TORCHAO = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="needs torchao")


@TORCHAO
@pytest.mark.parametrize("method", ["int8_weight_only", "int8_dynamic", "int4_weight_only"])
def test_the_loss_after_is_that_of_an_evaluation_of_the_export(method: str, root: Path, tmp_path: Path) -> None:
    done, before, after = compressed(root, method, tmp_path / "export")
    assert done["method"] == method and done["matrices"] == 3 * 7 + (method != "int4_weight_only")
    for made, folder in ((before, root / "runs" / "m" / "export"), (after, tmp_path / "export")):
        assert made["loss"] == evaluated(evaluation(root, "corpora/text", str(folder), windows=512), Storage(root))["loss"]
    assert before["loss"] != after["loss"]
    assert after["loss"] == pytest.approx(before["loss"], rel=0.01 if method.startswith("int8") else 0.2)
    assert after["bytes"] < 0.6 * before["bytes"] and after["memory_bytes"] < 0.6 * before["memory_bytes"]
    assert all(side[what] > 0 for side in (before, after) for what in ("prefill", "decode_1", "decode_8"))


def check_completes(export: Path, dtype: str, near: float) -> None:
    """An engine takes tokens that are the model's likeliest, but for logits that are so near, as a share of the largest."""
    engine = TorchEngine(export, dtype=dtype, max_sequences=2, threads=1)
    try:
        (chunks,) = run(collect(engine, Request((5, 9, 30), max_tokens=6)))
        tokens = [5, 9, 30, *ids(chunks)]
        model: Any = load_model(export, "model", torch.float32 if dtype == "fp32" else torch.bfloat16).eval()
        with torch.inference_mode():
            logits = model(torch.tensor([tokens[:-1]])).logits[0].float()
    finally:
        engine.close()
    given = logits[range(2, len(tokens) - 1), tokens[3:]]
    assert len(tokens) > 3 and (logits[2:].amax(1) - given <= near * logits.abs().max()).all()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(("method", "keys"), [
    *(pytest.param(method, {}, marks=TORCHAO) for method in ("int8_weight_only", "int8_dynamic", "int4_weight_only")),
    ("magnitude", {"sparsity": 0.5}), ("structured", {"channels": 0.5, "layers": 1})])
def test_an_engine_completes_with_what_a_job_made(method: str, keys: dict[str, Any], dtype: str, root: Path, tmp_path: Path) -> None:
    compressed(root, method, tmp_path / "export", **keys)
    check_completes(tmp_path / "export", dtype, 1e-5 if keys and dtype == "fp32" else 0.05)


def test_an_engine_completes_with_a_student(root: Path, tmp_path: Path) -> None:
    small = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    whole = str(root / "runs" / "m" / "export")
    run_ranks({tmp_path / "r": training(root, model={"config": small}, objective="distill", distill={"teacher": whole})})
    assert read_json(tmp_path / "r" / "export" / "config.json")["hidden_size"] == 32
    check_completes(tmp_path / "r" / "export", "fp32", 1e-5)


@pytest.fixture(scope="module")
def storage(root: Path) -> Iterator[Storage]:
    storage = Storage(root)
    with cluster.connect(root / "driver.log", storage=storage):
        yield storage


@TORCHAO
def test_a_job_leaves_an_export_a_page_and_what_it_was_made_of(root: Path, storage: Storage) -> None:
    (root / "runs" / "m" / "export" / "distlm.json").write_text(json.dumps({"run": "m", "corpus": "text", "step": 7}))
    given = {"kind": "compress", "name": "small", "model": "m", "method": "int8_weight_only", "corpus": "text", "threads": 1}
    shown = Records()
    made = execute.run(given, storage=storage, progress=shown)
    folder = RunFolder(storage.folder("compress", "small"))
    assert folder.state() == ("succeeded", "completed") and folder.read_result() == made
    assert find_model("small", storage) == folder.path / "export" == Path(made["export"])
    assert made["before"]["loss"] == made["loss_before"] != made["loss"] == made["after"]["loss"] and made["bytes"] < made["bytes_before"]
    told = read_json(folder.path / "export" / "distlm.json")
    parent = {"model": str(root / "runs" / "m" / "export"), "run": "m", "step": 7}
    assert told["run"] == "small" and "step" not in told and parent.items() <= told["parent"].items(), "what the parent measured is its own"
    assert told["compression"] == made["compression"] == {"method": "int8_weight_only", "matrices": 22}
    assert folder.lineage()["inputs"]["model"] == str(root / "runs" / "m" / "export")
    page = (folder.path / "report.html").read_text()
    assert f"{made['loss']:.4f}" in page and f"{made['bytes_before']:,}" in page and "http" not in page.replace("http-equiv", "")
    table = next(record for record in shown.records if record["distlm"] == "table")
    assert ["method", "int8_weight_only, matrices 22"] in [[*row] for row in table["rows"]]
    again = execute.run(given, storage=storage, progress=Records(), resume=True)
    assert again == made
    same = evaluated(evaluation(root, "corpora/text", made["export"], windows=512), storage)
    assert same["loss"] == made["loss"]
    next((folder.path / "export").glob("*.safetensors")).unlink()
    with pytest.raises(DistlmError, match="is missing"):
        execute.run(given, storage=storage, progress=Records(), resume=True)


@TORCHAO
def test_a_plan_and_a_page_name_what_stays_whole(root: Path) -> None:
    given = {"kind": "compress", "name": "x", "model": "m", "method": "int4_weight_only", "group_size": 128, "corpus": "text"}
    spec: Any = load_spec(given).spec
    stay = dict(of_compress(spec, Storage(root))).get("left whole", "")
    assert re.fullmatch(r"\d+ matrices, such as model.layers.0.*, which fit no groups of 128", stay)
    assert described({"method": "int4_weight_only", "left_whole": ["a", "b"]}) == "int4_weight_only, left whole 2, such as a"


def test_a_page_tells_of_channels_that_went_without_layers() -> None:
    assert described({"method": "structured", "channels": 64, "layers": 3, "dropped_layers": []}) == (
        "structured, channels 64, layers 3, dropped layers 0")


@TORCHAO
@pytest.mark.slow
def test_an_endpoint_says_how_its_model_was_compressed(root: Path, storage: Storage) -> None:
    execute.run({"kind": "compress", "name": "served", "model": "m", "method": "int8_weight_only", "corpus": "text"}, storage=storage,
                progress=Records())
    made = execute.run({"kind": "serve", "name": "e", "model": "served", "port": 0}, storage=storage, progress=Records())
    try:
        key = Path(made["api_key_file"]).read_text().strip()
        headers = {"Authorization": f"Bearer {key}"}
        (card,) = httpx.get(f"{made['url']}/models", headers=headers, trust_env=False).json()["data"]
        assert card["lineage"]["compression"] == {"method": "int8_weight_only", "matrices": 22}
        answer = httpx.post(f"{made['url']}/completions", headers=headers, json={"model": "e", "prompt": "def", "max_tokens": 4},
                            trust_env=False, timeout=60)
        assert answer.json()["usage"]["completion_tokens"] > 0
    finally:
        deploy.undeploy("e", storage)


@pytest.mark.parametrize(("keys", "message"), [
    ({"model": "nowhere", "method": "magnitude"}, "model: there is no run and no folder 'nowhere'"),
    ({"corpus": "nowhere", "method": "magnitude"}, "corpus: there is no corpus"),
    ({"group_size": 64}, r"group_size: 64 has no effect with method: int8_weight_only"),
    ({"method": "structured"}, "structured takes nothing away without channels or layers"),
    ({"name": "m"}, "name: there is a run of this name, and m would stand for both; take another name"),
    ({"method": "int3"}, "method")])
def test_what_cannot_be_compressed_is_refused_before_any_work(keys: dict[str, Any], message: str, root: Path) -> None:
    given = {"kind": "compress", "name": "no", "model": "m", "method": "int8_weight_only", "corpus": "text", **keys}
    with pytest.raises(DistlmError, match=message) as error:
        execute.run(given, storage=Storage(root), progress=Records())
    assert error.value.exit_code == 2 and not Storage(root).folder("compress", "no").exists()


def test_a_run_does_not_take_the_name_of_a_compressed_model(root: Path, tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    compressed(root, "magnitude", storage.folder("compress", "small") / "export", sparsity=0.5)
    corpus, model = str(root / "corpora" / "text"), str(root / "runs" / "m")
    train: dict[str, Any] = {"kind": "train", "name": "small", "corpus": corpus, "model": {"from": model}, "duration": {"steps": 1},
                             "batch": {"global_sequences": 1}}
    average = {"kind": "average", "name": "small", "models": [model, f"{model}/export"], "corpus": corpus}
    told = "name: there is a compressed model of this name, and small would stand for both; take another name"
    for given in (train, average):
        for do in (lambda one: execute.run(one, storage=storage, progress=Records()), lambda one: needs(execute.resolve(one), storage)):
            with pytest.raises(DistlmError, match=told):
                do(given)
    assert not storage.run("small").exists() and find_model("small", storage) == storage.folder("compress", "small") / "export"
    RunFolder(storage.run("small")).event("running")       # one that began before goes on
    assert needs(execute.resolve(train), storage)
    steps = {"kind": "pipeline", "name": "p", "steps": {"one": train, "two": {
        "kind": "compress", "name": "small", "model": model, "method": "magnitude", "corpus": corpus}}}
    with pytest.raises(DistlmError, match="small is the name of the step one too"):
        execute.resolve(steps)


@TORCHAO
def test_a_quantized_model_is_not_compressed_again_nor_trained(root: Path, tmp_path: Path) -> None:
    compressed(root, "int8_weight_only", tmp_path / "export")
    given: dict[str, Any] = {"kind": "compress", "name": "no", "model": str(tmp_path / "export"), "method": "int8_dynamic",
                             "corpus": "text"}
    with pytest.raises(DistlmError, match="its weights are quantized; take the model that it was made from"):
        execute.run(given, storage=Storage(root), progress=Records())
    train = {"kind": "train", "name": "no", "corpus": "text", "model": {"from": str(tmp_path / "export")}, "duration": {"steps": 1},
             "batch": {"global_sequences": 1}}
    with pytest.raises(DistlmError, match=r"model\.from.*its weights are quantized"):
        execute.run(train, storage=Storage(root), progress=Records())


def test_without_torchao_the_extra_is_named(root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "torchao" else find(name, *more))
    given = {"kind": "compress", "name": "no", "model": "m", "method": "int8_weight_only", "corpus": "text"}
    with pytest.raises(DistlmError, match=r"method: the package torchao is not installed; pip install 'distlm\[compress\]'"):
        execute.run(given, storage=Storage(root), progress=Records())
    folder = make_model(tmp_path / "q", root / "corpora" / "text")
    config = read_json(folder / "config.json") | {"quantization_config": {"quant_method": "torchao"}}
    (folder / "config.json").write_text(json.dumps(config))
    for kind in ({"kind": "serve", "name": "no"}, {"kind": "evaluate", "name": "no", "corpus": "text"}):
        with pytest.raises(DistlmError, match=r"quantized by torchao, which is not installed; pip install 'distlm\[compress\]'"):
            execute.run({**kind, "model": str(folder)}, storage=Storage(root), progress=Records())
