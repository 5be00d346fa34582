"""Which corpus a spec and its files make: what the manifest says of both, by which a complete corpus is known again."""

import importlib
import json
import os
from pathlib import Path
from typing import Any

import xxhash

from distlm import __version__
from distlm.corpus.decontaminate import Evaluations
from distlm.corpus.files import TextFile, joint_xxh3, ranges
from distlm.corpus.manifest import FILE, file_xxh3, tokenizer_hash
from distlm.corpus.verify import verify
from distlm.errors import DistlmError
from distlm.spec.load import dump
from distlm.spec.prepare import PrepareSpec, Source


def is_complete(spec: PrepareSpec, rules: dict[str, Any], folder: Path, files: list[TextFile]) -> bool:
    """Whether the folder holds what this job would make: same rules, same code, same contents, and every shard whole."""
    if not (folder / FILE).exists() or not all(file.store or os.path.isfile(file.path) for file in files):
        return False
    try:
        manifest = verify(folder)
    except (DistlmError, OSError):
        return False
    data = manifest.data
    if (data["name"], data["code"], data["parameters"]) != (spec.name, __version__, rules) or \
            sum(source["bytes"] for source in manifest.sources) != sum(file.bytes for file in files):
        return False
    try:                                                   # a store that fails says nothing about the corpus: its error goes on
        facts = {n: (file.bytes, _content_xxh3(file)) for n, file in enumerate(files)}
    except OSError:
        return False
    described = [{key: value for key, value in source.items() if key != "splits"} for source in manifest.sources]
    return described == [source for _, source in describe(spec, files, facts)]


def parameters(spec: PrepareSpec, evaluations: Evaluations | None) -> dict[str, Any]:
    """All of the spec that decides what the corpus holds beside the files' contents: no name, no path, no number of workers."""
    data = dump(spec)
    own = {"chat_template": spec.tokenizer.chat_template} if spec.tokenizer.chat_template else {}
    tokenizer = {"from": tokenizer_hash(Path(spec.tokenizer.source).expanduser()), **own} if spec.tokenizer.source else \
        {key: value for key, value in data["tokenizer"].items() if key != "from"} | {"train": spec.tokenizer.train or "bpe"}
    contents = _contents(data["filter"])
    if spec.decontaminate and evaluations:
        data["decontaminate"]["against"] = sorted(spec.decontaminate.against)
        contents["evaluations"] = evaluations.hash()
    return {key: data[key] for key in ("clean", "filter", "decontaminate", "dedup", "split", "context", "shard_windows", "seed")} | \
        {"tokenizer": tokenizer} | ({"contents": contents} if contents else {}) | \
        ({"pack": {"method": "best_fit"}} if spec.padded and not spec.labels else {}) | \
        ({"labels": {key: value for key, value in data["labels"].items() if value is not None}} if spec.labels else {}) | \
        ({"conversations": data["conversations"]} if spec.conversations else {})


def attempt_hash(spec: PrepareSpec, rules: dict[str, Any], files: list[TextFile]) -> str:
    """What stands for an attempt at these rules and ranges of files, by all that decides what its stages write."""
    found = [(file.place, file.format, file.bytes, file.modified, file.license, file.begin) for file in files]
    sources = [source.model_dump() for source in spec.sources]
    return xxhash.xxh3_64_hexdigest(json.dumps([__version__, rules, sources, found]).encode())


def describe(spec: PrepareSpec, files: list[TextFile], facts: dict[int, tuple[int, str]]) -> list[tuple[int, dict[str, Any]]]:
    """The `sources` of a corpus, in an order that does not depend on that of the spec: of each its place in the spec, and what it is, with
    the number, bytes and joint hash of its files."""
    sources = []
    for i, source in enumerate(spec.sources):
        digest, count, size, name = xxhash.xxh3_128(), 0, 0, ""
        for n, file in enumerate(files):
            if file.source == i:
                digest.update(json.dumps([file.name, *facts[n], *([file.license] if file.code else [])]).encode())
                count, size, name = count + 1, size + facts[n][0], file.name.split("/")[0]
        first = next(n for n, file in enumerate(files) if file.source == i)      # tells apart what is equal
        sources.append((first, i, {"name": name, "format": source.format, "text_key": source.text_key, "id_key": source.id_key,
                                   "keep": list(source.keep), "files": count, "bytes": size, "xxh3": digest.hexdigest(), **_own(source)}))
    return [(i, source) for _, i, source in sorted(sources, key=lambda one: (json.dumps(one[2]), one[0]))]


def _contents(filters: dict[str, Any]) -> dict[str, str]:
    """Hashes of what the filters name by its place, which is another on other hosts, and is taken out."""
    contents: dict[str, str] = {}
    if (filters.get("language") or {}).get("model"):
        contents["language"] = file_xxh3(Path(filters["language"].pop("model")).expanduser())
    if filters.get("function"):
        contents["function"] = file_xxh3(Path(importlib.import_module(filters["function"].split(":")[0]).__file__ or os.devnull))
    return contents


def _own(source: Source) -> dict[str, Any]:
    """The rules that a source has of its own, as `parameters` has those of the job."""
    data = dump(source)
    own = {key: data[key] for key in ("code", "split", "clean", "filter") if data[key]}
    if source.weight < 1:
        own["weight"] = source.weight
    return own | ({"contents": contents} if (contents := _contents(own.get("filter", {}))) else {})


def _content_xxh3(file: TextFile) -> str:
    if file.store is None:
        return joint_xxh3([file_xxh3(Path(file.path), part.begin, part.end) for part in ranges(file)])
    digest = xxhash.xxh3_64()
    for block in file.store.read(file.path):
        digest.update(block)
    return digest.hexdigest()
