"""`kind: prepare`: from raw text to a corpus.

    files ──read, clean──▶ documents, by ranges of their order keys ──sort, dedup, split──▶ partitions ──encode──▶ tokens ──pack──▶ shards

Each arrow is a function over files or partitions that Ray Data runs in parallel; what stands between is on a scratch folder in the
corpus folder. The order of documents is that of a hash of (seed, content), so that the result depends neither on how the files were
dealt to tasks nor on how many ran at a time. What the corpus will hold is made on the scratch folder too and moved when it is whole;
the manifest is written last: a folder without one is no corpus.
"""

import functools
import json
import math
import pickle
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from distlm import __version__
from distlm.corpus import boilerplate, fuzzy
from distlm.corpus.accounts import MAX_SAMPLES, Account, Samples, Step, account, add
from distlm.corpus.attempts import MADE, clear, take_back
from distlm.corpus.bestfit import BestFitTask, Packed, document_groups, groups, write_best_fit
from distlm.corpus.books import Books
from distlm.corpus.clusters import MAX_CLUSTERS, Cluster, excerpts, largest
from distlm.corpus.decontaminate import Evaluations, Found
from distlm.corpus.dedup import SortTask, read_column, read_row, sort_partition
from distlm.corpus.documents import ReadResult, ReadTask, Rules, check, check_keys, read_documents
from distlm.corpus.encode import Encoded, EncodeTask, encode_partition
from distlm.corpus.files import TextFile, grouped
from distlm.corpus.fuzzy import Dropped
from distlm.corpus.identity import attempt_hash, is_complete, parameters
from distlm.corpus.inputs import Inputs
from distlm.corpus.labels import check_labels
from distlm.corpus.listing import count_sources
from distlm.corpus.manifest import Shard, manifest_of, outputs, read_manifest, write_manifest
from distlm.corpus.pack import PackTask, num_windows, write_shard
from distlm.corpus.paragraphs import Numbers
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
from distlm.corpus.report import write_report
from distlm.corpus.split import SplitRule
from distlm.corpus.spread import default_workers, spread
from distlm.corpus.tokenizer import Vocabulary, VocabularyTask, make_tokenizer
from distlm.errors import CorpusError, InputError
from distlm.progress import Progress
from distlm.runs import RunFolder
from distlm.spec import PrepareSpec
from distlm.spec.prepare import Boilerplate, Conversations, Filter, Fuzzy, Labels
from distlm.storage import Storage, write_atomic, writing

Item = TypeVar("Item")
Result = TypeVar("Result")
FUZZY = ("fuzzy", "fuzzy_stripped", "fuzzy_shortened")
"""The looks for near-duplicates: at whole documents, and again at what is left of them."""
STAGES = ("read", "sort", "hash_lines", "find_lines", "strip", "hash_texts", "find_texts", "drop_texts", "hash_paragraphs",
          "find_paragraphs", "shorten", "decontaminate_stripped", "decontaminate_shortened", "hash_rests", "find_rests", "drop_rests",
          "vocabulary", "encode", "pack",
          *(f"{step}/{stage}" for step in FUZZY for stage in ("sign_partition", "pair_bucket", "confirm", "refine_partition")))
RANGE_BYTES = 1 << 30
"""Text whose paragraphs one task holds the hashes of."""
READ_BYTES = 16 << 20
PARTITION_BYTES = 4 << 20
MAX_FILES_PER_TASK = 2000


def prepare(spec: PrepareSpec, folder: RunFolder, storage: Storage, progress: Progress) -> dict[str, Any]:
    """Make the corpus in `folder`. A complete one of the same files and rules is kept. Ray is running.

    Raises InputError before any work, CorpusError for text that cannot become a corpus, StorageError.
    """
    files, evaluations = check(spec)
    rules = parameters(spec, evaluations)
    if is_complete(spec, rules, folder.path, files):
        progress.note("the corpus is complete, and its sources are as they were: nothing to do")
        clear(folder.path, ".scratch-*")
        return outputs(read_manifest(folder.path))
    job = _Prepare(spec, rules, evaluations, folder.path, progress, files, spec.workers or default_workers())
    take_back(folder.path, job.scratch)
    clear(folder.path, *MADE, but=job.scratch)
    try:
        with writing(job.scratch):
            for name in ("tokenizer", *job.rule.names, *STAGES):
                (job.scratch / name).mkdir(parents=True, exist_ok=True)
        job.read()
        job.sort()
        job.drop_near_duplicates()
        job.drop_boilerplate()
        job.drop_paragraphs()
        job.hold_out()
        vocabulary = job.make_vocabulary()
        shards = job.pack(vocabulary, job.encode(vocabulary))
        job.commit(vocabulary, shards)
    except (CorpusError, InputError):                      # it would fail again; the samples of what was rejected may say why
        clear(folder.path, *MADE[:-1], ".scratch-*")
        raise
    except BaseException:                                  # what is done is done: the next attempt goes on with it
        take_back(folder.path, job.scratch)
        clear(folder.path, *MADE[:-1])
        raise
    clear(folder.path, ".scratch-*")
    return outputs(read_manifest(folder.path))


@dataclass(frozen=True)
class Hashed:
    """How many pieces of how many documents were hashed, and how many documents must hold one."""

    documents: int
    pieces: int
    least: int


@dataclass
class _Prepare:
    """One job: the stages in order, and what they hand on."""

    spec: PrepareSpec
    rules: dict[str, Any]
    """The manifest's `parameters`."""
    evaluations: Evaluations | None
    folder: Path
    progress: Progress
    files: list[TextFile]
    workers: int
    inputs: Inputs = field(init=False)
    books: Books = field(init=False)
    clusters: list[dict[str, Any]] = field(default_factory=list)
    """The largest of documents that are alike, as duplicates.jsonl has them."""
    annotated: Counter[str] = field(default_factory=Counter)
    redactions: Counter[str] = field(default_factory=Counter)
    found: Found = field(default_factory=Found)
    parts: list[Path] = field(default_factory=list)
    splits: dict[str, Account] = field(default_factory=dict)
    candidates: list[bytes] = field(default_factory=list)
    rule: SplitRule = field(init=False)
    figures: dict[str, Any] = field(default_factory=dict)
    """What the manifest tells beside the accounts."""
    partitions: list[Path] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.inputs = Inputs(self.spec, self.files)
        self.books = Books(self.folder, self.inputs, self.progress)
        shares = tuple(map(self.spec.shares, self.spec.sources)) if any(source.split for source in self.spec.sources) else ()
        self.rule = SplitRule(self.spec.split.val_fraction, self.spec.split.test_fraction, sources=shares)

    @functools.cached_property
    def scratch(self) -> Path:
        """A folder of these rules and files alone: another attempt at the same finds there what this one has done. Every file in it
        is replaced whole, so that a task of a failed attempt that still runs does no harm."""
        return self.folder / f".scratch-{attempt_hash(self.spec, self.rules, self.inputs.ranges)}"

    def each(self, stage: str, function: Callable[[Item], Result], items: Sequence[Item], workers: int | None = None) -> \
            Iterator[tuple[int, Result]]:
        """`spread`, with what an earlier attempt has done."""
        done = sum(1 for _ in (self.scratch / stage).glob("*.pickle"))
        if done:
            self.progress.note(f"{stage}: {done:,} of {len(items):,} parts are done already")
        return spread(function, items, workers or self.workers, self.scratch / stage)

    def read(self) -> None:
        """Read and clean every file."""
        size = sum(file.bytes for file in self.files)
        self.partitions = [self.scratch / f"sorted-{i:04d}.arrow" for i in range(min(1024, max(8, size // PARTITION_BYTES)))]
        evaluations = self.scratch / "evaluations.pickle" if self.evaluations else None
        if evaluations:
            write_atomic(evaluations, pickle.dumps(self.evaluations))
        rules = tuple(Rules(self.spec.cleaning(source), source.weight, self.spec.filtering(source)) for source in self.spec.sources)
        target = min(READ_BYTES, max(1 << 20, size // 16))
        tasks = [ReadTask(i, first, self.inputs.ranges[first:last], rules, evaluations, self.spec.seed, len(self.partitions), self.scratch,
                          self.spec.conversations, self.spec.labels)
                 for i, (first, last) in enumerate(grouped(self.inputs.ranges, target, MAX_FILES_PER_TASK))]
        results: list[ReadResult | None] = [None] * len(tasks)
        found, done, documents = list[dict[str, Any]](), 0, 0
        for i, result in self.each("read", read_documents, tasks):
            results[i] = result
            done += sum(self.inputs.ranges[fact["number"]].end is None for fact in result.facts)
            documents += result.decontaminate.given["documents"]
            self.progress.update("files", done, len(self.files), documents=documents)
        complete = [result for result in results if result is not None]
        languages, unwanted = Counter[str](), Counter[str]()
        read, clean, sampled, filtered, decontaminated = map(Step, ("read", "clean", "sample", "filter", "decontaminate"))
        for result in complete:
            for whole, part in ((read, result.read), (clean, result.clean), (sampled, result.sample), (filtered, result.filter),
                                (decontaminated, result.decontaminate)):
                whole.merge(part)
            found += [{**fact, "documents": result.kept[fact["number"]]} for fact in result.facts]
            self.found.merge(result.found)
            self.parts += result.parts
            self.annotated.update(result.annotated)
            self.redactions.update(result.redactions)
            languages.update(result.languages)
            unwanted.update(result.unwanted)
        if retries := sum(result.retries for result in complete):
            self.progress.note(f"{retries:,} read{'s' if retries > 1 else ''} of a store failed and {'were' if retries > 1 else 'was'} "
                               "taken up again")
        self.books.add(read, clean, *([sampled] if any(one.weight < 1 for one in rules) else []),
                       *([filtered] if any(one.filter != Filter() for one in rules) else []),
                       *([decontaminated] if self.spec.decontaminate else []))
        self.inputs.join(found)
        self.books.sample_read([result.samples for result in complete])
        self.books.write_samples()
        check_keys(self.spec, complete)
        if self.annotated:
            self.figures["annotated"] = dict(sorted(self.annotated.items()))
        if languages:
            self.figures["languages"] = {name: {"documents": languages[name], "unwanted": unwanted[name]} for name in sorted(languages)}
        if self.redactions:
            self.figures["redactions"] = dict(sorted(self.redactions.items()))
        if self.evaluations:
            self.figures["decontamination"] = self.evaluations.report(self.found)
        self.books.check_left(decontaminated)

    def sort(self) -> None:
        """Bring the documents into order, and drop those of equal text."""
        ranks = self.inputs.ranks(self.rule.whole)
        tasks = [SortTask(i, self.parts, self.spec.dedup.exact, self.rule, ranks, path, self.spec.labels)
                 for i, path in enumerate(self.partitions)]
        dedup, found, clusters = Step("dedup"), Samples(), list[dict[str, Any]]()
        for _, result in self.each("sort", sort_partition, tasks):
            dedup.merge(result.dedup)
            self._count(result.splits, result.next_val)
            found.merge([result.samples], ("key", "place"))
            clusters += result.clusters
        for one in sorted(clusters, key=lambda one: (-one["documents"], one["key"]))[:MAX_CLUSTERS]:
            members = [{**self.inputs.record(file, record), "id": name, "bytes": one["bytes"]} for file, record, name in one["members"]]
            members[0]["text"] = one["text"]
            self.clusters.append({"step": "dedup", "documents": one["documents"], "members": members})
        for reason, kept in found.kept.items():
            for sample in kept:
                names = {key: self.inputs.record(*sample[key]) for key in ("place", "same_as")}
                rest = {key: value for key, value in sample.items() if key not in ("key", "place", "same_as")}
                self.books.samples.add(reason, {**names["place"], **rest, "same_as": names["same_as"]})
        self.books.add(dedup)

    def drop_near_duplicates(self) -> None:
        """Drop what is nearly equal to an earlier document."""
        rules = self.spec.dedup.fuzzy
        if rules is None:
            return
        least = fuzzy.min_similarity(rules)
        self.progress.note(f"near-duplicates from a similarity of {least:.3f} on: at 0.7, 0.8, 0.9 they are found with a probability of "
                           + ", ".join(f"{fuzzy.probability(s, rules.bands, rules.rows):.3f}" for s in (0.7, 0.8, 0.9)))
        self._drop_near("fuzzy", "near_duplicate", rules)

    def drop_boilerplate(self) -> None:
        """Drop the lines that many documents hold, then the documents that are alike without them."""
        rules = self.spec.clean.boilerplate
        if rules is None:
            return
        let_alone = tuple(i for i, source in enumerate(self.spec.sources) if self.spec.cleaning(source).boilerplate is None)
        hashed, found = self._hash("lines", rules, find_frequent, let_alone)
        outputs = self._outputs("stripped")
        self._refine("strip", strip_partition, [ShortenTask(i, path, len(found), self.rule, self.scratch / "hash_lines", outputs[i])
                                                for i, path in enumerate(self.partitions)])
        for count, partition, row, index in sorted(one for frequent in found for one in frequent.first)[:MAX_SAMPLES]:
            line = read_row(self.partitions[partition], row, "text")["text"].split("\n")[index]
            self.books.samples.add(boilerplate.LINES, {**self.inputs.place(self.partitions[partition], row), "bytes": len(line.encode()),
                                                 "detail": f"in {-count:,} documents", "text": line})
        self.figures["boilerplate"] = {"min_documents": hashed.least, "documents": hashed.documents, "candidates": hashed.pieces,
                                       "lines": sum(one.distinct for one in found)}
        self.partitions = outputs
        self._drop_again("texts", "stripped", "without_boilerplate", boilerplate.LINES in self.books.steps[-1].rejected)

    def drop_paragraphs(self) -> None:
        """Drop the paragraphs that an earlier document holds, then the documents that are alike without them."""
        if self.spec.dedup.paragraphs is None:
            return
        least = self.spec.dedup.paragraphs
        hashed, repeated = self._hash("paragraphs", least, find_repeats)
        outputs = self._outputs("shortened")
        self._refine("shorten", shorten_partition, [ShortenTask(i, path, len(repeated), self.rule, self.scratch / "hash_paragraphs",
                                                                outputs[i]) for i, path in enumerate(self.partitions)])
        self.figures["paragraphs"] = {"min_chars": least, "paragraphs": hashed.pieces, "repeated": sum(repeated)}
        self.partitions = outputs
        self._drop_again("rests", "shortened", "without_paragraphs", REPEATED in self.books.steps[-1].rejected)

    def _drop_again(self, what: str, step: str, without: str, changed: bool) -> None:
        """Now that parts of documents are gone, drop those that hold a part of an evaluation text, which what is gone had cut, then those
        that are equal, or nearly so: they would straddle the splits."""
        if self.evaluations and changed:
            name = f"decontaminate_{step}"
            outputs = self._outputs(name)
            self._refine(name, decontaminate_partition, [LookTask(i, path, self.scratch / "evaluations.pickle", self.rule, outputs[i], name,
                                                                  without) for i, path in enumerate(self.partitions)])
            self.partitions = outputs
            self.figures["decontamination"] = self.evaluations.report(self.found)
        if self.spec.dedup.exact:
            _, equal = self._hash(what, None, find_equal)
            self._drop(f"drop_{what}", [fuzzy.merged([one[i] for one in equal]) for i in range(len(self.partitions))], f"dedup_{step}",
                       f"duplicate_{without}")
        if self.spec.dedup.fuzzy and changed:
            self._drop_near(f"fuzzy_{step}", f"near_duplicate_{without}", self.spec.dedup.fuzzy)

    def _drop_near(self, step: str, reason: str, rules: Fuzzy) -> None:
        """Drop what is nearly equal to an earlier document, as the documents are now."""
        scratch = self.scratch / step
        found = fuzzy.near_duplicates(self.partitions, rules, scratch, lambda function, tasks: self.each(
            f"{step}/{function.__name__}", function, tasks), self._preferred())
        self._drop(f"{step}/refine_partition", found.dropped, step, reason)
        self.figures[step] = {"min_similarity": round(fuzzy.min_similarity(rules), 6), "documents": found.documents,
                              "candidates": found.candidates, "pairs": found.pairs, "clusters": found.clusters, "largest": found.largest}
        for path in scratch.glob("fuzzy-*"):               # more than the text itself, and no stage reads them again
            path.unlink(missing_ok=True)

    def _drop(self, stage: str, dropped: Sequence[Dropped], step: str, reason: str) -> None:
        """Drop these documents of each partition."""
        outputs = self._outputs(step)
        self.clusters += [self._sampled(step, cluster) for cluster in largest(dropped)]
        self._refine(stage, refine_partition, [RefineTask(i, path, dropped[i], self.rule, outputs[i], step, reason)
                                               for i, path in enumerate(self.partitions)])
        self.partitions = outputs

    def _sampled(self, step: str, cluster: Cluster) -> dict[str, Any]:
        members, texts = list[dict[str, Any]](), list[str]()
        for place in cluster.members:
            path, row = self.partitions[place[0]], place[1]
            found = read_row(path, row, "id", "text")
            members.append({**self.inputs.place(path, row), "id": found["id"], "bytes": len(found["text"].encode())})
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
        scratch = self.scratch / f"hash_{what}"
        ranges = max(1, self.books.steps[-1].given["bytes"] // RANGE_BYTES)
        tasks = [HashTask(i, path, of, let_alone, ranges, scratch) for i, path in enumerate(self.partitions)]
        documents, pieces = np.sum([found for _, found in self.each(scratch.name, hash_pieces, tasks)], axis=0).tolist()
        least = max(of.min_documents, math.ceil(of.min_fraction * documents)) if isinstance(of, Boilerplate) else 2
        preferred = self._preferred()
        repeated = [RepeatTask(i, len(self.partitions), scratch, least, preferred) for i in range(ranges)]
        found = sorted(self.each(f"find_{what}", find, repeated), key=lambda pair: pair[0])
        return Hashed(documents, pieces, least), [one for _, one in found]

    def _preferred(self) -> Numbers:
        """The numbers of the documents of sources that are held out as a whole: of what several documents hold, they keep theirs."""
        return np.array([partition << 32 | row for partition, path in enumerate(self.partitions) if self.rule.whole
                         for row in np.flatnonzero(np.isin(read_column(path, "origin"), self.rule.whole)).tolist()], np.int64)

    def _refine(self, stage: str, function: Callable[[Item], RefineResult], tasks: Sequence[Item]) -> None:
        """Run a step that drops documents from the partitions, and keep its books."""
        results = [result for _, result in sorted(self.each(stage, function, tasks), key=lambda pair: pair[0])]
        step = Step(results[0].step.name)
        self.splits, self.candidates = {}, []
        for result in results:
            step.merge(result.step)
            self._count(result.splits, result.next_val)
            self.found.merge(result.found)
        self.books.sample([result.samples for result in results], self.partitions)
        self.books.add(step)

    def _outputs(self, name: str) -> list[Path]:
        return [self.scratch / f"{name}-{i:04d}.arrow" for i in range(len(self.partitions))]

    def _count(self, splits: dict[str, Account], next_val: bytes) -> None:
        for name in self.rule.names:
            add(self.splits.setdefault(name, account()), splits[name]["documents"], splits[name]["bytes"])
        if next_val:
            self.candidates.append(next_val)

    def hold_out(self) -> None:
        """Decide what is held out."""
        rule, given = self.rule, dict(self.books.steps[-1].given)
        if rule.may_hold_out and not self.splits["val"]["documents"]:
            if given["documents"] > 1 and self.candidates:
                self.rule = replace(rule, held_out=min(self.candidates))
                self.progress.note(f"val_fraction {rule.val_fraction} of {given['documents']} documents is none: one is held out, so "
                                   "that there is a validation split")
            elif given["documents"] == 1:
                self.progress.note("there is one document only: no validation split")
        self.books.add(Step("split", given, {unit: sum(self.splits[name][unit] for name in rule.names) for unit in given}))
        self.books.write_samples()

    def make_vocabulary(self) -> Vocabulary:
        task = VocabularyTask(self.spec.tokenizer, self.partitions, self.rule, self.scratch / "tokenizer")
        (_, vocabulary), = self.each("vocabulary", make_tokenizer, [task], 1)
        if self.spec.tokenizer.train != "bytes" and not self.spec.tokenizer.source and vocabulary.size < self.spec.tokenizer.vocab_size:
            self.progress.note(f"the vocabulary has {vocabulary.size:,} tokens, not {self.spec.tokenizer.vocab_size:,}: there is no more "
                               "to merge in this text")
        return vocabulary

    def encode(self, vocabulary: Vocabulary) -> list[dict[str, Encoded]]:
        """Every partition's documents to tokens."""
        tasks = [EncodeTask(i, path, self.rule, vocabulary.folder, vocabulary.eos_id, vocabulary.dtype, self._tokens(i),
                            self.spec.conversations, self.spec.context + 1, self.spec.labels) for i, path in enumerate(self.partitions)]
        results: list[dict[str, Encoded] | None] = [None] * len(tasks)
        tokenize, documents, tokens = Step("tokenize"), self.books.steps[-1].given["documents"], 0
        self.progress.update("documents", 0, documents)
        for i, result in self.each("encode", encode_partition, tasks):
            results[i] = result
            for encoded in result.values():
                tokenize.merge(encoded.step)
                tokens += encoded.tokens
            self.progress.update("documents", tokenize.taken["documents"], documents, tokens=tokens)
        self.books.add(tokenize)
        complete = [result for result in results if result is not None]
        if self.spec.conversations or self.spec.labels:
            self.books.sample([one.samples for result in complete for one in result.values()], self.partitions)
            self.books.write_samples()
            self.books.check_left(tokenize)
        if self.spec.labels:
            self.figures["labels"] = self._labels(self.spec.labels, complete)
        if self.spec.conversations:
            self.figures["conversations"] = self._conversations(self.spec.conversations, complete, tokenize)
        return complete

    def _conversations(self, rules: Conversations, encoded: list[dict[str, Encoded]], tokenize: Step) -> dict[str, Any]:
        """What gives loss, and what was split."""
        each = [one for result in encoded for one in result.values()]
        loss = {f"{name}_loss_tokens": sum(result[name].loss_tokens for result in encoded) for name in self.rule.names}
        found = {"loss": rules.loss, **loss, "loss_share": round(sum(loss.values()) / sum(one.tokens for one in each), 6)}
        if rules.loss == "assistant" and (empty := sum(one.empty_answers for one in each)):
            found["empty_answers"] = empty
            self.progress.note(f"{empty:,} empty answer{'s give' if empty > 1 else ' gives'} no loss")
        if rules.pairs:
            found["pairs"] = tokenize.added["documents"]
            self.progress.note(f"{found['pairs']:,} pairs of answers")
        if rules.too_long == "split":
            split = sum(one.split_conversations for one in each)
            parts = split + tokenize.added["documents"]
            found |= {"split_conversations": split, "split_parts": parts}
            self.progress.note(f"{split:,} conversation{'s' if split != 1 else ''} longer than a window became {parts:,} parts")
        return found

    def _labels(self, rules: Labels, encoded: list[dict[str, Encoded]]) -> dict[str, Any]:
        """The labels by their numbers, and how many documents of each split have each."""
        counts = {name: sum((result[name].labels for result in encoded), Counter[str]()) for name in self.rule.names}
        names = check_labels(counts, rules, self.spec.name)
        cut = sum(one.cut_documents for result in encoded for one in result.values())
        if cut:
            self.progress.note(f"{cut:,} document{'s' if cut > 1 else ''} longer than a window {'were' if cut > 1 else 'was'} cut")
        return {"multiple": rules.multiple, "names": names, **{split: {name: found[name] for name in names}
                                                               for split, found in counts.items()}, "cut_documents": cut}

    def pack(self, vocabulary: Vocabulary, encoded: list[dict[str, Encoded]]) -> dict[str, dict[str, Any]]:
        """Tokens to shards: the manifest's `splits`."""
        splits: dict[str, dict[str, Any]] = {}
        tasks, best_fits = list[PackTask](), list[BestFitTask]()
        for name in self.rule.names:
            counts, parts, tokens = account(), [], 0
            lost = Counter[str]()
            for i, partition in enumerate(encoded):
                add(counts, partition[name].step.given["documents"], partition[name].step.given["bytes"])
                parts.append((Path(f"{self._tokens(i)}-{name}"), tokens, partition[name].tokens))
                lost.update({reason: one["documents"] for reason, one in partition[name].step.rejected.items()})
                tokens += partition[name].tokens
            if self.spec.padded:
                splits[name] = {**counts, **({"rejected": dict(sorted(lost.items()))} if lost else {}), "tokens": tokens,
                                "dropped_tokens": 0, "windows": 0, "padding_tokens": 0, "repeated_tokens": 0, "shards": []}
                size, labels = self.spec.shard_windows, tuple(self.figures.get("labels", {}).get("names", ()))
                pairs = self.spec.conversations is not None and self.spec.conversations.pairs
                cut = document_groups(parts, size * (1 + pairs)) if labels or pairs else groups(parts, size * self.spec.context)
                best_fits += [BestFitTask(self.scratch, f"{name}/{shard:05d}.arrow", parts, group, self.spec.context, vocabulary.dtype,
                                          vocabulary.eos_id, self.spec.conversations is not None, pairs, labels)
                              for shard, group in enumerate(cut)]
                continue
            windows, dropped = num_windows(tokens, self.spec.context)
            splits[name] = {**counts, "tokens": tokens, "dropped_tokens": dropped, "windows": windows, "shards": []}
            for shard, first in enumerate(range(0, windows, self.spec.shard_windows)):
                tasks.append(PackTask(self.scratch, f"{name}/{shard:05d}.arrow", parts, first,
                                      min(self.spec.shard_windows, windows - first), self.spec.context, vocabulary.dtype))
        if best_fits:
            return self._best_fit(best_fits, splits)
        self._check_windows(splits)
        total, done = sum(task.windows for task in tasks) * self.spec.context, 0
        shards: dict[int, Shard] = {}
        for i, shard_made in self.each("pack", write_shard, tasks):
            shards[i] = shard_made
            done += shard_made.windows * self.spec.context
            self.progress.update("tokens", done, total)
        for i in sorted(shards):
            splits[shards[i].file.split("/")[0]]["shards"].append(vars(shards[i]))
        return splits

    def _best_fit(self, tasks: list[BestFitTask], splits: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """Fill windows up, by best-fit or with a document each, and say what padding it takes."""
        total, done = sum(split["tokens"] for split in splits.values()), 0
        packed: dict[int, Packed] = {}
        for i, result in self.each("pack", write_best_fit, tasks):
            packed[i] = result
            done += tasks[i].group.end - tasks[i].group.begin
            self.progress.update("tokens", done, total)
        for _, one in sorted(packed.items()):
            split = splits[one.shard.file.split("/")[0]]
            split["windows"] += one.shard.windows
            split["padding_tokens"] += one.padding_tokens
            split["repeated_tokens"] += one.repeated_tokens
            split["shards"].append(vars(one.shard))
        places = sum(split["windows"] for split in splits.values()) * (self.spec.context + 1)
        padding, repeated = (sum(split[unit] for split in splits.values()) for unit in ("padding_tokens", "repeated_tokens"))
        self.figures["pack"] = {"method": self.spec.packing, "padding_tokens": padding,
                                "padding_share": round(padding / places, 6), "repeated_tokens": repeated}
        self.progress.note(f"{padding:,} tokens of padding, {padding / places:.2%} of the windows")
        self._check_windows(splits)
        return splits

    def commit(self, vocabulary: Vocabulary, splits: dict[str, dict[str, Any]]) -> None:
        """Move what is whole to its place, and write the manifest."""
        lists = [Path(f"{self._tokens(i)}-documents.arrow") for i in range(len(self.partitions))]
        self.inputs.write(self.folder, lists)
        counts = count_sources(lists, len(self.spec.sources), self.rule.names)
        write_atomic(self.folder / "duplicates.jsonl", "".join(json.dumps(cluster) + "\n" for cluster in self.clusters))
        tokenizer, rules = vocabulary.data(), self.rules
        with writing(self.folder):
            for name in ("tokenizer", *self.rule.names):
                (self.scratch / name).rename(self.folder / name)
        of = {"read": {}, "clean": rules["clean"], "sample": {}, "filter": rules["filter"],
              **dict.fromkeys(("decontaminate", "decontaminate_stripped", "decontaminate_shortened"), rules["decontaminate"] or {}),
              "dedup": {"exact": rules["dedup"]["exact"]}, **dict.fromkeys(FUZZY, rules["dedup"]["fuzzy"] or {}),
              "boilerplate": rules["clean"]["boilerplate"] or {},
              "dedup_stripped": {"exact": True}, "dedup_shortened": {"exact": True},
              "paragraphs": {"min_chars": rules["dedup"]["paragraphs"]}, "split": rules["split"],
              "tokenize": rules["tokenizer"] | {"sampled": vocabulary.sampled}}
        data = {
            "name": self.spec.name, "context": self.spec.context, "dtype": vocabulary.dtype, "seed": self.spec.seed, "parameters": rules,
            "sources": [{**source, "splits": counts[i]} for i, source in self.inputs.sources],
            "steps": [step.data(of[step.name]) for step in self.books.steps], "tokenizer": tokenizer,
            "split": {"rule": self.rule.described(self.spec.conversations is not None), **rules["split"],
                      "held_out": self.rule.held_out.hex()},
            "splits": splits, **self.figures, "code": __version__}
        write_report(manifest_of(self.folder, data))
        write_manifest(self.folder, data)

    def _tokens(self, partition: int) -> Path:
        return self.scratch / f"tokens-{partition:04d}"

    def _check_windows(self, splits: dict[str, dict[str, Any]]) -> None:
        for name, split in splits.items():
            if split["windows"]:
                continue
            text = f"the {split['tokens']:,} tokens of the {name} split do not fill a window of {self.spec.context} + 1"
            if lost := split.get("rejected", {}) if not split["documents"] else {}:
                text = (f"nothing is left of the {name} split, every document was rejected when it became tokens ("
                        + ", ".join(f"{count:,} {reason}" for reason, count in lost.items()) + ")")
            if name == "train":
                raise CorpusError(text, where=self.spec.name, remedy=f"give more text or a {'larger' if lost else 'smaller'} context")
            if split["tokens"] or self.splits[name]["documents"]:
                self.progress.note(f"{text}: there is nothing to validate on")
