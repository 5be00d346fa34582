import json
import random
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import tiktoken
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers

from distlm.corpus.bpe import PIECES, fast_encoder

TEXT = "def f(x):\n    return x + 1  # größer 你好 и мир\n\n\tself.items = [i for i in range(10)]\n" * 20


def trained(text: str = TEXT, size: int = 600) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator([text], trainers.BpeTrainer(vocab_size=size, show_progress=False, special_tokens=["<|end|>"],
                                                              initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.encode_special_tokens = True
    return tokenizer


def changed(tokenizer: tokenizers.Tokenizer, **model: Any) -> tokenizers.Tokenizer:
    data = json.loads(tokenizer.to_str())
    data["model"] |= model
    return tokenizers.Tokenizer.from_str(json.dumps(data))


def slow(tokenizer: tokenizers.Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids


def random_texts() -> Iterator[str]:
    rng = random.Random(0)
    ranges = [(0, 128), (0x80, 0x800), (0x800, 0xD800), (0xE000, 0x10000), (0x10000, 0x110000), (9, 14), (0x2000, 0x2010), (0x300, 0x370)]
    for _ in range(2000):
        yield "".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(rng.randrange(40)))
        yield "".join(rng.choice("ab ret(\n\t='sgöß你0\u00a0\u3000") for _ in range(rng.randrange(60)))
        yield "".join(rng.choice(["def ", "return", "self", "  ", "\n", "aa", "a", "'s", "1", "<|end|>"]) for _ in range(rng.randrange(30)))


def test_the_tokens_are_those_of_tokenizers() -> None:
    tokenizer = trained(TEXT + "aaaaaaaaaaaa aaaa aa a rererere ereree " * 50)
    encode = fast_encoder(tokenizer)
    assert encode
    for text in random_texts():
        assert encode(text) == slow(tokenizer, text), repr(text)


def test_long_white_space_goes_the_slow_way_and_is_the_same() -> None:
    """A million characters of it end tiktoken's regex, in a panic."""
    tokenizer = trained()
    encode = fast_encoder(tokenizer)
    assert encode
    for text in (" " * 1_100_000 + "x", "\n" * 1_100_000 + "y", "x" + " " * 99_999 + "y", " x" * 10_000):
        assert encode(text) == slow(tokenizer, text)


def test_tokenizers_that_tiktoken_cannot_replace_are_not_replaced() -> None:
    tokenizer = trained()
    assert fast_encoder(tokenizer)
    tokenizer.normalizer = normalizers.NFC()
    assert fast_encoder(tokenizer) is None
    tokenizer = trained()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    assert fast_encoder(tokenizer) is None
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    assert fast_encoder(tokenizer) is None
    tokenizer = trained()
    tokenizer.add_tokens([AddedToken("self.", special=False)])
    assert fast_encoder(tokenizer) is None
    assert fast_encoder(changed(trained(), dropout=0.1)) is None
    assert fast_encoder(changed(trained(), ignore_merges=True)) is None
    assert fast_encoder(tokenizers.Tokenizer(models.WordLevel({"a": 0}))) is None


@pytest.mark.parametrize("merges", [
    [("b", "c"), ("a", "b"), ("ab", "c")],                 # abc is never reached, and tiktoken looks it up
    [("b", "c"), ("a", "b"), ("a", "bc"), ("ab", "c")],    # made in two ways
])
def test_vocabularies_on_which_the_two_differ_are_seen(merges: list[tuple[str, str]]) -> None:
    base = json.loads(trained(size=257).to_str())["model"]["vocab"]
    vocab = dict(base)
    for left, right in merges:
        vocab.setdefault(left + right, len(vocab))
    tokenizer = changed(trained(size=257), vocab=vocab, merges=merges)
    assert len(slow(tokenizer, "abc")) in (1, 2)
    assert fast_encoder(tokenizer) is None
    swapped = dict(base) | {"bc": len(base) + 1, "ab": len(base)}
    assert fast_encoder(changed(trained(size=257), vocab=swapped, merges=[("b", "c"), ("a", "b")])) is None


@pytest.mark.parametrize("every", [pytest.param(1, marks=pytest.mark.slow), 41])
@pytest.mark.parametrize("before", ["A", "1", "!"])
def test_every_character_of_unicode_is_of_the_same_class(before: str, every: int) -> None:
    """A letter joins a letter, a digit a digit, neither what is neither; what joins none of the three is white space."""
    characters = [chr(i) for i in range(sys.maxunicode + 1) if (i % every == 0 or i < 0x600) and not 0xD800 <= i < 0xE000]
    splitter, alphabet = pre_tokenizers.ByteLevel(add_prefix_space=False), {bytes([byte]): byte for byte in range(256)}
    for first in range(0, len(characters), 1 << 16):
        part = characters[first:first + (1 << 16)]
        text = "".join(f"{before}{character}\n\n" for character in part)
        begins = {start for _, (start, _) in splitter.pre_tokenize_str(text)}
        joined = {character for i, character in enumerate(part) if 4 * i + 1 not in begins}
        ranks = {(before + character).encode(): 256 + i for i, character in enumerate(part)} | alphabet
        found = set(tiktoken.Encoding("classes", pat_str=PIECES, mergeable_ranks=ranks, special_tokens={}).encode_ordinary(text))
        assert joined == {character for character in part if ranks[(before + character).encode()] in found}
