"""A job's page: a template of its package, filled, in a file that needs no network and no script.

    write_page(folder, "distlm.evaluate", outputs=outputs) # the path of report.html
"""

import json
from pathlib import Path
from typing import Any

import jinja2

from distlm.runs.folder import RunFolder
from distlm.storage import write_atomic

FILE = "report.html"


def write_page(folder: RunFolder, package: str, **facts: Any) -> Path:
    """Fill report.html.j2 of `package`, which may include templates of this one, with the facts, the folder's name, spec and lineage.
    Raises StorageError."""
    loader = jinja2.ChoiceLoader([jinja2.PackageLoader(one, ".") for one in (package, "distlm.runs")])
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True,
                                     undefined=jinja2.StrictUndefined)
    spec, lineage = folder.path / "spec.yaml", folder.path / "lineage.json"
    page = environment.get_template("report.html.j2").render(
        name=folder.name, spec=spec.read_text(encoding="utf-8", errors="replace") if spec.is_file() else "",
        lineage=json.dumps(folder.lineage(), indent=2, ensure_ascii=False) if lineage.is_file() else "", **facts)
    write_atomic(folder.path / FILE, page.encode("utf-8", "replace"))
    return folder.path / FILE
