"""The bytes of a file, or of a range of one, as they are on disk or in a store: counted and hashed once, whatever is made of them.

    raw = Raw(file)
    for block in raw.stream(): ...
    raw.hash_rest()
    raw.num_bytes, raw.digest.hexdigest()
"""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from distlm.corpus.decompress import decompress
from distlm.corpus.files import TextFile
from distlm.corpus.web import CHUNK
from distlm.storage import writing


@dataclass
class Raw:
    """All methods raise OSError for what cannot be read, and StorageError for a store that does not give what it has."""

    file: TextFile
    num_bytes: int = 0
    """Those of the range alone."""
    ended: bool = False
    """Whether all of the file or range has been read."""
    retries: int = 0
    """Reads of a store that were taken up again."""
    digest: Any = field(default_factory=xxhash.xxh3_64)

    def stream(self) -> Iterator[bytes]:
        """In blocks of bounded size: a file decompressed; of a range the lines that begin in it. Raises ERRORS of decompress.py too."""
        is_range = self.file.begin > 0 or self.file.end is not None
        return self._own_lines() if is_range else decompress(Path(self.file.path).suffix.lower(), self._blocks())

    @contextlib.contextmanager
    def seekable(self) -> Iterator[Any]:
        """The file to be read at any place, when all of it, or of the range, has been hashed. An object is copied to a temporary file for
        it ($TMPDIR): its bytes must all come for the hash, and would come twice if the columns were read from the store. Raises
        StorageError where there is no room."""
        if not self.file.store:
            self.hash_rest()
            yield self.file.path
            return
        with tempfile.TemporaryFile(buffering=0) as copy:  # a buffer would be written once more when it is closed, and raise again
            for block in self._blocks():
                with writing(f"{tempfile.gettempdir()}: the copy of {self.file.place}", "free space or set TMPDIR to a folder with room"):
                    while block:
                        block = block[copy.write(block):]
            copy.seek(0)
            yield copy

    def hash_rest(self) -> None:
        """Read what is left of the range."""
        blocks = self._blocks(self.file.begin + self.num_bytes)
        while not self.ended and next(blocks, None) is not None:
            pass

    def _blocks(self, start: int = 0) -> Iterator[bytes]:
        """The file's bytes from `start` on; what of them is of the range is counted and hashed."""
        begin, end = self.file.begin, self.file.end
        for block in self.file.store.read(self.file.path, start, self._retried) if self.file.store else self._on_disk(start):
            own = block[max(0, begin - start):None if end is None else max(0, end - start)]
            self.num_bytes += len(own)
            self.digest.update(own)
            start += len(block)
            self.ended = self.ended or (end is not None and start >= end)
            yield block
        self.ended = True

    def _retried(self) -> None:
        self.retries += 1

    def _on_disk(self, start: int) -> Iterator[bytes]:
        if not os.path.isfile(self.file.path):
            raise OSError("no such file, or not a regular one")
        with open(self.file.path, "rb") as file:
            file.seek(start)
            while block := file.read(CHUNK):
                yield block

    def _own_lines(self) -> Iterator[bytes]:
        """One begins behind a line feed, which may be the last byte before the range; the last line may end far behind it."""
        begin, end = self.file.begin, self.file.end
        position, inside, given = max(0, begin - 1), not begin, 0
        for block in self._blocks(position):
            if not inside:
                feed = block.find(b"\n")
                block, position = (block[feed + 1:], position + feed + 1) if feed >= 0 else (b"", position + len(block))
                inside = feed >= 0
            if end is not None and position + len(block) >= end:
                if not inside or (position >= end and not given):
                    return                                 # no line begins here
                feed = block.find(b"\n", max(0, end - 1 - position))
                if feed >= 0:
                    yield block[:feed + 1]
                    return
            position += len(block)
            given += len(block)
            yield block
