"""Rows of the stream as the tensors that the loss takes."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from distlm.corpus.stream import START, silent
from distlm.model.loss import IGNORED


class Batch(Protocol):
    """Some sequences of a rank, as an objective makes them of the stream's rows."""

    @property
    def tokens(self) -> torch.Tensor:
        """int64[sequences, any]."""

    @property
    def sequences(self) -> int: ...

    @property
    def inputs(self) -> tuple[torch.Tensor, ...]:
        """What the objective's module is called with."""

    def num_targets(self) -> int:
        """What the sum of their losses is divided by for a mean."""

    def part(self, index: int, parts: int) -> "Batch":
        """The same sequences, but of their tokens the `index`-th of equal parts."""

    def split(self, sequences: int) -> "Iterator[Batch]":
        """Micro-batches of so many sequences."""


@dataclass(frozen=True)
class TokenBatch:
    """Windows, and where the corpus or the spec asks for it, which predictions count and where documents begin."""

    tokens: torch.Tensor
    """int64[sequences, context + 1]."""
    targets: torch.Tensor | None = None
    """int64[sequences, context], IGNORED where there is no loss; None where every token gives one."""
    positions: torch.Tensor | None = None
    """int64[sequences, context], each token's place in its document, or in a window that is divided over ranks; None where attention does
    not keep to documents, or the window is whole."""

    @property
    def sequences(self) -> int:
        return len(self.tokens)

    @property
    def inputs(self) -> tuple[torch.Tensor, ...]:
        """What the loss is called with."""
        return tuple(one for one in (self.tokens, self.targets, self.positions) if one is not None)

    def num_targets(self) -> int:
        """Predictions that give loss."""
        return self.tokens[:, 1:].numel() if self.targets is None else int((self.targets != IGNORED).sum())

    def part(self, index: int, parts: int) -> "TokenBatch":
        """The same sequences, but of their tokens the `index`-th of equal parts, which know where they stand."""
        if parts == 1:
            return self
        size = (self.tokens.shape[1] - 1) // parts
        mine = slice(index * size, (index + 1) * size)
        whole = torch.arange(size * parts, device=self.tokens.device).expand(self.sequences, -1)
        targets = self.tokens[:, 1:] if self.targets is None else self.targets
        places = whole if self.positions is None else self.positions
        return TokenBatch(self.tokens[:, mine.start:mine.stop + 1], targets[:, mine], places[:, mine])

    def split(self, sequences: int) -> Iterator["TokenBatch"]:
        """Micro-batches of so many sequences."""
        parts = [one.split(sequences) for one in self.inputs]
        yield from (TokenBatch(*each) for each in zip(*parts, strict=True))


@dataclass(frozen=True)
class LabelledBatch:
    """Documents, each with its end token and padding, and their labels."""

    tokens: torch.Tensor
    """int64[sequences, context]."""
    labels: torch.Tensor
    """int64[sequences, 1], each one's number; or [sequences, labels], 1 for each that it has."""

    @property
    def sequences(self) -> int:
        return len(self.tokens)

    @property
    def inputs(self) -> tuple[torch.Tensor, ...]:
        return self.tokens, self.labels

    def num_targets(self) -> int:
        return self.sequences

    def part(self, index: int, parts: int) -> "LabelledBatch":
        assert parts == 1, "the spec refuses sequences that are divided"
        return self

    def split(self, sequences: int) -> Iterator["LabelledBatch"]:
        """Micro-batches of so many sequences."""
        for tokens, labels in zip(self.tokens.split(sequences), self.labels.split(sequences), strict=True):
            yield LabelledBatch(tokens, labels)


def make_batch(rows: NDArray[Any], mask_documents: bool, device: torch.device) -> TokenBatch:
    """rows: int64[n, context + 1], or with marks int64[n, 2, context + 1], as `corpus.stream.ordered_steps` yields them."""
    if rows.ndim == 2:
        return TokenBatch(torch.from_numpy(rows).to(device))
    tokens, marks = rows[:, 0], rows[:, 1]
    arrays = [tokens, np.where(silent(marks, mask_documents), IGNORED, tokens)[:, 1:]]
    if mask_documents:
        places = np.arange(tokens.shape[1])
        starts = np.maximum.accumulate(np.where(marks & START > 0, places, 0), 1)
        arrays.append((places - starts)[:, :-1])
    return TokenBatch(*(torch.from_numpy(np.ascontiguousarray(array)).to(device) for array in arrays))
