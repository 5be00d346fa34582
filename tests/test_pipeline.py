"""Steps in order, references filled, mistakes found before any work, and nothing done twice."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from distlm import cluster, execute, pipeline
from distlm.errors import InputError, ServeError, SpecError
from distlm.runs import RunFolder
from distlm.spec import PipelineSpec
from distlm.storage import Storage, write_json
from tests.endpoints import fake_endpoint
from tests.records import Records

PREPARE = {"kind": "prepare", "sources": ["stdlib"]}
TRAIN = {"kind": "train", "corpus": "${prepare}", "model": {"preset": "llama-tiny"}, "duration": {"steps": 3}}
TUNE: dict[str, Any] = {"kind": "tune", "train": {k: v for k, v in TRAIN.items() if k != "kind"},
                        "space": {"optimizer.lr": {"grid": [0.1, 0.2]}}}
EVALUATE = {"kind": "evaluate", "model": "${train}", "corpus": "${prepare}"}
SERVE = {"kind": "serve", "model": "${train}"}
CLASSIFY = {**TRAIN, "objective": "classify"}
COMPRESS = {"kind": "compress", "model": "${train}", "corpus": "${prepare}", "method": "magnitude", "sparsity": 0.5}
ASK = {"kind": "evaluate", "endpoint": "${serve}", "corpus": "${prepare}"}


def steps(**given: Any) -> dict[str, Any]:
    return {"kind": "pipeline", "name": "p", "steps": given}


def refused(**given: Any) -> str:
    with pytest.raises(SpecError) as error:
        execute.resolve(steps(**given))
    return str(error.value)


def test_steps_run_after_what_they_need_by_reference_or_by_needs() -> None:
    serve = {"kind": "serve", "model": "${train}"}
    loaded = execute.resolve(steps(serve=serve, train={**TRAIN, "needs": "tune"}, tune=TUNE, prepare=PREPARE))
    assert pipeline.check(loaded) == ["prepare", "tune", "train", "serve"]
    assert isinstance(loaded.spec, PipelineSpec) and loaded.spec.steps["serve"]["name"] == "p-serve"


@pytest.mark.parametrize(("given", "what"), [
    ({"prepare": {**PREPARE, "needs": ["train"]}, "train": TRAIN}, "the steps need each other: prepare -> train -> prepare"),
    ({"prepare": PREPARE, "train": {**TRAIN, "corpus": "${prepar}"}}, "${prepar}: there is no such step; did you mean prepare?"),
    ({"prepare": PREPARE, "train": {**TRAIN, "needs": ["prepaer"]}}, "needs 'prepaer', which is no step; did you mean prepare?"),
    ({"prepare": PREPARE, "train": {**TRAIN, "seed": "${prepare.token}"}}, "a prepare step has no output token; did you mean tokens?"),
    ({"prepare": PREPARE, "tune": TUNE, "train": {**TRAIN, "seed": "${tune.best.optimizer.rl}"}}, "did you mean best.optimizer.lr?"),
    ({"prepare": PREPARE, "train": {**TRAIN, "modle": {}}}, "did you mean model?"),
    ({"prepare": PREPARE, "one": TRAIN, "two": {**TRAIN, "duration": {"steps": "${one}"}}},
     "steps.two: duration.steps: '${one}': must be a whole number; ${one} is text; ${step.output} may name a number"),
    ({"prepare": PREPARE, "one": TRAIN, "two": {**TRAIN, "optimizer": {"lr": "${one.export}"}}},
     "optimizer.lr: '${one.export}': must be a number"),
    ({"prepare": PREPARE, "train": {**TRAIN, "seed": "1${prepare.tokens}"}}, "seed: '1${prepare.tokens}': must be a whole number"),
    ({"prepare": PREPARE, "train": {**TRAIN, "duration": "${prepare}"}}, "duration: '${prepare}': must be a section"),
    ({"prepare": PREPARE, "tune": {**TUNE, "train": {**TUNE["train"], "seed": "${prepare}"}}},
     "steps.tune: train.seed: '${prepare}': must be a whole number"),
    ({"prepare": PREPARE, "train": {**TRAIN, "duration": {"steps": -3}}}, "steps.train: duration.steps: -3"),
    ({"prepare": PREPARE, "tune": {**TUNE, "space": {"optimizer.lrr": {"grid": [1]}}}}, "did you mean optimizer.lr?"),
    ({"a": {**PREPARE, "name": "same"}, "b": {**PREPARE, "name": "same"}}, "same is the name of the step a too"),
    ({"a": {"kind": "pipeline", "steps": {}}}, "a pipeline cannot be a step"),
    ({"a": {"file": "none.yaml"}}, "none.yaml cannot be read"),
    ({"a": {"file": "none.yaml", "corpus": "x"}}, "beside file there can be set and needs, not corpus"),
    ({"a": {**PREPARE, "needs": 5}}, "steps.a.needs: 5: must be the name of a step or a list of names"),
    ({"a": {**PREPARE, "needs": [5]}}, "steps.a.needs: [5]: must be the name of a step or a list of names"),
    ({"a": {"file": "none.yaml", "set": ["x"]}}, "steps.a.set: ['x']: must be a section"),
    ({"a.b": {"file": "none.yaml", "set": "text"}}, "steps.a.b.set: 'text': must be a section"),
    ({"a": {"file": 5}}, "steps.a.file: 5: must be text"),
    ({"a": {**PREPARE, "storage": "/other"}}, "steps.a.storage: /other has no effect: a pipeline's steps share its storage; set storage"),
    ({"prepare": PREPARE, "train": TRAIN, "serve": {**SERVE, "model": "${prepare}"}},
     "steps.serve.model: ${prepare} is no model: prepare is a prepare step; did you mean ${train}?"),
    ({"prepare": PREPARE, "tune": TUNE, "serve": {**SERVE, "model": "${tune}"}}, "did you mean ${tune.best}?"),
    ({"prepare": PREPARE, "train": TRAIN, "serve": {**SERVE, "model": "${train.val_loss}"}},
     "steps.serve.model: ${train.val_loss} is no model"),
    ({"prepare": PREPARE, "train": TRAIN, "serve": {**SERVE, "port": "${train.val_acuracy}"}},
     "has no output val_acuracy; did you mean val_accuracy?"),
    ({"prepare": PREPARE, "train": TRAIN, "serve": {**SERVE, "adapters": {"poems": "${prepare}"}}},
     "steps.serve.adapters.poems: ${prepare} is no model: prepare is a prepare step; did you mean ${train}?"),
    ({"prepare": PREPARE, "one": TRAIN, "two": {**TRAIN, "corpus": "${one}"}},
     "steps.two.corpus: ${one} is no corpus: one is a train step; did you mean ${prepare}?"),
    ({"one": {**TRAIN, "corpus": "c"}, "two": {**TRAIN, "corpus": "${one}"}}, "a prepare step makes one"),
    ({"prepare": PREPARE, "one": TRAIN, "two": {**TRAIN, "corpus": [{"corpus": "${one}", "weight": 1}]}},
     "steps.two.corpus.0.corpus: ${one} is no corpus"),
    ({"prepare": PREPARE, "one": TRAIN, "tune": {**TUNE, "train": {**TUNE["train"], "corpus": "${one}"}}},
     "steps.tune.train.corpus: ${one} is no corpus"),
    ({"prepare": PREPARE, "two": {**TRAIN, "model": {"from": "${prepare}"}}}, "steps.two.model.from: ${prepare} is no model"),
    ({"prepare": PREPARE, "train": {**TRAIN, "corpus": "${prepare"}},
     "steps.train.corpus: '${prepare': a reference is not closed; write ${step} or ${step.output}"),
    ({"prepare": PREPARE, "other": {**PREPARE, "tokenizer": {"from": "${prepare}/${tokenizer"}}}, "a reference is not closed"),
    ({"prepare": {**PREPARE, "context": 64}, "train": {**TRAIN, "model": {"preset": "llama-tiny", "context": 128}}},
     "steps.train: model.context: 128 is not the context of the corpus that prepare makes, 64; "
     "leave it out, or set context: 128 in prepare"),
    ({"prepare": PREPARE, "tune": {**TUNE, "train": {**TUNE["train"], "model": {"preset": "llama-tiny", "context": 128}}}},
     "steps.tune: train.model.context: 128 is not the context of the corpus that prepare makes, 256"),
    ({"a": PREPARE, "b": {**PREPARE, "context": 64}, "train": {**TRAIN, "corpus": [{"corpus": "${a}", "weight": 1},
                                                                                   {"corpus": "${b}", "weight": 1}]}},
     "steps.train: corpus.1.corpus: b makes windows of 64 tokens, and a of 256; set context: 256 in b"),
    ({"prepare": PREPARE, "train": TRAIN, "one": {**SERVE, "port": 8001}, "two": {**SERVE, "port": 8002}},
     "steps.two: port: a cluster has one address, and one takes 8001, not 8002; set port: 8001 here too, or port: 8002 there"),
    ({"prepare": PREPARE, "train": TRAIN, "one": {**SERVE, "port": 0}, "two": SERVE},
     "steps.two: port: a cluster has one address, and one takes a free one, not 8000; set port: 0 here too, or port: 8000 there"),
    ({"prepare": PREPARE, "train": TRAIN, "e": {**EVALUATE, "model": "${prepare}"}},
     "steps.e.model: ${prepare} is no model: prepare is a prepare step; did you mean ${train}"),
    ({"prepare": PREPARE, "train": TRAIN, "e": {**EVALUATE, "corpus": ["${prepare}", "${train}"]}},
     "steps.e.corpus: ${train} is no corpus: train is a train step; did you mean ${prepare}?"),
    ({"prepare": PREPARE, "train": TRAIN, "e": {"kind": "evaluate", "endpoint": "${train}", "corpus": "c"}},
     "steps.e.endpoint: ${train} is no endpoint: train is a train step; a serve step makes one"),
    ({"prepare": PREPARE, "train": TRAIN, "e": {**EVALUATE, "windows": "${train}"}},
     "steps.e: windows: '${train}': must be a whole number"),
    ({"prepare": PREPARE, "train": {**TRAIN, "seed": "${e.los}"}, "e": {**EVALUATE, "model": "m"}},
     "an evaluate step has no output los; did you mean loss?"),
    ({"prepare": PREPARE, "train": CLASSIFY, "e": EVALUATE, "f": {**EVALUATE, "windows": "${e.perplexity}"}},
     "${e.perplexity}: an evaluate step has no output perplexity; there are loss, accuracy, precision_macro"),
    ({"prepare": PREPARE, "train": CLASSIFY, "serve": SERVE, "e": ASK, "f": {**EVALUATE, "windows": "${e.tokens}"}},
     "${e.tokens}: an evaluate step has no output tokens"),
    ({"prepare": PREPARE, "tune": {**TUNE, "train": {**TUNE["train"], "objective": "classify"}}, "e": {**EVALUATE, "model": "${tune.best}"},
      "f": {**EVALUATE, "model": "m", "windows": "${e.bits_per_byte}"}}, "an evaluate step has no output bits_per_byte"),
    ({"prepare": PREPARE, "train": TRAIN, "e": EVALUATE, "f": {**EVALUATE, "windows": "${e.roc_auc}"}},
     "${e.roc_auc}: an evaluate step has no output roc_auc; there are loss, perplexity"),
    ({"prepare": PREPARE, "train": CLASSIFY, "e": {**EVALUATE, "prompts": ["x"]}},
     "steps.e: prompts: ['x'] has no effect with a classifier; leave it out"),
    ({"prepare": PREPARE, "train": CLASSIFY, "serve": SERVE, "e": {**ASK, "tasks": ["t.yaml"]}},
     "steps.e: tasks: tasks are questions to a language model, and what is measured is a classifier"),
    ({"prepare": PREPARE, "train": TRAIN, "e": {**EVALUATE, "windows": "${train.f1_macro}"}},
     "${train.f1_macro}: a train step has no output f1_macro; there are export, parameters"),
    ({"prepare": PREPARE, "train": CLASSIFY, "e": {**EVALUATE, "windows": "${train.val_perplexity}"}}, "has no output val_perplexity"),
    ({"prepare": PREPARE, "train": CLASSIFY, "e": {**EVALUATE, "windows": "${train.perplexity}"}}, "a train step has no output perplexity"),
    ({"prepare": PREPARE, "train": {**TRAIN, "objective": "dpo"}, "e": {**EVALUATE, "windows": "${train.bits_per_byte}"}},
     "a train step has no output bits_per_byte"),
    ({"prepare": PREPARE, "train": TRAIN, "e": {"kind": "evaluate", "model": "${train}", "tasks": ["none.yaml"]},
      "f": {**EVALUATE, "windows": "${e.loss}"}}, "${e.loss}: an evaluate step without a corpus has no output loss; there are tasks.TASK"),
    ({"prepare": PREPARE, "train": CLASSIFY, "c": COMPRESS},
     "steps.c.model: it is a classifier, and only language models can be here; `kind: evaluate` measures it"),
    ({"prepare": PREPARE, "tune": {**TUNE, "train": {**TUNE["train"], "objective": "classify"}},
      "c": {**COMPRESS, "model": "${tune.best}"}}, "steps.c.model: it is a classifier"),
    ({"prepare": PREPARE, "one": TRAIN, "two": CLASSIFY, "mean": {"kind": "average", "models": ["${one}", "${two.export}"],
                                                                  "corpus": "${prepare}"}},
     "steps.mean.models: a classifier and a language model have no mean; leave one of them out"),
    ({"prepare": PREPARE, "one": TRAIN, "two": CLASSIFY, "mean": {"kind": "average", "models": ["base", "${one}", "${two.export}"],
                                                                  "corpus": "${prepare}"}},
     "steps.mean.models: a classifier and a language model have no mean; leave one of them out"),
    ({"prepare": PREPARE, "one": CLASSIFY, "mean": {"kind": "average", "models": ["base", "${one}"], "corpus": "c"},
      "c": {**COMPRESS, "model": "${mean}"}}, "steps.c.model: it is a classifier, and only language models can be here"),
    ({"prepare": PREPARE, "one": CLASSIFY, "two": CLASSIFY, "mean": {"kind": "average", "models": ["${one}", "${two}"], "corpus": "c"},
      "e": {**EVALUATE, "model": "${mean}", "windows": "${mean.tokens}"}}, "an average step has no output tokens; there are loss, acc"),
    ({"prepare": PREPARE, "train": TRAIN, "one": {**SERVE, "host": "127.0.0.2"}, "two": SERVE}, "one takes 127.0.0.2, not 127.0.0.1"),
])
def test_a_mistake_is_found_before_any_work(given: dict[str, Any], what: str) -> None:
    assert what in refused(**given)


@pytest.mark.parametrize("given", [
    {"tune": {**TUNE, "train": {k: v for k, v in TUNE["train"].items() if k != "corpus"}, "space": {"corpus": {"grid": ["a", "b"]}}},
     "train": {**TRAIN, "corpus": "${tune.best.corpus}"}, "serve": {**SERVE, "model": "${tune.best}"}},
    {"prepare": PREPARE, "train": TRAIN, "serve": {**SERVE, "model": "${train.export}"}, "again": {**TRAIN, "model": {"from": "${train}"}}},
    {"prepare": PREPARE, "train": TRAIN, "serve": {**SERVE, "model": "base", "adapters": {"one": "${train}", "two": "${train.export}"}}},
    {"prepare": PREPARE, "train": {**TRAIN, "model": {"preset": "llama-tiny", "context": "${prepare.documents}"}}},
    {"prepare": PREPARE, "train": TRAIN, "e": EVALUATE, "serve": {**SERVE, "needs": "e"},
     "ask": {"kind": "evaluate", "endpoint": "${serve}", "corpus": ["${prepare}", "other"]}},
    {"prepare": PREPARE, "train": TRAIN, "one": {**SERVE, "port": 8001}, "two": {**SERVE, "port": 8001}, "three": {**SERVE, "port": 0}},
    *({"prepare": PREPARE, "train": {**TRAIN, "model": {"from": "m"}, "objective": objective},
       "e": {**EVALUATE, "model": "m", "windows": f"${{train.{name}}}"}}
      for objective, name in (("classify", "f1_macro"), ("dpo", "val_reward_margin"), ("sft", "val_ece"))),
    {"prepare": PREPARE, "train": TRAIN, "c": COMPRESS, "mean": {"kind": "average", "models": ["${train}", "${c}"], "corpus": "c"}},
    {"prepare": PREPARE, "train": CLASSIFY, "e": EVALUATE, "f": {**EVALUATE, "windows": "${e.roc_auc}"}},
    {"prepare": PREPARE, "one": CLASSIFY, "two": CLASSIFY, "mean": {"kind": "average", "models": ["${one}", "${two}"], "corpus": "c"},
     "e": {**EVALUATE, "model": "${mean}", "windows": "${mean.f1_macro}"}, "f": {**EVALUATE, "model": "m", "windows": "${e.f1_macro}"}},
    {"prepare": PREPARE, "e": {**EVALUATE, "model": "m"}, "f": {**EVALUATE, "model": "m", "windows": "${e.perplexity}", "batch_windows":
                                                               "${e.f1_macro}"}},
])
def test_what_may_be_right_is_not_refused(given: dict[str, Any]) -> None:
    execute.resolve(steps(**given))


def test_every_wrong_step_is_named_at_once_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text("kind: pipeline\nname: p\nsteps:\n"
                                     "  a:\n    kind: prepare\n    surces: [stdlib]\n  b:\n    kind: serv\n")
    with pytest.raises(SpecError) as error:
        execute.resolve(tmp_path / "p.yaml")
    first, second = str(error.value).splitlines()[0], str(error.value).splitlines()[-1]
    assert "p.yaml:5: steps.a" in first and "p.yaml:8: steps.b" in second and "did you mean serve?" in second


@pytest.mark.parametrize(("step", "key", "value", "what"), [
    *(("prepare", "kind", value, "unknown kind") for value in ([], ["x"], {}, {"a": 1}, 5)),
    *(("tune", "kind", value, "unknown kind") for value in (["tune"], {"tune": 1})),
    *(("tune", "space", value, "must be a section") for value in (5, True, 0.5, "x", ["optimizer.lr"], [[]])),
    ("tune", "space", {}, "there is nothing to try; give keys with values"), ("tune", "space", {"optimizer.lr": 5}, "must be a section"),
    ("tune", "space", None, "must be a section")])
def test_what_is_no_kind_and_no_space_is_told_once_where_it_is_written(step: str, key: str, value: Any, what: str) -> None:
    """And not where other steps refer to it."""
    given = {"prepare": PREPARE, "tune": TUNE, "train": {**TRAIN, "optimizer": {"lr": "${tune.best.optimizer.lr}"}}}
    [said] = refused(**{**given, step: {**given[step], key: value}}).splitlines()
    assert said.startswith(f"spec: steps.{step}: {key}") and what in said


def test_a_mistake_in_a_step_is_told_with_its_own_line(tmp_path: Path) -> None:
    (tmp_path / "train.yaml").write_text("kind: train\nname: t\ncorpus: c\nmodel:\n  preset: llama-tiny\nduration: {steps: 7}\nsed: 1\n")
    (tmp_path / "p.yaml").write_text("""kind: pipeline
name: p
steps:
  tune:
    kind: tune
    space:
      optimizer.lr: {grid: [0.1]}
    train:
      corpus: c
      model: {preset: llama-tiny}
      duration:
        steps: -3
      seeed: 1
  train:
    file: train.yaml
    needs: tune
    set:
      duration.steps: -9
      optimizer: {lr: high}
""")
    with pytest.raises(SpecError) as error:
        execute.resolve(tmp_path / "p.yaml", ["steps.tune.seed=-1"])
    path = tmp_path / "p.yaml"
    assert [line.split(";")[0] for line in str(error.value).splitlines()] == [
        "--set steps.tune.seed: -1: must be at least 0",
        f"{path}:19: steps.train: optimizer.lr: 'high': must be a number",
        f"{path}:18: steps.train: duration.steps: -9: must be at least 1",
        "train.yaml:7: steps.train: sed: unknown key"]
    with pytest.raises(SpecError) as error:
        execute.resolve(path)
    assert f"{path}:12: steps.tune: train.duration.steps: -3" in str(error.value)
    assert f"{path}:13: steps.tune: train.seeed: unknown key" in str(error.value)


def test_a_step_in_a_file_lies_beside_the_pipeline_and_takes_overrides(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "train.yaml").write_text("kind: train\nname: t\ncorpus: c\nmodel: {preset: llama-tiny}\nduration: {steps: 7}\n")
    (tmp_path / "p.yaml").write_text("kind: pipeline\nname: p\nsteps:\n  prepare: {kind: prepare, sources: [stdlib]}\n"
                                     "  train: {file: sub/train.yaml, set: {corpus: '${prepare}', duration.steps: 9}}\n")
    loaded = execute.resolve(tmp_path / "p.yaml")
    assert isinstance(loaded.spec, PipelineSpec)
    train = loaded.spec.steps["train"]
    assert train["corpus"] == "${prepare}" and train["duration"] == {"steps": 9} and train["name"] == "t"
    assert loaded.origins["steps.train.model.preset"] == "train.yaml:4"
    assert loaded.origins["steps.train.duration.steps"] == "p.yaml:5" == loaded.origins["steps.train.corpus"]


def test_a_reference_that_is_the_whole_value_keeps_its_type() -> None:
    made = {"tune": {"": "/sweep", "best.optimizer.lr": 0.002}, "a.b": {"": "/x", "tokens": 5}}
    given = {"lr": "${tune.best.optimizer.lr}", "text": "at ${tune}, ${a.b.tokens} tokens", "list": ["${a.b.tokens}"]}
    assert pipeline.fill(given, {"tune": {}, "a.b": {}}, made) == {"lr": 0.002, "text": "at /sweep, 5 tokens", "list": [5]}


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Storage]:
    root = Storage(tmp_path_factory.mktemp("storage"))
    with cluster.connect(root.root / "driver.log", storage=root):
        yield root


def two_steps(texts: Path, **second: Any) -> dict[str, Any]:
    """Two corpora, the second with the tokenizer of the first."""
    common = {"kind": "prepare", "sources": [str(texts)], "context": 16, "split": {"val_fraction": 0.3}}
    return steps(first={**common, "tokenizer": {"vocab_size": 280}},
                 second={**common, "tokenizer": {"from": "${first}/tokenizer"}, **second})


def test_a_rerun_skips_what_is_complete_and_repeats_what_has_changed_with_what_depends_on_it(storage: Storage, tmp_path: Path) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    for i in range(6):
        (texts / f"{i}.txt").write_text(f"{i} is followed by {i + 1}. " * 40)

    def run(**second: Any) -> list[str]:
        shown = Records()
        execute.run(two_steps(texts, **second), storage=storage, progress=shown)
        return [text for text in shown.notes if text.startswith("step ")]

    def attempts(name: str) -> int:
        return sum(event["state"] == "starting" for event in RunFolder(storage.corpus(name)).events())

    assert run() == []
    assert run() == ["step first is complete and unchanged: skipped", "step second is complete and unchanged: skipped"]
    assert (attempts("p-first"), attempts("p-second")) == (1, 1)

    RunFolder(storage.corpus("p-second")).event("failed", "head_lost")
    assert run()[1] == "step second has failed before: taken up again"
    assert attempts("p-second") == 2

    first, second = run(context=32)
    assert "skipped" in first and second.startswith("step second or what it reads has changed") and "p-second.old-1" in second
    assert storage.corpus("p-second.old-1").is_dir() and attempts("p-second") == 1

    (texts / "6.txt").write_text("6 is the last one. " * 40)
    first, second = run(context=32)
    assert "step first or what it reads has changed" in first and "step second or what it reads has changed" in second
    assert RunFolder(storage.pipeline("p")).state() == ("succeeded", "completed")


@pytest.mark.slow
def test_a_run_that_lacks_its_export_writes_it_from_the_checkpoint_and_trains_nothing(storage: Storage, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("".join(f"{i} is followed by {i + 1}. " for i in range(400)))
    prepare = {**PREPARE, "sources": [str(tmp_path / "a.txt")], "context": 16, "tokenizer": {"train": "bytes"},
               "split": {"val_fraction": 0}}
    train = {**TRAIN, "batch": {"global_sequences": 2}, "scale": {"threads_per_worker": 1}}
    given = {**steps(prepare=prepare, train=train), "name": "gone"}
    execute.run(given, storage=storage, progress=Records())
    folder = RunFolder(storage.run("gone-train"))
    weights, mark, losses = folder.path / "export" / "model.safetensors", pipeline.identity("train", folder), folder.read_metrics()
    before = weights.read_bytes()

    for again in (lambda shown: execute.run(given, storage=storage, progress=shown),
                  lambda shown: execute.run(folder.path / "spec.yaml", storage=storage, progress=shown, resume=True)):
        weights.unlink()
        again(shown := Records())
        assert weights.read_bytes() == before and folder.read_metrics() == losses and not storage.run("gone-train.old-1").exists()
        assert "resuming at step 3 of 3" in shown.notes and "model.safetensors is missing" in shown.text, shown.text
    assert pipeline.identity("train", folder) == mark


def test_an_input_that_is_named_without_a_reference_counts_by_its_content(tmp_path: Path) -> None:
    storage, model, texts = Storage(tmp_path), tmp_path / "runs" / "my-run" / "export", tmp_path / "texts"
    texts.mkdir()
    (texts / "a.txt").write_text("a line. " * 30)
    (texts / "broken.txt").symlink_to(tmp_path / "gone")
    model.mkdir(parents=True)
    vocabulary, end = {f"{i}": i for i in range(3)}, {"id": 3, "content": "<|endoftext|>", "single_word": False, "lstrip": False,
                                                      "rstrip": False, "normalized": False, "special": True}
    (model / "tokenizer.json").write_text(json.dumps({"version": "1.0", "truncation": None, "padding": None, "added_tokens": [end],
                                                      "normalizer": None, "pre_tokenizer": None, "post_processor": None, "decoder": None,
                                                      "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "0"}}))
    (model / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    (model / "config.json").write_text("{}")
    given = [{"kind": "serve", "name": "s", "model": "my-run"},
             {"kind": "prepare", "name": "p", "sources": [str(texts)], "tokenizer": {"from": str(model)}}]

    def marks() -> list[str]:
        return [pipeline.fingerprint(execute.resolve(one), {}, storage) for one in given]

    first = marks()
    assert marks() == first
    (model / "config.json").write_text('{"vocab_size": 5}')
    assert all(a != b for a, b in zip(marks(), first, strict=True))
    (model / "config.json").write_text("{}")
    assert marks() == first
    (texts / "a.txt").write_text("another line. " * 30)
    assert marks()[0] == first[0] and marks()[1] != first[1]


def test_a_replaced_corpus_changes_the_steps_that_name_it(storage: Storage, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a line. " * 100)
    execute.run({"kind": "prepare", "name": "named", "sources": [str(tmp_path / "a.txt")], "context": 16, "tokenizer": {"train": "bytes"},
                 "split": {"val_fraction": 0}}, storage=storage, progress=Records())
    train = {**TRAIN, "corpus": "named"}
    given = [execute.resolve({"name": "x", **train}),
             execute.resolve({**TUNE, "name": "x", "metric": "loss", "train": {**TUNE["train"], "corpus": "named"}})]
    first = [pipeline.fingerprint(one, {}, storage) for one in given]
    with (storage.corpus("named") / "manifest.json").open("a") as file:
        file.write("\n")
    assert all(pipeline.fingerprint(one, {}, storage) != mark for one, mark in zip(given, first, strict=True))


def test_an_endpoint_that_has_changed_is_replaced_where_it_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage, shown, calls = Storage(tmp_path), Records(), []
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    folder = RunFolder(storage.endpoint("e"))

    def run_loaded(loaded: Any, storage: Storage, progress: Any, *, resume: bool, **_: Any) -> dict[str, Any]:
        calls.append(resume)
        return {}

    monkeypatch.setattr(execute, "run_loaded", run_loaded)
    loaded = execute.resolve({"kind": "serve", "name": "e", "model": str(model)})
    with fake_endpoint(folder.path, "e") as record:
        RunFolder.create(folder.path, "kind: serve\n", {"pipeline": "p", "fingerprint": "before"})
        folder.result({"": record["url"], **record})
        folder.event("succeeded", "completed")
        assert pipeline.run_step("p", "serve", loaded, "before", folder, storage, shown)["url"] == record["url"] and not calls
        pipeline.run_step("p", "serve", loaded, "now", folder, storage, shown)
    assert calls == [True] and [path.name for path in folder.path.parent.iterdir()] == ["e"] and (folder.path / "api_key").exists()
    assert "replaced and keeps its key" in shown.notes[-1]


def test_a_port_that_is_taken_is_found_before_any_work(storage: Storage, tmp_path: Path) -> None:
    with fake_endpoint(storage.endpoint("p-serve"), "p-serve") as record:
        port = int(record["url"].split(":")[2].split("/")[0])
        serve = {"kind": "serve", "model": "${train}", "port": port}
        given = steps(prepare={**PREPARE, "sources": ["/no/such/folder"]}, train=TRAIN, serve=serve)
        with pytest.raises(ServeError, match=f"steps.serve: port: {port}: port {port} is taken.*port: 0"):
            execute.run(given, storage=storage, progress=Records())
        write_json(storage.endpoint("p-serve") / "endpoint.json", record)
        with pytest.raises(InputError, match="no such file or folder"):
            execute.run(given, storage=storage, progress=Records())


def test_a_step_never_takes_the_folder_of_a_job_that_is_not_the_pipelines(storage: Storage, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a line. " * 100)
    mine = {"kind": "prepare", "name": "mine", "sources": [str(tmp_path / "a.txt")], "context": 16, "tokenizer": {"train": "bytes"}}
    execute.run(mine, storage=storage, progress=Records())
    with pytest.raises(InputError, match="the name mine is taken by a job that is not of the pipeline other"):
        execute.run({"kind": "pipeline", "name": "other", "steps": {"a": mine}}, storage=storage, progress=Records())
