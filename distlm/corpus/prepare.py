"""`kind: prepare`: from raw text to a corpus.

    files ──read, clean──▶ documents, by ranges of their order keys ──sort, dedup, split──▶ partitions ──encode──▶ tokens ──pack──▶ shards

Each arrow is a function over files or partitions that Ray Data runs in parallel; what stands between is on a scratch folder in the
corpus folder. The order of documents is that of a hash of (seed, content), so that the result depends neither on how the files were
dealt to tasks nor on how many ran at a time. What the corpus will hold is made on the scratch folder too and moved when it is whole;
the manifest is written last: a folder without one is no corpus.
"""

import functools
import importlib
import json
import os
import pickle
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
import ray
import xxhash

from distlm import __version__
from distlm.corpus import fuzzy
from distlm.corpus.accounts import Account, Samples, Step, account, add, write_rejects
from distlm.corpus.bestfit import BestFitTask, Packed, groups, write_best_fit
from distlm.corpus.decontaminate import Evaluations, Found
from distlm.corpus.dedup import BATCH_ROWS, SortTask, sort_partition
from distlm.corpus.documents import ReadResult, ReadTask, check, read_documents
from distlm.corpus.files import TextFile, source_name
from distlm.corpus.manifest import FILE, Manifest, Shard, file_xxh3, manifest_hash, read_manifest, tokenizer_hash, verify, write_manifest
from distlm.corpus.pack import PackTask, num_windows, write_shard
from distlm.corpus.paragraphs import REASON
from distlm.corpus.refine import (
    HashTask,
    RefineResult,
    RefineTask,
    RepeatTask,
    ShortenTask,
    find_repeats,
    hash_paragraphs,
    refine_partition,
    shorten_partition,
)
from distlm.corpus.report import write_report
from distlm.corpus.split import HASH_BYTES, SplitRule, first_held_out
from distlm.corpus.spread import spread
from distlm.corpus.tokenizer import Encoded, EncodeTask, Vocabulary, VocabularyTask, encode_partition, make_tokenizer
from distlm.errors import CorpusError, DistlmError, InputError
from distlm.progress import Progress
from distlm.runs import RunFolder
from distlm.spec import PrepareSpec
from distlm.spec.load import dump, nearest
from distlm.spec.prepare import Filter, Pack
from distlm.storage import Storage, replacing, write_atomic, writing

Item = TypeVar("Item")
Result = TypeVar("Result")
STAGES = ("read", "sort", "sign_partition", "pair_bucket", "confirm", "refine", "hash_paragraphs", "find_repeats", "shorten", "vocabulary",
          "encode", "pack")
MADE = (FILE, "train", "val", "test", "tokenizer", "sources.jsonl", "documents.parquet", "report.html", "rejects")
"""What a prepare job makes, the manifest first: it goes first where the rest is to be made again."""
DOCUMENTS = pa.schema([("hash", pa.binary(HASH_BYTES)), ("source", pa.string()), ("record", pa.int64()), ("id", pa.string()),
                       ("meta", pa.string()), ("split", pa.string()), ("bytes", pa.int64()), ("tokens", pa.int64()),
                       ("reasons", pa.list_(pa.string()))])
"""The columns of documents.parquet."""
ROW_GROUP = 1 << 16
RANGE_BYTES = 1 << 30
"""Text whose paragraphs one task holds the hashes of."""
READ_BYTES = 16 << 20
PARTITION_BYTES = 8 << 20
MAX_FILES_PER_TASK = 2000


def prepare(spec: PrepareSpec, folder: RunFolder, storage: Storage, progress: Progress) -> dict[str, Any]:
    """Make the corpus in `folder`. A complete one of the same files and rules is kept. Ray is running.

    Raises InputError before any work, CorpusError for text that cannot become a corpus, StorageError.
    """
    files = check(spec)
    if _is_complete(spec, folder.path, files):
        progress.note("the corpus is complete, and its sources are as they were: nothing to do")
        _clear(folder.path, ".scratch-*")
        return outputs(read_manifest(folder.path))
    job = _Prepare(spec, folder.path, progress, files, spec.workers or _default_workers())
    _take_back(folder.path, job.scratch)
    _clear(folder.path, *MADE, but=job.scratch)
    try:
        with writing(job.scratch):
            for name in ("tokenizer", *job.rule.names, *STAGES):
                (job.scratch / name).mkdir(parents=True, exist_ok=True)
        job.read()
        job.sort()
        job.drop_near_duplicates()
        job.drop_paragraphs()
        job.hold_out()
        vocabulary = job.make_vocabulary()
        shards = job.pack(vocabulary, job.encode(vocabulary))
        job.commit(vocabulary, shards)
    except (CorpusError, InputError):                      # it would fail again; the samples of what was rejected may say why
        _clear(folder.path, *MADE[:-1], ".scratch-*")
        raise
    except BaseException:                                  # what is done is done: the next attempt goes on with it
        _take_back(folder.path, job.scratch)
        _clear(folder.path, *MADE[:-1])
        raise
    _clear(folder.path, ".scratch-*")
    return outputs(read_manifest(folder.path))


def outputs(manifest: Manifest) -> dict[str, Any]:
    """What a prepare job hands to the jobs that follow."""
    splits = manifest.splits
    rejected = {reason: lost["documents"] for step in manifest.data["steps"] for reason, lost in step["rejected"].items()
                if lost["documents"]}
    totals = {unit: sum(getattr(split, unit) for split in splits.values()) for unit in ("documents", "bytes", "tokens")}
    units = ("tokens", "bytes", "windows", *(("padding_tokens",) if manifest.best_fit else ()))
    return {"": str(manifest.path), **totals,
            **{f"{name}_{unit}": getattr(split, unit) for unit in units for name, split in splits.items()},
            **({"padding_share": manifest.data["pack"]["padding_share"]} if manifest.best_fit else {}), "vocab_size": manifest.vocab_size,
            "rejected": sum(rejected.values()), **{f"rejected.{reason}": count for reason, count in sorted(rejected.items())},
            "manifest_hash": manifest_hash(manifest.path)}


def parameters(spec: PrepareSpec) -> dict[str, Any]:
    """All of the spec that decides what the corpus holds beside the files' contents: no name, no path, no number of workers."""
    data = dump(spec)
    given = {"from": tokenizer_hash(Path(spec.tokenizer.source).expanduser())} if spec.tokenizer.source else \
        {key: data["tokenizer"][key] for key in ("vocab_size", "sample_bytes")} | {"train": spec.tokenizer.train or "bpe"}
    contents: dict[str, str] = {}                          # of what the spec names by its place, which is another on other hosts
    if spec.filter.language and spec.filter.language.model:
        data["filter"]["language"].pop("model")
        contents["language"] = file_xxh3(Path(spec.filter.language.model).expanduser())
    if spec.filter.function:
        contents["function"] = file_xxh3(Path(importlib.import_module(spec.filter.function.split(":")[0]).__file__ or os.devnull))
    if spec.decontaminate:
        data["decontaminate"]["against"] = sorted(spec.decontaminate.against)
        contents["evaluations"] = Evaluations.read(spec.decontaminate).hash()
    return {key: data[key] for key in ("clean", "filter", "decontaminate", "dedup", "split", "context", "shard_windows", "seed")} | \
        {"tokenizer": given} | ({"contents": contents} if contents else {}) | ({"pack": data["pack"]} if spec.pack != Pack() else {})


@dataclass
class _Prepare:
    """One job: the stages in order, and what they hand on."""

    spec: PrepareSpec
    folder: Path
    progress: Progress
    files: list[TextFile]
    workers: int
    steps: list[Step] = field(default_factory=list)
    facts: list[dict[str, Any]] = field(default_factory=list)
    samples: Samples = field(default_factory=Samples)
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
        self.rule = SplitRule(self.spec.split.val_fraction, self.spec.split.test_fraction)

    @functools.cached_property
    def evaluations(self) -> Evaluations | None:
        return Evaluations.read(self.spec.decontaminate) if self.spec.decontaminate else None

    @functools.cached_property
    def scratch(self) -> Path:
        """A folder of these rules and files alone: another attempt at the same finds there what this one has done. Every file in it
        is replaced whole, so that a task of a failed attempt that still runs does no harm."""
        files = [(file.path, file.format, file.bytes, _modified(file.path)) for file in self.files]
        sources = [source.model_dump() for source in self.spec.sources]
        about = json.dumps([__version__, parameters(self.spec), sources, files]).encode()
        return self.folder / f".scratch-{xxhash.xxh3_64_hexdigest(about)}"

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
        evaluations = None
        if self.evaluations:
            evaluations = self.scratch / "evaluations.pickle"
            write_atomic(evaluations, pickle.dumps(self.evaluations))
        tasks = [ReadTask(i, first, self.files[first:last], self.spec.clean, self.spec.filter, evaluations, self.spec.seed,
                          len(self.partitions), self.scratch)
                 for i, (first, last) in enumerate(_groups(self.files, min(READ_BYTES, max(1 << 20, size // 16))))]
        results: list[ReadResult | None] = [None] * len(tasks)
        done = documents = 0
        for i, result in self.each("read", read_documents, tasks):
            results[i] = result
            done, documents = done + len(result.facts), documents + result.decontaminate.given["documents"]
            self.progress.update("files", done, len(self.files), documents=documents)
        complete = [result for result in results if result is not None]
        read, clean, filtered, clear = Step("read"), Step("clean"), Step("filter"), Step("decontaminate")
        for result in complete:
            for whole, part in ((read, result.read), (clean, result.clean), (filtered, result.filter), (clear, result.decontaminate)):
                whole.merge(part)
            self.facts += [{**fact, "documents": result.kept[fact["number"]]} for fact in result.facts]
            self.found.merge(result.found)
            self.parts += result.parts
            self.annotated.update(result.annotated)
            self.redactions.update(result.redactions)
        self.steps += [read, clean]
        if self.spec.filter != Filter():
            self.steps.append(filtered)
        if self.spec.decontaminate:
            self.steps.append(clear)
        self.samples.merge((result.samples for result in complete), ("number", "record"))
        self._write_rejects()
        self._note_rejects(*self.steps)
        self._check_keys(complete)
        if self.annotated:
            self.figures["annotated"] = dict(sorted(self.annotated.items()))
        if self.redactions:
            self.figures["redactions"] = dict(sorted(self.redactions.items()))
        if self.evaluations:
            self.figures["decontamination"] = self.evaluations.report(self.found)
        if not clear.given["documents"]:
            reasons = {reason: lost["documents"] for step in self.steps for reason, lost in step.rejected.items() if lost["documents"]}
            raise CorpusError(f"no document is left of {read.taken['documents']:,}: "
                              + ", ".join(f"{count:,} {reason}" for reason, count in reasons.items()),
                              where=", ".join(source.path for source in self.spec.sources), remedy=f"{self.folder}/rejects shows samples")

    def sort(self) -> None:
        """Bring the documents into order, and drop those of equal text."""
        tasks = [SortTask(i, self.parts, self.spec.dedup.exact, self.rule, path) for i, path in enumerate(self.partitions)]
        dedup, found = Step("dedup"), Samples()
        for _, result in self.each("sort", sort_partition, tasks):
            dedup.merge(result.dedup)
            self._count(result.splits, result.next_val)
            found.merge([result.samples], ("key", "place"))
        for sample in found.kept.get("duplicate", []):
            names = {key: {"source": self.files[sample[key][0]].name, "record": sample[key][1]} for key in ("place", "same_as")}
            self.samples.add("duplicate", names["place"] | {"bytes": sample["bytes"], "same_as": names["same_as"], "text": sample["text"]})
        self.steps.append(dedup)
        self._note_rejects(dedup)

    def drop_near_duplicates(self) -> None:
        """Drop what is nearly equal to an earlier document."""
        rules = self.spec.dedup.fuzzy
        if rules is None:
            return
        least = fuzzy.min_similarity(rules)
        self.progress.note(f"near-duplicates from a similarity of {least:.3f} on: at 0.7, 0.8, 0.9 they are found with a probability of "
                           + ", ".join(f"{fuzzy.probability(s, rules.bands, rules.rows):.3f}" for s in (0.7, 0.8, 0.9)))
        found = fuzzy.near_duplicates(self.partitions, rules, self.scratch, lambda function, tasks: self.each(
            function.__name__, function, tasks))
        outputs = self._outputs("unique")
        tasks = [RefineTask(i, path, found.dropped[i], self.rule, outputs[i]) for i, path in enumerate(self.partitions)]
        self._refine("refine", refine_partition, tasks, "near_duplicate")
        self.figures["fuzzy"] = {"min_similarity": round(least, 6), "documents": found.documents, "candidates": found.candidates,
                                 "pairs": found.pairs, "clusters": found.clusters, "largest": found.largest}
        self.partitions = outputs

    def drop_paragraphs(self) -> None:
        """Drop the paragraphs that an earlier document holds."""
        if self.spec.dedup.paragraphs is None:
            return
        least, count = self.spec.dedup.paragraphs, len(self.partitions)
        ranges = max(1, self.steps[-1].given["bytes"] // RANGE_BYTES)
        hashed = [HashTask(i, path, least, ranges, self.scratch) for i, path in enumerate(self.partitions)]
        paragraphs = sum(found for _, found in self.each("hash_paragraphs", hash_paragraphs, hashed))
        repeated = sum(found for _, found in self.each("find_repeats", find_repeats, [RepeatTask(i, count, self.scratch)
                                                                                      for i in range(ranges)]))
        outputs = self._outputs("shortened")
        tasks = [ShortenTask(i, path, ranges, self.rule, self.scratch, outputs[i]) for i, path in enumerate(self.partitions)]
        self._refine("shorten", shorten_partition, tasks, REASON)
        self.figures["paragraphs"] = {"min_chars": least, "paragraphs": paragraphs, "repeated": repeated}
        self.partitions = outputs

    def _refine(self, stage: str, function: Callable[[Item], RefineResult], tasks: Sequence[Item], reason: str) -> None:
        """Run a step that drops documents from the partitions, and keep its books."""
        results = [result for _, result in sorted(self.each(stage, function, tasks), key=lambda pair: pair[0])]
        step, samples = Step(results[0].step.name), Samples()
        self.splits, self.candidates = {}, []
        for result in results:
            step.merge(result.step)
            self._count(result.splits, result.next_val)
        samples.merge((result.samples for result in results), ("place",))
        for sample in samples.kept.get(reason, []):
            names = {key: self._place(*value) for key, value in sample.items() if key in ("place", "same_as")}
            rest = {key: value for key, value in sample.items() if key not in names}
            self.samples.add(reason, {**names.pop("place"), **rest, **names})
        self.steps.append(step)
        self._note_rejects(step)

    def _outputs(self, name: str) -> list[Path]:
        return [self.scratch / f"{name}-{i:04d}.arrow" for i in range(len(self.partitions))]

    def _count(self, splits: dict[str, Account], next_val: bytes) -> None:
        for name in self.rule.names:
            add(self.splits.setdefault(name, account()), splits[name]["documents"], splits[name]["bytes"])
        if next_val:
            self.candidates.append(next_val)

    def _place(self, partition: int, row: int) -> dict[str, Any]:
        with pa.memory_map(str(self.partitions[partition])) as file:
            reader = pa.ipc.open_file(file)
            batch, place = divmod(row, BATCH_ROWS)
            found = reader.get_batch(batch).select(["file", "record"]).slice(place, 1).to_pylist()[0]
        return {"source": self.files[found["file"]].name, "record": found["record"]}

    def hold_out(self) -> None:
        """Decide what is held out."""
        rule, given = self.rule, dict(self.steps[-1].given)
        if rule.val_fraction and not self.splits["val"]["documents"]:
            if given["documents"] > 1:
                self.rule = replace(rule, held_out=first_held_out(self.candidates))
                self.progress.note(f"val_fraction {rule.val_fraction} of {given['documents']} documents is none: one is held out, so "
                                   "that there is a validation split")
            else:
                self.progress.note("there is one document only: no validation split")
        self.steps.append(Step("split", given, {unit: sum(self.splits[name][unit] for name in rule.names) for unit in given}))
        self._write_rejects()

    def make_vocabulary(self) -> Vocabulary:
        task = VocabularyTask(self.spec.tokenizer, self.partitions, self.rule, self.scratch / "tokenizer")
        (_, vocabulary), = self.each("vocabulary", make_tokenizer, [task], 1)
        if self.spec.tokenizer.train != "bytes" and not self.spec.tokenizer.source and vocabulary.size < self.spec.tokenizer.vocab_size:
            self.progress.note(f"the vocabulary has {vocabulary.size:,} tokens, not {self.spec.tokenizer.vocab_size:,}: there is no more "
                               "to merge in this text")
        return vocabulary

    def encode(self, vocabulary: Vocabulary) -> list[dict[str, Encoded]]:
        """Every partition's documents to tokens."""
        tasks = [EncodeTask(path, self.rule, vocabulary.folder, vocabulary.eos_id, vocabulary.dtype, self._tokens(i))
                 for i, path in enumerate(self.partitions)]
        results: list[dict[str, Encoded] | None] = [None] * len(tasks)
        tokenize, documents, tokens = Step("tokenize"), self.steps[-1].given["documents"], 0
        for i, result in self.each("encode", encode_partition, tasks):
            results[i] = result
            for encoded in result.values():
                tokenize.merge(encoded.step)
                tokens += encoded.tokens
            self.progress.update("documents", tokenize.given["documents"], documents, tokens=tokens)
        self.steps.append(tokenize)
        return [result for result in results if result is not None]

    def pack(self, vocabulary: Vocabulary, encoded: list[dict[str, Encoded]]) -> dict[str, dict[str, Any]]:
        """Tokens to shards: the manifest's `splits`."""
        splits: dict[str, dict[str, Any]] = {}
        tasks, best_fits = list[PackTask](), list[BestFitTask]()
        for name in self.rule.names:
            counts, parts, tokens = account(), [], 0
            for i, partition in enumerate(encoded):
                add(counts, partition[name].step.given["documents"], partition[name].step.given["bytes"])
                parts.append((Path(f"{self._tokens(i)}-{name}"), tokens, partition[name].tokens))
                tokens += partition[name].tokens
            if self.spec.pack.method == "best_fit":
                splits[name] = {**counts, "tokens": tokens, "dropped_tokens": 0, "windows": 0, "padding_tokens": 0, "repeated_tokens": 0,
                                "shards": []}
                best_fits += [BestFitTask(self.scratch, f"{name}/{shard:05d}.arrow", parts, group, self.spec.context, vocabulary.dtype,
                                          vocabulary.eos_id)
                              for shard, group in enumerate(groups(parts, self.spec.shard_windows * self.spec.context))]
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
        """Pack by best-fit, and say what padding it takes."""
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
        self.figures["pack"] = {"method": "best_fit", "padding_tokens": padding, "padding_share": round(padding / places, 6),
                                "repeated_tokens": repeated}
        self.progress.note(f"{padding:,} tokens of padding, {padding / places:.2%} of the windows")
        self._check_windows(splits)
        return splits

    def commit(self, vocabulary: Vocabulary, splits: dict[str, dict[str, Any]]) -> None:
        """Move what is whole to its place, and write the manifest."""
        self.facts.sort(key=lambda fact: fact["number"])
        self._write_documents()
        lines = [{"file": self.files[fact["number"]].name, "bytes": fact["bytes"], "xxh3": fact["xxh3"], "documents": fact["documents"]}
                 for fact in self.facts]
        write_atomic(self.folder / "sources.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
        tokenizer, rules = vocabulary.data(), parameters(self.spec)
        with writing(self.folder):
            for name in ("tokenizer", *self.rule.names):
                (self.scratch / name).rename(self.folder / name)
        of = {"read": {}, "clean": rules["clean"], "filter": rules["filter"], "decontaminate": rules["decontaminate"] or {},
              "dedup": {"exact": rules["dedup"]["exact"]}, "fuzzy": rules["dedup"]["fuzzy"] or {},
              "paragraphs": {"min_chars": rules["dedup"]["paragraphs"]}, "split": rules["split"],
              "tokenize": rules["tokenizer"] | {"sampled": vocabulary.sampled}}
        write_manifest(self.folder, {
            "name": self.spec.name, "context": self.spec.context, "dtype": vocabulary.dtype, "seed": self.spec.seed, "parameters": rules,
            "sources": describe(self.spec, self.files, {fact["number"]: (fact["bytes"], fact["xxh3"]) for fact in self.facts}),
            "steps": [step.data(of[step.name]) for step in self.steps], "tokenizer": tokenizer,
            "split": {"rule": "blake2b-128(text)[:8] / 2^64 < val_fraction", **rules["split"], "held_out": self.rule.held_out.hex()},
            "splits": splits, "documents": {"file": "documents.parquet", "xxh3": file_xxh3(self.folder / "documents.parquet")},
            **self.figures, "code": __version__})
        write_report(self.folder)

    def _write_documents(self) -> None:
        """`documents.parquet`: every document that was kept, in order, without its text. Its bytes do not depend on the partitions."""
        names = pa.array([file.name for file in self.files], pa.string())
        waiting: list[pa.Table] = []
        with replacing(self.folder / "documents.parquet") as partial, pq.ParquetWriter(partial, DOCUMENTS, compression="zstd") as writer:
            for i in range(len(self.partitions)):
                with pa.memory_map(f"{self._tokens(i)}-documents.arrow") as file:
                    table = pa.ipc.open_file(file).read_all()
                    table = table.append_column("source", names.take(table["file"])).select(DOCUMENTS.names)
                    waiting.append(table)
                    while sum(map(len, waiting)) >= ROW_GROUP:
                        together = pa.concat_tables(waiting)
                        writer.write_table(together.slice(0, ROW_GROUP).combine_chunks(), row_group_size=ROW_GROUP)
                        waiting = [together.slice(ROW_GROUP)]
            writer.write_table(pa.concat_tables(waiting).combine_chunks(), row_group_size=ROW_GROUP)

    def _tokens(self, partition: int) -> Path:
        return self.scratch / f"tokens-{partition:04d}"

    def _write_rejects(self) -> None:
        write_rejects(self.folder / "rejects", self.samples,
                      lambda sample: json.dumps({key: value for key, value in sample.items() if key != "number"}))

    def _note_rejects(self, *steps: Step) -> None:
        for step in steps:
            for reason, lost in sorted(step.rejected.items()):
                if lost["documents"]:
                    self.progress.note(f"{lost['documents']:,} document{'s' if lost['documents'] > 1 else ''} rejected: {reason} "
                                       f"({lost['bytes']:,} bytes)")

    def _check_keys(self, results: list[ReadResult]) -> None:
        """A field that is in no record is a mistake in the spec."""
        objects, with_key = Counter[int](), Counter[int]()
        for result in results:
            objects.update(result.objects)
            with_key.update(result.with_key)
        for i, source in enumerate(self.spec.sources):
            if objects[i] and not with_key[i]:
                keys = next((result.keys[i] for result in results if result.keys.get(i)), [])
                near = nearest(source.text_key, keys)
                raise CorpusError(f"none of {objects[i]:,} records has the field {source.text_key!r}; the first has "
                                  + (", ".join(keys) or "none"), where=f"sources.{i}.text_key: {source.path}",
                                  remedy=f"did you mean {near}?" if near else "set text_key to the field that holds the text")

    def _check_windows(self, splits: dict[str, dict[str, Any]]) -> None:
        for name, split in splits.items():
            if split["windows"]:
                continue
            text = f"the {split['tokens']:,} tokens of the {name} split do not fill a window of {self.spec.context} + 1"
            if name == "train":
                raise CorpusError(text, where=self.spec.name, remedy="give more text or a smaller context")
            if split["tokens"]:
                self.progress.note(f"{text}: there is nothing to validate on")


def describe(spec: PrepareSpec, files: list[TextFile], facts: dict[int, tuple[int, str]]) -> list[dict[str, Any]]:
    """The manifest's `sources`: each with the number, bytes and joint hash of its files, in an order that is not that of the spec."""
    sources = []
    for i, source in enumerate(spec.sources):
        digest, count, size = xxhash.xxh3_128(), 0, 0
        for n, file in enumerate(files):
            if file.source == i:
                digest.update(json.dumps([file.name, *facts[n]]).encode())
                count, size = count + 1, size + facts[n][0]
        sources.append({"name": source_name(source), "format": source.format, "text_key": source.text_key, "id_key": source.id_key,
                        "keep": list(source.keep), "files": count, "bytes": size,
                        "xxh3": digest.hexdigest()})
    return sorted(sources, key=lambda source: json.dumps(source))


def _default_workers() -> int:
    """The cluster's CPUs; of a single node, no more than its cores, whatever number it was given."""
    cpus = int(ray.cluster_resources().get("CPU", 1))
    return max(1, cpus if len(ray.nodes()) > 1 else min(cpus, os.cpu_count() or 1))


def _is_complete(spec: PrepareSpec, folder: Path, files: list[TextFile]) -> bool:
    """Whether the folder holds what this job would make: same rules, same code, same contents, and every shard whole."""
    if not (folder / FILE).exists() or not all(os.path.isfile(file.path) for file in files):
        return False
    try:
        manifest = verify(folder)
        facts = {n: (file.bytes, file_xxh3(Path(file.path))) for n, file in enumerate(files)}
    except (DistlmError, OSError):
        return False
    data = manifest.data
    return (data["name"], data["code"], data["parameters"]) == (spec.name, __version__, parameters(spec)) and \
        data["sources"] == describe(spec, files, facts)


def _groups(files: list[TextFile], target_bytes: int) -> list[tuple[int, int]]:
    """Ranges of files of about `target_bytes`."""
    groups, first, size = [], 0, 0
    for i, file in enumerate(files):
        size += file.bytes
        if size >= target_bytes or i + 1 - first >= MAX_FILES_PER_TASK or i + 1 == len(files):
            groups.append((first, i + 1))
            first, size = i + 1, 0
    return groups


def _modified(path: str) -> int:
    try:
        return os.stat(path).st_mtime_ns
    except OSError:
        return 0


def _take_back(folder: Path, scratch: Path) -> None:
    """Put what an attempt that was killed while it committed has moved out of its scratch folder back there."""
    for name in ("tokenizer", "train", "val", "test"):
        if scratch.is_dir() and (folder / name).is_dir() and not (folder / FILE).exists():
            with writing(folder / name):
                shutil.rmtree(scratch / name, ignore_errors=True)
                (folder / name).rename(scratch / name)


def _clear(folder: Path, *patterns: str, but: Path | None = None) -> None:
    """Remove what matches, and the scratch folders of other attempts than `but`."""
    others = [path for path in folder.glob(".scratch-*") if but and path != but]
    for path in others + [path for pattern in patterns for path in folder.glob(pattern)]:
        if not path.is_dir():
            with writing(path):
                path.unlink(missing_ok=True)
        for _ in range(100):                               # a task that still runs may put a file there once more
            if not path.exists():
                break
            shutil.rmtree(path, ignore_errors=True)
