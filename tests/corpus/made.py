"""Corpora made in place, without Ray: documents in, a whole corpus folder out, with documents.parquet and samples of rejects."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from distlm.corpus.listing import DOCUMENTS
from distlm.corpus.manifest import tokenizer_hash, write_manifest
from distlm.corpus.pack import num_windows, shard_bytes
from distlm.corpus.split import SplitRule, document_hash
from distlm.corpus.tokenizer import VocabularyTask, make_tokenizer
from distlm.spec.prepare import Tokenizer


@dataclass(frozen=True)
class Doc:
    """A document that is kept, in the order of the corpus."""

    text: str
    source: str = "data/a.jsonl"
    record: int = 0
    id: str = ""
    split: str = "train"
    meta: dict[str, Any] = field(default_factory=dict)
    reasons: tuple[str, ...] = ()
    origin: int = 0
    cleaned: str = ""
    """The text before lines or paragraphs left it, where some did."""


def make(folder: Path, docs: list[Doc], *, context: int = 16, shard_windows: int = 4, steps: list[dict[str, Any]] | None = None,
         with_documents: bool = True, **more: Any) -> Path:
    """A corpus of the bytes tokenizer; `more` are further keys of the manifest."""
    for name in ("tokenizer", "train", "val"):
        (folder / name).mkdir(parents=True)
    vocabulary = make_tokenizer(VocabularyTask(Tokenizer(train="bytes"), [], SplitRule(0), folder / "tokenizer"))
    splits: dict[str, dict[str, Any]] = {}
    for split in ("train", "val"):
        mine = [doc for doc in docs if doc.split == split]
        arrays = [np.array([*(byte + 4 for byte in doc.text.encode()), vocabulary.eos_id], np.uint16) for doc in mine]
        tokens = np.concatenate([*arrays, np.zeros(0, np.uint16)])
        starts = np.cumsum([0, *map(len, arrays)])[:-1]
        windows, dropped = num_windows(len(tokens), context)
        shards = []
        for i, first in enumerate(range(0, windows, shard_windows)):
            count = min(shard_windows, windows - first)
            data = shard_bytes(tokens[first * context:(first + count) * context + 1], starts - first * context, count, context, "uint16")
            (folder / split / f"{i:05d}.arrow").write_bytes(data)
            shards.append({"file": f"{split}/{i:05d}.arrow", "windows": count, "bytes": len(data), "xxh3": xxhash.xxh3_64_hexdigest(data)})
        splits[split] = {"documents": len(mine), "bytes": sum(len(doc.text.encode()) for doc in mine), "tokens": len(tokens),
                         "dropped_tokens": dropped, "windows": windows, "shards": shards}
    if with_documents:
        rows = [{"hash": document_hash(doc.cleaned or doc.text), "text_hash": document_hash(doc.text), "origin": doc.origin,
                 "source": doc.source, "record": doc.record, "id": doc.id,
                 "meta": json.dumps(doc.meta) if doc.meta else "", "split": doc.split, "bytes": len(doc.text.encode()),
                 "tokens": len(doc.text.encode()) + 1, "reasons": list(doc.reasons)} for doc in docs]
        pq.write_table(pa.Table.from_pylist(rows, DOCUMENTS), folder / "documents.parquet")
    files = sorted({(doc.source, doc.origin) for doc in docs})
    (folder / "sources.jsonl").write_text("".join(json.dumps({"file": name, "origin": origin}) + "\n" for name, origin in files))
    write_manifest(folder, {
        "name": folder.name, "context": context, "dtype": "uint16", "seed": 0,
        "sources": [{"name": "data", "format": "auto", "text_key": "text", "files": len(files), "bytes": 100, "xxh3": "00"}],
        "steps": steps or [], "tokenizer": {"kind": "bytes", "vocab_size": vocabulary.size, "eos_id": 0,
                                            "hash": tokenizer_hash(folder / "tokenizer")},
        "split": {"val_fraction": 0.1}, "splits": splits, "code": "0.1.0", **more})
    return folder


def step(name: str, taken: tuple[int, int], given: tuple[int, int], **rejected: tuple[int, int]) -> dict[str, Any]:
    """A step of the manifest; pairs are (documents, bytes)."""
    def account(pair: tuple[int, int]) -> dict[str, int]:
        return {"documents": pair[0], "bytes": pair[1]}

    return {"name": name, "parameters": {}, "in": account(taken), "out": account(given),
            "rejected": {reason: account(pair) for reason, pair in rejected.items()}}


STEPS = [step("read", (9, 900), (8, 850), malformed=(1, 30), markup=(0, 20)),
         step("filter", (8, 850), (3, 400), short=(2, 250), long=(1, 150), odd=(1, 20), bare=(1, 30))]
DOCS = [Doc("The quick brown fox jumps over the lazy dog.", id="fox", record=3, meta={"url": "https://example.com", "n": 1}),
        Doc("größer 你好 🤷🏽 end", id="wide", source="data/b.txt", split="val"), Doc("a", id="one"), Doc("", id="none"),
        Doc("Twice upon a time, a fox sat here and read for a long while, longer than a window is.", id="fox", record=4,
            reasons=("short", "odd")), Doc("val " * 12, id="v", split="val"), Doc("The end of it all, which fills no window", id="last")]
