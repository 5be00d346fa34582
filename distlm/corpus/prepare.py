"""`kind: prepare`: from raw text to a corpus.

    files ──read, clean──▶ documents, by ranges of their order keys ──sort, dedup, split──▶ partitions ──encode──▶ tokens ──pack──▶ shards

Each arrow is a function over files or partitions that Ray Data runs in parallel; what stands between is on a scratch folder in the
corpus folder. The order of documents is that of a hash of (seed, content), so that the result depends neither on how the files were
dealt to tasks nor on how many ran at a time. What the corpus will hold is made on the scratch folder too and moved when it is whole;
the manifest is written last: a folder without one is no corpus.
"""

import json
import os
import secrets
import shutil
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
import xxhash

from distlm import __version__
from distlm.corpus.accounts import Samples, Step, account, add, write_rejects
from distlm.corpus.dedup import SortTask, sort_partition
from distlm.corpus.documents import ReadResult, ReadTask, read_documents
from distlm.corpus.manifest import FILE, Manifest, Shard, file_xxh3, manifest_hash, read_manifest, tokenizer_hash, verify, write_manifest
from distlm.corpus.pack import PackTask, num_windows, write_shard
from distlm.corpus.read import TextFile, find_files, source_name
from distlm.corpus.split import SplitRule, first_held_out
from distlm.corpus.spread import spread
from distlm.corpus.tokenizer import Encoded, EncodeTask, Vocabulary, VocabularyTask, check_given, encode_partition, make_tokenizer
from distlm.errors import CorpusError, DistlmError
from distlm.progress import Progress
from distlm.runs import RunFolder
from distlm.spec import PrepareSpec
from distlm.spec.load import dump, nearest
from distlm.storage import Storage, write_atomic, writing

SPLITS = ("train", "val")
MADE = (FILE, "train", "val", "tokenizer", "sources.jsonl", ".scratch-*", "rejects")
"""What a prepare job makes, the manifest first: it goes first where the rest is to be made again."""
READ_BYTES = 16 << 20
PARTITION_BYTES = 8 << 20
MAX_FILES_PER_TASK = 2000


def prepare(spec: PrepareSpec, folder: RunFolder, storage: Storage, progress: Progress) -> dict[str, Any]:
    """Make the corpus in `folder`. A complete one of the same files and rules is kept. Ray is running.

    Raises InputError before any work, CorpusError for text that cannot become a corpus, StorageError.
    """
    files = find_files(spec.sources)
    check_given(spec.tokenizer)
    if _is_complete(spec, folder.path, files):
        progress.note("the corpus is complete, and its sources are as they were: nothing to do")
        return outputs(read_manifest(folder.path))
    _clear(folder.path, *MADE)
    job = _Prepare(spec, folder.path, progress, files, spec.workers or _default_workers())
    try:
        with writing(job.scratch):
            for name in ("tokenizer", *SPLITS):
                (job.scratch / name).mkdir(parents=True)
        job.read()
        job.sort()
        vocabulary = job.make_vocabulary()
        shards = job.pack(vocabulary, job.encode(vocabulary))
        job.commit(vocabulary, shards)
    except BaseException:
        _clear(folder.path, *MADE[:-1])                    # the samples of what was rejected may say why
        raise
    _clear(folder.path, ".scratch-*")
    return outputs(read_manifest(folder.path))


def outputs(manifest: Manifest) -> dict[str, Any]:
    """What a prepare job hands to the jobs that follow."""
    train, val = (manifest.splits[name] for name in SPLITS)
    rejected = {reason: lost["documents"] for step in manifest.data["steps"] for reason, lost in step["rejected"].items()
                if lost["documents"]}
    return {"": str(manifest.path), "documents": train.documents + val.documents, "bytes": train.bytes + val.bytes,
            "tokens": train.tokens + val.tokens, "train_tokens": train.tokens, "val_tokens": val.tokens, "train_bytes": train.bytes,
            "val_bytes": val.bytes, "train_windows": train.windows, "val_windows": val.windows, "vocab_size": manifest.vocab_size,
            "rejected": sum(rejected.values()), **{f"rejected.{reason}": count for reason, count in sorted(rejected.items())},
            "manifest_hash": manifest_hash(manifest.path)}


def parameters(spec: PrepareSpec) -> dict[str, Any]:
    """All of the spec that decides what the corpus holds beside the files' contents: no name, no path, no number of workers."""
    data = dump(spec)
    given = {"from": tokenizer_hash(Path(spec.tokenizer.source).expanduser())} if spec.tokenizer.source else \
        {key: data["tokenizer"][key] for key in ("vocab_size", "sample_bytes")} | {"train": spec.tokenizer.train or "bpe"}
    return {key: data[key] for key in ("clean", "dedup", "split", "context", "shard_windows", "seed")} | {"tokenizer": given}


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
    parts: list[Path] = field(default_factory=list)
    rule: SplitRule = field(default_factory=lambda: SplitRule(0))
    partitions: list[Path] = field(default_factory=list)
    token: str = field(default_factory=lambda: secrets.token_hex(4))

    @property
    def scratch(self) -> Path:
        """A folder of this attempt alone: a task of a failed one may still be writing to its own."""
        return self.folder / f".scratch-{self.token}"

    def read(self) -> None:
        """Read and clean every file."""
        size = sum(file.bytes for file in self.files)
        self.partitions = [self.scratch / f"sorted-{i:04d}.arrow" for i in range(min(1024, max(8, size // PARTITION_BYTES)))]
        tasks = [ReadTask(i, first, self.files[first:last], self.spec.clean, self.spec.seed, len(self.partitions), self.scratch)
                 for i, (first, last) in enumerate(_groups(self.files, min(READ_BYTES, max(1 << 20, size // 16))))]
        results: list[ReadResult | None] = [None] * len(tasks)
        done = documents = 0
        for i, result in spread(read_documents, tasks, self.workers):
            results[i] = result
            done, documents = done + len(result.facts), documents + result.clean.given["documents"]
            self.progress.update("files", done, len(self.files), documents=documents)
        complete = [result for result in results if result is not None]
        read, clean = Step("read"), Step("clean")
        for result in complete:
            read.merge(result.read)
            clean.merge(result.clean)
            self.facts += result.facts
            self.parts += result.parts
        self.steps += [read, clean]
        self.samples.merge((result.samples for result in complete), ("number", "record"))
        self._write_rejects()
        self._note_rejects(read, clean)
        self._check_keys(complete)
        if not clean.given["documents"]:
            reasons = {reason: lost["documents"] for step in (read, clean) for reason, lost in step.rejected.items() if lost["documents"]}
            raise CorpusError(f"no document is left of {read.taken['documents']:,}: "
                              + ", ".join(f"{count:,} {reason}" for reason, count in reasons.items()),
                              where=", ".join(source.path for source in self.spec.sources), remedy=f"{self.folder}/rejects shows samples")

    def sort(self) -> None:
        """Bring the documents into order, drop duplicates, and decide what is held out."""
        rule = SplitRule(self.spec.split.val_fraction)
        tasks = [SortTask(i, self.parts, self.spec.dedup == "exact", rule, path) for i, path in enumerate(self.partitions)]
        dedup, split = Step("dedup"), {name: account() for name in SPLITS}
        found = {"duplicate": list[dict[str, Any]]()}
        candidates: list[bytes] = []
        for _, result in spread(sort_partition, tasks, self.workers):
            dedup.merge(result.dedup)
            for name in SPLITS:
                add(split[name], result.splits[name]["documents"], result.splits[name]["bytes"])
            found["duplicate"] += result.samples.kept.get("duplicate", [])
            if result.next_val:
                candidates.append(result.next_val)
        if rule.val_fraction and not split["val"]["documents"]:
            if dedup.given["documents"] > 1:
                rule = SplitRule(rule.val_fraction, first_held_out(candidates))
                self.progress.note(f"val_fraction {rule.val_fraction} of {dedup.given['documents']} documents is none: one is held out, so "
                                   "that there is a validation split")
            else:
                self.progress.note("there is one document only: no validation split")
        self.rule = rule
        merged = Samples()
        merged.merge([Samples(found)], ("key", "place"))
        for sample in merged.kept.get("duplicate", []):
            names = {key: {"source": self.files[sample[key][0]].name, "record": sample[key][1]} for key in ("place", "same_as")}
            self.samples.add("duplicate", names["place"] | {"bytes": sample["bytes"], "same_as": names["same_as"], "text": sample["text"]})
        self.steps += [dedup, Step("split", dict(dedup.given), {unit: sum(split[name][unit] for name in SPLITS) for unit in dedup.given})]
        self._write_rejects()
        self._note_rejects(dedup)

    def make_vocabulary(self) -> Vocabulary:
        task = VocabularyTask(self.spec.tokenizer, self.partitions, self.rule, self.scratch / "tokenizer")
        (_, vocabulary), = spread(make_tokenizer, [task], 1)
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
        for i, result in spread(encode_partition, tasks, self.workers):
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
        tasks: list[PackTask] = []
        for name in SPLITS:
            counts, parts, tokens = account(), [], 0
            for i, partition in enumerate(encoded):
                add(counts, partition[name].step.given["documents"], partition[name].step.given["bytes"])
                parts.append((Path(f"{self._tokens(i)}-{name}"), tokens, partition[name].tokens))
                tokens += partition[name].tokens
            windows, dropped = num_windows(tokens, self.spec.context)
            splits[name] = {**counts, "tokens": tokens, "dropped_tokens": dropped, "windows": windows, "shards": []}
            for shard, first in enumerate(range(0, windows, self.spec.shard_windows)):
                tasks.append(PackTask(self.scratch, f"{name}/{shard:05d}.arrow", parts, first,
                                      min(self.spec.shard_windows, windows - first), self.spec.context, vocabulary.dtype))
        self._check_windows(splits)
        total, done = sum(task.windows for task in tasks) * self.spec.context, 0
        shards: dict[int, Shard] = {}
        for i, shard_made in spread(write_shard, tasks, self.workers):
            shards[i] = shard_made
            done += shard_made.windows * self.spec.context
            self.progress.update("tokens", done, total)
        for i in sorted(shards):
            splits[shards[i].file.split("/")[0]]["shards"].append(vars(shards[i]))
        return splits

    def commit(self, vocabulary: Vocabulary, splits: dict[str, dict[str, Any]]) -> None:
        """Move what is whole to its place, and write the manifest."""
        self.facts.sort(key=lambda fact: fact["number"])
        lines = [{"file": self.files[fact["number"]].name, "bytes": fact["bytes"], "xxh3": fact["xxh3"], "documents": fact["documents"]}
                 for fact in self.facts]
        write_atomic(self.folder / "sources.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
        tokenizer, rules = vocabulary.data(), parameters(self.spec)
        with writing(self.folder):
            for name in ("tokenizer", *SPLITS):
                (self.scratch / name).rename(self.folder / name)
        of = {"read": {}, "clean": rules["clean"], "dedup": {"dedup": rules["dedup"]}, "split": rules["split"],
              "tokenize": rules["tokenizer"] | {"sampled": vocabulary.sampled}}
        write_manifest(self.folder, {
            "name": self.spec.name, "context": self.spec.context, "dtype": vocabulary.dtype, "seed": self.spec.seed, "parameters": rules,
            "sources": describe(self.spec, self.files, {fact["number"]: (fact["bytes"], fact["xxh3"]) for fact in self.facts}),
            "steps": [step.data(of[step.name]) for step in self.steps], "tokenizer": tokenizer,
            "split": {"rule": "blake2b-128(text)[:8] / 2^64 < val_fraction", **rules["split"], "held_out": self.rule.held_out.hex()},
            "splits": splits, "code": __version__})

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
        sources.append({"name": source_name(source), "format": source.format, "text_key": source.text_key, "files": count, "bytes": size,
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


def _clear(folder: Path, *patterns: str) -> None:
    for path in [path for pattern in patterns for path in folder.glob(pattern)]:
        if not path.is_dir():
            with writing(path):
                path.unlink(missing_ok=True)
        for _ in range(100):                               # a task that still runs may put a file there once more
            if not path.exists():
                break
            shutil.rmtree(path, ignore_errors=True)
