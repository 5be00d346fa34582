"""The tokens of a corpus' windows as text, and those of one document put together again.

    decoder = Decoder(read_manifest(path))
    decoder.decode(decoder.rows("train", range(2))[0])     # a window
    decoder.document("train", 7, tokens=120)               # (text, whether it is whole)

Shards are read in bounded pieces, and each is checked against the manifest when it is opened.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import tokenizers
from numpy.typing import NDArray

from distlm.corpus.listing import FILE
from distlm.corpus.manifest import Manifest, Shard
from distlm.corpus.stream import NO_LOSS, Windows
from distlm.errors import CorpusError


class Decoder:
    """The tokens of a corpus as text. Raises CorpusError where its tokenizer cannot be read."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        try:
            self.tokenizer = tokenizers.Tokenizer.from_file(str(manifest.tokenizer / "tokenizer.json"))
        except Exception as error:                         # the library raises bare Exception
            raise CorpusError(f"cannot be read: {error}", where=str(manifest.tokenizer / "tokenizer.json"),
                              remedy="restore it from a copy, or prepare the corpus again") from None
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

    def pieces(self, split: str) -> Iterator["Pieces"]:
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
            yield Pieces(tokens, documents.flatten().to_numpy()[order], base + rows[order], base, begins[order], ends[order])
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
                              where=f"{self.manifest.path / FILE}: {split}", remedy="the file is of another corpus: prepare it again")
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
                              where=f"{self.manifest.path / FILE}: {split}", remedy="the file is of another corpus: prepare it again")
        ids = self.stream(split, begin, end)
        whole = len(ids) == tokens
        return self.decode(ids[:-1] if whole else ids), whole


@dataclass(frozen=True)
class Pieces:
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
