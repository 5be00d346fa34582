"""YAML to a validated spec, with the line and the origin of every value.

Errors are one line each: `jobs/a.yaml:12: batch.micro_sequences: 3 does not divide ...; try 1, 2, 4`.
"""

import difflib
import io
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from distlm.errors import SpecError
from distlm.spec.base import Rule
from distlm.spec.pipeline import PipelineSpec
from distlm.spec.prepare import PrepareSpec
from distlm.spec.serve import ServeSpec
from distlm.spec.train import TrainSpec
from distlm.spec.tune import TuneSpec

Spec = PrepareSpec | TrainSpec | TuneSpec | ServeSpec | PipelineSpec
KINDS: dict[str, type[Spec]] = {"prepare": PrepareSpec, "train": TrainSpec, "tune": TuneSpec, "serve": ServeSpec,
                                "pipeline": PipelineSpec}
REFERENCE = re.compile(r"\$\{([^}]*)\}")
Path_ = tuple[str | int, ...]


@dataclass(frozen=True)
class Loaded:
    """A validated spec and where its values come from."""

    spec: Spec
    origins: dict[str, str]
    """Dotted key of every leaf -> `default`, `file:line` or `--set`."""
    path: str
    """The file, or `spec` for a mapping."""


def load_spec(source: str | Path | Mapping[str, Any], overrides: list[str] | None = None) -> Loaded:
    """Read and validate a spec from a file or a mapping. `overrides` are `key.path=value`, the value in YAML.

    Raises SpecError with one line per mistake: file:line, key path, value, rule, remedy and the nearest name.
    """
    lines: dict[Path_, int] = {}
    if isinstance(source, Mapping):
        path, data = "spec", plain(source)
    else:
        path = str(source)
        data, lines = _read(Path(source))
    origins: dict[Path_, str] = {key: f"{Path(path).name}:{line}" for key, line in lines.items()}
    for text in overrides or []:
        key = _override(data, text)
        origins = {k: v for k, v in origins.items() if k[:len(key)] != key}
        origins[key] = "--set"
    spec = validate(data, path, lines, {k for k, v in origins.items() if v == "--set"})
    return Loaded(spec, {dotted(key): _origin(key, origins, path, data) for key, _ in leaves(dump(spec))}, path)


def validate(data: dict[str, Any], path: str = "spec", lines: Mapping[Path_, int] | None = None,
             overridden: set[Path_] | frozenset[Path_] = frozenset(), references: bool = False) -> Any:
    """Return the spec that `data` describes. With `references`, errors about values that hold `${...}` are passed over,
    and None is returned where there are any. Raises SpecError."""
    lines = lines or {}

    def where(key: Path_) -> str:
        for end in range(len(key), -1, -1):
            if key[:end] in overridden:
                return f"--set {dotted(key)}"
            if key[:end] in lines:
                return f"{path}:{lines[key[:end]]}: {dotted(key)}" if key else f"{path}:{lines[key[:end]]}"
        return f"{path}: {dotted(key)}" if key else path

    kind = data.get("kind")
    if kind not in KINDS:
        near = nearest(str(kind), KINDS)
        raise SpecError("the key kind is missing" if kind is None else f"unknown kind {kind!r}", where=where(("kind",)),
                        remedy=f"did you mean {near}?" if near and kind is not None else f"one of {', '.join(KINDS)}")
    model = KINDS[kind]
    try:
        return model.model_validate(data)
    except ValidationError as error:
        problems, passed_over = [], False
        for item in error.errors():
            key, message, remedy = _explain(model, item, data)
            value = at(data, key)
            if references and isinstance(value, str) and REFERENCE.search(value):
                passed_over = True
                continue
            problems.append(str(SpecError(message, where=where(key), remedy=remedy)))
        if problems:
            raise SpecError("\n".join(dict.fromkeys(problems))) from None
        assert passed_over
        return None


def _explain(model: type[BaseModel], item: Any, data: Any) -> tuple[Path_, str, str]:
    """(key, message, remedy) of one of pydantic's errors."""
    key = tuple(part for part in item["loc"] if not (isinstance(part, str) and part.startswith("function-")))
    cause = item.get("ctx", {}).get("error")
    if isinstance(cause, Rule):
        message, _, remedy = str(cause).partition("; ")
        return key + (tuple(cause.key.split(".")) if cause.key else ()), message, remedy
    value = item["input"]
    if item["type"] == "extra_forbidden":
        fields = field_names(model, key[:-1])
        near = nearest(str(key[-1]), fields)
        return key, "unknown key", f"did you mean {near}?" if near else f"there are {', '.join(fields)}"
    if item["type"] == "missing":
        return key, "this key is missing", describe(model, key)
    message = item["msg"][0].lower() + item["msg"][1:]
    if item["type"] == "string_pattern_mismatch":
        return key, f"{value!r} is no name", "letters, digits, '.', '_' and '-', starting with a letter or digit, 100 at most"
    if item["type"] == "literal_error" and isinstance(value, str):
        choices = re.findall(r"'([^']*)'", item["ctx"]["expected"])
        near = nearest(value, choices)
        return key, f"{value!r} is not one of {', '.join(choices)}", f"did you mean {near}?" if near else ""
    shown = repr(value) if len(repr(value)) < 60 else f"a {type(value).__name__}"
    return key, f"{shown}: {message}", ""


def field_names(model: Any, key: Path_) -> list[str]:
    """The keys that the section at `key` takes, as they are written in YAML."""
    for part in key:
        if isinstance(part, int):
            continue
        field = next((f for n, f in model.model_fields.items() if part in (n, f.alias)), None)
        found = list(_models(field.annotation)) if field else []
        if not found:
            return []
        model = found[0]
    return [field.alias or name for name, field in model.model_fields.items()]


def describe(model: Any, key: Path_) -> str:
    """What the documentation says of the field at `key`, in one sentence."""
    for part in key[:-1]:
        field = model.model_fields.get(part)
        found = list(_models(field.annotation)) if field else []
        if not found:
            return ""
        model = found[0]
    field = model.model_fields.get(key[-1])
    return (field.description or "").split("\n")[0].rstrip(".").replace(": ", ", ") if field else ""


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models(argument)


def nearest(name: str, names: Any) -> str:
    """The most similar of `names`, or nothing."""
    return next(iter(difflib.get_close_matches(name, list(names), n=1, cutoff=0.6)), "")


def _read(path: Path) -> tuple[dict[str, Any], dict[Path_, int]]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        folder = path.parent if path.parent.is_dir() else Path(".")
        near = nearest(path.name, [p.name for p in folder.iterdir() if p.suffix in (".yaml", ".yml")])
        raise SpecError("there is no such file", where=str(path), remedy=f"did you mean {folder / near}?" if near else
                        "`distlm init` writes one") from None
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"cannot be read: {error}", where=str(path)) from None
    return parse(text, str(path))


def parse(text: str, path: str = "spec") -> tuple[dict[str, Any], dict[Path_, int]]:
    """YAML 1.2 text to (data, line of each key path). Raises SpecError."""
    try:
        tree = YAML(typ="rt").load(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = str(error.problem).split("\n")[0]
        raise SpecError(f"not valid YAML: {problem}", where=f"{path}:{mark.line + 1}" if mark else path) from None
    except YAMLError as error:
        raise SpecError(f"not valid YAML: {str(error).splitlines()[0]}", where=path) from None
    if not isinstance(tree, dict):
        raise SpecError("a spec is a mapping that begins with `kind:`", where=path)
    lines: dict[Path_, int] = {}

    def walk(node: Any, key: Path_) -> None:
        if isinstance(node, CommentedMap):
            for name in node:
                lines[key + (name,)] = node.lc.key(name)[0] + 1
                walk(node[name], (*key, name))
        elif isinstance(node, CommentedSeq):
            for i, item in enumerate(node):
                lines[key + (i,)] = node.lc.item(i)[0] + 1
                walk(item, (*key, i))

    walk(tree, ())
    return plain(tree), lines


def plain(value: Any) -> Any:
    """The same value in the built-in types."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return kind(value)
    return value


def _override(data: dict[str, Any], text: str) -> Path_:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise SpecError(f"{text!r} is no override", where="--set", remedy="write key.path=value, e.g. --set optimizer.lr=0.001")
    try:
        parsed = plain(YAML(typ="safe").load(value)) if value else None
    except YAMLError as error:
        raise SpecError(f"{value!r} is not valid YAML: {str(error).splitlines()[0]}", where=f"--set {key}") from None
    put(data, key, parsed)
    return tuple(int(part) if part.isdigit() else part for part in key.split("."))


def put(data: dict[str, Any], key: str, value: Any) -> None:
    """Set the dotted `key` in `data`, making sections on the way. A key that itself holds dots is found first. Raises SpecError."""
    node: Any = data
    parts = key.split(".")
    for i, part in enumerate(parts):
        rest = ".".join(parts[i:])
        if isinstance(node, dict) and len(parts) - i > 1 and rest in node:
            node[rest] = value
            return
        last = i == len(parts) - 1
        if isinstance(node, list):
            if not part.isdigit() or int(part) >= len(node):
                raise SpecError(f"{part!r} is no place in a list of {len(node)}", where=f"--set {key}")
            if last:
                node[int(part)] = value
            node = node[int(part)]
        elif isinstance(node, dict):
            if last:
                node[part] = value
            elif not isinstance(node.get(part), dict | list):
                node[part] = {}
            node = node[part]
        else:
            raise SpecError(f"{'.'.join(parts[:i])} holds a value, not a section", where=f"--set {key}")


def at(data: Any, key: Path_) -> Any:
    """The value at a key path, or None."""
    for part in key:
        try:
            data = data[part]
        except (KeyError, IndexError, TypeError):
            return None
    return data


def dump(spec: BaseModel) -> dict[str, Any]:
    """The spec as plain data, keys as they are written in YAML."""
    return spec.model_dump(mode="json", by_alias=True)


def leaves(data: Any, key: Path_ = ()) -> Iterator[tuple[Path_, Any]]:
    """Every (key path, value) of plain data; an empty section is a leaf."""
    if isinstance(data, dict) and data:
        for name, value in data.items():
            yield from leaves(value, (*key, name))
    elif isinstance(data, list) and any(isinstance(v, dict) for v in data):
        for i, value in enumerate(data):
            yield from leaves(value, (*key, i))
    else:
        yield key, data


def dotted(key: Path_) -> str:
    return ".".join(map(str, key))


def to_yaml(data: Any) -> str:
    """Plain data as YAML that `load_spec` reads back."""
    stream = io.StringIO()
    writer = YAML()
    writer.indent(mapping=2, sequence=4, offset=2)
    writer.width = 120
    writer.dump(data, stream)
    return stream.getvalue()


def _origin(key: Path_, origins: Mapping[Path_, str], path: str, data: Any) -> str:
    if at(data, key) is None and not any(k[:len(key)] == key for k in origins):
        parent = next((key[:end] for end in range(len(key), 0, -1) if key[:end] in origins), ())
        value = at(data, parent) if parent else None
        return origins[parent] if parent and not isinstance(value, dict | list) else "default"
    for end in range(len(key), 0, -1):
        if key[:end] in origins:
            return origins[key[:end]]
    return path
