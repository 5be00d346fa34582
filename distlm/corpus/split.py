"""The two hashes that rule a corpus: a document's own, which splits and deduplicates, and that of (seed, document), which orders.

Neither depends on where a document stood or on what else there is, so the split never moves when documents are added, and the order
is the same at any number of workers.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

HASH_BYTES = 16


def content_hash(text: bytes) -> bytes:
    """BLAKE2b-128 of a document's UTF-8 text."""
    return hashlib.blake2b(text, digest_size=HASH_BYTES).digest()


def order_key(content: bytes, seed: int) -> bytes:
    """What documents are sorted by: BLAKE2b-128 of the content hash, keyed with the seed."""
    return hashlib.blake2b(content, digest_size=HASH_BYTES, key=str(seed).encode()[:64]).digest()


def partition(key: bytes, partitions: int) -> int:
    """The place of an order key among equal ranges of keys: partitions in order hold documents in order."""
    return int.from_bytes(key[:4], "big") * partitions >> 32


@dataclass(frozen=True)
class SplitRule:
    """The first 64 bits of a document's content hash, as a fraction of 2^64, decide: below `val_fraction` it is held out for
    validation, in the `test_fraction` above that for the last test, else it is trained on."""

    val_fraction: float
    test_fraction: float = 0.0
    held_out: bytes = b""
    """The one document that is held out for validation beside the rule, where the rule holds out none."""

    @property
    def names(self) -> tuple[str, ...]:
        return ("train", "val", "test") if self.test_fraction else ("train", "val")

    def of(self, content: bytes) -> str:
        """The split of the document with this content hash."""
        at = place(content)
        if at < self.val_fraction or content == self.held_out:
            return "val"
        return "test" if at < self.val_fraction + self.test_fraction else "train"


def place(content: bytes) -> float:
    return int.from_bytes(content[:8], "big") / 2 ** 64


def first_held_out(contents: Iterable[bytes]) -> bytes:
    """The document that would be held out first if the fraction grew."""
    return min(contents, default=b"")
