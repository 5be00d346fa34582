"""What decides whether a corpus that is there is the one that a spec asks for: contents, and not where they lie."""

import shutil
from pathlib import Path

from distlm.corpus.identity import attempt_hash, parameters
from distlm.spec import PrepareSpec


def spec(tokenizer: Path) -> PrepareSpec:
    return PrepareSpec.model_validate({"kind": "prepare", "name": "c", "sources": ["texts"], "tokenizer": {"from": str(tokenizer)}})


def mark(tokenizer: Path) -> tuple[object, str]:
    rules = parameters(spec(tokenizer), None)
    return rules["tokenizer"], attempt_hash(spec(tokenizer), rules, [])


def test_a_given_tokenizer_counts_by_its_files_and_not_by_its_place(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    one.mkdir()
    (one / "tokenizer.json").write_text('{"vocab": 1}')
    shutil.copytree(one, other)
    assert mark(one) == mark(other)
    (other / "model.safetensors").write_text("weights of another model beside it")
    assert mark(one) == mark(other)
    (other / "tokenizer.json").write_text('{"vocab": 2}')
    assert all(a != b for a, b in zip(mark(one), mark(other), strict=True))
