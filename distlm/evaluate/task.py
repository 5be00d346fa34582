"""What is evaluated: which windows of which corpora, cut into batches that do not depend on who takes them.

    task = make_task(spec, storage)
    rows = Reader(task).read(0)                            # the windows of the first batch
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distlm.corpus.listing import tells_sources
from distlm.corpus.manifest import Manifest, manifest_hash, read_manifest
from distlm.corpus.stream import Windows, silent
from distlm.errors import InputError
from distlm.evaluate.tasks import check_answers, read_tasks
from distlm.model.build import Shape, checkpoint_config, has_classifier, read_config
from distlm.model.find import find_model
from distlm.model.vocabulary import vocabulary_hash
from distlm.spec import EvaluateSpec
from distlm.storage import Storage
from distlm.train.recipe import check_tokenizer, find_corpus


@dataclass(frozen=True)
class Part:
    """The windows of one corpus that are evaluated."""

    corpus: str
    """The corpus folder."""
    name: str
    windows: int
    """The first so many of the split."""
    mask_documents: bool
    sources: tuple[str, ...]
    """The names of its sources, by their place in the corpus; one, the corpus itself, where it does not tell whose its documents are."""
    by_source: bool
    """Whether it does tell."""
    first_group: int
    """The number of its first source among those of all corpora."""


@dataclass(frozen=True)
class Task:
    """All that decides the numbers but the model."""

    split: str
    parts: tuple[Part, ...]
    batch_windows: int
    bins: int

    @property
    def groups(self) -> int:
        """Sources of all corpora."""
        return sum(len(part.sources) for part in self.parts)

    @property
    def windows(self) -> int:
        return sum(part.windows for part in self.parts)

    @property
    def batches(self) -> list[tuple[int, int, int]]:
        """(part, first window, windows) of each batch, in order: none has windows of two corpora."""
        return [(i, first, min(self.batch_windows, part.windows - first)) for i, part in enumerate(self.parts)
                for first in range(0, part.windows, self.batch_windows)]


@dataclass(frozen=True)
class Rows:
    """The windows of a batch."""

    part: Part
    tokens: NDArray[np.int64]
    """[windows, context + 1]."""
    marks: NDArray[np.uint8]
    """[windows, context + 1], as corpus.stream has them."""
    kept: NDArray[np.bool_]
    """[windows, context]: which predictions count."""
    groups: NDArray[np.int64]
    """[windows, context]: the source of what is predicted, by its number among those of all corpora."""
    sizes: NDArray[np.float64]
    """[windows, context]: the bytes of what is predicted."""


class Reader:
    """The windows of a task's batches. A shard is checked when it is first opened."""

    def __init__(self, task: Task) -> None:
        self.task, self._batches = task, task.batches
        self._windows = [Windows(part.corpus, task.split) for part in task.parts]

    def read(self, batch: int) -> Rows:
        """Raises CorpusError for a corpus that is damaged."""
        i, first, count = self._batches[batch]
        part, windows = self.task.parts[i], self._windows[i]
        shards, rows = (places[first:] for places in windows.first(first + count))
        tokens, marks = windows.read(shards, rows).astype(np.int64), windows.marks(shards, rows)
        groups = np.full((count, tokens.shape[1] - 1), part.first_group, dtype=np.int64)
        if part.by_source:
            groups += windows.sources_of(windows.documents(shards, rows)[:, 1:])
        return Rows(part, tokens, marks, ~silent(marks, part.mask_documents)[:, 1:], groups, windows.bytes_of(tokens[:, 1:]))


def make_task(spec: EvaluateSpec, storage: Storage) -> Task:
    """Raises InputError for a corpus that is not there, has no window in the split, or is not that of the model."""
    parts: list[Part] = []
    for i, manifest in enumerate(manifests := read_corpora(spec, storage)):
        masked = manifest.best_fit if spec.mask_documents is None else spec.mask_documents
        total = manifest.splits[spec.split].windows
        names = [one.name for one in manifests]
        by_source = tells_sources(manifest)
        sources = tuple(manifest.source_names) if by_source else (manifest.name,)
        parts.append(Part(str(manifest.path), manifest.name if names.count(manifest.name) == 1 else spec.corpora[i],
                          min(total, spec.windows or total), masked, sources, by_source, sum(len(part.sources) for part in parts)))
    if spec.model is not None:
        model = find_model(spec.model, storage)
        check_generates(model)
        check_model(model, manifests, any(part.mask_documents for part in parts))
    return Task(spec.split, tuple(parts), spec.batch_windows, spec.calibration_bins)


def context_of(model: Path) -> int | None:
    """The positions that a model takes; None where its configuration does not say."""
    return getattr(read_config(model, f"model: {model}").get_text_config(), "max_position_embeddings", None)


def read_corpora(spec: EvaluateSpec, storage: Storage) -> list[Manifest]:
    """The manifests of a spec's corpora, each with windows in the split. Raises InputError."""
    found: list[Manifest] = []
    for i, name in enumerate(spec.corpora):
        key = "corpus" if isinstance(spec.corpus, str) else f"corpus.{i}"
        manifest = read_manifest(find_corpus(name, storage, key))
        split = manifest.splits.get(spec.split)
        if split is None:
            raise InputError(f"the corpus {manifest.name} has no split {spec.split}", where="split",
                             remedy=f"it has {', '.join(manifest.splits)}")
        if not split.windows:
            why, remedy = split.why_empty()
            raise InputError(f"the corpus {manifest.name} has no window in its split {spec.split}: {why}", where="split",
                             remedy=f"prepare it with {remedy}")
        if manifest.path in [one.path for one in found]:
            raise InputError(f"{manifest.path} is there twice", where=key, remedy="give it once")
        found.append(manifest)
    return found


def check_generates(folder: Path) -> None:
    """Raises InputError for a classifier."""
    if has_classifier(read_config(folder, f"model: {folder}")):
        raise InputError("it is a classifier, and what is measured here is a language model", where=f"model: {folder}",
                         remedy="its own measures are in the report of its run")


def check_model(folder: Path, manifests: list[Manifest], masked: bool) -> None:
    """Raises InputError where a model cannot read the windows of a corpus, and SpecError where it cannot keep documents apart."""
    for manifest in manifests:
        config = checkpoint_config(folder, Shape(manifest.vocab_size, manifest.context, manifest.eos_id), "model")
        check_tokenizer(folder, manifest, "model")
    if masked:
        from distlm.model.documents import check_family

        check_family(config)


def inputs_of(spec: EvaluateSpec, storage: Storage) -> dict[str, Any]:
    """What an evaluation reads, by path and hash, for its lineage. Raises SpecError and InputError, before any work."""
    task = make_task(spec, storage)
    corpora: dict[str, Any] = {"corpora": {part.corpus: manifest_hash(part.corpus) for part in task.parts}} if task.parts else {}
    if files := read_tasks(spec.tasks):
        corpora["tasks"] = {file.config["task"]: file.hashes for file in files}
    if spec.model is not None:
        model = find_model(spec.model, storage)
        check_answers(files, context_of(model), model)
        return {"model": str(model), **corpora}
    from distlm.evaluate.endpoint import find_endpoint, find_tokenizer

    endpoint = find_endpoint(spec, storage)
    tokenizer = find_tokenizer(spec, task, endpoint, storage)
    check_answers(files, None, tokenizer)
    return {**endpoint.told(), **corpora, **({"tokenizer": {str(tokenizer): vocabulary_hash(tokenizer)}} if tokenizer else {})}
