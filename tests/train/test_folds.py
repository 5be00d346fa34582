"""A cross-validation's folds: each document is held out once, whatever reads it; runs of a fold are what runs of such a corpus would be."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from distlm.corpus.folds import folded
from distlm.corpus.manifest import read_manifest
from distlm.corpus.stream import Windows, local_steps, ordered_steps
from distlm.errors import CorpusError, InputError, SpecError
from distlm.spec import TrainSpec
from distlm.spec.fold import Fold
from distlm.spec.load import dump, validate
from distlm.storage import Storage
from distlm.train.objectives.classify import class_weights
from distlm.train.recipe import make_recipe
from tests.train.ranks import losses, make_labelled_corpus, metrics, run_ranks, spec

FOLDS = 3


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_labelled_corpus(tmp_path_factory.mktemp("folds") / "c")


def given(corpus: Path, **sections: Any) -> TrainSpec:
    return spec(corpus, **{"objective": "classify", "duration": {"steps": 6}, "evaluate": {"every_steps": 3}, **sections})


def texts(windows: Windows) -> list[bytes]:
    """What stands for each window."""
    return [row.tobytes() for row in windows.head(len(windows))]


@pytest.mark.parametrize("multiple", [False, True])
def test_each_document_is_held_out_in_one_fold_and_trained_on_in_all_others(multiple: bool, tmp_path: Path) -> None:
    corpus = make_labelled_corpus(tmp_path / "c", multiple=multiple)
    everything = sorted(texts(Windows(corpus, "train")) + texts(Windows(corpus, "val")))
    label_of = {text: label.tolist() for split in ("train", "val") for windows in [Windows(corpus, split)]
                for text, label in zip(texts(windows), windows.labels(*windows.first(len(windows))), strict=True)}
    folds = [Fold(index=i, of=FOLDS) for i in range(FOLDS)]
    assert sorted(text for fold in folds for text in texts(Windows(corpus, "val", fold))) == everything
    for fold in folds:
        parts = {split: Windows(corpus, split, fold) for split in ("train", "val")}
        assert sorted(texts(parts["train"]) + texts(parts["val"])) == everything and 15 < len(parts["val"]) < 40
        manifest = folded(read_manifest(corpus), fold)
        for split, windows in parts.items():
            labels = windows.labels(*windows.first(len(windows)))
            assert labels.tolist() == [label_of[text] for text in texts(windows)]
            counts = labels.sum(0) if multiple else np.bincount(labels[:, 0], minlength=3)
            assert list(manifest.data["labels"][split].values()) == counts.tolist()
            assert manifest.splits[split].windows == manifest.splits[split].documents == len(windows)
        whole, table = read_manifest(corpus).splits, pq.read_table(corpus / "documents.parquet")
        for unit in ("documents", "bytes", "tokens"):
            assert sum(getattr(manifest.splits[name], unit) for name in parts) == sum(getattr(whole[name], unit) for name in parts), unit
        assert manifest.splits["val"].tokens == sum(
            row["tokens"] for row in table.to_pylist() if int.from_bytes(row["hash"], "big") % FOLDS == fold.index)


def test_a_list_of_other_documents_is_refused(tmp_path: Path) -> None:
    corpus = make_labelled_corpus(tmp_path / "c")
    pq.write_table(pq.read_table(corpus / "documents.parquet").slice(1), corpus / "documents.parquet")
    with pytest.raises(CorpusError, match="it lists other documents than the windows hold"):
        folded(read_manifest(corpus), Fold(index=0, of=FOLDS))


def test_an_epoch_of_a_fold_has_each_of_its_documents_once_on_any_number_of_ranks(corpus: Path) -> None:
    fold = {"index": 1, "of": FOLDS}
    recipe = make_recipe(given(corpus, fold=fold, duration={"epochs": 2}), Storage(corpus.parent))
    windows = Windows(corpus, "train", Fold(**fold))
    assert recipe.num_steps == -(-2 * len(windows) // 12) and recipe.val_windows == len(Windows(corpus, "val", Fold(**fold)))
    found = []
    for workers in (1, 2):
        plan = make_recipe(given(corpus, fold=fold, duration={"epochs": 2}, scale={"workers": workers}), Storage(corpus.parent)).plan()
        ranks = [list(ordered_steps(local_steps(plan, rank, 0), plan, rank, 0)) for rank in range(workers)]
        found.append(np.concatenate([np.concatenate(parts) for parts in zip(*ranks, strict=True)]))
    assert np.array_equal(*found)
    first = [row[:-1].astype(np.uint16).tobytes() for row in found[0][:len(windows)]]
    assert sorted(first) == sorted(texts(windows)) and first != texts(windows)


def test_a_run_of_a_fold_is_the_same_on_two_ranks_and_measures_the_documents_that_it_holds_out(corpus: Path, tmp_path: Path) -> None:
    sections = {"fold": {"index": 2, "of": FOLDS}, "class_weights": "balanced"}
    run_ranks({tmp_path / "one": given(corpus, **sections), tmp_path / "own": given(corpus)})
    run_ranks({tmp_path / "two": given(corpus, **sections, scale={"workers": 2}, sharding={"zero": 2})})
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-5)
    last = metrics(tmp_path / "one")[-1]
    held_out = Windows(corpus, "val", Fold(index=2, of=FOLDS))
    truth = held_out.labels(*held_out.first(len(held_out)))[:, 0]
    assert np.sum(last["confusion"]["counts"], axis=1).tolist() == np.bincount(truth, minlength=3).tolist()    # type: ignore[index]
    weights = class_weights(make_recipe(given(corpus, **sections), Storage(corpus.parent)))
    trained = Windows(corpus, "train", Fold(index=2, of=FOLDS))
    counts = np.bincount(trained.labels(*trained.first(len(trained)))[:, 0], minlength=3)
    np.testing.assert_allclose(weights, len(trained) / (3 * counts), rtol=1e-6)
    assert losses(tmp_path / "own") != losses(tmp_path / "one")


@pytest.mark.parametrize(("sections", "what"), [
    ({"fold": {"index": 3, "of": 3}}, "3: the folds of 3 are 0 to 2"),
    ({"fold": {"index": 0, "of": 3}, "objective": "pretrain"}, "is for objective: classify"),
    ({"fold": {"index": 0, "of": 3}, "evaluate": {"max_windows": 5}},
     r"fold 0 of 3 holds out \d+ documents, and 5 of them would be evaluated; set it to \d+ or more")])
def test_what_cannot_be_a_fold_is_refused_in_one_line(corpus: Path, sections: dict[str, Any], what: str) -> None:
    with pytest.raises((SpecError, InputError, ValueError), match=what):
        make_recipe(given(corpus, **sections), Storage(corpus.parent))


def test_a_mixture_and_a_fold_without_documents_are_refused(corpus: Path) -> None:
    mixture = {**dump(given(corpus)), "corpus": [{"corpus": "a", "weight": 1}, {"corpus": "b", "weight": 1}]}
    with pytest.raises(SpecError, match="fold: divides one corpus, not a mixture"):
        validate({**mixture, "fold": {"index": 0, "of": 2}})
    taken = {int.from_bytes(content, "big") % 100 for content in pq.read_table(corpus / "documents.parquet")["hash"].to_pylist()}
    empty = min(set(range(100)) - taken)
    with pytest.raises(InputError, match=f"fold {empty} of 100 holds out no document of c; take fewer folds"):
        make_recipe(given(corpus, fold={"index": empty, "of": 100}), Storage(corpus.parent))


def test_a_fold_that_holds_out_all_of_a_label_and_a_corpus_without_a_list_are_refused(tmp_path: Path) -> None:
    corpus = make_labelled_corpus(tmp_path / "c", (60, 21))
    windows = {name: Windows(corpus, name) for name in ("train", "val")}
    rare = [label == 2 for name in windows for label in windows[name].labels(*windows[name].first(len(windows[name])))[:, 0]]
    table = pq.read_table(corpus / "documents.parquet")
    starts = [windows[name]._shard(0)["documents"].flatten().to_numpy() for name in windows]
    numbers = np.concatenate([starts[0], starts[1] + 60])
    together = {number for number, one in zip(numbers.tolist(), rare, strict=True) if one}
    hashes = [(2 * i + (i not in together)).to_bytes(16, "big") for i in range(len(table))]
    pq.write_table(table.set_column(table.schema.get_field_index("hash"), "hash", [hashes]), corpus / "documents.parquet")
    with pytest.raises(InputError, match="fold 0 of 2 holds out every document with the label two; leave out labels"):
        make_recipe(given(corpus, fold={"index": 0, "of": 2}), Storage(tmp_path))
    (corpus / "documents.parquet").unlink()
    with pytest.raises(InputError, match=r"the corpus has no documents\.parquet"):
        make_recipe(given(corpus, fold={"index": 0, "of": 2}), Storage(tmp_path))
    assert json.loads((corpus / "manifest.json").read_text())["labels"]["names"] == ["zero", "one", "two"]
