"""Counting documents and bytes through the steps, balancing the books, and keeping samples of what is rejected."""

import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distlm.errors import CorpusError
from distlm.storage import write_atomic

MAX_SAMPLES = 20
SAMPLE_CHARS = 200
Account = dict[str, int]


def account(documents: int = 0, size: int = 0) -> Account:
    return {"documents": documents, "bytes": size}


def add(to: Account, documents: int, size: int) -> None:
    to["documents"] += documents
    to["bytes"] += size


@dataclass
class Step:
    """One step's books: taken + added = given + rejected. Those of several tasks add up."""

    name: str
    taken: Account = field(default_factory=account)
    given: Account = field(default_factory=account)
    rejected: defaultdict[str, Account] = field(default_factory=lambda: defaultdict(account))
    added: Account = field(default_factory=account)
    """What the step made more of: the further parts of conversations that are split, with the turns that stand in several."""

    def reject(self, reason: str, documents: int, size: int) -> None:
        if documents or size:
            add(self.rejected[reason], documents, size)

    def merge(self, other: "Step") -> None:
        add(self.taken, **_named(other.taken))
        add(self.added, **_named(other.added))
        add(self.given, **_named(other.given))
        for reason, lost in other.rejected.items():
            self.reject(reason, **_named(lost))

    def data(self, parameters: dict[str, Any]) -> dict[str, Any]:
        """As the manifest has it."""
        added = {"added": self.added} if any(self.added.values()) else {}
        return {"name": self.name, "parameters": parameters, "in": self.taken, **added, "out": self.given,
                "rejected": {reason: self.rejected[reason] for reason in sorted(self.rejected)}}


def _named(value: Account) -> dict[str, int]:
    return {"documents": value["documents"], "size": value["bytes"]}


@dataclass
class Samples:
    """The first rejected records of each reason, in the order of the corpus' files."""

    kept: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def add(self, reason: str, sample: dict[str, Any]) -> bool:
        """Keep the sample if there are too few as yet. Returns whether it was kept."""
        samples = self.kept.setdefault(reason, [])
        if len(samples) < MAX_SAMPLES:
            samples.append(sample)
            return True
        return False

    def merge(self, others: Iterable["Samples"], order: tuple[str, ...]) -> None:
        """Take the first of all together; `order` names the fields that they are sorted by."""
        everything = [self, *others]
        for reason in sorted({reason for samples in everything for reason in samples.kept}):
            found = [sample for samples in everything for sample in samples.kept.get(reason, [])]
            self.kept[reason] = sorted(found, key=lambda sample: [sample[name] for name in order])[:MAX_SAMPLES]


def write_rejects(folder: Path, samples: Samples) -> None:
    """One file per reason, one JSON line per sample. Raises StorageError."""
    for reason, kept in samples.kept.items():
        write_atomic(folder / f"{reason}.jsonl", "".join(json.dumps(sample) + "\n" for sample in kept))


def check_balance(steps: list[dict[str, Any]], where: str) -> None:
    """Raises CorpusError unless, in documents and in bytes, in + added = out + rejected at every step, and each step takes in what the one
    before it gave out. What cleaning takes from documents that it keeps stands under `rejected` too, as bytes of no document. Tokenizing
    alone adds: conversations that are split become several documents, with the system turn in each."""
    def wrong(step: dict[str, Any], text: str) -> CorpusError:
        return CorpusError(f"the accounts do not balance: {text}", where=f"{where}: step {step['name']}", cause="internal",
                           remedy="a file has changed meanwhile, or this is a bug: prepare again")

    for i, step in enumerate(steps):
        for unit in ("documents", "bytes"):
            taken, added, given = step["in"][unit], step.get("added", {}).get(unit, 0), step["out"][unit]
            lost = sum(account[unit] for account in step["rejected"].values())
            if taken + added != given + lost:
                raise wrong(step, f"{taken:,} {unit} in, {f'{added:,} added, ' if added else ''}{given:,} out, {lost:,} rejected")
            if i and taken != steps[i - 1]["out"][unit]:
                raise wrong(step, f"{taken:,} {unit} in, but step {steps[i - 1]['name']} gave out {steps[i - 1]['out'][unit]:,}")


def check_sources(data: dict[str, Any], where: str) -> None:
    """Raises CorpusError unless the documents, bytes and tokens of all sources add up to those of each split, and what tokenizing gave out
    to those of all splits. A manifest from before they were counted has none."""
    sources = [source["splits"] for source in data.get("sources", []) if "splits" in source]
    for name, split in data["splits"].items() if sources else ():
        for unit in ("documents", "bytes", "tokens"):
            total = sum(source.get(name, {}).get(unit, 0) for source in sources)
            if total != split[unit]:
                raise CorpusError(f"the accounts do not balance: the sources have {total:,} {unit}, the split has {split[unit]:,}",
                                  where=f"{where}: split {name}", cause="internal", remedy="the manifest was changed, or this is a bug: "
                                                                                            "prepare again")
    for unit in ("documents", "bytes"):
        given = next((step["out"][unit] for step in data.get("steps", []) if step["name"] == "tokenize"), None)
        total = sum(split[unit] for split in data["splits"].values())
        if given not in (None, total):
            raise CorpusError(f"the accounts do not balance: the splits have {total:,} {unit}, step tokenize gave out {given:,}",
                              where=where, cause="internal", remedy="the manifest was changed, or this is a bug: prepare again")
