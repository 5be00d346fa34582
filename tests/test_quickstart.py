"""The whole way from raw text to a served model, in one spec."""

import json
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest

from distlm import cluster, execute
from distlm.runs import RunFolder
from distlm.storage import Storage
from tests.records import Records

TRAIN: dict[str, Any] = {"corpus": "${prepare}", "model": {"preset": "llama-tiny"}, "batch": {"global_sequences": 4},
                         "evaluate": {"every_steps": 4, "max_windows": 4}, "scale": {"threads_per_worker": 1}}


@pytest.mark.timeout(900)
def test_a_pipeline_prepares_tunes_trains_and_serves_and_a_rerun_does_nothing_again(tmp_path: Path) -> None:
    storage = Storage(tmp_path / "storage")
    texts = tmp_path / "texts"
    texts.mkdir()
    for i in range(20):
        (texts / f"{i}.txt").write_text(f"{i} is followed by {i + 1}, and that by {i + 2}. " * 40)
    steps = {
        "prepare": {"kind": "prepare", "sources": [str(texts)], "context": 32, "tokenizer": {"train": "bytes"},
                    "split": {"val_fraction": 0.2}},
        "tune": {"kind": "tune", "train": {**TRAIN, "duration": {"steps": 6}}, "space": {"optimizer.lr": {"grid": [3e-3]}}},
        "train": {**TRAIN, "kind": "train", "duration": {"steps": 10}, "optimizer": {"lr": "${tune.best.optimizer.lr}"},
                  "scale": {"workers": 2, "threads_per_worker": 1}, "sharding": {"zero": 2}},
        "serve": {"kind": "serve", "model": "${train}", "port": 0}}
    given = {"kind": "pipeline", "name": "whole", "prompt": "1 is followed by", "steps": steps}
    shown, again = Records(), Records()
    with cluster.connect(tmp_path / "driver.log", storage=storage):
        made = execute.run(given, storage=storage, progress=shown)
        repeated = execute.run(given, storage=storage, progress=again)
        curl = next(text for text in shown.notes if text.startswith("curl "))
        answer = json.loads(subprocess.run(["bash", "-c", curl], capture_output=True, text=True, check=True, timeout=120).stdout)
    assert made["tune.best.optimizer.lr"] == 3e-3 and made["train.val_loss"] < made["train.val_loss_first"]
    assert RunFolder(storage.run("whole-train")).path.joinpath("spec.yaml").read_text().count("lr: 0.003") == 1
    [table] = [record for record in shown.records if record["distlm"] == "table" and record["title"] == "result"]
    rows = {(row[0], row[1]): row[2] for row in table["rows"]}
    assert rows["prepare", "documents"] == "20" and rows["tune", "best"] == "optimizer.lr = 0.003" and "->" in rows["train", "loss"]
    assert rows["serve", "url"] == made["serve.url"] and shlex.split(curl)[1].startswith(made["serve.url"])
    assert isinstance(answer["choices"][0]["text"], str) and answer["usage"]["prompt_tokens"] == len("1 is followed by")
    assert any("completes:\n1 is followed by" in text for text in shown.notes)
    assert [text for text in again.notes if "skipped" in text] == [f"step {step} is complete and unchanged: skipped" for step in steps]
    assert {key: value for key, value in repeated.items()} == made
