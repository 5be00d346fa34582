import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distlm.corpus import manifest_hash, read_manifest
from distlm.corpus.verify import verify
from distlm.errors import InputError


@pytest.fixture
def corpus(run: Callable[..., dict[str, Any]], texts: Path) -> Path:
    return Path(run(texts)[""])


def test_a_folder_without_a_manifest_is_no_corpus(tmp_path: Path, corpus: Path) -> None:
    (corpus / "manifest.json").unlink()
    for path in (corpus, tmp_path / "nowhere"):
        for read in (read_manifest, manifest_hash, verify):
            with pytest.raises(InputError, match="no complete corpus"):
                read(path)


def test_a_manifest_says_what_the_contract_says(corpus: Path) -> None:
    manifest = verify(corpus)
    assert manifest_hash(corpus) == hashlib.sha256((corpus / "manifest.json").read_bytes()).hexdigest()
    assert (manifest.context, manifest.dtype, manifest.vocab_size, manifest.eos_id, manifest.seed) == (16, "uint16", 300, 0, 0)
    assert [step["name"] for step in manifest.data["steps"]] == ["read", "clean", "dedup", "split", "tokenize"]
    assert sorted(file.name for file in manifest.files("train")) == sorted(path.name for path in (corpus / "train").iterdir())
    text = (corpus / "manifest.json").read_text() + (corpus / "sources.jsonl").read_text()
    assert str(corpus.parents[2]) not in text
    for source in manifest.sources:
        assert {name: {unit: manifest.data["splits"][name][unit] for unit in ("documents", "bytes", "tokens")}
                for name in manifest.splits} == source["splits"]
