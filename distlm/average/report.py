"""`report.html`: an average on one page that needs no network and no script.

    write_report(folder, outputs)                          # the path of the page
"""

import json
from pathlib import Path
from typing import Any

import jinja2

from distlm.evaluate.report import COLUMNS, cells, shown
from distlm.runs import RunFolder
from distlm.storage import write_atomic

FILE = "report.html"


def write_report(folder: RunFolder, outputs: dict[str, Any]) -> Path:
    """Write the page into the folder of an average with these outputs. Raises StorageError."""
    environment = jinja2.Environment(loader=jinja2.PackageLoader("distlm.average", "."), autoescape=True, trim_blocks=True,
                                     lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    spec, lineage = folder.path / "spec.yaml", folder.path / "lineage.json"
    rows = [(one["model"], "yes" if one["taken"] else "no", shown(one["with"], ".4f"), *cells(one)) for one in outputs["models"]]
    page = environment.get_template("report.html.j2").render(
        name=folder.name, outputs=outputs, facts=[(title, text) for (title, _, _), text in zip(COLUMNS, cells(outputs), strict=True)],
        titles=["taken", "loss with those before", *(title for title, _, _ in COLUMNS)],
        rows=[*rows, (f"the mean of {outputs['averaged']}", "", "", *cells(outputs))],
        spec=spec.read_text(encoding="utf-8", errors="replace") if spec.is_file() else "",
        lineage=json.dumps(folder.lineage(), indent=2, ensure_ascii=False) if lineage.is_file() else "")
    write_atomic(folder.path / FILE, page.encode("utf-8", "replace"))
    return folder.path / FILE
