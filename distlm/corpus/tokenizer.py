"""The tokenizer of a corpus: trained on its documents, or taken from a folder.

A vocabulary that is made here is a byte-level BPE: any text survives encoding and decoding unchanged. With no merges it is the 256
bytes themselves. Its special tokens are the end of a document, the three roles of a conversation, and those that the spec gives.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from distlm.corpus.accounts import Account, account, add
from distlm.corpus.bpe import byte_characters
from distlm.corpus.manifest import TOKENIZER_FILES, tokenizer_hash
from distlm.corpus.plain import plain, respelled
from distlm.corpus.split import SplitRule, split_documents
from distlm.errors import InputError
from distlm.spec.prepare import SPECIAL_TOKENS, Conversations, Tokenizer
from distlm.storage import read_json, writing

if TYPE_CHECKING:
    from distlm.corpus.template import Template

END = SPECIAL_TOKENS[0]
CHAT_TEMPLATE = ("{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
                 "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
                 "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}")


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


def check_template(rules: Tokenizer, conversations: Conversations) -> str:
    """What is to be told of the chat template, "" where nothing is. Raises InputError where it cannot write a question and its answer, or
    asks otherwise than it answers."""
    if rules.source:
        where = f"tokenizer.{'chat_template, with ' * bool(rules.chat_template)}from: {rules.source}"
        return given_template(Path(rules.source).expanduser(), conversations.loss, where, rules.chat_template).note
    from distlm.corpus.template import Template

    return Template(_bytes([*SPECIAL_TOKENS, *rules.special_tokens]), rules.chat_template or CHAT_TEMPLATE,
                    {"eos_token": END, "pad_token": END}, END, conversations.loss, "tokenizer.chat_template").note


def given_template(folder: Path, loss: str, where: str = "tokenizer", given: str | None = None) -> "Template":
    """The chat template of the tokenizer in a folder, or the `given` one with that tokenizer. Raises InputError."""
    from distlm.corpus.template import read_template  # imports transformers, which texts need not

    return read_template(folder, _given(folder)[1], loss, where, given)


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
        if rules.chat_template:
            settings = read_json(folder / "tokenizer_config.json")
            settings.pop("chat_template", None)            # one at one place: not every reader takes the file first
            _write(folder / "tokenizer_config.json", json.dumps(settings, indent=2))
            _write(folder / "chat_template.jinja", rules.chat_template)
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
    for split, text, _, _ in split_documents(task.partitions, task.split):
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
    told = dict[str, Any]()
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (source / name).is_file():
            try:
                told |= {key: value for key, value in json.loads((source / name).read_text(encoding="utf-8")).items() if value is not None}
            except (ValueError, AttributeError) as error:
                raise InputError(f"{name} cannot be read: {error}", where=where, remedy="save the tokenizer again") from None
    known = next((token for token in (END, "</s>") if tokenizer.token_to_id(token) is not None), None)
    end = told.get("eos_token") or known or told.get("sep_token")                          # the last is what encoders have
    end = end["content"] if isinstance(end, dict) else end
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
