"""The schema that editors use agrees with the specs and with every spec that we ship."""

import json
from pathlib import Path

import jsonschema
import pytest
from ruamel.yaml import YAML

from distlm.spec import schema

ROOT = Path(__file__).parents[2]
SPECS = sorted([*(ROOT / "jobs").rglob("*.yaml"), *(ROOT / "distlm" / "templates").glob("*.yaml")])


def test_the_shipped_schema_is_current():
    assert schema.SHIPPED.read_text() == schema.text(), "run `python -m distlm.spec.schema`"


def test_the_schema_is_a_schema():
    jsonschema.Draft202012Validator.check_schema(schema.generate())


@pytest.mark.parametrize("path", SPECS, ids=lambda path: path.name)
def test_every_shipped_spec_validates(path):
    jsonschema.validate(YAML(typ="safe").load(path), json.loads(schema.SHIPPED.read_text()), jsonschema.Draft202012Validator)


@pytest.mark.parametrize("spec, key", [
    ({"kind": "train", "name": "a", "corpus": "c", "model": {"preset": "llama-10m"}, "duration": {"step": 1}}, "step"),
    ({"kind": "prepare", "name": "a", "sources": [3]}, "3"), ({"kind": "bake", "name": "a"}, "bake"), ({"name": "a"}, "kind"),
    ({"kind": "serve", "name": "a", "model": "m", "port": "8000"}, "8000")])
def test_the_schema_refuses_mistakes(spec, key):
    with pytest.raises(jsonschema.ValidationError, match=key):
        jsonschema.validate(spec, schema.generate(), jsonschema.Draft202012Validator)
