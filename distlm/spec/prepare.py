"""`kind: prepare`: from raw text to a checksummed, tokenized corpus."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from distlm.spec.base import Job, Part, Rule, Seed, without_effect


class Source(Part):
    """Where text comes from. A plain string in a spec stands for `{path: ...}`."""

    path: Annotated[str, Field(min_length=1)]
    """A file, a folder, a glob, or the word `stdlib` for the sources of the running interpreter's standard library."""
    format: Literal["auto", "text", "jsonl", "parquet", "html", "warc"] = "auto"
    """How a file becomes documents: one per file (text, and the main text of html), per line (jsonl), per row (parquet) or per
    response (warc). auto: by the ending; html and warc need `pip install distlm[web]`."""
    text_key: str = "text"
    """The field or column that holds the text, in jsonl and parquet. Dots go into nested objects: `body.text`."""
    id_key: str | None = None
    """The field or column that holds the document's own id. Default: `id` where there is one."""
    keep: tuple[str, ...] = ()
    """Further fields or columns that stay with the document, such as url or license."""


def _source(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


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
    min_chars: Annotated[int, Field(ge=1)] = 1
    """Shorter documents are rejected, with the reason `too_short`."""
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


class Filter(Part):
    """Which documents are good enough. Each rule has the thresholds of its publication."""

    rules: tuple[Literal["gopher_quality", "gopher_repetition", "c4", "fineweb", "code"], ...] = ()
    """In this order; a document is rejected with the reason of the first rule that it breaks, such as `gopher_short_words`."""
    language: Language | None = None
    """Default: all."""
    min_words: Annotated[int | None, Field(ge=0)] = None
    """Fewer words are rejected."""
    max_words: Annotated[int | None, Field(ge=1)] = None
    """More words are rejected."""
    function: Annotated[str | None, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")] = None
    """A function of yours, `module:name`, that is given the text and returns None or the reason of a rejection."""
    mode: Literal["drop", "annotate"] = "drop"
    """annotate: documents stay, and the reasons stand beside them in `documents.parquet`."""


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


def _dedup(value: Any) -> Any:
    if isinstance(value, str) and value not in DEDUPS:
        raise Rule("", f"{value!r} is none of {', '.join(DEDUPS)}")
    return DEDUPS[value] if isinstance(value, str) else value


class Decontaminate(Part):
    """Documents that hold a part of an evaluation text are rejected, and counted for each evaluation set."""

    against: Annotated[dict[str, str], Field(min_length=1)]
    """Evaluation sets: a name and a file or folder, text, jsonl or parquet."""
    text_keys: Annotated[tuple[str, ...], Field(min_length=1)] = ("text",)
    """The fields of a jsonl or parquet file whose texts count."""
    ngram_words: Annotated[int, Field(ge=3, le=50)] = 13
    """Words in a row, in lower case and without punctuation, that are a hit (Brown et al. 2020, appendix C)."""


BYTES_VOCABULARY = 260
"""The 256 bytes and the special tokens: what every vocabulary that is made here begins with."""


class Tokenizer(Part):
    """Trained here (bpe), the 256 bytes themselves (bytes), or taken from a folder (from)."""

    train: Literal["bpe", "bytes"] | None = None
    """`bpe` trains a byte-level BPE on the training split; `bytes` uses one token per byte. Default: bpe."""
    vocab_size: Annotated[int, Field(ge=BYTES_VOCABULARY, le=1_000_000)] = 4096
    """Tokens of the vocabulary that is trained, special tokens included."""
    sample_bytes: Annotated[int, Field(ge=1)] = 50_000_000
    """Bytes of the training split, chosen by content hash, that the vocabulary is learned from."""
    source: Annotated[str | None, Field(alias="from")] = None
    """A folder with a tokenizer.json."""

    @model_validator(mode="after")
    def _one(self) -> "Tokenizer":
        if self.train and self.source:
            raise Rule("train", "a tokenizer is either trained or taken from a folder: give train or from, not both")
        if self.source or self.train == "bytes":
            without_effect(self, f"beside {'from' if self.source else 'train: bytes'}", "vocab_size", "sample_bytes")
        return self


class Split(Part):
    """Documents are split by the hash of their content, so that the split never moves when others are added."""

    val_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.02
    """The share of documents that are held out for validation."""
    test_fraction: Annotated[float, Field(ge=0, lt=1)] = 0
    """The share that is held out for a last test, which training never reads."""

    @model_validator(mode="after")
    def _some_left(self) -> "Split":
        if self.val_fraction + self.test_fraction >= 1:
            raise Rule("test_fraction", f"{self.test_fraction} and val_fraction {self.val_fraction} leave nothing to train on")
        return self


class PrepareSpec(Job):
    """From raw text to a corpus."""

    kind: Literal["prepare"] = "prepare"
    """The kind of the job."""
    sources: Annotated[list[Annotated[Source, BeforeValidator(_source)]], Field(min_length=1)]
    """The texts, in any order: equal texts give an equal corpus."""
    clean: Clean = Clean()
    """Cleaning and length limits."""
    filter: Filter = Filter()
    """Which documents are good enough."""
    decontaminate: Decontaminate | None = None
    """Evaluation texts that must not be in the corpus."""
    dedup: Annotated[Dedup, BeforeValidator(_dedup)] = Dedup()
    """Duplicates."""
    split: Split = Split()
    """Training and validation."""
    tokenizer: Tokenizer = Tokenizer()
    """How text becomes tokens."""
    context: Annotated[int, Field(ge=8, le=1_048_576)] = 256
    """Predicted tokens per window; a window holds one token more."""
    shard_windows: Annotated[int, Field(ge=1)] = 4096
    """Windows per shard file."""
    workers: Annotated[int | None, Field(ge=1)] = None
    """Parallel tasks; default: as many as the cluster has CPUs. It does not change the result."""
    seed: Seed = 0
    """Orders the documents."""
