"""The tokenizer of a corpus, and the third task: a partition's documents to tokens.

A vocabulary that is made here is a byte-level BPE: any text survives encoding and decoding unchanged. With no merges it is the 256
bytes themselves. Its special tokens are the end of a document, the three roles of a conversation, and those that the spec gives.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from distlm.corpus.accounts import SAMPLE_CHARS, Account, Samples, Step, account, add
from distlm.corpus.bpe import byte_characters, fast_encoder
from distlm.corpus.conversations import LONGER, Refused, Turns, divided, is_empty_answer, joined, parted
from distlm.corpus.manifest import TOKENIZER_FILES, tokenizer_hash
from distlm.corpus.plain import plain, respelled, without_special
from distlm.corpus.split import HASH_BYTES, SplitRule, document_hash
from distlm.errors import InputError
from distlm.spec.prepare import SPECIAL_TOKENS, Conversations, Tokenizer
from distlm.storage import replacing, writing

if TYPE_CHECKING:
    from distlm.corpus.template import Template

END = SPECIAL_TOKENS[0]
CHAT_TEMPLATE = ("{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
                 "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
                 "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}")
ENCODE_BYTES = 1 << 20


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer on disk, and what is needed to pack its tokens."""

    folder: Path
    kind: str
    """bpe, bytes or from."""
    size: int
    """One more than the highest token id."""
    eos_id: int
    sampled: Account
    """What the vocabulary was learned from."""

    @property
    def dtype(self) -> str:
        return "uint16" if self.size <= 1 << 16 else "uint32"

    def data(self) -> dict[str, Any]:
        """As the manifest has it."""
        return {"kind": self.kind, "vocab_size": self.size, "eos_id": self.eos_id, "hash": tokenizer_hash(self.folder)}


def check_given(rules: Tokenizer) -> None:
    """Raises InputError where a tokenizer is to be taken from a folder that has none, or has one without an end token or one that makes
    special tokens of text."""
    if rules.source:
        tokenizer, end = _given(Path(rules.source).expanduser())
        respelled(plain(tokenizer, end), end, f"tokenizer.from: {rules.source}")


def check_template(rules: Tokenizer, conversations: Conversations) -> None:
    """Raises InputError where the chat template cannot write a question and its answer."""
    if rules.source:
        _template(Path(rules.source).expanduser(), conversations, f"tokenizer.from: {rules.source}")
        return
    from distlm.corpus.template import Template

    Template(_bytes([*SPECIAL_TOKENS, *rules.special_tokens]), rules.chat_template or CHAT_TEMPLATE, {"eos_token": END, "pad_token": END},
             END, conversations.loss, "tokenizer.chat_template")


def _template(folder: Path, conversations: Conversations, where: str = "tokenizer") -> "Template":
    from distlm.corpus.template import read_template  # imports transformers, which texts need not

    return read_template(folder, _given(folder)[1], conversations.loss, where)


def token_bytes(folder: Path) -> npt.NDArray[np.int64] | None:
    """int64[vocabulary]: the UTF-8 bytes that each token of a byte-level tokenizer stands for, none for special tokens; None for
    tokenizers of another kind, which do not tell."""
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    if not isinstance(tokenizer.decoder, decoders.ByteLevel):
        return None
    vocabulary, added = tokenizer.get_vocab(with_added_tokens=True), tokenizer.get_added_tokens_decoder()
    lengths = np.zeros(max(vocabulary.values()) + 1, np.int64)
    for token, i in vocabulary.items():
        lengths[i] = len(token) if i not in added else 0 if added[i].special else len(token.encode())
    return lengths


@dataclass(frozen=True)
class VocabularyTask:
    """What a tokenizer is made from, and where it goes."""

    rules: Tokenizer
    partitions: list[Path]
    """The documents, in order: the vocabulary is learned from the first ones of the training split."""
    split: SplitRule
    folder: Path
    """One that exists."""


def make_tokenizer(task: VocabularyTask) -> Vocabulary:
    """Train the tokenizer, or take the given one, and write it as transformers reads it. Raises StorageError."""
    os.environ["TOKENIZERS_PARALLELISM"] = "true"          # one task, so its threads are what is parallel
    rules, folder, sampled = task.rules, task.folder, account()
    if rules.source:
        source = Path(rules.source).expanduser()
        tokenizer, end = _given(source)
        for name in TOKENIZER_FILES:
            if (source / name).is_file():
                with writing(folder / name):
                    shutil.copyfile(source / name, folder / name)
        if not (folder / "tokenizer_config.json").exists():
            _write(folder / "tokenizer_config.json", json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end,
                                                                 "clean_up_tokenization_spaces": False}, indent=2))
    else:
        end, special = END, [*SPECIAL_TOKENS, *rules.special_tokens]
        tokenizer = _bytes(special) if rules.train == "bytes" else _trained(rules.vocab_size, special, _sample(task, sampled))
        _write(folder / "tokenizer.json", tokenizer.to_str(pretty=False))
        _write(folder / "tokenizer_config.json", json.dumps({
            "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "pad_token": END, "add_prefix_space": False,
            "clean_up_tokenization_spaces": False, "chat_template": rules.chat_template or CHAT_TEMPLATE}, indent=2))
    ids = tokenizer.get_vocab(with_added_tokens=True)
    return Vocabulary(folder, "from" if rules.source else rules.train or "bpe", max(ids.values()) + 1, ids[end], sampled)


def _write(path: Path, text: str) -> None:
    with writing(path):
        path.write_text(text, encoding="utf-8")


def _sample(task: VocabularyTask, taken: Account) -> Iterator[str]:
    """The first training documents in the order of the corpus, which is that of their hashes, up to a number of bytes."""
    for split, text, _, _ in _documents(task.partitions, task.split):
        if taken["bytes"] >= task.rules.sample_bytes:
            return
        if split == "train":
            add(taken, 1, len(text.encode()))
            yield text


def _given(source: Path) -> tuple[tokenizers.Tokenizer, str]:
    """The tokenizer in a folder and its end token."""
    where = f"tokenizer.from: {source}"
    if not (source / "tokenizer.json").is_file():
        raise InputError("there is no tokenizer.json" if source.is_dir() else "there is no such folder", where=where,
                         remedy="name the folder of a model or tokenizer that transformers has saved")
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(source / "tokenizer.json"))
    except Exception as error:                             # the library raises bare Exception
        raise InputError(f"tokenizer.json cannot be read: {error}", where=where, remedy="save the tokenizer again") from None
    end: Any = None
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if end is None and (source / name).is_file():
            try:
                end = json.loads((source / name).read_text(encoding="utf-8")).get("eos_token")
            except (ValueError, AttributeError) as error:
                raise InputError(f"{name} cannot be read: {error}", where=where, remedy="save the tokenizer again") from None
    end = end["content"] if isinstance(end, dict) else end
    end = end or next((token for token in (END, "</s>") if tokenizer.token_to_id(token) is not None), None)
    if end is None or tokenizer.token_to_id(end) is None:
        raise InputError("the tokenizer has no end token", where=where, remedy='give "eos_token" in its tokenizer_config.json')
    return tokenizer, end


def _byte_level(model: models.BPE) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _bytes(special: list[str]) -> tokenizers.Tokenizer:
    names = [*special, *byte_characters()]
    tokenizer = _byte_level(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    tokenizer.add_special_tokens(special)
    return tokenizer


def _trained(vocab_size: int, special: list[str], sample: Iterator[str]) -> tokenizers.Tokenizer:
    """What spells a special token is left out of what merges are learned from: one that made the token's very string would make its id."""
    tokenizer = _byte_level(models.BPE())
    pieces, words = tokenizer.pre_tokenizer, [token for token in special if token not in SPECIAL_TOKENS]
    if words:                                              # those that all vocabularies have are of several pieces
        spelled = tokenizers.Regex("|".join(map(re.escape, words)))
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pieces, pre_tokenizers.Split(spelled, "removed")])
    tokenizer.train_from_iterator(sample, trainers.BpeTrainer(
        vocab_size=vocab_size, show_progress=False, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.pre_tokenizer = pieces
    return tokenizer


def _documents(partitions: list[Path], rule: SplitRule) -> Iterator[tuple[str, str, int, str]]:
    """(split, text, bytes of the text, turns) of every document, in order, holding one small batch at a time."""
    for path in partitions:
        with pa.memory_map(str(path)) as file:
            reader = pa.ipc.open_file(file)
            for i in range(reader.num_record_batches):
                batch = reader.get_batch(i)
                sizes = pc.binary_length(batch["text"]).to_pylist()
                for content, origin, text, size, turns in zip(batch["hash"].to_pylist(), batch["origin"].to_pylist(), batch["text"], sizes,
                                                              batch["turns"].to_pylist(), strict=True):
                    yield rule.of(content, origin), text.as_py(), size, turns


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
    """A longer conversation is rejected or split."""


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


def encode_partition(task: EncodeTask) -> dict[str, Encoded]:
    """Write each split's tokens, every document followed by the end token, and the places where documents begin. Raises StorageError."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"         # tasks are what is parallel
    encode_each = _texts_encoder(task) if task.conversations is None else _turns_encoder(task, task.conversations)
    steps = {split: Step("tokenize") for split in task.rule.names}
    samples = {split: Samples() for split in task.rule.names}
    arrays: dict[str, list[Tokens]] = {split: [] for split in task.rule.names}
    waiting: dict[str, list[tuple[int, str, int, str]]] = {split: [] for split in task.rule.names}
    waiting_bytes = dict.fromkeys(waiting, 0)
    num_divided, num_empty = dict.fromkeys(waiting, 0), dict.fromkeys(waiting, 0)
    kept = list[tuple[int, int, int, int, bytes]]()        # row, part, bytes, tokens, hash

    def encode(split: str) -> None:
        found = encode_each([text for _, text, _, _ in waiting[split]], [turns for *_, turns in waiting[split]])
        for (row, text, size, turns), one in zip(waiting[split], found, strict=True):
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
    for row, (split, text, size, turns) in enumerate(_documents([task.documents], task.rule)):
        order.append(split)
        add(steps[split].taken, 1, size)
        waiting[split].append((row, text, size, turns))
        waiting_bytes[split] += size
        if waiting_bytes[split] >= ENCODE_BYTES:
            encode(split)
    result = {}
    for split, found in arrays.items():
        encode(split)
        lengths = np.array([len(tokens) for tokens, _ in found], dtype=np.int64)
        tokens = np.concatenate([np.zeros(0, task.dtype), *(tokens for tokens, _ in found)])
        loss = np.concatenate([np.zeros(0, np.bool_), *(loss for _, loss in found)])
        written = {"": tokens, "-starts": np.cumsum(lengths) - lengths, **({"-loss": loss} if task.conversations else {})}
        for ending, array in written.items():
            with replacing(f"{task.output}-{split}{ending}.npy") as partial, open(partial, "wb") as file:
                np.save(file, array)
        result[split] = Encoded(steps[split], len(tokens), sum(int(loss[1:].sum()) for _, loss in found), samples[split],
                                num_divided[split], num_empty[split])
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


def _turns_encoder(task: EncodeTask, conversations: Conversations) -> EncodeEach:
    template = _template(task.tokenizer, conversations)

    def whole(turns: Turns) -> Tokens | Refused:
        try:
            tokens, loss = template.encode(turns)
        except Refused as refused:
            return refused
        if len(tokens) > task.max_tokens:
            return Refused(LONGER, f"{len(tokens):,} tokens, and a window holds {task.max_tokens:,}")
        return np.array(tokens, task.dtype), np.array(loss, np.bool_)

    def is_longer(result: Tokens | Refused) -> bool:
        return isinstance(result, Refused) and result.reason == LONGER

    def encode(texts: list[str], turns: list[str]) -> Iterator[list[Part]]:
        for text, sizes in zip(texts, turns, strict=True):
            said = parted(text, sizes)
            parts, results = [said], [whole(said)]
            if conversations.too_long == "split" and is_longer(results[0]):
                parts = divided(said, lambda some: not is_longer(whole(some)))
                results = [whole(part) for part in parts] if len(parts) > 1 else results
            yield [Part(*joined(part), result, sum(is_empty_answer(*turn) for turn in part))
                   for part, result in zip(parts, results, strict=True)]
    return encode
