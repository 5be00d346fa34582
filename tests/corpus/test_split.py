"""Which split a document belongs to is a function of its content and its source."""

import pytest

from distlm.corpus.split import SplitRule, content_hash, first_held_out
from distlm.errors import SpecError
from distlm.spec import load_spec
from distlm.spec.load import dump

HASHES = [content_hash(str(i).encode()) for i in range(2000)]


def shares(split: object, **job: float) -> tuple[float, float]:
    spec = load_spec({"kind": "prepare", "name": "a", "sources": [{"path": "a", "split": split}], "split": job}).spec
    again = load_spec(dump(spec)).spec
    assert dump(again) == dump(spec) and again == spec      # what a source does not give is not written as if it were given
    return spec.shares(spec.sources[0])                     # type: ignore[union-attr]


def test_a_source_gives_what_differs_from_the_job_or_is_of_one_split_as_a_whole() -> None:
    assert shares(None, val_fraction=0.1, test_fraction=0.2) == (0.1, 0.2)
    assert shares({"val_fraction": 0.5}, val_fraction=0.1, test_fraction=0.2) == (0.5, 0.2)
    assert [shares(name, val_fraction=0.1) for name in ("train", "val", "test")] == [(0, 0), (1, 0), (0, 1)]


def test_what_the_manifest_says_of_the_rule_is_what_it_does() -> None:
    assert SplitRule(0.1).described(False) == \
        "x = blake2b-128(text, as cleaned)[:8], big-endian, / 2^64: val below val_fraction, else train"
    every = SplitRule(0.1, 0.2, sources=((0.1, 0.2), (0, 0))).described(True)
    assert every == "x = blake2b-128(turns, NUL, text, as cleaned)[:8], big-endian, / 2^64: val below val_fraction, test below " \
                    "val_fraction + test_fraction, else train; by the split of the source where it has its own"
    for content in HASHES:
        x = int.from_bytes(content[:8], "big") / 2**64
        assert SplitRule(0.1, 0.2).of(content) == ("val" if x < 0.1 else "test" if x < 0.1 + 0.2 else "train")


@pytest.mark.parametrize(("source", "job", "message"), [
    ({"val_fraction": 0.9}, {"split": {"test_fraction": 0.2}}, "sources.0.split: val_fraction 0.9 and test_fraction 0.2"),
    ({"all": "val", "val_fraction": 0.5}, {}, "val_fraction: 0.5 has no effect beside all: val"),
    ("dev", {}, "'dev' is not one of train, val, test"),
    ("val", {"dedup": "none"}, "sources.0.split: equal texts would be trained and validated on; drop them with dedup: exact")])
def test_a_split_that_cannot_be_is_refused(source: object, job: dict[str, object], message: str) -> None:
    with pytest.raises(SpecError, match=message.replace(".", r"\.")):
        load_spec({"kind": "prepare", "name": "a", "sources": [{"path": "a", "split": source}], **job})


def test_each_source_has_its_shares_and_a_whole_one_has_all_of_them() -> None:
    rule = SplitRule(0.1, sources=((0.1, 0.0), (0.3, 0.2), (1.0, 0.0), (0.0, 1.0), (0.0, 0.0)))
    counts = [[sum(rule.of(one, origin) == name for one in [*HASHES, b"\xff" * 16, bytes(16)])
               for name in rule.names] for origin in range(5)]
    assert rule.names == ("train", "val", "test") and rule.whole == [2, 3] and rule.may_hold_out
    assert counts[2:] == [[0, 2002, 0], [0, 0, 2002], [2002, 0, 0]] and counts[0][2] == 0
    assert 140 < counts[0][1] < 260 and 520 < counts[1][1] < 680 and 320 < counts[1][2] < 480
    assert [SplitRule(0.1).of(one) for one in HASHES] == [rule.of(one, 0) for one in HASHES]
    assert {one for one in HASHES if rule.of(one, 0) == "val"} < {one for one in HASHES if rule.of(one, 1) == "val"}


def test_what_is_held_out_where_nothing_else_is_comes_from_a_source_that_has_a_share_for_it() -> None:
    rule = SplitRule(1e-9, sources=((1e-9, 0.0), (0.0, 0.0)))
    first, second = sorted(HASHES)[:2]
    assert first_held_out([(one, int(one == first)) for one in HASHES], rule) == second
    assert not first_held_out([(one, 1) for one in HASHES], rule)
