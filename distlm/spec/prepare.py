"""`kind: prepare`: from raw text to a checksummed, tokenized corpus."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from distlm.spec.base import Job, Part, Rule, Seed, without_effect


class Source(Part):
    """Where text comes from. A plain string in a spec stands for `{path: ...}`."""

    path: Annotated[str, Field(min_length=1)]
    """A file, a folder, a glob, or the word `stdlib` for the sources of the running interpreter's standard library."""
    format: Literal["auto", "text", "jsonl", "parquet"] = "auto"
    """How a file becomes documents: one per file (text), per line (jsonl) or per row (parquet). auto: by the ending."""
    text_key: str = "text"
    """The field or column that holds the text, in jsonl and parquet."""


def _source(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


class Clean(Part):
    """What every document passes before it is kept."""

    unicode: Literal["NFC", "NFKC", "none"] = "NFC"
    """The Unicode normal form of the text."""
    control_characters: Literal["remove", "keep"] = "remove"
    """Whether control characters other than tab and line feed are removed."""
    min_chars: Annotated[int, Field(ge=1)] = 1
    """Shorter documents are rejected, with the reason `too_short`."""
    max_document_bytes: Annotated[int, Field(ge=1)] = 10_000_000
    """Longer documents are rejected unread, with the reason `too_long`."""


class Tokenizer(Part):
    """Trained here (bpe), the 256 bytes themselves (bytes), or taken from a folder (from)."""

    train: Literal["bpe", "bytes"] | None = None
    """`bpe` trains a byte-level BPE on the training split; `bytes` uses one token per byte. Default: bpe."""
    vocab_size: Annotated[int, Field(ge=260, le=1_000_000)] = 4096
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


class PrepareSpec(Job):
    """From raw text to a corpus."""

    kind: Literal["prepare"] = "prepare"
    """The kind of the job."""
    sources: Annotated[list[Annotated[Source, BeforeValidator(_source)]], Field(min_length=1)]
    """The texts, in any order: equal texts give an equal corpus."""
    clean: Clean = Clean()
    """Cleaning and length limits."""
    dedup: Literal["exact", "none"] = "exact"
    """Whether documents of equal cleaned text are kept once."""
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
