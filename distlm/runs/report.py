"""`report.html`: a run on one page that needs no network and no script, out of the files of its folder alone.

    write_report(folder)                                   # the path of the page
"""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distlm.runs.folder import RunFolder
from distlm.runs.page import write_page
from distlm.runs.sides import rows

WIDTH, HEIGHT, MARGIN = 640, 200, 6
MAX_POINTS = 400
BY_SOURCE = "Validation loss by corpus and source"
CURVES = {"Loss": ("loss", "val_loss"), BY_SOURCE: (), "Perplexity": ("val_perplexity",), "Bits per byte": ("val_bits_per_byte",),
          "Next-token accuracy": ("val_accuracy",), "Calibration error": ("val_ece",), "Accuracy and macro F1": ("accuracy", "f1_macro"),
          "Reward margin": ("reward_margin", "val_reward_margin"), "Reward accuracy": ("reward_accuracy", "val_reward_accuracy"),
          "Tokens per second": ("tokens_per_s",), "Learning rate": ("lr",), "Gradient norm": ("grad_norm",),
          "Model FLOPs utilization": ("mfu",)}
"""Title -> the values of metrics.jsonl that it shows, in nats per token or document the loss. By source they are those that there are."""


@dataclass(frozen=True)
class Curve:
    """Lines over the same steps, as SVG paths in a box of WIDTH times HEIGHT."""

    title: str
    lines: tuple[tuple[str, str, str], ...]
    """(name, path, last value)"""
    low: str
    high: str
    first_step: int
    last_step: int


@dataclass(frozen=True)
class Matrix:
    """How many documents of each label (rows) were taken for each (columns)."""

    title: str
    labels: tuple[str, ...]
    rows: tuple[tuple[str, tuple[tuple[int, int], ...]], ...]
    """(label, (count, its share of the row in percent) of each column)"""


@dataclass(frozen=True)
class Confused:
    """What a classifier of too many labels for a matrix gets wrong most."""

    note: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


PARTS = {"data_s": "waiting for samples", "forward_s": "forward pass", "backward_s": "backward pass",
         "update_s": "gradients exchanged, update", "evaluate_s": "evaluation", "checkpoint_stall_s": "checkpoints, steps standing still"}
"""Seconds of a record -> what they went to; the update's are what is left of `step_s`."""
COLORS = ("#8a94a3", "#3b6fd4", "#b5472f", "#c79a2b", "#3f8f6b", "#7d5bb0")


@dataclass(frozen=True)
class Part:
    """Where a share of a run's time went."""

    name: str
    seconds: str
    """Of the whole run."""
    each: str
    """Milliseconds of one, in the middle of all."""
    share: float
    """In percent of all parts together."""


@dataclass(frozen=True)
class Sample:
    """What the model added to a prompt, by step."""

    prompt: str
    last: tuple[int, str]
    before: tuple[tuple[int, str], ...]
    """The newest first."""


def write_report(folder: RunFolder, sides: Mapping[str, Mapping[str, Any]] | None = None) -> Path:
    """Write the page into the folder of a run that has metrics. `sides`: the models that it stands beside, by their names, and itself.
    Raises StorageError."""
    records, events = folder.read_metrics(), folder.events()
    return write_page(
        folder, "distlm.runs", facts=facts(records), width=WIDTH, height=HEIGHT, sides=rows(sides) if sides else None,
        scored=max((side.get("tokens", 0) for side in (sides or {}).values()), default=0),
        curves=[one for title in CURVES if (one := curve(title, records))], matrices=matrices(records), confused=confused(records),
        parts=parts(records), colors=COLORS, samples=samples(records),
        events=[(time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(event["time"])), event["state"], event.get("cause", ""),
                 event.get("message", "")) for event in events])


def facts(records: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """What stands at the top: the last values, and the middle of all speeds."""
    last: dict[str, Any] = {}
    for record in records:
        last.update({key: value for key, value in record.items() if value is not None})
    speeds = sorted(record["tokens_per_s"] for record in records if "tokens_per_s" in record)
    saves, stalls = (sorted(record[key] for record in records if key in record) for key in ("checkpoint_s", "checkpoint_stall_s"))
    shown = [("steps", last.get("step"), ",.0f"), ("tokens", last.get("tokens"), ",.0f"), ("loss", last.get("loss"), ".4f"),
             ("validation loss", last.get("val_loss"), ".4f"), ("perplexity", last.get("val_perplexity"), ",.2f"),
             ("bits per byte", last.get("val_bits_per_byte"), ".4f"), ("next-token accuracy", last.get("val_accuracy"), ".2%"),
             ("calibration error", last.get("val_ece"), ".2%"), ("accuracy", last.get("accuracy"), ".2%"),
             ("macro F1", last.get("f1_macro"), ".4f"), ("ROC AUC", last.get("roc_auc"), ".4f"),
             ("tokens/s", speeds[len(speeds) // 2] if speeds else None, ",.0f"),
             ("MFU", last.get("mfu"), ".1%"), ("seconds of a checkpoint", saves[len(saves) // 2] if saves else None, ".3g"),
             ("of which steps stood still", stalls[len(stalls) // 2] if stalls else None, ".3g")]
    return [(name, format(value, form)) for name, value, form in shown if value is not None]


def parts(records: list[dict[str, Any]]) -> list[Part]:
    """Where the time of rank 0 went; empty where no record tells."""
    taken: dict[str, list[float]] = {name: [] for name in PARTS}
    for record in records:
        if "step_s" not in record:
            continue
        record = {**record, "update_s": max(0.0, record["step_s"] - record.get("forward_s", 0.0) - record.get("backward_s", 0.0))}
        for name in PARTS:
            if name in record:
                taken[name].append(record[name])
    total, found = sum(map(sum, taken.values())), []
    for name, values in taken.items():
        if values and total:
            found.append(Part(PARTS[name], f"{sum(values):,.1f}", f"{1e3 * sorted(values)[len(values) // 2]:,.1f}",
                              100 * sum(values) / total))
    return found


def samples(records: list[dict[str, Any]]) -> list[Sample]:
    """What was added to each prompt at each evaluation."""
    made: dict[str, list[tuple[int, str]]] = {}
    for record in records:
        for one in record.get("samples", ()):
            made.setdefault(one["prompt"], []).append((record["step"], one["completion"]))
    return [Sample(prompt, texts[-1], tuple(texts[-2::-1])) for prompt, texts in made.items()]


def matrices(records: list[dict[str, Any]]) -> list[Matrix]:
    """A classifier's confusion matrix, of the last record that has one: one, or where documents have several labels one for each."""
    found: dict[str, Any] = next((record["confusion"] for record in reversed(records) if "confusion" in record), {})
    if not found:
        return []
    labels, counts = tuple(found["labels"]), found["counts"]
    if isinstance(counts[0][0], int):
        return [_matrix("Confusion", labels, counts)]
    return [_matrix(label, ("without", "with"), each) for label, each in zip(labels, counts, strict=True)]


def confused(records: list[dict[str, Any]]) -> Confused | None:
    """The pairs of labels that are confused most, or where documents have several labels those with the most errors, of the last record
    that has some; None where none has."""
    found: dict[str, Any] = next((record["confused"] for record in reversed(records) if "confused" in record), {})
    if not found:
        return None
    if "pairs" in found:
        heads, what = ("label", "taken for", "documents", "of the label's", "share"), "pair"
        rows = [(one["label"], one["taken_for"], f"{one['count']:,}", f"{one['documents']:,}", f"{one['count'] / one['documents']:.1%}")
                for one in found["pairs"]]
    else:
        heads, what = ("label", "missed", "of", "wrongly given", "errors"), "label"
        rows = [(one["label"], f"{one['missed']:,}", f"{one['documents']:,}", f"{one['wrongly']:,}", f"{one['missed'] + one['wrongly']:,}")
                for one in found["labels"]]
    note = f"{found['errors']:,} errors in {found['distinct']:,} {what}{'s' * (found['distinct'] != 1)}"
    return Confused(note + f": the {len(rows)} with the most of them" * (len(rows) < found["distinct"]), heads, tuple(rows))


def _matrix(title: str, labels: tuple[str, ...], counts: list[list[int]]) -> Matrix:
    return Matrix(title, labels, tuple((label, tuple((count, round(100 * count / max(1, sum(row)))) for count in row))
                                       for label, row in zip(labels, counts, strict=True)))


def curve(title: str, records: list[dict[str, Any]]) -> Curve | None:
    """The lines of a title; None where no record has a value."""
    found: dict[str, list[tuple[int, float]]] = {key.replace("_", " "): [] for key in CURVES[title]}
    for record in records:
        for name, value in _values(title, record).items():
            if value is not None and math.isfinite(value):
                found.setdefault(name, []).append((int(record["step"]), float(value)))
    found = {key: points for key, points in found.items() if points}
    if not found:
        return None
    steps = [step for points in found.values() for step, _ in points]
    values = [value for points in found.values() for _, value in points]
    low, high, first, last = min(values), max(values), min(steps), max(steps)

    def place(step: int, value: float) -> str:
        x = MARGIN + (WIDTH - 2 * MARGIN) * (step - first) / max(last - first, 1)
        y = HEIGHT - MARGIN - (HEIGHT - 2 * MARGIN) * ((value - low) / (high - low) if high > low else 0.5)
        return f"{x:.1f},{y:.1f}"

    lines = []
    for key, points in found.items():
        stride = max(1, math.ceil(len(points) / MAX_POINTS))
        kept = points[::stride] + (points[-1:] if (len(points) - 1) % stride else [])
        lines.append((key, "M" + " L".join(place(*point) for point in kept), f"{points[-1][1]:.6g}"))
    return Curve(title, tuple(lines), f"{low:.4g}", f"{high:.4g}", first, last)


def _values(title: str, record: dict[str, Any]) -> dict[str, float | None]:
    """What a record has for the lines of a title, by their names."""
    if title == BY_SOURCE:
        return {name: one["loss"] for name, one in record.get("val_by_source", {}).items()}
    return {key.replace("_", " "): record.get(key) for key in CURVES[title]}
