"""The tasks of a spec: files of one task, and files of groups of them, as the lm-evaluation-harness has both.

    files = read_tasks(spec.tasks)                         # the tasks of groups among them; checked, nothing loaded
    averages(files, measured)["sciences"]["metrics"]["acc"]                    # of the results of its tasks

A group's file names tasks, other groups and tags by what the files beside it say that they are, or has them written out in it.
"""

import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

from distlm.corpus.manifest import file_xxh3
from distlm.errors import InputError, SpecError
from distlm.evaluate.tasks import Average, TaskFile, TaskGroup, checked, known_keys, metric_names, refused
from distlm.spec.load import nearest

EXTRA = "pip install 'distlm[lm-eval]'"
ENDINGS = (".yaml", ".yml")


def read_tasks(tasks: Sequence[str]) -> list[TaskFile]:
    """The `tasks` of a spec, each once, with the groups that it is in. Raises SpecError where the harness is not installed, InputError for
    a file that cannot be used."""
    if not tasks:
        return []
    if importlib.util.find_spec("lm_eval") is None:
        raise SpecError("the package lm-eval is not installed", where="tasks", remedy=EXTRA)
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}      # read where the harness is first imported
    found, look = dict[str, TaskFile](), cache(names_in)
    for i, given in enumerate(tasks):
        path, where = whole(Path(given).expanduser()), f"tasks.{i}: {given}"
        if not path.is_file():
            near = nearest(path.name, [one.name for one in path.parent.glob("*.y*ml")]) if path.parent.is_dir() else ""
            raise InputError(f"there is no file {given}", where=f"tasks.{i}", remedy=f"did you mean {path.parent / near}?" if near else
                             "tasks are the harness's YAML files, by their paths")
        with refused(where):
            for file in members(path, where, look):
                name = file.config["task"]
                before = found.get(name, file)
                if before.config != file.config:
                    twice = f"the task {name} is there twice, with other keys"
                    raise InputError(twice if before.path == file.path else f"another file has a task {name} too", where=where,
                                     remedy="give one of them another name")
                found[name] = replace(before, groups=tuple(dict.fromkeys([*before.groups, *file.groups])),
                                      reads=tuple(dict.fromkeys([*before.reads, *file.reads])))
    check_groups([*found.values()])
    return [*found.values()]


def whole(path: Path) -> Path:
    """One spelling of the path of a file, whose data and neighbours lie in the folder that it is named in, also where it is a link."""
    return path.parent.resolve() / path.name


@dataclass
class Names:
    """What the YAML files of a folder call themselves."""

    called: dict[str, list[Path]] = field(default_factory=dict)
    """Files by the names of their tasks and groups."""
    tagged: dict[str, list[Path]] = field(default_factory=dict)
    unread: dict[Path, str] = field(default_factory=dict)
    """Those that cannot be read, and why."""

    def of(self, name: str, path: Path, where: str) -> list[Path]:
        """The files that a name in the list of a group's file stands for; none where there is no such name. Raises InputError where two
        files have it."""
        if len(own := self.called.get(name, [])) > 1:
            raise InputError(f"{' and '.join(one.name for one in own)} are both {name}", where=where,
                             remedy="give one of them another name")
        by_path = path.parent / name
        return own or self.tagged.get(name, []) or ([whole(by_path)] if by_path.suffix in ENDINGS and by_path.is_file() else [])

    def hint(self, name: str, path: Path) -> str:
        """What to do where there is no such name: a file that cannot be read may be what is meant."""
        near = nearest(name, [*self.called, *self.tagged])
        unread = sorted(self.unread.items(), key=lambda one: one[0].stem != name)[:3]
        return " ".join([f"did you mean {near}?"] * bool(near) + [f"{place.name} cannot be read ({error})" for place, error in unread]
                        ) or f"list a file of another folder by its path from {path.parent}"


Look = Callable[[Path], Names]
"""`names_in`, which reads each folder once for all the groups of a spec."""


def names_in(folder: Path) -> Names:
    """What is no file of a task or a group is passed over."""
    from lm_eval.tasks._yaml_loader import load_yaml

    names = Names()
    for place in sorted(one for one in folder.iterdir() if one.suffix in ENDINGS and one.is_file()):
        try:
            config = load_yaml(place, resolve_func=False)
        except Exception as error:                         # it may be anything
            names.unread[place] = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
            continue
        name, tags = config.get("group") or config.get("task"), config.get("tag")
        if isinstance(name, str):
            names.called.setdefault(name, []).append(place)
            for tag in tags if isinstance(tags, list) else [tags]:
                if isinstance(tag, str):
                    names.tagged.setdefault(tag, []).append(place)
    return names


def members(path: Path, where: str, look: Look, groups: tuple[TaskGroup, ...] = (),
            keys: Mapping[str, Any] | None = None) -> Iterator[TaskFile]:
    """The tasks of a file: its own, or those of its group. `groups` are those that it is in, and `keys` what they change in its tasks."""
    from lm_eval.tasks._yaml_loader import load_yaml

    with refused(where):
        config = load_yaml(path)
    if "group" not in config:
        yield checked({**config, **(keys or {})}, path, where, groups)
        return
    if not isinstance(config["group"], str):
        raise InputError(f"group: {config['group']!r} is no name", where=where, remedy="write `group: NAME`")
    yield from of_group(config, config["group"], path, where, look, groups, keys or {})


GROUP_KEYS = ("group", "group_alias", "task", "aggregate_metric_list", "metadata", "tag", "include", "task_list")
"""The keys of a group that are none of its tasks'."""


def of_group(config: Mapping[str, Any], name: str, path: Path, where: str, look: Look, groups: tuple[TaskGroup, ...],
             keys: Mapping[str, Any]) -> Iterator[TaskFile]:
    """The tasks of a group that a file is, or has in the list of another. Keys that are none of a group's own are those of all its tasks;
    what the groups around it say counts before them, and what an item of its list says of itself before both, as in the harness."""
    listed = config.get("task")
    if isinstance(listed, str) and "dataset_path" in config:
        raise InputError("it is a task and a group", where=where, remedy="leave `group` out; a name that several tasks share is a `tag`")
    if not listed:
        raise InputError(f"the group {name} has no tasks", where=where, remedy="list them: `task: [NAME, ...]`")
    if name in [one.name for one in groups]:
        raise InputError(f"the group {name} is in itself", where=where, remedy="take it out of its list")
    groups = (*groups, make_group(config, name, path, where))
    keys = {**{key: value for key, value in config.items() if key not in GROUP_KEYS}, **keys}
    if unknown := sorted(set(keys) - known_keys()):
        if unknown[0] in GROUP_KEYS:
            raise InputError(f"{unknown[0]} is a key of the group {name} itself", where=where,
                             remedy=f"write it in {path}, and not where the group is listed")
        near = nearest(unknown[0], [*GROUP_KEYS, *known_keys()])
        raise InputError(f"{unknown[0]}: unknown key", where=where, remedy=f"did you mean {near}?" if near else
                         "a group has the harness's keys, and those of its tasks")
    beside, inline = look(path.parent), set[str]()
    for item in listed if isinstance(listed, list) else [listed]:
        given = item if isinstance(item, dict) else {"task": item}
        kind = "group" if "group" in given else "task"
        wanted, more = given.get(kind), {**keys, **{key: value for key, value in given.items() if key != kind}}
        if not isinstance(wanted, str) or not wanted:
            raise InputError(f"the group {name} lists {item!r}, which is no name", where=where,
                             remedy="write the name of a task, or a section with `task: NAME` or `group: NAME`")
        if kind == "group" and "task" in given:
            if wanted in inline:
                raise InputError(f"the group {name} has two groups {wanted}", where=where, remedy="give one of them another name")
            inline.add(wanted)
            yield from of_group(given, f"{name}::{wanted}", path, where, look, groups, keys)
        elif places := beside.of(wanted, path, where):
            for place in places:
                yield from members(place, f"{where}: {wanted}", look, groups, more)
        elif "dataset_path" in more or "custom_dataset" in more:
            yield checked({**more, "task": f"{name}::{wanted}"}, path, where, groups)
        else:
            raise InputError(f"the group {name} lists {wanted}, and no file beside it has a task, group or tag of this name", where=where,
                             remedy=beside.hint(wanted, path))


def make_group(config: Mapping[str, Any], name: str, path: Path, where: str) -> TaskGroup:
    """Raises InputError for an aggregate that the harness does not have, or that it would leave out without a word."""
    from lm_eval.config.group import GroupConfig

    made = GroupConfig(group=name, aggregate_metric_list=config.get("aggregate_metric_list"))
    found = []
    for one in made.aggregate_metric_list or []:
        key = f"{where}: aggregate_metric_list"
        if one.aggregation != "mean":
            raise InputError("the harness takes the mean whatever `aggregation` is", where=key, remedy="write `aggregation: mean`")
        if not isinstance(one.metric, str) or not isinstance(one.weight_by_size, bool):
            raise InputError(f"metric: {one.metric!r}, weight_by_size: {one.weight_by_size!r}", where=key,
                             remedy="a metric is a name, and weight_by_size true or false")
        found.append(Average(one.metric, None if one.filter_list is None else tuple(one.filter_list), one.weight_by_size))
    for one, other in combinations(found, 2):
        if one.metric == other.metric and (one.filters is None or other.filters is None or set(one.filters) & set(other.filters)):
            raise InputError(f"the group {name} has two means of {one.metric}", where=f"{where}: aggregate_metric_list",
                             remedy="leave one out, or give each a filter_list of its own")
    version = (config.get("metadata") or {}).get("version")
    return TaskGroup(name, path, tuple(found), version, where)


def groups_of(files: Sequence[TaskFile]) -> dict[TaskGroup, list[TaskFile]]:
    """The tasks of each group, those of groups within it among them."""
    found: dict[TaskGroup, list[TaskFile]] = {}
    for file in files:
        for group in file.groups:
            found.setdefault(group, []).append(file)
    return found


def check_groups(files: Sequence[TaskFile]) -> None:
    """Raises InputError for two groups of one name, and for an aggregate of a metric that no task of the group comes to."""
    seen: dict[str, TaskGroup] = {}
    for group, its in groups_of(files).items():
        if seen.setdefault(group.name, group) != group:
            raise InputError(f"another file has a group {group.name} too", where=group.where, remedy="give one of them another name")
        if (there := metrics_of(its)) is None:
            continue
        for average in group.averages:
            for metric in average.of(there) or [average.metric]:
                if metric not in there:
                    near = nearest(metric, there)
                    raise InputError(f"no task of the group {group.name} comes to {metric}", where=f"{group.where}: aggregate_metric_list",
                                     remedy=f"did you mean {near}?" if near else f"there are {', '.join(there)}")


def metrics_of(files: Sequence[TaskFile]) -> list[str] | None:
    """The metrics that any of these tasks comes to; None where functions of a task's file decide them."""
    known = [metric_names(file) for file in files]
    return None if None in known else sorted({name for names in known for name in names or []})


def average_names(group: TaskGroup, files: Sequence[TaskFile]) -> list[str] | None:
    """The metrics of a group, as its results name them; None where functions of a task's file decide them."""
    there = metrics_of(files)
    return None if there is None else [name for average in group.averages for name in average.of(there)]


def averages(files: Sequence[TaskFile], measured: Mapping[str, Any]) -> dict[str, Any]:
    """What each group comes to whose tasks have all been `measured`, as result.json has them: the mean of its tasks' metrics, each counted
    by its documents or all alike, over the tasks that have it, and its standard error, both as the harness computes them."""
    from lm_eval.api.metrics import aggregate_subtask_metrics, pooled_sample_stderr, unweighted_mean_stderr

    found = {}
    for group, its in groups_of(files).items():
        tasks = {name: measured[name] for file in its if (name := file.config["task"]) in measured}
        if len(tasks) < len(its):
            continue
        made = {}
        for average in group.averages:
            for metric in average.of(sorted({name for task in tasks.values() for name in task["metrics"]})) or [average.metric]:
                over = {name: task for name, task in tasks.items() if metric in task["metrics"]}
                each, sizes = [task["metrics"][metric] for task in over.values()], [task["documents"] for task in over.values()]
                values, errors = [one["value"] for one in each], [one["stderr"] for one in each]
                better = {one["higher_is_better"] for one in each}
                value = stderr = None
                if values and None not in values:
                    value = float(aggregate_subtask_metrics(values, sizes, average.weight_by_size))
                    if None not in errors and (not average.weight_by_size or sum(sizes) > len(sizes)):
                        stderr = float(pooled_sample_stderr(errors, sizes) if average.weight_by_size else unweighted_mean_stderr(errors))
                made[metric] = {"value": value, "stderr": stderr, "higher_is_better": better.pop() if len(better) == 1 else None,
                                "weight_by_size": average.weight_by_size, "tasks": [*over]}
        found[group.name] = {"file": str(group.path), "hash": file_xxh3(group.path), "version": group.version, "tasks": [*tasks],
                             "documents": sum(task["documents"] for task in tasks.values()), "metrics": made}
    return found
