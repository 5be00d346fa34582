"""Small models for corpora made in place, and what an evaluation of one comes to without Ray."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from distlm.corpus.manifest import read_manifest
from distlm.evaluate.kinds import kind_of
from distlm.evaluate.task import Task, make_task
from distlm.evaluate.worker import Worker
from distlm.model.export import export_model
from distlm.spec import EvaluateSpec
from distlm.storage import Storage


def make_model(folder: Path, corpus: Path, seed: int = 0, **values: Any) -> Path:
    """An export with the corpus' tokenizer, sure enough of itself that calibration has something to say."""
    manifest = read_manifest(corpus)
    torch.manual_seed(seed)
    given = {"vocab_size": manifest.vocab_size, "max_position_embeddings": manifest.context, "hidden_size": 32, "intermediate_size": 48,
             "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": manifest.eos_id,
             "eos_token_id": manifest.eos_id, "pad_token_id": None, "initializer_range": 0.5, **values}
    export_model(AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **given)), None, manifest.tokenizer, folder, {})
    return folder


def sums_of(spec: EvaluateSpec, storage: Storage) -> tuple[Task, list[Any]]:
    """The task, and the sums of every batch, or what a classifier makes of it, by one worker in this process."""
    task = make_task(spec, storage)
    worker = Worker(task, "cpu", "fp32", None)
    worker.load(Path(str(spec.model)))
    return task, [kind_of(task).measure(worker)(batch) for batch in range(len(task.batches))]


def evaluated(spec: EvaluateSpec, storage: Storage) -> dict[str, Any]:
    task, sums = sums_of(spec, storage)
    return kind_of(task).outcome(task, str(spec.model), sums)
