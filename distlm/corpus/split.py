"""The two hashes that rule a corpus: a document's own, which splits and deduplicates, and that of (seed, document), which orders.

Neither depends on where a document stood or on what else there is, so the split never moves when documents are added, and the order
is the same at any number of workers.
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import pyarrow.compute as pc

from distlm.corpus.partitions import batches
from distlm.spec.prepare import WHOLE

HASH_BYTES = 16


def content_hash(text: bytes) -> bytes:
    """BLAKE2b-128 of a document's UTF-8 text."""
    return hashlib.blake2b(text, digest_size=HASH_BYTES).digest()


def document_hash(text: str, turns: str = "") -> bytes:
    """The content hash of a document: of its text, and of the turns where there are some."""
    return content_hash((f"{turns}\0{text}" if turns else text).encode())


def order_key(content: bytes, seed: int) -> bytes:
    """What documents are sorted by: BLAKE2b-128 of the content hash, keyed with the seed."""
    return hashlib.blake2b(content, digest_size=HASH_BYTES, key=str(seed).encode()[:64]).digest()


def is_sampled(content: bytes, weight: float) -> bool:
    """Whether the document is in this share of its source: its hash decides, by other bits than those that split."""
    return int.from_bytes(content[8:16], "big") < weight * 2 ** 64


def partition(key: bytes, partitions: int) -> int:
    """The place of an order key among equal ranges of keys: partitions in order hold documents in order."""
    return int.from_bytes(key[:4], "big") * partitions >> 32


Shares: TypeAlias = tuple[float, float]
"""Of a source's documents, for validation and for the last test."""


@dataclass(frozen=True)
class SplitRule:
    """The first 64 bits of a document's content hash, as a fraction of 2^64, decide: below `val_fraction` it is held out for
    validation, in the `test_fraction` above that for the last test, else it is trained on. Each source may have fractions of its own."""

    val_fraction: float
    test_fraction: float = 0.0
    held_out: bytes = b""
    """The one document that is held out for validation beside the rule, where the rule holds out none."""
    sources: tuple[Shares, ...] = ()
    """Of each source, by its place in the spec; empty where all have the fractions above."""

    @property
    def names(self) -> tuple[str, ...]:
        return ("train", "val", "test") if any(test for _, test in self.sources or [self.shares(0)]) else ("train", "val")

    def shares(self, origin: int) -> Shares:
        return self.sources[origin] if self.sources else (self.val_fraction, self.test_fraction)

    def of(self, content: bytes, origin: int = 0) -> str:
        """The split of the document with this content hash, of the source with this place in the spec."""
        val, test = self.shares(origin)
        at = int.from_bytes(content[:8], "big")
        if at < val * 2 ** 64 or content == self.held_out:
            return "val"
        return "test" if at < (val + test) * 2 ** 64 else "train"

    def described(self, conversations: bool) -> str:
        """As the manifest has it."""
        hashed, names = "turns, NUL, text" if conversations else "text", self.names
        return f"x = blake2b-128({hashed}, as cleaned)[:8], big-endian, / 2^64: val below val_fraction, " + \
            ("test below val_fraction + test_fraction, " if "test" in names else "") + "else train" + \
            ("; by the split of the source where it has its own" if self.sources else "")

    @property
    def may_hold_out(self) -> bool:
        """Whether a share of any source is for validation."""
        return any(0 < val < 1 for val, _ in self.sources or [self.shares(0)])

    @property
    def whole(self) -> list[int]:
        """The sources that are held out as they are. Of equal texts, and of nearly equal ones, theirs is kept."""
        return [origin for origin, shares in enumerate(self.sources) if shares in (WHOLE["val"], WHOLE["test"])]


def first_held_out(documents: Iterable[tuple[bytes, int]], rule: SplitRule) -> bytes:
    """Of (content hash, source), the training document that would be held out first if the fractions grew."""
    return min((content for content, origin in documents if rule.of(content, origin) == "train" and rule.shares(origin)[0]), default=b"")


def split_documents(partitions: list[Path], rule: SplitRule) -> Iterator[tuple[str, str, int, str]]:
    """(split, text, bytes of the text, turns) of every document, in order, holding one small batch at a time."""
    for path in partitions:
        for batch in batches(path):
            sizes = pc.binary_length(batch["text"]).to_pylist()
            for content, origin, text, size, turns in zip(batch["hash"].to_pylist(), batch["origin"].to_pylist(), batch["text"], sizes,
                                                          batch["turns"].to_pylist(), strict=True):
                yield rule.of(content, origin), text.as_py(), size, turns
