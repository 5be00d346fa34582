"""docs/specs.md is what the specs say, and says it of every key."""

from pathlib import Path

from distlm.spec import KINDS
from distlm.spec.reference import reference, rows


def test_the_documented_keys_are_current():
    path = Path(__file__).parents[2] / "docs" / "specs.md"
    assert path.read_text(encoding="utf-8") == reference(), "run: python -m distlm.spec.reference > docs/specs.md"


def test_every_key_has_a_type_and_a_meaning():
    for model in KINDS.values():
        for key, value, _, meaning in rows(model):
            assert value and meaning.endswith("."), key


def test_sections_inside_lists_and_mappings_are_found():
    assert {"sources[n].format", "tokenizer.from"} <= {row[0] for row in rows(KINDS["prepare"])}
    assert "space.KEY.loguniform" in {row[0] for row in rows(KINDS["tune"])}
