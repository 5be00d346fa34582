import functools
import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers

from distlm.corpus import curate, shards
from distlm.corpus.files import ranges
from distlm.corpus.manifest import Manifest, read_manifest
from distlm.corpus.verify import verify
from distlm.errors import CorpusError, InputError, StorageError
from tests.corpus.conftest import document
from tests.records import Records

Run = Callable[..., dict[str, Any]]


def files_of(path: str | Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(Path(path).rglob("*")) if file.is_file()}


def documents_of(manifest: Manifest, split: str) -> list[str]:
    """The documents of a split, read back out of its windows: all but those in the tail that fills no window."""
    tokenizer = tokenizers.Tokenizer.from_file(str(manifest.tokenizer / "tokenizer.json"))
    found: list[list[int]] = []
    for path in manifest.files(split):
        batch = pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)
        for tokens, starts in zip(batch["tokens"].to_pylist(), batch["starts"].to_pylist(), strict=True):
            for position, token in enumerate(tokens[:-1]):
                if position in starts:
                    found.append([])
                found[-1].append(token)
    assert all(manifest.eos_id not in tokens[:-1] for tokens in found)
    return [tokenizer.decode(tokens[:-1], skip_special_tokens=False) for tokens in found if tokens[-1] == manifest.eos_id]


def rejected(manifest: Manifest) -> dict[str, int]:
    return {reason: lost["documents"] for step in manifest.data["steps"] for reason, lost in step["rejected"].items() if lost["documents"]}


def test_a_corpus_is_byte_equal_with_one_worker_and_two_run_again_from_elsewhere_and_in_another_order(run: Run, texts: Path) -> None:
    first = run([str(texts), str(texts / "more.jsonl")], "one", workers=1)
    second = run([str(texts), str(texts / "more.jsonl")], "two", workers=2)
    shutil.copytree(texts, texts.parent / "elsewhere" / "texts")
    third = run([str(texts.parent / "elsewhere" / "texts" / "more.jsonl"), str(texts.parent / "elsewhere" / "texts")], "three")
    assert files_of(first[""]) == files_of(second[""])
    assert first["manifest_hash"] == second["manifest_hash"] == third["manifest_hash"]
    assert {name.split("/")[0] for name in files_of(first[""])} == \
        {"manifest.json", "inputs.json", "sources.jsonl", "documents.parquet", "duplicates.jsonl", "report.html", "train", "val",
         "tokenizer", "rejects"}


def test_the_same_documents_in_other_files_and_sources_give_the_same_manifest_and_shards(
        run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One file; several; several that are sources of their own; parquet in one file and in several, and in row groups. Some documents stand
    there twice, some under a source of other rules, whose files come first or last by their names."""
    lines = [{"text": document(i % 90), "id": str(i)} for i in range(100)] + [{"text": "\xe4", "id": "short"}, {"id": "no text"}]
    other = [{"text": document(i), "id": f"o{i}"} for i in range(85, 110)]

    def write(name: str, rows: list[dict[str, Any]]) -> str:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        if name.endswith(".parquet"):
            pq.write_table(pa.Table.from_pylist(rows), tmp_path / name, row_group_size=7)
        else:
            (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path / name)

    def corpus(root: str, first: Any, second: list[str]) -> Manifest:
        own = [{"path": path, "clean": {"min_chars": 2}} for path in second]
        return verify(run([*first, *own], root, dedup={"fuzzy": {}}, split={"val_fraction": 0.2})[""])

    one = corpus("one", [write("all.jsonl", lines)], [write("b.jsonl", other)])
    parts = [write(f"parts/{9 - i}.jsonl", lines[i * 25:(i + 1) * 25 if i < 3 else None]) for i in range(4)]
    with monkeypatch.context() as patch:
        patch.setattr(curate, "PARTITION_BYTES", 1000)
        several = corpus("several", [str(tmp_path / "parts")], [write("a.jsonl", other[:5]), write("z.jsonl", other[5:])])
    sources = corpus("sources", parts, [str(tmp_path / "b.jsonl")])
    hashed = ("manifest.json", "train", "val", "tokenizer")
    made = [{name: data for name, data in files_of(manifest.path).items() if name.split("/")[0] in hashed}
            for manifest in (one, several, sources)]
    assert made[0] == made[1] == made[2] and len(made[0]) > 5
    assert [[source["name"] for source in manifest.sources] for manifest in (one, several, sources)] == [
        ["all.jsonl", "b.jsonl"], ["a.jsonl", "parts", "z.jsonl"], ["6.jsonl", "7.jsonl", "8.jsonl", "9.jsonl", "b.jsonl"]]
    parquet = [corpus(f"parquet{i}", [found], [str(tmp_path / "b.jsonl")]) for i, found in enumerate((
        write("all.parquet", lines), str(Path(write("many/1.parquet", lines[60:]), write("many/2.parquet", lines[:60])).parent)))]
    assert Path(parquet[0].path, "manifest.json").read_bytes() == Path(parquet[1].path, "manifest.json").read_bytes()


def test_a_large_file_is_read_in_ranges_by_several_tasks_and_gives_the_same_bytes(
        run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Documents, rejects and clusters name the same records as when each file is read whole, and the corpus is known again."""
    lines = [json.dumps({"text": document(i % 40), "id": str(i)}) for i in range(60)]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines[:30], "", "{broken", *lines[30:]]))
    pq.write_table(pa.table({"text": [document(i) if i % 9 else None for i in range(30, 80)]}), tmp_path / "b.parquet", row_group_size=8)
    sources = [str(tmp_path / name) for name in ("a.jsonl", "b.parquet")]
    whole = run(sources, "whole", dedup={"fuzzy": {}})
    parts = functools.partial(ranges, size=1000)
    monkeypatch.setattr("distlm.corpus.inputs.ranges", parts)
    monkeypatch.setattr("distlm.corpus.identity.ranges", parts)
    monkeypatch.setattr(curate, "READ_BYTES", 1)
    shown = Records()
    made = run(sources, "parts", progress=shown, dedup={"fuzzy": {}})
    one, other = (files_of(result[""]) for result in (whole, made))
    changed = {name for name in one | other if one.get(name) != other.get(name)}
    assert changed == {"inputs.json", "sources.jsonl"}     # the hash of a file is another
    listed = [[json.loads(line) for line in files["sources.jsonl"].splitlines()] for files in (one, other)]
    assert [{**line, "xxh3": ""} for line in listed[0]] == [{**line, "xxh3": ""} for line in listed[1]]
    assert json.loads(one["rejects/malformed.jsonl"])["record"] == 31
    verify(made[""])
    shown = Records()
    assert run(sources, "parts", progress=shown, dedup={"fuzzy": {}}) == made and "nothing to do" in shown.text


def test_files_of_one_name_are_told_apart_by_their_source_whatever_their_order(run: Run, tmp_path: Path) -> None:
    folders = [tmp_path / name / "texts" for name in ("a", "b")]
    for number, folder in enumerate(folders):
        folder.mkdir(parents=True)
        (folder / "0.txt").write_text(document(number))
        (folder / "1.txt").write_text(document(9))         # of both
    made = [run([*map(str, some)], root) for root, some in (("one", folders), ("two", folders[::-1]))]
    assert files_of(made[0][""]) == files_of(made[1][""])
    sources = read_manifest(made[0][""]).sources
    rows = pq.read_table(Path(made[0][""], "documents.parquet")).to_pylist()
    assert sorted(row["origin"] for row in rows if row["source"] == "texts/0.txt") == [0, 1]
    for place, source in enumerate(sources):
        assert sum(row["bytes"] for row in rows if row["origin"] == place) == sum(split["bytes"] for split in source["splits"].values())
    assert [json.loads(line) for line in Path(made[0][""], "duplicates.jsonl").read_text().splitlines()] == [
        {"step": "dedup", "documents": 2, "members": [
            {"source": "texts/1.txt", "origin": origin, "record": 0, "id": "", "bytes": len(document(9).encode()), **text}
            for origin, text in ((0, {"text": document(9)}), (1, {}))]}]
    (copy,) = map(json.loads, Path(made[0][""], "rejects", "duplicate.jsonl").read_text().splitlines())
    assert copy["source"] == copy["same_as"]["source"] == "texts/1.txt" and {copy["origin"], copy["same_as"]["origin"]} == {0, 1}
    assert all(row["hash"] == row["text_hash"] for row in rows)
    listed = map(json.loads, Path(made[0][""], "sources.jsonl").read_text().splitlines())
    assert sorted((line["file"], line["origin"]) for line in listed) == [(f"texts/{i}.txt", origin) for i in (0, 1) for origin in (0, 1)]


def test_every_document_is_in_the_windows_once_in_an_order_that_only_the_seed_changes(run: Run, texts: Path) -> None:
    outputs = [run(texts, f"seed{seed}", seed=seed, split={"val_fraction": 0.3}) for seed in (0, 1)]
    manifests = [verify(result[""]) for result in outputs]
    found = [{split: documents_of(manifest, split) for split in ("train", "val")} for manifest in manifests]
    for manifest in manifests:
        for split in ("train", "val"):
            missing = manifest.splits[split].documents - len(documents_of(manifest, split))
            assert missing <= 1                            # the tail is shorter than a window, and a document longer
    together = set(found[0]["train"] + found[0]["val"] + found[1]["train"] + found[1]["val"])
    assert together == {document(i) for i in range(50)}
    result = outputs[1]
    assert result["documents"] == 50 and rejected(manifests[0]) == {"duplicate": 10}
    assert found[0]["train"] != found[1]["train"]
    assert not set(found[0]["train"]) & set(found[1]["val"])
    assert result["bytes"] == sum(len(document(i).encode()) for i in range(50)) == result["train_bytes"] + result["val_bytes"]


def test_the_split_does_not_move_when_documents_are_added(run: Run, texts: Path) -> None:
    before = read_manifest(run(texts, "before", split={"val_fraction": 0.3})[""])
    for i in range(100, 140):
        (texts / f"{i}.txt").write_text(document(i))
    after = read_manifest(run(texts, "after", split={"val_fraction": 0.3})[""])
    held_out = set(documents_of(after, "val"))
    assert set(documents_of(before, "val")) <= held_out and not set(documents_of(before, "train")) & held_out
    assert len(held_out) > len(documents_of(before, "val"))


def test_duplicates_stay_where_the_spec_says_so(run: Run, texts: Path) -> None:
    assert run(texts, dedup="none")["documents"] == 60


def test_bad_input_is_counted_by_reason_with_samples_and_loses_nothing_good(run: Run, texts: Path) -> None:
    (texts / "bad.txt").write_bytes(b"\xff\xfe\x00")
    (texts / "nul.txt").write_bytes(b"text with \0 a NUL\0 byte")
    (texts / "empty.txt").write_bytes(b"")
    (texts / "bad.jsonl").write_bytes(b'{"text": "good one"}\n{"text": broken\n{"title": "no text"}\n{"text": "good two"}\n'
                                      b'{"text": "' + b"x" * 3_000_000 + b'"}\n{"text": "good three"}\n')
    good = gzip.compress("".join(json.dumps({"text": document(i)}) + "\n" for i in range(200, 240)).encode())
    (texts / "cut.jsonl.gz").write_bytes(good[:-4])
    shown = Records()
    result = run(texts, progress=shown, split={"val_fraction": 0}, clean={"max_document_bytes": 1_000_000})
    manifest = verify(result[""])
    assert rejected(manifest) == {"not_utf8": 1, "malformed": 1, "missing_field": 1, "too_long": 1, "corrupt": 1, "too_short": 1,
                                  "duplicate": 10}
    assert result["rejected"] == 16 and result["rejected.too_long"] == 1
    assert result["documents"] == 50 + 1 + 3 + 40
    found = documents_of(manifest, "train")
    assert {"good one", "good two", "good three", "text with  a NUL byte", document(239)} <= set(found)
    assert manifest.data["steps"][1]["rejected"]["control_characters"] == {"documents": 0, "bytes": 2}
    rejects = {path.stem: [json.loads(line) for line in path.read_text().splitlines()] for path in Path(result[""], "rejects").iterdir()}
    assert {reason: len(samples) for reason, samples in rejects.items()} == rejected(manifest)
    assert (rejects["malformed"][0]["source"], rejects["malformed"][0]["record"]) == ("texts/bad.jsonl", 1)
    assert rejects["duplicate"][0]["same_as"]["source"].startswith("texts/")
    assert "1 document rejected: too_long (3,000,013 bytes)" in shown.text and "10 documents rejected: duplicate" in shown.text


@pytest.mark.parametrize(("stage", "step"), [("read_documents", "clean"), ("sort_partition", "dedup"), ("refine_partition", "fuzzy")])
def test_a_stage_that_loses_a_document_ends_the_job_there(
        run: Run, texts: Path, monkeypatch: pytest.MonkeyPatch, stage: str, step: str) -> None:
    """The tasks of the next stage, which would fail here, do not begin."""
    whole = getattr(curate, stage)

    def loses(task: Any) -> Any:
        result = whole(task)
        books = result.clean if stage == "read_documents" else result.dedup if stage == "sort_partition" else result.step
        books.given["documents"] -= 1
        return result

    def next_stage(task: Any) -> Any:
        raise InputError("the next stage has begun")

    following: dict[str, tuple[Any, str]] = {"read_documents": (curate, "sort_partition"), "sort_partition": (curate, "refine_partition"),
                                             "refine_partition": (shards, "make_tokenizer")}
    monkeypatch.setattr(curate, stage, loses)
    monkeypatch.setattr(*following[stage], next_stage)
    with pytest.raises(CorpusError, match=rf"step {step}: the accounts do not balance: .* documents in, .* out, .* rejected"):
        run(texts, dedup={"fuzzy": {}})


def test_a_corpus_with_nothing_in_it_is_an_error_that_says_why_and_keeps_the_samples(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_bytes(b"\xff")
    (folder / "b.txt").write_bytes(b"")
    with pytest.raises(CorpusError, match="no document is left of 2: 1 not_utf8, 1 too_short"):
        run(folder)
    assert set(files_of(tmp_path / "store" / "corpora" / "words")) == {"rejects/not_utf8.jsonl", "rejects/too_short.jsonl"}


def test_text_that_fills_no_window_is_an_error_and_leaves_no_corpus(run: Run, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("few words")
    with pytest.raises(CorpusError, match=r"the .* tokens of the train split do not fill a window of 1024 \+ 1"):
        run(tmp_path / "a.txt", context=1024)
    assert not files_of(tmp_path / "store" / "corpora" / "words")


def test_a_field_that_no_record_has_is_an_error_with_the_nearest(run: Run, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"texts": "x"}\n' * 3)
    with pytest.raises(CorpusError, match=r"none of 3 records has the field 'text'; the first has texts; did you mean texts\?"):
        run(tmp_path / "a.jsonl")


def test_what_is_missing_is_found_before_anything_is_made(run: Run, tmp_path: Path, texts: Path) -> None:
    with pytest.raises(InputError, match=r"did you mean .*texts"):
        run(tmp_path / "text")
    with pytest.raises(InputError, match=r"tokenizer\.from"):
        run(texts, tokenizer={"from": str(tmp_path / "none")})
    assert not files_of(tmp_path / "store")


def test_a_small_corpus_holds_out_one_document_and_says_so(run: Run, texts: Path) -> None:
    shown = Records()
    result = run(texts, split={"val_fraction": 0.0001}, progress=shown)
    assert verify(result[""]).splits["val"].documents == 1 and "one is held out" in shown.text
    assert result["val_windows"] > 0
    assert run(texts, "none", split={"val_fraction": 0})["val_tokens"] == 0
    shown = Records()
    assert run(texts / "01.txt", "single", progress=shown)["val_tokens"] == 0
    assert "one document only" in shown.text


def test_a_given_tokenizer_makes_the_same_tokens_as_when_it_was_trained(run: Run, texts: Path) -> None:
    first = run(texts, "first")
    second = run(texts, "second", tokenizer={"from": str(Path(first[""], "tokenizer"))})
    shards = [{name: data for name, data in files_of(result[""]).items() if name.endswith((".arrow", "tokenizer.json"))}
              for result in (first, second)]
    assert shards[0] == shards[1]


def test_a_complete_corpus_is_kept_and_one_whose_source_changed_is_made_again(run: Run, texts: Path) -> None:
    first = run(texts)
    shard = Path(first[""], "train", "00000.arrow")
    made = shard.stat().st_mtime_ns
    shown = Records()
    assert run(texts, progress=shown) == first
    assert shard.stat().st_mtime_ns == made and "nothing to do" in shown.text
    (texts / "00.txt").write_text("Another text, " + document(90))
    second = run(texts)
    assert second["manifest_hash"] != first["manifest_hash"]
    shard.write_bytes(shard.read_bytes()[:-1])
    assert run(texts) == second
    verify(second[""])


def test_a_disk_that_fills_while_a_shard_is_written_leaves_no_corpus_and_the_next_run_makes_it_whole(
        run: Run, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(texts, "whole")

    def on_a_full_disk(task: Any) -> Any:                  # runs in a worker: its files may not grow beyond 1,000 bytes
        import resource

        from distlm.corpus.pack import write_shard

        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000 if task.file == "train/00001.arrow" else before[0], before[1]))
        try:
            return write_shard(task)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    with monkeypatch.context() as patch:
        patch.setattr(shards, "write_shard", on_a_full_disk)
        with pytest.raises(StorageError, match=r"train/00001\.arrow: cannot write: .*; free space"):
            run(texts)
    corpus = tmp_path / "store" / "corpora" / "words"
    assert {path.name for path in corpus.iterdir() if not path.name.startswith(".scratch-")} == {"rejects"}
    with pytest.raises(InputError, match="no complete corpus"):
        read_manifest(corpus)
    shown = Records()
    assert run(texts, progress=shown)["manifest_hash"] == whole["manifest_hash"]
    assert "encode: 8 of 8 parts are done already" in shown.text and not list(corpus.glob(".scratch-*"))
