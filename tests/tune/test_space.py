"""A sweep's trials are known, and every one of them is valid, before any work."""

import math
from pathlib import Path
from typing import Any

import pytest

from distlm.errors import InputError, SpecError
from distlm.execute import resolve
from distlm.spec.load import dump
from distlm.spec.tune import TuneSpec
from distlm.storage import Storage
from distlm.tune import space
from tests.train.ranks import make_labelled_corpus
from tests.train.ranks import spec as trial

TRAIN = {"corpus": "c", "model": {"preset": "llama-tiny"}, "duration": {"steps": 10}}


def spec(**keys: Any) -> TuneSpec:
    return TuneSpec.model_validate({"name": "s", "train": TRAIN, **keys})


def refused(**keys: Any) -> str:
    with pytest.raises(SpecError) as error:
        resolve({"kind": "tune", "name": "s", "train": TRAIN, **keys})
    return str(error.value)


def test_samples_are_a_function_of_the_seed_and_more_trials_leave_the_first_as_they_are() -> None:
    lr = {"optimizer.lr": {"loguniform": [1e-4, 1e-2]}, "optimizer.weight_decay": {"choice": [0.0, 0.1]}}
    assert space.samples(spec(space=lr, trials=4)) == space.samples(spec(space=lr, trials=9))[:4]
    assert space.samples(spec(space=lr, trials=4, seed=1)) != space.samples(spec(space=lr, trials=4))


def test_a_loguniform_key_is_even_on_a_logarithmic_scale_and_stays_inside() -> None:
    drawn = [values["optimizer.lr"] for values in space.samples(spec(space={"optimizer.lr": {"loguniform": [1e-4, 1e-2]}}, trials=400))]
    assert all(1e-4 <= value <= 1e-2 for value in drawn)
    assert sum(math.log10(value) < -3 for value in drawn) == pytest.approx(200, abs=40)


def test_a_grid_runs_each_point_once_and_again_with_other_seeds_when_trials_says_so() -> None:
    grid = {"optimizer.lr": {"grid": [0.1, 0.2]}, "precision": {"grid": ["fp32", "bf16"]}}
    assert space.samples(spec(space=grid)) == [{"optimizer.lr": lr, "precision": p} for lr in (0.1, 0.2) for p in ("fp32", "bf16")]
    assert [values["seed"] for values in space.samples(spec(space={"optimizer.lr": {"grid": [0.1]}}, trials=3))] == [0, 1, 2]


def test_a_grid_beside_a_random_key_runs_each_point_with_values_of_its_own() -> None:
    found = space.samples(spec(space={"seed": {"grid": [0, 1]}, "optimizer.lr": {"uniform": [0.1, 0.2]}}, trials=2))
    assert [values["seed"] for values in found] == [0, 1, 0, 1]
    assert len({values["optimizer.lr"] for values in found}) == 4


@pytest.mark.parametrize(("key", "remedy"), [("optimiser.lr", "did you mean optimizer.lr?"), ("lr", "did you mean optimizer.lr?"),
                                             ("name", "set by the sweep"), ("seed.x", "no such key"),
                                             ("batch.global_sequence", "did you mean batch.global_sequences?")])
def test_a_wrong_key_is_refused_with_the_nearest_name(key: str, remedy: str) -> None:
    message = refused(space={key: {"grid": [1]}})
    assert f"space.{key}" in message and remedy in message


@pytest.mark.parametrize(("values", "what"), [({"optimizer.lr": {"grid": [0.1, -1]}}, "optimizer.lr: -1: must be"),
                                              ({"optimizer.lr": {"uniform": [-1e-9, 0.1]}}, "optimizer.lr: -1e-09: must be"),
                                              ({"schedule.warmup_steps": {"uniform": [1, 9]}}, "draw whole numbers with choice or grid"),
                                              ({"scale.workers": {"grid": [1, 5]}}, "cannot be divided over 5 workers")])
def test_a_value_that_breaks_the_spec_is_refused(values: dict[str, Any], what: str) -> None:
    message = refused(space=values)
    assert what in message and "spec: space: with" in message


@pytest.mark.parametrize(("keys", "what"), [
    ({"asha": {"grace_steps": 10}}, "asha.grace_steps: 10 has no effect where no trial takes more than 10 steps: none would stop early"),
    ({"asha": {}}, "asha.grace_steps: 50 has no effect"),
    ({"train": {**TRAIN, "evaluate": {"worker": {}}}}, "train.evaluate.worker: a trial is judged as it evaluates"),
    ({"asha": {"grace_steps": 20}, "space": {"duration.steps": {"grid": [10, 20]}}}, "no trial takes more than 20 steps"),
    ({"space": {"optimizer": {"grid": [{"lr": 1}]}, "optimizer.lr": {"grid": [2]}}},
     "space.optimizer.lr: it lies in optimizer, which the space sets as a whole; leave one of the two out"),
    ({"train": {**TRAIN, "name": "x"}}, "train.name: 'x' has no effect in a sweep, which sets it; leave it out"),
    ({"train": {**TRAIN, "storage": "/x"}}, "train.storage: '/x' has no effect in a sweep, which sets it; set storage beside train"),
    ({"train": {**TRAIN, "kind": "serve"}}, "train.kind: 'serve': a sweep tries training specs; leave it out")])
def test_what_would_have_no_effect_is_refused(keys: dict[str, Any], what: str) -> None:
    assert what in refused(**{"space": {"optimizer.lr": {"grid": [1]}}, **keys})


CLASSIFY, DPO = {**TRAIN, "objective": "classify"}, {**TRAIN, "objective": "dpo", "model": {"from": "m"}}


@pytest.mark.parametrize(("train", "metric", "mode"), [
    (TRAIN, "val_loss", "min"), (TRAIN, "loss", "min"), (TRAIN, "val_accuracy", "max"), (TRAIN, "val_ece", "min"),
    (CLASSIFY, "accuracy", "max"), (CLASSIFY, "f1_macro", "max"),
    (CLASSIFY, "val_loss", "min"), (DPO, "val_reward_margin", "max"), (DPO, "val_reward_accuracy", "max"), (DPO, "loss", "min")])
def test_what_is_better_of_a_metric_is_known(train: dict[str, Any], metric: str, mode: str) -> None:
    given = {"kind": "tune", "name": "s", "train": train, "space": {"optimizer.lr": {"grid": [1, 2]}}, "metric": metric}
    loaded = resolve(given).spec
    assert isinstance(loaded, TuneSpec) and space.mode_of(loaded) == mode
    assert resolve({**given, "mode": mode})
    other, better = ("max", "less") if mode == "min" else ("min", "more")
    assert f"mode: {other}: of {metric} {better} is better; leave it out" in refused(**{**given, "mode": other})


def test_where_nobody_knows_what_is_better_the_spec_says_it() -> None:
    given = {"train": DPO, "space": {"optimizer.lr": {"grid": [1]}}, "metric": "val_chosen_log_prob"}
    assert "mode: this key is missing; set min or max" in refused(**given)
    assert space.mode_of(resolve({"kind": "tune", "name": "s", **given, "mode": "max"}).spec) == "max"    # type: ignore[arg-type]


@pytest.mark.parametrize(("keys", "what"), [
    ({"train": TRAIN, "metric": "f1_macro"}, "metric: a run with objective: pretrain does not measure 'f1_macro'; it measures val_loss, "
                                             "val_perplexity, val_bits_per_byte, val_accuracy, val_ece, loss"),
    ({"train": CLASSIFY, "metric": "f1_makro"}, "did you mean f1_macro?"),
    ({"train": DPO, "metric": "val_loss", "space": {"dpo.beta": {"grid": [0.1, 0.2]}}},
     "metric: val_loss depends on dpo.beta, in which the trials differ: they cannot be compared by it; set metric: val_reward_accuracy"),
    ({"train": DPO, "metric": "val_reward_margin", "space": {"dpo": {"grid": [{"beta": 0.1}, {"beta": 0.2}]}}},
     "val_reward_margin depends on dpo.beta"),
    ({"train": DPO, "metric": "loss", "space": {"dpo.label_smoothing": {"choice": [0.0, 0.1]}}}, "loss depends on dpo.label_smoothing"),
    ({"train": CLASSIFY, "metric": "val_loss", "space": {"class_weights": {"grid": [None, "balanced"]}}},
     "val_loss depends on class_weights, in which the trials differ: they cannot be compared by it; set metric: accuracy")])
def test_what_trials_cannot_be_compared_by_is_refused(keys: dict[str, Any], what: str) -> None:
    assert what in refused(**{"space": {"optimizer.lr": {"grid": [1]}}, **keys})


def test_trials_that_do_not_differ_in_what_scales_the_loss_are_compared_by_it() -> None:
    grid = {"optimizer.lr": {"grid": [1, 2]}}
    one: dict[str, Any] = {"kind": "tune", "name": "s"}
    resolve({**one, "train": CLASSIFY, "space": {**grid, "class_weights": {"grid": ["balanced"]}}})
    resolve({**one, "train": DPO, "space": {"dpo.label_smoothing": {"grid": [0, 0.1]}}, "metric": "val_reward_margin"})
    resolve({**one, "train": DPO, "space": {"dpo.beta": {"grid": [0.1, 0.2]}}, "metric": "val_reward_accuracy"})


def test_what_has_an_effect_on_some_trial_is_not_refused() -> None:
    given = {"kind": "tune", "name": "s", "space": {"duration.steps": {"grid": [10, 20]}}, "asha": {"grace_steps": 10}}
    resolve({**given, "train": {**TRAIN, "kind": "train", "name": None, "storage": None}})
    resolve({**given, "train": {**TRAIN, "duration": {"epochs": 1}}, "space": {"optimizer.lr": {"choice": [0.1, 0.1, 0.2]}}})
    resolve({**given, "space": {"seed": {"grid": [0, 1]}, "retry.node_lost": {"grid": [0, 1]}},
             "train": {**TRAIN, "duration": {"steps": 11}}})


def test_keys_of_a_transformers_configuration_are_free() -> None:
    train = {**TRAIN, "model": {"config": {"model_type": "llama"}}}
    loaded = resolve({"kind": "tune", "name": "s", "train": train, "space": {"model.config.hidden_size": {"grid": [64, 128]}}})
    assert isinstance(loaded.spec, TuneSpec)
    assert space.trial_spec(loaded.spec, {"model.config.hidden_size": 128}, "t").model.config == {"model_type": "llama", "hidden_size": 128}


def test_a_mistake_in_the_training_spec_is_found() -> None:
    assert "unknown preset 'lama'" in refused(train={**TRAIN, "model": {"preset": "lama"}}, space={"optimizer.lr": {"grid": [1]}})


def test_a_mistake_in_a_sweep_is_told_with_its_own_line(tmp_path: Path) -> None:
    path = tmp_path / "sw.yaml"
    path.write_text("kind: tune\nname: s\ntrain:\n  corpus: c\n  model: {preset: llama-tiny}\n  duration: {steps: -1}\n  sed: 1\n"
                    "space:\n  optimizer.lr: {grid: [0.1]}\n")
    with pytest.raises(SpecError) as error:
        resolve(path)
    first, second = str(error.value).splitlines()
    assert first.startswith(f"{path}:6: train.duration.steps: -1") and second.startswith(f"{path}:7: train.sed: unknown key")
    path.write_text(path.read_text().replace("-1", "5").replace("  sed: 1\n", "").replace("optimizer.lr:", "optimizer.rl:"))
    with pytest.raises(SpecError, match=r"sw\.yaml:8: space\.optimizer\.rl: .*did you mean optimizer\.lr"):
        resolve(path)


def test_a_training_spec_in_a_file_is_put_in_its_place_with_its_lines(tmp_path: Path) -> None:
    (tmp_path / "train.yaml").write_text("kind: train\nname: x\ncorpus: c\nmodel: {preset: llama-tiny}\nduration: {steps: 7}\n")
    (tmp_path / "tune.yaml").write_text("kind: tune\nname: s\ntrain: train.yaml\nspace:\n  optimizer.lr: {grid: [0.1]}\n")
    loaded = resolve(tmp_path / "tune.yaml")
    assert isinstance(loaded.spec, TuneSpec) and isinstance(loaded.spec.train, dict)
    assert loaded.spec.train["duration"] == {"steps": 7}
    assert loaded.origins["train.corpus"] == "train.yaml:3" and loaded.origins["space.optimizer.lr.grid"] == "tune.yaml:5"
    assert "name" not in loaded.spec.train, "a resolved spec reads back"
    assert resolve(dump(loaded.spec)).spec == loaded.spec
    (tmp_path / "train.yaml").unlink()
    (tmp_path / "trains.yaml").touch()
    with pytest.raises(SpecError, match=r"tune\.yaml:3: train: train\.yaml cannot be read: No such file.*; did you mean .*/trains\.yaml\?"):
        resolve(tmp_path / "tune.yaml")


def test_trial_names_sort_and_name_folders() -> None:
    assert space.trial_name(3, {"optimizer.lr": 1e-05, "model.preset": "a/b"}) == "003-lr-1e-05-preset-a_b"


def test_folds_try_every_point_once_for_each_with_the_same_values() -> None:
    lr = {"optimizer.lr": {"loguniform": [1e-4, 1e-2]}}
    found = space.samples(spec(train=CLASSIFY, space=lr, trials=2, folds=3))
    assert [values["fold"] for values in found] == [{"index": i, "of": 3} for i in range(3)] * 2
    assert [values["optimizer.lr"] for values in found] == [values["optimizer.lr"] for values in space.samples(
        spec(train=CLASSIFY, space=lr, trials=2)) for _ in range(3)]
    alone = spec(train=CLASSIFY, folds=2)
    assert space.samples(alone) == [{"fold": {"index": 0, "of": 2}}, {"fold": {"index": 1, "of": 2}}]
    assert space.trial_name(3, found[1]) == f"003-lr-{found[1]['optimizer.lr']}-fold-1"
    resolved = resolve({"kind": "tune", "name": "s", "train": CLASSIFY, "folds": 2, "metric": "f1_macro"}).spec
    assert isinstance(resolved, TuneSpec) and space.base_spec(resolved).fold is not None


@pytest.mark.parametrize(("keys", "what"), [
    ({}, "space: there is nothing to try; give keys with values, or set folds"),
    ({"folds": 1, "train": CLASSIFY}, "folds: 1: must be at least 2"),
    ({"folds": 2}, "folds: is for objective: classify, not for pretrain; leave it out"),
    ({"folds": 2, "train": CLASSIFY, "asha": {"grace_steps": 2}}, "asha: would stop some folds of a point early"),
    ({"folds": 2, "train": {**CLASSIFY, "fold": {"index": 0, "of": 2}}}, "train.fold: folds beside train sets it"),
    ({"folds": 2, "train": CLASSIFY, "space": {"fold.index": {"grid": [0]}}}, "space.fold.index: folds sets it"),
    ({"folds": 100, "train": CLASSIFY, "space": {"seed": {"grid": list(range(101))}}}, "101 points, each 100 times")])
def test_folds_that_cannot_be_are_refused(keys: dict[str, Any], what: str) -> None:
    assert what in refused(**keys)


def test_calibration_of_any_number_of_labels_is_no_metric_of_a_sweep(tmp_path: Path) -> None:
    sweep = spec(metric="val_ece", space={"optimizer.lr": {"grid": [0.1]}})
    for multiple in (False, True):
        one = trial(make_labelled_corpus(tmp_path / str(multiple), multiple=multiple), objective="classify")
        if not multiple:
            space.check_metric(sweep, [one], Storage(tmp_path))
            continue
        with pytest.raises(InputError, match="metric: no trial would have a val_ece: documents have any number of labels; set metric:"):
            space.check_metric(sweep, [one], Storage(tmp_path))
