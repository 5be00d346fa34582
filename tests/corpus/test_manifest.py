import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distlm.corpus import manifest_hash, read_manifest, verify
from distlm.corpus.manifest import check_balance, check_sources
from distlm.errors import CorpusError, InputError


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


def test_what_of_each_source_is_in_each_split_adds_up_to_the_split(corpus: Path) -> None:
    data = json.loads((corpus / "manifest.json").read_text())
    for source in data["sources"]:
        assert {name: {unit: data["splits"][name][unit] for unit in ("documents", "bytes", "tokens")} for name in data["splits"]} == \
            source["splits"]
    for unit in ("documents", "bytes", "tokens"):
        wrong = json.loads(json.dumps(data))
        wrong["sources"][0]["splits"]["val"][unit] += 1
        with pytest.raises(CorpusError, match=f"the sources have .* {unit}, the split has"):
            check_sources(wrong, "c")
    (corpus / "manifest.json").write_text(json.dumps(wrong))
    with pytest.raises(CorpusError, match="split val: the accounts do not balance"):
        verify(corpus)
    check_sources(data | {"sources": [{"name": "old"}]}, "c")


def test_every_damage_is_found(corpus: Path, tmp_path: Path) -> None:
    def damaged(name: str, change: Callable[[Path], Any]) -> Path:
        folder = tmp_path / "damaged"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(corpus, folder)
        change(folder / name)
        return folder

    def flip(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)

    def edit(**values: Any) -> Callable[[Path], Any]:
        return lambda path: path.write_text(json.dumps(json.loads(path.read_text()) | values))

    steps = json.loads((corpus / "manifest.json").read_text())["steps"]
    steps[1]["in"]["bytes"] += 1
    for name, change, message in [
            ("train/00000.arrow", flip, "changed or damaged"), ("val/00000.arrow", Path.unlink, "the shard is missing"),
            ("train/00001.arrow", lambda path: path.write_bytes(b"x"), "has 1 bytes, not"), ("tokenizer/tokenizer.json", flip, "tokenizer"),
            ("tokenizer/tokenizer_config.json", Path.unlink, "tokenizer"), ("manifest.json", edit(steps=steps), "do not balance"),
            ("manifest.json", edit(format=99), "format 99"), ("manifest.json", edit(splits=None), "damaged"),
            ("manifest.json", lambda path: path.write_text("{"), "damaged")]:
        with pytest.raises(CorpusError, match=message):
            verify(damaged(name, change))


def test_accounts_that_do_not_balance_are_an_error_that_says_where() -> None:
    def step(name: str, taken: int, given: int, lost: int, documents: int = 0) -> dict[str, Any]:
        return {"name": name, "in": {"documents": 5, "bytes": taken}, "out": {"documents": 5 - documents, "bytes": given},
                "rejected": {"reason": {"documents": documents, "bytes": lost}}}

    check_balance([step("read", 10, 9, 1), step("clean", 9, 10, -1)], "corpus")
    with pytest.raises(CorpusError, match=r"step clean: .* 9 bytes in, 9 out, 1 rejected"):
        check_balance([step("read", 10, 9, 1), step("clean", 9, 9, 1)], "corpus")
    with pytest.raises(CorpusError, match=r"step clean: .* 8 bytes in, but step read gave out 9"):
        check_balance([step("read", 10, 9, 1), step("clean", 8, 8, 0)], "corpus")
    with pytest.raises(CorpusError, match=r"step dedup: .* 5 documents in, but step read gave out 4"):
        check_balance([step("read", 10, 9, 1, documents=1), step("dedup", 9, 9, 0)], "corpus")
