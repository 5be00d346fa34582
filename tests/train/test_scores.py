"""Scores that are scikit-learn's own, ties, absent classes and classes that are never predicted included."""

import numpy as np
import pytest

from distlm.train.scores import MAX_CONFUSION, MOST_CONFUSED, confusion, multi_label, roc_auc, single_label, softmax


def test_scores_of_one_label_are_scikit_learns() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    random = np.random.default_rng(0)
    absent = ties = 0
    for _ in range(500):
        classes, n = int(random.integers(2, 7)), int(random.integers(1, 40))
        truth = random.choice(random.permutation(classes)[:random.integers(1, classes + 1)], n)
        logits = random.integers(-2, 3, (n, classes)).astype(np.float32) if random.random() < 0.5 else random.normal(
            0, 3, (n, classes)).astype(np.float32)
        found, scores = single_label(truth, logits, [str(i) for i in range(classes)]), softmax(logits)
        predicted = logits.argmax(1)
        absent += len(set(truth.tolist())) < classes
        ties += len(np.unique(scores)) < scores.size
        assert found["accuracy"] == pytest.approx(metrics.accuracy_score(truth, predicted), abs=1e-12)
        np.testing.assert_array_equal(found["confusion"]["counts"], metrics.confusion_matrix(truth, predicted, labels=range(classes)))
        for kind in ("macro", "micro"):
            wanted = metrics.precision_recall_fscore_support(truth, predicted, labels=range(classes), average=kind, zero_division=0)[:3]
            np.testing.assert_allclose([found[f"{name}_{kind}"] for name in ("precision", "recall", "f1")], wanted, atol=1e-12)
        areas = [metrics.roc_auc_score(truth == i, scores[:, i]) for i in range(classes) if 0 < (truth == i).sum() < n]
        assert found.get("roc_auc") == (pytest.approx(np.mean(areas), abs=1e-12) if areas else None)
        if len(set(truth.tolist())) == classes > 2:
            assert found["roc_auc"] == pytest.approx(metrics.roc_auc_score(truth, scores, multi_class="ovr", average="macro"), abs=1e-12)
    assert absent > 50 and ties > 50


def test_scores_of_many_labels_are_scikit_learns() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    random = np.random.default_rng(1)
    absent = ties = 0
    for _ in range(500):
        labels, n = int(random.integers(1, 6)), int(random.integers(1, 40))
        truth = random.random((n, labels)) < random.choice([0.0, 0.2, 0.5, 1.0], labels)
        logits = random.integers(-2, 3, (n, labels)).astype(np.float32)
        found, predicted = multi_label(truth, logits, [str(i) for i in range(labels)]), logits > 0
        absent += not truth.any(0).all()
        ties += len(np.unique(logits)) < logits.size
        one = labels == 1                                  # scikit-learn takes a column for two classes
        assert found["accuracy"] == pytest.approx(metrics.accuracy_score(truth, predicted), abs=1e-12)
        for kind in ("macro", "micro"):
            wanted = metrics.precision_recall_fscore_support(truth[:, 0] if one else truth, predicted[:, 0] if one else predicted,
                                                             average="binary" if one else kind, zero_division=0)[:3]
            np.testing.assert_allclose([found[f"{name}_{kind}"] for name in ("precision", "recall", "f1")], wanted, atol=1e-12)
        if labels > 1:
            np.testing.assert_array_equal(found["confusion"]["counts"], metrics.multilabel_confusion_matrix(truth, predicted))
        areas = [metrics.roc_auc_score(truth[:, i], logits[:, i]) for i in range(labels) if 0 < truth[:, i].sum() < n]
        assert found.get("roc_auc") == (pytest.approx(np.mean(areas), abs=1e-12) if areas else None)
    assert absent > 50 and ties > 50


def test_scores_by_hand() -> None:
    logits = np.array([[2, 1, 0], [0, 3, 0], [1, 1, 0], [0, 0, 5]], np.float32)
    found = single_label(np.array([0, 1, 1, 0]), logits, ["a", "b", "c"])
    assert found["confusion"] == {"labels": ["a", "b", "c"], "counts": [[1, 0, 1], [1, 1, 0], [0, 0, 0]]}
    assert found["accuracy"] == 0.5 and found["precision_macro"] == pytest.approx((0.5 + 1 + 0) / 3)
    assert found["recall_macro"] == pytest.approx(1 / 3) and found["f1_macro"] == pytest.approx((0.5 + 2 / 3) / 3)
    assert roc_auc(np.array([True, False, True]), np.array([1.0, 1.0, 2.0])) == 0.75
    assert roc_auc(np.array([True, True]), np.array([1.0, 2.0])) is None
    many = single_label(np.array([0]), np.zeros((1, MAX_CONFUSION + 1), np.float32), [str(i) for i in range(MAX_CONFUSION + 1)])
    assert "confusion" not in many and "roc_auc" not in many and many["accuracy"] == 1
    assert many["confused"] == {"errors": 0, "distinct": 0, "pairs": []}


def test_of_many_classes_the_pairs_that_are_confused_most_are_those_of_the_matrix() -> None:
    random, classes, n = np.random.default_rng(2), MAX_CONFUSION + 6, 4000
    truth = random.integers(0, classes, n)
    predicted = np.where(random.random(n) < 0.5, truth, (truth + random.integers(1, 4, n)) % classes)
    names = [f"c{i}" for i in range(classes)]
    found = single_label(truth, np.eye(classes, dtype=np.float32)[predicted], names)["confused"]
    counts = confusion(truth, predicted, classes)
    off = counts - np.diag(np.diag(counts))
    wanted = sorted(((-off[i, j], i, j) for i, j in np.argwhere(off)))
    assert found["errors"] == off.sum() and found["distinct"] == len(wanted) > MOST_CONFUSED == len(found["pairs"])
    assert [(one["label"], one["taken_for"], one["count"], one["documents"]) for one in found["pairs"]] == [
        (names[i], names[j], -count, counts[i].sum()) for count, i, j in wanted[:MOST_CONFUSED]]
    rows = random.random((n, classes)) < 0.1
    guessed = rows ^ (random.random((n, classes)) < np.linspace(0, 0.2, classes))
    several = multi_label(rows, np.where(guessed, 1.0, -1.0), names)["confused"]
    errors = (rows != guessed).sum(0)
    order = np.argsort(-errors, kind="stable")[:MOST_CONFUSED]
    assert several["errors"] == errors.sum() and several["distinct"] == (errors > 0).sum()
    assert [(one["label"], one["missed"], one["wrongly"], one["documents"]) for one in several["labels"]] == [
        (names[i], (rows & ~guessed)[:, i].sum(), (guessed & ~rows)[:, i].sum(), rows[:, i].sum()) for i in order]


def test_many_thousand_classes_need_no_matrix() -> None:
    classes = 60_000                                       # whose matrix would have 29 GB
    found = single_label(np.array([0, 5, 5]), np.eye(3, classes, dtype=np.float32), [str(i) for i in range(classes)])
    assert found["confused"]["pairs"] == [{"label": "5", "taken_for": "1", "count": 1, "documents": 2},
                                          {"label": "5", "taken_for": "2", "count": 1, "documents": 2}]


def test_logits_that_are_not_numbers_predict_nothing() -> None:
    logits = np.array([[0.0, 1.0], [np.nan, np.nan], [1.0, np.nan]])
    with pytest.raises(ValueError, match="the logits of 2 of 3 samples are not numbers"):
        single_label(np.zeros(3, np.int64), logits, ["a", "b"])
    with pytest.raises(ValueError, match="of 2 of 3"):
        multi_label(np.zeros((3, 2), bool), logits, ["a", "b"])
    assert single_label(np.array([1]), np.array([[-np.inf, 0.0]]), ["a", "b"])["accuracy"] == 1
