"""Task files of the lm-evaluation-harness: what they must hold so that nothing is downloaded, and the harness's tasks made of them.

    files = read_tasks(spec.tasks)                         # of evaluate.groups: checked, nothing loaded
    with loaded(files, shots=None, limit=None) as tasks: ...                   # name -> the harness's own task, with its questions

Only what the user has is read: data sets from local files, metrics that the harness brings. A task's file is code: the functions that it
names by `!function` and its templates run.
"""

import contextlib
import inspect
import logging
import random
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from glob import escape, glob
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from distlm.corpus.manifest import file_xxh3
from distlm.errors import DistlmError, InputError
from distlm.spec.load import nearest

FORMATS = ("json", "csv", "parquet", "arrow", "text")
"""The data sets of `datasets` that are made of files alone."""
FEWSHOT_SEED = 1234
"""The harness's own default: by it the examples before a question are drawn."""


@dataclass(frozen=True)
class Average:
    """A metric of a group: the mean of its tasks'."""

    metric: str
    filters: tuple[str, ...] | None
    """Those whose answers count, or whichever there are."""
    weight_by_size: bool
    """Whether each task counts by its documents, or all count alike."""

    def of(self, metrics: Sequence[str]) -> list[str]:
        """What is averaged, as results name it: those of `metrics` that are of this one, or those of its own filters."""
        if self.filters is None:
            return [name for name in metrics if name.partition(",")[0] == self.metric]
        return [named(self.metric, chosen) for chosen in self.filters]


@dataclass(frozen=True)
class TaskGroup:
    """Tasks that have a name together."""

    name: str
    path: Path
    """The file that has it."""
    averages: tuple[Average, ...]
    version: Any
    where: str = field(compare=False)
    """Its place in the spec, for errors."""


@dataclass(frozen=True)
class TaskFile:
    """A task as its file describes it, with what it includes, and with its data files by their whole paths."""

    path: Path
    where: str
    """Its place in the spec, for errors."""
    config: dict[str, Any]
    reads: tuple[Path, ...]
    """The file, what it includes, those of its groups, modules of its functions, and its data."""
    groups: tuple[TaskGroup, ...] = ()
    """Those that it is in, the outermost first."""

    @property
    def hashes(self) -> dict[str, str]:
        """XXH3 of each file that it reads, by path."""
        return {str(path): file_xxh3(path) for path in self.reads}


def known_keys() -> set[str]:
    """The keys that the file of a task may have."""
    from lm_eval.config.task import TaskConfig

    return {one.name for one in fields(TaskConfig)}


def checked(config: dict[str, Any], path: Path, where: str, groups: tuple[TaskGroup, ...] = ()) -> TaskFile:
    """The task of a file's keys. Raises InputError for a file that is no task, has an unknown key, samples, or needs what is not local;
    call it in `refused`, which makes an error of a value of the wrong type one line."""
    config = {key: value for key, value in config.items() if key not in ("tag", "task_list")}          # by which tasks are found
    known = known_keys()
    if unknown := sorted(set(config) - known):
        near = nearest(unknown[0], [*known])
        raise InputError(f"{unknown[0]}: unknown key", where=where, remedy=f"did you mean {near}?" if near else
                         "a file is one task or a group of them, and its keys are the harness's")
    if not isinstance(config.get("task"), str) or not config["task"]:
        raise InputError("it names no task", where=where, remedy="a file is one task: add `task: NAME`")
    check_scoring(config, where)
    config["metadata"] = {**(config.get("metadata") or {}), "config_source": str(path)}
    data = local_data(config, path.parent, where)
    code = {Path(file) for value in functions(config) if (file := inspect.getsourcefile(value)) and "lm_eval" not in Path(file).parts}
    texts = [file for place in (path, *(group.path for group in groups)) for file in included(place)]
    return TaskFile(path, where, config, tuple(dict.fromkeys([*texts, *sorted(code), *data])), groups)


@contextlib.contextmanager
def refused(where: str) -> Iterator[None]:
    """Whatever the harness raises of a task's file in the block is one line: InputError."""
    try:
        yield
    except DistlmError:
        raise
    except (Exception, SystemExit) as error:               # the user's functions and templates raise what they like
        text = " ".join(str(error).split())[:300]
        raise InputError(f"{type(error).__name__}: {text}" if text else type(error).__name__, where=where,
                         remedy="the harness cannot use the file as it is") from error


def check_scoring(config: Mapping[str, Any], where: str) -> None:
    """Raises InputError for a metric that would be downloaded, and for answers that are drawn at random."""
    from lm_eval.api import metrics, registry

    assert metrics                                         # which fill the registry
    for entry in config.get("metric_list") or []:
        name = entry.get("metric") if isinstance(entry, dict) else None
        if name is None:
            raise InputError(f"metric_list: {entry!r} names no metric", where=where, remedy="write `- metric: NAME`")
        if isinstance(name, str) and config.get("process_results") is None and (
                entry.get("hf_evaluate") or name not in registry.metric_registry):
            near = nearest(name, list(registry.metric_registry))
            raise InputError(f"metric_list: the harness brings no metric {name}, and none is downloaded", where=where,
                             remedy=f"did you mean {near}?" if near else f"there are {', '.join(sorted(registry.metric_registry))}")
    check_computed(config, where)
    options = config.get("generation_kwargs") or {}
    if options.get("do_sample") or float(options.get("temperature") or 0) > 0:
        raise InputError("generation_kwargs: the answers would be drawn at random", where=where,
                         remedy="set do_sample: false and temperature: 0: the likeliest token is taken")
    if strange := sorted(set(options) - {"do_sample", "temperature", "until", *LIMITS}):
        raise InputError(f"generation_kwargs: {strange[0]} is not supported", where=where,
                         remedy=f"there are until, {', '.join(LIMITS)}")
    if (limit := max_tokens(options)) < 1:
        raise InputError(f"generation_kwargs: an answer of {limit} tokens", where=where, remedy="set max_gen_toks: 1 or more")
    if config.get("doc_to_image") or config.get("doc_to_audio"):
        raise InputError("it asks of images or sounds", where=where, remedy="models here read text alone")
    if config.get("unsafe_code"):
        raise InputError("unsafe_code: it would run code that the model writes", where=where, remedy="leave it out")


def check_computed(config: Mapping[str, Any], where: str) -> None:
    """Raises InputError for a metric that the harness does not compute of the log-probabilities that a task asks for. Of a text that is
    generated it takes whatever the metric makes of it."""
    from lm_eval.api import registry

    kind = config.get("output_type", "generate_until")
    for entry in config.get("metric_list") or [] if config.get("process_results") is None else []:
        if isinstance(name := entry["metric"], str) and not computed(kind, name):
            raise InputError(f"metric_list: the harness computes no {name} of the answers of output_type: {kind}", where=where,
                             remedy=f"there are {', '.join(sorted(one for one in registry.metric_registry if computed(kind, one)))}")


def computed(kind: str, metric: str) -> bool:
    """Whether the harness computes a metric of log-probabilities of this kind: it is asked for that of an answer that is made up, since it
    has no list of them. True where a text is generated."""
    from lm_eval.api.registry import get_metric
    from lm_eval.api.task import ConfigurableTask

    said = {"loglikelihood": [(0.0, True)], "loglikelihood_rolling": [0.0],
            "multiple_choice": [(0.0, True)] * (4 if metric == "acc_mutual_info" else 2)}      # with those of each choice alone
    if kind not in said:
        return True
    task = SimpleNamespace(
        config=SimpleNamespace(process_results=None), OUTPUT_TYPE=kind, _metric_fn_list={metric: get_metric(metric)},
        multiple_input=False, multiple_target=False, doc_to_choice=lambda _: ["a", "b"], doc_to_target=lambda _: "a", count_words=len,
        count_bytes=len)
    return metric in ConfigurableTask.process_results(task, {}, said[kind])


def metric_names(file: TaskFile) -> list[str] | None:
    """The metrics that a task's file lists, as its results name them: a filter that has a name stands behind the metric's, after a comma.
    None where functions of its file decide them."""
    from lm_eval.api.registry import DEFAULT_METRIC_REGISTRY

    with refused(file.where):
        listed = file.config.get("metric_list")
        names = DEFAULT_METRIC_REGISTRY.get(file.config.get("output_type", "generate_until"), []) if listed is None else [
            entry["metric"] for entry in listed]
        if file.config.get("process_results") is not None or not all(isinstance(name, str) for name in names):
            return None
        filters = [one["name"] for one in file.config.get("filter_list") or [{"name": "none"}]]
        return [named(name, chosen) for name in names for chosen in filters]


def named(metric: str, chosen: str) -> str:
    """A metric by the filter that chose the answers."""
    return metric if chosen == "none" else f"{metric},{chosen}"


LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""The names that the harness has for the tokens of an answer, the first that is there counts."""


def max_tokens(options: Mapping[str, Any]) -> int:
    """Tokens of an answer by the `generation_kwargs` of a task."""
    from lm_eval.defaults import DEFAULT_MAX_GEN_TOKS

    return int(next((options[name] for name in LIMITS if options.get(name) is not None), DEFAULT_MAX_GEN_TOKS))


def check_answers(files: list[TaskFile], context: int | None, tokenizer: Path | None, chat: bool) -> None:
    """Raises InputError for a task whose answers leave no room for a question, or that no token of a folder's tokenizer can end, and for a
    tokenizer without a template where one is asked for."""
    if files and tokenizer:
        from transformers import AutoTokenizer

        found = AutoTokenizer.from_pretrained(tokenizer, local_files_only=True)
        if found.eos_token_id is None:
            raise InputError("the tokenizer has no token that ends a text", where=f"tasks: {tokenizer}",
                             remedy="name it in tokenizer_config.json: eos_token")
        if chat and not found.chat_template:
            raise InputError("the tokenizer has no chat template", where=f"chat: {tokenizer}",
                             remedy="leave chat out, or name a template in tokenizer_config.json: chat_template")
    for file in files:
        limit = max_tokens(file.config.get("generation_kwargs") or {})
        if file.config.get("output_type", "generate_until") == "generate_until" and context is not None and limit >= context:
            raise InputError(f"an answer of {limit} tokens leaves no room for a question in the {context} of the model's context",
                             where=file.where, remedy="set generation_kwargs: {max_gen_toks: ...} lower")


def local_data(config: dict[str, Any], folder: Path, where: str) -> list[Path]:
    """The data files of a task, put into `config` by their whole paths: they are looked for beside the task's file, then in the working
    directory. Raises InputError for data that are not there."""
    if callable(config.get("custom_dataset")):
        return []
    source = config.get("dataset_path")
    remedy = "write `dataset_path: json` and `dataset_kwargs: {data_files: {test: FILE}}`; nothing is downloaded"
    options = dict(config.get("dataset_kwargs") or {})
    bases, files = (folder, Path.cwd()), options.get("data_files")
    if source not in FORMATS:
        place = next((place for base in bases if source and (place := base / str(source)).is_dir()), None)
        if place is None or (place / "dataset_info.json").exists():
            raise InputError(f"its data set {source} is not local" if place is None else f"{place} is a data set of save_to_disk",
                             where=f"{where}: dataset_path", remedy=remedy)
        check_folder(place, f"{where}: dataset_path")
        config["dataset_path"], bases = str(place), (place, place)
    elif not files:
        raise InputError("it names no files", where=f"{where}: dataset_kwargs.data_files", remedy=remedy)
    found: list[Path] = []

    def whole(value: Any) -> Any:
        if isinstance(value, dict):
            return {split: whole(one) for split, one in value.items()}
        if isinstance(value, list):
            return [path for one in value for path in whole(one)]
        pattern = Path(str(value)).expanduser()
        for base in () if "://" in str(value) else bases:
            plain, matching = base / pattern, Path(escape(str(base))) / pattern
            if files := [str(plain)] if plain.is_file() else sorted(glob(str(matching), recursive=True)):
                found.extend(Path(file).absolute() for file in files)
                return [escape(file) for file in files]
        raise InputError(f"there is no local file {value}", where=f"{where}: dataset_kwargs.data_files",
                         remedy=f"it is looked for in {' and in '.join(dict.fromkeys(map(str, bases)))}")

    if files:
        config["dataset_kwargs"] = {**options, "data_files": whole(files)}
    return found if source in FORMATS else sorted(file for file in bases[0].rglob("*") if file.is_file())


def check_folder(place: Path, where: str) -> None:
    """Raises InputError for a data set's folder that names what is not local, or whose own name would be taken for a pattern."""
    from huggingface_hub import DatasetCard
    from ruamel.yaml import YAML

    if escape(str(place)) != str(place):
        raise InputError(f"{place} would be taken for a pattern", where=where, remedy="rename it: no *, ? or [")
    card, alone = place / "README.md", place / ".huggingface.yaml"
    told = [DatasetCard.load(card).data.to_dict()] if card.is_file() else []
    told += [YAML(typ="safe").load(alone.read_text("utf-8")) or {}] if alone.is_file() else []
    if any("://" in str(one.get("configs")) for one in told):
        raise InputError(f"{place} names data that are not local", where=where,
                         remedy="take the addresses out of `configs` of its README.md")


def functions(value: Any) -> Iterator[Any]:
    """The functions that a configuration names."""
    for one in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        if inspect.isfunction(one) or inspect.isclass(one):
            yield one
        yield from functions(one)


def included(path: Path) -> list[Path]:
    """A task's file and those that it includes."""
    from lm_eval.tasks._yaml_loader import load_yaml

    more = load_yaml(path, resolve_func=False, recursive=False).get("include") or []
    return [path, *(file for one in (more if isinstance(more, list) else [more]) for file in included((path.parent / one).resolve()))]


@contextlib.contextmanager
def loaded(files: list[TaskFile], shots: int | None, limit: int | None, chat: bool = False) -> Iterator[dict[str, Any]]:
    """The harness's task of each file by its name, with the questions of its first `limit` documents, unless they are a `chat` and
    `make_questions` makes them, for the block: data sets are kept in a folder that goes with it. Raises InputError."""
    if not files:
        yield {}
        return
    from datasets import disable_progress_bars
    from lm_eval.api import task as harness
    from lm_eval.defaults import DEFAULT_RANDOM_SEED

    disable_progress_bars()
    harness.tqdm = lambda documents, **_: documents
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(FEWSHOT_SEED)
    with tempfile.TemporaryDirectory(prefix="distlm-tasks-") as cache:
        tasks: dict[str, Any] = {}
        for file in files:
            with refused(file.where):
                task = harness.ConfigurableTask(config={**file.config, "dataset_kwargs": {**(file.config.get("dataset_kwargs") or {}), **(
                    {} if "custom_dataset" in file.config else {"cache_dir": cache})}})
                task.set_config(key="num_fewshot", value=task.config.num_fewshot or 0 if shots is None else shots)
                task.set_fewshot_seed(seed=FEWSHOT_SEED)
            tasks[file.config["task"]] = task
            if not chat:
                make_questions(file, task, limit)
        yield tasks


def make_questions(file: TaskFile, task: Any, limit: int | None, template: Callable[..., str] | None = None) -> None:
    """Give the harness's task of a file the questions of its first `limit` documents, by a chat template where there is one: examples are
    turns before the question, as is the harness's default. Raises InputError."""
    chat = {"apply_chat_template": True, "fewshot_as_multiturn": True, "chat_template": template} if template else {}
    with refused(file.where):
        task.build_all_requests(limit=limit, **chat)
        task.build_all_requests = lambda **_: None         # the harness would draw other examples when it makes them again
