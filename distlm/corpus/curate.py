"""From files to the documents of a corpus: every stage up to the split, in order.

    files ──read, clean──▶ documents, by ranges of their order keys ──sort──▶ partitions ──drop, shorten──▶ partitions ──▶ Curated

The order of documents is that of a hash of (seed, content), so that the result depends neither on how the files were dealt to tasks nor
on how many ran at a time.
"""

import math
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from distlm.corpus import boilerplate, fuzzy
from distlm.corpus.accounts import MAX_SAMPLES, Account, Samples, Step, account, add
from distlm.corpus.clusters import MAX_CLUSTERS, Cluster, excerpts, largest
from distlm.corpus.decontaminate import Evaluations, Found
from distlm.corpus.dedup import SortTask, sort_partition
from distlm.corpus.documents import ReadResult, ReadTask, Rules, check_keys, read_documents
from distlm.corpus.files import grouped
from distlm.corpus.fuzzy import Dropped
from distlm.corpus.job import Job
from distlm.corpus.paragraphs import Numbers
from distlm.corpus.partitions import read_column, read_row
from distlm.corpus.refine import (
    REPEATED,
    HashTask,
    LookTask,
    RefineResult,
    RefineTask,
    RepeatTask,
    ShortenTask,
    decontaminate_partition,
    find_equal,
    find_frequent,
    find_repeats,
    hash_pieces,
    refine_partition,
    shorten_partition,
    strip_partition,
)
from distlm.corpus.split import SplitRule
from distlm.spec.curate import Boilerplate, Filter, Fuzzy
from distlm.storage import write_atomic

Item = TypeVar("Item")
Result = TypeVar("Result")
RANGE_BYTES = 1 << 30
"""Text whose paragraphs one task holds the hashes of."""
READ_BYTES = 16 << 20
PARTITION_BYTES = 4 << 20
MAX_FILES_PER_TASK = 2000


@dataclass(frozen=True)
class Curated:
    """The documents of a corpus."""

    partitions: list[Path]
    """Arrow files that hold them in order."""
    rule: SplitRule
    splits: dict[str, Account]
    """Documents and bytes of each split, before one document may have been held out beside the rule."""
    clusters: list[dict[str, Any]]
    """The largest of documents that were alike, as duplicates.jsonl has them."""


def curate(job: Job, evaluations: Evaluations | None) -> Curated:
    """Raises CorpusError where nothing is left or the books do not balance, InputError for a filter of the user's, StorageError."""
    stages = _Curate(job, evaluations)
    stages.read()
    stages.sort()
    stages.drop_near_duplicates()
    stages.drop_boilerplate()
    stages.drop_paragraphs()
    return stages.hold_out()


@dataclass(frozen=True)
class Hashed:
    """How many pieces of how many documents were hashed, and how many documents must hold one."""

    documents: int
    pieces: int
    least: int


@dataclass
class _Curate:
    """The stages, and what they hand on."""

    job: Job
    evaluations: Evaluations | None
    rule: SplitRule = field(init=False)
    clusters: list[dict[str, Any]] = field(default_factory=list)
    found: Found = field(default_factory=Found)
    parts: list[Path] = field(default_factory=list)
    partitions: list[Path] = field(default_factory=list)
    splits: dict[str, Account] = field(default_factory=dict)
    candidates: list[bytes] = field(default_factory=list)
    """Of each partition, the document that would be held out for validation first."""

    def __post_init__(self) -> None:
        spec = self.job.spec
        shares = tuple(map(spec.shares, spec.sources)) if any(source.split for source in spec.sources) else ()
        self.rule = SplitRule(spec.split.val_fraction, spec.split.test_fraction, sources=shares)

    def read(self) -> None:
        """Read and clean every file."""
        job = self.job
        size = sum(file.bytes for file in job.files)
        self.partitions = [job.scratch / f"sorted-{i:04d}.arrow" for i in range(min(1024, max(8, size // PARTITION_BYTES)))]
        evaluations = job.scratch / "evaluations.pickle" if self.evaluations else None
        if evaluations:
            write_atomic(evaluations, pickle.dumps(self.evaluations))
        rules = tuple(Rules(job.spec.cleaning(source), source.weight, job.spec.filtering(source)) for source in job.spec.sources)
        target = min(READ_BYTES, max(1 << 20, size // 16))
        tasks = [ReadTask(i, first, job.inputs.ranges[first:last], rules, evaluations, job.spec.seed, len(self.partitions), job.scratch,
                          job.spec.conversations, job.spec.labels)
                 for i, (first, last) in enumerate(grouped(job.inputs.ranges, target, MAX_FILES_PER_TASK))]
        results, done, documents = dict[int, ReadResult](), 0, 0
        for i, result in job.each("read", read_documents, tasks):
            results[i] = result
            done += sum(job.inputs.ranges[fact["number"]].end is None for fact in result.facts)
            documents += result.decontaminate.given["documents"]
            job.progress.update("files", done, len(job.files), documents=documents)
        whole = ReadResult()
        for _, result in sorted(results.items()):
            whole.merge(result)
        self.parts, self.found = whole.parts, whole.found
        if whole.retries:
            several = whole.retries > 1
            job.progress.note(f"{whole.retries:,} read{'s' if several else ''} of a store failed and {'were' if several else 'was'} "
                              "taken up again")
        job.books.add(whole.read, whole.clean, *([whole.sample] if any(one.weight < 1 for one in rules) else []),
                      *([whole.filter] if any(one.filter != Filter() for one in rules) else []),
                      *([whole.decontaminate] if job.spec.decontaminate else []))
        job.inputs.join([{**fact, "documents": whole.kept[fact["number"]]} for fact in whole.facts])
        job.books.sample_read(whole.samples)
        job.books.write_samples()
        check_keys(job.spec, whole)
        if whole.annotated:
            job.figures["annotated"] = dict(sorted(whole.annotated.items()))
        if whole.languages:
            job.figures["languages"] = {name: {"documents": count, "unwanted": whole.unwanted[name]}
                                        for name, count in sorted(whole.languages.items())}
        if whole.redactions:
            job.figures["redactions"] = dict(sorted(whole.redactions.items()))
        if self.evaluations:
            job.figures["decontamination"] = self.evaluations.report(self.found)
        job.books.check_left(whole.decontaminate)

    def sort(self) -> None:
        """Bring the documents into order, and drop those of equal text."""
        job = self.job
        ranks = job.inputs.ranks(self.rule.whole)
        tasks = [SortTask(i, self.parts, job.spec.dedup.exact, self.rule, ranks, path, job.spec.labels)
                 for i, path in enumerate(self.partitions)]
        dedup, found, clusters = Step("dedup"), Samples(), list[dict[str, Any]]()
        for _, result in job.each("sort", sort_partition, tasks):
            dedup.merge(result.dedup)
            self._count(result.splits, result.next_val)
            found.merge([result.samples], ("key", "place"))
            clusters += result.clusters
        for one in sorted(clusters, key=lambda one: (-one["documents"], one["key"]))[:MAX_CLUSTERS]:
            members = [{**job.inputs.record(file, record), "id": name, "bytes": one["bytes"]} for file, record, name in one["members"]]
            members[0]["text"] = one["text"]
            self.clusters.append({"step": "dedup", "documents": one["documents"], "members": members})
        for reason, kept in found.kept.items():
            for sample in kept:
                names = {key: job.inputs.record(*sample[key]) for key in ("place", "same_as")}
                rest = {key: value for key, value in sample.items() if key not in ("key", "place", "same_as")}
                job.books.samples.add(reason, {**names["place"], **rest, "same_as": names["same_as"]})
        job.books.add(dedup)

    def drop_near_duplicates(self) -> None:
        """Drop what is nearly equal to an earlier document."""
        job = self.job
        rules = job.spec.dedup.fuzzy
        if rules is None:
            return
        least = fuzzy.min_similarity(rules)
        job.progress.note(f"near-duplicates from a similarity of {least:.3f} on: at 0.7, 0.8, 0.9 they are found with a probability of "
                          + ", ".join(f"{fuzzy.probability(s, rules.bands, rules.rows):.3f}" for s in (0.7, 0.8, 0.9)))
        self._drop_near("fuzzy", "near_duplicate", rules)

    def drop_boilerplate(self) -> None:
        """Drop the lines that many documents hold, then the documents that are alike without them."""
        job = self.job
        rules = job.spec.clean.boilerplate
        if rules is None:
            return
        let_alone = tuple(i for i, source in enumerate(job.spec.sources) if job.spec.cleaning(source).boilerplate is None)
        hashed, found = self._hash("lines", rules, find_frequent, let_alone)
        whole = self.partitions
        self._refine("strip", strip_partition, "stripped", lambda i, path, output: ShortenTask(
            i, path, len(found), self.rule, job.scratch / "hash_lines", output))
        for count, partition, row, index in sorted(one for frequent in found for one in frequent.first)[:MAX_SAMPLES]:
            line = read_row(whole[partition], row, "text")["text"].split("\n")[index]
            job.books.samples.add(boilerplate.LINES, {**job.inputs.place(whole[partition], row), "bytes": len(line.encode()),
                                                      "detail": f"in {-count:,} documents", "text": line})
        job.figures["boilerplate"] = {"min_documents": hashed.least, "documents": hashed.documents, "candidates": hashed.pieces,
                                      "lines": sum(one.distinct for one in found)}
        self._drop_again("texts", "stripped", "without_boilerplate", boilerplate.LINES in job.books.steps[-1].rejected)

    def drop_paragraphs(self) -> None:
        """Drop the paragraphs that an earlier document holds, then the documents that are alike without them."""
        job = self.job
        if job.spec.dedup.paragraphs is None:
            return
        least = job.spec.dedup.paragraphs
        hashed, repeated = self._hash("paragraphs", least, find_repeats)
        self._refine("shorten", shorten_partition, "shortened", lambda i, path, output: ShortenTask(
            i, path, len(repeated), self.rule, job.scratch / "hash_paragraphs", output))
        job.figures["paragraphs"] = {"min_chars": least, "paragraphs": hashed.pieces, "repeated": sum(repeated)}
        self._drop_again("rests", "shortened", "without_paragraphs", REPEATED in job.books.steps[-1].rejected)

    def hold_out(self) -> Curated:
        """Decide what is held out."""
        job, rule = self.job, self.rule
        given = dict(job.books.steps[-1].given)
        if rule.may_hold_out and not self.splits["val"]["documents"]:
            if given["documents"] > 1 and self.candidates:
                self.rule = replace(rule, held_out=min(self.candidates))
                job.progress.note(f"val_fraction {rule.val_fraction} of {given['documents']} documents is none: one is held out, so "
                                  "that there is a validation split")
            elif given["documents"] == 1:
                job.progress.note("there is one document only: no validation split")
        job.books.add(Step("split", given, {unit: sum(self.splits[name][unit] for name in rule.names) for unit in given}))
        job.books.write_samples()
        return Curated(self.partitions, self.rule, self.splits, self.clusters)

    def _drop_again(self, what: str, step: str, without: str, changed: bool) -> None:
        """Now that parts of documents are gone, drop those that hold a part of an evaluation text, which what is gone had cut, then those
        that are equal, or nearly so: they would straddle the splits."""
        job = self.job
        if self.evaluations and changed:
            name = f"decontaminate_{step}"
            self._refine(name, decontaminate_partition, name, lambda i, path, output: LookTask(
                i, path, job.scratch / "evaluations.pickle", self.rule, output, name, without))
            job.figures["decontamination"] = self.evaluations.report(self.found)
        if job.spec.dedup.exact:
            _, equal = self._hash(what, None, find_equal)
            self._drop(f"drop_{what}", [fuzzy.merged([one[i] for one in equal]) for i in range(len(self.partitions))], f"dedup_{step}",
                       f"duplicate_{without}")
        if job.spec.dedup.fuzzy and changed:
            self._drop_near(f"fuzzy_{step}", f"near_duplicate_{without}", job.spec.dedup.fuzzy)

    def _drop_near(self, step: str, reason: str, rules: Fuzzy) -> None:
        """Drop what is nearly equal to an earlier document, as the documents are now."""
        job = self.job
        scratch = job.scratch / step
        found = fuzzy.near_duplicates(self.partitions, rules, scratch, lambda function, tasks: job.each(
            f"{step}/{function.__name__}", function, tasks), self._preferred())
        self._drop(f"{step}/refine_partition", found.dropped, step, reason)
        job.figures[step] = {"min_similarity": round(fuzzy.min_similarity(rules), 6), "documents": found.documents,
                             "candidates": found.candidates, "pairs": found.pairs, "clusters": found.clusters, "largest": found.largest}
        for path in scratch.glob("fuzzy-*"):               # more than the text itself, and no stage reads them again
            path.unlink(missing_ok=True)

    def _drop(self, stage: str, dropped: Sequence[Dropped], step: str, reason: str) -> None:
        """Drop these documents of each partition."""
        self.clusters += [self._sampled(step, cluster) for cluster in largest(dropped)]
        self._refine(stage, refine_partition, step, lambda i, path, output: RefineTask(
            i, path, dropped[i], self.rule, output, step, reason))

    def _sampled(self, step: str, cluster: Cluster) -> dict[str, Any]:
        members, texts = list[dict[str, Any]](), list[str]()
        for place in cluster.members:
            path, row = self.partitions[place[0]], place[1]
            found = read_row(path, row, "id", "text")
            members.append({**self.job.inputs.place(path, row), "id": found["id"], "bytes": len(found["text"].encode())})
            texts = [*texts, found["text"]][:2]
        for member, similarity in zip(members[1:], cluster.similarities, strict=True):
            member["similarity"] = similarity
        for member, text in zip(members, excerpts(*texts), strict=False):
            member["text"] = text
        return {"step": step, "documents": cluster.documents, "members": members}

    def _hash(self, what: str, of: int | Boilerplate | None, find: Callable[[RepeatTask], Result],
              let_alone: tuple[int, ...] = ()) -> tuple[Hashed, list[Result]]:
        """Hash pieces of all documents but those of sources that are let alone, and find what is there several times: figures, and what
        `find` says of each range."""
        job = self.job
        scratch = job.scratch / f"hash_{what}"
        ranges = max(1, job.books.steps[-1].given["bytes"] // RANGE_BYTES)
        tasks = [HashTask(i, path, of, let_alone, ranges, scratch) for i, path in enumerate(self.partitions)]
        documents, pieces = np.sum([found for _, found in job.each(scratch.name, hash_pieces, tasks)], axis=0).tolist()
        least = max(of.min_documents, math.ceil(of.min_fraction * documents)) if isinstance(of, Boilerplate) else 2
        preferred = self._preferred()
        repeated = [RepeatTask(i, len(self.partitions), scratch, least, preferred) for i in range(ranges)]
        found = sorted(job.each(f"find_{what}", find, repeated), key=lambda pair: pair[0])
        return Hashed(documents, pieces, least), [one for _, one in found]

    def _preferred(self) -> Numbers:
        """The numbers of the documents of sources that are held out as a whole: of what several documents hold, they keep theirs."""
        return np.array([partition << 32 | row for partition, path in enumerate(self.partitions) if self.rule.whole
                         for row in np.flatnonzero(np.isin(read_column(path, "origin"), self.rule.whole)).tolist()], np.int64)

    def _refine(self, stage: str, function: Callable[[Item], RefineResult], name: str, task: Callable[[int, Path, Path], Item]) -> None:
        """Run a step that drops documents from the partitions, and keep its books. It writes files of this name; `task` is given a
        partition's number, its file and the one to write."""
        outputs = [self.job.scratch / f"{name}-{i:04d}.arrow" for i in range(len(self.partitions))]
        tasks = [task(i, *paths) for i, paths in enumerate(zip(self.partitions, outputs, strict=True))]
        results = [result for _, result in sorted(self.job.each(stage, function, tasks), key=lambda pair: pair[0])]
        step = Step(results[0].step.name)
        self.splits, self.candidates = {}, []
        for result in results:
            step.merge(result.step)
            self._count(result.splits, result.next_val)
            self.found.merge(result.found)
        self.job.books.sample([result.samples for result in results], self.partitions)
        self.job.books.add(step)
        self.partitions = outputs

    def _count(self, splits: dict[str, Account], next_val: bytes) -> None:
        for name in self.rule.names:
            add(self.splits.setdefault(name, account()), splits[name]["documents"], splits[name]["bytes"])
        if next_val:
            self.candidates.append(next_val)
