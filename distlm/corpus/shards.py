"""From the documents of a corpus to its shards: the tokenizer, every partition's tokens, and the windows.

    partitions ──encode──▶ tokens ──pack──▶ shards

What the corpus will hold is made on the scratch folder, from where it is moved when it is whole.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distlm.corpus.accounts import Step, account, add
from distlm.corpus.bestfit import BestFitTask, Packed, document_groups, groups, write_best_fit
from distlm.corpus.curate import Curated
from distlm.corpus.encode import Encoded, EncodeTask, encode_partition
from distlm.corpus.job import Job
from distlm.corpus.labels import check_labels, first_of
from distlm.corpus.manifest import Shard
from distlm.corpus.pack import PackTask, num_windows, write_shard
from distlm.corpus.tokenizer import Vocabulary, VocabularyTask, given_template, make_tokenizer
from distlm.errors import CorpusError
from distlm.spec.prepare import Conversations, Labels

Parts = dict[str, list[tuple[Path, int, int]]]
"""By split, where its tokens lie, as PackTask has it."""


@dataclass(frozen=True)
class Sharded:
    """What stands on the scratch folder: `tokenizer`, and a folder of shards for each split."""

    vocabulary: Vocabulary
    splits: dict[str, dict[str, Any]]
    """As the manifest has them."""
    lists: list[Path]
    """Of each partition, its documents without their text."""


def make_shards(job: Job, curated: Curated) -> Sharded:
    """Raises CorpusError where the documents fill no window or have no labels to tell apart, StorageError."""
    stages = _Shards(job, curated)
    vocabulary = stages.make_vocabulary()
    splits = stages.pack(vocabulary, *stages.encode(vocabulary))
    return Sharded(vocabulary, splits, [Path(f"{stages.tokens(i)}-documents.arrow") for i in range(len(curated.partitions))])


@dataclass(frozen=True)
class _Shards:
    """The stages."""

    job: Job
    curated: Curated

    def make_vocabulary(self) -> Vocabulary:
        job, rules = self.job, self.job.spec.tokenizer
        task = VocabularyTask(rules, self.curated.partitions, self.curated.rule, job.made("tokenizer"))
        (_, vocabulary), = job.each("vocabulary", make_tokenizer, [task], 1)
        if rules.train != "bytes" and not rules.source and vocabulary.size < rules.vocab_size:
            job.progress.note(f"the vocabulary has {vocabulary.size:,} tokens, not {rules.vocab_size:,}: there is no more to merge in this "
                              "text")
        return vocabulary

    def encode(self, vocabulary: Vocabulary) -> tuple[list[dict[str, Encoded]], tuple[str, ...]]:
        """Every partition's documents to tokens. Returns what became of them, and the labels by their numbers."""
        job, spec = self.job, self.job.spec
        tasks = [EncodeTask(i, path, self.curated.rule, vocabulary.folder, vocabulary.eos_id, vocabulary.dtype, self.tokens(i),
                            spec.conversations, spec.context + 1, spec.labels) for i, path in enumerate(self.curated.partitions)]
        results = dict[int, dict[str, Encoded]]()
        tokenize, documents, tokens = Step("tokenize"), job.books.steps[-1].given["documents"], 0
        job.progress.update("documents", 0, documents)
        for i, result in job.each("encode", encode_partition, tasks):
            results[i] = result
            for one in result.values():
                tokenize.merge(one.step)
                tokens += one.tokens
            job.progress.update("documents", tokenize.taken["documents"], documents, tokens=tokens)
        job.books.add(tokenize)
        encoded = [results[i] for i in range(len(tasks))]
        if spec.conversations or spec.labels:
            job.books.sample([one.samples for result in encoded for one in result.values()], self.curated.partitions)
            job.books.write_samples()
            job.books.check_left(tokenize)
        labels: tuple[str, ...] = ()
        if spec.labels:
            job.figures["labels"] = figures = self._labels(spec.labels, encoded)
            labels = tuple(figures["names"])
        if spec.conversations:
            job.figures["conversations"] = self._conversations(spec.conversations, vocabulary, encoded, tokenize)
        return encoded, labels

    def tokens(self, partition: int) -> Path:
        """What the names of the files begin with that encoding makes of a partition."""
        return self.job.scratch / f"tokens-{partition:04d}"

    def _labels(self, rules: Labels, encoded: list[dict[str, Encoded]]) -> dict[str, Any]:
        """The labels by their numbers, and how many documents of each split have each."""
        counts = {name: sum((result[name].labels for result in encoded), Counter[str]()) for name in self.curated.rule.names}
        names = check_labels(counts, rules, self.job.spec.name)
        cut = sum(one.cut_documents for result in encoded for one in result.values())
        if absent := [name for name in names if not counts["train"][name]]:
            self.job.progress.note(f"no training document has the label {first_of(absent)}")
        if cut:
            self.job.progress.note(f"{cut:,} document{'s' if cut > 1 else ''} longer than a window {'were' if cut > 1 else 'was'} cut")
        return {"multiple": rules.multiple, "names": names, **{split: {name: found[name] for name in names}
                                                               for split, found in counts.items()}, "cut_documents": cut}

    def _conversations(self, rules: Conversations, vocabulary: Vocabulary, encoded: list[dict[str, Encoded]],
                       tokenize: Step) -> dict[str, Any]:
        """What gives loss, what ends answers, and what was split."""
        note, each = self.job.progress.note, [one for result in encoded for one in result.values()]
        loss = {f"{name}_loss_tokens": sum(result[name].loss_tokens for result in encoded) for name in self.curated.rule.names}
        template = given_template(vocabulary.folder, rules.loss)
        if template.note:
            note(template.note)
        end = {} if template.end_id is None else {"end_id": template.end_id}
        found = {"loss": rules.loss, **end, **loss, "loss_share": round(sum(loss.values()) / sum(one.tokens for one in each), 6)}
        if rules.loss == "assistant" and (empty := sum(one.empty_answers for one in each)):
            found["empty_answers"] = empty
            note(f"{empty:,} empty answer{'s give' if empty > 1 else ' gives'} no loss")
        if rules.pairs:
            found["pairs"] = tokenize.added["documents"]
            note(f"{found['pairs']:,} pairs of answers")
        if rules.too_long == "split":
            split = sum(one.split_conversations for one in each)
            parts = split + tokenize.added["documents"]
            found |= {"split_conversations": split, "split_parts": parts}
            note(f"{split:,} conversation{'s' if split != 1 else ''} longer than a window became {parts:,} parts")
        return found

    def pack(self, vocabulary: Vocabulary, encoded: list[dict[str, Encoded]], labels: tuple[str, ...]) -> dict[str, dict[str, Any]]:
        """Tokens to shards: the manifest's `splits`."""
        splits, parts = dict[str, dict[str, Any]](), Parts()
        for name in self.curated.rule.names:
            counts, tokens, lost, parts[name] = account(), 0, Counter[str](), []
            for i, one in enumerate(partition[name] for partition in encoded):
                add(counts, one.step.given["documents"], one.step.given["bytes"])
                lost.update({reason: rejected["documents"] for reason, rejected in one.step.rejected.items()})
                parts[name].append((Path(f"{self.tokens(i)}-{name}"), tokens, one.tokens))
                tokens += one.tokens
            splits[name] = {**counts, **({"rejected": dict(sorted(lost.items()))} if lost else {}), "tokens": tokens}
            self.job.made(name)
        if self.job.spec.padded:
            self._fill(vocabulary, splits, parts, labels)
        else:
            self._cut(vocabulary, splits, parts)
        return splits

    def _cut(self, vocabulary: Vocabulary, splits: dict[str, dict[str, Any]], parts: Parts) -> None:
        """Cut the tokens of each split, one after the other, into windows."""
        spec, tasks = self.job.spec, list[PackTask]()
        for name, split in splits.items():
            windows, dropped = num_windows(split["tokens"], spec.context)
            split |= {"dropped_tokens": dropped, "windows": windows, "shards": []}
            tasks += [PackTask(self.job.scratch, f"{name}/{shard:05d}.arrow", parts[name], first, min(spec.shard_windows, windows - first),
                               spec.context, vocabulary.dtype) for shard, first in enumerate(range(0, windows, spec.shard_windows))]
        self._check_windows(splits)
        total, done, shards = sum(task.windows for task in tasks) * spec.context, 0, dict[int, Shard]()
        for i, shard_made in self.job.each("pack", write_shard, tasks):
            shards[i] = shard_made
            done += shard_made.windows * spec.context
            self.job.progress.update("tokens", done, total)
        for _, one in sorted(shards.items()):
            splits[one.file.split("/")[0]]["shards"].append(vars(one))

    def _fill(self, vocabulary: Vocabulary, splits: dict[str, dict[str, Any]], parts: Parts, labels: tuple[str, ...]) -> None:
        """Fill windows up, by best-fit or with a document each, and say what padding it takes."""
        job, spec, tasks = self.job, self.job.spec, list[BestFitTask]()
        pairs = spec.conversations is not None and spec.conversations.pairs
        for name, split in splits.items():
            split |= {"dropped_tokens": 0, "windows": 0, "padding_tokens": 0, "repeated_tokens": 0, "shards": []}
            cut = document_groups(parts[name], spec.shard_windows * (1 + pairs)) if labels or pairs else \
                groups(parts[name], spec.shard_windows * spec.context)
            tasks += [BestFitTask(job.scratch, f"{name}/{shard:05d}.arrow", parts[name], group, spec.context, vocabulary.dtype,
                                  vocabulary.eos_id, spec.conversations is not None, pairs, labels) for shard, group in enumerate(cut)]
        total, done, packed = sum(split["tokens"] for split in splits.values()), 0, dict[int, Packed]()
        for i, result in job.each("pack", write_best_fit, tasks):
            packed[i] = result
            done += tasks[i].group.end - tasks[i].group.begin
            job.progress.update("tokens", done, total)
        for _, one in sorted(packed.items()):
            split = splits[one.shard.file.split("/")[0]]
            split["windows"] += one.shard.windows
            split["padding_tokens"] += one.padding_tokens
            split["repeated_tokens"] += one.repeated_tokens
            split["shards"].append(vars(one.shard))
        if places := sum(split["windows"] for split in splits.values()) * (spec.context + 1):
            padding, repeated = (sum(split[unit] for split in splits.values()) for unit in ("padding_tokens", "repeated_tokens"))
            job.figures["pack"] = {"method": spec.packing, "padding_tokens": padding, "padding_share": round(padding / places, 6),
                                   "repeated_tokens": repeated}
            job.progress.note(f"{padding:,} tokens of padding, {padding / places:.2%} of the windows")
        self._check_windows(splits)

    def _check_windows(self, splits: dict[str, dict[str, Any]]) -> None:
        for name, split in splits.items():
            if split["windows"]:
                continue
            text = f"the {split['tokens']:,} tokens of the {name} split do not fill a window of {self.job.spec.context} + 1"
            if lost := split.get("rejected", {}) if not split["documents"] else {}:
                text = (f"nothing is left of the {name} split, every document was rejected when it became tokens ("
                        + ", ".join(f"{count:,} {reason}" for reason, count in lost.items()) + ")")
            if name == "train":
                raise CorpusError(text, where=self.job.spec.name, remedy=f"give more text or a {'larger' if lost else 'smaller'} context")
            if split["tokens"] or self.curated.splits[name]["documents"]:
                self.job.progress.note(f"{text}: there is nothing to validate on")
