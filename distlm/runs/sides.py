"""Models side by side: what each weighs, how fast it is and how well it predicts, in the rows of a table.

    columns, table = rows({"before": {...}, "after": {...}})
"""

from collections.abc import Mapping
from typing import Any

ROWS = (("parameters", "parameters", ",d"), ("bytes on disk", "bytes", ",d"), ("bytes of weights in memory", "memory_bytes", ",d"),
        ("decoding, tokens/s, one sequence", "decode_1", ",.1f"), ("decoding, tokens/s, 8 sequences", "decode_8", ",.1f"),
        ("prefill, tokens/s", "prefill", ",.0f"), ("loss", "loss", ".4f"), ("perplexity", "perplexity", ",.2f"),
        ("accuracy of the next token", "accuracy", ".2%"))
"""(title, measure, format)"""


def rows(sides: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], list[tuple[str, ...]]]:
    """(the heads of the columns, the rows: what is measured, its value of each side, the last over the first). A dash stands for a number
    that there is not."""
    first, *_, last = sides.values()
    names = [*sides]
    return ["", *names, f"{names[-1]} / {names[0]}"], [
        (title, *(shown(side.get(key), form) for side in sides.values()),
         f"{last[key] / first[key]:.3f}" if first.get(key) and last.get(key) is not None else "–") for title, key, form in ROWS]


def lines(sides: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str]]:
    """(what is measured, its values with the last over the first) for a terminal."""
    return [(what, f"{' -> '.join(values)}, x {ratio}") for what, *values, ratio in rows(sides)[1]]


def shown(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
