"""What is evaluated: which windows of which corpora, cut into batches that do not depend on who takes them.

    task = make_task(spec, storage)
    rows = Reader(task).read(0)                            # the windows of the first batch
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distlm.corpus.labels import first_of
from distlm.corpus.listing import tells_sources
from distlm.corpus.manifest import Manifest, manifest_hash, read_manifest
from distlm.corpus.stream import Windows, silent
from distlm.errors import InputError, SpecError
from distlm.evaluate.groups import read_tasks
from distlm.evaluate.tasks import check_answers
from distlm.model.build import (
    Shape,
    check_counts,
    check_predicts,
    check_tells_labels,
    checkpoint_config,
    has_classifier,
    labels_of,
    read_config,
    settle_kind,
    skeleton,
)
from distlm.model.encoder import UNFRAMED, is_encoder, read_frame
from distlm.model.find import find_model
from distlm.model.vocabulary import vocabulary_hash
from distlm.spec import EvaluateSpec
from distlm.spec.base import Rule, without_effect
from distlm.storage import Storage
from distlm.train.recipe import check_tokenizer, find_corpus

NO_LANGUAGE_MODEL = ("it is a classifier, and only language models can be here", "`kind: evaluate` measures it")
"""What is told of a classifier that is to be compressed, and what to do with it."""


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
    label_ids: tuple[int, ...] = ()
    """The classifier's number of each of the corpus's labels."""


@dataclass(frozen=True)
class Task:
    """All that decides the numbers but the model."""

    split: str
    parts: tuple[Part, ...]
    batch_windows: int
    bins: int
    labels: tuple[str, ...] = ()
    """Those of a classifier, by their numbers; none for a language model."""
    multiple_labels: bool = False
    """Whether a document may have any number of them."""

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


@dataclass(frozen=True)
class Labelled:
    """The documents of a batch, each in a window of its own."""

    part: Part
    tokens: NDArray[np.int64]
    """[documents, context], filled up with the end token."""
    labels: NDArray[np.int64]
    """[documents, k], as corpus.stream has them, by the classifier's numbers."""
    groups: NDArray[np.int64]
    """[documents]: the source of each, by its number among those of all corpora."""
    end: int
    """The token that ends a document."""

    @property
    def lengths(self) -> NDArray[np.int64]:
        """[documents]: the tokens of each up to the last that is not the end token, one at least."""
        return np.maximum(((self.tokens != self.end) * np.arange(1, self.tokens.shape[1] + 1)).max(1), 1)


class Reader:
    """The windows of a task's batches. A shard is checked when it is first opened."""

    def __init__(self, task: Task) -> None:
        self.task, self._batches = task, task.batches
        self._windows = [Windows(part.corpus, task.split) for part in task.parts]

    def labelled(self, batch: int) -> Labelled:
        """Raises CorpusError for a corpus that is damaged."""
        part, windows, shards, rows = self._places(batch)
        groups = np.full(len(rows), part.first_group, np.int64)
        if part.by_source:
            groups += windows.sources_of(windows.documents(shards, rows)[:, 0])
        given = windows.labels(shards, rows).astype(np.int64)
        if self.task.multiple_labels:
            labels = np.zeros((len(rows), len(self.task.labels)), np.int64)
            labels[:, part.label_ids] = given
        else:
            labels = np.asarray(part.label_ids)[given]
        return Labelled(part, windows.read(shards, rows)[:, :-1].astype(np.int64), labels, groups, windows.manifest.eos_id)

    def _places(self, batch: int) -> tuple[Part, Windows, NDArray[np.int64], NDArray[np.int64]]:
        """(the part, its windows, shard and row of each of the batch)"""
        i, first, count = self._batches[batch]
        shards, rows = self._windows[i].first(first + count)
        return self.task.parts[i], self._windows[i], shards[first:], rows[first:]

    def read(self, batch: int) -> Rows:
        """Raises CorpusError for a corpus that is damaged."""
        part, windows, shards, rows = self._places(batch)
        tokens, marks = windows.read(shards, rows).astype(np.int64), windows.marks(shards, rows)
        groups = np.full((len(rows), tokens.shape[1] - 1), part.first_group, dtype=np.int64)
        if part.by_source:
            groups += windows.sources_of(windows.documents(shards, rows)[:, 1:])
        return Rows(part, tokens, marks, ~silent(marks, part.mask_documents)[:, 1:], groups, windows.bytes_of(tokens[:, 1:]))


def make_task(spec: EvaluateSpec, storage: Storage) -> Task:
    """Raises InputError for a corpus that is not there, has no window in the split, or is not that of the model, SpecError for what has no
    effect with a model that is a classifier. What an endpoint serves is not known here."""
    parts: list[Part] = []
    for i, manifest in enumerate(manifests := read_corpora(spec, storage)):
        masked = manifest.best_fit if spec.mask_documents is None else spec.mask_documents
        total = manifest.splits[spec.split].windows
        names = [one.name for one in manifests]
        by_source = tells_sources(manifest)
        sources = tuple(manifest.source_names) if by_source else (manifest.name,)
        parts.append(Part(str(manifest.path), manifest.name if names.count(manifest.name) == 1 else spec.corpora[i],
                          min(total, spec.windows or total), masked, sources, by_source, sum(len(part.sources) for part in parts)))
    task = Task(spec.split, tuple(parts), spec.batch_windows, spec.calibration_bins)
    if spec.model is None:
        return task
    model = find_model(spec.model, storage)
    config = read_config(model, where := f"model: {model}")
    if not has_classifier(config):
        check_predicts(config, where)
        check_model(model, manifests, any(part.mask_documents for part in parts))
        return task
    check_tells_labels(config, where)
    check_classifier(spec, manifests, str(model))
    check_model(model, manifests, False)
    settle_kind(config)
    skeleton(config)                                       # of a family whose classifiers read the last token
    return with_labels(task, manifests, labels_of(config), config.problem_type, where)


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
            why, remedy = split.why_empty(bool(manifest.labels))
            raise InputError(f"the corpus {manifest.name} has no window in its split {spec.split}: {why}", where="split",
                             remedy=f"prepare it with {remedy}")
        if manifest.path in [one.path for one in found]:
            raise InputError(f"{manifest.path} is there twice", where=key, remedy="give it once")
        found.append(manifest)
    return found


def check_generates(folder: Path) -> None:
    """Raises InputError for a classifier and for an encoder."""
    config = read_config(folder, where := f"model: {folder}")
    check_predicts(config, where)
    if has_classifier(config):
        raise InputError(NO_LANGUAGE_MODEL[0], where=where, remedy=NO_LANGUAGE_MODEL[1])


def check_classifier(spec: EvaluateSpec, manifests: Sequence[Manifest], where: str) -> None:
    """Raises SpecError for what has no effect with a classifier, InputError for a corpus without labels. `where` is the classifier."""
    if spec.tasks:
        raise SpecError(f"tasks are questions to a language model, and {where} is a classifier", where="tasks",
                        remedy="leave them out, and name a corpus that was prepared with labels")
    try:
        without_effect(spec, "with a classifier", "prompts", "mask_documents")
        if any(manifest.multiple_labels for manifest in manifests):
            without_effect(spec, "where documents may have several labels", "calibration_bins")
    except Rule as rule:
        raise SpecError(str(rule), where=rule.key) from None
    if bare := next((manifest.name for manifest in manifests if not manifest.labels), ""):
        raise InputError(f"{where} is a classifier, and the documents of the corpus {bare} have no labels", where="corpus",
                         remedy="prepare it with labels, or name a language model")


def with_labels(task: Task, manifests: Sequence[Manifest], names: Sequence[str], kind: str | None, where: str) -> Task:
    """The task of a classifier of these names; `kind` is its `problem_type`. Raises InputError where a corpus has a label that it does not
    know. The corpus may lack labels, and number them in its own order."""
    ids = {name: number for number, name in enumerate(names)}
    for manifest in manifests:
        if other := [name for name in manifest.labels if name not in ids]:
            raise InputError(f"the checkpoint tells apart {first_of([*names])}, and documents of {manifest.name} have the label "
                             f"{first_of(other)}", where=where,
                             remedy=f"prepare {manifest.name} with labels.names: {json.dumps([*names], ensure_ascii=False)}, which leaves "
                                    "out documents with others, or take a classifier of its labels")
        check_counts(kind, manifest.multiple_labels, where, f"take a classifier of the labels of {manifest.name}, or prepare it with "
                                                            f"labels.multiple: {str(not manifest.multiple_labels).lower()}")
    parts = [replace(part, mask_documents=False, label_ids=tuple(ids[name] for name in manifest.labels))
             for part, manifest in zip(task.parts, manifests, strict=True)]
    return replace(task, parts=tuple(parts), labels=tuple(names), multiple_labels=manifests[0].multiple_labels)


def check_model(folder: Path, manifests: list[Manifest], masked: bool) -> None:
    """Raises InputError where a model cannot read the windows of a corpus, and SpecError where it cannot keep documents apart."""
    for manifest in manifests:
        frame = read_frame(manifest.tokenizer) if manifest.labels else UNFRAMED
        shape = Shape(manifest.vocab_size, manifest.context, manifest.eos_id, manifest.labels, frame=frame)
        config = checkpoint_config(folder, shape, "model")
        check_tokenizer(folder, manifest, "model", is_encoder(config))
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
        check_answers(files, context_of(model), model, spec.chat)
        return {"model": str(model), **corpora}
    from distlm.evaluate.endpoint import find_endpoint, find_tokenizer

    endpoint = find_endpoint(spec, storage)
    if endpoint.classifies:
        check_classifier(spec, [read_manifest(part.corpus) for part in task.parts], f"{endpoint.model} at {endpoint.url}")
    tokenizer = find_tokenizer(spec, task, endpoint, storage)
    check_answers(files, None, tokenizer, spec.chat)
    return {**endpoint.told(), **corpora, **({"tokenizer": {str(tokenizer): vocabulary_hash(tokenizer)}} if tokenizer else {})}
