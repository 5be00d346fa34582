"""Groups of tasks of the lm-evaluation-harness: their means are the harness's own, by a checkpoint and by its endpoint."""

import math
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from distlm import execute, plan
from distlm.errors import InputError, SpecError
from distlm.evaluate.driver import evaluate
from distlm.evaluate.groups import Names, averages, groups_of, names_in, read_tasks
from distlm.evaluate.task import inputs_of
from distlm.evaluate.tasks import Average, TaskFile, TaskGroup
from distlm.pipeline import fill
from distlm.runs import RunFolder
from distlm.storage import Storage
from tests.evaluate.tasks import CHOICE, LAST, TASKS, asked, needs_harness, rows, spec, values, write
from tests.records import Records
from tests.serve.test_api import Server

OTHER: dict[str, Any] = {**CHOICE, "task": "few", "num_fewshot": 0, "tag": ["short", "mine"],
                         "dataset_kwargs": {"data_files": {"test": "few.jsonl", "train": "shots.jsonl"}}}
MEAN = {"metric": "acc", "aggregation": "mean", "weight_by_size": True, "filter_list": "none"}
GROUP: dict[str, Any] = {
    "group": "all", "group_alias": "everything", "metadata": {"version": 3},
    "task": ["last", {"group": "picks", "task": ["pick", {"task": "few", "num_fewshot": 2}],
                      "aggregate_metric_list": [{**MEAN, "weight_by_size": False}, {"metric": "acc_norm"}]}],
    "aggregate_metric_list": [MEAN]}


def group(folder: Path, given: dict[str, Any], name: str = "g") -> str:
    with (folder / f"{name}.yaml").open("w") as file:
        YAML().dump(given, file)
    return str(folder / f"{name}.yaml")


@pytest.fixture
def folder(root: Path, tmp_path: Path) -> Path:
    """The tasks of `root` with one more, of three documents."""
    place = tmp_path / "tasks"
    place.mkdir()
    for file in (root / "tasks").glob("*.jsonl"):
        (place / file.name).write_bytes(file.read_bytes())
    for task in (*TASKS, OTHER):
        write(place, task)
    rows(place / "few.jsonl", [{"question": f"which {i}?", "choices": ["this", "that"], "answer": i % 2} for i in range(3)])
    return place


@needs_harness
def test_the_means_of_groups_are_the_harness_own_by_a_checkpoint_and_by_its_endpoint(
        root: Path, storage: Storage, server: Server, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    paths = [group(folder, GROUP), str(folder / "say.yaml"), str(folder / "last.yaml")]
    own = execute.run({"kind": "evaluate", "name": "by-group", "model": "m", "tasks": paths, "threads_per_worker": 1}, storage=storage,
                      progress=(shown := Records()))
    (tmp_path / "run").mkdir()
    asking = evaluate(asked(root, server, tasks=paths), RunFolder(tmp_path / "run"), Storage(root), Records())
    monkeypatch.chdir(folder)                              # the harness looks for data there
    model = huggingface.HFLM(pretrained=str(root / "runs" / "m"), device="cpu", dtype="float32", batch_size=2)
    found = simple_evaluate(model=model, tasks=["all", "say"], bootstrap_iters=1000,
                            task_manager=TaskManager(include_path=str(folder), include_defaults=False))
    assert found is not None and [*own["tasks"]] == ["last", "pick", "few", "say"] == [*asking["tasks"]]
    assert [*own["groups"]] == ["all", "all::picks"] and own["tasks"]["few"]["shots"] == 2
    everything, picks = own["groups"].values()
    assert [*everything["metrics"]] == ["acc"] and [*picks["metrics"]] == ["acc", "acc_norm"]
    for name, made in own["groups"].items():
        for metric, one in made["metrics"].items():
            assert one["value"] == pytest.approx(found["groups"][name][f"{metric},none"], rel=1e-6), (name, metric)
            assert one["stderr"] == pytest.approx(found["groups"][name][f"{metric}_stderr,none"], rel=1e-5), (name, metric)
            mine = asking["groups"][name]["metrics"][metric]
            assert {**mine, "value": None, "stderr": None} == {**one, "value": None, "stderr": None}
            assert (mine["value"], mine["stderr"]) == pytest.approx((one["value"], one["stderr"]), rel=1e-6)
    assert values(asking) == pytest.approx(values(own), rel=1e-6, abs=1e-6)
    each = {name: own["tasks"][name]["metrics"]["acc"]["value"] for name in ("last", "pick", "few")}
    assert picks["metrics"]["acc"]["value"] == pytest.approx((each["pick"] + each["few"]) / 2), "all alike"
    assert everything["metrics"]["acc"]["value"] == pytest.approx((4 * each["last"] + 9 * each["pick"] + 3 * each["few"]) / 16)
    assert everything["documents"] == 16 and everything["version"] == 3 and everything["file"] == paths[0]
    page = (Path(own[""]) / "report.html").read_text()
    assert "Groups of tasks" in page and f"<td>{everything['metrics']['acc']['value']:.4f}</td>" in page
    assert "last, pick, few (3 of 3)" in page
    table = dict(next(record for record in shown.records if record["distlm"] == "table")["rows"])
    assert table["all"].startswith(f"acc {everything['metrics']['acc']['value']:.4f} ± ") and table["all"].endswith("16 documents")


@needs_harness
def test_a_group_has_names_paths_tags_and_tasks_of_its_own(root: Path, folder: Path) -> None:
    (folder / "deep").mkdir()
    (folder / "deep" / "pick.jsonl").write_bytes((folder / "pick.jsonl").read_bytes())
    path = write(folder / "deep", {**CHOICE, "task": "deep", "fewshot_split": "test", "dataset_kwargs": {
        "data_files": {"test": "pick.jsonl"}}})
    (folder / "broken.yaml").write_text("{")
    group(folder, {"group": "inner", "task": "say"}, "inner")
    own = {key: value for key, value in LAST.items() if key != "task"}
    given = group(folder, {"group": "g", "task": ["mine", "deep/deep.yaml", "inner", {"task": "here", **own}], "num_fewshot": 1})
    files = read_tasks(spec(root, tasks=[given, path]).tasks)
    assert [file.config["task"] for file in files] == ["few", "deep", "say", "g::here"]
    assert [[one.name for one in file.groups] for file in files] == [["g"], ["g"], ["g", "inner"], ["g"]]
    assert {file.config["num_fewshot"] for file in files} == {1}, "the group's own keys are those of its tasks"
    assert [file.path.name for file in files] == ["few.yaml", "deep.yaml", "say.yaml", "g.yaml"]
    assert all(Path(given) in file.reads for file in files) and folder / "inner.yaml" in files[2].reads
    assert {group.name: len(its) for group, its in groups_of(files).items()} == {"g": 4, "inner": 1}
    before = inputs_of(spec(root, tasks=[given]), Storage(root))
    Path(given).write_text(Path(given).read_text().replace("num_fewshot: 1", "num_fewshot: 2"))
    assert inputs_of(spec(root, tasks=[given]), Storage(root)) != before
    needs = dict(plan.of_evaluate(spec(root, tasks=[given]), Storage(root)))
    assert needs["tasks"] == "few, deep, say, g::here" and needs["group inner"] == "say"


@needs_harness
def test_a_file_and_a_group_are_one_by_whatever_path_they_are_named(root: Path, folder: Path) -> None:
    (folder.parent / "groups").mkdir()
    (folder.parent / "link").symlink_to(folder)
    inner = group(folder, {"group": "inner", "task": "say"}, "inner")
    paths = [group(folder.parent / "groups", {"group": name, "task": ["../tasks/pick.yaml", "../tasks/inner.yaml"]}, name) for name in "ab"]
    files = read_tasks([*paths, str(folder / "pick.yaml"), inner, str(folder.parent / "groups" / ".." / "tasks" / "pick.yaml"),
                        str(folder.parent / "link" / "inner.yaml"), str(folder.parent / "link" / "pick.yaml")])
    assert [file.path for file in files] == [folder / "pick.yaml", folder / "say.yaml"]
    assert {one.name: (one.path, len(its)) for one, its in groups_of(files).items()} == {
        "a": (Path(paths[0]), 2), "b": (Path(paths[1]), 2), "inner": (Path(inner), 1)}


@needs_harness
def test_of_what_lies_beside_a_group_only_what_it_lists_must_be_readable_and_each_folder_is_read_once(
        root: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i, tag in enumerate(("5", "[[1], {a: 1}, mine]", "{a: 1}")):
        (folder / f"other-{i}.yaml").write_text(f"task: other-{i}\ntag: {tag}\n")
    read = list[Path]()

    def counted(place: Path) -> Names:
        read.append(place)
        return names_in(place)

    monkeypatch.setattr("distlm.evaluate.groups.names_in", counted)
    group(folder, {"group": "inner", "task": ["say"]}, "inner")
    listed = ["pick", "inner", {"group": "own", "task": ["last"]}]
    files = read_tasks([group(folder, {"group": name, "task": listed}, name) for name in "gh"])
    assert [file.config["task"] for file in files] == ["pick", "say", "last"] and read == [folder]
    (folder / "pick.yaml").write_text("task: pick\nmetric_list: [\n")
    (folder / "last.yaml").write_text("task: last\ninclude: gone.yaml\n")
    for name, message in (("pick", r"the group g lists pick, and no file .* of this name; pick\.yaml cannot be read \(ParserError: "),
                          ("last", r"the group g lists last, .*; last\.yaml cannot be read \(FileNotFoundError: \[Errno 2\] No such file"),
                          ("pick.yaml", r"g\.yaml: pick\.yaml: ParserError"),
                          ("last.yaml", r"g\.yaml: last\.yaml: FileNotFoundError: .*gone")):
        with pytest.raises(InputError, match=message) as error:
            read_tasks([group(folder, {"group": "g", "task": [name]})])
        assert "\n" not in str(error.value)


@needs_harness
@pytest.mark.parametrize(("change", "message"), [
    ({"task": []}, "the group g has no tasks; list them"), ({"task": None}, "the group g has no tasks"),
    ({"task": ["pikc"]}, r"the group g lists pikc, and no file beside it has .*; did you mean pick\?"),
    ({"task": ["nothing/like.yaml"]}, "lists nothing/like.yaml, and no file .*; list a file of another folder by its path from"),
    ({"task": [3]}, "the group g lists 3, which is no name"), ({"task": [{"tsk": "pick"}]}, "which is no name"),
    ({"task": ["g"]}, "the group g is in itself"), ({"group": 3}, "group: 3 is no name"),
    ({"task": [{"group": "a", "task": ["pick"]}, {"group": "a", "task": ["last"]}]}, "the group g has two groups a; give one of them"),
    ({"task": [{"group": "inner", "aggregate_metric_list": [MEAN]}]}, "aggregate_metric_list is a key of the group inner itself; write"),
    ({"task": ["twin"]}, "one.yaml and two.yaml are both twin"),
    ({"task": "pick", "dataset_path": "json"}, "it is a task and a group; leave `group` out"),
    ({"agregate_metric_list": []}, r"agregate_metric_list: unknown key; did you mean aggregate_metric_list\?"),
    ({"task": ["pick", {"task": "pick", "num_fewshot": 2}]}, "the task pick is there twice, with other keys"),
    ({"task": [{"task": "pick", "doc_to_txt": "x"}]}, r"g.yaml: pick: doc_to_txt: unknown key; did you mean doc_to_text\?"),
    ({"task": [{"task": "pick", "dataset_path": "ai2_arc"}]}, "its data set ai2_arc is not local"),
    ({"aggregate_metric_list": [{"metric": "acc_nrm"}]},
     r"aggregate_metric_list: no task of the group g comes to acc_nrm; did you mean acc_norm\?"),
    ({"aggregate_metric_list": [{"metric": "acc", "filter_list": ["first"]}]}, "no task of the group g comes to acc,first"),
    ({"aggregate_metric_list": [MEAN, {"metric": "acc", "weight_by_size": False}]}, "the group g has two means of acc; leave one out"),
    ({"aggregate_metric_list": [{"metric": "acc"}, {"metric": "acc", "filter_list": ["first"]}]}, "the group g has two means of acc"),
    ({"aggregate_metric_list": [{"metric": "acc", "filter_list": [name]} for name in ("a", "b")]}, "no task of the group g comes to acc,a"),
    ({"aggregate_metric_list": [{"metric": "acc", "aggregation": "median"}]}, "'mean' is the only pre-defined aggregation"),
    ({"aggregate_metric_list": [{"metric": "acc", "weight_by_size": "by"}]}, "weight_by_size: 'by'; a metric is a name, and "),
    ({"aggregate_metric_list": [{"metric": "acc", "weigth_by_size": True}]}, "unexpected keyword argument 'weigth_by_size'"),
    ({"aggregate_metric_list": 5}, "g.yaml: TypeError"), ({"metadata": 3}, "g.yaml: AttributeError")])
def test_a_group_that_cannot_be_used_is_one_line_before_any_work(change: dict[str, Any], message: str, root: Path, folder: Path) -> None:
    for name in ("one", "two"):
        group(folder, {**CHOICE, "task": "twin"}, name)
    group(folder, {"group": "inner", "task": ["say"]}, "inner")
    path = group(folder, {"group": "g", "task": ["pick", "last"], "aggregate_metric_list": [MEAN], **change})
    given = {"kind": "evaluate", "name": "bad", "model": "m", "tasks": [path]}
    with pytest.raises(InputError, match=message) as error:
        execute.run(given, storage=Storage(root), progress=Records())
    assert "\n" not in str(error.value) and "tasks.0: " in str(error.value) and not Storage(root).evaluation("bad").exists()


@needs_harness
def test_a_function_in_place_of_the_mean_and_two_groups_of_one_name_are_refused(root: Path, folder: Path) -> None:
    (folder / "own.py").write_text("def best(values, sizes):\n    return max(values)\n")
    (folder / "f.yaml").write_text("group: f\ntask: [pick]\naggregate_metric_list:\n  - metric: acc\n    aggregation: !function own.best\n")
    with pytest.raises(InputError, match="the harness takes the mean whatever `aggregation` is; write"):
        read_tasks([str(folder / "f.yaml")])
    with pytest.raises(InputError, match="another file has a group same too"):
        read_tasks([group(folder, {"group": "same", "task": [task]}, f"of-{task}") for task in ("pick", "few")])


def measured(value: float | None, documents: int, stderr: float | None = 0.1, metric: str = "acc", more: bool = True) -> dict[str, Any]:
    return {"documents": documents, "metrics": {metric: {"value": value, "stderr": stderr, "higher_is_better": more}}}


@needs_harness
def test_a_mean_says_over_which_tasks_it_is_and_there_is_none_of_a_number_that_there_is_not(tmp_path: Path) -> None:
    (tmp_path / "g.yaml").write_text("group: g\n")

    def of(made: dict[str, Any], *given: Average) -> dict[str, Any] | None:
        one = TaskGroup("g", tmp_path / "g.yaml", given or (Average("acc", None, True),), None, "tasks.0")
        files = [TaskFile(tmp_path / name, "", {"task": name}, (), (one,)) for name in ("a", "b")]
        return averages(files, made).get("g")

    assert of({"a": measured(0.5, 4)}) is None, "b has not been asked"
    found = of({"a": measured(0.5, 4), "b": measured(0.3, 4, metric="exact_match")})
    assert found and found["metrics"]["acc"] == {"value": 0.5, "stderr": pytest.approx(0.1), "higher_is_better": True,
                                                 "weight_by_size": True, "tasks": ["a"]}
    found = of({"a": measured(0.5, 4, more=False), "b": measured(None, 4)})
    assert found and (found["metrics"]["acc"]["value"], found["metrics"]["acc"]["higher_is_better"]) == (None, None)
    found = of({"a": measured(0.5, 1), "b": measured(1.0, 1)})
    assert found and (found["metrics"]["acc"]["value"], found["metrics"]["acc"]["stderr"]) == (0.75, None), "one document has no spread"
    found = of({"a": measured(0.5, 3), "b": measured(1.0, 1)}, Average("acc", None, False))
    assert found and (found["metrics"]["acc"]["value"], found["metrics"]["acc"]["stderr"]) == (0.75, pytest.approx(math.sqrt(0.02) / 2))
    found = of({"a": measured(0.5, 3), "b": measured(1.0, 1)}, Average("f1", None, False))
    assert found and found["metrics"]["f1"]["value"] is None and found["metrics"]["f1"]["tasks"] == []


@needs_harness
def test_a_later_step_takes_the_mean_of_a_group(root: Path, folder: Path) -> None:
    path = group(folder, GROUP)

    def check(reference: str) -> None:
        execute.resolve({"kind": "pipeline", "name": "p", "steps": {
            "e": {"kind": "evaluate", "model": "m", "tasks": [path]},
            "q": {"kind": "prepare", "sources": ["stdlib"], "split": {"val_fraction": f"${{{reference}}}"}}}})

    for name in ("groups.all.acc", "groups.all.acc_stderr", "groups.all::picks.acc_norm", "tasks.few.acc"):
        check(f"e.{name}")
    with pytest.raises(SpecError, match=r"the tasks of e do not come to it; there are groups\.all\.acc, groups\.all\.acc_stderr"):
        check("e.groups.all.acc_norm")
    path = group(folder, {"group": "bare", "task": ["last"]}, "bare")
    with pytest.raises(SpecError, match=r"groups\.bare has no metrics: its file has no aggregate_metric_list"):
        check("e.groups.bare.acc")
    made = {"e": {"": "/e", "groups": {"all": {"metrics": {"acc": {"value": 0.25, "stderr": 0.5}}}}}}
    assert fill(["${e.groups.all.acc}", "${e.groups.all.acc_stderr}"], {"e": {"kind": "evaluate"}}, made) == [0.25, 0.5]
