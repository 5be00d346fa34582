"""Looking into a corpus: what it holds and went through, and its documents and windows as text.

    summary(path)                                          # rows of (what, value), for a table
    documents(path, ["doc-17"]), windows(path, "val", first=3), find(path, "Brown", limit=5)

Everything is read in bounded pieces, and every shard that is read is checked against the manifest.
"""

import bisect
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from distlm.corpus.decode import Decoder
from distlm.corpus.listing import FILE, open_documents
from distlm.corpus.manifest import read_manifest
from distlm.errors import InputError
from distlm.spec.load import nearest

BATCH_ROWS = 1 << 16
CHUNK_TOKENS = 1 << 14
EXCERPT_CHARS = 60
MAX_REASONS = 3
MAX_LABELS = 20


@dataclass(frozen=True)
class Document:
    """A document of a corpus, as documents.parquet has it, with its text."""

    id: str
    hash: str
    """BLAKE2b-128 of the text as it was cleaned, in hexadecimal: without boilerplate and repeated paragraphs it may be shorter."""
    source: str
    record: int
    split: str
    bytes: int
    tokens: int
    meta: dict[str, Any]
    reasons: list[str]
    text: str
    whole: bool
    """False where the end of the text lies behind the last window of the split, among the dropped tokens."""
    shown: str = ""
    """Of a conversation, the text with its end, what gives loss between ⟦ and ⟧."""
    part: int = 0
    """Of a conversation that was split, which of its parts this is, from 1; else 0."""


@dataclass(frozen=True)
class Window:
    """A window of a split, decoded."""

    split: str
    number: int
    starts: list[int]
    """The places in the window at which a document begins, or, of best-fit, a piece of one."""
    text: str
    """Without the padding behind it."""
    padding: int = 0
    """Tokens that fill the window up."""
    shown: str = ""
    """Of conversations, the text with what gives loss between ⟦ and ⟧."""


@dataclass(frozen=True)
class Match:
    """Where a text was found."""

    split: str
    window: int
    """The one in which it begins."""
    excerpt: str


def summary(path: Path | str) -> list[tuple[str, str]]:
    """Rows of (what, value). Raises InputError where there is no complete corpus."""
    manifest = read_manifest(path)
    data, splits = manifest.data, manifest.splits
    size, tokens = (sum(getattr(split, key) for split in splits.values()) for key in ("bytes", "tokens"))
    rows = [("corpus", manifest.name), ("documents", f"{sum(split.documents for split in splits.values()):,}"), ("bytes", f"{size:,}"),
            ("tokens", f"{tokens:,}"), ("bytes per token", f"{size / tokens:.2f}" if tokens else "–")]
    for name, split in splits.items():
        dropped = f", {split.dropped_tokens:,} tokens fill none" if split.dropped_tokens else ""
        padding = f", {split.padding_tokens:,} tokens of padding" if manifest.best_fit else ""
        rows.append((f"split {name}", f"{split.documents:,} documents, {split.bytes:,} bytes, {split.tokens:,} tokens, "
                                      f"{split.windows:,} windows in {len(split.shards):,} shards{dropped}{padding}"))
    for step in data["steps"]:
        lost = sorted(((reason, taken["documents"]) for reason, taken in step["rejected"].items() if taken["documents"]),
                      key=lambda item: (-item[1], item[0]))
        top = ", ".join(f"{count:,} {reason}" for reason, count in lost[:MAX_REASONS])
        rest = sum(count for _, count in lost[MAX_REASONS:])
        rows.append((f"step {step['name']}", f"{step['in']['documents']:,} → {step['out']['documents']:,} documents, "
                                             f"{step['in']['bytes']:,} → {step['out']['bytes']:,} bytes"
                     + (f"; {step['added']['documents']:,} more by splitting" if "added" in step else "")
                     + (f"; {top}" if top else "") + (f", {rest:,} others" if rest else "")))
    rows += [("tokenizer", f"{data['tokenizer']['kind']}, {manifest.vocab_size:,} tokens, {manifest.dtype}, end {manifest.eos_id}"),
             ("context", f"{manifest.context:,}"), ("seed", str(manifest.seed))]
    if manifest.conversations:
        told = data["conversations"]
        rows.append(("loss", f"{told['loss']}: {told['loss_share']:.2%} of the tokens give loss"))
    if manifest.labels:
        counts = data["labels"]["train"]
        shown = ", ".join(f"{name} {counts[name]:,}" for name in manifest.labels[:MAX_LABELS])
        rows.append(("labels", f"{len(counts):,}: {shown}{', ...' if len(counts) > MAX_LABELS else ''} in train"))
    if manifest.best_fit:
        method = "a document a window" if manifest.labels else "a pair of answers a window" if manifest.pairs else "best-fit"
        rows.append(("packing", f"{method}, {data['pack']['padding_share']:.2%} of the windows are padding"))
    rows += [(f"source {name}", source_row(source)) for name, source in zip(manifest.source_names, manifest.sources, strict=True)]
    return rows


def documents(path: Path | str, ids: Sequence[str]) -> list[Document]:
    """The documents of these ids or content hashes (hexadecimal), in the order of the corpus; of an id that several have, all.

    Raises InputError for one that no document has, CorpusError for a damaged shard."""
    manifest = read_manifest(path)
    file = open_documents(manifest.path)
    hashes = [bytes.fromhex(key) for key in ids if len(key) == 32 and set(key) <= set("0123456789abcdef")]
    rows, numbers = list[dict[str, Any]](), list[int]()
    seen = dict.fromkeys(manifest.splits, 0)
    some = list[str]()
    for batch in file.iter_batches(BATCH_ROWS):
        some = some or [key for key in batch["id"].slice(0, 1000).to_pylist() if key]
        chosen = pc.or_(pc.is_in(batch["id"], pa.array(list(ids), pa.string())), pc.is_in(batch["hash"], pa.array(hashes, pa.binary(16))))
        places = np.flatnonzero(chosen.to_numpy(zero_copy_only=False))
        splits = np.asarray(batch["split"].to_pylist(), object)
        rows += batch.take(pa.array(places)).to_pylist()
        numbers += [seen[splits[place]] + int((splits[:place] == splits[place]).sum()) for place in places]
        for name in seen:
            seen[name] += int((splits == name).sum())
    known = {row["id"] for row in rows} | {row["hash"].hex() for row in rows}
    if missing := [key for key in ids if key not in known]:
        near = nearest(missing[0], some)
        raise InputError(f"no document has the id or hash {', '.join(missing)}", where=str(manifest.path),
                         remedy=f"did you mean {near}?" if near else f"{FILE} lists them, rejects/ samples of what was dropped")
    decoder = Decoder(manifest)
    found = []
    for row, number in zip(rows, numbers, strict=True):
        if manifest.best_fit:
            tokens, loss = decoder.packed_document(row["split"], number, row["tokens"])
            text, whole, shown = decoder.decode(tokens[:-1]), True, decoder.shown(tokens, loss)
        else:
            text, whole = decoder.document(row["split"], number, row["tokens"])
            shown = ""
        found.append(Document(row["id"] or "", row["hash"].hex(), row["source"], row["record"], row["split"], row["bytes"], row["tokens"],
                              json.loads(row["meta"]) if row["meta"] else {}, row["reasons"] or [], text, whole, shown, row.get("part", 0)))
    return found


def windows(path: Path | str, split: str = "train", first: int = 0, count: int = 1) -> list[Window]:
    """Windows by their number, decoded by the corpus' own tokenizer, special tokens shown. Raises InputError for a split or a window
    that there is not, CorpusError for a damaged shard."""
    manifest = read_manifest(path)
    if split not in manifest.splits:
        raise InputError(f"there is no split {split!r}", where=str(manifest.path), remedy=f"it has {', '.join(manifest.splits)}")
    total = manifest.splits[split].windows
    if not 0 <= first < total:
        raise InputError(f"there is no window {first:,}", where=f"{manifest.path}: {split}",
                         remedy=f"they are numbered from 0 to {total - 1:,}" if total else "the split has none")
    decoder = Decoder(manifest)
    numbers = range(first, min(first + count, total))
    tokens = decoder.rows(split, numbers)
    filled = [decoder.filled(split, number) for number in numbers]
    losses = decoder.losses(split, numbers)
    return [Window(split, number, decoder.starts_in(split, number), decoder.decode(row[:end]), len(row) - end,
                   decoder.shown(row[:end], loss[:end]))
            for number, row, end, loss in zip(numbers, tokens, filled, losses, strict=True)]


def find(path: Path | str, text: str, limit: int = 10) -> list[Match]:
    """The first places of a text, split by split; it may reach over the ends of windows, but not over those of documents. Best-fit
    corpora are searched in the order of their documents. Raises InputError for an empty text, CorpusError for a damaged shard."""
    manifest = read_manifest(path)
    if not text:
        raise InputError("an empty text is everywhere", where=str(manifest.path), remedy="say what to look for")
    decoder, found = Decoder(manifest), list[Match]()
    for split in manifest.splits:
        for match in (_packed_matches if manifest.best_fit else _matches)(decoder, split, text):
            if len(found) >= limit:
                return found
            found.append(match)
    return found


def _matches(decoder: Decoder, split: str, text: str) -> Iterator[Match]:
    """Decode a few thousand tokens at a time. Each piece begins with the last tokens of the one before: enough for the text to lie in
    them but for its last character, and what lies in them whole has been found already."""
    context, total = decoder.manifest.context, decoder.manifest.splits[split].windows
    size, overlap = max(1, CHUNK_TOKENS // context), len(text.encode()) + 8
    for first in range(0, total, size):
        stop = min(first + size, total)
        begin, middle = max(0, first * context - overlap), first * context
        tokens = decoder.stream(split, begin, stop * context + (stop == total))
        decoded = decoder.decode(tokens)
        at = decoded.find(text)
        if at < 0:
            continue
        known = len(decoder.decode(tokens[:middle - begin]).rstrip("\ufffd")) if middle > begin else 0
        edges = [number * context - begin for number in range(begin // context, stop)]
        while at >= 0:
            if at + len(text) > known:
                window = bisect.bisect_right(edges, at, key=lambda edge: len(decoder.decode(tokens[:edge])) if edge > 0 else 0) - 1
                yield Match(split, begin // context + max(0, window), _excerpt(decoded, at, len(text)))
            at = decoded.find(text, at + len(text))


def _packed_matches(decoder: Decoder, split: str, text: str) -> Iterator[Match]:
    """Document by document, of a shard at a time."""
    context = decoder.manifest.context
    for pieces in decoder.pieces(split):
        edges = np.flatnonzero(np.append(True, pieces.documents[1:] != pieces.documents[:-1]))
        for first, stop in zip(edges.tolist(), [*edges[1:].tolist(), len(pieces.documents)], strict=True):
            tokens = pieces.document(first, stop)
            decoded = decoder.decode(tokens)
            at = decoded.find(text)
            while at >= 0:
                piece = bisect.bisect_right(range(1, stop - first), at, key=lambda i: len(decoder.decode(tokens[:i * context])))
                yield Match(split, int(pieces.windows[first + piece]), _excerpt(decoded, at, len(text)))
                at = decoded.find(text, at + len(text))


def _excerpt(text: str, at: int, length: int) -> str:
    begin, end = max(0, at - EXCERPT_CHARS), min(len(text), at + length + EXCERPT_CHARS)
    return ("…" if begin else "") + text[begin:end] + ("…" if end < len(text) else "")


def source_row(source: dict[str, Any]) -> str:
    """A source of a corpus in one line."""
    splits = "".join(f", {split['tokens']:,} tokens of {name}" for name, split in source.get("splits", {}).items())
    return f"{source['files']:,} files, {source['bytes']:,} bytes, {source['format']}, xxh3 {source['xxh3']}{splits}"
