"""A cross-validation as a sweep: which point is best, what it found in each fold, and what it shows."""

import statistics
from pathlib import Path
from typing import Any

import pytest

from distlm import execute, summary
from distlm.errors import TrainError
from distlm.runs import RunFolder
from distlm.spec import TrainSpec, TuneSpec, load_spec
from distlm.storage import Storage
from distlm.tune import sweep
from tests.records import Records
from tests.train.ranks import make_labelled_corpus

TRAIN = {"corpus": "c", "objective": "classify", "model": {"preset": "llama-tiny"}, "duration": {"steps": 3}, "precision": "fp32",
         "batch": {"global_sequences": 4}, "scale": {"threads_per_worker": 1}}
GIVEN = {"kind": "tune", "name": "cv", "train": TRAIN, "folds": 3, "space": {"optimizer.lr": {"grid": [0.1, 0.2]}}, "metric": "accuracy"}
FOUND = {"000-lr-0.1-fold-0": 0.9, "001-lr-0.1-fold-1": 0.4, "002-lr-0.1-fold-2": 0.5,
         "003-lr-0.2-fold-0": 0.7, "004-lr-0.2-fold-1": 0.8, "005-lr-0.2-fold-2": 0.6}
"""The first point has the best fold, and the second one the best mean."""


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    make_labelled_corpus(tmp_path / "corpora" / "c")
    return Storage(tmp_path)


def ended(storage: Storage, found: dict[str, float], state: str = "succeeded") -> tuple[TuneSpec, RunFolder]:
    """A sweep whose trials have all ended, with these accuracies at last."""
    loaded = execute.resolve(GIVEN).spec
    assert isinstance(loaded, TuneSpec)
    folder = RunFolder(storage.sweep("cv"))
    for trial in sweep.plan_trials(loaded, folder, storage):
        trial.folder.metrics({"step": 0, "accuracy": 0.99, "val_loss": 9.0})
        trial.folder.metrics({"step": 3, "accuracy": found[trial.name], "val_loss": 1 - found[trial.name], "loss": 1.0,
                              "confusion": {"labels": ["good", "bad"], "counts": [[4, 1], [int(10 * found[trial.name]), 2]]}})
        last = trial.name.endswith("fold-2")
        trial.folder.event(state if last else "succeeded", "completed")
    return loaded, folder


def test_the_point_with_the_best_mean_is_best_and_each_fold_stands_in_result_table_report_and_summary(storage: Storage) -> None:
    spec, folder = ended(storage, FOUND)
    made = sweep.tune(spec, folder, storage, shown := Records())
    assert made["best.optimizer.lr"] == 0.2 and made["value"] == pytest.approx(0.7) and made["std"] == pytest.approx(0.1)
    assert Path(made["best"]).name == "004-lr-0.2-fold-1"
    best, other = made["points"]
    assert best["values"] == {"optimizer.lr": 0.2} and best["metrics"]["accuracy"]["folds"] == [0.7, 0.8, 0.6]
    assert other["metrics"]["accuracy"]["std"] == pytest.approx(statistics.stdev([0.9, 0.4, 0.5]))
    assert best["metrics"]["val_loss"]["mean"] == pytest.approx(0.3)

    by_loss = sweep.points_of(spec.model_copy(update={"metric": "val_loss"}), sweep.plan_trials(spec, folder, storage))
    assert [point.values["optimizer.lr"] for point in by_loss] == [0.2, 0.1], "of a loss the least mean"

    [table] = [record for record in shown.records if record["distlm"] == "table" and record["title"] == "folds of cv"]
    assert list(table["header"]) == ["fold", "accuracy", "val_loss"]
    assert [*map(tuple, table["rows"])] == [
        ("003-lr-0.2-fold-0", "0.7000", "0.3000"), ("004-lr-0.2-fold-1", "0.8000", "0.2000"), ("005-lr-0.2-fold-2", "0.6000", "0.4000"),
        ("mean optimizer.lr=0.2", "0.7000 ± 0.1000", "0.3000 ± 0.1000"), ("mean optimizer.lr=0.1", "0.6000 ± 0.2646", "0.4000 ± 0.2646")]
    assert ("accuracy", "0.7000 ± 0.1000 over 3 folds") in summary.of_sweep(made) and ("best accuracy", "0.700 ± 0.100") in \
        summary.of_sweep(made)
    page = (folder.path / "report.html").read_text()
    for text in ("<td>004-lr-0.2-fold-1</td><td>0.8000</td>", "<td>mean</td><td>0.7000</td>", "<td>standard deviation</td><td>0.1000</td>",
                 "<td>0.2646</td>", "http-equiv"):
        assert text in page
    assert "<script" not in page
    assert best["confusion"] == {"labels": ["good", "bad"], "counts": [[12, 3], [21, 6]]}, "of all documents, each in its fold"
    assert page.count("was taken for") == 1 and all(f"{count}" in page.split("was taken for")[1] for count in (12, 3, 21, 6))

    again = load_spec(made["best_spec"]).spec
    assert isinstance(again, TrainSpec) and again.fold is None and again.optimizer.lr == 0.2
    assert Path(made["best_spec"]).read_text().startswith("# The best of the sweep cv: trial 004-lr-0.2-fold-1, accuracy 0.7000 ± 0.1000")


def test_a_point_without_all_of_its_folds_has_no_mean(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "run_trials", lambda *_: None)
    spec, folder = ended(storage, FOUND, "failed")
    trials = sweep.plan_trials(spec, folder, storage)
    trials[2].folder.event("succeeded", "completed")
    found: list[Any] = sweep.points_of(spec, trials)
    assert [point.values["optimizer.lr"] for point in found] == [0.1, 0.2] and found[1].scores == {}
    trials[2].folder.event("failed", "oom")
    with pytest.raises(TrainError, match="no point has accuracy in all 3 folds: oom"):
        sweep.tune(spec, folder, storage, Records())
