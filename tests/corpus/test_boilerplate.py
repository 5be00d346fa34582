"""Lines that many documents hold, found at any cut into partitions and ranges."""

import random
import sysconfig
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from distlm.corpus.boilerplate import CODE, drop_lines, frequent, line_hashes, normal, strip
from distlm.corpus.paragraphs import Shortened, by_range
from distlm.spec.curate import Boilerplate


def stripped(partitions: list[list[str]], ranges: int, rules: Boilerplate) -> list[list[Shortened]]:
    """The three rounds, one task after the other."""
    found = [by_range(line_hashes(texts, rules), ranges) for texts in partitions]
    often = [frequent([part[number] for part in found], rules.min_documents).lines for number in range(ranges)]
    return [list(strip(texts, [part[number] for part in often])) for number, texts in enumerate(partitions)]


RULES = Boilerplate(min_documents=3, min_chars=1, min_words=1, code=True)


def test_a_line_of_enough_documents_leaves_all_of_them_however_it_is_spaced_and_copies_in_one_count_once() -> None:
    documents = ["a b\none", "  a \t b\ntwo\n a  b", "three\na b", "c\nc\nc", "d\nc", "ab\nd"]
    assert [one.text for one in stripped([documents], 1, RULES)[0]] == ["one", "two", "three", "c\nc\nc", "d\nc", "ab\nd"]


def test_a_document_of_boilerplate_alone_is_rejected_with_all_its_bytes() -> None:
    documents = stripped([["ä\n\nb\n", "ä\nb\nc", "ä", "b\nd"]], 3, RULES)[0]
    assert documents[0] == Shortened("", 0, len("ä\n\nb\n".encode()), 2, "boilerplate")
    assert [one.text for one in documents[1:]] == ["c", "", "d"]


@pytest.mark.parametrize(("drop", "expected"), [
    ({1}, "a\n\nb\n\nc\n"), ({0}, "-\n\nb\n\nc\n"), ({0, 1}, "b\n\nc\n"), ({3}, "a\n-\n\nc\n"), ({3, 5}, "a\n-\n"), ({5}, "a\n-\n\nb\n"),
    ({0, 1, 3, 5}, "")])
def test_of_the_empty_lines_around_a_line_those_before_it_stay(drop: set[int], expected: str) -> None:
    assert drop_lines("a\n-\n\nb\n\nc\n", drop) == expected


def test_lines_that_are_short_long_or_have_few_words_stay() -> None:
    lines = ["Share this page", "All rights reserved 2024", "x" * 300 + " is too long", "1 2 3 4 5 6 7", "Home", "Über uns und mehr"]
    assert len(line_hashes(["\n".join(lines)], Boilerplate())) == 3
    assert len(line_hashes([], RULES)) == len(line_hashes(["", "\n\n"], RULES)) == 0


@pytest.mark.parametrize("line", [
    "}", "return None", "from __future__ import annotations", "import os, sys, and more", "if a and b and c:",
    "# Licensed under the License", "* Licensed under the License, and so on", "raise NotImplementedError in all cases",
    "for one in many of them:", "-- select what is there",
    "public static void main", "self.value is not None", '"a text of many words",', "end of the loop", "else if a then b", "a = b + c"])
def test_what_looks_like_code_stays_unless_it_is_asked_for(line: str) -> None:
    assert CODE.search(line)
    texts = [f"{line}\n{i}" for i in range(12)]
    assert all(not one.pieces for one in stripped([texts], 1, Boilerplate(min_chars=1, min_words=0))[0])
    assert all(one.pieces for one in stripped([texts], 1, Boilerplate(min_chars=1, min_words=0, code=True))[0])


@pytest.mark.parametrize("line", [
    "Share this page with your friends", "© 2024 Example Ltd. All rights reserved.", "We use cookies to improve your experience.",
    "Jetzt anmelden und mehr erfahren", "Click here to subscribe (opens in a new window)", "Terms | Privacy | Imprint",
    "Copyright: A, B and C"])
def test_what_web_pages_repeat_does_not_look_like_code(line: str) -> None:
    assert not CODE.search(line) and len(line_hashes([line], Boilerplate())) == 1


def test_the_source_of_the_standard_library_keeps_its_code() -> None:
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:150]
    texts = [file.read_text(encoding="utf-8", errors="replace") for file in files]
    for one, text in zip(stripped([texts], 2, Boilerplate())[0], texts, strict=True):
        compile(one.text, "file", "exec", dont_inherit=True)
        assert len(one.text) > 0.99 * len(text)


@pytest.mark.parametrize("seed", range(6))
def test_partitions_and_ranges_change_nothing_and_every_byte_is_accounted_for(seed: int) -> None:
    chance = random.Random(seed)
    words = ["aaa", "b b", " b  b ", "éé", "", " ", "fff ", "ggg", *map(str, range(30))]
    texts = ["\n".join(chance.choices(words, k=chance.randrange(1, 9))) for _ in range(60)]
    rules = Boilerplate(min_documents=8, min_chars=2, min_words=0, code=True)
    alone = stripped([texts], 1, rules)[0]
    cuts = sorted(chance.sample(range(61), 4))
    partitions = [texts[begin:end] for begin, end in zip([0, *cuts], [*cuts, 60], strict=True)]
    assert [one for part in stripped(partitions, chance.randrange(1, 9), rules) for one in part] == alone
    holds = Counter(line for text in texts for line in {normal(line) for line in text.split("\n")})
    often = {line for line, count in holds.items() if count >= 8 and len(line) >= 2}
    assert often
    for text, one in zip(texts, alone, strict=True):
        assert (one.bytes, one.bytes + one.taken) == (len(one.text.encode()), len(text.encode()))
        assert [line for line in one.text.split("\n") if line.strip()] == \
            [line for line in text.split("\n") if line.strip() and normal(line) not in often]
        assert one.pieces or one.text == text


def test_the_most_frequent_lines_come_first_with_the_place_of_their_first_copy() -> None:
    partitions = [["x\na b", "c d\nc d"], [], ["c d\na b", "a b\nc d\ne", "a b", "e\ne"]]
    parts = [line_hashes(texts, RULES) for texts in partitions]
    found = frequent(parts, 2)
    assert found.distinct == 3 and found.first == [(-4, 0, 0, 1), (-3, 0, 1, 0), (-2, 2, 1, 2)]
    assert sum(map(len, found.lines)) == 4 + 4 + 3 and frequent([part[:0] for part in parts], 2).distinct == 0
    assert np.concatenate(found.lines).dtype == parts[0].dtype
