"""`report.html`: a sweep on one page that needs no network and no script.

    write_report(folder, outputs)                          # the path of the page
"""

import json
from pathlib import Path
from typing import Any

from distlm.progress import number
from distlm.runs import RunFolder
from distlm.runs.page import write_page
from distlm.runs.report import matrices


def write_report(folder: RunFolder, outputs: dict[str, Any]) -> Path:
    """Write the page into the folder of a sweep with these outputs. Raises StorageError."""
    metric = outputs["metric"]
    keys = list(outputs["trials"][0]["values"])
    return write_page(
        folder, "distlm.tune", facts=facts(outputs), points=[of_point(point) for point in outputs.get("points", ())],
        matrices=matrices(outputs.get("points", ())[:1]),
        titles=["trial", *keys, "steps", metric, "state"],
        rows=[(trial["trial"], *(said(trial["values"].get(key)) for key in keys), f"{trial['steps']:,}",
               "–" if trial[metric] is None else f"{trial[metric]:.4f}", trial["state"],
               ": ".join(filter(None, (trial["cause"] if trial["state"] != "succeeded" else "", trial["message"]))))
              for trial in outputs["trials"]])


def facts(outputs: dict[str, Any]) -> list[tuple[str, str]]:
    """What stands at the top."""
    best = ", ".join(f"{key.removeprefix('best.')} {said(value)}" for key, value in outputs.items() if key.startswith("best."))
    std = f" ± {outputs['std']:.4f}" if "std" in outputs else ""
    return [("trials", f"{len(outputs['trials']):,}"), (f"best {outputs['metric']}", f"{outputs['value']:.4f}{std}"),
            *([("best values", best)] if best else [])]


def of_point(point: dict[str, Any]) -> tuple[str, list[str], list[tuple[str, list[str]]]]:
    """(what it is, the metrics, rows of their values): each fold, the mean, the standard deviation."""
    metrics = point["metrics"]
    rows = [(trial, [f"{one['folds'][i]:.4f}" for one in metrics.values()]) for i, trial in enumerate(point["trials"]) if metrics]
    rows += [(title, [f"{one[key]:.4f}" for one in metrics.values()])
             for title, key in (("mean", "mean"), ("standard deviation", "std")) if metrics]
    return ", ".join(f"{key} {said(value)}" for key, value in point["values"].items()) or "the training spec", list(metrics), rows


def said(value: Any) -> str:
    return number(value) if isinstance(value, bool | int | float | str) else json.dumps(value)
