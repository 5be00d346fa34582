"""Books that do not balance are found, and the error says where."""

import json
from typing import Any

import pytest

from distlm.corpus.accounts import check_balance, check_sources
from distlm.errors import CorpusError


def test_accounts_that_do_not_balance_are_an_error_that_says_where() -> None:
    def step(name: str, taken: int, given: int, lost: int, documents: int = 0) -> dict[str, Any]:
        return {"name": name, "in": {"documents": 5, "bytes": taken}, "out": {"documents": 5 - documents, "bytes": given},
                "rejected": {"reason": {"documents": documents, "bytes": lost}}}

    check_balance([step("read", 10, 9, 1), step("clean", 9, 10, -1)], "corpus")
    with pytest.raises(CorpusError, match=r"step clean: .* 9 bytes in, 9 out, 1 rejected"):
        check_balance([step("read", 10, 9, 1), step("clean", 9, 9, 1)], "corpus")
    with pytest.raises(CorpusError, match=r"step clean: .* 8 bytes in, but step read gave out 9"):
        check_balance([step("read", 10, 9, 1), step("clean", 8, 8, 0)], "corpus")
    with pytest.raises(CorpusError, match=r"step dedup: .* 5 documents in, but step read gave out 4"):
        check_balance([step("read", 10, 9, 1, documents=1), step("dedup", 9, 9, 0)], "corpus")


def test_what_of_each_source_is_in_each_split_adds_up_to_the_split() -> None:
    counts = {name: {"documents": 2 + i, "bytes": 20 + i, "tokens": 22 + i} for i, name in enumerate(("train", "val"))}
    data = {"sources": [{"name": "a", "splits": counts}], "splits": counts}
    check_sources(data, "c")
    for unit in ("documents", "bytes", "tokens"):
        wrong = json.loads(json.dumps(data))
        wrong["sources"][0]["splits"]["val"][unit] += 1
        with pytest.raises(CorpusError, match=f"split val: the accounts do not balance: the sources have .* {unit}, the split has"):
            check_sources(wrong, "c")
    check_sources(data | {"sources": [{"name": "old"}]}, "c")
