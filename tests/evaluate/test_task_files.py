"""Files of tasks: what is read of them and is on record, and what is refused in one line before any work."""

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from distlm import execute
from distlm.errors import DistlmError, InputError, SpecError
from distlm.evaluate.driver import evaluate
from distlm.evaluate.groups import read_tasks
from distlm.evaluate.task import inputs_of
from distlm.evaluate.tasks import loaded
from distlm.runs import RunFolder
from distlm.spec.load import load_spec
from distlm.storage import Storage
from tests.evaluate.tasks import ANSWER, CHOICE, CONTEXT, asked, needs_harness, rows, spec, write
from tests.records import Records
from tests.serve.test_api import Server


@needs_harness
@pytest.mark.parametrize(("change", "message"), [
    ({"dataset_path": "ai2_arc"}, r"dataset_path: its data set ai2_arc is not local; write `dataset_path: json`"),
    ({"dataset_kwargs": {"data_files": {"test": "none.jsonl"}}}, "data_files: there is no local file none.jsonl; it is looked for in"),
    ({"dataset_kwargs": {"data_files": {"test": "https://x.org/a.jsonl"}}}, "there is no local file https://x.org/a.jsonl"),
    ({"dataset_kwargs": {}}, "dataset_kwargs.data_files: it names no files"),
    ({"doc_to_txt": "x"}, r"task.yaml: doc_to_txt: unknown key; did you mean doc_to_text\?"),
    ({"group": "several"}, "it is a task and a group; leave `group` out"), ({"task": None}, "it names no task"),
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
def test_a_function_that_ends_the_program_is_an_error_of_its_file(root: Path, tmp_path: Path) -> None:
    (tmp_path / "ends.py").write_text("raise SystemExit(0)\n")
    path = Path(write(tmp_path, CHOICE))
    path.write_text(path.read_text() + "process_results: !function ends.count\n")
    with pytest.raises(InputError, match=r"pick\.yaml: SystemExit"):
        read_tasks(spec(root, tasks=[str(path)]).tasks)


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
def test_a_tokenizer_without_a_template_is_told_before_any_work(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "runs" / "m", tmp_path / "runs" / "m")
    settings = tmp_path / "runs" / "m" / "tokenizer_config.json"
    settings.write_text(json.dumps({key: value for key, value in json.loads(settings.read_text()).items() if key != "chat_template"}))
    given = {"kind": "evaluate", "name": "e", "model": "m", "tasks": [str(root / "tasks" / "pick.yaml")]}
    with pytest.raises(InputError, match=r"chat: .*/runs/m: the tokenizer has no chat template; leave chat out, or name"):
        execute.run({**given, "chat": True}, storage=Storage(tmp_path), progress=Records())
    assert not Storage(tmp_path).evaluation("e").exists()
    inputs_of(spec(root, "pick", model=str(tmp_path / "runs" / "m")), Storage(root))


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


@needs_harness
def test_an_endpoint_is_asked_by_the_tokenizer_of_its_model(root: Path, server: Server, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="tokenizer: it is not known by which tokenizer"):
        inputs_of(asked(root, server, "say", tokenizer=None), Storage(root))
    (tmp_path / "tokenizer.json").write_text('{"model": {"vocab": {}}}')
    with pytest.raises(InputError, match="the tokenizer of the model that it serves is not that in"):
        evaluate(asked(root, server, "say", tokenizer=str(tmp_path)), RunFolder(tmp_path), Storage(root), Records())
