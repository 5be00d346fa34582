"""Preferences from records to windows: a pair in each, loss on the answers alone, each reject under its reason, books that balance."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distlm.corpus.conversations import Refused, turns_of
from distlm.corpus.decode import Decoder
from distlm.corpus.inspect import documents, summary
from distlm.corpus.manifest import read_manifest
from distlm.corpus.stream import NO_LOSS, START, Windows
from distlm.corpus.verify import verify
from distlm.errors import SpecError
from distlm.spec import load_spec
from distlm.spec.prepare import Conversations
from distlm.storage import Storage

RULES = Conversations(prompt_key="prompt", chosen_key="chosen", rejected_key="rejected")
WHOLE = Conversations(chosen_key="chosen", rejected_key="rejected")
CONTEXT = 95


def said(*contents: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def answer(content: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": content}]


def test_prompts_and_answers_are_texts_or_messages() -> None:
    expected = [("user", "q"), ("+assistant", "good"), ("-assistant", "bad")]
    for values in (("q", "good", "bad"), (said("q"), answer("good"), answer("bad")), ("q", said("q", "good"), said("q", "bad"))):
        assert turns_of(values, RULES) == expected
    assert turns_of((said("q", "good"), said("q", "bad")), WHOLE) == expected
    history = turns_of((said("q", "a", "r", "good"), said("q", "a", "r", "bad")), WHOLE)
    assert history == [("user", "q"), ("assistant", "a"), ("user", "r"), ("+assistant", "good"), ("-assistant", "bad")]
    for reason, values in {"equal_answers": ("q", "same", "same"), "empty_answer": ("q", "good", " \n"),
                           "no_answer": ("q", said("q"), "bad"), "messages_no_list": (1, "a", "b"),
                           "unknown_role": ("q", [{"role": "robot", "content": "x"}], "b")}.items():
        with pytest.raises(Refused) as refused:
            turns_of(values, RULES)
        assert refused.value.reason == reason
    with pytest.raises(Refused, match="begin with no message that both have"):
        turns_of((answer("a"), answer("b")), WHOLE)


def test_pairs_become_windows_of_two_conversations(run: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    records: list[dict[str, Any]] = [{"id": f"{i}", "prompt": said(f"q{i}", "old", "go on"), "chosen": answer(f"good {i}"),
                                      "rejected": answer("bad, and longer")} for i in range(20)]
    records += [{"id": "equal", "prompt": "q", "chosen": "a", "rejected": "a"},
                {"id": "empty", "prompt": "q", "chosen": "", "rejected": "b"},
                {"id": "cleaned", "prompt": "q", "chosen": "a\0", "rejected": "a"}, {"id": "none", "prompt": "q", "chosen": "a"},
                {"id": "long", "prompt": "q" * 30, "chosen": "a" * 20, "rejected": "b" * 20}, {**records[0], "id": "again"}]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    made = run([str(path)], conversations={"prompt_key": "prompt", "chosen_key": "chosen", "rejected_key": "rejected"},
               context=CONTEXT, tokenizer={"train": "bytes"}, split={"val_fraction": 0.3}, shard_windows=8)
    corpus = Storage(tmp_path / "store").corpus("words")
    manifest = read_manifest(corpus)
    verify(corpus)
    assert manifest.pairs and manifest.data["conversations"]["pairs"] == 20 and manifest.data["pack"]["method"] == "pair"
    rejected = {"equal_answers": 2, "empty_answer": 1, "missing_field": 1, "longer_than_window": 1, "duplicate": 1}
    assert {reason: made[f"rejected.{reason}"] for reason in rejected} == rejected
    assert made["documents"] == 40 and dict(summary(corpus))["packing"].startswith("a pair of answers a window, ")
    seen = set()
    for split in ("train", "val"):
        windows, decoder = Windows(corpus, split), Decoder(manifest)
        assert len(windows) == manifest.splits[split].documents // 2
        places = windows.first(len(windows))
        for tokens, marks in zip(windows.read(*places), windows.marks(*places), strict=True):
            begin, middle = np.flatnonzero(marks & START)
            texts = [decoder.shown(tokens[part], marks[part] & NO_LOSS == 0) for part in (slice(begin, middle), slice(middle, None))]
            number = texts[0].split("<|user|>q")[1].split("<")[0]
            prompt = f"<|user|>q{number}<|assistant|>old<|endoftext|><|user|>go on<|assistant|>"
            assert texts[0] == f"{prompt}⟦good {number}<|endoftext|>⟧"
            assert texts[1].partition("⟧")[0] == f"{prompt}⟦bad, and longer<|endoftext|>", "and padding behind it"
            seen.add(number)
    assert len(seen) == 20
    assert [(one.part, one.shown.count("⟦")) for one in documents(corpus, ["7"])] == [(1, 1), (2, 1)]


@pytest.mark.parametrize("messages", [True, False], ids=["list<struct>", "string"])
def test_pairs_of_parquet_are_those_of_jsonl(messages: bool, run: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    """Columns of messages, whose structs have a field more that is null, or of texts, one of them of 64-bit offsets."""
    def answered(text: str | None) -> Any:
        return text if text is None or not messages else [{"role": "assistant", "content": text, "name": None}]

    records = [{"id": f"{i}", "prompt": said(f"q{i}") if messages else f"q{i}", "chosen": answered(f"good {i}"),
                "rejected": answered(f"bad {i}, and longer")} for i in range(20)]
    for name, chosen, rejected in (("equal", "a", "a"), ("empty", "", "b"), ("none", "a", None), ("long", "a" * 60, "b" * 60)):
        records.append({"id": name, "prompt": said("q") if messages else "q", "chosen": answered(chosen), "rejected": answered(rejected)})
    turn = pa.struct([("role", pa.string()), ("content", pa.large_string()), ("name", pa.string())])
    kinds = [pa.list_(turn)] * 3 if messages else [pa.string(), pa.large_string(), pa.string()]
    schema = pa.schema([("id", pa.string()), *zip(("prompt", "chosen", "rejected"), kinds, strict=True)])
    pq.write_table(pa.Table.from_pylist(records, schema), tmp_path / "pairs.parquet", row_group_size=7)
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    made = {ending: run([str(tmp_path / f"pairs.{ending}")], root=ending, context=CONTEXT, shard_windows=8,
                        conversations={"prompt_key": "prompt", "chosen_key": "chosen", "rejected_key": "rejected"},
                        tokenizer={"train": "bytes"}, split={"val_fraction": 0.3}) for ending in ("jsonl", "parquet")}
    corpora = {ending: Storage(tmp_path / ending).corpus("words") for ending in made}
    verify(corpora["parquet"])
    manifest = read_manifest(corpora["parquet"])
    assert manifest.pairs and manifest.data["conversations"]["pairs"] == 20 and manifest.splits["val"].windows > 0
    rejected = {"equal_answers": 1, "empty_answer": 1, "missing_field": 1, "longer_than_window": 1}
    assert all({reason: one[f"rejected.{reason}"] for reason in rejected} == rejected for one in made.values())
    assert manifest.data["splits"] == read_manifest(corpora["jsonl"]).data["splits"], "the same shards, to the byte"


def test_answers_that_the_template_makes_equal_are_refused(run: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    template = "{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim }}{{ eos_token }}{% endfor %}" \
               "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"q{i}", "chosen": "a", "rejected": "a  b" if i else " a"}) + "\n" for i in range(6)))
    made = run([str(path)], conversations={"prompt_key": "prompt", "chosen_key": "chosen", "rejected_key": "rejected"}, context=CONTEXT,
               tokenizer={"train": "bytes", "chat_template": template}, split={"val_fraction": 0.3})
    assert made["rejected.equal_answers"] == 1 and made["documents"] == 10


@pytest.mark.parametrize(("given", "message"), [
    ({"chosen_key": "a"}, "conversations.rejected_key: chosen_key and rejected_key are the two answers of a preference; give both"),
    ({"chosen_key": "a", "rejected_key": "b", "too_long": "split"}, "conversations.too_long: split has no effect beside chosen_key"),
    ({"chosen_key": "a", "rejected_key": "b", "completion_key": "c"}, "conversations.completion_key: c has no effect beside chosen_key")])
def test_what_cannot_be_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        load_spec({"kind": "prepare", "name": "p", "sources": ["a.jsonl"], "conversations": given})
