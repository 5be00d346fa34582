"""`report.html`: a run on one page that needs no network and no script, out of the files of its folder alone.

    write_report(folder)                                   # the path of the page
"""

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from distlm.runs.folder import RunFolder
from distlm.storage import write_atomic

FILE = "report.html"
WIDTH, HEIGHT, MARGIN = 640, 200, 6
MAX_POINTS = 400
CURVES = {"Loss": ("loss", "val_loss"), "Tokens per second": ("tokens_per_s",), "Learning rate": ("lr",), "Gradient norm": ("grad_norm",),
          "Model FLOPs utilization": ("mfu",), "Accuracy and macro F1": ("accuracy", "f1_macro")}
"""Title -> the values of metrics.jsonl that it shows, in nats per token or document the loss."""


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
    """How many validation documents of each label (rows) were taken for each (columns)."""

    title: str
    labels: tuple[str, ...]
    rows: tuple[tuple[str, tuple[tuple[int, int], ...]], ...]
    """(label, (count, its share of the row in percent) of each column)"""


def write_report(folder: RunFolder) -> Path:
    """Write the page into the folder of a run that has metrics. Raises StorageError."""
    records, events = folder.read_metrics(), folder.events()
    environment = jinja2.Environment(loader=jinja2.PackageLoader("distlm.runs", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True,
                                     undefined=jinja2.StrictUndefined)
    spec = folder.path / "spec.yaml"
    page = environment.get_template("report.html.j2").render(
        name=folder.name, facts=facts(records), width=WIDTH, height=HEIGHT,
        curves=[one for title in CURVES if (one := curve(title, records))], matrices=matrices(records),
        events=[(time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(event["time"])), event["state"], event.get("cause", ""),
                 event.get("message", "")) for event in events],
        spec=spec.read_text(encoding="utf-8", errors="replace") if spec.is_file() else "",
        lineage=json.dumps(folder.lineage(), indent=2, ensure_ascii=False) if (folder.path / "lineage.json").is_file() else "")
    write_atomic(folder.path / FILE, page.encode("utf-8", "replace"))
    return folder.path / FILE


def facts(records: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """What stands at the top: the last values, and the middle of all speeds."""
    last: dict[str, Any] = {}
    for record in records:
        last.update({key: value for key, value in record.items() if value is not None})
    speeds = sorted(record["tokens_per_s"] for record in records if "tokens_per_s" in record)
    saves, stalls = (sorted(record[key] for record in records if key in record) for key in ("checkpoint_s", "checkpoint_stall_s"))
    shown = [("steps", last.get("step"), ",.0f"), ("tokens", last.get("tokens"), ",.0f"), ("loss", last.get("loss"), ".4f"),
             ("validation loss", last.get("val_loss"), ".4f"), ("accuracy", last.get("accuracy"), ".2%"),
             ("macro F1", last.get("f1_macro"), ".4f"), ("ROC AUC", last.get("roc_auc"), ".4f"),
             ("tokens/s", speeds[len(speeds) // 2] if speeds else None, ",.0f"),
             ("MFU", last.get("mfu"), ".1%"), ("seconds of a checkpoint", saves[len(saves) // 2] if saves else None, ".3g"),
             ("of which steps stood still", stalls[len(stalls) // 2] if stalls else None, ".3g")]
    return [(name, format(value, form)) for name, value, form in shown if value is not None]


def matrices(records: list[dict[str, Any]]) -> list[Matrix]:
    """A classifier's confusion matrix at its last evaluation: one, or where documents have several labels one for each label."""
    found: dict[str, Any] = next((record["confusion"] for record in reversed(records) if "confusion" in record), {})
    if not found:
        return []
    labels, counts = tuple(found["labels"]), found["counts"]
    if isinstance(counts[0][0], int):
        return [_matrix("Confusion", labels, counts)]
    return [_matrix(label, ("without", "with"), each) for label, each in zip(labels, counts, strict=True)]


def _matrix(title: str, labels: tuple[str, ...], counts: list[list[int]]) -> Matrix:
    return Matrix(title, labels, tuple((label, tuple((count, round(100 * count / max(1, sum(row)))) for count in row))
                                       for label, row in zip(labels, counts, strict=True)))


def curve(title: str, records: list[dict[str, Any]]) -> Curve | None:
    """The lines of a title; None where no record has a value."""
    found = {key: [(int(record["step"]), float(record[key])) for record in records
                   if record.get(key) is not None and math.isfinite(record[key])] for key in CURVES[title]}
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
        lines.append((key.replace("_", " "), "M" + " L".join(place(*point) for point in kept), f"{points[-1][1]:.6g}"))
    return Curve(title, tuple(lines), f"{low:.4g}", f"{high:.4g}", first, last)
