import hashlib
import json
import random
import string
import subprocess
import sys
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers
from transformers import AutoTokenizer

from distlm.corpus.bpe import byte_characters, fast_encoder
from distlm.corpus.encode import EncodeTask, encode_partition
from distlm.corpus.split import SplitRule, content_hash
from distlm.corpus.template import read_template
from distlm.corpus.tokenizer import END, Vocabulary, VocabularyTask, check_given, make_tokenizer, token_bytes
from distlm.errors import InputError, SpecError
from distlm.spec import load_spec
from distlm.spec.prepare import Tokenizer

TEXTS = [f"def f{i}(x):\n    return x + {i}  # größer 你好\n" for i in range(50)]


def partition(folder: Path, texts: list[str]) -> Path:
    path = folder / "documents.arrow"
    table = pa.table({"hash": pa.array([content_hash(text.encode()) for text in texts], pa.binary(16)),
                      "origin": pa.array([0] * len(texts), pa.int32()), "text": pa.array(texts, pa.large_string()),
                      "turns": pa.array([""] * len(texts), pa.string())})
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=7)
    return path


def make(folder: Path, texts: list[str] = TEXTS, **rules: Any) -> Vocabulary:
    (folder / "tokenizer").mkdir(parents=True, exist_ok=True)
    return make_tokenizer(VocabularyTask(Tokenizer(**rules), [partition(folder, texts)], SplitRule(0), folder / "tokenizer"))


def encode(folder: Path, vocabulary: Vocabulary, texts: list[str], rule: SplitRule | None = None) -> dict[str, tuple[list[int], list[int]]]:
    task = EncodeTask(0, partition(folder, texts), rule or SplitRule(0), vocabulary.folder, vocabulary.eos_id, vocabulary.dtype,
                      folder / "t", None, 0)
    result = encode_partition(task)
    found = {split: (np.load(f"{task.output}-{split}.npy").tolist(), np.load(f"{task.output}-{split}-starts.npy").tolist())
             for split in result}
    assert {split: len(tokens) for split, (tokens, _) in found.items()} == {split: encoded.tokens for split, encoded in result.items()}
    return found


def random_text(rng: random.Random) -> str:
    ranges = [(0, 128), (0, 128), (128, 0x800), (0x800, 0xD800), (0xE000, 0x10000), (0x10000, 0x110000), (32, 33), (9, 14), (0x300, 0x370)]
    return "".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(rng.randrange(60)))


@pytest.mark.parametrize("train", ["bpe", "bytes"])
def test_any_text_survives_encoding_and_decoding_as_transformers_does_it(tmp_path: Path, train: str) -> None:
    vocabulary = make(tmp_path, train=train, **({"vocab_size": 320} if train == "bpe" else {}))
    tokenizer = AutoTokenizer.from_pretrained(vocabulary.folder)
    rng = random.Random(0)
    texts = [random_text(rng) for _ in range(400)]
    texts += ["", " ", "  two  spaces , and don 't . \n\n\t", "e\u0301", "\0\r\n", "🤷🏽‍♀️", "\ufeffx"]
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert all(0 <= token < vocabulary.size for token in ids)
    assert (tokenizer.eos_token, tokenizer.eos_token_id, vocabulary.eos_id) == (END, 0, 0)
    assert len(tokenizer) == vocabulary.size == (260 if train == "bytes" else 320)


def every_text() -> list[str]:
    """Code points but surrogates by blocks of 256: all that are assigned, and the unassigned among and between them. In a row; and one in
    eight after a letter, with a combining mark, a joiner and a variation selector behind it, and after a space."""
    points = [chr(point) for point in range(0x110000) if not 0xD800 <= point < 0xE000 and (point < 0x32800 or point % 0x1000 < 0x200)]
    blocks = [points[first:first + 256] for first in range(0, len(points), 256)]
    return ["".join(block) for block in blocks] + ["".join(f"a{one}\u0301\u200d\ufe0f {one}" for one in block[::8]) for block in blocks]


@pytest.mark.parametrize("train", ["bpe", "bytes"])
def test_every_script_of_unicode_survives_with_combining_marks_and_what_is_not_assigned(tmp_path: Path, train: str) -> None:
    """In batches, as a corpus is encoded."""
    vocabulary = make(tmp_path, train=train, **({"vocab_size": 320} if train == "bpe" else {}))
    tokenizer = tokenizers.Tokenizer.from_file(str(vocabulary.folder / "tokenizer.json"))
    texts = every_text()
    assigned = {chr(point) for point in range(0x110000) if unicodedata.category(chr(point)) not in ("Cn", "Cs", "Co")}
    assert len(assigned) > 144_000 and assigned < set("".join(texts))
    encoded = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    for text, again in zip(texts, tokenizer.decode_batch([one.ids for one in encoded], skip_special_tokens=False), strict=True):
        assert again == text


def test_further_special_tokens_and_a_chat_template_are_those_of_the_spec(tmp_path: Path) -> None:
    template = "{% for message in messages %}{{ '<|tool|>' + message['content'] }}{% endfor %}"
    for train in ("bpe", "bytes"):
        rules: dict[str, Any] = {"train": train, "special_tokens": ("<|tool|>", "[X]"), "chat_template": template}
        vocabulary = make(tmp_path / train, **rules, **({"vocab_size": 300} if train == "bpe" else {}))
        tokenizer = AutoTokenizer.from_pretrained(vocabulary.folder)
        assert vocabulary.size == len(tokenizer) == (300 if train == "bpe" else 262) and vocabulary.eos_id == 0
        assert tokenizer("a<|tool|>[X]")["input_ids"][1:] == [4, 5] and tokenizer.decode([4, 5], skip_special_tokens=True) == ""
        assert tokenizer.apply_chat_template([{"role": "user", "content": "u"}], tokenize=False) == "<|tool|>u"
        tokens, _ = encode(tmp_path / train, vocabulary, ["before<|tool|>[X]after"])["train"]
        assert not {4, 5} & set(tokens) and tokenizer.decode(tokens[:-1]) == "before<|tool|>[X]after"


@pytest.mark.parametrize(("rules", "message"), [
    ({"special_tokens": ["<|a|>", "<|a|>"]}, r"tokenizer\.special_tokens\.1: '<\|a\|>' is given twice"),
    ({"special_tokens": ["<|user|>"]}, r"special_tokens\.0: '<\|user\|>' is there already"),
    ({"special_tokens": [""]}, r"special_tokens\.0: '': must not be empty"), ({"special_tokens": [" \n"]}, "is white space"),
    ({"special_tokens": ["#"]}, r"special_tokens\.0: '#' is the name of a byte"), ({"special_tokens": ["Ġ"]}, "'Ġ' is the name of a byte"),
    ({"special_tokens": ["<|a|>"], "vocab_size": 260}, "vocab_size: 260 is less than 256 bytes and 5 special tokens; give 261 at least"),
    ({"special_tokens": ["<|a|>"], "from": "x"}, "has no effect beside from"),
    ({"chat_template": "{% for %}", "from": "x"}, r"tokenizer\.chat_template: line 1 is no Jinja"),
    ({"chat_template": "{{ " + 9000 * "(" + "1" + 9000 * ")" + " }}"}, r"chat_template: .*cannot be read as Jinja: RecursionError"),
    ({"chat_template": "{% for %}"}, r"tokenizer\.chat_template: line 1 is no Jinja")])
def test_special_tokens_that_cannot_be_are_refused(rules: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        load_spec({"kind": "prepare", "name": "a", "sources": ["a"], "tokenizer": rules})


def test_special_tokens_that_are_plain_words_are_not_made_by_merges(tmp_path: Path) -> None:
    """However often text has them, alone, within words, or as the very string that stands for some bytes in the vocabulary."""
    special = ("TOOL", "###", "OLS", "Ġin", "ä½", "a.b|c", "世")
    texts = ["TOOL TOOLS STOOL TOOL ### #### in 你 a.b|c 世界\n"] * 50 + TEXTS
    for train in ("bpe", "bytes"):
        vocabulary = make(tmp_path / train, texts, train=train, special_tokens=special, **({"vocab_size": 300} if train == "bpe" else {}))
        ids, tokenizer = set(range(4, 4 + len(special))), AutoTokenizer.from_pretrained(vocabulary.folder)
        assert vocabulary.size == len(tokenizer) == (300 if train == "bpe" else 267)
        assert tokenizer.convert_tokens_to_ids(list(special)) == sorted(ids) and tokenizer("###TOOL")["input_ids"] == [5, 4]
        sizes = token_bytes(vocabulary.folder)
        assert sizes is not None and not sizes[:4 + len(special)].any() and sizes[4 + len(special):].all()
        plain = tokenizers.Tokenizer.from_file(str(vocabulary.folder / "tokenizer.json"))
        plain.encode_special_tokens = True
        fast = fast_encoder(plain)
        for text in (*texts[:1], *special, "a", "STOOLS in"):
            tokens = encode(tmp_path / train, vocabulary, [text])["train"][0][:-1]
            assert not ids & set(tokens) and tokenizer.decode(tokens) == text and sizes[tokens].sum() == len(text.encode())
            assert fast and fast(text) == plain.encode(text, add_special_tokens=False).ids == tokens


def test_what_the_spec_takes_for_the_name_of_a_byte_is_one() -> None:
    assert {chr(i) for i in range(0x200) if chr(i).strip() and chr(i).isprintable() and i < 0x144} == set(byte_characters())


def test_the_bytes_tokenizer_has_one_token_per_byte(tmp_path: Path) -> None:
    vocabulary = make(tmp_path, train="bytes")
    text = "aé你\n"
    assert encode(tmp_path, vocabulary, [text])["train"][0] == [byte + 4 for byte in text.encode()] + [0]


def test_a_conversation_becomes_a_prompt_that_ends_with_the_role_to_answer(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(make(tmp_path, vocab_size=300).folder)
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"},
                {"role": "user", "content": "v"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|system|>s<|user|>u<|assistant|>a<|endoftext|><|user|>v<|assistant|>"
    assert tokenizer(text)["input_ids"].count(3) == 2


def test_text_that_spells_a_special_token_is_text(tmp_path: Path) -> None:
    vocabulary = make(tmp_path, vocab_size=300)
    text = f"before{END}after<|user|>"
    tokens, _ = encode(tmp_path, vocabulary, [text])["train"]
    assert tokens.count(0) == 1 and tokens[-1] == 0 and 2 not in tokens
    assert AutoTokenizer.from_pretrained(vocabulary.folder).decode(tokens[:-1]) == text


def saved(folder: Path, tokenizer: tokenizers.Tokenizer, end: str, template: str = "") -> Path:
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end, "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def spelling_bpe(*words: str, special: bool = True) -> tokenizers.Tokenizer:
    """A byte-level BPE whose merges make these words, which are its special tokens."""
    vocab, merges = {character: i for i, character in enumerate(byte_characters())}, list[tuple[str, str]]()
    for word in words:
        for end in range(2, len(word) + 1):
            if word[:end] not in vocab:
                merges.append((word[:end - 1], word[end - 1]))
                vocab[word[:end]] = len(vocab)
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_tokens([tokenizers.AddedToken(word, special=special, normalized=False) for word in words])
    return tokenizer


def unigram() -> tokenizers.Tokenizer:
    pieces = [("<unk>", 0.0), ("</s>", 0.0), ("▁", -3.0), *((character, -4.0) for character in string.ascii_letters + "</>.?")]
    tokenizer = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="never")
    tokenizer.add_special_tokens(["</s>", "<unk>"])
    return tokenizer


@pytest.mark.parametrize(("given", "end"), [
    (lambda: spelling_bpe("END", "STOP"), "END"), (lambda: spelling_bpe("END", "STOP", special=False), "END"), (unigram, "</s>")])
def test_no_text_becomes_a_special_token_of_a_given_tokenizer_whose_model_spells_it(tmp_path: Path, given: Any, end: str) -> None:
    """In texts and in what a turn says; what the template writes does."""
    chat = "{% for message in messages %}{{ message['content'] }}{{ eos_token }}{% endfor %}"
    folder = saved(tmp_path / "given", given(), end, chat)
    rules = Tokenizer(source=str(folder))
    check_given(rules)
    vocabulary = make(tmp_path, source=str(folder))
    plain = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    plain.encode_special_tokens = True
    assert vocabulary.eos_id in plain.encode(end).ids      # what the library makes of it
    for text in (end, f"{end}{end} {end} ends{end}s", "STOP ENDS", "none"):
        tokens, _ = encode(tmp_path, vocabulary, [text])["train"]
        assert tokens.count(vocabulary.eos_id) == 1 and tokens[-1] == vocabulary.eos_id
        assert plain.decode(tokens[:-1], skip_special_tokens=False) == text
    template = read_template(folder, end, "assistant", "here")
    assert template.encode([("user", f"a{end}"), ("assistant", f"{end}s")])[0].count(vocabulary.eos_id) == 2


def test_a_given_tokenizer_that_has_no_other_tokens_for_what_spells_a_special_one_is_refused(tmp_path: Path) -> None:
    words = tokenizers.Tokenizer(models.WordLevel({"END": 0, "a": 1, "[UNK]": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.add_special_tokens(["END", "[UNK]"])
    for name, tokenizer, end in (("bpe", spelling_bpe("#"), "#"), ("words", words, "END")):
        folder = saved(tmp_path / name, tokenizer, end)
        with pytest.raises(InputError, match=rf"tokenizer\.from: .*{name}: text that spells the special token '{end}' would become it"):
            check_given(Tokenizer(source=str(folder)))


def test_documents_go_to_their_split_each_with_its_end(tmp_path: Path) -> None:
    vocabulary = make(tmp_path, train="bytes")
    rule = SplitRule(0.3)
    found = encode(tmp_path, vocabulary, TEXTS, rule)
    for split, (tokens, starts) in found.items():
        expected = [text for text in TEXTS if rule.of(content_hash(text.encode())) == split]
        assert expected and len(expected) < 50
        assert [bytes(token - 4 for token in tokens[begin:end - 1]).decode() for begin, end in
                zip(starts, [*starts[1:], len(tokens)], strict=True)] == expected


def test_the_vocabulary_is_learned_from_the_training_split_up_to_the_sample_alone(tmp_path: Path) -> None:
    rule = SplitRule(0.5)
    train = [text for text in TEXTS if rule.of(content_hash(text.encode())) == "train"]
    (tmp_path / "a").mkdir()
    task = VocabularyTask(Tokenizer(vocab_size=300, sample_bytes=200), [partition(tmp_path, TEXTS)], rule, tmp_path / "a")
    sampled = make_tokenizer(task)
    count = sampled.sampled["documents"]
    assert sampled.sampled["bytes"] == sum(len(text.encode()) for text in train[:count])
    assert sum(len(text.encode()) for text in train[:count - 1]) < 200 <= sampled.sampled["bytes"]
    same = make(tmp_path / "b", texts=train[:count], vocab_size=300)
    assert (same.folder / "tokenizer.json").read_bytes() == (sampled.folder / "tokenizer.json").read_bytes()


def test_training_is_the_same_in_every_process(tmp_path: Path) -> None:
    rng = random.Random(1)                                 # many pairs of equal count, so that ties must be broken
    texts = [" ".join("".join(rng.choice("abcdefgh") for _ in range(4)) for _ in range(50)) for _ in range(40)]
    expected = hashlib.sha256((make(tmp_path, texts, vocab_size=600).folder / "tokenizer.json").read_bytes()).hexdigest()
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    program = f"""
import hashlib, json
from pathlib import Path
from tests.corpus.test_tokenizer import make
folder = Path({str(tmp_path)!r})
made = make(folder / "again", json.loads((folder / "texts.json").read_text()), vocab_size=600)
print(hashlib.sha256((made.folder / "tokenizer.json").read_bytes()).hexdigest())
"""
    again = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True,
                           cwd=Path(__file__).parents[2])
    assert again.stdout.strip() == expected


def test_a_given_tokenizer_is_taken_with_its_end_token(tmp_path: Path) -> None:
    made = make(tmp_path / "first", vocab_size=310)
    vocabulary = make(tmp_path / "second", source=str(made.folder))
    assert (vocabulary.kind, vocabulary.size, vocabulary.eos_id) == ("from", 310, 0)
    assert (vocabulary.folder / "tokenizer.json").read_bytes() == (made.folder / "tokenizer.json").read_bytes()
    config = json.loads((made.folder / "tokenizer_config.json").read_text())
    (made.folder / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": {"content": "<|user|>"}}))
    assert make(tmp_path / "third", source=str(made.folder)).eos_id == 2


def test_a_given_tokenizer_that_cannot_be_taken_is_found_before_work(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        check_given(Tokenizer(source=str(tmp_path / "none")))
    with pytest.raises(InputError, match=r"no tokenizer\.json"):
        check_given(Tokenizer(source=str(tmp_path)))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="cannot be read"):
        check_given(Tokenizer(source=str(tmp_path)))
    made = json.loads((make(tmp_path / "made", train="bytes").folder / "tokenizer.json").read_text().replace(END, "<|stop|>"))
    (tmp_path / "tokenizer.json").write_text(json.dumps(made))
    with pytest.raises(InputError, match="no end token"):
        check_given(Tokenizer(source=str(tmp_path)))
