"""Best-fit packing: no document that fits a window is cut, every token but a document's first is predicted once, the books balance."""

import itertools
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distlm.corpus import curate
from distlm.corpus.bestfit import BestFitTask, Group, best_fit, best_fit_bytes, groups, pieces, write_best_fit
from distlm.corpus.diff import diff
from distlm.corpus.inspect import documents, find, summary, windows
from distlm.corpus.manifest import read_manifest, write_manifest
from distlm.corpus.verify import verify
from distlm.errors import CorpusError
from tests.corpus.conftest import document
from tests.records import Records

Run = Callable[..., dict[str, Any]]
BEST_FIT = {"pack": {"method": "best_fit"}}


def reference(lengths: list[int], capacity: int) -> list[int]:
    """Best-fit-decreasing as its definition says it: look at every window."""
    found, windows = [0] * len(lengths), list[tuple[int, int]]()             # (room, when it came to that room)
    for turn, i in enumerate(sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))):
        fitting = [(room, -came, w) for w, (room, came) in enumerate(windows) if room >= lengths[i]]
        w = min(fitting)[2] if fitting else len(windows)
        windows[w:w + 1] = [((windows[w][0] if fitting else capacity) - lengths[i], turn)]
        found[i] = w
    return found


@pytest.mark.parametrize("seed", range(10))
def test_windows_are_chosen_as_best_fit_decreasing_is_defined(seed: int) -> None:
    rng = random.Random(seed)
    capacity = rng.choice([1, 2, 7, 8, 9, 64])
    lengths = [rng.randrange(1, capacity + 1) for _ in range(rng.randrange(200))]
    assert best_fit(np.array(lengths, np.int64), capacity).tolist() == reference(lengths, capacity)


@pytest.mark.parametrize("seed", range(20))
def test_what_fits_is_whole_and_every_token_but_a_documents_first_is_predicted_once(seed: int) -> None:
    rng = random.Random(seed)
    context = rng.choice([1, 2, 5, 8])
    texts = [[rng.randrange(1, 70_000) for _ in range(rng.choice([1, 2, context, context + 1, context + 2, 2 * context + 1, 30]))]
             for _ in range(rng.randrange(1, 40))]
    starts = np.cumsum([0, *map(len, texts)])[:-1]
    data, count, repeated = best_fit_bytes(np.concatenate(texts).astype(np.uint32), starts, 100, context, "uint32", 0)
    rows = pa.ipc.open_file(pa.BufferReader(data)).get_batch(0).to_pylist()
    assert len(rows) == count and sum(row["filled"] for row in rows) == sum(map(len, texts)) + repeated
    predicted, seen = dict[tuple[int, int], int](), dict[int, int]()
    for row in rows:
        assert len(row["tokens"]) == context + 1 and not any(row["tokens"][row["filled"]:]), "padding is the end token"
        assert row["starts"][0] == 0 and row["documents"] == sorted(row["documents"])
        ends = [*row["starts"][1:], row["filled"]]
        for at, end, number, offset in zip(row["starts"], ends, row["documents"], row["offsets"], strict=True):
            text = texts[number - 100]
            assert row["tokens"][at:end] == text[offset:offset + end - at]
            seen[number] = seen.get(number, 0) + 1
            for place in range(offset + 1, offset + end - at):
                predicted[number, place] = predicted.get((number, place), 0) + 1
    assert predicted == {(100 + i, place): 1 for i, text in enumerate(texts) for place in range(1, len(text))}
    assert all(seen[100 + i] == 1 for i, text in enumerate(texts) if len(text) <= context + 1)


def test_windows_are_not_in_the_order_of_lengths() -> None:
    """Evaluation takes the first windows of a split: they must not be those of the longest documents."""
    lengths = np.arange(1, 65).repeat(20)
    data, count, _ = best_fit_bytes(np.ones(lengths.sum(), np.uint16), np.cumsum(lengths) - lengths, 0, 64, "uint16", 0)
    batch = pa.ipc.open_file(pa.BufferReader(data)).get_batch(0)
    each = [len(starts) for starts in batch["starts"].to_pylist()]
    assert abs(sum(each[:count // 2]) / sum(each) - 0.5) < 0.05


@pytest.mark.parametrize("target", [1, 40, 10_000])
def test_groups_do_not_depend_on_the_parts(target: int, tmp_path: Path) -> None:
    rng, found = random.Random(0), []
    lengths = [rng.randrange(1, 50) for _ in range(100)]
    for name, cuts in (("one", [0, 100]), ("many", [0, 0, 1, 13, 13, 50, 99, 100, 100])):
        parts, offset = [], 0
        for i, (a, b) in enumerate(itertools.pairwise(cuts)):
            part = np.array(lengths[a:b], np.int64)
            np.save(tmp_path / f"{name}{i}.npy", np.arange(offset, offset + part.sum(), dtype=np.uint16))
            np.save(tmp_path / f"{name}{i}-starts.npy", np.cumsum(part) - part)
            parts.append((tmp_path / f"{name}{i}", offset, int(part.sum())))
            offset += int(part.sum())
        made = list(groups(parts, target))
        ends = np.cumsum(lengths)
        assert [group.begin for group in made] == [0, *(group.end for group in made[:-1])] and made[-1].end == sum(lengths)
        for group in made:
            inside = lengths[group.first_document:int(np.searchsorted(ends, group.end)) + 1]
            assert sum(inside) == group.end - group.begin and sum(inside[:-1]) < target
            assert sum(inside) >= target or group is made[-1]
        (tmp_path / name).mkdir()
        task = BestFitTask(tmp_path / name, "0.arrow", parts, made[len(made) // 2], 16, "uint16", 0)
        found.append((made, write_best_fit(task)))
    assert found[0] == found[1]


def test_an_empty_split_has_no_group_and_a_document_without_text_is_one_token(tmp_path: Path) -> None:
    np.save(tmp_path / "e-starts.npy", np.zeros(0, np.int64))
    assert list(groups([(tmp_path / "e", 0, 0)], 10)) == []
    assert [array.tolist() for array in pieces(np.array([1, 9, 10, 17, 18]), 8)] == \
        [[0, 1, 2, 2, 3, 3, 4, 4, 4], [0, 0, 0, 8, 0, 8, 0, 8, 16], [1, 9, 9, 2, 9, 9, 9, 9, 2]]
    assert Group(0, 0, 1) == Group(0, 0, 1)


@pytest.fixture
def varied(texts: Path) -> Path:
    """Documents of many lengths, some longer than several windows."""
    lines = [{"text": " ".join(f"n{(i * k) % 89}" for k in range(i % 23 + 1)), "id": f"short-{i}"} for i in range(1, 120)]
    lines += [{"text": document(1000) + " ".join(f"long{j * 7 % 31}" for j in range(200)) + " the very end", "id": "long"}]
    (texts / "varied.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return texts


def test_a_corpus_is_the_same_at_any_number_of_workers_and_tells_its_padding(run: Run, varied: Path,
                                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    shown = Records()
    first = run(varied, "one", workers=1, progress=shown, **BEST_FIT)
    monkeypatch.setattr(curate, "PARTITION_BYTES", 1000)
    second = run(varied, "two", workers=3, **BEST_FIT)
    files = [{str(file.relative_to(result[""])): file.read_bytes() for file in Path(result[""]).rglob("*") if file.is_file()}
             for result in (first, second)]
    assert files[0] == files[1]
    manifest = verify(first[""])
    train, pack = manifest.splits["train"], manifest.data["pack"]
    assert len(train.shards) > 3 and train.dropped_tokens == 0 and manifest.data["parameters"]["pack"] == {"method": "best_fit"}
    assert train.windows * 17 == train.tokens + train.repeated_tokens + train.padding_tokens
    assert 0 < first["padding_share"] == pack["padding_share"] < 0.2
    assert pack["padding_tokens"] == first["train_padding_tokens"] + first["val_padding_tokens"] == train.padding_tokens + \
        manifest.splits["val"].padding_tokens
    assert f"{pack['padding_tokens']:,} tokens of padding" in shown.text
    rows = dict(summary(first[""]))
    assert f", {train.padding_tokens:,} tokens of padding" in rows["split train"] and "padding" in rows["packing"]
    report = Path(first[""], "report.html").read_text()
    assert f"<td>{train.padding_tokens:,}</td>" in report and "Packing" in report
    data = {key: value for key, value in manifest.data.items() if key != "format"}
    data["splits"]["train"]["padding_tokens"] += 1
    write_manifest(manifest.path, data)
    with pytest.raises(CorpusError, match=r"do not hold .* tokens"):
        verify(manifest.path)


def test_documents_windows_and_texts_are_found(run: Run, varied: Path) -> None:
    result = run(varied, **BEST_FIT)
    listed = pq.read_table(Path(result[""], "documents.parquet")).to_pylist()
    every = documents(result[""], [row["hash"].hex() for row in listed])
    texts = {one.hash: one.text for one in every}
    assert len(texts) == len(listed) and all(one.whole and len(one.text.encode()) == one.bytes for one in every)
    [long] = documents(result[""], ["long"])
    assert long.text.startswith("Document 1000") and long.text.endswith("the very end") and long.tokens > 5 * 16
    manifest = read_manifest(result[""])
    for needle in ("long7 long14", " the very end", "n5 ", "Ärger"):
        matches = find(result[""], needle, limit=100_000)
        assert len(matches) == sum(text.count(needle) for text in texts.values()) > 0
        assert all(needle in match.excerpt for match in matches) and find(result[""], needle, limit=1) == matches[:1]
    [match] = find(result[""], "Document 1000")
    assert "Document" in windows(result[""], match.split, match.window)[0].text
    total = manifest.splits["train"].windows
    shown = windows(result[""], count=total)
    assert sum(window.padding for window in shown) == manifest.splits["train"].padding_tokens
    assert sum(window.text.count("<|endoftext|>") for window in shown) == manifest.splits["train"].documents
    assert all(window.starts[0] == 0 for window in shown)


def test_a_diff_tells_the_packing(run: Run, varied: Path) -> None:
    differences = diff(run(varied, "one")[""], run(varied, "two", **BEST_FIT)[""])
    assert ("parameters", "pack.method", None, "best_fit") in differences.values and not differences.same_windows
    assert {key for part, key, *_ in differences.values if part == "splits"} >= {"train.windows", "train.padding_tokens"}
    assert differences.only["a"].documents == differences.only["b"].documents == 0
