"""Near-duplicates, on corpora of made-up words whose Jaccard similarities are known."""

import itertools
import random
import tracemalloc
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from distlm.corpus import fuzzy
from distlm.corpus.conversations import joined
from distlm.corpus.fuzzy import NearDuplicates, components, connect, near_duplicates, probability, threshold
from distlm.corpus.partitions import BATCH_ROWS
from distlm.errors import StorageError
from distlm.spec.curate import Fuzzy

SIMILARITIES = {0.7: (70, 15), 0.8: (80, 10), 0.9: (90, 5)}
"""Shingles that both have, and that each has alone, for a Jaccard similarity."""
numbers = itertools.count()


def words(count: int) -> list[str]:
    """Words that stand nowhere else."""
    return [f"w{next(numbers)}" for _ in range(count)]


def alike(shared: int, own: int, copies: int = 2) -> list[str]:
    """Documents of which each two have `shared` shingles of 5 words in common, and each has `own` of its own."""
    same = words(shared + 4)
    return [" ".join(same + words(own)) for _ in range(copies)]


def in_turn(function: Callable[[Any], Any], tasks: Sequence[Any]) -> Iterable[tuple[int, Any]]:
    return [(i, function(task)) for i, task in enumerate(tasks)]


def out_of_turn(function: Callable[[Any], Any], tasks: Sequence[Any]) -> Iterable[tuple[int, Any]]:
    order = random.Random(len(tasks)).sample(range(len(tasks)), len(tasks))
    return [(i, function(tasks[i])) for i in order]


def find(folder: Path, texts: list[str], rules: Fuzzy | None = None, partitions: int = 3,
         run: fuzzy.Spread = in_turn) -> tuple[NearDuplicates, dict[int, tuple[int, int]]]:
    """What is found, and by the numbers of the texts: those that go, with (keeper, cluster)."""
    return find_said(folder, [(text, "") for text in texts], rules, partitions, run)


def find_said(folder: Path, said: list[tuple[str, str]], rules: Fuzzy | None = None, partitions: int = 3,
              run: fuzzy.Spread = in_turn) -> tuple[NearDuplicates, dict[int, tuple[int, int]]]:
    """The same of texts and whose is how much of each."""
    scratch = folder / f"{next(numbers)}"
    scratch.mkdir()
    paths = [scratch / f"{i}.arrow" for i in range(partitions)]
    bounds = [len(said) * i // partitions for i in range(partitions + 1)]
    for path, (low, high) in zip(paths, itertools.pairwise(bounds), strict=True):
        texts, turns = (pa.array([one[i] for one in said[low:high]], pa.string()) for i in (0, 1))
        table = pa.table({"hash": pa.array([b""] * (high - low), pa.binary()), "text": texts, "turns": turns})
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=BATCH_ROWS)
    found = near_duplicates(paths, rules or Fuzzy(), scratch, run)
    gone = {}
    for low, dropped in zip(bounds, found.dropped, strict=False):
        for row, partition, keeper, cluster in np.stack([dropped.rows, dropped.keeper_partitions, dropped.keeper_rows, dropped.clusters]).T:
            gone[low + int(row)] = (bounds[partition] + int(keeper), int(cluster))
    return found, gone


@pytest.mark.parametrize("least", [None, 0.5])
def test_pairs_are_found_as_often_as_the_theory_says(tmp_path: Path, least: float | None) -> None:
    planted = [(similarity, alike(*counts)) for similarity, counts in SIMILARITIES.items() for _ in range(1000)]
    texts = [text for _, pair in planted for text in pair]
    shuffled = random.Random(1).sample(texts, len(texts))
    place = {text: i for i, text in enumerate(shuffled)}
    found, gone = find(tmp_path, shuffled, Fuzzy(min_similarity=least), partitions=8)
    shares = dict.fromkeys(SIMILARITIES, 0)
    for similarity, pair in planted:
        first, second = sorted(place[text] for text in pair)
        assert first not in gone and gone.get(second, (first,))[0] == first
        shares[similarity] += second in gone
    for similarity, share in shares.items():
        expected = probability(similarity, 14, 8) if similarity >= (least or threshold(14, 8)) else 0
        assert share / 1000 == pytest.approx(expected, abs=0.03), similarity
    assert len(gone) == found.pairs == found.clusters == sum(shares.values()) and found.largest == 2


def sets(texts: list[str], size: int = 5) -> list[set[tuple[str, ...]]]:
    split = [text.split() for text in texts]
    return [{tuple(one[i:i + size]) for i in range(max(1, len(one) - size + 1))} if one else set() for one in split]


def test_look_alikes_are_met_but_none_goes_without_a_document_that_is_similar(tmp_path: Path) -> None:
    texts = alike(80, 40, copies=200) + [text for _ in range(20) for text in alike(90, 10, copies=3)]
    random.Random(2).shuffle(texts)
    found, gone = find(tmp_path, texts)
    shingles = sets(texts)
    similar = {i for pair in itertools.combinations(range(len(texts)), 2) for i in pair
               if len(shingles[pair[0]] & shingles[pair[1]]) >= threshold(14, 8) * len(shingles[pair[0]] | shingles[pair[1]])}
    assert len(gone) == 40 and set(gone) < similar and len(similar) == 60
    assert found.candidates > 60 + found.pairs
    assert all(dropped.similarities.min(initial=1) >= threshold(14, 8) for dropped in found.dropped)


def corpus() -> list[str]:
    """Clusters of 2 to 40, chains, look-alikes, short and empty documents, in a mixed order."""
    texts = [text for copies in (2, 3, 9, 40) for text in alike(95, 5, copies)]
    chain = words(400)
    texts += [" ".join(chain[i:i + 200]) for i in range(0, 200, 20)]
    texts += alike(80, 40, copies=60) + ["", " ", "Two words", "two  WORDS", "other words", "one", "!"]
    texts += [" ".join(words(30)) for _ in range(40)]
    return random.Random(3).sample(texts, len(texts))


def test_the_result_does_not_depend_on_partitions_buckets_or_the_order_of_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = corpus()
    found, gone = find(tmp_path, texts, partitions=1)
    assert found.largest == 40 and len(gone) == 1 + 2 + 8 + 39 + 9 + 1
    for partitions in (2, 7, len(texts) + 5):
        other, same = find(tmp_path, texts, partitions=partitions, run=out_of_turn)
        assert same == gone and repr(other) == repr(found)
    for name, value in {"BUCKET_KEYS": 50, "CHUNK_BYTES": 2000, "CACHE_BYTES": 5000, "MAX_KNOWN_WORDS": 10}.items():
        monkeypatch.setattr(fuzzy, name, value)
    other, same = find(tmp_path, texts, partitions=4, run=out_of_turn)
    assert same == gone and repr(other) == repr(found)


def test_many_documents_of_one_band_key_come_to_the_same_clusters_with_fewer_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = corpus()
    monkeypatch.setattr(fuzzy, "ALL_PAIRS", len(texts))
    every, gone = find(tmp_path, texts)
    monkeypatch.setattr(fuzzy, "ALL_PAIRS", 2)
    for block in (2048, 16):
        monkeypatch.setattr(fuzzy, "BLOCK", block)
        fewer, same = find(tmp_path, texts)
        assert same == gone and fewer.candidates < every.candidates / 3


def test_what_the_first_of_many_is_not_like_is_connected_all_the_same() -> None:
    generator = np.random.default_rng(4)
    centres = generator.integers(0, 1 << 32, (4, 112), dtype=np.uint32)
    families = np.arange(1, 61) % 4
    signatures = centres[families]
    signatures[:, :11] = generator.integers(0, 1 << 32, (60, 11), dtype=np.uint32)
    signatures = np.concatenate([generator.integers(0, 1 << 32, (1, 112), dtype=np.uint32), signatures])
    pairs, first = connect(signatures, 0.72)
    assert sorted(first.tolist()) == [0, 1, 2, 3, 4] and len(pairs) == 60 - 4
    members, keepers = components(pairs)
    assert len(members) == 60 and (families[members - 1] == families[keepers - 1]).all() and len(set(keepers.tolist())) == 4


def test_families_that_lie_in_several_blocks_are_one_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(8)
    families = generator.integers(0, 3, 400)
    signatures = generator.integers(0, 1 << 32, (3, 112), dtype=np.uint32)[families]
    monkeypatch.setattr(fuzzy, "BLOCK", 20)
    monkeypatch.setattr(fuzzy, "_read_signatures", lambda _, numbers: signatures[numbers])
    pairs = np.concatenate(fuzzy._family(fuzzy.PairTask(0, 1, Fuzzy(), tmp_path), np.arange(400)))
    members, keepers = components(pairs)
    assert len(members) == 400 and len(pairs) < 500
    assert len(set(keepers.tolist())) == 3 and (families[members] == families[keepers]).all()


def test_documents_that_lie_about_the_threshold_are_connected_with_few_pairs() -> None:
    generator = np.random.default_rng(5)
    signatures = np.tile(generator.integers(0, 1 << 32, (1, 112), dtype=np.uint32), (200, 1))
    for row in signatures:
        changed = generator.choice(112, generator.integers(6, 19), replace=False)
        row[changed] = generator.integers(0, 1 << 32, len(changed), dtype=np.uint32)
    pairs, _ = connect(signatures, 0.75)
    assert len(pairs) <= 200 * (fuzzy.MAX_UNSURE + 1) and set(components(pairs)[1].tolist()) == {0}
    assert (pairs[:, 0] < pairs[:, 1]).all()


def test_a_chain_is_one_cluster_though_its_ends_are_unlike_and_the_first_is_kept(tmp_path: Path) -> None:
    chain = words(400)
    texts = [" ".join(chain[i:i + 200]) for i in range(0, 200, 20)]
    _, gone = find(tmp_path, [texts[5], *texts[:5], *texts[6:], "nothing of the kind"], partitions=4)
    assert gone == {i: (0, 0) for i in range(1, 10)}


def test_components_are_those_of_a_search_by_hand() -> None:
    generator = random.Random(6)
    for edges in (0, 1, 50, 400):
        pairs = [tuple(sorted(generator.sample(range(1000), 2))) for _ in range(edges)] + [(i, i + 1) for i in range(2000, 2000 + edges)]
        beside: dict[int, set[int]] = {}
        for first, second in pairs:
            beside.setdefault(first, set()).add(second)
            beside.setdefault(second, set()).add(first)
        expected: dict[int, int] = {}
        for start in sorted(beside):
            stack = [start]
            while stack:
                one = stack.pop()
                if one not in expected:
                    expected[one] = start
                    stack += beside[one]
        members, keepers = components(np.asarray(pairs, np.int64).reshape(-1, 2))
        assert dict(zip(members.tolist(), keepers.tolist(), strict=True)) == expected


def test_the_similarity_is_that_of_the_sets_of_shingles_whatever_is_repeated(tmp_path: Path) -> None:
    same = words(30)
    texts = [" ".join(same), " ".join(same + same), " ".join(same * 3), " ".join(reversed(same))]
    one, two, three, _ = sets(texts)
    found, gone = find(tmp_path, texts, Fuzzy(min_similarity=len(one & two) / len(one | two)))
    assert two == three and gone == {1: (0, 0), 2: (0, 0)}
    assert sorted(float(value) for dropped in found.dropped for value in dropped.similarities) == [1, 1]
    assert find(tmp_path, texts, Fuzzy(min_similarity=len(one & two) / len(one | two) + 1e-9))[1] == {2: (1, 0)}


def test_a_document_shorter_than_a_shingle_is_one_and_an_empty_one_is_like_no_other(tmp_path: Path) -> None:
    found, gone = find(tmp_path, ["", "a b", "A, b!", "b a", "a b c", "", "...", "c a b", "a  b\nc"])
    assert gone == {2: (1, 0), 8: (4, 1)} and found.documents == 6
    assert find(tmp_path, [], partitions=2)[0].documents == 0 == find(tmp_path, ["", ""])[0].clusters


@pytest.mark.parametrize(("first", "second", "similar"), [
    ("Über den Wolken muss die Freiheit wohl", "ÜBER DEN WOLKEN; MUSS DIE FREIHEIT WOHL", True),
    ("हिन्दी में लिखा हुआ एक वाक्य है", "हिन्दी में लिखा हुआ एक वाक्य है।", True),
    ("हिन्दी में लिखा हुआ एक वाक्य है", "हिन्दु में लिखो हुए एक वाक्य हो", False),
    ("今天天气很好我们一起去公园里散步吧" * 2, "今天天气很好我们一起去公园里散步吧" * 2 + "好", True),
    ("今天天气很好我们一起去公园里散步吧", "他昨天在图书馆里看了一整天的旧报纸", False),
    ("วันนี้อากาศดีมากเราไปเดินเล่นที่สวนกันเถอะ", "วันนี้อากาศดีมากเราไปเดินเล่นที่สวนกันเถอะ นะ", True)])
def test_words_are_those_of_the_script_in_any_case(tmp_path: Path, first: str, second: str, similar: bool) -> None:
    assert bool(find(tmp_path, [first, second])[1]) == similar


CODE = "if a > b and c + d > e:\n    f = g + h\n    i = j + k if l > m else -n\n    o += p * q\nreturn a & b, not c > d\n"


@pytest.mark.parametrize(("first", "second"), [
    (CODE, CODE.replace(">", "<=")), (CODE, CODE.replace("+", "-")), (CODE + "# ä", CODE.replace(">", "<=") + "# ä"),
    ("\n".join(f"row {i} +{i}.5 up" for i in range(20)), "\n".join(f"row {i} -{i}.5 up" for i in range(20))),
    ("\n".join(f"row {i}: {i}.5" for i in range(20)), "\n".join(f"row {i}: -{i}.5" for i in range(20))),
    ("if !a && !b || !c { return !d }", "if a && b || c { return d }"),
    ("A film with much music 👍", "A film with much music 👎"), ("10 € and 20 € and 30 € in all", "10 $ and 20 $ and 30 $ in all")])
def test_what_differs_in_its_signs_alone_is_not_alike(tmp_path: Path, first: str, second: str) -> None:
    assert not find(tmp_path, [first, second], Fuzzy(bands=50, rows=1, min_similarity=0.7))[1]


def test_what_differs_in_the_punctuation_of_its_sentences_is_alike(tmp_path: Path) -> None:
    first = 'He said: "Well-known words - said often, it\'s true; are they (not) [sic]? Yes! And so on..."'
    second = "He said: “Well‐known words – said often – it’s true… are they not sic. Yes, and so on”"
    found, gone = find(tmp_path, [first, second, first.replace('"', "").replace(" - ", " ")])
    assert set(gone) == {1, 2} and all(similarity == 1 for dropped in found.dropped for similarity in dropped.similarities)


def test_what_signing_holds_does_not_grow_with_the_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzzy, "CHUNK_BYTES", 1 << 15)
    monkeypatch.setattr(fuzzy, "MAX_KNOWN_WORDS", 1000)
    peaks = []
    for copies in (10, 80):
        texts, twice = [" ".join(words(2000)) for _ in range(copies)], []
        for _ in range(2):                                 # once in a while Python's table of interned strings grows by megabytes
            tracemalloc.start()
            find(tmp_path, texts, partitions=1)
            twice.append(tracemalloc.get_traced_memory()[1] - sum(map(len, texts)))
            tracemalloc.stop()
        peaks.append(min(twice))
    assert peaks[1] < 1.5 * peaks[0] + 80 * 2000, peaks


def test_the_probability_and_the_threshold_are_those_that_are_published() -> None:
    assert probability(0.8, 14, 8) == pytest.approx(0.924, abs=0.0005) and probability(0.8, 20, 13) == pytest.approx(0.677, abs=0.0005)
    assert threshold(14, 8) == pytest.approx(0.719, abs=0.0005)


def test_a_scratch_folder_that_cannot_be_written_is_a_storage_error(tmp_path: Path) -> None:
    path = tmp_path / "0.arrow"
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, pa.schema({"text": pa.string(), "turns": pa.string()})):
        pass
    with pytest.raises(StorageError, match="cannot write"):
        near_duplicates([path], Fuzzy(), tmp_path / "none", in_turn)


def test_what_confirming_holds_is_bounded_but_for_one_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzzy, "CACHE_BYTES", 2000)
    find(tmp_path, [" ".join(words(size)) for size in [100] * 20 + [400, 100]])
    scratch, = tmp_path.iterdir()
    held = fuzzy._Shingles(scratch)
    for number in [(0 << 32) + 2, (1 << 32) + 3, *((2 << 32) + row for row in range(8)), (0 << 32) + 2]:
        assert len(held[number][0]) in (96, 396)
        assert sum(found.nbytes for found, _ in held.values()) <= max(2000, held[number][0].nbytes)


def test_a_system_turn_that_conversations_share_makes_them_no_copies_and_one_that_differs_tells_them_apart(tmp_path: Path) -> None:
    prompt, same, nearly = (" ".join(words(n)) for n in (300, 30, 1))
    chats = [[("system", prompt), ("user", " ".join(words(12))), ("assistant", " ".join(words(8)))] for _ in range(60)]
    chats += [[("system", " ".join(words(50))), ("user", same)] for _ in range(20)]      # what is asked about is in the system turn
    chats += [[("system", first), ("user", f"{same} copy")] for first in (prompt, f"{prompt} {nearly}")] + [[("user", same)]]
    found, gone = find_said(tmp_path, [joined(turns) for turns in chats])
    assert gone == {81: (80, 0)} and found.documents == len(chats)
