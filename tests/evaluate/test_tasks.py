"""Tasks of the lm-evaluation-harness: a checkpoint, its endpoint and the harness's own model come to the same; nothing is downloaded."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from ruamel.yaml import YAML

from distlm import execute, pipeline, plan
from distlm.corpus.manifest import file_xxh3
from distlm.errors import InputError, SpecError
from distlm.evaluate.driver import evaluate
from distlm.evaluate.worker import Worker
from distlm.runs import RunFolder
from distlm.spec.load import load_spec
from distlm.storage import Storage
from tests.evaluate.tasks import ANSWER, CHOICE, LAST, PROMPTS, TASKS, asked, lines, needs_harness, rows, spec, values, write
from tests.records import Records
from tests.serve.test_api import Server


@pytest.fixture(scope="module")
def by_checkpoint(root: Path, storage: Storage) -> dict[str, Any]:
    """What a job with two workers comes to."""
    names = [str(root / "tasks" / f"{task['task']}.yaml") for task in TASKS]
    return execute.run({"kind": "evaluate", "name": "by-checkpoint", "model": "m", "tasks": names, "workers": 2, "batch_windows": 2},
                       storage=storage, progress=Records())


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
    own = execute.run({"kind": "evaluate", "name": "in-chat", "model": "m", "chat": True, "threads_per_worker": 1, **keys}, storage=storage,
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
def test_tasks_of_like_names_have_answers_of_their_own(root: Path, tmp_path: Path) -> None:
    from distlm.evaluate.harness import answers_file

    assert len({answers_file(RunFolder(tmp_path), name) for name in ("a b", "a_b", "a/b", "a%20b")}) == 4


@pytest.mark.slow
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
