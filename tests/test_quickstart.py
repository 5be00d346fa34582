"""The whole way from raw text to a served model, in one spec."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import pytest
import yaml

from distlm import cluster, execute, head
from distlm.runs import RunFolder
from distlm.serve.client import healthy
from distlm.spec import load_spec
from distlm.storage import Storage, read_json
from distlm.train.determinism import ENVIRONMENT
from tests.records import Records
from tests.train.ranks import losses, run_ranks
from tests.train.test_driver import steps_done, wait_for, workers

TRAIN: dict[str, Any] = {"corpus": "${prepare}", "model": {"preset": "llama-tiny"}, "batch": {"global_sequences": 4},
                         "evaluate": {"every_steps": 4, "max_windows": 4}, "scale": {"threads_per_worker": 1}}


@pytest.mark.timeout(900)
def test_a_pipeline_prepares_tunes_trains_past_a_killed_worker_and_serves_and_a_rerun_does_nothing_again(tmp_path: Path) -> None:
    storage = Storage(tmp_path / "storage")
    texts = tmp_path / "texts"
    texts.mkdir()
    for i in range(20):
        (texts / f"{i}.txt").write_text(f"{i} is followed by {i + 1}, and that by {i + 2}. " * 40)
    steps = {
        "prepare": {"kind": "prepare", "sources": [str(texts)], "context": 32, "tokenizer": {"train": "bytes"},
                    "split": {"val_fraction": 0.2}},
        "tune": {"kind": "tune", "train": {**TRAIN, "duration": {"steps": 6}}, "space": {"optimizer.lr": {"grid": [3e-3]}}},
        "train": {**TRAIN, "kind": "train", "duration": {"steps": 60}, "optimizer": {"lr": "${tune.best.optimizer.lr}"},
                  "evaluate": {"every_steps": 20, "max_windows": 4}, "checkpoint": {"every_steps": 10}, "deterministic": True,
                  "scale": {"workers": 2, "threads_per_worker": 1}, "sharding": {"zero": 2}},
        "serve": {"kind": "serve", "model": "${train}", "port": 0},
        "evaluate": {"kind": "evaluate", "endpoint": "${serve}", "corpus": "${prepare}", "windows": 4, "prompts": ["1 is"],
                     "max_tokens": 4}}
    given = {"kind": "pipeline", "name": "whole", "prompt": "1 is followed by", "steps": steps}
    shown, again, train, killed = Records(), Records(), RunFolder(storage.run("whole-train")), list[dict[str, str]]()

    def kill() -> None:
        wait_for(lambda: steps_done(train.path) >= 15, "step 15", 600)
        victim = workers()[-1]
        killed.append(victim.environ())
        victim.send_signal(signal.SIGKILL)

    killer = Thread(target=kill, daemon=True)
    killer.start()
    with cluster.connect(tmp_path / "driver.log", storage=storage):
        made = execute.run(given, storage=storage, progress=shown)
        killer.join()
        repeated = execute.run(given, storage=storage, progress=again)
        curl = next(text for text in shown.notes if text.startswith("curl "))
        answer = json.loads(subprocess.run(["bash", "-c", curl], capture_output=True, text=True, check=True, timeout=120).stdout)
    assert made["tune.best.optimizer.lr"] == 3e-3 and made["train.val_loss"] < made["train.val_loss_first"]
    assert train.path.joinpath("spec.yaml").read_text().count("lr: 0.003") == 1
    [environment] = killed                                 # the fault fired
    assert {name: environment[name] for name in ENVIRONMENT} == ENVIRONMENT, "before anything was loaded"
    assert [event["cause"] for event in train.events() if event["state"] == "note" and event["cause"]] == ["worker_died"]
    began = [int(event["message"].removeprefix("from step ")) for event in train.events() if event["state"] == "running"]
    assert began[0] == 0 and began[1] in range(10, 60, 10), "from a checkpoint"
    undisturbed: Any = load_spec(train.path / "spec.yaml").spec
    run_ranks({tmp_path / "undisturbed": undisturbed})     # by plain processes: what Ray adds must not show
    assert losses(train.path) == losses(tmp_path / "undisturbed")
    ours, theirs = ((run / "export" / "model.safetensors").read_bytes() for run in (train.path, tmp_path / "undisturbed"))
    assert ours == theirs
    [table] = [record for record in shown.records if record["distlm"] == "table" and record["title"] == "result"]
    rows = {(row[0], row[1]): row[2] for row in table["rows"]}
    assert rows["prepare", "documents"] == "20" and rows["tune", "best"] == "optimizer.lr = 0.003" and "->" in rows["train", "loss"]
    assert rows["serve", "url"] == made["serve.url"] and shlex.split(curl)[1].startswith(made["serve.url"])
    assert made["evaluate.loss"] == pytest.approx(made["train.val_loss"], abs=0.02)    # which bfloat16 has computed
    assert rows["evaluate", "loss"] == f"{made['evaluate.loss']:.4f}" and made["evaluate.samples"][0]["prompt"] == "1 is"
    assert isinstance(answer["choices"][0]["text"], str) and answer["usage"]["prompt_tokens"] == len("1 is followed by")
    assert any("completes:\n1 is followed by" in text for text in shown.notes)
    assert [text for text in again.notes if "skipped" in text] == [f"step {step} is complete and unchanged: skipped" for step in steps]
    assert {key: value for key, value in repeated.items()} == made


CUT = ("prepare.tokenizer={train: bytes}", "prepare.context=32", "prepare.split={val_fraction: 0.2}", "tune.trials=1",
       "tune.asha.grace_steps=1", "tune.train.model.preset=llama-tiny", "tune.train.duration.steps=2", "tune.train.evaluate.every_steps=1",
       "train.model.preset=llama-tiny", "train.duration.steps=4", "train.schedule.warmup_steps=1", "train.batch.global_sequences=4",
       "serve.max_tokens=8")
"""Of the quickstart, what makes it small."""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_quickstart_is_submitted_to_a_cluster_that_stays_and_ends_with_it(tmp_path: Path) -> None:
    """What `make quickstart` and `make down` call, from command to command."""
    storage, texts = Storage(tmp_path / "store"), tmp_path / "texts"
    texts.mkdir()
    for i in range(20):
        (texts / f"{i}.txt").write_text(f"{i} is followed by {i + 1}, and that by {i + 2}. " * 40)
    shutil.copy(Path(__file__).parents[1] / "jobs" / "quickstart.yaml", tmp_path)
    environment = {**os.environ, "DISTLM_STORAGE": str(storage.root), "OMP_NUM_THREADS": "1"}
    for name in ("RAY_ADDRESS", "DISTLM_CLUSTER"):
        environment.pop(name, None)

    def distlm(*words: str) -> str:
        done = subprocess.run([sys.executable, "-m", "distlm", *words], env=environment, cwd=tmp_path, capture_output=True, text=True,
                              timeout=600)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    distlm("cluster", "up")
    [up] = head.recorded(storage)
    try:
        sets = [f"--set=steps.{text}" for text in (f"prepare.sources=[{texts}]", *CUT)]
        said = distlm("submit", "quickstart.yaml", "--follow", "--set=prompt=1 is followed by", *sets)
        record = read_json(storage.endpoint("quickstart-serve") / "endpoint.json")
        rows = [line.split() for line in said[said.rindex("\nresult"):].splitlines()]
        assert ["prepare", "documents", "20"] in rows and ["serve", "url", record["url"]] in rows, said
        assert any(row[:2] == ["train", "loss"] and "->" in row for row in rows), said
        curl = next(line.strip() for line in said.splitlines() if line.strip().startswith("curl "))
        answer = json.loads(subprocess.run(["bash", "-c", curl], capture_output=True, text=True, check=True, timeout=120).stdout)
        assert isinstance(answer["choices"][0]["text"], str) and 0 < answer["usage"]["completion_tokens"] <= 8
        assert distlm("query", "quickstart-serve", "1 is").endswith("\n")
        states = {job["name"]: job["state"] for job in json.loads(distlm("runs", "--json"))}
        assert states.pop("quickstart-serve") == "running" and set(states.values()) == {"succeeded"}, states
        assert set(states) == {"quickstart", *(f"quickstart-{step}" for step in ("prepare", "tune", "train"))}
        down = distlm("cluster", "down", "--yes")
        assert "quickstart-serve ended with it" in down and head.processes(up) == [] and not healthy(record)
        with pytest.raises(httpx.ConnectError):
            httpx.get(record["url"], trust_env=False)
        assert RunFolder(storage.endpoint("quickstart-serve")).state() == ("stopped", "user") and head.recorded(storage) == []
    finally:
        head.down(up)


SHORT = ("train.batch.global_sequences=8", "train.duration={steps: 60}", "train.schedule.warmup_steps=6", "train.optimizer.lr=3.0e-3",
         "train.evaluate={every_steps: 30, max_windows: 64}", "train.scale.threads_per_worker=1")
"""Of jobs/docstrings.yaml, what makes it short."""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_its_model_learns_to_write_docstrings_and_answers_in_chat(tmp_path: Path) -> None:
    """On the functions of this interpreter's standard library; the model is a smaller one than the quickstart's."""
    storage, jobs, shown = Storage(tmp_path / "storage"), Path(__file__).parents[1] / "jobs", Records()
    quickstart = yaml.safe_load((jobs / "quickstart.yaml").read_text())["steps"]
    tokenizer = storage.corpus("quickstart-prepare") / "tokenizer"
    with cluster.connect(tmp_path / "driver.log", storage=storage):
        execute.run({**quickstart["prepare"], "name": "quickstart-prepare"}, storage=storage, progress=Records())
        execute.run({**TRAIN, "kind": "train", "name": "quickstart-train", "corpus": "quickstart-prepare", "duration": {"steps": 60},
                     "optimizer": {"lr": 3e-3}, "batch": {"global_sequences": 8}}, storage=storage, progress=Records())
        made = execute.run(jobs / "docstrings.yaml", overrides=[f"steps.prepare.tokenizer.from={tokenizer}",
                                                                *(f"steps.{text}" for text in SHORT)], storage=storage, progress=shown)
        curl = next(text for text in shown.notes if text.startswith("curl "))
        answer = json.loads(subprocess.run(["bash", "-c", curl], capture_output=True, text=True, check=True, timeout=120).stdout)
    assert made["prepare.documents"] > 4000 and made["train.val_loss"] < made["train.val_loss_first"] - 0.5
    assert answer["choices"][0]["message"]["role"] == "assistant" and 0 < answer["usage"]["completion_tokens"] <= 64
    assert any("docstrings-serve answers:\ndef read_lines(path):" in text for text in shown.notes), shown.text
