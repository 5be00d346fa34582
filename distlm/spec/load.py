"""YAML to a validated spec, with the line and the origin of every value.

Errors are one line each: `jobs/a.yaml:12: batch.micro_sequences: 3 does not divide ...; try 1, 2, 4`.
"""

import contextlib
import datetime
import io
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.composer import ComposerError
from ruamel.yaml.constructor import DuplicateKeyError
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import CollectionEndEvent, CollectionStartEvent

from distlm.errors import InputError, SpecError
from distlm.spec.average import AverageSpec
from distlm.spec.compress import CompressSpec
from distlm.spec.evaluate import EvaluateSpec
from distlm.spec.explain import NO_TEXT, KeyPath, as_written, at, describe, explain, field_names, merge_unions, nearest, shown
from distlm.spec.pipeline import PipelineSpec
from distlm.spec.prepare import PrepareSpec
from distlm.spec.serve import ServeSpec
from distlm.spec.train import TrainSpec
from distlm.spec.tune import TuneSpec

Spec = PrepareSpec | TrainSpec | TuneSpec | AverageSpec | EvaluateSpec | CompressSpec | ServeSpec | PipelineSpec
KINDS: dict[str, type[Spec]] = {"prepare": PrepareSpec, "train": TrainSpec, "tune": TuneSpec, "average": AverageSpec,
                                "evaluate": EvaluateSpec, "compress": CompressSpec, "serve": ServeSpec, "pipeline": PipelineSpec}
REFERENCE = re.compile(r"\$\{([^}]*)\}")
References: TypeAlias = bool | Callable[[str], bool]
"""Whether values may hold references; or a function that says whether what such a value stands for may be something else than text."""
MAX_DEPTH = 100
SCALARS = (bool, int, float, str, datetime.date, type(None))
__all__ = ["KINDS", "Loaded", "Spec", "at", "describe", "dotted", "dump", "field_names", "leaves", "load_spec", "locator", "nearest",
           "nearest_file", "parse", "plain", "put", "to_yaml", "validate"]


@dataclass(frozen=True)
class Loaded:
    """A validated spec and where its values come from."""

    spec: Spec
    origins: dict[str, str]
    """Dotted key of every leaf -> `default`, `file:line` or `--set`."""
    path: str
    """The file, or `spec` for a mapping."""
    written: Mapping[str, Any] = field(default_factory=dict)
    """The mapping as it was read, in which a list may be short for the section that holds it."""


def load_spec(source: str | Path | Mapping[str, Any], overrides: list[str] | None = None) -> Loaded:
    """Read and validate a spec from a file or a mapping. `overrides` are `key.path=value`, the value in YAML.

    Raises SpecError with one line per mistake: file:line, key path, value, rule, remedy and the nearest name.
    """
    lines: dict[KeyPath, int] = {}
    if isinstance(source, Mapping):
        path, data = "spec", plain(source)
    else:
        path = str(source)
        data, lines = _read(Path(source))
    origins: dict[KeyPath, str] = {key: f"{Path(path).name}:{line}" for key, line in lines.items()}
    for text in overrides or []:
        key = _override(data, text)
        origins = {k: v for k, v in origins.items() if k[:len(key)] != key}
        origins[key] = "--set"
    spec = validate(data, path, lines, {k for k, v in origins.items() if v == "--set"})
    return Loaded(spec, {dotted(key): _origin(key, origins, path, data) for key, _ in leaves(dump(spec))}, path, data)


def with_spec(loaded: Loaded, spec: Spec, origins: Mapping[str, str]) -> Loaded:
    """`loaded` with a spec in which files were put in place; `origins` are those of the values that came in."""
    known = {**loaded.origins, **origins}
    return Loaded(spec, {dotted(key): known.get(dotted(key), loaded.path) for key, _ in leaves(dump(spec))}, loaded.path,
                  loaded.written)


def locator(loaded: Loaded, section: str = "") -> Callable[[KeyPath], str]:
    """A function from a key path inside a section of a spec to its place: `a.yaml:12: steps.train: batch.micro_sequences`."""

    def where(key: KeyPath) -> str:
        written = key if section else as_written(loaded.written, key)
        text = ": ".join(part for part in (section, dotted(written)) if part)
        for end in range(len(key), -1, -1):                # what is missing has the line of the section that lacks it
            name = ".".join(part for part in (section, dotted(key[:end])) if part)
            for known, origin in loaded.origins.items() if name else ():
                if known != name and not known.startswith(f"{name}."):
                    continue
                if origin == "--set" and key and (known == name or end == len(key)):
                    return f"--set {name if section else dotted(as_written(loaded.written, key[:end]))}"
                file, _, line = origin.rpartition(":")
                if file and line.isdigit():
                    return f"{loaded.path if file == Path(loaded.path).name else file}:{line}: {text}"
        return f"{loaded.path}: {text}" if text else loaded.path

    return where


@contextlib.contextmanager
def located(loaded: Loaded) -> Iterator[None]:
    """Errors of the block that name a key of the spec name its file and line as well."""
    try:
        yield
    except (SpecError, InputError) as error:
        key, _, value = error.where.partition(": ")
        path = tuple(int(part) if part.isdigit() else part for part in key.split("."))
        known = {field.alias or name for name, field in type(loaded.spec).model_fields.items()}
        if path[0] in known:
            error.where = ": ".join(filter(None, (locator(loaded)(path), value)))
        raise


def validate(data: dict[str, Any], path: str = "spec", lines: Mapping[KeyPath, int] | None = None,
             overridden: set[KeyPath] | frozenset[KeyPath] = frozenset(), references: References = False,
             place: Callable[[KeyPath], str] | None = None) -> Any:
    """Return the spec that `data` describes. With `references`, errors about values that hold `${...}` are passed over, but for
    what is text where none can be, and None is returned where there are any. `place` tells where a key stands, for data that are
    a part of a file, in place of `path` and `lines`. Raises SpecError."""
    lines = lines or {}

    def where(key: KeyPath) -> str:
        if place:
            return place(key)
        if key and key not in lines and any(k[:len(key)] == key for k in overridden):
            return f"--set {dotted(key)}"
        for end in range(len(key), -1, -1):
            if key[:end] in overridden:
                return f"--set {dotted(key)}"
            if key[:end] in lines:
                return f"{path}:{lines[key[:end]]}: {dotted(key)}" if key else f"{path}:{lines[key[:end]]}"
        return f"{path}: {dotted(key)}" if key else path

    kind = data.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        mistyped = nearest("kind", data) if kind is None and "kind" not in data else ""
        if mistyped:
            raise SpecError("unknown key", where=where((mistyped,)), remedy="did you mean kind?")
        near = nearest(str(kind), KINDS) if kind is not None else ""
        raise SpecError("the key kind is missing" if kind is None else f"unknown kind {shown(kind)}",
                        where=where(("kind",) if "kind" in data else ()),
                        remedy=f"did you mean {near}?" if near else f"one of {', '.join(KINDS)}")
    model = KINDS[kind]
    try:
        return model.model_validate(data, by_alias=True, by_name=False)
    except ValidationError as error:
        problems, passed_over = [], False
        for item in merge_unions(data, error.errors()):
            key, message, remedy = explain(model, item)
            key = as_written(data, key)
            value = at(data, key)
            if references and isinstance(value, str) and REFERENCE.search(value):
                if item["type"] not in NO_TEXT or references is True or references(value):
                    passed_over = True
                    continue
                remedy = f"{value} is text; ${{step.output}} may name a number"
            problems.append(str(SpecError(message, where=where(key), remedy=remedy)))
        if problems:
            raise SpecError("\n".join(dict.fromkeys(problems))) from None
        assert passed_over
        return None


def _read(path: Path) -> tuple[dict[str, Any], dict[KeyPath, int]]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = nearest_file(path)
        raise SpecError("there is no such file", where=str(path), remedy=f"did you mean {near}?" if near else
                        "`distlm init` writes one") from None
    except UnicodeDecodeError:
        raise SpecError("cannot be read: it is not UTF-8 text", where=str(path)) from None
    except OSError as error:
        raise SpecError(f"cannot be read: {error.strerror}", where=str(path)) from None
    return parse(text, str(path))


def nearest_file(path: Path) -> Path | None:
    """The spec file with the most similar name in the folder of `path`, or in this one where there is no such folder."""
    folder = path.parent if path.parent.is_dir() else Path(".")
    near = nearest(path.name, [p.name for p in folder.iterdir() if p.suffix in (".yaml", ".yml")])
    return folder / near if near else None


def parse(text: str, path: str = "spec") -> tuple[dict[str, Any], dict[KeyPath, int]]:
    """YAML 1.2 text to (data, line of each key path). Raises SpecError."""
    try:
        tree = YAML(typ="rt").load(text)
    except YAMLError as error:
        raise _not_yaml(error, path) from None
    except RecursionError:
        raise _too_deep(f"{path}:{_line_of_depth(text)}") from None
    if not isinstance(tree, CommentedMap):
        raise SpecError("the file is empty" if tree is None else "this is no mapping", where=path,
                        remedy="a spec is a mapping that begins with `kind:`")
    lines: dict[KeyPath, int] = {(): tree.lc.line + 1}

    def walk(node: Any, key: KeyPath) -> None:
        tag = getattr(getattr(node, "tag", None), "value", None)
        if tag is not None or not isinstance(node, (*SCALARS, CommentedMap, CommentedSeq)):
            raise SpecError(f"YAML's tags are not supported, and this is a {tag or type(node).__name__}",
                            where=f"{path}:{lines.get(key, 1)}: {dotted(key)}")
        if not isinstance(node, CommentedMap | CommentedSeq):
            return
        if len(key) >= MAX_DEPTH:                          # a section that holds itself has no end
            raise _too_deep(f"{path}:{lines.get(key, 1)}")
        numbers = node.lc.data or {}                       # what `<<` merges in has no line of its own
        for name, child in node.items() if isinstance(node, CommentedMap) else enumerate(node):
            place = (*key, name if isinstance(node, CommentedSeq) else str(name))
            lines[place] = numbers[name][0] + 1 if name in numbers else lines.get(key, 1)
            walk(child, place)

    walk(tree, ())
    return plain(tree), lines


def _too_deep(where: str) -> SpecError:
    return SpecError(f"sections and lists lie more than {MAX_DEPTH} deep", where=where, remedy="no key of a spec lies so deep")


def _line_of_depth(text: str) -> int:
    """The line in which sections and lists begin to lie too deep."""
    depth = 0
    for event in YAML(typ="rt").parse(io.StringIO(text)):
        depth += isinstance(event, CollectionStartEvent) - isinstance(event, CollectionEndEvent)
        if depth > MAX_DEPTH:
            return int(event.start_mark.line) + 1
    return 1


def _not_yaml(error: YAMLError, path: str) -> SpecError:
    if not isinstance(error, MarkedYAMLError):
        return SpecError(f"not valid YAML: {str(error).splitlines()[0]}", where=path)
    mark, start = error.problem_mark or error.context_mark, error.context_mark
    where = f"{path}:{mark.line + 1}" if mark else path
    problem = str(error.problem).split("\n")[0]
    if isinstance(error, DuplicateKeyError):
        name = re.search(r'duplicate key "(.*?)" with value', problem)
        return SpecError(f"the key {name.group(1) if name else ''} is given twice", where=where, remedy="keep one of them")
    if isinstance(error, ComposerError) and "another document" in problem:
        return SpecError("the file holds several documents", where=where, remedy="one spec a file")
    if "'\\t'" in problem:
        return SpecError("not valid YAML: a tab", where=where, remedy="indent with spaces")
    if mark and start and start.line != mark.line:
        problem += f", {error.context} that begins in line {start.line + 1}"
    hint = "is a space missing after a colon, or quotes around a text with a colon?" if "mapping values" in problem else ""
    return SpecError(f"not valid YAML: {problem}", where=where, remedy=hint)


def plain(value: Any) -> Any:
    """The same value in the built-in types."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return kind(value)
    return value.isoformat() if isinstance(value, datetime.date) else value


def _override(data: dict[str, Any], text: str) -> KeyPath:
    key, equals, value = text.partition("=")
    if not equals or not all(key.split(".")):
        raise SpecError(f"{text!r} is no override", where="--set", remedy="write key.path=value, e.g. --set optimizer.lr=0.001")
    try:
        parsed = plain(YAML(typ="safe").load(value)) if value else None
    except YAMLError as error:
        raise SpecError(f"{value!r} is not valid YAML: {getattr(error, 'problem', None) or error}", where=f"--set {key}") from None
    except RecursionError:
        raise _too_deep(f"--set {key}") from None
    return put(data, key, parsed)


def put(data: dict[str, Any], key: str, value: Any) -> KeyPath:
    """Set the dotted `key` in `data`, making sections on the way, and return its path. On each level the longest key that is there,
    and that may hold dots itself, is taken. Raises SpecError."""
    node: Any = data
    parts, done = key.split("."), 0
    path: KeyPath = ()
    while True:
        if isinstance(node, list):
            part = parts[done]
            if not part.isdigit() or int(part) >= len(node):
                raise SpecError(f"{part!r} is no place in a list of {len(node)}", where=f"--set {key}")
            place: Any = int(part)
            done += 1
        else:
            ends = range(len(parts), done, -1)
            end = next((end for end in ends if ".".join(parts[done:end]) in node), done + 1)
            place = ".".join(parts[done:end])
            done = end
        path = (*path, place)
        if done == len(parts):
            node[place] = value
            return path
        inner = node.get(place) if isinstance(node, dict) else node[place]
        if inner is None:
            inner = node[place] = {}
        elif not isinstance(inner, dict | list):
            raise SpecError(f"{dotted(path)} holds a value, {shown(inner)}, not a section", where=f"--set {key}")
        node = inner


def dump(spec: BaseModel) -> dict[str, Any]:
    """The spec as plain data, keys as they are written in YAML."""
    return spec.model_dump(mode="json", by_alias=True)


def leaves(data: Any, key: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    """Every (key path, value) of plain data; an empty section is a leaf."""
    if isinstance(data, dict) and data:
        for name, value in data.items():
            yield from leaves(value, (*key, name))
    elif isinstance(data, list) and any(isinstance(v, dict) for v in data):
        for i, value in enumerate(data):
            yield from leaves(value, (*key, i))
    else:
        yield key, data


def dotted(key: KeyPath) -> str:
    return ".".join(map(str, key))


def to_yaml(data: Any) -> str:
    """Plain data as YAML that `load_spec` reads back."""
    stream = io.StringIO()
    writer = YAML()
    writer.indent(mapping=2, sequence=4, offset=2)
    writer.width = 120
    writer.dump(data, stream)
    return stream.getvalue()


def _origin(key: KeyPath, origins: Mapping[KeyPath, str], path: str, data: Any) -> str:
    written = as_written(data, key)
    if written[-1] != key[-1]:                             # a short form has no place for it
        return "default"
    key = written
    if at(data, key) is None and not any(k[:len(key)] == key for k in origins):
        parent = next((key[:end] for end in range(len(key), 0, -1) if key[:end] in origins), ())
        value = at(data, parent) if parent else None
        return origins[parent] if parent and not isinstance(value, dict | list) else "default"
    for end in range(len(key), 0, -1):
        if key[:end] in origins:
            return origins[key[:end]]
    return path
