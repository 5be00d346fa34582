"""Where the documents come from: the files of a prepare job, in the ranges in which they are read, and the names of their records.

    inputs = Inputs(spec, files)
    inputs.join(facts)                                     # when all is read
    inputs.record(number, 7)                               # {"source": "texts/a.jsonl", "origin": 0, "record": 1007}
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distlm.corpus.files import TextFile, joint_xxh3, ranges
from distlm.corpus.identity import describe
from distlm.corpus.listing import write_documents
from distlm.corpus.manifest import rules_of
from distlm.corpus.partitions import read_row
from distlm.spec import PrepareSpec
from distlm.storage import write_atomic


@dataclass
class Inputs:
    """What is numbered is a range: a part of a file that one task reads, which of most files is the whole."""

    spec: PrepareSpec
    files: list[TextFile]
    ranges: list[TextFile] = field(init=False)
    firsts: list[int] = field(default_factory=list)
    """Of each range, the number of its first record in its file; known when all is read, as all below."""
    facts: list[dict[str, Any]] = field(default_factory=list)
    """Of each file: bytes, xxh3, documents, records."""
    sources: list[tuple[int, dict[str, Any]]] = field(default_factory=list)
    """As `describe` has them, each with its place in the spec."""
    origins: dict[int, int] = field(default_factory=dict)
    """Their places there, by those in the spec."""

    def __post_init__(self) -> None:
        self.ranges = [part for file in self.files for part in ranges(file)]

    def join(self, found: list[dict[str, Any]]) -> None:
        """Take in what was found of each range: number, bytes, xxh3, documents and records."""
        for part, fact in zip(self.ranges, sorted(found, key=lambda fact: fact["number"]), strict=True):
            if not part.begin:
                self.facts.append({"bytes": 0, "xxh3": [], "documents": 0, "records": 0})
            whole = self.facts[-1]
            self.firsts.append(whole["records"])
            for unit in ("bytes", "documents", "records"):
                whole[unit] += fact[unit]
            whole["xxh3"].append(fact["xxh3"])
        for whole in self.facts:
            whole["xxh3"] = joint_xxh3(whole["xxh3"])
        self.sources = describe(self.spec, self.files, {i: (fact["bytes"], fact["xxh3"]) for i, fact in enumerate(self.facts)})
        self.origins = {i: place for place, (i, _) in enumerate(self.sources)}

    def ranks(self, whole: list[int]) -> tuple[int, ...]:
        """Of each source, by its place in the spec: which of equal documents is kept. Those that are held out as a whole come first; then
        the rules decide, and files only among sources of the same, so that no source's share depends on how its documents lie in files."""
        rules = {i: rules_of(source) for i, source in self.sources}
        order = sorted({(i not in whole, rules[i]) for i in rules})
        return tuple(order.index((i not in whole, rules[i])) for i in sorted(rules))

    def file(self, file: TextFile) -> dict[str, Any]:
        """A file by its name, and by the place of its source in inputs.json, which tells apart files of one name."""
        return {"source": file.name, "origin": self.origins[file.source]}

    def record(self, number: int, record: int) -> dict[str, Any]:
        """A record of a range, by its number in its file."""
        return {**self.file(self.ranges[number]), "record": self.firsts[number] + record}

    def place(self, partition: Path, row: int) -> dict[str, Any]:
        """The record of a document of a partition."""
        found = read_row(partition, row, "file", "record")
        return self.record(found["file"], found["record"])

    def write(self, folder: Path, lists: Sequence[Path]) -> None:
        """Write sources.jsonl, every file that was read, and documents.parquet, of the lists of all partitions. Raises StorageError."""
        named = [self.file(part) for part in self.ranges]
        names, origins = [one["source"] for one in named], [one["origin"] for one in named]
        write_documents(folder / "documents.parquet", lists, names, origins, self.firsts)
        lines = [{"file": file["source"], "origin": file["origin"], **{key: fact[key] for key in ("bytes", "xxh3", "documents")}}
                 for file, fact in zip(map(self.file, self.files), self.facts, strict=True)]
        write_atomic(folder / "sources.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
