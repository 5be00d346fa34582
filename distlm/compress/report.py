"""`report.html`: a model before and after its compression, side by side, on one page that needs no network and no script.

    write_report(folder, outputs)                          # the path of the page
"""

from pathlib import Path
from typing import Any

from distlm.runs import RunFolder
from distlm.runs.page import write_page
from distlm.runs.sides import rows


def sides_of(outputs: dict[str, Any]) -> dict[str, Any]:
    """The measures of a compression before and after."""
    return {name: outputs[name] for name in ("before", "after")}


def described(compression: dict[str, Any]) -> str:
    """`int4_weight_only, group size 32, matrices 21, left whole 2, such as model.layers.0.mlp.down_proj`."""
    more = [f"{what.replace('_', ' ')} {', such as '.join(map(str, [len(value), *value[:1]])) if isinstance(value, list) else value}"
            for what, value in compression.items() if what != "method"]
    return ", ".join([compression["method"], *more])


def write_report(folder: RunFolder, outputs: dict[str, Any]) -> Path:
    """Write the page into the folder of a compression with these outputs. Raises StorageError."""
    return write_page(folder, "distlm.compress", outputs=outputs, sides=rows(sides_of(outputs)), how=described(outputs["compression"]))
