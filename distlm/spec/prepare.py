"""`kind: prepare`: from raw text to a checksummed, tokenized corpus."""

import re
import unicodedata
from typing import Annotated, Any, Literal, TypeVar

import jinja2
from pydantic import BeforeValidator, Field, field_serializer, field_validator, model_validator

from distlm.spec.base import Job, Overriding, Part, Rule, Seed, without_effect
from distlm.spec.curate import Clean, Decontaminate, Dedup, Filter, dedup_of

Section = TypeVar("Section", bound=Part)


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


class SourceSplit(Split):
    """What is given here holds for the source in place of the job's `split`. A plain `train`, `val` or `test` stands for `{all: ...}`."""

    all: Literal["train", "val", "test"] | None = None
    """The split of the whole source, such as a validation set that is given. Of equal and nearly equal texts, that of a source which is
    held out as a whole is kept, whatever the files' order."""

    @model_validator(mode="after")
    def _one(self) -> "SourceSplit":
        if self.all:
            without_effect(self, f"beside all: {self.all}", "val_fraction", "test_fraction")
        return self


WHOLE: dict[str, tuple[float, float]] = {"train": (0.0, 0.0), "val": (1.0, 0.0), "test": (0.0, 1.0)}
"""The fractions of validation and test of a source that is of one split."""


def _source_split(value: Any) -> Any:
    return {"all": value} if isinstance(value, str) else value


class Source(Part):
    """Where text comes from. A plain string in a spec stands for `{path: ...}`."""

    path: Annotated[str, Field(min_length=1)]
    """A file, a folder or a glob; the same in an object store, `s3://bucket/path` or `gs://bucket/path`; or the word `stdlib` for the
    sources of the running interpreter's standard library."""
    format: Literal["auto", "text", "jsonl", "parquet", "html", "warc", "docstrings"] = "auto"
    """How a file becomes documents: one per file (text, and the main text of html), per line (jsonl), per row (parquet) or per
    response (warc). auto: by the ending; html and warc need `pip install distlm[web]`. docstrings: of Python sources, a conversation
    per function that has a docstring, whose code is what the user says and whose docstring is the answer."""
    text_key: str = "text"
    """The field or column that holds the text, in jsonl and parquet. Dots go into nested objects: `body.text`."""
    id_key: str | None = None
    """The field or column that holds the document's own id. Default: `id` where there is one."""
    keep: tuple[str, ...] = ()
    """Further fields or columns that stay with the document, such as url or license."""
    code: bool = False
    """Whether text files keep their path, their language by the file's name, and the SPDX id of their licence: by a tag in the head of the
    text, else by the nearest LICENSE, COPYING or NOTICE file of the source; empty where it is not known. Every folder of the source is
    looked into for that, before the job begins."""
    split: Annotated[SourceSplit | None, BeforeValidator(_source_split)] = None
    """Another split than the job's for this source: what is not given is as in the job's. Of equal texts, the one that is kept decides. A
    plain `train`, `val` or `test` stands for a section with all."""
    clean: Annotated[Clean | None, Overriding] = None
    """The keys of the job's `clean` that are others for this source. `boilerplate: null` leaves its lines alone."""
    filter: Annotated[Filter | None, Overriding] = None
    """The keys of the job's `filter` that are others for this source."""
    weight: Annotated[float, Field(gt=0)] = 1
    """The share of the source's documents that is kept, at most 1: chosen by the hash of the cleaned text, so that a greater share has all
    documents of a smaller one. The rest is rejected with the reason `sampled_out`. What is to be seen more than once is that of a run and
    not of a corpus: a training mixture has `weight` and `epochs`."""

    @model_validator(mode="after")
    def _text(self) -> "Source":
        if self.format not in ("auto", "text"):
            without_effect(self, f"beside format: {self.format}", "code")
        return self

    @field_validator("weight")
    @classmethod
    def _share(cls, weight: float) -> float:
        if weight > 1:
            raise Rule("", f"{weight:g} is above 1, and a corpus holds a document once; what is to be seen more than once belongs to a "
                           "training mixture: prepare it as a corpus of its own, and give that a weight or epochs in corpus.mix")
        return weight

    @field_serializer("split", "clean", "filter")
    def _given_alone(self, own: Part | None) -> Any:
        """What is not given is the job's, so that it is not to be written as if it were given."""
        return own and own.model_dump(mode="json", by_alias=True, exclude_unset=True)


def _source(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


SPECIAL_TOKENS = ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>")
"""Of every vocabulary that is made here: the end of a document, and the roles of a conversation."""
BYTES_VOCABULARY = 256 + len(SPECIAL_TOKENS)
"""The 256 bytes and the special tokens: what every vocabulary that is made here begins with."""


GENERATION = re.compile(r"{%-?\s*(?:end)?generation\s*-?%}")
"""Around what the model says, in templates that tell it: a tag of transformers' own."""


class Tokenizer(Part):
    """Trained here (bpe), the 256 bytes themselves (bytes), or taken from a folder (from)."""

    train: Literal["bpe", "bytes"] | None = None
    """`bpe` trains a byte-level BPE on the training split; `bytes` uses one token per byte. Default: bpe."""
    vocab_size: Annotated[int, Field(ge=BYTES_VOCABULARY, le=1_000_000)] = 4096
    """Tokens of the vocabulary that is trained, special tokens included."""
    sample_bytes: Annotated[int, Field(ge=1)] = 50_000_000
    """Bytes of the training split, chosen by content hash, that the vocabulary is learned from."""
    special_tokens: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Further special tokens, such as `<|tool|>`, beside the end token and the three roles; text that spells one stays text."""
    chat_template: Annotated[str, Field(min_length=1)] | None = None
    """How transformers writes a conversation, in Jinja, also in place of a given tokenizer's own. Default: the given tokenizer's, else each
    role's token and its text, with the end token after an answer."""
    source: Annotated[str | None, Field(alias="from")] = None
    """A folder with a tokenizer.json."""

    @model_validator(mode="after")
    def _one(self) -> "Tokenizer":
        if self.train and self.source:
            raise Rule("train", "a tokenizer is either trained or taken from a folder: give train or from, not both")
        if self.source:
            without_effect(self, "beside from", "special_tokens")
        names = [*SPECIAL_TOKENS, *self.special_tokens]
        for place, token in enumerate(self.special_tokens):
            if not token.strip():
                raise Rule(f"special_tokens.{place}", f"{token!r} is white space; give a text that stands for nothing else")
            if len(token) == 1 and ord(token) < 0x144 and token.isprintable():         # distlm.corpus.bpe.byte_characters
                raise Rule(f"special_tokens.{place}", f"{token!r} is the name of a byte in every vocabulary that is made here, and text "
                                                      "would become it; give two characters or more")
            if token in names[:len(SPECIAL_TOKENS) + place]:
                raise Rule(f"special_tokens.{place}", f"{token!r} is there already; the end token and the roles need not be given"
                           if token in SPECIAL_TOKENS else f"{token!r} is given twice; leave one out")
        if not self.source and self.train != "bytes" and self.vocab_size < 256 + len(names):
            raise Rule("vocab_size", f"{self.vocab_size} is less than 256 bytes and {len(names)} special tokens; give "
                                     f"{256 + len(names)} at least")
        if self.chat_template is not None:
            try:
                jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(GENERATION.sub("", self.chat_template))
            except jinja2.TemplateSyntaxError as error:
                raise Rule("chat_template", f"line {error.lineno} is no Jinja: {error.message}") from None
            except Exception as error:                     # such as of parentheses without end
                raise Rule("chat_template", f"cannot be read as Jinja: {type(error).__name__}: {error}") from None
        if self.source or self.train == "bytes":
            without_effect(self, f"beside {'from' if self.source else 'train: bytes'}", "vocab_size", "sample_bytes")
        return self


class Pack(Part):
    """How documents fill windows."""

    method: Literal["contiguous", "best_fit"] | None = None
    """contiguous: one after the other, cut wherever a window ends. best_fit: a document that fits a window is never cut; windows are
    filled up with the end token, which gives no loss (Ding et al. 2024, arXiv:2404.10830). Default: best_fit for conversations, else
    contiguous."""


ROLES = ("system", "user", "assistant")
"""Those of every conversation; what the last one says is the answer."""


class Conversations(Part):
    """Records are conversations, for fine-tuning. The tokenizer's chat template writes them as tokens."""

    messages_key: str = "messages"
    """The field or column with the list of messages. Dots go into nested objects."""
    role_key: str = "role"
    """The key of a message that says who speaks."""
    content_key: str = "content"
    """The key of a message that holds what is said."""
    roles: dict[str, Annotated[str, Field(min_length=1)]] = {}
    """What the template calls the roles of the records: `{human: user, gpt: assistant}`. system, user and assistant are known as they are;
    a message of any other role rejects its conversation."""
    ignore_keys: tuple[str, ...] = ("id", "name")
    """Further keys of a message that say nothing to train on, such as timestamp. One that has any other, with a value, rejects its
    conversation with the reason `unknown_key`: thoughts, weights or what else it holds would be lost in silence."""
    prompt_key: str | None = None
    """The field with what a user asks, where records have a question and an answer and no list of messages."""
    completion_key: str | None = None
    """The field with the answer to it."""
    chosen_key: str | None = None
    """The field with the better of two answers, where records are preferences (`objective: dpo`): a text beside a `prompt_key` that leads
    to a text or to messages, or messages, which may begin with the prompt."""
    rejected_key: str | None = None
    """The field with the worse one."""
    loss: Literal["assistant", "all"] = "assistant"
    """assistant: the answers give loss, each with the token that ends it, but for empty ones. all: every token does."""
    too_long: Literal["reject", "split"] = "reject"
    """What becomes of a conversation that is longer than a window. reject: it is rejected with the reason `longer_than_window`. split: it
    is cut behind answers into parts that fit, each with the system turn before it; what does not fit by itself is rejected."""

    @model_validator(mode="after")
    def _pair(self) -> "Conversations":
        if (self.chosen_key is None) != (self.rejected_key is None):
            raise Rule("chosen_key" if self.chosen_key is None else "rejected_key", "chosen_key and rejected_key are the two answers of a "
                                                                                    "preference; give both")
        if self.pairs:
            without_effect(self, "beside chosen_key", "completion_key", "messages_key", "loss", "too_long")
            return self
        if (self.prompt_key is None) != (self.completion_key is None):
            raise Rule("prompt_key" if self.prompt_key is None else "completion_key", "prompt_key and completion_key are a question and "
                                                                                      "its answer; give both")
        if self.prompt_key:
            without_effect(self, "beside prompt_key", "messages_key", "role_key", "content_key", "roles", "ignore_keys")
        return self

    @property
    def pairs(self) -> bool:
        """Whether records are preferences: a prompt and two answers."""
        return self.chosen_key is not None

    @property
    def keys(self) -> tuple[str, ...]:
        """The fields that a record must have."""
        if self.chosen_key and self.rejected_key:
            return (*([self.prompt_key] if self.prompt_key else []), self.chosen_key, self.rejected_key)
        return (self.prompt_key, self.completion_key) if self.prompt_key and self.completion_key else (self.messages_key,)


def label_name(value: Any) -> Any:
    """What a label of this value is called: a text without white space at its ends in Unicode's form NFC, that of a whole number or a truth
    value. What is none stays as it is."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int) or (isinstance(value, float) and value.is_integer()):        # such as of a column that had none in some row
        return str(int(value))
    return unicodedata.normalize("NFC", value.strip()) if isinstance(value, str) else value


def _label_names(value: Any) -> Any:
    return [label_name(one) for one in value] if isinstance(value, list) else value


class Labels(Part):
    """Documents have labels, for classification. Each is a window of its own, filled up with the end token, and no two equal texts have
    two labels: of duplicates the first is kept, and the others are counted as `duplicate_other_label` where their labels differ."""

    label_key: str = "label"
    """The field or column with the label, a text, a whole number or a truth value. Dots go into nested objects. A document without one is
    rejected with the reason `no_label`."""
    multiple: bool = False
    """Whether it is a list, of any number of labels."""
    names: Annotated[list[Annotated[str, Field(min_length=1)]] | None, BeforeValidator(
        _label_names, json_schema_input_type=Annotated[list[str | int | bool], Field(min_length=1)] | None)] = None
    """The labels that there are, by their numbers, such as those of a classifier that is to be evaluated or trained further. A document
    with another is rejected with the reason `unknown_label`, and there may be a label that no document has. Default: those of the training
    split, in their order."""
    too_long: Literal["reject", "cut"] = "reject"
    """What becomes of a document that is longer than a window. reject: it is rejected with the reason `longer_than_window`. cut: its
    beginning is kept, and how many were cut is counted."""

    @model_validator(mode="after")
    def _told_apart(self) -> "Labels":
        if self.names is None:
            return self
        if twice := next((name for i, name in enumerate(self.names) if name in self.names[:i]), None):
            raise Rule("names", f"{twice} is there twice; give it once")
        if len(self.names) < (least := 1 if self.multiple else 2):
            raise Rule("names", f"{len(self.names)} leaves nothing to tell apart; give {least} or more")
        return self


class PrepareSpec(Job):
    """From raw text to a corpus."""

    kind: Literal["prepare"] = "prepare"
    """The kind of the job."""
    sources: Annotated[list[Annotated[Source, BeforeValidator(_source)]], Field(min_length=1)]
    """The texts, in any order: equal texts give an equal corpus."""
    conversations: Conversations | None = None
    """How the records of all sources are conversations; default: they are texts."""
    labels: Labels | None = None
    """How the records of all sources have labels; default: they have none."""
    clean: Clean = Clean()
    """Cleaning and length limits."""
    filter: Filter = Filter()
    """Which documents are good enough."""
    decontaminate: Decontaminate | None = None
    """Evaluation texts that must not be in the corpus."""
    dedup: Annotated[Dedup, BeforeValidator(dedup_of)] = Dedup()
    """Duplicates."""
    split: Split = Split()
    """Training and validation."""
    tokenizer: Tokenizer = Tokenizer()
    """How text becomes tokens."""
    context: Annotated[int, Field(ge=8, le=1_048_576)] = 256
    """Predicted tokens per window; a window holds one token more."""
    pack: Pack = Pack()
    """How documents fill windows."""
    shard_windows: Annotated[int, Field(ge=1)] = 4096
    """Windows per shard file; with best_fit about so many, as each shard is packed by itself."""
    workers: Annotated[int | None, Field(ge=1)] = None
    """Parallel tasks; default: as many as the cluster has CPUs. It does not change the result."""
    seed: Seed = 0
    """Orders the documents."""

    @model_validator(mode="after")
    def _sources(self) -> "PrepareSpec":
        for i, source in enumerate(self.sources):
            own = source.clean.boilerplate if source.clean else None
            if own and own != self.clean.boilerplate:
                raise Rule(f"sources.{i}.clean.boilerplate", "lines are counted over the whole corpus; set it in clean, and give null here "
                                                             "where a source is to be let alone")
            if self.filtering(source).license and not source.code and "license" not in source.keep:
                raise Rule(f"sources.{i}", "filter.license asks for a license, and the documents of this source have none; set code: true "
                                           "for a tree of code, or keep: [license] for a field")
            words, where = self.filtering(source), f"sources.{i}.filter" if source.filter else "filter"
            if words.max_words is not None and (words.min_words or 0) > words.max_words:
                raise Rule(f"{where}.min_words", f"{words.min_words} is above max_words {words.max_words}, which rejects all; give less")
            chars, where = self.cleaning(source), f"sources.{i}.clean" if source.clean else "clean"
            if chars.min_chars > chars.max_document_bytes:
                raise Rule(f"{where}.min_chars", f"{chars.min_chars} is above max_document_bytes {chars.max_document_bytes}, which rejects "
                                                 "all; give less")
            if source.split is None:
                continue
            val, test = self.shares(source)
            if val + test >= 1 and not source.split.all:
                raise Rule(f"sources.{i}.split", f"val_fraction {val} and test_fraction {test}, of which the job's split gives one, leave "
                                                 "nothing to train on; split: val or split: test takes the whole source")
            if not self.dedup.exact:
                raise Rule(f"sources.{i}.split", "equal texts would be trained and validated on; drop them with dedup: exact")
        return self

    @model_validator(mode="after")
    def _annotating(self) -> "PrepareSpec":
        for where, section, sources in [("filter", self.filter, self.sources),
                                        *((f"sources.{i}.filter", one.filter, [one]) for i, one in enumerate(self.sources))]:
            for rule in section.annotate if section else ():
                if not any(self.filtering(source).asks(rule) for source in sources):
                    raise Rule(f"{where}.annotate", f"{rule} is no rule that is asked for; give it in the filter, or leave it out here")
        return self

    @model_validator(mode="after")
    def _turns(self) -> "PrepareSpec":
        if self.conversations and self.conversations.pairs and not self.dedup.exact:
            raise Rule("dedup.exact", "equal preferences would be trained and validated on; leave it out")
        docstrings = [i for i, source in enumerate(self.sources) if source.format == "docstrings"]
        if self.conversations is None:
            if docstrings:
                raise Rule(f"sources.{docstrings[0]}.format", "docstrings makes conversations; give conversations: {} beside sources")
            return self
        if len(docstrings) == len(self.sources):
            for key in ("messages_key", "role_key", "content_key", "roles", "ignore_keys", "prompt_key", "completion_key", "chosen_key"):
                if getattr(self.conversations, key) != Conversations.model_fields[key].default:
                    raise Rule(f"conversations.{key}", f"{getattr(self.conversations, key)} has no effect, as all sources are docstrings; "
                                                       "leave it out")
        for key, given in (("dedup.paragraphs", self.dedup.paragraphs), ("clean.boilerplate", self.clean.boilerplate)):
            if given is not None:
                raise Rule(key, "conversations are taken as a whole, and parts of a turn are not dropped; leave it out")
        if self.pack.method == "contiguous":
            raise Rule("pack.method", "contiguous windows would cut conversations; leave it out, or give best_fit")
        for i, source in enumerate(self.sources):
            if source.format not in ("auto", "jsonl", "parquet", "docstrings"):
                raise Rule(f"sources.{i}.format", f"{source.format} holds no conversations; give jsonl, parquet or docstrings")
            for key in ("text_key", "code", *(("id_key", "keep") if source.format == "docstrings" else ())):
                if getattr(source, key) != Source.model_fields[key].default:
                    raise Rule(f"sources.{i}.{key}", f"{getattr(source, key)} has no effect beside conversations; leave it out")
        return self

    @model_validator(mode="after")
    def _labelled(self) -> "PrepareSpec":
        if self.labels is None:
            return self
        if self.conversations:
            raise Rule("labels", "conversations have no labels; leave one of them out")
        if self.pack.method:
            raise Rule("pack.method", "a document with a label is a window of its own; leave it out")
        if not self.dedup.exact:
            raise Rule("dedup.exact", "equal texts might have two labels, in both splits; leave it out")
        for i, source in enumerate(self.sources):
            if source.format not in ("auto", "jsonl", "parquet"):
                raise Rule(f"sources.{i}.format", f"{source.format} holds no labels; give jsonl or parquet")
        return self

    @property
    def padded(self) -> bool:
        """Whether windows are filled up, and hold pieces of documents that are marked: packed by best-fit, or with labels."""
        return self.pack.method == "best_fit" or self.conversations is not None or self.labels is not None

    @property
    def packing(self) -> str:
        """What a padded window holds: what fits, a document with its label, or a pair of answers."""
        return "document" if self.labels else "pair" if self.conversations and self.conversations.pairs else "best_fit"

    def cleaning(self, source: Source) -> Clean:
        """What the source's documents pass."""
        return over(self.clean, source.clean)

    def filtering(self, source: Source) -> Filter:
        """What the source's documents are judged by."""
        return over(self.filter, source.filter)

    def shares(self, source: Source) -> tuple[float, float]:
        """Of the source's documents, what is for validation and for the last test."""
        own = source.split
        if own and own.all:
            return WHOLE[own.all]
        split = over(self.split, own)
        return split.val_fraction, split.test_fraction


def over(job: Section, own: Section | None) -> Section:
    """A section of the job with what a source gives of its own."""
    return job.model_copy(update={key: getattr(own, key) for key in own.model_fields_set}) if own else job
