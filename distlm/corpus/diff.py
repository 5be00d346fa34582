"""What differs between two corpora, and why.

    differences = diff(a, b)                               # differences.rows() for a table; differences.only["a"].documents
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from distlm.corpus.inspect import source_row
from distlm.corpus.listing import FILE, open_documents
from distlm.corpus.manifest import Manifest, read_manifest
from distlm.errors import InputError

MAX_FIRST = 10
PARTS = ("code", "parameters", "sources", "tokenizer", "steps", "splits")
"""First what may be the reason, then what came of it."""


@dataclass(frozen=True)
class OnlyIn:
    """The documents that one of two corpora has alone."""

    documents: int = 0
    bytes: int = 0
    changed: int = 0
    """The other has a document of the same file of the same source, and of the same record, with another text."""
    no_file: int = 0
    """The other has not read this file."""
    not_kept: int = 0
    """The other has read the file, but rejected this document or kept a duplicate of it."""
    first: list[dict[str, Any]] = field(default_factory=list)
    """The first ten: hash, origin, source, record, id, bytes."""


@dataclass(frozen=True)
class Differences:
    """What differs between two corpora: (part, key, value in a, value in b), None where there is none."""

    values: list[tuple[str, str, Any, Any]]
    same_windows: bool
    """Equal tokens in equal order, of equal tokenizers: a training run is the same on both."""
    only: dict[str, OnlyIn]
    """`a` and `b`; empty where one of them has no documents.parquet."""
    moved: int = 0
    """Documents of both that are in another split."""

    def rows(self) -> list[tuple[str, str, str, str]]:
        """For a table: part, key, a, b. Reasons come before results."""
        rows = [(part, key, _shown(a), _shown(b)) for part, key, a, b in self.values]
        if self.only:
            for key in ("documents", "bytes", "changed", "no_file", "not_kept"):
                a, b = (getattr(self.only[side], key) for side in ("a", "b"))
                if a or b:
                    rows.append(("only in one", key.replace("_", " "), f"{a:,}", f"{b:,}"))
            if self.moved:
                rows.append(("in another split", "documents", f"{self.moved:,}", f"{self.moved:,}"))
        return rows


def diff(a: Path | str, b: Path | str) -> Differences:
    """What differs between two corpora, and why. Raises InputError where one is no complete corpus."""
    one, other = read_manifest(a), read_manifest(b)
    left, right = (_values(manifest) for manifest in (one, other))
    values = [(part, key, left.get((part, key)), right.get((part, key)))
              for part, key in sorted(left.keys() | right.keys(), key=lambda item: (_rank(item[0]), *item))
              if left.get((part, key)) != right.get((part, key))]
    tokens = [({name: [(shard.windows, shard.xxh3) for shard in split.shards] for name, split in manifest.splits.items()},
               manifest.data["tokenizer"]["hash"]) for manifest in (one, other)]
    only, moved = _compare_documents(one, other)
    return Differences(values, tokens[0] == tokens[1], only, moved)


def _values(manifest: Manifest) -> dict[tuple[str, str], Any]:
    """All that a diff compares, by part and dotted key."""
    data = manifest.data
    values: dict[tuple[str, str], Any] = {}
    for part, value in data.items():
        if part not in ("format", "name", "sources", "steps", "splits", "files", "inputs", "hash"):
            plain = part in ("context", "dtype", "seed")
            for key, leaf in _leaves(value, part if plain else ""):
                values["parameters" if plain else part, key] = leaf
    for name, source in zip(manifest.source_names, manifest.sources, strict=True):
        values["sources", name] = source_row(source)
    for step in data["steps"]:
        for side in ("in", "added", "out"):
            if side in step:
                values["steps", f"{step['name']}.{side}"] = _account(step[side])
        for reason, lost in step["rejected"].items():
            values["steps", f"{step['name']}.rejected.{reason}"] = _account(lost)
    for name, split in manifest.splits.items():
        for key in ("documents", "bytes", "tokens", "dropped_tokens", "windows", "padding_tokens", "repeated_tokens"):
            values["splits", f"{name}.{key}"] = getattr(split, key)
    return values


def _leaves(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            yield from _leaves(inner, f"{key}.{name}" if key else name)
    else:
        yield key, value


def _rank(part: str) -> int:
    return PARTS.index(part) if part in PARTS else len(PARTS)


def _account(account: dict[str, int]) -> str:
    return f"{account['documents']:,} documents, {account['bytes']:,} bytes"


def _shown(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return value if isinstance(value, str) else json.dumps(value)


def _compare_documents(one: Manifest, other: Manifest) -> tuple[dict[str, OnlyIn], int]:
    """What each has alone, and how many documents of both have another split."""
    if not all((manifest.path / FILE).is_file() for manifest in (one, other)):
        return {}, 0
    left, right = (_listed(manifest) for manifest in (one, other))
    places = pc.index_in(left["text_hash"], right["text_hash"])
    both = pc.is_valid(places)
    moved = pc.sum(pc.not_equal(left["split"].filter(both), right["split"].take(places.filter(both)))).as_py() or 0
    return {"a": _only(left, right, one, other), "b": _only(right, left, other, one)}, moved


def _listed(manifest: Manifest) -> pa.Table:
    columns, file = ["hash", "text_hash", "origin", "source", "record", "id", "split", "bytes"], open_documents(manifest.path)
    if missing := [name for name in columns if name not in file.schema_arrow.names]:
        raise InputError(f"{FILE} has no {' and no '.join(missing)}", where=str(manifest.path),
                         remedy="an earlier distlm has made the corpus: remove it and prepare it again")
    return file.read(columns).combine_chunks()


def _only(mine: pa.Table, theirs: pa.Table, own: Manifest, other: Manifest) -> OnlyIn:
    alone = mine.filter(pc.invert(pc.is_in(mine["text_hash"], theirs["text_hash"])))
    if not len(alone):
        return OnlyIn()
    paired = _paired(own.sources, other.sources)
    alone = alone.append_column("theirs", pa.array(paired, pa.int32()).take(alone["origin"]))
    same_place = pc.is_in(_joined(alone, "theirs", "source", "record"), _joined(theirs, "origin", "source", "record"))
    listed = other.path / "sources.jsonl"
    files = pa.Table.from_pylist([json.loads(line) for line in listed.read_text().splitlines()]) if listed.is_file() else \
        theirs.rename_columns({"source": "file"})
    no_file = pc.invert(pc.is_in(_joined(alone, "theirs", "source"), _joined(files, "origin", "file")))
    changed, missing = (pc.sum(mask).as_py() or 0 for mask in (same_place, no_file))
    first = alone.select(["hash", "origin", "source", "record", "id", "bytes"]).slice(0, MAX_FIRST).to_pylist()
    return OnlyIn(len(alone), pc.sum(alone["bytes"]).as_py(), changed, missing, len(alone) - changed - missing,
                  [{**row, "hash": row["hash"].hex()} for row in first])


def _paired(mine: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> list[int]:
    """Of each source, the place of the same one in the other corpus, -1 where there is none: of one name, first those of equal files, then
    in their order."""
    found, free = [-1] * len(mine), [*range(len(theirs))]
    for keys in (("name", "xxh3"), ("name",)):
        for place in (place for place, other in enumerate(found) if other < 0):
            alike = [i for i in free if all(theirs[i][key] == mine[place][key] for key in keys)]
            if alike:
                found[place] = alike[0]
                free.remove(alike[0])
    return found


def _joined(table: pa.Table, *columns: str) -> pa.ChunkedArray:
    """Several columns as one text."""
    return pc.binary_join_element_wise(*(pc.cast(table[name], pa.string()) for name in columns), "\0")
