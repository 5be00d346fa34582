"""The schema that editors use agrees with the specs and with every spec that we ship."""

import json
from pathlib import Path

import jsonschema
import pytest
from ruamel.yaml import YAML

from distlm.spec import load_spec, schema
from tests.spec.test_load import FORMS, PREPARE, RIGHT, TRAIN, TUNE

ROOT = Path(__file__).parents[2]
VALIDATOR = jsonschema.Draft202012Validator(schema.generate())
ODD = [TRAIN.replace("steps: 3", "tokens: 1e6"), TRAIN + "seed: 3.0\n", TRAIN + "optimizer: {lr: 1, betas: [0, 0.5]}\n",
       TRAIN.replace("corpus: c", "corpus: [{corpus: a, weight: 1}]"),
       TRAIN.replace("corpus: c", "corpus: {mix: [{corpus: a, weight: 1}]}"),
       PREPARE + "sources: [a]\ndedup: none\nclean: {redact: [email]}\nfilter: {language: {keep: [en]}}\n",
       TUNE + "space: {optimizer.lr: {uniform: [1, 2]}}\n"]
"""Right specs whose values are not written in the type that they become."""
SPECS = sorted([*(ROOT / "jobs").rglob("*.yaml"), *(ROOT / "distlm" / "templates").glob("*.yaml")])


def test_the_shipped_schema_is_current():
    assert schema.SHIPPED.read_text() == schema.text(), "run `python -m distlm.spec.schema`"


def test_the_schema_is_a_schema():
    jsonschema.Draft202012Validator.check_schema(schema.generate())


@pytest.mark.parametrize("path", SPECS, ids=lambda path: path.name)
def test_every_shipped_spec_validates(path):
    jsonschema.validate(YAML(typ="safe").load(path), json.loads(schema.SHIPPED.read_text()), jsonschema.Draft202012Validator)


@pytest.mark.parametrize("text", FORMS, ids=[" ".join(message.split(";")[0].split()[:9]) for message in FORMS.values()])
def test_what_the_loader_refuses_of_forms_the_schema_refuses(text):
    assert not VALIDATOR.is_valid(YAML(typ="safe").load(text))


@pytest.mark.parametrize("text", [*RIGHT, *ODD])
def test_what_the_loader_takes_the_schema_takes(text, tmp_path):
    (tmp_path / "a.yaml").write_text(text)
    data = YAML(typ="safe").load(text)
    load_spec(tmp_path / "a.yaml")
    VALIDATOR.validate(data)
