"""The lm-evaluation-harness over a model or an endpoint: it makes the questions and counts, and what answers is ours.

    with loaded(files, spec.shots, spec.limit) as tasks:
        check_choices(files, tasks, tokenizer_folder, context)
        run_tasks(files, tasks, spec, tokenizer_folder, answering, folder, progress, keep)     # keep(measured) after each task
    measured["tasks"]["arc"]["metrics"]["acc"]["value"]

Whoever answers is asked for tokens, so that a checkpoint and its endpoint are asked for the same. Texts become tokens, and a text that is
too long loses its beginning, as in the harness's own `HFLM`.
"""

import json
import math
import os
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol, TypeVar
from urllib.parse import quote

import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.defaults import DEFAULT_MAX_LENGTH
from lm_eval.evaluator import evaluate
from lm_eval.utils import get_rolling_token_windows, handle_non_serializable, make_disjoint_window
from transformers import AutoTokenizer

from distlm.corpus.manifest import file_xxh3
from distlm.errors import EvaluationError, InputError
from distlm.evaluate.groups import averages
from distlm.evaluate.tasks import FEWSHOT_SEED, TaskFile, make_questions, max_tokens, named, refused
from distlm.evaluate.worker import Asked, Said
from distlm.progress import Progress
from distlm.runs import RunFolder
from distlm.spec import EvaluateSpec
from distlm.storage import write_atomic

BOOTSTRAP = 1000
"""Draws for the standard error of a metric that is no mean, from seeds of the harness's own."""
ANSWERS = "answers"
"""In an evaluation's folder: what was answered to each document, a file a task."""
T = TypeVar("T")
R = TypeVar("R")


class Answering(Protocol):
    """Who answers: workers with a model, or an endpoint. Batches are answered in any order, and given back in theirs."""

    @property
    def context(self) -> int | None:
        """Tokens that it takes; None where it does not say."""

    def continuations(self, batches: list[list[Asked]], done: Callable[[int], None]) -> list[list[Said]]:
        """What it says of each text; `done` is told the number of each batch."""

    def generations(self, batches: list[list[list[int]]], max_tokens: int, stops: list[str],
                    done: Callable[[int], None]) -> list[list[list[int]]]:
        """The tokens that it adds to each prompt, the likeliest each time, until its end or any of `stops`, or longer."""


class Model(TemplateLM):  # type: ignore[misc, unused-ignore]
    """What the harness asks, in batches of texts of like length. Without who answers, texts become tokens and no more."""

    def __init__(self, tokenizer: Path, context: int | None, answering: Answering | None = None, batch: int = 1,
                 progress: Progress | None = None) -> None:
        super().__init__()
        self.tokenizer: Any = AutoTokenizer.from_pretrained(tokenizer, local_files_only=True)
        self.answering, self.batch, self.progress = answering, batch, progress
        self.max_length = context or DEFAULT_MAX_LENGTH
        self.truncated = 0
        """Texts that have lost their beginning."""
        self.task, self.where = "", "tasks"
        """The task that is asked of, and its file for errors."""

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that nothing stands before."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self.tokenizer.decode(self.prefix_token_id))
        return list(self.tokenizer.encode(string, add_special_tokens=add_special_tokens))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as text, up to where the model is to go on: behind what begins its turn, or what it has begun to say."""
        return str(self.tokenizer.apply_chat_template(chat_history, tokenize=False, add_generation_prompt=add_generation_prompt,
                                                      continue_final_message=not add_generation_prompt))

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[Said]:
        return list(super().loglikelihood(requests, disable_tqdm=True))

    def length_of(self, before: str, after: str) -> int:
        """Tokens of an answer that is scored behind a text, as `loglikelihood` has them: behind none its first may be what is given."""
        if before:
            return len(self._encode_pair(before, after)[1])
        tokens = self.tok_encode(after, add_special_tokens=False)
        return len(tokens) - (tokens[:1] == [self.prefix_token_id])

    def _loglikelihood_tokens(self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any) -> list[Said]:
        asked: list[Asked] = []
        for _name, before, after in requests:
            if not after or len(after) > self.max_length:
                raise EvaluationError(f"an answer has {len(after)} tokens, and the model takes 1 to {self.max_length}", cause="bad_input",
                                      where=self.where, remedy="change the task's choices")
            tokens = (before + after)[-(self.max_length + 1):]
            self.truncated += len(before) + len(after) > len(tokens)
            asked.append((tokens, len(tokens) - len(after)))
        assert self.answering
        return self.by_length(asked, lambda one: len(one[0]), self.answering.continuations, "texts")

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        windows = [[make_disjoint_window(window) for window in get_rolling_token_windows(
            token_list=self.tok_encode(request.args[0]), prefix_token=self.prefix_token_id, max_seq_len=self.max_length, context_len=1)]
            for request in requests]
        said = iter(self._loglikelihood_tokens([(None, *window) for each in windows for window in each]))
        return [sum(next(said)[0] for _ in each) for each in windows]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        answering = self.answering
        assert answering
        kinds: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            kinds.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(i)
        texts: dict[int, str] = {}
        for options, places in kinds.items():
            limit, stops = max_tokens(json.loads(options)), self.stops(json.loads(options))
            prompts: list[list[int]] = []
            for i in places:
                tokens = self.tok_encode(requests[i].args[0]) or [self.prefix_token_id]
                prompts.append(tokens[-(self.max_length - limit):])
                self.truncated += len(prompts[-1]) < len(tokens)

            def ask(batches: list[list[list[int]]], done: Callable[[int], None], limit: int = limit,
                    stops: list[str] = stops) -> list[list[list[int]]]:
                return answering.generations(batches, limit, stops, done)

            for i, made in zip(places, self.by_length(prompts, len, ask, "answers"), strict=True):
                texts[i] = self.text(made, stops)
        return [texts[i] for i in range(len(requests))]

    def stops(self, options: dict[str, Any]) -> list[str]:
        """The texts before which an answer ends, among them that of the token which ends a text."""
        until = options.get("until") or []
        return [text for text in [*([until] if isinstance(until, str) else until), self.tokenizer.decode(self.eot_token_id)] if text]

    def text(self, tokens: list[int], stops: list[str]) -> str:
        """The text of an answer, up to the first of `stops`, which may be the text of a special token."""
        if any(stop in self.tokenizer.decode(tokens) for stop in stops):
            whole = next(n for n in range(len(tokens) + 1) if any(stop in self.tokenizer.decode(tokens[:n]) for stop in stops))
            tokens = tokens[:whole]
        text = str(self.tokenizer.decode(tokens, skip_special_tokens=True))
        for stop in stops:
            text = text.split(stop)[0]
        return text

    def by_length(self, asked: list[T], length: Callable[[T], int],
                  ask: Callable[[list[list[T]], Callable[[int], None]], list[list[R]]], what: str) -> list[R]:
        """What is answered to each, the longest first, so that a batch has little to fill up."""
        order = sorted(range(len(asked)), key=lambda i: -length(asked[i]))
        places = [order[i:i + self.batch] for i in range(0, len(order), self.batch)]
        count = 0

        def done(batch: int) -> None:
            nonlocal count
            assert self.progress
            count += len(places[batch])
            self.progress.update(f"{self.task} {what}".lstrip(), count, len(asked))

        found = ask([[asked[i] for i in batch] for batch in places], done)
        by_place = {i: one for batch, some in zip(places, found, strict=True) for i, one in zip(batch, some, strict=True)}
        return [by_place[i] for i in range(len(asked))]


def ask_in_chat(files: list[TaskFile], tasks: dict[str, Any], limit: int | None, tokenizer: Path) -> None:
    """Make the questions of tasks conversations by the template of a tokenizer. Raises InputError."""
    model = Model(tokenizer, None)
    for file in files:
        make_questions(file, tasks[file.config["task"]], limit, model.apply_chat_template)


def check_choices(files: list[TaskFile], tasks: dict[str, Any], tokenizer: Path, context: int | None) -> None:
    """Raises InputError for a choice of a task, or another answer that is scored, that has no token or more than a model of this `context`
    takes, before anybody is asked. One that tokens before it swallow is told when it is asked."""
    model = Model(tokenizer, context)
    for file in files:
        name = file.config["task"]
        with refused(file.where):
            for one in tasks[name].instances:
                if one.request_type != "loglikelihood":
                    continue
                before, after = one.args
                if after and 4 * len(after.encode()) < model.max_length:           # no token is less than a quarter of a byte
                    continue
                if not 0 < (length := model.length_of(before, after)) <= model.max_length:
                    raise InputError(f"document {one.doc_id} of the task {name} has an answer of {length:,} tokens, and the model takes "
                                     f"1 to {model.max_length:,}", where=file.where, remedy="change the task's choices")


def run_tasks(files: list[TaskFile], tasks: dict[str, Any], spec: EvaluateSpec, tokenizer: Path, answering: Answering,
              folder: RunFolder, progress: Progress, keep: Callable[[dict[str, Any]], None]) -> None:
    """Ask of one task after the other. `keep` is given after each `tasks`, the metrics of those that have been asked, `groups`, those of
    the groups that are complete, and `harness`, what else decides them; answers/ in the folder has a line for each document and filter.
    Raises InputError, and what `answering` raises."""
    model = Model(tokenizer, answering.context, answering, spec.batch_windows, progress)
    os.environ["DISABLE_MULTIPROC"] = "1"                  # the harness would fork this process, which Ray's threads are in
    made: dict[str, Any] = {}
    for file in files:
        name = model.task = file.config["task"]
        model.where = file.where
        with refused(file.where):
            found: Any = evaluate(lm=model, task_dict={"tasks": {name: tasks[name]}}, limit=spec.limit, bootstrap_iters=BOOTSTRAP)
        answers = answers_file(folder, name)
        lines = "".join(json.dumps(one, default=handle_non_serializable, ensure_ascii=False) + "\n" for one in found["samples"][name])
        write_atomic(answers, lines.encode("utf-8", "replace"))
        made[name] = {
            "file": str(file.path), "hash": file_xxh3(file.path), "version": found["versions"].get(name), "shots": found["n-shot"][name],
            "documents": found["n-samples"][name]["effective"], "answers": str(answers.relative_to(folder.path)),
            "metrics": metrics(found["results"][name], found["higher_is_better"].get(name) or {})}
        groups = averages(files, made)
        keep({"tasks": made, **({"groups": groups} if groups else {}), "harness": {
            "version": version("lm_eval"), "context": model.max_length, "truncated": model.truncated, "fewshot_seed": FEWSHOT_SEED,
            "bootstrap": BOOTSTRAP, "chat": spec.chat}})
    if model.truncated:
        progress.note(told := f"{model.truncated:,} texts of tasks are longer than the context of {model.max_length:,} tokens, and lost "
                      "their beginning")
        folder.event("note", message=told)


def answers_file(folder: RunFolder, task: str) -> Path:
    place = folder.path / ANSWERS
    place.mkdir(exist_ok=True)
    return place / f"{quote(task, safe='')}.jsonl"


def metrics(found: dict[str, Any], higher: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Metric -> value, standard error and whether more is better. A filter that has a name stands behind the metric's, after a comma."""
    made = {}
    for key, value in found.items():
        name, comma, chosen = key.partition(",")
        if comma and not name.endswith("_stderr"):
            made[named(name, chosen)] = {"value": number(value), "stderr": number(found.get(f"{name}_stderr,{chosen}")),
                                         "higher_is_better": higher.get(name)}
    return made


def number(value: Any) -> float | None:
    """A number for JSON; None is one that there is not."""
    return float(value) if isinstance(value, int | float | np.number) and math.isfinite(value) else None
