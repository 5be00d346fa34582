"""What is wrong with a value, in one line: pydantic's errors in the words of a spec."""

import datetime
import difflib
import re
from collections.abc import Iterator, Mapping
from typing import Any, get_args, get_origin

from pydantic import BaseModel

from distlm.spec.base import Rule

KeyPath = tuple[str | int, ...]
UNQUOTED = re.compile(r"[-+]?[\d.]+(e[-+]?\d+)?|true|false", re.IGNORECASE)
SECTION = ("model_type", "model_attributes_type", "dict_type", "mapping_type")
NO_TEXT = (*SECTION, "int_type", "float_type", "bool_type", "list_type", "tuple_type")
"""Kinds of errors of a text where another type is wanted."""
MUST = {
    "string_type": "must be text", "int_type": "must be a whole number", "int_parsing": "must be a whole number",
    "int_parsing_size": "must be a smaller number", "int_from_float": "must be a whole number", "float_type": "must be a number",
    "float_parsing": "must be a number", "finite_number": "must be finite", "bool_type": "must be true or false",
    "bool_parsing": "must be true or false", "list_type": "must be a list", "tuple_type": "must be a list",
    "greater_than": "must be above {gt:.12g}", "greater_than_equal": "must be at least {ge:.12g}", "less_than": "must be below {lt:.12g}",
    "less_than_equal": "must be at most {le:.12g}", "too_short": "must have {min_length} entries at least, not {actual_length}",
    "string_too_short": "must not be empty", "too_long": "must have {max_length} entries at most, not {actual_length}",
}


def explain(model: type[BaseModel], item: Any) -> tuple[KeyPath, str, str]:
    """(key path, message, remedy) of one of pydantic's errors about `model`."""
    key = tuple(part for part in item["loc"] if not (isinstance(part, str) and (part == "[key]" or part.startswith("function-"))))
    value, context = item["input"], item.get("ctx", {})
    cause = context.get("error")
    if isinstance(cause, Rule):
        message, _, remedy = str(cause).partition("; ")
        return key + (tuple(cause.key.split(".")) if cause.key else ()), message, remedy
    if item["type"] == "extra_forbidden":
        return key, "unknown key", _known(str(key[-1]), field_names(model, key[:-1]))
    if item["type"] == "missing":
        if isinstance(key[-1], int):
            return key[:-1], f"entry {key[-1] + 1} is missing", ""
        return key, "this key is missing", describe(model, key)
    if item["type"] == "string_pattern_mismatch":
        return key, f"{shown(value)} is no name", "letters, digits, '.', '_' and '-', starting with a letter or digit, 100 at most"
    if item["type"] == "literal_error":
        choices = [choice.strip("'") for choice in re.findall(r"'[^']*'|-?\d+", context["expected"])]
        near = nearest(str(value), choices)
        return key, f"{shown(value)} is not one of {', '.join(choices)}", f"did you mean {near}?" if near else ""
    if item["type"] in SECTION:
        names = field_names(model, key)
        return key, f"{shown(value)}: must be a section", f"its keys are {', '.join(names)}" if names else "keys and values"
    remedy = ""
    if item["type"] in ("list_type", "tuple_type") and isinstance(value, str):
        remedy = f"write [{value}]"
    elif item["type"] == "string_type" and isinstance(value, bool | int | float):
        remedy = "put it in quotes"
    elif item["type"] in ("int_type", "float_type", "bool_type") and isinstance(value, str) and UNQUOTED.fullmatch(value):
        remedy = "take the quotes off"
    message = MUST[item["type"]].format(**context) if item["type"] in MUST else item["msg"][0].lower() + item["msg"][1:]
    return key, f"{shown(value)}: {message}", remedy


def merge_unions(data: Any, items: list[Any]) -> list[Any]:
    """The errors, with those of a union's branches (`train.str`, `train.dict[str,any]`) joined under the key itself."""
    merged: dict[Any, Any] = {}
    for item in items:
        loc, tag = item["loc"], item["loc"][-1] if item["loc"] else ""
        branch = isinstance(tag, str) and re.fullmatch(r"str|int|float|bool|(dict|list)\[.*\]", tag)
        if not branch or (isinstance(at(data, loc[:-1]), Mapping) and tag in at(data, loc[:-1])):
            merged[loc, item["type"], len(merged)] = item
        elif (loc[:-1],) not in merged:
            merged[loc[:-1],] = {**item, "loc": loc[:-1], "type": "union", "msg": _branch(tag)}
        else:
            merged[loc[:-1],]["msg"] += f" or {_branch(tag).removeprefix('must be ')}"
    return list(merged.values())


def _branch(tag: str) -> str:
    return "must be " + {"str": "text", "int": "a whole number", "float": "a number", "bool": "true or false"}.get(
        tag, "a section" if tag.startswith("dict") else "a list")


def _known(name: str, fields: list[str]) -> str:
    if name.partition(".")[0] in fields and "." in name:
        head, _, rest = name.partition(".")
        return f"write it as a section, {head}: {{{rest}: ...}}"
    near = nearest(name, fields)
    return f"did you mean {near}?" if near else f"there are {', '.join(n for n in fields if n != 'kind')}"


def shown(value: Any) -> str:
    """A value as a spec writes it, cut where it is long."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    value = list(value) if isinstance(value, tuple) else value
    text = value.isoformat() if isinstance(value, datetime.date) else repr(value)
    return text if len(text) < 60 else f"{text[:50]}…"


def field_names(model: Any, key: KeyPath) -> list[str]:
    """The keys that the section at `key` takes, as they are written in YAML."""
    section = _section(model, key)
    return [field.alias or name for name, field in section.model_fields.items()] if section else []


def describe(model: Any, key: KeyPath) -> str:
    """What the documentation says of the field at `key`, in one sentence that begins small."""
    section = _section(model, key[:-1])
    field = next((f for n, f in section.model_fields.items() if key[-1] in (n, f.alias)), None) if section else None
    text = (field.description or "").split("\n")[0].rstrip(".").replace(": ", ", ") if field else ""
    return text[:1].lower() + text[1:]


def _section(model: Any, key: KeyPath) -> Any:
    """The model of the section at `key`, or None. Places in lists, and the keys of a mapping of sections, are passed over."""
    inside_mapping = False
    for part in key:
        if isinstance(part, int) or inside_mapping:
            inside_mapping = False
            continue
        field = next((f for n, f in model.model_fields.items() if part in (n, f.alias)), None)
        model = next(models(field.annotation), None) if field else None
        if model is None:
            return None
        assert field is not None
        inside_mapping = get_origin(field.annotation) is dict
    return None if inside_mapping else model


def models(annotation: Any) -> Iterator[type[BaseModel]]:
    """Every section that an annotation names."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from models(argument)


def nearest(name: str, names: Any) -> str:
    """The most similar of `names`, or nothing."""
    return next(iter(difflib.get_close_matches(name, list(names), n=1, cutoff=0.6)), "")


def as_written(data: Any, key: KeyPath) -> KeyPath:
    """The key path in the words of `data`, where a list may be short for a section that holds it: `corpus.0` for `corpus.mix.0`."""
    written: KeyPath = ()
    for part in key:
        in_list = isinstance(at(data, written), list)
        if in_list and isinstance(part, str) and part.isdigit():        # of a rule's dotted path
            written += (int(part),)
        elif not (in_list and isinstance(part, str)):
            written += (part,)
    return written


def at(data: Any, key: KeyPath) -> Any:
    """The value at a key path, or None."""
    for part in key:
        try:
            data = data[part]
        except (KeyError, IndexError, TypeError):
            return None
    return data
