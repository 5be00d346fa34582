"""docs/specs.md is what the specs say, and says it of every key."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from distlm.spec import KINDS, schema
from distlm.spec.reference import reference, rows

SHORT_FORMS = ("corpus", "dedup", "sources[n]", "sources[n].split")
"""Their meaning tells what is short for them."""


def test_the_documented_keys_are_current():
    path = Path(__file__).parents[2] / "docs" / "specs.md"
    assert path.read_text(encoding="utf-8") == reference(), "run: python -m distlm.spec.reference > docs/specs.md"


def forms(schema: dict[str, Any], node: Any, parts: list[str]) -> Iterator[str]:
    """The words for what the JSON schema lets a key be."""
    if "$ref" in node:
        node = schema["$defs"][node["$ref"].split("/")[-1]]
    if "anyOf" in node:
        for one in node["anyOf"]:
            yield from forms(schema, one, parts)
    elif parts and parts[0] in ("[n]", "KEY"):
        if inner := node.get("items" if parts[0] == "[n]" else "additionalProperties"):
            yield from forms(schema, inner, parts[1:])
    elif parts:
        if inner := node.get("properties", {}).get(parts[0]):
            yield from forms(schema, inner, parts[1:])
    elif "prefixItems" in node:
        yield f"list of {len(node['prefixItems'])}"
    elif node.get("type") == "array":
        yield "an open list"
    elif "enum" in node or "const" in node:
        yield "choices"
    elif node.get("type") != "null":
        yield {"string": "text", "integer": "whole number", "boolean": "true or false", "object": "section"}.get(node["type"], node["type"])


def said(value: str) -> str:
    """The same words for what the reference says."""
    if re.match(r"list(?! of \d)", value):
        return "an open list"
    return "choices" if value.startswith("`") else re.sub(r" [≥>≤<] .*", "", value)


def test_every_key_has_the_type_of_the_schema_and_a_meaning():
    generated = schema.generate()
    for kind, model in KINDS.items():
        for key, value, _, meaning in rows(model):
            expected = set(forms(generated, generated["$defs"][kind], key.replace("[n]", ".[n]").split(".")))
            assert expected and meaning.endswith("."), key
            found = {said(value)} if value == "true or false" else {said(one) for one in value.split(" or ")}
            assert found == expected or (key in SHORT_FORMS and found < expected), f"{kind}: {key}"


def test_sections_inside_lists_and_mappings_are_found():
    assert {"sources[n].format", "tokenizer.from"} <= {row[0] for row in rows(KINDS["prepare"])}
    assert "space.KEY.loguniform" in {row[0] for row in rows(KINDS["tune"])}
