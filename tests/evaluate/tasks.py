"""Tasks of the lm-evaluation-harness with a model of byte tokens, and what an evaluation of them comes to."""

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML
from transformers import AutoModelForCausalLM, AutoTokenizer

from distlm.model.complete import generate
from distlm.spec import EvaluateSpec
from tests.corpus.made import make
from tests.evaluate.models import make_model
from tests.evaluate.test_evaluate import DOCS, SOURCES
from tests.serve.test_api import KEY, Server

needs_harness = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed")
CONTEXT = 96
PROMPTS = ["copy: one =>", "say the word", "x", "a longer question about nothing at all, which is:"]
TEXTS = ["A short text.", "Words and words, " * 12, "größer, wider", "one " * 40]
CHOICE: dict[str, Any] = {
    "task": "pick", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "pick.jsonl", "train": "shots.jsonl"}},
    "test_split": "test", "fewshot_split": "train", "num_fewshot": 1, "output_type": "multiple_choice",
    "doc_to_text": "Q: {{question}}\nA:", "doc_to_choice": "{{choices}}", "doc_to_target": "{{answer}}", "metadata": {"version": 2.0},
    "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")]}
ANSWER: dict[str, Any] = {
    "task": "say", "dataset_path": "json", "dataset_kwargs": {"data_files": "say.jsonl"}, "test_split": "train",
    "output_type": "generate_until", "doc_to_text": "{{prompt}}", "doc_to_target": "{{answer}}",
    "generation_kwargs": {"until": ["\n", "STOP"], "max_gen_toks": 12, "do_sample": False}, "metadata": {"version": 1},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}]}
ROLLING: dict[str, Any] = {
    "task": "texts", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": ["texts.jsonl"]}}, "test_split": "test",
    "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
    "metric_list": [{"metric": name, "higher_is_better": False, "aggregation": how} for name, how in (
        ("word_perplexity", "weighted_perplexity"), ("byte_perplexity", "weighted_perplexity"), ("bits_per_byte", "bits_per_byte"))]}
LAST: dict[str, Any] = {
    "task": "last", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "texts.jsonl"}}, "test_split": "test",
    "output_type": "loglikelihood", "doc_to_text": "{{text.split(' ')[:-1]|join(' ')}}", "doc_to_target": "{{' ' + text.split(' ')[-1]}}",
    "metric_list": [{"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
                    {"metric": "acc", "aggregation": "mean", "higher_is_better": True}]}
TASKS = (CHOICE, ANSWER, ROLLING, LAST)


def write(folder: Path, task: dict[str, Any]) -> str:
    path = folder / f"{task['task']}.yaml"
    with path.open("w") as file:
        YAML().dump(task, file)
    return str(path)


def rows(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(one) + "\n" for one in records))


def make_root(root: Path) -> Path:
    """A model of byte tokens, and a task of each kind. Of the answers to be generated the first is the model's own, which a stop ends."""
    make(root / "corpora" / "two", [*DOCS], sources=SOURCES)
    make_model(root / "runs" / "m", root / "corpora" / "two", max_position_embeddings=CONTEXT)
    (root / "key").write_text(KEY)
    os.chmod(root / "key", 0o600)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(root / "runs" / "m"), AutoTokenizer.from_pretrained(root / "runs" / "m")
    text = tokenizer.decode(generate(model, tokenizer, [tokenizer.encode(PROMPTS[0])], 12, [])[0])
    stop = next(sign for sign in text[2:] if sign.isprintable() and sign.isascii() and sign not in text[:2])
    own = text[:text.index(stop)]
    (root / "tasks").mkdir()
    rows(root / "tasks" / "say.jsonl", [{"prompt": prompt, "answer": "nothing of it" if i else own} for i, prompt in enumerate(PROMPTS)])
    rows(root / "tasks" / "texts.jsonl", [{"text": text} for text in TEXTS])
    questions = [{"question": f"what is {i}?", "choices": ["this", "that " * (i % 3 + 1), "those"], "answer": i % 3} for i in range(9)]
    rows(root / "tasks" / "pick.jsonl", questions)
    rows(root / "tasks" / "shots.jsonl", [{**one, "question": f"shot {one['question']}"} for one in questions])
    for task in TASKS:
        write(root / "tasks", {**task, "generation_kwargs": {**ANSWER["generation_kwargs"], "until": ["\n", stop]}}
              if task is ANSWER else task)
    return root


def spec(root: Path, *tasks: str, **keys: Any) -> EvaluateSpec:
    names = tasks or tuple(task["task"] for task in TASKS)
    return EvaluateSpec.model_validate({"name": "e", "batch_windows": 3, "tasks": [str(root / "tasks" / f"{name}.yaml") for name in names],
                                        **({} if "endpoint" in keys else {"model": str(root / "runs" / "m")}), **keys})


def asked(root: Path, server: Server, *tasks: str, **keys: Any) -> EvaluateSpec:
    return spec(root, *tasks, endpoint={"url": server.url, "api_key_file": str(root / "key")}, concurrent=2,
                **{"tokenizer": str(root / "runs" / "m"), **keys})


def values(made: dict[str, Any]) -> dict[str, float]:
    return {f"{name}.{metric}": one["value"] for name, task in made["tasks"].items() for metric, one in task["metrics"].items()}


def lines(folder: Path, task: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "answers" / f"{task}.jsonl").read_text().splitlines()]
