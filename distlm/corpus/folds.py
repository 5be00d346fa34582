"""Cross-validation without another corpus: which documents of the training and the validation split a fold holds out.

A document is held out in the fold that is the remainder of its content's hash by their number. So equal documents are never on both sides,
nor are near-duplicates where preparation looks for them, which keeps one; folds stay as they are when documents are added, and are about
of one size whatever the split and the weights of sources were, which the upper bits decide. The test split has no part in it.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from distlm.corpus.listing import FILE, open_documents
from distlm.corpus.manifest import Manifest, Split
from distlm.errors import CorpusError, InputError
from distlm.spec.fold import Fold

SPLITS = ("train", "val")
"""Whose documents are divided anew."""


def fold_of(content: bytes, of: int) -> int:
    """The fold that holds out the document with this content hash."""
    return int.from_bytes(content, "big") % of


class Folds:
    """Which documents of a corpus a fold holds out."""

    def __init__(self, corpus: Path, fold: Fold) -> None:
        """Raises InputError where the corpus does not list its documents, CorpusError where the list is damaged."""
        self._table = open_documents(corpus).read(columns=["split", "hash", "bytes", "tokens"])
        self._where, splits = str(corpus / FILE), np.asarray(self._table["split"].to_pylist())
        held_out = np.array([fold_of(content, fold.of) == fold.index for content in self._table["hash"].to_pylist()], np.bool_)
        self._held_out = held_out
        self._of = {name: held_out[splits == name] for name in SPLITS}
        self._divided = np.isin(splits, SPLITS)

    def rows(self, split: str, shard: pa.RecordBatch, of: str) -> NDArray[np.int64]:
        """int64[n]: the windows of a shard of the corpus's split `of` that are in the `split` of the fold: train or val."""
        starts = shard["documents"]
        numbers = starts.values.to_numpy()[starts.offsets.to_numpy()[:-1]]
        if numbers.max(initial=-1) >= len(self._of[of]):
            raise CorpusError("it lists other documents than the windows hold", where=self._where,
                              remedy="the file is of another corpus: prepare it again")
        return np.flatnonzero(self._of[of][numbers] == (split == "val"))

    def totals(self, split: str) -> tuple[int, int, int]:
        """(documents, bytes, tokens) of the fold's train or val."""
        mine = self._table.filter(pa.array(self._divided & (self._held_out == (split == "val"))))
        return len(mine), int(np.sum(mine["bytes"].to_numpy())), int(np.sum(mine["tokens"].to_numpy()))


def folded(manifest: Manifest, fold: Fold) -> Manifest:
    """The manifest of a corpus with labels as if a fold had been its splits, but for shards. Raises InputError where a fold holds out
    nothing, or all documents of a label."""
    from distlm.corpus.stream import Windows

    folds, splits, counts = Folds(manifest.path, fold), dict(manifest.splits), {}
    for split in SPLITS:
        windows = Windows(manifest.path, split, fold)
        documents, size, tokens = folds.totals(split)
        splits[split] = Split(documents, size, tokens, 0, len(windows), ())
        labels = windows.labels(*windows.first(len(windows)))
        found = labels.sum(0) if manifest.multiple_labels else np.bincount(labels[:, 0], minlength=len(manifest.labels))
        counts[split] = dict(zip(manifest.labels, found.tolist(), strict=True))
    which = f"fold {fold.index} of {fold.of}"
    if not splits["val"].windows:
        raise InputError(f"{which} holds out no document of {manifest.name}", where="fold", remedy="take fewer folds")
    if unseen := [name for name, count in counts["train"].items() if not count and counts["val"][name]]:
        raise InputError(f"{which} holds out every document with the label {unseen[0]}", where="fold",
                         remedy="leave out labels of so few documents, give more of them, or take more folds")
    return replace(manifest, splits=splits, data={**manifest.data, "labels": {**manifest.data["labels"], **counts}})
