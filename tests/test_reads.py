"""What decides whether a job would make the same again: every file that its spec names; and whether what it made is still there."""

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import numpy as np
import pytest
from safetensors.numpy import save_file

from distlm import execute, pipeline, reads
from distlm.corpus.manifest import tokenizer_hash
from distlm.runs import RunFolder
from distlm.spec import PrepareSpec, ServeSpec
from distlm.spec.base import Part
from distlm.spec.load import KINDS
from distlm.storage import Storage, write_json
from tests.records import Records

READ = {"prepare": {"sources.path", "decontaminate.against", "filter.language.model", "sources.filter.language.model", "filter.function",
                    "sources.filter.function", "tokenizer.from"},
        "train": {"corpus", "corpus.mix.corpus", "model.from", "distill.teacher"}, "tune": {"train", "space", "space.choice", "space.grid"},
        "evaluate": {"model", "endpoint", "endpoint.api_key_file", "corpus", "tasks", "tokenizer"}, "average": {"models", "corpus"},
        "compress": {"model", "corpus"}, "serve": {"model", "adapters", "api_key_file"}, "pipeline": {"steps"}}
"""The keys that name what a job reads. Those of a sweep are its trials'; those of a pipeline are its steps'."""
TEXT = {"prepare": {"sources.text_key", "sources.id_key", "sources.keep", "sources.filter.language.keep", "sources.filter.license.keep",
                    "conversations.messages_key", "conversations.role_key", "conversations.content_key", "conversations.roles",
                    "conversations.ignore_keys", "conversations.prompt_key", "conversations.completion_key",
                    "conversations.chosen_key", "conversations.rejected_key", "labels.label_key", "labels.names",
                    "filter.language.keep", "filter.license.keep", "decontaminate.text_keys",
                    "tokenizer.special_tokens", "tokenizer.chat_template"},
        "train": {"model.preset", "model.config", "optimizer.groups.match", "sharding.deepspeed", "sharding.offload.path",
                  "scale.gpu", "track.mlflow", "track.wandb", "adapter.target_modules", "class_weights", "evaluate.prompts"},
        "tune": {"metric"}, "average": set(), "evaluate": {"endpoint.url", "endpoint.model", "prompts"}, "compress": set(),
        "serve": {"host"}, "pipeline": {"prompt"}}
"""The keys whose text stands for itself."""


def forms(annotation: Any) -> Iterator[Any]:
    if get_origin(annotation) is Literal:
        return
    inner = get_args(annotation)
    yield from [form for one in inner for form in forms(one)] if inner else [annotation]


def text_keys(model: type[Part], prefix: str = "") -> Iterator[str]:
    """The keys of a spec, of its sections too, that may hold any text."""
    for name, field in model.model_fields.items():
        key, found = f"{prefix}{field.alias or name}", list(forms(field.annotation))
        if str in found or Any in found:
            yield key
        for one in found:
            if isinstance(one, type) and issubclass(one, Part):
                yield from text_keys(one, f"{key}.")


@pytest.mark.parametrize("kind", KINDS)
def test_every_key_that_holds_text_is_known_to_name_a_file_or_not(kind: str) -> None:
    assert set(text_keys(KINDS[kind])) == READ[kind] | TEXT[kind] | {"name", "storage"}, "does a job read what the new key names?"


def test_what_a_corpus_is_made_of_counts_by_its_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path / "lib"))
    for name in ("tree/src/a.py", "own/b.txt", "evaluation/set.txt", "lid.bin", "own_lid.bin", "lib/rules_of_y.py",
                 "lib/package_of_y/__init__.py", "lib/package_of_y/inner.py", "tokenizer/tokenizer.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "tree" / "LICENSE").write_text("SPDX-License-Identifier: MIT")
    language = {"language": {"keep": ["en"], "model": str(tmp_path / "lid.bin")}, "function": "rules_of_y:keep"}
    own = {"language": {"keep": ["en"], "model": str(tmp_path / "own_lid.bin")}, "function": "package_of_y.inner:keep"}
    spec = PrepareSpec.model_validate({
        "kind": "prepare", "name": "p", "filter": language, "tokenizer": {"from": str(tmp_path / "tokenizer")},
        "sources": [{"path": str(tmp_path / "tree/**/*.py"), "code": True}, {"path": str(tmp_path / "own"), "filter": own}],
        "decontaminate": {"against": {"one": str(tmp_path / "evaluation")}}})
    marks = [reads.prepare_reads(spec)]
    assert reads.prepare_reads(spec) == marks[0]
    for name in ("tree/src/a.py", "own/b.txt", "evaluation/set.txt", "lid.bin", "own_lid.bin", "lib/rules_of_y.py",
                 "lib/package_of_y/inner.py", "tokenizer/tokenizer.json"):
        (tmp_path / name).write_text("something else")
        marks.append(reads.prepare_reads(spec))
        assert marks[-1] != marks[-2], name
    (tmp_path / "tree" / "LICENSE").write_text("SPDX-License-Identifier: Apache-2.0")
    assert reads.prepare_reads(spec) != marks[-1]


def test_an_endpoint_reads_its_model_and_a_key_that_is_given(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "key").write_text("a")
    spec, inputs = ServeSpec(name="s", model="m", api_key_file=str(tmp_path / "key")), {"model": str(tmp_path / "model")}
    first = reads.serve_reads(spec, inputs)
    (tmp_path / "key").write_text("b")
    second = reads.serve_reads(spec, inputs)
    (tmp_path / "model" / "config.json").write_text("[]")
    assert first != second != reads.serve_reads(spec, inputs)


def test_an_evaluation_reads_its_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    first = reads.evaluate_reads({"model": str(tmp_path)})
    (tmp_path / "config.json").write_text("[]")
    assert first != reads.evaluate_reads({"model": str(tmp_path)})
    assert reads.evaluate_reads({"endpoint": "http://x/v1", "version": "v"}) == []


def corpus(folder: Path) -> dict[str, Any]:
    """What stands for a corpus: one shard and a tokenizer. Returns what its job's result would be."""
    for name, text in {"train/00000.arrow": "shard", "tokenizer/tokenizer.json": "{}"}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    split = {"documents": 1, "bytes": 5, "tokens": 5, "dropped_tokens": 0, "windows": 1,
             "shards": [{"file": "train/00000.arrow", "windows": 1, "bytes": 5, "xxh3": ""}]}
    write_json(folder / "manifest.json", {"format": 1, "name": "c", "context": 8, "dtype": "uint16", "seed": 0, "splits": {"train": split},
                                          "tokenizer": {"vocab_size": 260, "eos_id": 0, "hash": tokenizer_hash(folder / "tokenizer")}})
    return {"": str(folder)}


def export(folder: Path) -> dict[str, Any]:
    """What stands for a run with its export, in two files of weights."""
    (folder / "export").mkdir(parents=True)
    for name in ("one", "two"):
        save_file({name: np.zeros(64, np.float32)}, folder / "export" / f"{name}.safetensors")
    write_json(folder / "export" / "model.safetensors.index.json", {"weight_map": {name: f"{name}.safetensors" for name in ("one", "two")}})
    for name in ("config.json", "tokenizer.json"):
        (folder / "export" / name).write_text("{}")
    return {"": str(folder), "export": str(folder / "export"), "best": str(folder)}


@pytest.mark.parametrize(("kind", "make", "name"), [
    ("prepare", corpus, "train/00000.arrow"), ("prepare", corpus, "manifest.json"), ("prepare", corpus, "tokenizer/tokenizer.json"),
    ("train", export, "export/two.safetensors"), ("train", export, "export/config.json"), ("tune", export, "export/tokenizer.json")])
def test_what_is_gone_or_cut_off_is_missed(kind: str, make: Callable[[Path], dict[str, Any]], name: str, tmp_path: Path) -> None:
    path, result = tmp_path / name, make(tmp_path)
    assert reads.missing(kind, result) == ""
    if path.suffix in (".arrow", ".safetensors"):
        whole = path.read_bytes()
        path.write_bytes(whole[:-1])
        assert f"{name} has {len(whole) - 1} of {len(whole)} bytes" in reads.missing(kind, result)
    path.unlink()
    assert name.split("/")[0] in reads.missing(kind, result)


def test_a_step_whose_files_are_gone_is_not_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage, shown, calls = Storage(tmp_path), Records(), []
    monkeypatch.setattr(execute, "run_loaded", lambda *_, resume, **__: calls.append(resume) or {})
    loaded = execute.resolve({"kind": "prepare", "name": "c", "sources": ["stdlib"]})
    folder = RunFolder.create(storage.corpus("c"), "kind: prepare\n", {"pipeline": "p", "fingerprint": "same"})
    folder.result(corpus(folder.path))
    folder.event("succeeded", "completed")
    assert pipeline.run_step("p", "first", loaded, "same", folder, storage, shown) == {"": str(folder.path)} and not calls
    (folder.path / "train" / "00000.arrow").unlink()
    pipeline.run_step("p", "first", loaded, "same", folder, storage, shown)
    assert calls == [False] and storage.corpus("c.old-1").is_dir()
    assert "step first is not complete any more" in shown.notes[-1] and "00000.arrow is missing: it runs again" in shown.notes[-1]


@pytest.mark.parametrize("saved", [True, False])
def test_a_run_whose_export_is_gone_goes_on_from_its_checkpoint_where_it_has_one(saved: bool, tmp_path: Path,
                                                                               monkeypatch: pytest.MonkeyPatch) -> None:
    storage, shown, calls = Storage(tmp_path), Records(), []
    monkeypatch.setattr(execute, "run_loaded", lambda *_, resume, **__: calls.append(resume) or {})
    loaded = execute.resolve({"kind": "train", "name": "r", "corpus": "c", "model": {"preset": "llama-tiny"}, "duration": {"steps": 3}})
    folder = RunFolder.create(storage.run("r"), "kind: train\n", {"pipeline": "p", "fingerprint": "same"})
    folder.result(export(folder.path))
    folder.event("succeeded", "completed")
    (folder.path / "export" / "two.safetensors").unlink()
    (step := folder.path / "checkpoints" / "step-000003").mkdir(parents=True)
    write_json(step / "manifest.json", {"step": 3, "files": []})
    if saved:
        (step / "COMMITTED").write_text(hashlib.sha256((step / "manifest.json").read_bytes()).hexdigest())
    pipeline.run_step("p", "train", loaded, "same", folder, storage, shown)
    assert calls == [saved] and storage.run("r.old-1").exists() is not saved and "two.safetensors is missing" in shown.notes[-1]


def test_a_run_that_is_taken_up_again_for_its_export_changes_nothing_that_depends_on_it(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "r", "kind: train\n", {"created": 1})
    folder.result({"loss_last": 2.0})
    before = pipeline.identity("train", folder)
    write_json(folder.path / "lineage.json", {"created": 2, "earlier": [{"created": 1}]})
    assert pipeline.identity("train", folder) == before != pipeline.identity("tune", folder)
    folder.result({"loss_last": 3.0})
    assert pipeline.identity("train", folder) != before
