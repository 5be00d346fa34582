"""`report.html`: an average on one page that needs no network and no script.

    write_report(folder, outputs)                          # the path of the page
"""

from pathlib import Path
from typing import Any

from distlm.evaluate.report import COLUMNS, LABEL_COLUMNS, cells, shown
from distlm.runs import RunFolder
from distlm.runs.page import write_page


def write_report(folder: RunFolder, outputs: dict[str, Any]) -> Path:
    """Write the page into the folder of an average with these outputs. Raises StorageError."""
    columns = LABEL_COLUMNS if "labels" in outputs else COLUMNS
    rows = [(one["model"], "yes" if one["taken"] else "no", shown(one["with"], ".4f"), *cells(one, columns)) for one in outputs["models"]]
    return write_page(
        folder, "distlm.average", outputs=outputs,
        facts=[(title, text) for (title, _, _), text in zip(columns, cells(outputs, columns), strict=True)],
        titles=["taken", "loss with those before", *(title for title, _, _ in columns)],
        rows=[*rows, (f"the mean of {outputs['averaged']}", "", "", *cells(outputs, columns))])
