"""What the steps of a pipeline come to: the names that `${step.output}` may have.

    output(steps, "train.val_loss", where)                 # ("train", "val_loss"), or a SpecError with the nearest name
"""

from collections.abc import Mapping
from typing import Any

from distlm.errors import DistlmError, SpecError
from distlm.spec import TrainSpec
from distlm.spec.load import REFERENCE, nearest
from distlm.train.objectives import OBJECTIVES
from distlm.train.scores import LABELS, LANGUAGE

BOTH = tuple(dict.fromkeys((*LANGUAGE, *LABELS)))
OUTPUTS = {
    "prepare": ("documents", "bytes", "tokens", "train_tokens", "val_tokens", "val_bytes", "rejected", "manifest_hash"),
    "train": ("export", "parameters", "loss_first", "loss_last", "val_loss_first", "tokens_per_s", "steps", "tokens", "checkpoint"),
    "tune": ("best", "best_spec", "metric", "value", "trials"),
    "average": ("export", *BOTH, "averaged", "best", "best_loss"),
    "evaluate": BOTH,
    "compress": ("export", "loss", "loss_before", "bytes", "bytes_before"),
    "serve": ("url", "api_key_file", "model"),
}
"""Kind -> what `${step.output}` may name; a sweep also has `best.<key>` for every key of its space, a run what its objective measures, and
an evaluation what `task_outputs` names."""
TEXTS = ("", "manifest_hash", "export", "checkpoint", "best", "best_spec", "metric", "url", "api_key_file", "model")
"""The outputs that are text; "" is the step itself, a folder. All others are numbers, but for `best.<key>`, which is what its key takes."""
MEASURED = ("tasks", "groups")
"""What of an evaluation's outputs has metrics by names of its own."""
STDERR = "_stderr"
"""Behind the name of a task's metric, its standard error."""


def output(steps: Mapping[str, Any], reference: str, where: str) -> tuple[str, str]:
    """(step, output) of a reference. Raises SpecError, with the nearest name, for what is not there."""
    step, name = split(steps, reference)
    if not step:
        near = nearest(reference.split(".")[0], steps)
        raise SpecError(f"${{{reference}}}: there is no such step", where=where,
                        remedy=f"did you mean {near}?" if near else f"there are {', '.join(steps)}")
    kind = str(steps[step].get("kind"))
    if kind == "evaluate" and name.split(".")[0] in MEASURED:
        check_metric(steps[step], step, name, where)
        return step, name
    if kind == "tune" and name.startswith("best.") and not space_of(steps[step]):
        return step, name                                  # the sweep has no space: told there
    if name and kind in OUTPUTS and name not in (known := known_outputs(steps, step)):
        near, of = nearest(name, known), " without a corpus" * (kind == "evaluate" and not steps[step].get("corpus"))
        raise SpecError(f"${{{reference}}}: {with_article(kind)} step{of} has no output {name}", where=where,
                        remedy=f"did you mean {near}?" if near else f"there are {', '.join(known)}")
    return step, name


def known_outputs(steps: Mapping[str, Any], step: str) -> list[str]:
    """What a step comes to, as far as its model is known."""
    data, kind, objective = steps[step], str(steps[step].get("kind")), objective_of(steps, step)
    if kind == "train":
        of = [OBJECTIVES[objective]] if objective else [*OBJECTIVES.values()]
        names = dict.fromkeys(name for one in of for name, metric in one.METRICS.items() if metric.evaluated)
        return [*OUTPUTS[kind], *(name for name in ("perplexity", "bits_per_byte") if f"val_{name}" in names), *names]
    if kind == "evaluate" and not data.get("corpus"):
        return ["tasks.TASK.METRIC"]
    if kind in ("average", "evaluate") and objective:
        return [*(LABELS if objective == "classify" else LANGUAGE), *(name for name in OUTPUTS[kind] if name not in BOTH)]
    return [*OUTPUTS[kind], *(f"best.{key}" for key in space_of(data))]


def check_metric(evaluation: Mapping[str, Any], step: str, name: str, where: str) -> None:
    """Raises SpecError where the tasks of an evaluation, or their groups, list no metric of this `name`. Where they cannot be read here,
    which those of a job that is submitted need not, that is told where they are."""
    from distlm.evaluate.groups import average_names, groups_of, read_tasks
    from distlm.evaluate.tasks import metric_names

    given = evaluation.get("tasks") or []
    if not isinstance(given, list) or not all(isinstance(path, str) and "${" not in path for path in given):
        return                                             # told where they are read
    try:
        files = read_tasks(given)
    except DistlmError:
        return
    metrics = {f"tasks.{file.config['task']}": metric_names(file) for file in files}
    metrics |= {f"groups.{group.name}": average_names(group, its) for group, its in groups_of(files).items()}
    if meant := max((one for one in metrics if name.startswith(f"{one}.")), key=len, default=""):
        metrics = {meant: metrics[meant]}
        if metrics[meant] is None:
            return                                         # functions of the file decide
    known = [f"{one}.{metric}{more}" for one, found in metrics.items() for metric in (["METRIC"] if found is None else found)
             for more in ("", STDERR)]
    if name not in known:
        near = "" if meant else nearest(name, known)
        raise SpecError(f"${{{step}.{name}}}: the tasks of {step} do not come to it", where=where,
                        remedy=f"did you mean {near}?" if near else f"there are {', '.join(known)}" if known else
                        f"{meant} has no metrics" + ": its file has no aggregate_metric_list" * meant.startswith("groups.") if meant else
                        "it has no tasks")


def objective_of(steps: Mapping[str, Any], step: str) -> str:
    """What the model was trained for that a step makes, serves or measures; "" where that is not known here."""
    for _ in steps:                                        # further than through all of them no reference leads
        data = steps[step]
        kind = data.get("kind")
        data = data.get("train") if kind == "tune" else data
        if kind in ("train", "tune"):
            objective = data.get("objective", TrainSpec.model_fields["objective"].default) if isinstance(data, dict) else ""
            return objective if isinstance(objective, str) and objective in OBJECTIVES else ""
        given = data.get("model") or data.get("endpoint") if kind in ("evaluate", "serve") else None
        if kind == "average" and isinstance(data.get("models"), list):                     # none leads back here
            rest = {name: one for name, one in steps.items() if name != step}
            made = [split(rest, whole[1])[0] for one in data["models"] if isinstance(one, str) and (whole := REFERENCE.fullmatch(one))]
            return next((found for one in made if one and (found := objective_of(rest, one))), "")
        whole = REFERENCE.fullmatch(given) if isinstance(given, str) else None
        step = split(steps, whole[1])[0] if whole else ""
        if not step:
            return "pretrain" if kind == "compress" else ""
    return ""


def task_outputs(made: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics of an evaluation's tasks and groups by the names that references have for them, `tasks.<task>.<metric>` and
    `groups.<group>.<metric>`, and their standard errors; empty for what another kind of step made."""
    return {f"{what}.{name}.{metric}{more}": one[key] for what in MEASURED for name, found in made.get(what, {}).items()
            for metric, one in found["metrics"].items() for more, key in (("", "value"), (STDERR, "stderr"))}


def space_of(step: Mapping[str, Any]) -> dict[str, Any]:
    """The space of a sweep; empty for another kind of step, and where what is written is none, which `check_step` refuses."""
    space = step.get("space") if step.get("kind") == "tune" else None
    return space if isinstance(space, dict) else {}


def split(steps: Mapping[str, Any], reference: str) -> tuple[str, str]:
    """`train.val_loss` -> ("train", "val_loss"); names of steps may hold dots, so the longest that fits is meant."""
    found = max((step for step in steps if reference == step or reference.startswith(f"{step}.")), key=len, default="")
    return found, reference[len(found) + 1:] if found else ""


def with_article(kind: str) -> str:
    """A kind as it stands in a sentence: `an evaluate`."""
    return f"an {kind}" if kind[:1] in "aeiou" else f"a {kind}"
