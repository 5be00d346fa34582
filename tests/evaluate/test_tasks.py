"""Tasks of the lm-evaluation-harness: a checkpoint, its endpoint and the harness's own model come to the same; nothing is downloaded."""

import importlib.util
import json
import math
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ruamel.yaml import YAML
from transformers import AutoModelForCausalLM, AutoTokenizer

from distlm import cluster, execute, pipeline, plan
from distlm.corpus.manifest import file_xxh3
from distlm.errors import DistlmError, InputError, ServeError, SpecError
from distlm.evaluate.driver import evaluate
from distlm.evaluate.task import check_generates, context_of, inputs_of
from distlm.evaluate.tasks import loaded, read_tasks
from distlm.evaluate.worker import Worker
from distlm.model.complete import generate
from distlm.runs import RunFolder
from distlm.spec import EvaluateSpec
from distlm.spec.load import load_spec
from distlm.storage import Storage
from tests.corpus.made import make
from tests.evaluate.models import make_model
from tests.evaluate.test_evaluate import DOCS, SOURCES
from tests.records import Records
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


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of byte tokens, and a task of each kind. Of the answers to be generated the first is the model's own, which a stop ends."""
    root = tmp_path_factory.mktemp("tasks")
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


@pytest.fixture(scope="module")
def server(root: Path) -> Iterator[Server]:
    made = Server(root / "runs" / "m", max_sequences=3, max_queued=8)
    yield made
    made.close()


def spec(root: Path, *tasks: str, **keys: Any) -> EvaluateSpec:
    names = tasks or tuple(task["task"] for task in TASKS)
    return EvaluateSpec.model_validate({"name": "e", "batch_windows": 3, "tasks": [str(root / "tasks" / f"{name}.yaml") for name in names],
                                        **({} if "endpoint" in keys else {"model": str(root / "runs" / "m")}), **keys})


def asked(root: Path, server: Server, *tasks: str, **keys: Any) -> EvaluateSpec:
    return spec(root, *tasks, endpoint={"url": server.url, "api_key_file": str(root / "key")}, concurrent=2,
                **{"tokenizer": str(root / "runs" / "m"), **keys})


@pytest.fixture(scope="module")
def storage(root: Path) -> Iterator[Storage]:
    storage = Storage(root)
    with cluster.connect(root / "driver.log", storage=storage):
        yield storage


@pytest.fixture(scope="module")
def by_checkpoint(root: Path, storage: Storage) -> dict[str, Any]:
    """What a job with two workers comes to."""
    names = [str(root / "tasks" / f"{task['task']}.yaml") for task in TASKS]
    return execute.run({"kind": "evaluate", "name": "by-checkpoint", "model": "m", "tasks": names, "workers": 2, "batch_windows": 2},
                       storage=storage, progress=Records())


def values(made: dict[str, Any]) -> dict[str, float]:
    return {f"{name}.{metric}": one["value"] for name, task in made["tasks"].items() for metric, one in task["metrics"].items()}


def lines(folder: Path, task: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "answers" / f"{task}.jsonl").read_text().splitlines()]


@needs_harness
def test_a_checkpoint_and_its_endpoint_come_to_the_same(root: Path, server: Server, by_checkpoint: dict[str, Any], tmp_path: Path) -> None:
    shown = Records()
    found = evaluate(asked(root, server), RunFolder(tmp_path), Storage(root), shown)
    assert values(found) == pytest.approx(values(by_checkpoint), rel=1e-6, abs=1e-6) and len(values(found)) == 8
    assert values(found)["say.exact_match"] == 0.25 and 0 < values(found)["pick.acc"] < 1
    folder = Path(by_checkpoint[""])
    mine, own = lines(tmp_path, "say"), lines(folder, "say")
    assert [one["filtered_resps"] for one in mine] == [one["filtered_resps"] for one in own]
    assert any(one["filtered_resps"] != [""] for one in mine) and [one["doc"]["prompt"] for one in mine] == PROMPTS
    assert found["harness"] == by_checkpoint["harness"] and found["harness"]["truncated"] > 0 and "lost their beginning" in shown.text
    assert found["evaluated"] == f"tiny at {server.url}/v1"


@needs_harness
def test_the_harness_own_model_comes_to_the_same(root: Path, by_checkpoint: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    from lm_eval.evaluator import simple_evaluate

    monkeypatch.chdir(root / "tasks")                      # the harness looks for data there
    model = huggingface.HFLM(pretrained=str(root / "runs" / "m"), device="cpu", dtype="float32", batch_size=2)
    tasks = [YAML(typ="safe").load((root / "tasks" / f"{task['task']}.yaml").read_text()) for task in TASKS]
    found = simple_evaluate(model=model, tasks=tasks, bootstrap_iters=1000)
    assert found is not None
    expected = {(name, key.partition(",")[0]): value for name, task in found["results"].items() for key, value in task.items()
                if key.endswith(",none")}
    for name, task in by_checkpoint["tasks"].items():
        for metric, one in task["metrics"].items():
            assert one["value"] == pytest.approx(expected[name, metric], rel=1e-6), (name, metric)
            error = expected[name, f"{metric}_stderr"]
            assert one["stderr"] == (None if error == "N/A" else pytest.approx(error, rel=1e-5)), (name, metric)
    ours = [one["filtered_resps"] for one in lines(Path(by_checkpoint[""]), "say")]
    assert ours == [one["filtered_resps"] for one in sorted(found["samples"]["say"], key=lambda one: one["doc_id"])]
    prompts = [one["arguments"] for one in found["samples"]["pick"]]
    assert [one["arguments"] for one in lines(Path(by_checkpoint[""]), "pick")] == json.loads(json.dumps(prompts))     # the shots too


@needs_harness
def test_a_chat_comes_to_the_same_by_a_checkpoint_its_endpoint_and_the_harness_own_model(
        root: Path, storage: Storage, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    from lm_eval.evaluator import simple_evaluate

    names = ("pick", "say")
    keys = {"tasks": [str(root / "tasks" / f"{name}.yaml") for name in names], "shots": 2}
    own = execute.run({"kind": "evaluate", "name": "in-chat", "model": "m", "chat": True, "workers": 2, **keys}, storage=storage,
                      progress=Records())
    asking = evaluate(asked(root, server, chat=True, **keys), RunFolder(tmp_path), Storage(root), Records())
    (tmp_path / "plain").mkdir()
    plain = evaluate(asked(root, server, **keys), RunFolder(tmp_path / "plain"), Storage(root), Records())
    monkeypatch.chdir(root / "tasks")
    model = huggingface.HFLM(pretrained=str(root / "runs" / "m"), device="cpu", dtype="float32", batch_size=2)
    tasks = [YAML(typ="safe").load(Path(path).read_text()) | {"num_fewshot": 2} for path in keys["tasks"]]
    found = simple_evaluate(model=model, tasks=tasks, bootstrap_iters=1000, apply_chat_template=True, fewshot_as_multiturn=True)
    assert found is not None and own["harness"]["chat"] and not plain["harness"]["chat"]
    assert values(asking) == pytest.approx(values(own), rel=1e-6, abs=1e-6)
    for name, task in own["tasks"].items():
        for metric, one in task["metrics"].items():
            assert one["value"] == pytest.approx(found["results"][name][f"{metric},none"], rel=1e-6), (name, metric)
    for name in names:
        theirs = json.loads(json.dumps([one["arguments"] for one in sorted(found["samples"][name], key=lambda one: one["doc_id"])]))
        for folder in (Path(own[""]), tmp_path):
            assert [one["arguments"] for one in lines(folder, name)] == theirs
    first = lines(tmp_path, "pick")[0]["arguments"][0][0]
    assert first.startswith("<|user|>Q: shot") and first.count("<|user|>") == 3 == first.count("<|assistant|>")
    assert [one["filtered_resps"] for one in lines(tmp_path, "say")] == [one["filtered_resps"] for one in sorted(
        found["samples"]["say"], key=lambda one: one["doc_id"])]
    assert "<|user|>" not in lines(tmp_path / "plain", "pick")[0]["arguments"][0][0]


@needs_harness
def test_a_tokenizer_without_a_template_is_told_before_any_work(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "runs" / "m", tmp_path / "runs" / "m")
    settings = tmp_path / "runs" / "m" / "tokenizer_config.json"
    settings.write_text(json.dumps({key: value for key, value in json.loads(settings.read_text()).items() if key != "chat_template"}))
    given = {"kind": "evaluate", "name": "e", "model": "m", "tasks": [str(root / "tasks" / "pick.yaml")]}
    with pytest.raises(InputError, match=r"chat: .*/runs/m: the tokenizer has no chat template; leave chat out, or name"):
        execute.run({**given, "chat": True}, storage=Storage(tmp_path), progress=Records())
    assert not Storage(tmp_path).evaluation("e").exists()
    inputs_of(spec(root, "pick", model=str(tmp_path / "runs" / "m")), Storage(root))


@needs_harness
def test_a_job_leaves_the_numbers_the_answers_and_what_it_read(root: Path, storage: Storage, by_checkpoint: dict[str, Any]) -> None:
    folder = RunFolder(Path(by_checkpoint[""]))
    assert folder.state() == ("succeeded", "completed") and folder.read_result() == by_checkpoint and "loss" not in by_checkpoint
    pick = by_checkpoint["tasks"]["pick"]
    assert {key: pick[key] for key in ("file", "hash", "version", "documents", "shots", "answers")} == {
        "file": str(root / "tasks" / "pick.yaml"), "hash": file_xxh3(root / "tasks" / "pick.yaml"), "version": 2.0, "documents": 9,
        "shots": 1, "answers": "answers/pick.jsonl"}
    acc = pick["metrics"]["acc"]
    assert acc["stderr"] == pytest.approx(math.sqrt(acc["value"] * (1 - acc["value"]) / 8)) and acc["higher_is_better"]
    assert acc["value"] == sum(one["acc"] for one in lines(folder.path, "pick")) / 9
    read = folder.lineage()["inputs"]["tasks"]["pick"]
    assert [*read] == [str(root / "tasks" / name) for name in ("pick.yaml", "pick.jsonl", "shots.jsonl")]
    page = (folder.path / "report.html").read_text()
    assert f"{acc['value']:.4f}" in page and pick["hash"] in page and "Calibration" not in page
    again = Records()
    given = {"kind": "evaluate", **{key: value for key, value in load_spec(folder.path / "spec.yaml").spec.model_dump().items()
                                    if value is not None}, "name": "by-checkpoint"}
    assert execute.run(given, storage=storage, progress=again, resume=True) == by_checkpoint and "nothing to do" in again.notes[0]
    assert dict(plan.needs(execute.resolve(given), storage))["tasks"] == "pick, say, texts, last"


@needs_harness
def test_tasks_go_beside_corpora_and_take_shots_and_a_limit(root: Path, server: Server, tmp_path: Path) -> None:
    given = asked(root, server, "pick", corpus=str(root / "corpora" / "two"), windows=2, shots=0, limit=4, tokenizer=None)
    found = evaluate(given, RunFolder(tmp_path), Storage(root), Records())
    assert found["loss"] > 0 and found["tasks"]["pick"]["documents"] == 4 and found["tasks"]["pick"]["shots"] == 0
    answers = lines(tmp_path, "pick")
    assert [one["doc_id"] for one in answers] == [0, 1, 2, 3] and "shot" not in answers[0]["arguments"][0][0]


@needs_harness
def test_what_was_measured_before_a_task_fails_is_kept_and_its_file_is_named(root: Path, server: Server, tmp_path: Path) -> None:
    (tmp_path / "late.py").write_text("def count(doc, results):\n    return {'acc': 1 / (doc['question'] != 'what is 8?')}\n")
    path = Path(write(tmp_path, {**CHOICE, "task": "late", "metric_list": [CHOICE["metric_list"][0]], "dataset_kwargs": {
        "data_files": {"test": str(root / "tasks" / "pick.jsonl"), "train": str(root / "tasks" / "shots.jsonl")}}}))
    path.write_text(path.read_text() + "process_results: !function late.count\n")
    for before in [], [str(root / "tasks" / "pick.yaml")]:
        given = asked(root, server, corpus=str(root / "corpora" / "two"), windows=2, tasks=[*before, str(path)])
        with pytest.raises(InputError, match=r"late\.yaml: ZeroDivisionError"):
            evaluate(given, RunFolder(tmp_path), Storage(root), Records())
        kept = RunFolder(tmp_path).read_result()
        assert kept["loss"] > 0 and [*kept.get("tasks", {})] == ["pick"] * len(before)
    assert len(lines(tmp_path, "pick")) == 9
    assert f"{kept['tasks']['pick']['metrics']['acc']['value']:.4f}" in (tmp_path / "report.html").read_text()


@needs_harness
def test_what_can_be_known_of_a_task_is_checked_before_an_endpoint_scores(root: Path, server: Server, tmp_path: Path) -> None:
    keys = {"corpus": str(root / "corpora" / "two"), "windows": 2}
    long = write(root / "tasks", {**ANSWER, "task": "long", "generation_kwargs": {"max_gen_toks": CONTEXT}})
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "tokenizer.json").write_bytes((root / "runs" / "m" / "tokenizer.json").read_bytes())
    for given, message in [(asked(root, server, "pick", shots=50, **keys), r"pick\.yaml: ValueError: Sample larger"),
                           (asked(root, server, tasks=[long], **keys), r"long\.yaml: an answer of 96 tokens leaves no room"),
                           (asked(root, server, "say", tokenizer=str(bare), **keys), "no token that ends a text")]:
        with pytest.raises(InputError, match=message):
            evaluate(given, RunFolder(tmp_path), Storage(root), Records())
        assert not (tmp_path / "result.json").exists()


@needs_harness
def test_a_worker_says_of_a_text_what_whole_logits_do(root: Path) -> None:
    from distlm.evaluate.task import make_task

    worker = Worker(make_task(spec(root), Storage(root)), "cpu", "fp32", None)
    worker.load(root / "runs" / "m")
    texts = [([5, 9, 40, 41, 42], 2), ([7, 8], 1), ([int(i) % 90 + 4 for i in range(60)], 50)]
    for (tokens, first), (logprob, greedy) in zip(texts, worker.continuations(texts), strict=True):
        with torch.no_grad():
            logits = worker.model(input_ids=torch.tensor([tokens])).logits[0].double().log_softmax(-1)
        wanted = logits[range(first - 1, len(tokens) - 1), tokens[first:]]
        assert logprob == pytest.approx(float(wanted.sum()), abs=1e-5)
        assert greedy == all(logits[at - 1].argmax() == tokens[at] for at in range(first, len(tokens)))


@needs_harness
@pytest.mark.parametrize(("change", "message"), [
    ({"dataset_path": "ai2_arc"}, r"dataset_path: its data set ai2_arc is not local; write `dataset_path: json`"),
    ({"dataset_kwargs": {"data_files": {"test": "none.jsonl"}}}, "data_files: there is no local file none.jsonl; it is looked for in"),
    ({"dataset_kwargs": {"data_files": {"test": "https://x.org/a.jsonl"}}}, "there is no local file https://x.org/a.jsonl"),
    ({"dataset_kwargs": {}}, "dataset_kwargs.data_files: it names no files"),
    ({"doc_to_txt": "x"}, r"task.yaml: doc_to_txt: unknown key; did you mean doc_to_text\?"),
    ({"group": "several"}, "group: unknown key; a file is one task"), ({"task": None}, "it names no task"),
    ({"metric_list": [{"metric": "bert_score"}]}, "the harness brings no metric bert_score, and none is downloaded"),
    ({"metric_list": [{"metric": "acc_nrm"}]}, r"no metric acc_nrm.*; did you mean acc_norm\?"),
    ({"metric_list": [{"metric": "acc", "hf_evaluate": True}]}, "and none is downloaded"),
    ({"metric_list": [{"metric": "acc"}, {"metric": "bits_per_byte"}]},
     "the harness computes no bits_per_byte of the answers of output_type: multiple_choice; there are acc, acc_bytes, acc_mutual_info, "
     "acc_norm, brier_score, exact_match, f1, likelihood, mcc$"),
    ({"output_type": "loglikelihood", "metric_list": [{"metric": "acc_norm"}]}, "computes no acc_norm .* there are acc, perplexity$"),
    ({"output_type": "loglikelihood_rolling", "metric_list": [{"metric": "perplexity"}]}, "bits_per_byte, byte_perplexity, word_perplex"),
    ({"generation_kwargs": {"do_sample": True}}, "would be drawn at random; set do_sample: false"),
    ({"generation_kwargs": {"num_beams": 3}}, "generation_kwargs: num_beams is not supported"),
    ({"output_type": "generate_until", "generation_kwargs": {"max_gen_toks": CONTEXT}}, "an answer of 96 tokens leaves no room"),
    ({"generation_kwargs": {"max_gen_toks": -5}}, "generation_kwargs: an answer of -5 tokens"),
    ({"metric_list": 5}, r"task\.yaml: TypeError"), ({"generation_kwargs": ["a"]}, r"task\.yaml: AttributeError"),
    ({"generation_kwargs": {"temperature": "hot"}}, r"task\.yaml: ValueError"), ({"dataset_kwargs": "x"}, r"task\.yaml: ValueError"),
    ({"metadata": 3}, r"task\.yaml: TypeError"),
    ({"include": "nowhere.yaml"}, "task.yaml: FileNotFoundError: .*nowhere.yaml")])
def test_a_file_that_cannot_be_used_is_one_line_before_any_work(change: dict[str, Any], message: str, root: Path, tmp_path: Path) -> None:
    path = write(root / "tasks", {**CHOICE, **change, **({} if "task" in change else {"task": "task"})})
    given = {"kind": "evaluate", "name": "bad", "model": "m", "tasks": [path]}
    with pytest.raises(InputError, match=message) as error:
        execute.run(given, storage=Storage(root), progress=Records())
    assert "\n" not in str(error.value) and "spec: tasks.0: " in str(error.value) and not Storage(root).evaluation("bad").exists()


@needs_harness
@pytest.mark.parametrize(("change", "message"), [
    ({"test_split": "nosplit"}, "KeyError: 'nosplit'"), ({"doc_to_text": "{{question"}, "TemplateSyntaxError"),
    ({"output_type": "guess"}, "Got invalid output_type 'guess'"),
    ({"filter_list": [{"name": "x", "filter": [{"function": "no_such"}]}]}, "no_such")])
def test_what_the_harness_itself_refuses_is_one_line_before_the_model_is_loaded(change: dict[str, Any], message: str, root: Path,
                                                                             tmp_path: Path) -> None:
    path = write(root / "tasks", {**CHOICE, "task": "task", **change})
    with pytest.raises(InputError, match=message) as error:
        evaluate(spec(root, model=str(root / "runs" / "m"), tasks=[path]), RunFolder(tmp_path), Storage(root), Records())
    assert "\n" not in str(error.value) and path in str(error.value) and not (tmp_path / "answers").exists()


@needs_harness
def test_a_choice_that_is_longer_than_the_context_is_told_before_anything_is_asked(root: Path, server: Server, tmp_path: Path) -> None:
    questions = [{"question": "which?", "choices": ["this", "that", "y" * length], "answer": 0} for length in (9, CONTEXT - 2, CONTEXT + 4)]
    rows(tmp_path / "long.jsonl", questions)
    path = write(tmp_path, {**CHOICE, "task": "long", "num_fewshot": 0, "dataset_kwargs": {"data_files": {"test": "long.jsonl"}},
                            "fewshot_split": "test"})
    said = rf"{path}: document 2 of the task long has an answer of 101 tokens, and the model takes 1 to {CONTEXT}; change"
    corpus = str(root / "corpora" / "two")
    for given in (spec(root, corpus=corpus, windows=2, tasks=[path]), asked(root, server, corpus=corpus, windows=2, tasks=[path])):
        folder = RunFolder(tmp_path / str(given.endpoint is None))
        folder.path.mkdir()
        with pytest.raises(InputError, match=said):
            evaluate(given, folder, Storage(root), Records())
        assert not (folder.path / "result.json").exists(), "nothing was measured, not the corpus either"
    kept = evaluate(asked(root, server, tasks=[path], limit=2), RunFolder(tmp_path), Storage(root), Records())
    assert kept["tasks"]["long"]["documents"] == 2, "one that just fits is taken"
    rows(tmp_path / "long.jsonl", [*questions[:1], {**questions[0], "choices": ["this", ""]}])
    Path(path).write_text(f"{Path(path).read_text()}target_delimiter: ''\n")
    with pytest.raises(InputError, match="document 1 of the task long has an answer of 0 tokens"):
        evaluate(asked(root, server, tasks=[path]), RunFolder(tmp_path), Storage(root), Records())


@needs_harness
def test_what_a_file_includes_and_its_functions_are_on_record(root: Path, tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text((root / "tasks" / "pick.jsonl").read_text())
    (tmp_path / "mine.py").write_text("def ask(doc):\n    return 'Q! ' + doc['question']\n")
    (tmp_path / "base.yaml").write_text((root / "tasks" / "pick.yaml").read_text())
    (tmp_path / "t.yaml").write_text("include: base.yaml\ntask: t\ndoc_to_text: !function mine.ask\nfewshot_split: test\n"
                                     "dataset_kwargs: {data_files: {test: 'd*.jsonl'}}\n")
    [file] = read_tasks(spec(root, tasks=[str(tmp_path / "t.yaml")]).tasks)
    assert [path.name for path in file.reads] == ["t.yaml", "base.yaml", "mine.py", "data.jsonl"]
    before = inputs_of(spec(root, tasks=[str(tmp_path / "t.yaml")]), Storage(root))
    (tmp_path / "data.jsonl").write_text((root / "tasks" / "shots.jsonl").read_text())
    assert inputs_of(spec(root, tasks=[str(tmp_path / "t.yaml")]), Storage(root)) != before


@needs_harness
@pytest.mark.parametrize(("source", "card", "files", "message"), [
    ("web", "", {"test": "https://x.org/a.jsonl"}, "there is no local file https://x.org/a.jsonl; it is looked for in .*/web"),
    ("carded", "---\nconfigs:\n- config_name: default\n  data_files: https://x.org/a.jsonl\n---\n", None, "names data that are not local"),
    ("d[1]", "", None, "would be taken for a pattern")])
def test_a_folder_that_names_data_elsewhere_is_refused(source: str, card: str, files: Any, message: str, root: Path,
                                                       tmp_path: Path) -> None:
    (tmp_path / source).mkdir()
    (tmp_path / source / "test.jsonl").write_bytes((root / "tasks" / "pick.jsonl").read_bytes())
    (tmp_path / source / "README.md").write_text(card)
    path = write(tmp_path, {**CHOICE, "dataset_path": source, "dataset_kwargs": {"data_files": files} if files else {}})
    with pytest.raises(InputError, match=message):
        read_tasks(spec(root, tasks=[path]).tasks)


@needs_harness
def test_signs_of_patterns_in_names_and_folders_of_files_are_read_as_they_are(root: Path, tmp_path: Path) -> None:
    data = (root / "tasks" / "pick.jsonl").read_bytes()
    (tmp_path / "a[1]").mkdir()
    (tmp_path / "a[1]" / "pick[2].jsonl").write_bytes(data)
    (tmp_path / "a[1]" / "data").mkdir()
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "test.jsonl").write_bytes(data)
    (tmp_path / "data" / "README.md").write_text("---\nlicense_link: https://x.org\n---\n")
    common = {**CHOICE, "fewshot_split": "test"}
    given = spec(root, tasks=[
        write(tmp_path / "a[1]", {**common, "task": "signs", "dataset_kwargs": {"data_files": {"test": "pick[2].jsonl"}}}),
        write(tmp_path, {**common, "task": "folder", "dataset_path": "data", "dataset_kwargs": {}}),
        write(tmp_path, {**common, "task": "named", "dataset_path": "data", "dataset_kwargs": {"data_files": {"test": "t*.jsonl"}}})])
    with loaded(read_tasks(given.tasks), None, None) as tasks:
        assert [len(task.eval_docs) for task in tasks.values()] == [9, 9, 9]


@needs_harness
def test_a_later_step_of_a_pipeline_takes_a_tasks_metric(root: Path, storage: Storage, tmp_path: Path) -> None:
    rows(tmp_path / "texts.jsonl", [{"text": f"{i} is the number of a text that is one of a few"} for i in range(40)])
    made = execute.run({"kind": "pipeline", "name": "gated", "steps": {
        "e": {"kind": "evaluate", "model": "m", "tasks": [str(root / "tasks" / "pick.yaml")]},
        "p": {"kind": "prepare", "sources": [str(tmp_path / "texts.jsonl")], "context": 16,
              "split": {"val_fraction": "${e.tasks.pick.acc}"}, "tokenizer": {"from": str(root / "runs" / "m")}}}},
        storage=storage, progress=Records())
    result = RunFolder(Path(made["e"])).read_result()
    acc = result["tasks"]["pick"]["metrics"]["acc"]
    assert load_spec(Path(made["p"]) / "spec.yaml").spec.model_dump()["split"]["val_fraction"] == acc["value"]
    assert made["e.tasks.pick.acc"] == acc["value"] and made["e.tasks.pick.acc_stderr"] == acc["stderr"]


@needs_harness
def test_a_metric_that_no_task_comes_to_is_refused_before_any_work(root: Path, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("def count(doc, results):\n    return {'seen': 1}\n")
    own = Path(write(tmp_path, {**CHOICE, "task": "own", "fewshot_split": "test", "dataset_kwargs": {
        "data_files": {"test": str(root / "tasks" / "pick.jsonl")}}}))
    own.write_text(own.read_text() + "process_results: !function own.count\n")
    filtered = write(root / "tasks", {**ANSWER, "task": "filtered", "filter_list": [
        {"name": name, "filter": [{"function": "take_first"}]} for name in ("none", "first")]})
    plain = write(root / "tasks", {key: value for key, value in LAST.items() if key != "metric_list"} | {"task": "plain"})

    def check(reference: str, *tasks: str) -> None:
        execute.resolve({"kind": "pipeline", "name": "p", "steps": {
            "e": {"kind": "evaluate", "model": "m", **({"tasks": [*tasks]} if tasks else {"corpus": "c"})},
            "o": {"kind": "prepare", "sources": ["stdlib"]},
            "q": {"kind": "prepare", "sources": ["stdlib"], "split": {"val_fraction": f"${{{reference}}}"}}}})

    paths = [str(root / "tasks" / "pick.yaml"), str(own), filtered, plain]
    for name in ("pick.acc_norm", "pick.acc_stderr", "own.whatever", "filtered.exact_match", "filtered.exact_match,first", "plain.acc",
                 "plain.perplexity"):
        check(f"e.tasks.{name}", *paths)
    check("e.tasks.x.y", "${o}/t.yaml")                     # told where it is filled: nobody knows yet
    for name, message in (
            ("pick.exact_match", "the tasks of e do not come to it; there are tasks.pick.acc, tasks.pick.acc_stderr, tasks.pick.acc_norm, "
                                 "tasks.pick.acc_norm_stderr$"),
            ("pick.ac", "there are tasks.pick.acc, "), ("pikc.acc", r"did you mean tasks.pick.acc\?"),
            ("own", "there are|did you mean"), ("plain.exact_match", "there are tasks.plain.perplexity, ")):
        with pytest.raises(SpecError, match=rf"steps.q.split.val_fraction: \${{e.tasks.{name}}}: .*{message}"):
            check(f"e.tasks.{name}", *paths)
    with pytest.raises(SpecError, match=r"steps.q.split.val_fraction: \${e.tasks.a.b}: the tasks of e do not come to it; it has no tasks"):
        check("e.tasks.a.b")
    check("e.tasks.pick.acc", str(root / "tasks" / "pikc.yaml"))                  # told where the files are read
    with pytest.raises(InputError, match=r"unnamed.yaml: KeyError: 'name'"):
        check("e.tasks.unnamed.exact_match", write(root / "tasks", {**ANSWER, "task": "unnamed", "filter_list": [
            {"filter": [{"function": "take_first"}]}]}))


def test_a_metric_is_filled_in_from_what_the_tasks_came_to() -> None:
    metrics = {"acc": {"value": 0.25, "stderr": None}, "f1,first": {"value": 0.5, "stderr": 0.1}}
    steps, made = {"e": {"kind": "evaluate"}}, {"e": {"": "/e", "tasks": {"a.b": {"metrics": metrics}}}}
    given = ["${e.tasks.a.b.acc}", "${e.tasks.a.b.f1,first}", "${e.tasks.a.b.f1,first_stderr}"]
    assert pipeline.fill(given, steps, made) == [0.25, 0.5, 0.1]
    with pytest.raises(SpecError, match=r"the step e came to no number for it; result.json of e says more"):
        pipeline.fill("${e.tasks.a.b.acc_stderr}", steps, made)
    with pytest.raises(SpecError, match=r"the step e made no tasks.a.b.bleu; did you mean tasks.a.b.acc\?"):
        pipeline.fill("${e.tasks.a.b.bleu}", steps, made)


@needs_harness
def test_tasks_of_like_names_have_answers_of_their_own(root: Path, tmp_path: Path) -> None:
    from distlm.evaluate.harness import answers_file

    assert len({answers_file(RunFolder(tmp_path), name) for name in ("a b", "a_b", "a/b", "a%20b")}) == 4


@needs_harness
def test_a_function_that_ends_the_program_is_an_error_of_its_file(root: Path, tmp_path: Path) -> None:
    (tmp_path / "ends.py").write_text("raise SystemExit(0)\n")
    path = Path(write(tmp_path, CHOICE))
    path.write_text(path.read_text() + "process_results: !function ends.count\n")
    with pytest.raises(InputError, match=r"pick\.yaml: SystemExit"):
        read_tasks(spec(root, tasks=[str(path)]).tasks)


def test_an_endpoint_that_does_not_answer_is_told_from_one_that_is_not_there(root: Path, tmp_path: Path,
                                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distlm.evaluate.endpoint.ANSWER_S", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        given = EvaluateSpec.model_validate({"name": "e", "corpus": str(root / "corpora" / "two"), "endpoint": {
            "url": f"http://127.0.0.1:{silent.getsockname()[1]}", "api_key_file": str(root / "key")}})
        with pytest.raises(ServeError, match=r"has not answered a request in 0\.1 s"):
            evaluate(given, RunFolder(tmp_path), Storage(root), Records())


@needs_harness
def test_an_endpoint_is_asked_by_the_tokenizer_of_its_model(root: Path, server: Server, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="tokenizer: it is not known by which tokenizer"):
        inputs_of(asked(root, server, "say", tokenizer=None), Storage(root))
    (tmp_path / "tokenizer.json").write_text('{"model": {"vocab": {}}}')
    with pytest.raises(InputError, match="the tokenizer of the model that it serves is not that in"):
        evaluate(asked(root, server, "say", tokenizer=str(tmp_path)), RunFolder(tmp_path), Storage(root), Records())


@pytest.mark.parametrize(("keys", "message"), [
    ({"tasks": []}, "corpus, tasks or both must be given"), ({"prompts": ["x"]}, "prompts: .*has no effect without a corpus"),
    ({"tasks": [], "corpus": "c", "shots": 2}, "shots: 2 has no effect without tasks"),
    ({"tasks": [], "corpus": "c", "chat": True}, "chat: True has no effect without tasks"), ({"tasks": ["a", "a"]}, "a is there twice"),
    ({"tokenizer": "m"}, "tokenizer: m has no effect without an endpoint")])
def test_keys_without_effect_are_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        load_spec({"kind": "evaluate", "name": "e", "model": "m", "tasks": ["a.yaml"], **keys})


def test_a_harness_that_is_not_there_and_a_file_that_is_not_there_are_told(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    given = spec(root, tasks=[str(root / "tasks" / "pikc.yaml")])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "lm_eval" else find(name))
    with pytest.raises(SpecError, match=r"tasks: the package lm-eval is not installed; pip install 'distlm\[lm-eval\]'"):
        read_tasks(given.tasks)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: find("json" if name == "lm_eval" else name))
    with pytest.raises(DistlmError, match=r"tasks.0: there is no file .*pikc.yaml; did you mean .*/pick.yaml\?"):
        read_tasks(given.tasks)


def test_a_model_whose_configuration_cannot_be_read_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    for ask in (check_generates, context_of):
        with pytest.raises(InputError, match=r"cannot read its config\.json"):
            ask(tmp_path)
