"""Rows of the stream as the tensors that the loss takes.

    batch = make_batch(rows, mask_documents=True)
    loss(*batch.inputs(device))

A batch is on the host. What follows from its tokens and marks is found there, micro-batch by micro-batch, before it is sent: a GPU that was
asked for it would have to be waited for.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from distlm.corpus.stream import START, silent
from distlm.model.encoder import lengths_of
from distlm.model.loss import IGNORED, places_with_loss, trimmed
from distlm.model.masks import holds_several


class Batch(Protocol):
    """Some sequences of a rank, as an objective makes them of the stream's rows, on the host."""

    @property
    def tokens(self) -> torch.Tensor:
        """int64[sequences, any]."""

    @property
    def sequences(self) -> int: ...

    def inputs(self, device: torch.device) -> tuple[Any, ...]:
        """What the objective's module is called with, on its device."""

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

    def inputs(self, device: torch.device) -> tuple[Any, ...]:
        """What the loss is called with, on its device: tokens, the targets that give loss, positions, where those targets stand, and
        whether a window holds several documents."""
        targets = kept = None
        if self.targets is not None:
            kept = places_with_loss(self.targets)
            targets = self.targets.flatten()[kept]
        several = self.positions is not None and holds_several(self.positions)
        return *(send(one, device) for one in (self.tokens, targets, self.positions, kept)), several

    def num_targets(self) -> int:
        """Predictions that give loss."""
        return self.tokens[:, 1:].numel() if self.targets is None else int((self.targets != IGNORED).sum())

    def part(self, index: int, parts: int) -> "TokenBatch":
        """The same sequences, but of their tokens the `index`-th of equal parts, which know where they stand."""
        if parts == 1:
            return self
        size = (self.tokens.shape[1] - 1) // parts
        mine = slice(index * size, (index + 1) * size)
        whole = torch.arange(size * parts).expand(self.sequences, -1)
        targets = self.tokens[:, 1:] if self.targets is None else self.targets
        places = whole if self.positions is None else self.positions
        return TokenBatch(self.tokens[:, mine.start:mine.stop + 1], targets[:, mine], places[:, mine])

    def split(self, sequences: int) -> Iterator["TokenBatch"]:
        """Micro-batches of so many sequences."""
        for start in range(0, self.sequences, sequences):
            here = slice(start, start + sequences)
            yield TokenBatch(self.tokens[here], *(None if one is None else one[here] for one in (self.targets, self.positions)))


@dataclass(frozen=True)
class LabelledBatch:
    """Documents, each with its end token and padding, and their labels."""

    tokens: torch.Tensor
    """int64[sequences, context]."""
    labels: torch.Tensor
    """int64[sequences, 1], each one's number; or [sequences, labels], 1 for each that it has."""
    padding: int
    """The token behind a document's end."""

    @property
    def sequences(self) -> int:
        return len(self.tokens)

    def inputs(self, device: torch.device) -> tuple[Any, ...]:
        lengths = lengths_of(self.tokens, self.padding)
        return tuple(send(one, device) for one in (trimmed(self.tokens, lengths), self.labels, lengths))

    def num_targets(self) -> int:
        return self.sequences

    def part(self, index: int, parts: int) -> "LabelledBatch":
        assert parts == 1, "the spec refuses sequences that are divided"
        return self

    def split(self, sequences: int) -> Iterator["LabelledBatch"]:
        """Micro-batches of so many sequences."""
        for tokens, labels in zip(self.tokens.split(sequences), self.labels.split(sequences), strict=True):
            yield LabelledBatch(tokens, labels, self.padding)


def send(tensor: torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
    """The tensor there. A GPU takes it from pinned memory by itself, once it has done what it was given before: nobody waits."""
    if tensor is None or device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def make_batch(rows: NDArray[Any], mask_documents: bool) -> TokenBatch:
    """rows: int64[n, context + 1], or with marks int64[n, 2, context + 1], as `corpus.stream.ordered_steps` yields them."""
    if rows.ndim == 2:
        return TokenBatch(torch.from_numpy(rows))
    tokens, marks = rows[:, 0], rows[:, 1]
    arrays = [tokens, np.where(silent(marks, mask_documents), IGNORED, tokens)[:, 1:]]
    if mask_documents:
        places = np.arange(tokens.shape[1])
        starts = np.maximum.accumulate(np.where(marks & START > 0, places, 0), 1)
        arrays.append((places - starts)[:, :-1])
    return TokenBatch(*(torch.from_numpy(np.ascontiguousarray(array)) for array in arrays))
