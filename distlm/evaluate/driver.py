"""The evaluate job: workers that score batches of windows, or an endpoint that does, and what comes of it.

A batch has the same windows whoever takes it, and sums of batches are added in their order: the result is the same with any number of
workers.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from distlm.autoscale import evaluate_bundles, require
from distlm.corpus.manifest import read_manifest
from distlm.errors import EvaluationError, InputError, TrainError
from distlm.evaluate.groups import read_tasks
from distlm.evaluate.kinds import kind_of
from distlm.evaluate.report import write_report
from distlm.evaluate.task import Task, context_of, make_task
from distlm.evaluate.tasks import check_answers, loaded
from distlm.evaluate.worker import Asked, Said, Worker, default_threads
from distlm.model.complete import check_prompts, encode_prompts, unheeded
from distlm.model.find import find_model
from distlm.progress import Progress
from distlm.runs import RunFolder
from distlm.spec import EvaluateSpec
from distlm.storage import Storage

AHEAD = 2
"""Batches that a worker has been given and has not answered."""
Check = Callable[[int | None, Path | None], None]
"""Takes the context of what is asked and the folder of its tokenizer; raises InputError where the tasks are not for it."""
Scored = Callable[[Any, Task, str, Path | None, list[Any], list[str]], None]
"""Takes an evaluate.harness.Answering, its task, what it is, the folder of its tokenizer, the sums of every batch, or what a classifier
made of it, in order, and what it added to each prompt; asks it of the tasks."""


def evaluate(spec: EvaluateSpec, folder: RunFolder, storage: Storage, progress: Progress) -> dict[str, Any]:
    """Measure a model or an endpoint on corpora and in tasks; write report.html. What is measured is kept at once, also where a task fails
    after it. Ray is initialised. Raises SpecError, InputError, ClusterError, CorpusError, EvaluationError, ServeError."""
    task, files = make_task(spec, storage), read_tasks(spec.tasks)
    for part in task.parts:
        if not part.by_source:
            progress.note(f"{part.name} does not tell the sources of its documents: it is measured as a whole")
    prompts = encode_prompts(read_manifest(task.parts[0].corpus).tokenizer, spec.prompts) if spec.prompts else []
    folder.event("running", message=", ".join([f"{task.windows:,} windows"] * bool(task.parts) + [f"{len(files):,} tasks"] * bool(files)))
    outputs: dict[str, Any] = {"": str(folder.path)}

    def keep(found: dict[str, Any]) -> None:
        outputs.update(found)
        folder.result(outputs)
        write_report(folder, outputs)

    with loaded(files, spec.shots, spec.limit, spec.chat) as tasks:
        def check(context: int | None, tokenizer: Path | None) -> None:
            check_answers(files, context, tokenizer, spec.chat)
            if files and tokenizer:
                from distlm.evaluate.harness import ask_in_chat, check_choices

                if spec.chat:
                    ask_in_chat(files, tasks, spec.limit, tokenizer)
                check_choices(files, tasks, tokenizer, context)

        def scored(answering: Any, task: Task, made_by: str, tokenizer: Path | None, batches: list[Any], texts: list[str]) -> None:
            measured = kind_of(task).outcome
            for part in task.parts:
                if not task.labels and read_manifest(part.corpus).labels:
                    progress.note(f"{part.name} has labels, and what is measured is no classifier: its texts are, and not its labels")
            found = {"evaluated": made_by, **(measured(task, made_by, batches) if task.parts else {}),
                     "samples": [{"prompt": prompt, "completion": text} for prompt, text in zip(spec.prompts, texts, strict=True)]}
            if found.get("tokens") == 0:
                raise InputError(f"no token of the {task.windows:,} windows gives loss", where="windows",
                                 remedy="take more windows, or other corpora")
            keep(found)
            if files and tokenizer:
                from distlm.evaluate.harness import run_tasks

                run_tasks(files, tasks, spec, tokenizer, answering, folder, progress, keep)

        if spec.model is not None:
            by_model(spec, task, check, find_model(spec.model, storage), prompts, scored, folder, progress)
        else:
            from distlm.evaluate.endpoint import by_endpoint

            by_endpoint(spec, task, check, prompts, scored, storage, folder, progress)
    return outputs


def by_model(spec: EvaluateSpec, task: Task, check: Check, model: Path, prompts: list[list[int]], scored: Scored,
             folder: RunFolder, progress: Progress) -> None:
    """Let workers score the batches. Raises ClusterError where the cluster does not hold them, and what a worker raises."""
    context = context_of(model)
    check_prompts(prompts, spec.max_tokens, context)
    check(context, model)
    if prompts or spec.tasks:
        for name, value in unheeded(model).items():
            progress.note(f"generation_config.json: {name}: {value} is not applied: the likeliest token is taken")
    with Workers(spec, task, folder, progress) as workers:
        scored(workers, task, str(model), model, workers.score(model), workers.complete(prompts, spec.max_tokens))


class Workers:
    """Processes that score the batches of a task by one model after the other, until the block ends."""

    def __init__(self, spec: EvaluateSpec, task: Task, folder: RunFolder, progress: Progress) -> None:
        """Raises ClusterError where the cluster does not hold them."""
        import ray

        require(evaluate_bundles(spec), f"{spec.workers} worker{'s' * (spec.workers > 1)}", progress, where="workers",
                remedy="lower workers or cpus_per_worker, or take a larger cluster")
        on_gpu = bool(spec.gpus_per_worker)
        dtype = spec.dtype if spec.dtype != "auto" else "bf16" if on_gpu else "fp32"
        environment = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        actor = ray.remote(num_cpus=spec.cpus_per_worker, num_gpus=spec.gpus_per_worker, runtime_env={"env_vars": environment})(Worker)
        self._ray, self._task, self._progress = ray, task, progress
        self._logs = [folder.path / "logs" / f"worker-{i}.log" for i in range(spec.workers)]
        threads = spec.threads_per_worker or default_threads(spec.workers)
        self._workers: list[Any] = [actor.remote(task, "cuda" if on_gpu else "cpu", dtype, threads, log) for log in self._logs]
        self.context: int | None = None
        """Of the model that was scored last."""
        progress.note(f"{task.windows:,} windows in {len(task.batches):,} batches, " * bool(task.parts)
                      + f"{spec.workers} worker{'s' * (spec.workers > 1)}, {dtype}")

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            self._ray.kill(worker)

    def score(self, model: Path) -> list[Any]:
        """The sums of every batch, or what a classifier makes of it, in order. Raises what a worker raises."""
        answers(self._ray, {worker.load.remote(model): i for i, worker in enumerate(self._workers)}, self._logs, lambda i, _: None)
        self.context, batches, done = context_of(model), self._task.batches, 0

        def show(batch: int) -> None:
            nonlocal done
            done += batches[batch][2]
            self._progress.update("windows", done, self._task.windows)

        return self._dealt(kind_of(self._task).measure, [(batch,) for batch in range(len(batches))], show)

    def complete(self, prompts: list[list[int]], max_tokens: int) -> list[str]:
        """What the model that was scored last adds to each prompt. Raises what a worker raises."""
        texts: list[str] = []
        if prompts:
            answers(self._ray, {self._workers[0].complete.remote(prompts, max_tokens): 0}, self._logs, lambda _, made: texts.extend(made))
        return texts

    def continuations(self, batches: list[list[Asked]], done: Callable[[int], None]) -> list[list[Said]]:
        """As harness.Answering. Raises what a worker raises."""
        return self._dealt(lambda worker: worker.continuations, [(batch,) for batch in batches], done)

    def generations(self, batches: list[list[list[int]]], max_tokens: int, stops: list[str],
                    done: Callable[[int], None]) -> list[list[list[int]]]:
        """As harness.Answering. Raises what a worker raises."""
        return self._dealt(lambda worker: worker.generations, [(batch, max_tokens, stops) for batch in batches], done)

    def _dealt(self, method: Callable[[Any], Any], batches: Sequence[tuple[Any, ...]], done: Callable[[int], None]) -> list[Any]:
        """What a method of the workers answers to every batch, its arguments, in order: each worker takes every n-th batch, a few ahead."""
        waiting = [iter(range(i, len(batches), len(self._workers))) for i in range(len(self._workers))]
        found: dict[int, Any] = {}
        on_way: dict[Any, tuple[int, int]] = {}

        def give(worker: int) -> None:
            batch = next(waiting[worker], None)
            if batch is not None:
                on_way[method(self._workers[worker]).remote(*batches[batch])] = worker, batch

        for worker in [*range(len(self._workers))] * AHEAD:
            give(worker)
        while on_way:
            (reference, *_), _ = self._ray.wait([*on_way], num_returns=1)
            worker, batch = on_way.pop(reference)
            found[batch] = answer(self._ray, reference, self._logs[worker])
            done(batch)
            give(worker)
        return [found[batch] for batch in range(len(batches))]


def answers(ray: Any, references: dict[Any, int], logs: list[Path], take: Callable[[int, Any], None]) -> None:
    """Wait for what workers answer, each with its number."""
    while references:
        (reference, *_), _ = ray.wait([*references], num_returns=1)
        worker = references.pop(reference)
        take(worker, answer(ray, reference, logs[worker]))


def answer(ray: Any, reference: Any, log: Path, less: str = "lower batch_windows or workers") -> Any:
    """What a worker answers. Raises its own error, or one that says why it does not; `less` is what to do where memory is short."""
    from distlm.train.failures import diagnose

    try:
        return ray.get(reference)
    except ray.exceptions.RayError as error:
        found = diagnose(error)
        if not isinstance(found, TrainError):
            raise found from None
        remedy = less if found.cause == "oom" else f"its log is {log}"
        raise EvaluationError(found.message, cause=found.cause, remedy=remedy) from None
