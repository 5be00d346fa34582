"""What a corpus is made of: `manifest.json`, written last, so that a folder without one is no corpus.

    manifest = read_manifest(storage.corpus("stdlib"))
    manifest.splits["train"].shards[0].file            # "train/00000.arrow"
    manifest.sources[0]["name"]                        # out of inputs.json

The manifest says what the corpus holds and by which rules, and has the checksums of the shards and the tokenizer: the same documents give
the same manifest, however they lie in files. What names those files stands in `inputs.json`: the sources, and the checksums of all files
of the corpus that say where a document came from.

A shard is an Arrow IPC file of one record batch: `tokens`, fixed_size_list<uint16 | uint32>[context + 1], and `starts`,
list<int32>, the positions in the window at which a document begins. A window begins with the last token of the one before it.

Where documents were packed by best-fit, `starts` are the positions at which a document or a piece of one begins; beside them stand
`documents`, list<int64>, the number of each in its split, `offsets`, list<int64>, the place in the document at which the piece begins,
and `filled`, int32, the tokens of the window that are no padding. Where the documents are conversations there is `loss` too,
fixed_size_list<bool>[context + 1], which tokens give loss. Where they have labels each has a window of its own, and beside these columns
stands `labels`, list<int32>, the places of its labels in the names that the manifest lists.
"""

import functools
import hashlib
import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from distlm.corpus.accounts import check_balance, check_sources
from distlm.corpus.conversations import LONGER
from distlm.errors import CorpusError, InputError, StorageError
from distlm.storage import read_json, write_json

FORMAT = 1
FILE = "manifest.json"
INPUTS = "inputs.json"
CHANGED = "its hash is not that of what it says: it has been changed"
OF_FILES = ("name", "files", "bytes", "xxh3")
"""What of a source is that of its files; the rest are the rules that its documents pass, and what of them is in each split."""
FILES = ("sources.jsonl", "documents.parquet", "duplicates.jsonl", "report.html", "tokenizer", "rejects")
"""What else a corpus folder holds beside its shards: files, and folders of files."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
                   "vocab.json", "merges.txt", "tokenizer.model")
"""What is taken from a given tokenizer's folder, and may lie in a corpus' own."""


@dataclass(frozen=True)
class Shard:
    """One file of windows."""

    file: str
    """Relative to the corpus folder."""
    windows: int
    bytes: int
    xxh3: str
    """XXH3-64 of the file, in hexadecimal."""


@dataclass(frozen=True)
class Split:
    """What went into the training or the validation windows."""

    documents: int
    bytes: int
    """UTF-8 bytes of the documents' cleaned text."""
    tokens: int
    """Tokens of all documents, each with its end token."""
    dropped_tokens: int
    """Those at the end that fill no window."""
    windows: int
    shards: tuple[Shard, ...]
    padding_tokens: int = 0
    """Those that fill up windows; none where documents follow each other."""
    repeated_tokens: int = 0
    """Of best-fit: those with which a further piece of a document begins, which end the piece before."""
    rejected: dict[str, int] = field(default_factory=dict)
    """Documents of the split that became no tokens, by reason."""

    def why_empty(self, labelled: bool = False) -> tuple[str, str]:
        """(why the split has no window, what helps). `labelled`: whether documents have labels."""
        if self.documents or not self.rejected:
            return f"the split has {self.documents:,} documents of {self.tokens:,} tokens", "a larger split.val_fraction"
        lost = ", ".join(f"{count:,} {reason}" for reason, count in self.rejected.items())
        return (f"every document of the split was rejected when it became tokens ({lost})",
                (f"{'labels.too_long: cut' if labelled else 'conversations.too_long: split'}, a larger context or "
                 if LONGER in self.rejected else "") + "a larger split.val_fraction")


@dataclass(frozen=True)
class Manifest:
    """The manifest of a complete corpus. `data` holds it as it is on disk."""

    path: Path
    """The corpus folder."""
    name: str
    context: int
    dtype: str
    """uint16 or uint32."""
    seed: int
    vocab_size: int
    eos_id: int
    splits: dict[str, Split]
    """`train` and `val`."""
    data: dict[str, Any]

    @property
    def tokenizer(self) -> Path:
        """The folder of the tokenizer, as transformers loads it."""
        return self.path / "tokenizer"

    @property
    def best_fit(self) -> bool:
        """Whether documents were packed by best-fit, or have labels and a window each, which the shards have in the same way."""
        return "pack" in self.data

    @property
    def conversations(self) -> bool:
        """Whether the documents are conversations, of which some tokens give loss."""
        return "conversations" in self.data

    @property
    def pairs(self) -> bool:
        """Whether every window holds two conversations: a prompt with the better and with the worse of two answers."""
        return "pairs" in self.data.get("conversations", {})

    @property
    def ends(self) -> tuple[int, ...]:
        """Tokens that end an answer, where the template of conversations writes one behind each: the end token, and that one. None for
        texts, and for conversations from before the manifest told."""
        end = self.data.get("conversations", {}).get("end_id")
        return () if end is None else (self.eos_id, end)

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels that documents have, by their numbers; none where the corpus is not for classification."""
        return tuple(self.data.get("labels", {}).get("names", ()))

    @property
    def multiple_labels(self) -> bool:
        """Whether a document may have any number of labels."""
        return bool(self.data.get("labels", {}).get("multiple"))

    @property
    def cleaning(self) -> list[dict[str, Any]]:
        """The rules of `clean` that documents passed, of each group of sources; none where the manifest does not tell."""
        job = self.data.get("parameters", {}).get("clean")
        return [] if job is None else [{**job, **source.get("clean", {})} for source in self.data["sources"]]

    @property
    def cuts(self) -> bool:
        """Whether documents with labels that were longer than a window are there with their beginning, and were not rejected."""
        return self.data.get("parameters", {}).get("labels", {}).get("too_long") == "cut"

    @functools.cached_property
    def inputs(self) -> dict[str, Any]:
        """What inputs.json says; empty for a corpus from before there was one. Raises CorpusError, also for one that is not as it was
        written."""
        if "inputs" not in self.data:
            return {}
        where, remedy = str(self.path / INPUTS), "restore it from a copy, or prepare the corpus again"
        try:
            found = read_json(self.path / INPUTS)
            for key, kind in (("sources", list), ("files", dict)):
                if not isinstance(found[key], kind):
                    raise TypeError(f"{key} is a {type(found[key]).__name__}")
        except (KeyError, TypeError, StorageError) as error:
            raise CorpusError(f"the list of inputs is damaged: {type(error).__name__} {error}", where=where, remedy=remedy) from None
        if body_hash(found) != found.get("hash"):
            raise CorpusError(CHANGED, where=where, remedy=remedy)
        if found.get("corpus") != self.data.get("hash"):
            raise CorpusError("it is of another corpus", where=where, remedy=remedy)
        return dict(found)

    @functools.cached_property
    def sources(self) -> list[dict[str, Any]]:
        """Of each source, by the place that `origin` gives elsewhere: its rules, its name, the number, bytes and hash of its files, and
        what of it is in each split. Raises CorpusError."""
        if "inputs" not in self.data:
            return list(self.data.get("sources", []))
        try:
            return [{**{key: value for key, value in self.data["sources"][source["rules"]].items() if key != "splits"},
                     **{key: value for key, value in source.items() if key != "rules"}} for source in self.inputs["sources"]]
        except (LookupError, TypeError, AttributeError) as error:
            raise CorpusError(f"the list of inputs is damaged: {type(error).__name__} {error}", where=str(self.path / INPUTS),
                              remedy="restore it from a copy, or prepare the corpus again") from None

    @property
    def checksums(self) -> dict[str, str]:
        """XXH3-64 of every file that is no shard, by its name in the corpus folder; none for a corpus from before there were."""
        return {**self.data.get("files", {}), **self.inputs.get("files", {})}

    @property
    def source_names(self) -> list[str]:
        """Of each source, by its place; of several of one name the second is called `name (2)`."""
        names, seen = list[str](), Counter[str]()
        for source in self.sources:
            name = source["name"]
            seen[name] += 1
            names.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
        return names

    def files(self, split: str) -> list[Path]:
        """The shard files of a split, in order."""
        return [self.path / shard.file for shard in self.splits[split].shards]


def read_manifest(path: Path | str) -> Manifest:
    """The manifest of the corpus in folder `path`. Raises InputError where there is no complete corpus, CorpusError for a manifest
    that cannot be understood or is not as it was written."""
    path = Path(path)
    if not (path / FILE).is_file():
        raise InputError("there is no complete corpus: manifest.json is missing", where=str(path),
                         remedy="prepare it, or go on with --resume where its job has failed" if path.is_dir() else
                         "check the name, or prepare it")
    try:
        data = read_json(path / FILE)
        if data["format"] != FORMAT:
            raise CorpusError(f"format {data['format']} is not {FORMAT}", where=str(path / FILE), remedy="prepare the corpus again")
        if "hash" in data and body_hash(data) != data["hash"]:
            raise CorpusError(CHANGED, where=str(path / FILE), remedy="restore it from a copy, or prepare the corpus again")
        return manifest_of(path, data)
    except (KeyError, TypeError, AttributeError, StorageError) as error:
        raise CorpusError(f"the manifest is damaged: {type(error).__name__} {error}", where=str(path / FILE),
                          remedy="prepare the corpus again") from None


def manifest_of(path: Path, data: dict[str, Any]) -> Manifest:
    """What the manifest of the corpus in folder `path` says."""
    splits = {name: Split(split["documents"], split["bytes"], split["tokens"], split["dropped_tokens"], split["windows"],
                          tuple(Shard(**shard) for shard in split["shards"]), split.get("padding_tokens", 0),
                          split.get("repeated_tokens", 0), split.get("rejected", {})) for name, split in data["splits"].items()}
    return Manifest(path, data["name"], data["context"], data["dtype"], data["seed"], data["tokenizer"]["vocab_size"],
                    data["tokenizer"]["eos_id"], splits, data)


def manifest_hash(path: Path | str) -> str:
    """The SHA-256 of the manifest file, which stands for the whole corpus. Raises InputError where there is none."""
    file = Path(path) / FILE
    if not file.is_file():
        raise InputError("there is no complete corpus: manifest.json is missing", where=str(path), remedy="prepare it")
    return hashlib.sha256(file.read_bytes()).hexdigest()


def write_manifest(path: Path, data: dict[str, Any]) -> None:
    """Make the folder a corpus: balance the accounts, then write inputs.json and the manifest with the checksums of all other files and of
    themselves, whole or not at all. `data`: what the manifest says, with all of the sources. Raises CorpusError, StorageError."""
    check_balance(data["steps"], str(path))
    check_sources(data, str(path))
    checksums = {str(file.relative_to(path)): file_xxh3(file) for file in other_files(path)}
    own = {name: checksum for name, checksum in checksums.items() if name.startswith("tokenizer/")}
    rules, sources = grouped(data.get("sources", []))
    data = {**data, "sources": rules, "format": FORMAT, "files": own, "inputs": INPUTS}
    data["hash"] = body_hash(data)
    inputs = {"corpus": data["hash"], "sources": sources, "files": {name: checksums[name] for name in checksums if name not in own}}
    write_json(path / INPUTS, {**inputs, "hash": body_hash(inputs)})
    write_json(path / FILE, data)


def rules_of(source: dict[str, Any]) -> str:
    """The rules that a source's documents pass, by which sources are grouped and ordered."""
    return json.dumps({key: value for key, value in source.items() if key not in (*OF_FILES, "splits")}, sort_keys=True)


def grouped(sources: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(the rules that there are, each with what its sources have together in each split; the sources without them, each with the place of
    its rules): how the manifest and inputs.json have the sources. It is the same to the manifest whether documents of the same rules are
    one source or several."""
    names = sorted(set(map(rules_of, sources)))
    groups: list[dict[str, Any]] = [json.loads(name) for name in names]
    entries = []
    for source in sources:
        place = names.index(rules_of(source))
        entries.append({key: source[key] for key in (*OF_FILES, "splits") if key in source} | {"rules": place})
        for split, counts in source.get("splits", {}).items():
            total = groups[place].setdefault("splits", {}).setdefault(split, dict.fromkeys(counts, 0))
            for unit, count in counts.items():
                total[unit] += count
    return groups, entries


def other_files(path: Path) -> list[Path]:
    """The files of a corpus folder that are no shards, by their names."""
    found = [path / name for name in FILES]
    return sorted(file for one in found for file in (one.rglob("*") if one.is_dir() else [one]) if file.is_file())


def body_hash(data: dict[str, Any]) -> str:
    """SHA-256 of all that a manifest says but this hash, however it is written."""
    body = json.loads(json.dumps({key: value for key, value in data.items() if key != "hash"}))
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def outputs(manifest: Manifest) -> dict[str, Any]:
    """What a prepare job hands to the jobs that follow."""
    splits = manifest.splits
    rejected = Counter[str]()                              # one reason may be that of several steps
    for step in manifest.data["steps"]:
        rejected.update({reason: lost["documents"] for reason, lost in step["rejected"].items() if lost["documents"]})
    conversations = manifest.data.get("conversations", {})
    totals = {unit: sum(getattr(split, unit) for split in splits.values()) for unit in ("documents", "bytes", "tokens")}
    units = ("tokens", "bytes", "windows", *(("padding_tokens",) if manifest.best_fit else ()))
    return {"": str(manifest.path), **totals,
            **{f"{name}_{unit}": getattr(split, unit) for unit in units for name, split in splits.items()},
            **({"padding_share": manifest.data["pack"]["padding_share"]} if manifest.best_fit else {}),
            **{key: value for key, value in conversations.items() if key not in ("loss", "end_id")}, "vocab_size": manifest.vocab_size,
            "rejected": sum(rejected.values()), **{f"rejected.{reason}": count for reason, count in sorted(rejected.items())},
            "manifest_hash": manifest_hash(manifest.path)}


def file_xxh3(path: Path, begin: int = 0, end: int | None = None) -> str:
    """XXH3-64 of a file, or of a range of its bytes, in hexadecimal."""
    digest = xxhash.xxh3_64()
    with open(path, "rb") as file:
        file.seek(begin)
        while block := file.read(1 << 20 if end is None else min(1 << 20, end - file.tell())):
            digest.update(block)
    return digest.hexdigest()


def tokenizer_hash(folder: Path) -> str:
    """SHA-256 over the names and contents of a tokenizer's files, whatever else lies in its folder: a model's weights may."""
    digest = hashlib.sha256()
    for name in sorted(TOKENIZER_FILES):
        if (folder / name).is_file():
            content = (folder / name).read_bytes()
            digest.update(f"{name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()
