"""`report.html`: a model before and after its compression, side by side, on one page that needs no network and no script.

    write_report(folder, outputs)                          # the path of the page
"""

from pathlib import Path
from typing import Any

from distlm.runs import RunFolder
from distlm.runs.page import write_page

ROWS = (("bytes on disk", "bytes", ",d"), ("bytes of weights in memory", "memory_bytes", ",d"),
        ("decoding, tokens/s, one sequence", "decode_1", ",.1f"), ("decoding, tokens/s, 8 sequences", "decode_8", ",.1f"),
        ("prefill, tokens/s", "prefill", ",.0f"), ("loss", "loss", ".4f"), ("perplexity", "perplexity", ",.2f"),
        ("accuracy of the next token", "accuracy", ".2%"))
"""(title, measure, format)"""


def rows(outputs: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """(what, before, after, after over before) of every measure."""
    before, after = outputs["before"], outputs["after"]
    return [(title, shown(before[key], form), shown(after[key], form),
             f"{after[key] / before[key]:.3f}" if before[key] and after[key] is not None else "–") for title, key, form in ROWS]


def described(compression: dict[str, Any]) -> str:
    """`int4_weight_only, group size 32, matrices 21, left whole 2, such as model.layers.0.mlp.down_proj`."""
    more = [f"{what.replace('_', ' ')} {f'{len(value)}, such as {value[0]}' if isinstance(value, list) else value}"
            for what, value in compression.items() if what != "method"]
    return ", ".join([compression["method"], *more])


def shown(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def write_report(folder: RunFolder, outputs: dict[str, Any]) -> Path:
    """Write the page into the folder of a compression with these outputs. Raises StorageError."""
    return write_page(folder, "distlm.compress", outputs=outputs, rows=rows(outputs), how=described(outputs["compression"]))
