"""The third task: a partition's documents to tokens, each with its end token."""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import tokenizers

from distlm.corpus.accounts import SAMPLE_CHARS, Samples, Step, add
from distlm.corpus.bpe import fast_encoder
from distlm.corpus.conversations import LONGER, Refused, Turns, checked_preference, divided, is_empty_answer, joined, parted, sides
from distlm.corpus.labels import labels_in
from distlm.corpus.partitions import read_rows
from distlm.corpus.plain import plain, respelled, without_special
from distlm.corpus.split import HASH_BYTES, SplitRule, document_hash, split_documents
from distlm.corpus.tokenizer import END, given_template
from distlm.spec.prepare import Conversations, Labels
from distlm.storage import replacing, write_atomic

if TYPE_CHECKING:
    from distlm.corpus.template import Template

ENCODE_BYTES = 1 << 20


@dataclass(frozen=True)
class EncodeTask:
    """A partition of documents, and where its tokens go."""

    partition: int
    documents: Path
    rule: SplitRule
    tokenizer: Path
    eos_id: int
    dtype: str
    output: Path
    """`<output>-train.npy`, `<output>-train-starts.npy` and the same for the other splits; `<output>-documents.arrow`, the documents
    without their text. Of conversations `<output>-train-loss.npy` too, bool, which tokens give loss."""
    conversations: Conversations | None
    max_tokens: int
    """A longer conversation is rejected or split, a longer document with labels rejected or cut."""
    labels: Labels | None = None
    """With them there is `<output>-train-labels.json` and the same for the other splits, the names of each document's labels."""


@dataclass(frozen=True)
class Encoded:
    """One split of one partition."""

    step: Step
    tokens: int
    loss_tokens: int
    """Of conversations: those that give loss, the first of each aside, which nothing predicts."""
    samples: Samples
    """Of conversations that were rejected: partition and row."""
    split_conversations: int = 0
    """Those that were longer than a window and could be cut."""
    empty_answers: int = 0
    """Answers that say nothing, of conversations that are kept."""
    labels: Counter[str] = field(default_factory=Counter)
    """Documents by the name of a label."""
    cut_documents: int = 0
    """Documents with labels that were longer than a window."""


def encode_partition(task: EncodeTask) -> dict[str, Encoded]:
    """Write each split's tokens, every document followed by the end token, and the places where documents begin. Raises StorageError."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"         # tasks are what is parallel
    encode_each = _texts_encoder(task) if task.conversations is None else _turns_encoder(task, task.conversations)
    steps = {split: Step("tokenize") for split in task.rule.names}
    samples = {split: Samples() for split in task.rule.names}
    arrays: dict[str, list[Tokens]] = {split: [] for split in task.rule.names}
    waiting: dict[str, list[tuple[int, str, int, str]]] = {split: [] for split in task.rule.names}
    waiting_bytes = dict.fromkeys(waiting, 0)
    num_divided, num_empty, num_cut = dict.fromkeys(waiting, 0), dict.fromkeys(waiting, 0), dict.fromkeys(waiting, 0)
    kept = list[tuple[int, int, int, int, bytes]]()        # row, part, bytes, tokens, hash

    def encode(split: str) -> None:
        found = encode_each([text for _, text, _, _ in waiting[split]], [turns for *_, turns in waiting[split]])
        for (row, text, size, turns), one in zip(waiting[split], found, strict=True):
            if task.labels and not isinstance(one, list):
                one, cut = fitting(one, task)
                num_cut[split] += cut
            parts = one if isinstance(one, list) else [Part(text, turns, one)]
            several = len(parts) > 1
            bytes_each = [len(part.text.encode()) for part in parts] if several else [size]
            add(steps[split].added, len(parts) - 1, sum(bytes_each) - size)
            num_divided[split] += several
            for number, (part, part_bytes) in enumerate(zip(parts, bytes_each, strict=True), 1):
                if isinstance(part.result, Refused):
                    reason, detail = part.result.reason, part.result.detail
                    steps[split].reject(reason, 1, part_bytes)
                    samples[split].add(reason, {"place": (task.partition, row), "bytes": part_bytes, "text": part.text[:SAMPLE_CHARS],
                                                "detail": f"part {number} of {len(parts)}: {detail}" if several else detail})
                    continue
                arrays[split].append(part.result)
                kept.append((row, number if several else 0, part_bytes, len(part.result[0]), document_hash(part.text, part.turns)))
                num_empty[split] += part.empty_answers
                add(steps[split].given, 1, part_bytes)
        waiting[split].clear()
        waiting_bytes[split] = 0

    order = list[str]()
    for row, (split, text, size, turns) in enumerate(split_documents([task.documents], task.rule)):
        order.append(split)
        add(steps[split].taken, 1, size)
        waiting[split].append((row, text, size, turns))
        waiting_bytes[split] += size
        if waiting_bytes[split] >= ENCODE_BYTES:
            encode(split)
    for split in waiting:
        encode(split)
    labels = _labels_of_kept(task, sorted(kept), order) if task.labels else {}
    result = {}
    for split, found in arrays.items():
        lengths = np.array([len(tokens) for tokens, _ in found], dtype=np.int64)
        tokens = np.concatenate([np.zeros(0, task.dtype), *(tokens for tokens, _ in found)])
        loss = np.concatenate([np.zeros(0, np.bool_), *(loss for _, loss in found)])
        written = {"": tokens, "-starts": np.cumsum(lengths) - lengths, **({"-loss": loss} if task.conversations else {})}
        for ending, array in written.items():
            with replacing(f"{task.output}-{split}{ending}.npy") as partial, open(partial, "wb") as file:
                np.save(file, array)
        result[split] = Encoded(steps[split], len(tokens), sum(int(loss[1:].sum()) for _, loss in found), samples[split],
                                num_divided[split], num_empty[split],
                                Counter(name for names in labels.get(split, ()) for name in names), num_cut[split])
        if task.labels:
            write_atomic(Path(f"{task.output}-{split}-labels.json"), json.dumps(labels[split]))
    with pa.memory_map(str(task.documents)) as source:
        table = pa.ipc.open_file(source).read_all()
        table = table.drop_columns(["text", "turns"]).append_column("split", pa.array(order, pa.string()))
        rows, parts, sizes, counts, hashes = zip(*sorted(kept), strict=True) if kept else ((), (), (), (), ())
        table = table if rows == tuple(range(len(table))) else table.take(pa.array(rows, pa.int64()))
        for name, column, kind in (("bytes", sizes, pa.int64()), ("tokens", counts, pa.int64()), ("part", parts, pa.int32()),
                                   ("text_hash", hashes, pa.binary(HASH_BYTES))):
            table = table.append_column(name, pa.array(column, kind))
        with replacing(f"{task.output}-documents.arrow") as partial, pa.OSFile(partial, "wb") as file, \
                pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
    return result


def _labels_of_kept(task: EncodeTask, kept: list[tuple[int, int, int, int, bytes]], splits: list[str]) -> dict[str, list[list[str]]]:
    """By split the labels of each document that became tokens, in order."""
    assert task.labels
    metas = [meta for meta, in read_rows(task.documents, "meta")]
    found: dict[str, list[list[str]]] = {split: [] for split in task.rule.names}
    for row, *_ in kept:
        found[splits[row]].append(labels_in(metas[row], task.labels))
    return found


def fitting(result: "Tokens | Refused", task: EncodeTask) -> "tuple[Tokens | Refused, bool]":
    """The tokens of a document with labels as a window takes them, and whether they were cut, before the end token."""
    if isinstance(result, Refused) or len(result[0]) <= task.max_tokens:
        return result, False
    tokens, loss = result
    if task.labels and task.labels.too_long == "cut":
        return (np.append(tokens[:task.max_tokens - 1], tokens[-1:]), loss), True
    return Refused(LONGER, f"{len(tokens):,} tokens, and a window holds {task.max_tokens:,}"), False


Tokens: TypeAlias = tuple[npt.NDArray[Any], npt.NDArray[np.bool_]]
"""(tokens, whether each gives loss); of texts the latter is empty."""


class Part(NamedTuple):
    """What becomes tokens by itself: a document, or some turns of a conversation that is split."""

    text: str
    turns: str
    """Whose is how much of the text, as conversations.py writes it; of texts empty."""
    result: Tokens | Refused
    empty_answers: int = 0


EncodeEach = Callable[[list[str], list[str]], Iterator[Tokens | Refused | list[Part]]]
"""(texts, turns) to the tokens of each text, or to the parts of each conversation."""


def _texts_encoder(task: EncodeTask) -> EncodeEach:
    path = task.tokenizer / "tokenizer.json"
    status = path.stat()
    tokenizer, fast, spelled = _loaded(path, status.st_mtime_ns, status.st_ino, task.eos_id)
    no_loss = np.zeros(0, np.bool_)

    def encode(texts: list[str], turns: list[str]) -> Iterator[tuple[npt.NDArray[Any], npt.NDArray[np.bool_]] | Refused]:
        every = map(fast, texts) if fast else (one.ids for one in tokenizer.encode_batch_fast(texts, add_special_tokens=False))
        for ids in every:
            yield np.array([*without_special(ids, spelled), task.eos_id], dtype=task.dtype), no_loss
    return encode


@lru_cache(maxsize=1)
def _loaded(path: Path, modified: int, inode: int,
            eos_id: int) -> tuple[tokenizers.Tokenizer, Callable[[str], list[int]] | None, dict[int, list[int]]]:
    """A process does many partitions with the same tokenizer."""
    given = tokenizers.Tokenizer.from_file(str(path))
    end = given.id_to_token(eos_id) or END
    tokenizer = plain(given, end)
    return tokenizer, fast_encoder(tokenizer), respelled(tokenizer, end, str(path))


@lru_cache(maxsize=1)
def _template(folder: Path, modified: int, inode: int, loss: str) -> "Template":
    """As `_loaded`, for conversations."""
    return given_template(folder, loss)


def _turns_encoder(task: EncodeTask, conversations: Conversations) -> EncodeEach:
    status = (task.tokenizer / "tokenizer.json").stat()
    template = _template(task.tokenizer, status.st_mtime_ns, status.st_ino, conversations.loss)

    def whole(turns: Turns, first: int = 0) -> Tokens | Refused:
        try:
            tokens, loss = template.encode(turns, first)
        except Refused as refused:
            return refused
        if len(tokens) > task.max_tokens:
            return Refused(LONGER, f"{len(tokens):,} tokens, and a window holds {task.max_tokens:,}")
        return np.array(tokens, task.dtype), np.array(loss, np.bool_)

    def is_longer(result: Tokens | Refused) -> bool:
        return isinstance(result, Refused) and result.reason == LONGER

    def pair(said: Turns, text: str, sizes: str) -> list[Part]:
        """The better answer behind its prompt and the worse one: both, or neither."""
        try:
            prompt, *answers = sides(checked_preference(said))    # cleaning may have taken what an answer said
        except Refused as refused:
            return [Part(text, sizes, refused)]
        parts = [Part(*joined([*prompt, *answer]), whole([*prompt, *answer], len(prompt))) for answer in answers]
        if refusal := next((part.result for part in parts if isinstance(part.result, Refused)), None):
            return [Part(text, sizes, refusal)]
        if (length := sum(len(part.result[0]) for part in parts if not isinstance(part.result, Refused))) > task.max_tokens:
            return [Part(text, sizes, Refused(LONGER, f"{length:,} tokens of both, and a window holds {task.max_tokens:,}"))]
        chosen, rejected = (part.result for part in parts)
        if not isinstance(chosen, Refused) and not isinstance(rejected, Refused) and np.array_equal(chosen[0], rejected[0]):
            return [Part(text, sizes, Refused("equal_answers", "the template makes the same tokens of both answers"))]
        return parts

    def encode(texts: list[str], turns: list[str]) -> Iterator[list[Part]]:
        for text, sizes in zip(texts, turns, strict=True):
            said = parted(text, sizes)
            if conversations.pairs:
                yield pair(said, text, sizes)
                continue
            parts, results = [said], [whole(said)]
            if conversations.too_long == "split" and is_longer(results[0]):
                parts = divided(said, lambda some: not is_longer(whole(some)))
                results = [whole(part) for part in parts] if len(parts) > 1 else results
            yield [Part(*joined(part), result, sum(is_empty_answer(*turn) for turn in part))
                   for part, result in zip(parts, results, strict=True)]
    return encode
