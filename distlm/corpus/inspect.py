"""Looking into a corpus: what it holds and went through, its documents and windows as text, and what differs between two.

    summary(path)                                          # rows of (what, value), for a table
    documents(path, ["doc-17"]), windows(path, "val", first=3), find(path, "Brown", limit=5)
    differences = diff(a, b)                               # differences.rows() for a table; differences.only["a"].documents

Everything is read in bounded pieces, and every shard that is read is checked against the manifest.
"""

import bisect
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import tokenizers
from numpy.typing import NDArray

from distlm.corpus.manifest import Manifest, Shard, read_manifest
from distlm.corpus.stream import NO_LOSS, Windows
from distlm.errors import CorpusError, InputError
from distlm.spec.load import nearest

DOCUMENTS = "documents.parquet"
BATCH_ROWS = 1 << 16
CHUNK_TOKENS = 1 << 14
EXCERPT_CHARS = 60
MAX_REASONS = 3
MAX_FIRST = 10
PARTS = ("code", "parameters", "sources", "tokenizer", "steps", "splits")
"""Of a diff: first what may be the reason, then what came of it."""


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
                     + (f"; {top}" if top else "") + (f", {rest:,} others" if rest else "")))
    rows += [("tokenizer", f"{data['tokenizer']['kind']}, {manifest.vocab_size:,} tokens, {manifest.dtype}, end {manifest.eos_id}"),
             ("context", f"{manifest.context:,}"), ("seed", str(manifest.seed))]
    if manifest.conversations:
        told = data["conversations"]
        rows.append(("loss", f"{told['loss']}: {told['loss_share']:.2%} of the tokens give loss"))
    if manifest.best_fit:
        rows.append(("packing", f"best-fit, {data['pack']['padding_share']:.2%} of the windows are padding"))
    rows += [(f"source {name}", _source(source)) for name, source in zip(manifest.source_names, data["sources"], strict=True)]
    return rows


def documents(path: Path | str, ids: Sequence[str]) -> list[Document]:
    """The documents of these ids or content hashes (hexadecimal), in the order of the corpus; of an id that several have, all.

    Raises InputError for one that no document has, CorpusError for a damaged shard."""
    manifest = read_manifest(path)
    file = _documents_file(manifest)
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
                         remedy=f"did you mean {near}?" if near else f"{DOCUMENTS} lists them, rejects/ samples of what was dropped")
    texts = _Texts(manifest)
    found = []
    for row, number in zip(rows, numbers, strict=True):
        if manifest.best_fit:
            tokens, loss = texts.packed_document(row["split"], number, row["tokens"])
            text, whole, shown = texts.decode(tokens[:-1]), True, texts.shown(tokens, loss)
        else:
            text, whole = texts.document(row["split"], number, row["tokens"])
            shown = ""
        found.append(Document(row["id"] or "", row["hash"].hex(), row["source"], row["record"], row["split"], row["bytes"], row["tokens"],
                              json.loads(row["meta"]) if row["meta"] else {}, row["reasons"] or [], text, whole, shown))
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
    texts = _Texts(manifest)
    numbers = range(first, min(first + count, total))
    tokens = texts.rows(split, numbers)
    filled = [texts.filled(split, number) for number in numbers]
    losses = texts.losses(split, numbers)
    return [Window(split, number, texts.starts_in(split, number), texts.decode(row[:end]), len(row) - end,
                   texts.shown(row[:end], loss[:end]))
            for number, row, end, loss in zip(numbers, tokens, filled, losses, strict=True)]


def find(path: Path | str, text: str, limit: int = 10) -> list[Match]:
    """The first places of a text, split by split; it may reach over the ends of windows, but not over those of documents. Best-fit
    corpora are searched in the order of their documents. Raises InputError for an empty text, CorpusError for a damaged shard."""
    manifest = read_manifest(path)
    if not text:
        raise InputError("an empty text is everywhere", where=str(manifest.path), remedy="say what to look for")
    texts, found = _Texts(manifest), list[Match]()
    for split in manifest.splits:
        for match in (_packed_matches if manifest.best_fit else _matches)(texts, split, text):
            if len(found) >= limit:
                return found
            found.append(match)
    return found


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


class _Texts:
    """The tokens of a corpus as text."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self.tokenizer = tokenizers.Tokenizer.from_file(str(manifest.tokenizer / "tokenizer.json"))
        self._windows: dict[str, Windows] = {}
        self._starts: dict[str, NDArray[np.int64]] = {}

    def decode(self, tokens: NDArray[Any]) -> str:
        return str(self.tokenizer.decode(tokens.tolist(), skip_special_tokens=False))

    def shown(self, tokens: NDArray[Any], loss: NDArray[np.bool_]) -> str:
        """The tokens of conversations as text, with what gives loss between marks; of texts nothing."""
        if not self.manifest.conversations:
            return ""
        edges = [0, *(np.flatnonzero(loss[1:] != loss[:-1]) + 1).tolist(), len(tokens)]
        return "".join(f"⟦{part}⟧" if loss[begin] else part for begin, end in itertools.pairwise(edges) if end > begin
                       for part in [self.decode(tokens[begin:end])])

    def losses(self, split: str, numbers: range) -> NDArray[np.bool_]:
        """Of the windows of these numbers, which tokens the shards say give loss."""
        return self._reader(split).marks(*self._rows(split, numbers)) & NO_LOSS == 0

    def rows(self, split: str, numbers: range) -> NDArray[Any]:
        """The windows of these numbers, [len(numbers), context + 1]. Raises CorpusError for a damaged shard."""
        return self._reader(split).read(*self._rows(split, numbers))

    def _reader(self, split: str) -> Windows:
        if split not in self._windows:
            self._windows[split] = Windows(self.manifest.path, split)
        return self._windows[split]

    def _rows(self, split: str, numbers: range) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(shard, row) of the windows of these numbers."""
        ends = np.cumsum([shard.windows for shard in self._reader(split).shards], dtype=np.int64)
        wanted = np.asarray(numbers, np.int64)
        shards = np.searchsorted(ends, wanted, "right")
        return shards, wanted - np.concatenate([[0], ends])[shards]

    def stream(self, split: str, begin: int, end: int) -> NDArray[Any]:
        """The tokens at the places `begin` to `end` of the split: windows without the first token of the next."""
        context = self.manifest.context
        last = self.manifest.splits[split].windows - 1
        first, stop = min(begin // context, last), min(-(-end // context) - 1, last)
        rows = self.rows(split, range(first, stop + 1))
        tokens = np.concatenate([rows[:, :-1].reshape(-1), rows[-1, -1:]])
        return tokens[begin - first * context:end - first * context]

    def starts(self, split: str) -> NDArray[np.int64]:
        """The places in the split's tokens at which its documents begin, ascending."""
        if split not in self._starts:
            context, base, found = self.manifest.context, 0, [np.zeros(0, np.int64)]
            for shard in self.manifest.splits[split].shards:
                self.rows(split, range(base, base + 1))    # checks the shard
                column = _column(self.manifest.path / shard.file, "starts")
                rows = np.repeat(np.arange(base, base + shard.windows), pc.list_value_length(column).to_numpy(zero_copy_only=False))
                found.append(rows * context + column.flatten().to_numpy())
                base += shard.windows
            self._starts[split] = np.unique(np.concatenate(found))
        return self._starts[split]

    def starts_in(self, split: str, number: int) -> list[int]:
        shard, row = self._place(split, number)
        places: list[int] = _column(self.manifest.path / shard.file, "starts")[row].as_py()
        return places

    def filled(self, split: str, number: int) -> int:
        """The tokens of a window that are no padding."""
        shard, row = self._place(split, number)
        return int(_column(self.manifest.path / shard.file, "filled")[row].as_py()) if self.manifest.best_fit else self.manifest.context + 1

    def _place(self, split: str, number: int) -> tuple[Shard, int]:
        for shard in self.manifest.splits[split].shards:
            if number < shard.windows:
                return shard, number
            number -= shard.windows
        raise AssertionError(number)

    def pieces(self, split: str) -> Iterator["_Pieces"]:
        """The pieces of the documents of each shard, checked; a document has all its pieces in one."""
        base = 0
        for shard in self.manifest.splits[split].shards:
            tokens = self.rows(split, range(base, base + shard.windows))
            path = self.manifest.path / shard.file
            starts, documents, offsets = (_column(path, name) for name in ("starts", "documents", "offsets"))
            rows = np.repeat(np.arange(shard.windows), pc.list_value_length(starts).to_numpy(zero_copy_only=False))
            begins = starts.flatten().to_numpy()
            last = np.append(rows[1:] != rows[:-1], True)
            ends = np.where(last, _column(path, "filled").to_numpy()[rows], np.append(begins[1:], 0))
            order = np.lexsort((offsets.flatten().to_numpy(), documents.flatten().to_numpy()))
            yield _Pieces(tokens, documents.flatten().to_numpy()[order], base + rows[order], base, begins[order], ends[order])
            base += shard.windows

    def packed_document(self, split: str, number: int, tokens: int) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """(tokens, which give loss) of a split's document by its number, where documents were packed by best-fit. Raises CorpusError
        where the windows hold others."""
        for pieces in self.pieces(split):
            if pieces.documents[-1] >= number:
                first, stop = np.searchsorted(pieces.documents, [number, number + 1]).tolist()
                ids = pieces.document(first, stop)
                window = int(pieces.windows[first])        # a conversation lies in one
                loss = self.losses(split, range(window, window + 1))[0, pieces.begins[first]:pieces.ends[first]]
                break
        else:
            ids, loss = np.zeros(0, np.int64), np.zeros(0, np.bool_)
        if len(ids) != tokens:
            raise CorpusError(f"document {number:,} has {len(ids):,} tokens, not {tokens:,}",
                              where=f"{self.manifest.path / DOCUMENTS}: {split}", remedy="the file is of another corpus: prepare it again")
        return ids, loss

    def document(self, split: str, number: int, tokens: int) -> tuple[str, bool]:
        """(text, whether it is whole) of a split's document by its number. Raises CorpusError where the windows hold others."""
        starts, total = self.starts(split), self.manifest.splits[split].windows * self.manifest.context + 1
        if number >= len(starts):
            return "", False
        begin = int(starts[number])
        end = int(starts[number + 1]) if number + 1 < len(starts) else min(begin + tokens, total)
        if number + 1 < len(starts) and end - begin != tokens:
            raise CorpusError(f"document {number:,} has {end - begin:,} tokens, not {tokens:,}",
                              where=f"{self.manifest.path / DOCUMENTS}: {split}", remedy="the file is of another corpus: prepare it again")
        ids = self.stream(split, begin, end)
        whole = len(ids) == tokens
        return self.decode(ids[:-1] if whole else ids), whole


@dataclass(frozen=True)
class _Pieces:
    """A shard's pieces in the order of their documents."""

    tokens: NDArray[Any]
    """[windows, context + 1]."""
    documents: NDArray[np.int64]
    windows: NDArray[np.int64]
    first_window: int
    begins: NDArray[np.int32]
    """Where in its window a piece begins, and where it ends."""
    ends: NDArray[np.int32]

    def document(self, first: int, stop: int) -> NDArray[Any]:
        """The tokens of the document that has the pieces `first` to `stop`: each but the first begins with the last token of the one
        before."""
        return np.concatenate([np.zeros(0, self.tokens.dtype), *(
            self.tokens[self.windows[i] - self.first_window, self.begins[i] + (i > first):self.ends[i]] for i in range(first, stop))])


def _column(path: Path, name: str) -> Any:
    try:
        with pa.memory_map(str(path)) as file:
            return pa.ipc.open_file(file).get_batch(0)[name]
    except (OSError, pa.ArrowException) as error:
        raise CorpusError(f"cannot be read: {error}", where=str(path), remedy="prepare the corpus again") from None


def _documents_file(manifest: Manifest) -> pq.ParquetFile:
    path = manifest.path / DOCUMENTS
    if not path.is_file():
        raise InputError(f"the corpus has no {DOCUMENTS}", where=str(manifest.path), remedy="prepare it again to look up documents")
    try:
        return pq.ParquetFile(path)
    except (OSError, pa.ArrowException) as error:
        raise CorpusError(f"cannot be read: {error}", where=str(path), remedy="prepare the corpus again") from None


def _matches(texts: _Texts, split: str, text: str) -> Iterator[Match]:
    """Decode a few thousand tokens at a time. Each piece begins with the last tokens of the one before: enough for the text to lie in
    them but for its last character, and what lies in them whole has been found already."""
    context, total = texts.manifest.context, texts.manifest.splits[split].windows
    size, overlap = max(1, CHUNK_TOKENS // context), len(text.encode()) + 8
    for first in range(0, total, size):
        stop = min(first + size, total)
        begin, middle = max(0, first * context - overlap), first * context
        tokens = texts.stream(split, begin, stop * context + (stop == total))
        decoded = texts.decode(tokens)
        at = decoded.find(text)
        if at < 0:
            continue
        known = len(texts.decode(tokens[:middle - begin]).rstrip("\ufffd")) if middle > begin else 0
        edges = [number * context - begin for number in range(begin // context, stop)]
        while at >= 0:
            if at + len(text) > known:
                window = bisect.bisect_right(edges, at, key=lambda edge: len(texts.decode(tokens[:edge])) if edge > 0 else 0) - 1
                yield Match(split, begin // context + max(0, window), _excerpt(decoded, at, len(text)))
            at = decoded.find(text, at + len(text))


def _packed_matches(texts: _Texts, split: str, text: str) -> Iterator[Match]:
    """Document by document, of a shard at a time."""
    context = texts.manifest.context
    for pieces in texts.pieces(split):
        edges = np.flatnonzero(np.append(True, pieces.documents[1:] != pieces.documents[:-1]))
        for first, stop in zip(edges.tolist(), [*edges[1:].tolist(), len(pieces.documents)], strict=True):
            tokens = pieces.document(first, stop)
            decoded = texts.decode(tokens)
            at = decoded.find(text)
            while at >= 0:
                piece = bisect.bisect_right(range(1, stop - first), at, key=lambda i: len(texts.decode(tokens[:i * context])))
                yield Match(split, int(pieces.windows[first + piece]), _excerpt(decoded, at, len(text)))
                at = decoded.find(text, at + len(text))


def _excerpt(text: str, at: int, length: int) -> str:
    begin, end = max(0, at - EXCERPT_CHARS), min(len(text), at + length + EXCERPT_CHARS)
    return ("…" if begin else "") + text[begin:end] + ("…" if end < len(text) else "")


def _values(manifest: Manifest) -> dict[tuple[str, str], Any]:
    """All that a diff compares, by part and dotted key."""
    data = manifest.data
    values: dict[tuple[str, str], Any] = {}
    for part, value in data.items():
        if part not in ("format", "name", "sources", "steps", "splits"):
            plain = part in ("context", "dtype", "seed")
            for key, leaf in _leaves(value, part if plain else ""):
                values["parameters" if plain else part, key] = leaf
    for name, source in zip(manifest.source_names, data["sources"], strict=True):
        values["sources", name] = _source(source)
    for step in data["steps"]:
        for side in ("in", "out"):
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


def _source(source: dict[str, Any]) -> str:
    splits = "".join(f", {split['tokens']:,} tokens of {name}" for name, split in source.get("splits", {}).items())
    return f"{source['files']:,} files, {source['bytes']:,} bytes, {source['format']}, xxh3 {source['xxh3']}{splits}"


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
    if not all((manifest.path / DOCUMENTS).is_file() for manifest in (one, other)):
        return {}, 0
    left, right = (_listed(manifest) for manifest in (one, other))
    places = pc.index_in(left["text_hash"], right["text_hash"])
    both = pc.is_valid(places)
    moved = pc.sum(pc.not_equal(left["split"].filter(both), right["split"].take(places.filter(both)))).as_py() or 0
    return {"a": _only(left, right, one, other), "b": _only(right, left, other, one)}, moved


def _listed(manifest: Manifest) -> pa.Table:
    columns, file = ["hash", "text_hash", "origin", "source", "record", "id", "split", "bytes"], _documents_file(manifest)
    if missing := [name for name in columns if name not in file.schema_arrow.names]:
        raise InputError(f"{DOCUMENTS} has no {' and no '.join(missing)}", where=str(manifest.path),
                         remedy="an earlier distlm has made the corpus: remove it and prepare it again")
    return file.read(columns).combine_chunks()


def _only(mine: pa.Table, theirs: pa.Table, own: Manifest, other: Manifest) -> OnlyIn:
    alone = mine.filter(pc.invert(pc.is_in(mine["text_hash"], theirs["text_hash"])))
    if not len(alone):
        return OnlyIn()
    paired = _paired(own.data["sources"], other.data["sources"])
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
