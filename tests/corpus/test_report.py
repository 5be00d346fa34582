"""A page that shows a corpus to a person, offline, whatever text the corpus holds."""

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from distlm.corpus.report import write_report
from distlm.errors import CorpusError, InputError
from tests.corpus.made import Doc, make, step
from tests.train.ranks import make_corpus

HOSTILE = "</pre><script>alert(1)</script><img src=x onerror=alert(2)>\" ' & <|endoftext|> \ud83d"
STEPS = [step("read", (60, 9000), (50, 8000), malformed=(10, 700), markup=(0, 300)),
         step("filter", (50, 8000), (45, 7000), **{"<b>short</b>": (5, 1000)}), step("dedup", (45, 7000), (41, 6500), duplicate=(4, 500))]


class Page(HTMLParser):
    """The elements of a page, with what a person reads."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "br", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


UNITS = ("documents", "bytes", "tokens")


def corpus(folder: Path, **more: Any) -> Path:
    docs = [Doc("x" * (1 << i), f"{'web' if i % 3 else 'code'}/{i}.{'py' if i % 2 else 'jsonl.gz'}", i,
                meta={"language": "de" if i < 4 else "en"} if i < 7 else {"language": "Python"} if i < 9 else {}, origin=2 if i < 7 else 0)
            for i in range(10)]
    counts = [("code", 4, 585, 589), ("code", 6, 438, 444), ("other", 1, 1, 2)]      # two sources of one name
    sources = [{"name": name, "format": "auto", "text_key": "text", "files": 4, "bytes": 100, "xxh3": "00",
                "splits": {"train": {"documents": documents, "bytes": size, "tokens": tokens}, "val": dict.fromkeys(UNITS, 0)}}
               for name, documents, size, tokens in counts]
    sources[0]["code"] = True
    docs.append(Doc("y", HOSTILE.replace("/", "").encode("utf-8", "ignore").decode()))
    made = make(folder, docs, steps=STEPS, sources=sources, **more)
    (made / "rejects").mkdir()
    place = {"source": HOSTILE, "origin": 1}
    line = {**place, "record": 3, "bytes": 70, "detail": HOSTILE, "text": HOSTILE, "same_as": {**place, "record": 1}}
    (made / "rejects" / "malformed.jsonl").write_text((json.dumps(line) + "\n") * 9)
    members = [{**place, "record": i, "id": f"id-{i}<script>", "bytes": 70, **({"similarity": 0.75} if i else {}),
                **({"text": f"{HOSTILE} side {i}"} if i < 2 else {})} for i in range(3)]
    clusters = [{"step": "dedup", "documents": 40, "members": members[:1]}, {"step": "fuzzy", "documents": 2, "members": members[:2]},
                {"step": "fuzzy", "documents": 1234, "members": members}]
    (made / "duplicates.jsonl").write_text("".join(json.dumps(cluster) + "\n" for cluster in clusters))
    return made


@pytest.fixture
def page(tmp_path: Path) -> Page:
    made = corpus(tmp_path / "<i>name", fuzzy={"clusters": 1234, "largest": {"size": 17}}, redactions={"email": 3},
                  decontamination={"<u>mmlu</u>": {"texts": 14042, "skipped": 5, "ngrams": 800000, "found": 321, "documents": 77}},
                  languages={name: {"documents": documents, "unwanted": unwanted}
                             for name, documents, unwanted in (("", 1, 1), ("fr", 20, 0), ("nl", 3, 2))},
                  parameters={"clean": {"min_chars": HOSTILE}})
    file = write_report(made)
    assert file == made / "report.html"
    return Page(file.read_text(encoding="utf-8"))


def test_hostile_text_is_text(page: Page) -> None:
    assert not {"script", "img", "i", "u"} & set(page.tags)
    assert page.tags.count("b") == 6 + 3                   # the facts, what was kept, and no reason's
    assert page.open == [] and "<script>alert(1)</script>" in page.text and "<b>short</b>" in page.text and "<i>name" in page.text
    assert not [name for name, _ in page.attributes if name.startswith("on")]


def test_nothing_is_fetched_from_anywhere(page: Page) -> None:
    assert not {"link", "script", "iframe", "object", "svg", "base"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name in ("src", "href", "srcset")]
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in page.attributes


def test_the_page_says_what_the_manifest_and_the_documents_say(page: Page) -> None:
    for text in ("input 60 9.00 kB", "read 50 −10 8.00 kB", "dedup 41 −4 6.50 kB", "malformed 10 700 read", "markup 0 300 read",
                 "clusters 1,234", "largest.size 17", "email 3", "<u>mmlu</u> 14,042 5 800,000 321 77", "512 B – 1 KiB 1", "8 B – 16 B 1",
                 "Languages that the sources name de 4 57.1 % en 3 42.9 % Programming languages Python 2 100.0 % File",
                 "fr 20 83.3 % nl 3 12.5 % 2 unwanted unknown 1 4.2 % 1 unwanted Languages that",
                 ".jsonl 5 45.5 %", ".py 5 45.5 %", "kept: ",
                 "code 589 4 documents 585 B 0.99 bytes per token", "code (2) 444 6 documents 438 B 0.99 bytes per token"):
        assert text in page.text, text
    assert page.text.count(" of code (2), record 3, 70 B") == 6              # of nine samples
    for first, second in (("malformed 10", "<b>short</b> 5"), ("<b>short</b> 5", "duplicate 4"), ("de 4", "en 3")):
        assert page.text.index(first) < page.text.index(second)


def test_clusters_are_shown_near_ones_first_the_largest_first_with_what_is_kept_and_two_texts_side_by_side(page: Page) -> None:
    near, small, equal = (page.text.index(text) for text in ("1,234 documents, nearly equal", "2 documents, nearly equal",
                                                             "40 documents, equal"))
    assert near < small < equal
    shown = page.text[near:small]
    assert "of code (2), record 0 id-0<script> 70 kept" in shown and "record 2 id-2<script> 70 0.75 and 1,231 more" in shown
    assert shown.count("side 0") == shown.count("side 1") == 1 and "more" not in page.text[small:equal]


def test_equal_corpora_have_equal_pages_and_another_has_another(tmp_path: Path) -> None:
    pages = [write_report(corpus(tmp_path / folder / "c", **more)).read_bytes()
             for folder, more in (("a", {}), ("b", {}), ("d", {"code": "0.2.0"}))]
    assert pages[0] == pages[1] != pages[2]
    assert str(tmp_path).encode() not in pages[0]
    assert write_report(tmp_path / "a" / "c").read_bytes() == pages[0]


def test_a_corpus_without_documents_steps_or_rejects_has_a_page_too(tmp_path: Path) -> None:
    page = Page(write_report(make_corpus(tmp_path / "old")).read_text())
    assert "Length of documents" not in page.text and "Splits" in page.text and "bytes per token" in page.text
    empty = make(tmp_path / "empty", [])
    assert Page(write_report(empty).read_text()).open == []


def test_what_cannot_be_read_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no complete corpus"):
        write_report(tmp_path)
    made = corpus(tmp_path / "c")
    (made / "rejects" / "malformed.jsonl").write_text("{\n")
    with pytest.raises(CorpusError, match=r"malformed\.jsonl: the samples cannot be read"):
        write_report(made)
    (made / "rejects" / "malformed.jsonl").unlink()
    (made / "documents.parquet").write_bytes(b"PAR1")
    with pytest.raises(CorpusError, match=r"documents\.parquet: cannot be read"):
        write_report(made)
