"""A spec and its corpora become the numbers of a run, and what cannot be trained on is refused before any work."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distlm import plan
from distlm.corpus.manifest import manifest_hash, write_manifest
from distlm.corpus.stream import Windows
from distlm.errors import CheckpointError, InputError, SpecError
from distlm.execute import check_resume, resolve, run_loaded
from distlm.runs import RunFolder
from distlm.spec import TrainSpec, load_spec
from distlm.spec.load import dump, to_yaml
from distlm.storage import Storage
from distlm.train import checkpoint
from distlm.train.recipe import Recipe, inputs_of, make_recipe
from tests.corpus.made import Doc, make
from tests.records import Records
from tests.train.ranks import make_corpus, make_packed_corpus, spec


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    storage = Storage(tmp_path)
    make_corpus(storage.corpus("a"), windows=(20, 17, 11), val=7)
    make_corpus(storage.corpus("b"), windows=(13,), val=40)
    return storage


def train(corpus: Any, **sections: Any) -> TrainSpec:
    return TrainSpec.model_validate({**dump(spec(Path("unused"))), "corpus": corpus, **sections})


def recipe(storage: Storage, corpus: Any, **sections: Any) -> Recipe:
    return make_recipe(train(corpus, **sections), storage)


def mix(*weights: float, **more: Any) -> list[dict[str, Any]]:
    return [{"corpus": name, "weight": weight} | {key: values[i] for key, values in more.items()}
            for i, (name, weight) in enumerate(zip("abcd", weights, strict=False))]


def change(storage: Storage, name: str, **keys: Any) -> None:
    data = json.loads((storage.corpus(name) / "manifest.json").read_text())
    write_manifest(storage.corpus(name), {**{key: value for key, value in data.items() if key != "format"}, **keys})


def test_the_short_form_is_the_long_one_and_weights_are_relative(storage: Storage) -> None:
    short, long, sevens = recipe(storage, mix(0.7, 0.3)), recipe(storage, {"mix": mix(0.7, 0.3)}), recipe(storage, mix(7, 3))
    assert short == long and short.mix == sevens.mix and short.corpus_hash == sevens.corpus_hash
    assert short.mix and short.mix.weights == pytest.approx((0.7, 0.3)) and short.corpora == tuple(str(storage.corpus(n)) for n in "ab")


def test_checkpoints_that_would_never_be_kept_as_asked_are_refused(storage: Storage, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"^checkpoint.milestone_steps: 12 is no multiple of the 5 steps between checkpoints; try 15"):
        recipe(storage, "a", checkpoint={"every_steps": 5, "milestone_steps": 12})
    make_corpus(storage.corpus("unseen"), val=0)
    with pytest.raises(InputError, match=r"^checkpoint.keep_best: there is nothing to evaluate on: .*; leave it out, or prepare"):
        recipe(storage, "unseen", checkpoint={"keep_best": 1}, evaluate={})


def test_one_corpus_is_no_mixture_and_its_identity_is_its_manifest(storage: Storage) -> None:
    alone = recipe(storage, "a")
    assert alone.mix is None and alone.plan().mix is None and alone.corpora == (alone.corpus,)
    assert alone.corpus_hash == manifest_hash(storage.corpus("a")) and alone.val_windows == 7
    assert inputs_of(alone.spec, storage) == {"corpus": str(storage.corpus("a")), "corpus_hash": alone.corpus_hash}


def test_the_identity_of_a_mixture_is_that_of_its_corpora_weights_and_schedule(storage: Storage) -> None:
    annealed = {"mix": mix(0.7, 0.3, final_weight=(1, 1))}
    given: list[Any] = ["a", mix(0.7, 0.3), mix(0.6, 0.4), annealed, {**annealed, "anneal_fraction": 0.5}, {"mix": mix(1)}]
    hashes = [recipe(storage, corpus).corpus_hash for corpus in given]
    change(storage, "b", seed=1)
    assert len({*hashes, recipe(storage, given[1]).corpus_hash}) == 7
    lineage = inputs_of(recipe(storage, given[1]).spec, storage)
    assert lineage["mixture"] == {str(storage.corpus(name)): manifest_hash(storage.corpus(name)) for name in "ab"}


@pytest.mark.parametrize(("corpus", "message"), [
    (["a", "b"], "corpus.0: 'a': must be a section; its keys are corpus, weight, epochs, final_weight"),
    (mix(0.7, -0.3), "corpus.1.weight: -0.3: must be at least 0"),
    ([{"corpus": "a", "wieght": 1}], "unknown key; did you mean weight?"),
    (mix(0.7, 0), "corpus.1.weight: 0 would take no sample of this corpus"),
    ([*mix(1), *mix(2)], "corpus: a is there twice"),
    ([*mix(1), {"corpus": "b", "weight": 1, "final_weight": 1}], "a has no final_weight and others have"),
    (mix(1, 1, final_weight=(0, 0)), "every final_weight is 0"),
    ({"mix": mix(0.7, 0.3), "anneal_fraction": 0.5}, "corpus.anneal_fraction: 0.5 has no effect where no corpus has a final_weight"),
    ([], "corpus: []: must have 1 entries at least"), (5, "corpus: 5: must be text, or a list of sections")])
def test_a_mixture_that_makes_no_sense_is_refused_by_key(corpus: Any, message: str) -> None:
    with pytest.raises(SpecError) as error:
        load_spec({"kind": "train", **dump(spec(Path("unused"))), "corpus": corpus})
    assert message in str(error.value)


def test_corpora_that_cannot_be_mixed_are_named_with_the_remedy(storage: Storage) -> None:
    make_corpus(storage.corpus("wide"), context=32)
    with pytest.raises(InputError, match=r"corpus.mix.1.corpus: the corpus wide has windows of 32 tokens and a of 16; .* context: 16"):
        recipe(storage, [*mix(1), {"corpus": "wide", "weight": 1}])
    with pytest.raises(InputError, match="is in the mixture twice"):
        recipe(storage, [*mix(1), {"corpus": str(storage.corpus("a")), "weight": 1}])
    with pytest.raises(InputError, match=r"corpus.mix.1.corpus: there is no corpus bb under .*; did you mean b\?"):
        recipe(storage, [*mix(1), {"corpus": "bb", "weight": 1}])
    change(storage, "b", tokenizer={"kind": "given", "vocab_size": 64, "eos_id": 0, "hash": "other"})
    with pytest.raises(InputError, match=r"tokenizer of the corpus b is not that of a; prepare b with tokenizer: \{from: .*a/tokenizer\}"):
        recipe(storage, mix(1, 1))


@pytest.mark.parametrize(("corpus", "overrides", "where"), [
    ("  - {corpus: a, weight: 1}\n  - {corpus: bb, weight: 1}\n", [], "run.yaml:4: corpus.1.corpus: there is no corpus bb"),
    ("  mix:\n  - {corpus: a, weight: 1}\n  - {corpus: bb, weight: 1}\n", [], "run.yaml:5: corpus.mix.1.corpus: there is no corpus bb"),
    ("  - {corpus: a, weight: 1}\n  - {corpus: b, weight: 1, epochs: 0.1}\n", [], "run.yaml:4: corpus.1.epochs: 20 steps take"),
    ("  - {corpus: a, weight: 1}\n  - {corpus: b, weight: 1}\n", ["corpus.1.epochs=0.1"], "--set corpus.1.epochs: 20 steps take")])
def test_what_is_wrong_with_a_mixture_stands_where_it_is_written(storage: Storage, corpus: str, overrides: list[str], where: str) -> None:
    rest = to_yaml({key: value for key, value in dump(spec(Path("unused"))).items() if key not in ("kind", "corpus")})
    file = storage.root / "run.yaml"
    file.write_text(f"kind: train\ncorpus:\n{corpus}{rest}")
    with pytest.raises((SpecError, InputError)) as error:
        run_loaded(resolve(file, overrides), storage, Records())
    assert str(error.value).removeprefix(f"{storage.root}/").startswith(where)


def test_a_duration_that_needs_more_passes_than_allowed_is_refused_and_the_remedy_holds(storage: Storage) -> None:
    capped = mix(0.5, 0.5)
    capped[1]["epochs"] = 2                                # 26 windows of b, so 52 samples, so 4 steps of 12
    with pytest.raises(SpecError, match=r"corpus.mix.1.epochs: 20 steps take 120 samples of b, 9.23 passes .*for 4 steps.* allow 10"):
        recipe(storage, capped)
    short = {"schedule": {"name": "constant"}, "evaluate": {}, "checkpoint": {}}
    assert recipe(storage, capped, duration={"steps": 4}, **short).num_steps == 4
    with pytest.raises(SpecError, match="train for 4 steps"):
        recipe(storage, capped, duration={"steps": 5}, **short)
    capped[1]["epochs"] = 10
    assert recipe(storage, capped).num_steps == 20


def test_a_mixture_s_epochs_count_all_its_windows(storage: Storage) -> None:
    assert recipe(storage, mix(0.5, 0.5), duration={"epochs": 2}).num_steps == 11      # 2 * 61 windows, 12 in a step


def test_validation_takes_of_each_corpus_its_share(storage: Storage) -> None:
    given = recipe(storage, mix(0.7, 0.3), evaluate={"max_windows": 20})
    assert [(part.windows, part.share) for part in given.val] == [(7, pytest.approx(0.7)), (6, pytest.approx(0.3))]
    assert given.val_windows == 13 and [part.name for part in given.val] == ["a", "b"]
    few = recipe(storage, mix(999, 1), evaluate={"max_windows": 5})
    assert [part.windows for part in few.val] == [4, 1]
    make_corpus(storage.corpus("c"), val=0)
    third = recipe(storage, mix(0.7, 0.3, 1), evaluate={"max_windows": 20})
    assert [part.share for part in third.val] == pytest.approx([0.7, 0.3]), "a corpus without validation windows has no share"
    alone = recipe(storage, "c", evaluate={})
    assert alone.val == () and alone.val_windows == 0
    with pytest.raises(InputError, match=r"^evaluate: there is nothing to evaluate on: the corpus c has no validation window"):
        recipe(storage, "c")


def test_annealing_ends_with_the_run_and_validation_counts_its_average(storage: Storage) -> None:
    given = recipe(storage, {"mix": mix(1, 0, final_weight=(0, 1)), "anneal_fraction": 0.5})
    assert given.mix and given.mix.anneal == (120, 240) and given.mix.counts(240).tolist() == [180, 60]
    assert [part.share for part in given.val] == pytest.approx([0.75, 0.25])


def test_documents_are_masked_by_default_where_a_corpus_is_packed_by_best_fit(storage: Storage) -> None:
    make_packed_corpus(storage.corpus("c"))
    batch = {"global_sequences": 12, "micro_sequences": 2}
    given = [recipe(storage, corpus, batch={**batch, **more}) for corpus, more in (
        ("a", {}), ("a", {"mask_documents": True}), ("c", {}), ("c", {"mask_documents": False}), (mix(1, 1, 1), {}))]
    assert [(one.mask_documents, one.marked, one.plan().marked) for one in given] == [
        (False, False, False), (True, True, True), (True, True, True), (False, True, True), (True, True, True)]
    rows = [dict(plan.needs(resolve(dump(one.spec)), storage)) for one in (given[0], given[2])]
    assert "documents" not in rows[0] and "inside each" in rows[1]["documents"]


def test_a_family_that_does_not_keep_documents_apart_is_refused_with_file_and_line(storage: Storage) -> None:
    bloom = {"model_type": "bloom", "hidden_size": 32, "n_layer": 2, "n_head": 4}
    file = storage.root / "train.yaml"
    file.write_text(to_yaml({**dump(train("a")), "model": {"config": bloom}, "batch": {"global_sequences": 12, "mask_documents": True}}))
    line = next(i for i, text in enumerate(file.read_text().splitlines(), 1) if "mask_documents" in text)
    with pytest.raises(SpecError, match=rf"train\.yaml:{line}: batch\.mask_documents: the bloom family .* set it to false"):
        plan.needs(resolve(file), storage)
    plan.needs(resolve(file, ["batch.mask_documents=false"]), storage)


def test_bytes_are_those_of_the_tokens_as_far_as_the_tokenizer_tells(storage: Storage) -> None:
    make(storage.corpus("d"), [*(Doc("größer und größer", split=split) for split in ("train", "val")), Doc("zwei", split="val")])
    windows = Windows(storage.corpus("d"), "val")          # "größer und größer" has 21 bytes and "zwei" 4, each has an end token
    assert windows.bytes_of(windows.head(1)).tolist() == [[1.0] * 17] and windows.bytes_of(np.array([0, 4])).tolist() == [0.0, 1.0]
    assert Windows(storage.corpus("a"), "val").bytes_of(np.array([5, 6])).tolist() == [3.0, 3.0], "one that does not tell: on average"


def test_validation_windows_without_a_token_that_gives_loss_are_refused(storage: Storage) -> None:
    make_packed_corpus(storage.corpus("c"), lengths=(1, 1, 1, 1))
    with pytest.raises(InputError, match=r"no token of the 1 validation windows that are evaluated gives loss; .*split\.val_fraction"):
        recipe(storage, "c")


def saved(given: Recipe, step: int) -> checkpoint.Checkpoint:
    anneal = {"anneal": list(given.mix.anneal)} if given.mix and given.mix.final_weights else {}
    return checkpoint.Checkpoint(Path("step"), step, {**checkpoint.facts(given), **anneal})


def test_another_mixture_is_refused_and_another_duration_unless_annealing_would_move(storage: Storage) -> None:
    constant, other = recipe(storage, mix(0.7, 0.3)), recipe(storage, mix(0.6, 0.4))
    with pytest.raises(CheckpointError, match="was saved with corpus_hash"):
        checkpoint.check_fits(saved(constant, 5), other)
    longer = {"duration": {"steps": 40}}
    checkpoint.check_fits(saved(constant, 20), recipe(storage, mix(0.7, 0.3), **longer))
    annealed = {"mix": mix(0.7, 0.3, final_weight=(1, 1)), "anneal_fraction": 0.5}
    begun = recipe(storage, annealed)
    for step in (9, 20):
        checkpoint.check_fits(saved(begun, step), begun)
    checkpoint.check_fits(saved(begun, 9), recipe(storage, annealed, **longer))
    with pytest.raises(CheckpointError, match="from step 10 to 20, and the spec says from 20 to 40; set duration to 20 steps"):
        checkpoint.check_fits(saved(begun, 10), recipe(storage, annealed, **longer))


def test_before_annealing_the_order_is_the_same_at_any_duration(storage: Storage) -> None:
    import numpy as np

    annealed = {"mix": mix(0.7, 0.3, final_weight=(1, 5)), "anneal_fraction": 0.5}
    short, long = (recipe(storage, annealed, duration={"steps": steps}).mix for steps in (200, 400))
    assert short and long
    safe = np.arange(1200 - 2)
    np.testing.assert_array_equal(short.assign(safe), long.assign(safe))
    assert not np.array_equal(short.assign(np.arange(2400)), long.assign(np.arange(2400)))


def test_a_recorded_mixture_is_taken_up_again_and_a_changed_one_is_refused(storage: Storage, tmp_path: Path) -> None:
    given = train(mix(0.7, 0.3, epochs=(None, 9)))
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    (folder.path / "spec.yaml").write_text(to_yaml(dump(given)))
    assert load_spec(folder.path / "spec.yaml").spec == given and check_resume(folder, given) == []
    with pytest.raises(SpecError, match=r"corpus.mix.1.weight: 0.3 -> 0.4"):
        check_resume(folder, train(mix(0.7, 0.4, epochs=(None, 9))))


def test_a_plan_shows_shares_and_passes_and_what_is_not_there_yet(storage: Storage) -> None:
    given = {**dump(spec(Path("unused"))), "corpus": mix(0.5, 0.5)}
    rows = dict(plan.needs(resolve(given), storage))
    assert rows["corpus"].startswith("a mixture of 2, 64 tokens") and rows["evaluations"].endswith("over 47 windows")
    assert rows["corpus 0"].endswith("a, 0.5 of the samples, 2.5 passes over 48 windows") and "9.23 passes over 13" in rows["corpus 1"]
    missing = dict(plan.needs(resolve({**given, "corpus": mix(1, 1, 1)}), storage))
    assert missing["corpus"].startswith("c: not there yet") and "parameters" not in missing


def test_a_pipeline_mixes_what_its_steps_make(storage: Storage) -> None:
    prepare = {"kind": "prepare", "sources": ["stdlib"], "tokenizer": {"vocab_size": 300}, "context": 16}
    more = {"kind": "prepare", "sources": ["stdlib"], "tokenizer": {"from": "${code}/tokenizer"}, "context": 16}
    mixed = {**dump(spec(Path("unused"))), "corpus": [{"corpus": "${code}", "weight": 2}, {"corpus": "${text}", "weight": 1}]}
    loaded = resolve({"kind": "pipeline", "name": "p", "steps": {"train": mixed, "code": prepare, "text": more}})
    rows = dict(plan.needs(loaded, storage))
    assert list(dict.fromkeys(key.split(":")[0] for key in rows)) == ["code", "text", "train"]
    assert int(rows["train: parameters"].replace(",", "")) > 0
