"""`report.html`: an evaluation on one page that needs no network and no script.

    write_report(folder, outputs)                          # the path of the page
"""

from pathlib import Path
from typing import Any

from distlm.runs import RunFolder
from distlm.runs.page import write_page
from distlm.runs.report import confused, matrices

SIDE = 320
"""Of the reliability diagram, in its own units."""
COLUMNS = (("tokens", "tokens", ",d"), ("loss", "loss", ".4f"), ("perplexity", "perplexity", ",.2f"),
           ("bits per byte", "bits_per_byte", ".4f"), ("accuracy", "accuracy", ".2%"), ("calibration error", "ece", ".2%"))
"""(title, measure, format)"""
LABEL_COLUMNS = (("documents", "documents", ",d"), ("loss", "loss", ".4f"), ("accuracy", "accuracy", ".2%"),
                 *((f"{how} {what}", f"{key}_{how}", ".4f") for how in ("macro", "micro")
                   for what, key in (("precision", "precision"), ("recall", "recall"), ("F1", "f1"))),
                 ("ROC AUC", "roc_auc", ".4f"), ("calibration error", "ece", ".2%"))
"""The same of a classifier."""


def write_report(folder: RunFolder, outputs: dict[str, Any]) -> Path:
    """Write the page into the folder of an evaluation with these outputs. Raises StorageError."""
    tasks, groups = task_rows(outputs), group_rows(outputs)
    if "corpora" not in outputs:
        return write_page(folder, "distlm.evaluate", outputs=outputs, tasks=tasks, groups=groups)
    unit, guessed, columns = ("documents", "label", LABEL_COLUMNS) if "labels" in outputs else ("tokens", "token", COLUMNS)
    return write_page(
        folder, "distlm.evaluate", outputs=outputs, tasks=tasks, groups=groups, unit=unit, guessed=guessed,
        facts=[(title, text) for (title, _, _), text in zip(columns, cells(outputs, columns), strict=True)],
        titles=[title for title, _, _ in columns], rows=[(what, cells(measured, columns)) for what, measured in measured_parts(outputs)],
        matrices=matrices([outputs]), confused=confused([outputs]), side=SIDE,
        diagrams=[(what, shown(measured["ece"], ".2%"), bars(measured["reliability"], unit)) for what, measured in measured_parts(outputs)
                  if measured["reliability"]],
        bins=[(f"{one['above']:.3f} to {one['up_to']:.3f}", f"{one[unit]:,}", shown(one["confidence"], ".2%"),
               shown(one["accuracy"], ".2%")) for one in outputs["reliability"]])


def task_rows(outputs: dict[str, Any]) -> list[tuple[str, ...]]:
    """(task, version, examples before a question, documents, metric, value, standard error, which is better, file, its hash) of each metric
    of each task."""
    return [(name, str(task["version"]), str(task["shots"]), f"{task['documents']:,}", *metric_cells(metric, one), task["file"],
             task["hash"])
            for name, task in outputs.get("tasks", {}).items() for metric, one in task["metrics"].items()]


def group_rows(outputs: dict[str, Any]) -> list[tuple[str, ...]]:
    """(group, version, documents, metric, value, standard error, which is better, by what tasks count, the tasks that have it, file, its
    hash) of each metric of each group."""
    return [(name, str(group["version"]), f"{group['documents']:,}", *metric_cells(metric, one),
             "documents" if one["weight_by_size"] else "all alike",
             ", ".join(one["tasks"]) + f" ({len(one['tasks'])} of {len(group['tasks'])})", group["file"], group["hash"])
            for name, group in outputs.get("groups", {}).items() for metric, one in group["metrics"].items()]


def metric_cells(metric: str, one: dict[str, Any]) -> tuple[str, ...]:
    """(metric, value, standard error, which is better)"""
    return (metric, shown(one["value"], ".4f"), shown(one["stderr"], ".4f"),
            "–" if one["higher_is_better"] is None else "more" if one["higher_is_better"] else "less")


def measured_parts(outputs: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """(what, its measures) of everything, and of corpora and sources where there are several."""
    found, corpora = [("all", outputs)], outputs["corpora"]
    for name, corpus in corpora.items():
        found += [(name, corpus)] if len(corpora) > 1 else []
        found += [(f"{name}: {source}", measured) for source, measured in corpus["sources"].items() if len(corpus["sources"]) > 1]
    return found


def cells(measured: dict[str, Any], columns: tuple[tuple[str, str, str], ...] = COLUMNS) -> list[str]:
    """The measures as text, by columns."""
    return [shown(measured[key], form) for _, key, form in columns]


def shown(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def bars(table: list[dict[str, Any]], unit: str) -> list[tuple[str, str, str, str, str, str]]:
    """(x, y, width, height, opacity, text) of a bar for each bin of a reliability diagram that has any of the unit: its height is the
    accuracy, and the more there are, the darker it is."""
    most, width = max(one[unit] for one in table), SIDE / len(table)
    return [(f"{i * width:.1f}", f"{SIDE * (1 - one['accuracy']):.1f}", f"{width:.1f}", f"{SIDE * one['accuracy']:.1f}",
             f"{0.25 + 0.75 * (one[unit] / most) ** 0.5:.2f}",
             f"{one[unit]:,} {unit}, confidence {one['confidence']:.1%}, accuracy {one['accuracy']:.1%}")
            for i, one in enumerate(table) if one[unit]]
