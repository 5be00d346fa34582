"""The values of a record: what a field's name leads to, and how JSON and a file of UTF-8 can hold it."""

import json
import math
from typing import Any

MAX_DEPTH = 64
"""Of what is kept beside a document."""


def field_of(value: dict[str, Any], key: str) -> Any:
    """The field of this name, or what its dots lead to; None where there is none."""
    if key in value or "." not in key:
        return value.get(key)
    found: Any = value
    for part in key.split("."):
        found = found.get(part) if isinstance(found, dict) else None
    return found


def is_given(value: Any) -> bool:
    """Whether a field says anything: some write nothing as an empty list in JSON."""
    return bool(value) and value != "[]"


def as_id(value: Any) -> str:
    """The value as the id of a record; empty for none."""
    if value is None:
        return ""
    if isinstance(value, str):
        return utf8(value)
    if type(value) is int:
        return str(value)
    found = as_json(value)
    return found if isinstance(found, str) else json.dumps(found)


def as_json(value: Any) -> Any:
    """The value as JSON can hold it, else as text."""
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, str):
        return utf8(value)
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [child for item in level if isinstance(item, dict | list | tuple)
                 for child in (item.values() if isinstance(item, dict) else item)]
    if level:
        return f"nested deeper than {MAX_DEPTH} levels"
    if isinstance(value, dict):
        return {utf8(str(key)): as_json(item) for key, item in value.items()}
    return [as_json(item) for item in value] if isinstance(value, list | tuple) else str(value)


def utf8(text: str) -> str:
    """Without lone surrogates, which no file can hold."""
    return text if text.isascii() else text.encode(errors="replace").decode()
