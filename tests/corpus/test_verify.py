"""That no damage of a corpus stays unseen."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distlm.corpus.diff import diff
from distlm.corpus.inspect import summary
from distlm.corpus.manifest import body_hash, tokenizer_hash
from distlm.corpus.verify import verify
from distlm.errors import CorpusError
from tests.corpus.made import DOCS, STEPS, make


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    (tmp_path / "c" / "rejects").mkdir(parents=True)
    (tmp_path / "c" / "rejects" / "short.jsonl").write_text("{}\n")
    return make(tmp_path / "c", DOCS, steps=STEPS)


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

    def sealed(**values: Any) -> Callable[[Path], Any]:
        def write(path: Path) -> None:
            data = json.loads(path.read_text()) | values
            path.write_text(json.dumps({**data, "hash": body_hash(data)}))
        return write

    steps = json.loads((corpus / "manifest.json").read_text())["steps"]
    steps[1]["in"]["bytes"] += 1
    for name, change, message in [
            ("train/00000.arrow", flip, "changed or damaged"), ("val/00000.arrow", Path.unlink, "the shard is missing"),
            ("train/00001.arrow", lambda path: path.write_bytes(b"x"), "has 1 bytes, not"), ("tokenizer/tokenizer.json", flip, "tokenizer"),
            ("tokenizer/tokenizer_config.json", Path.unlink, "tokenizer"), ("manifest.json", edit(seed=7), "it has been changed"),
            ("sources.jsonl", flip, "sources.jsonl: the file has been changed"), ("sources.jsonl", Path.unlink, "is missing"),
            ("rejects/short.jsonl", flip, "the file has been changed"), ("rejects/short.jsonl", Path.unlink, "is missing"),
            ("rejects/more.jsonl", Path.touch, "it came later"), ("tokenizer/more.json", Path.touch, "it came later"),
            ("report.html", Path.touch, "it came later"), ("manifest.json", edit(files={}), "it has been changed"),
            ("inputs.json", edit(corpus="0"), "it has been changed"), ("inputs.json", edit(files={}), "it has been changed"),
            ("inputs.json", sealed(files={}), "it came later"),
            ("inputs.json", Path.unlink, "inputs.json: the list of inputs is damaged"), ("inputs.json", edit(sources=0), "is damaged"),
            ("inputs.json", edit(sources=[]), "it has been changed"), ("inputs.json", sealed(corpus="0"), "it is of another corpus"),
            ("inputs.json", sealed(sources=[]), "do not add up"),
            ("manifest.json", edit(hash=""), "it has been changed"), ("manifest.json", sealed(steps=steps), "do not balance"),
            ("manifest.json", edit(format=99), "format 99"), ("manifest.json", sealed(splits=None), "damaged"),
            ("manifest.json", lambda path: path.write_text("{"), "damaged")]:
        with pytest.raises(CorpusError, match=message):
            verify(damaged(name, change))


def test_verify_finds_a_changed_byte_in_any_shard_and_in_the_tokenizer(corpus: Path) -> None:
    files = [*corpus.glob("train/*"), *corpus.glob("val/*"), *corpus.glob("tokenizer/*")]
    assert len(files) > 5
    rng = random.Random(0)
    for file in files:
        data = file.read_bytes()
        for place in [0, len(data) - 1, *(rng.randrange(len(data)) for _ in range(20))]:
            file.write_bytes(data[:place] + bytes([data[place] ^ (1 << rng.randrange(8))]) + data[place + 1:])
            with pytest.raises(CorpusError):
                verify(corpus)
        for cut in (data[:-1], data + b"\0"):
            file.write_bytes(cut)
            with pytest.raises(CorpusError):
                verify(corpus)
        file.write_bytes(data)
    verify(corpus)


def test_a_tokenizer_is_known_by_its_own_files_whatever_lies_beside_them(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "tokenizer.json").write_text("{}")
    (folder / "merges.txt").write_text("a b")
    alone = tokenizer_hash(folder)
    (folder / ".cache").mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    assert tokenizer_hash(folder) == alone
    (folder / "merges.txt").write_text("a c")
    assert tokenizer_hash(folder) != alone


def test_a_corpus_from_before_all_files_had_checksums_is_still_one(corpus: Path) -> None:
    """Nor were there inputs.json and its sources, which stood in the manifest."""
    manifest = verify(corpus)
    data = {key: value for key, value in manifest.data.items() if key not in ("files", "inputs", "hash")} | {"sources": manifest.sources}
    (corpus / "manifest.json").write_text(json.dumps(data))
    (corpus / "inputs.json").unlink()
    (corpus / "sources.jsonl").write_text("")
    assert not verify(corpus).checksums and verify(corpus).source_names == ["data"] and not diff(corpus, corpus).values
    assert ("source data", "2 files, 100 bytes, auto, xxh3 00") in summary(corpus)
    (corpus / "train" / "00000.arrow").unlink()
    with pytest.raises(CorpusError, match="shard is missing"):
        verify(corpus)
