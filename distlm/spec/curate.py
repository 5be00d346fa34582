"""Which documents of a corpus are kept, and how they are cleaned: the sections `clean`, `filter`, `dedup` and `decontaminate`."""

import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from distlm.spec.base import Part, Rule, without_effect


class Boilerplate(Part):
    """Lines that many documents of the whole corpus hold leave all of them. Counted when duplicates are gone, and near-duplicates where
    `dedup.fuzzy` drops them: without it, a text of which there are so many near-copies is taken for boilerplate."""

    min_documents: Annotated[int, Field(ge=2)] = 10
    """A line that so many documents hold is boilerplate."""
    min_fraction: Annotated[float, Field(ge=0, le=1)] = 0
    """The share of all documents that must hold it besides."""
    min_chars: Annotated[int, Field(ge=1)] = 10
    """Shorter lines stay. White space counts as one space, and not at the ends."""
    max_chars: Annotated[int, Field(ge=1)] = 300
    """Longer lines stay."""
    min_words: Annotated[int, Field(ge=0)] = 3
    """Lines of fewer words, which are runs of letters, stay."""
    code: bool = False
    """Whether lines that look like source code go too, such as comments, imports and whatever has the signs of a program."""

    @model_validator(mode="after")
    def _some(self) -> "Boilerplate":
        if self.min_chars > self.max_chars:
            raise Rule("min_chars", f"{self.min_chars} is above max_chars {self.max_chars}, and no line is both; give less")
        return self


class Clean(Part):
    """What every document passes before it is kept."""

    unicode: Literal["NFC", "NFKC", "none"] = "NFC"
    """The Unicode normal form of the text."""
    control_characters: Literal["remove", "keep"] = "remove"
    """Whether control characters other than tab and line feed are removed."""
    fix_encoding: bool = False
    """Whether text that was decoded wrongly is mended by ftfy; needs `pip install distlm[text]`."""
    whitespace: Literal["keep", "trim", "collapse"] = "keep"
    """trim: none at the ends of lines and of the document; collapse: besides, no two spaces and no two empty lines in a row."""
    redact: tuple[Literal["email", "ip", "phone", "card", "secret"], ...] = ()
    """What is replaced by a mark of its kind, such as `<|email|>`: e-mail and public IP addresses, telephone and payment card numbers
    (those that Luhn's check accepts), keys and tokens of the common shapes."""
    boilerplate: Boilerplate | None = None
    """Lines that many documents hold, such as menus and notices; default: they stay."""
    min_chars: Annotated[int, Field(ge=1)] = 1
    """Shorter documents are rejected, with the reason `too_short`. Judged before boilerplate and repeated paragraphs go."""
    max_document_bytes: Annotated[int, Field(ge=1)] = 10_000_000
    """Longer documents are rejected unread, with the reason `too_long`."""


class Language(Part):
    """Only documents in some languages are kept."""

    keep: Annotated[tuple[str, ...], Field(min_length=1)]
    """ISO 639-1 codes, such as en or de."""
    min_confidence: Annotated[float, Field(ge=0, le=1)] = 0.65
    """Less is rejected as well."""
    model: str | None = None
    """A fastText model's file. Default: py3langid, which `pip install distlm[text]` brings."""


class License(Part):
    """Only documents under some licences are kept. A document has one where its source has `code: true`, or keeps a field `license`."""

    keep: Annotated[tuple[str, ...], Field(min_length=1)]
    """SPDX ids, such as MIT or Apache-2.0, whose case does not count. Of an expression, one side of an OR and both of an AND must be
    among them; else the document is rejected with the reason `license`."""
    keep_unknown: bool = False
    """Whether documents without a known licence stay; else they are rejected with the reason `no_license`."""


class Filter(Part):
    """Which documents are good enough. Each rule has the thresholds of its publication."""

    rules: tuple[Literal["gopher_quality", "gopher_repetition", "c4", "fineweb", "code"], ...] = ()
    """In this order; a document is rejected with the reason of the first rule that it breaks, such as `gopher_short_words`."""
    language: Language | None = None
    """Default: all."""
    license: License | None = None
    """Default: any."""
    min_words: Annotated[int | None, Field(ge=0)] = None
    """Fewer words are rejected."""
    max_words: Annotated[int | None, Field(ge=1)] = None
    """More words are rejected."""
    function: Annotated[str | None, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")] = None
    """A function of yours, `module:name`, that is given the text and returns None or the reason of a rejection."""
    mode: Literal["drop", "annotate"] = "drop"
    """annotate: documents stay, and the reasons stand beside them in `documents.parquet`."""
    annotate: tuple[Literal["gopher_quality", "gopher_repetition", "c4", "fineweb", "code", "language", "license", "min_words", "max_words",
                            "function"], ...] = ()
    """Rules that only annotate, whatever the mode: what they say is counted and stands beside documents that no other rule drops."""

    @model_validator(mode="after")
    def _annotating(self) -> "Filter":
        if self.mode == "annotate":
            without_effect(self, "beside mode: annotate", "annotate")
        return self

    def asks(self, rule: str) -> bool:
        """Whether the rule of this name, as `annotate` has it, is in use."""
        return rule in self.rules or getattr(self, rule, None) is not None


class Fuzzy(Part):
    """Near-duplicates by MinHash (Broder 1997) in bands of rows: the keeper of each cluster is the first in the corpus' order."""

    ngram_words: Annotated[int, Field(ge=1, le=20)] = 5
    """Words of a shingle."""
    bands: Annotated[int, Field(ge=1, le=256)] = 14
    """Two documents are compared where one band of their signatures agrees."""
    rows: Annotated[int, Field(ge=1, le=64)] = 8
    """Hashes of a band. Documents of Jaccard similarity s meet with the probability 1 - (1 - s^rows)^bands."""
    min_similarity: Annotated[float | None, Field(gt=0, le=1)] = None
    """Documents that meet are duplicates from this Jaccard similarity of their shingles on. Default: (1 / bands)^(1 / rows)."""


class Dedup(Part):
    """Which documents are kept once. A plain `exact`, `fuzzy` or `none` stands for the default settings of each."""

    exact: bool = True
    """Documents of equal cleaned text."""
    fuzzy: Fuzzy | None = None
    """Documents that are nearly equal; default: kept."""
    paragraphs: Annotated[int | None, Field(ge=1)] = None
    """Paragraphs of at least this many characters are kept in the first document only; default: all are kept."""


DEDUPS: dict[str, dict[str, Any]] = {"exact": {}, "fuzzy": {"fuzzy": {}}, "none": {"exact": False}}


def dedup_of(value: Any) -> Any:
    """What a word of DEDUPS stands for."""
    if isinstance(value, str) and value not in DEDUPS:
        raise Rule("", f"{value!r} is none of {', '.join(DEDUPS)}")
    return DEDUPS[value] if isinstance(value, str) else value


SET_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,59}")


class Decontaminate(Part):
    """Documents that hold a part of an evaluation text are rejected, and counted for each evaluation set."""

    against: Annotated[dict[str, str], Field(min_length=1)]
    """Evaluation sets: a name and a file or folder, text, html, WARC, jsonl, parquet, or JSON that is an array of records."""
    text_keys: Annotated[tuple[str, ...], Field(min_length=1)] = ("text",)
    """The fields of records whose texts count."""
    ngram_words: Annotated[int, Field(ge=3, le=50)] = 13
    """Words in a row, in lower case and without punctuation, that are a hit (Brown et al. 2020, appendix C)."""

    @field_validator("against")
    @classmethod
    def _names(cls, against: dict[str, str]) -> dict[str, str]:
        for name in against:                               # of a reason, and so of a file in rejects/
            if not SET_NAME.fullmatch(name):
                raise Rule("", f"{name!r} is no name of a set; letters, digits, '.', '_' and '-', starting with a letter or digit, "
                               "60 at most")
        return against
