import random

import numpy as np
import pytest

from distlm.corpus.paragraphs import PARAGRAPH, Shortened, by_range, drop_paragraphs, paragraph_hashes, repeats, shorten


def without_repeats(partitions: list[list[str]], ranges: int, min_chars: int = 3) -> list[list[Shortened]]:
    """The three rounds, one task after the other."""
    found = [by_range(paragraph_hashes(texts, min_chars), ranges) for texts in partitions]
    lost = [repeats([part[number] for part in found]) for number in range(ranges)]
    return [list(shorten(texts, [part[number] for part in lost])) for number, texts in enumerate(partitions)]


def test_a_paragraph_stands_between_blank_lines_and_white_space_at_its_ends_does_not_count() -> None:
    found = paragraph_hashes(["one\nline\n\n\n\n  two \n\n\ttwo", "x", "two\n\n\none\nline"], 3)
    assert found.dtype == PARAGRAPH
    names = {hash_: name for hash_, name in zip(found["hash"].tolist()[:2], ("one", "two"), strict=True)}
    assert [(names[hash_], row, index) for hash_, row, index in found.tolist()] == [
        ("one", 0, 0), ("two", 0, 2), ("two", 0, 3), ("two", 2, 0), ("one", 2, 1)]


def test_short_paragraphs_are_let_alone() -> None:
    assert len(paragraph_hashes(["abc\n\n  ab  \n\nabcd"], 3)) == 2
    assert len(paragraph_hashes([], 1)) == len(paragraph_hashes(["", "\n\n\n"], 1)) == 0
    assert len(paragraph_hashes(["äöü"], 3)) == 1


@pytest.mark.parametrize(("drop", "expected"), [
    (set(), "\na\n\n\nb\n\n\n\nc\n"), ({0}, "b\n\n\n\nc\n"), ({1}, "\na\n\n\n\nc\n"), ({3}, "\na\n\n\nb"), ({0, 1}, "c\n"), ({1, 3}, "\na"),
    ({0, 1, 3}, "")])
def test_what_is_not_dropped_stays_as_it_is(drop: set[int], expected: str) -> None:
    assert drop_paragraphs("\na\n\n\nb\n\n\n\nc\n", drop) == expected


def test_indentation_of_code_survives() -> None:
    assert drop_paragraphs("def f():\n    a\n\n    b\n\n    c\n", {1}) == "def f():\n    a\n\n    c\n"
    assert drop_paragraphs("    a\n\n    b\n", {0}) == "    b\n"


def test_the_first_document_keeps_a_paragraph_with_all_its_copies_and_later_ones_lose_it() -> None:
    partitions = [["aaa\n\nbbb\n\naaa"], [], ["ccc\n\naaa", "ddd\n\nbbb\n\nccc\n\neee"]]
    documents = without_repeats(partitions, 4)
    assert [[document.text for document in part] for part in documents] == [["aaa\n\nbbb\n\naaa"], [], ["ccc", "ddd\n\neee"]]
    assert [document.pieces for document in documents[2]] == [1, 2]


def test_neighbouring_hashes_are_two_paragraphs() -> None:
    parts = [np.array([(7, 0, 0), (8, 1, 0), (9, 1, 2)], PARAGRAPH), np.array([(8, 0, 0), (10, 0, 1)], PARAGRAPH)]
    assert [part.tolist() for part in repeats(parts)] == [[], [(8, 0, 0)]]
    assert repeats([]) == []


def test_a_document_without_text_left_is_rejected_with_all_its_bytes() -> None:
    documents = without_repeats([["äää\n\nbbb", "bbb\n\n \n\näää\n"]], 2)[0]
    assert documents[1] == Shortened("", 0, len("bbb\n\n \n\näää\n".encode()), 2, "duplicate_paragraphs")
    assert documents[0] == Shortened("äää\n\nbbb", len("äää\n\nbbb".encode()), 0, 0)


def test_ranges_of_hashes_part_the_paragraphs_without_loss() -> None:
    found = paragraph_hashes(["\n\n".join(f"paragraph {number}" for number in range(500))], 1)
    parts = by_range(found, 7)
    assert len(parts) == 7
    assert all(40 < len(part) < 110 for part in parts)
    assert max(part["hash"].max() for part in parts[:3]) < min(part["hash"].min() for part in parts[3:])
    assert all((np.diff(part["index"].astype(int)) > 0).all() for part in parts)
    assert sorted(np.concatenate(parts).tolist()) == sorted(found.tolist())
    assert [len(part) for part in by_range(found[:0], 3)] == [0, 0, 0]


@pytest.mark.parametrize("seed", range(10))
def test_partitions_and_ranges_change_nothing_and_every_byte_is_accounted_for(seed: int) -> None:
    chance = random.Random(seed)
    words = ["aaa", "bbb ", "  ccc", "ééé", "d", "", " ", "eee\nfff", "\nggg", "hhh\n"]
    texts = ["\n\n".join(chance.choices(words, k=chance.randrange(1, 8))) for _ in range(60)]
    alone = without_repeats([texts], 1)[0]
    cuts = sorted(chance.sample(range(61), 4))
    partitions = [texts[begin:end] for begin, end in zip([0, *cuts], [*cuts, 60], strict=True)]
    assert [document for part in without_repeats(partitions, chance.randrange(1, 9)) for document in part] == alone
    seen: dict[str, int] = {}
    for row, (text, document) in enumerate(zip(texts, alone, strict=True)):
        assert document.bytes == len(document.text.encode())
        assert document.bytes + document.taken == len(text.encode())
        assert bool(document.reason) == (document.pieces > 0 and not document.text.strip())
        paragraphs = [piece.strip() for piece in text.split("\n\n") if piece.strip()]
        kept = [piece for piece in paragraphs if len(piece) < 3 or seen.setdefault(piece, row) == row]
        assert [piece.strip() for piece in document.text.split("\n\n") if piece.strip()] == kept
        assert document.pieces == len(paragraphs) - len(kept)
        assert document.pieces or document.text == text
