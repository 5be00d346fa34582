"""What decides whether a corpus that is there is the one that a spec asks for: contents, and not where they lie."""

import shutil
from pathlib import Path

from distlm.corpus.identity import attempt_hash, parameters
from distlm.spec import PrepareSpec


def spec(tokenizer: Path) -> PrepareSpec:
    return PrepareSpec.model_validate({"kind": "prepare", "name": "c", "sources": ["texts"], "tokenizer": {"from": str(tokenizer)}})


def test_a_given_tokenizer_counts_by_its_files_and_not_by_its_place(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    one.mkdir()
    (one / "tokenizer.json").write_text('{"vocab": 1}')
    shutil.copytree(one, other)
    assert parameters(spec(one)) == parameters(spec(other)) and attempt_hash(spec(one), []) == attempt_hash(spec(other), [])
    (other / "model.safetensors").write_text("weights of another model beside it")
    assert parameters(spec(one)) == parameters(spec(other))
    (other / "tokenizer.json").write_text('{"vocab": 2}')
    assert parameters(spec(one)) != parameters(spec(other)) and attempt_hash(spec(one), []) != attempt_hash(spec(other), [])
