"""Tokens to text, piece by piece."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from distlm.serve.text import TextStream


@pytest.fixture(scope="module")
def tokenizer(llama: Path):
    return AutoTokenizer.from_pretrained(llama, local_files_only=True)


def pieces(tokenizer, text: str, stop: tuple[str, ...] = (), prompt: str = "") -> list[str]:
    stream = TextStream(tokenizer, tokenizer(prompt)["input_ids"] if prompt else (), stop)
    out = []
    for token in tokenizer(text)["input_ids"]:
        out.append(stream.push(token))
        if stream.stopped:
            return out
    return [*out, stream.finish()]


@pytest.mark.parametrize("text", ["plain text", "東京 — naïve 🤖🤖 end", "🤖", "a\n\n  b\t", "\ufffd kept \ufffd"])
def test_the_pieces_are_the_text_and_no_character_is_split(tokenizer, text: str) -> None:
    found = pieces(tokenizer, text, prompt="def main(")
    assert "".join(found) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in found)
        assert len([piece for piece in found if piece]) > 1 or len(text) == 1


def test_bytes_that_are_no_character_come_out_at_the_end(tokenizer) -> None:
    ids = tokenizer("ab🤖")["input_ids"][:-1]              # the last byte is missing
    stream = TextStream(tokenizer)
    text = "".join(stream.push(token) for token in ids)
    assert text == "ab" and text + stream.finish() == tokenizer.decode(ids) == "ab\ufffd"


def test_a_character_begun_in_the_prompt_comes_out_whole(tokenizer) -> None:
    ids = tokenizer("🤖!")["input_ids"]
    stream = TextStream(tokenizer, ids[:2])
    assert "".join(stream.push(token) for token in ids[2:]) + stream.finish() == "🤖!"


@pytest.mark.parametrize(("text", "stop", "wanted"), [
    ("one two three", ("two",), "one "), ("one two three", ("ne t",), "o"), ("aab", ("ab",), "a"), ("the cat", ("cats",), "the cat"),
    ("abc", ("bcd", "b"), "a"), ("x\n\ny", ("\n\n",), "x"), ("x東京y", ("東",), "x"), ("one", ("one",), ""),
    ("ababac", ("abac",), "ab"), ("hello", ("lo", "hell"), ""),
])
def test_text_ends_before_the_first_stop_string(tokenizer, text: str, stop: tuple[str, ...], wanted: str) -> None:
    assert "".join(pieces(tokenizer, text, stop)) == wanted


def test_what_may_begin_a_stop_string_is_held_back(tokenizer) -> None:
    stream = TextStream(tokenizer, (), ("xyz",))
    ids = tokenizer("axyb")["input_ids"]
    assert len(ids) == 4
    assert [stream.push(token) for token in ids] == ["a", "", "", "xyb"]
