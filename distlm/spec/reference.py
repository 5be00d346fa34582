"""The reference of every key of every spec, out of the specs themselves:  python -m distlm.spec.reference > docs/specs.md"""

import sys
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from distlm.spec.base import Overriding
from distlm.spec.explain import models, shown
from distlm.spec.gpus import GPUS
from distlm.spec.load import KINDS

HEAD = """# Specs

Every key that a spec takes, by kind. A key without a default must be given. `--set key.path=value` overrides any of them.
This file is generated: `python -m distlm.spec.reference > docs/specs.md`."""
GPU_HEAD = """
## GPUs

What `scale.gpu` may name, or a device's whole name in which one of these stands: dense products in 10^12 operations a second and memory, as
NVIDIA's data sheets have them, and the precisions that it computes in.

| name | fp16 and bf16 | fp32 | GiB | precision |
|---|---|---|---|---|"""
PLAIN = {str: "text", int: "whole number", float: "number", bool: "true or false", Any: "anything", dict: "section"}


def reference() -> str:
    """The text of docs/specs.md."""
    parts = [HEAD]
    for kind, model in KINDS.items():
        parts += [f"\n## kind: {kind}\n\n{_sentence(model.__doc__)}\n", "| key | value | default | meaning |", "|---|---|---|---|"]
        parts += [f"| `{key}` | {value} | {default} | {meaning} |" for key, value, default, meaning in rows(model) if key != "kind"]
    parts += [GPU_HEAD]
    parts += [f"| `{name}` | {one.half_flops / 1e12:g} | {one.fp32_flops / 1e12:g} | {one.memory_gib} | "
              f"{', '.join(p for p in ('fp32', 'fp16', 'bf16', 'fp8') if one.multiplies(p))} |" for name, one in GPUS.items()]
    return "\n".join(parts) + "\n"


def rows(model: type[BaseModel], prefix: str = "") -> list[tuple[str, str, str, str]]:
    """(dotted key, type, default, meaning) of every key of a section and of the sections inside it."""
    found = []
    for name, field in model.model_fields.items():
        key = prefix + (field.alias or name)
        inner = list(models(field.annotation))
        origin: Any = get_origin(field.annotation)
        inside = {list: "[n].", dict: ".KEY."}.get(origin, ".")
        found.append((key, _type(field.annotation, field), _default(field), _sentence(field.description)))
        for section in inner if Overriding not in field.metadata else []:
            found += rows(section, key + inside)
    return found


def _type(annotation: Any, field: FieldInfo | None = None) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type(arguments[0])
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (Union, UnionType):
        return " or ".join(_type(a, field) for a in arguments if a is not type(None))
    if origin is tuple and ... not in arguments:
        return f"list of {len(arguments)}"
    if origin in (list, tuple):
        entry = "anything" if any(models(annotation)) else _type(arguments[0])
        return "list" if entry == "anything" else f"list of {entry}"
    text = "section" if isinstance(annotation, type) and issubclass(annotation, BaseModel) else PLAIN.get(origin or annotation, "")
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    limits = [f"{sign} {getattr(m, n):.12g}" for m in (field.metadata if field else []) for n, sign in signs.items() if hasattr(m, n)]
    return f"{text} {', '.join(limits)}".strip()


def _default(field: FieldInfo) -> str:
    if field.default is PydanticUndefined:
        return ""
    value = list(field.default) if isinstance(field.default, tuple) else field.default
    if isinstance(value, BaseModel):
        value = ", ".join(f"{name}: {shown(v)}" for name, v in value.model_dump(exclude_unset=True).items()) or None
    if value is None:
        return "–"
    return f"`{value if isinstance(value, str) else shown(value)}`"


def _sentence(text: str | None) -> str:
    return " ".join((text or "").split()).replace("|", "\\|")


if __name__ == "__main__":
    sys.stdout.write(reference())
