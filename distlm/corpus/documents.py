"""The first task: read files, clean and filter their documents, and put them on the scratch folder by the range of their order keys.

Every file that this writes has one Arrow record batch per partition, so that the next task finds its partition in each by number.
"""

import contextlib
import json
import pickle
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from distlm.corpus.accounts import SAMPLE_CHARS, Samples, Step, add
from distlm.corpus.conversations import Refused, clean_turns, without_system
from distlm.corpus.decontaminate import Evaluations, Found
from distlm.corpus.files import TextFile, find_files
from distlm.corpus.filters import Filters
from distlm.corpus.labels import labels_of
from distlm.corpus.read import Reader, Record
from distlm.corpus.split import HASH_BYTES, document_hash, is_sampled, order_key, partition
from distlm.corpus.tokenizer import check_given, check_template
from distlm.errors import CorpusError, InputError
from distlm.spec.curate import Clean, Filter
from distlm.spec.load import nearest
from distlm.spec.prepare import Conversations, Labels, PrepareSpec, Source
from distlm.storage import replacing
from distlm.text.clean import clean

SCHEMA = pa.schema([("key", pa.binary(HASH_BYTES)), ("hash", pa.binary(HASH_BYTES)), ("file", pa.int32()), ("origin", pa.int32()),
                    ("record", pa.int64()), ("id", pa.string()), ("meta", pa.string()), ("reasons", pa.list_(pa.string())),
                    ("text", pa.large_string()), ("turns", pa.string())])
"""`origin`: the place of the source in the spec. `meta`: JSON, empty where there is none.
`reasons`: what the filters say of a document that stays nevertheless. `turns`: of a conversation, whose is how much of the text, as
conversations.py writes it; else empty. `hash`: of the text, and of the turns where there are some."""
BUFFER_BYTES = 32 << 20
WAITING_BYTES = 1 << 20


@dataclass(frozen=True)
class Rules:
    """What the documents of a source pass."""

    clean: Clean
    weight: float
    filter: Filter


@dataclass(frozen=True)
class ReadTask:
    """Files, or ranges of them, that one task reads; `first` is the number of the first among all."""

    number: int
    first: int
    files: list[TextFile]
    rules: tuple[Rules, ...]
    """Of each source, by its place in the spec."""
    evaluations: Path | None
    """A pickle of Evaluations: too large to go along with each task."""
    seed: int
    partitions: int
    scratch: Path
    conversations: Conversations | None
    labels: Labels | None = None


@dataclass
class ReadResult:
    """What became of the files."""

    read: Step = field(default_factory=lambda: Step("read"))
    clean: Step = field(default_factory=lambda: Step("clean"))
    sample: Step = field(default_factory=lambda: Step("sample"))
    filter: Step = field(default_factory=lambda: Step("filter"))
    decontaminate: Step = field(default_factory=lambda: Step("decontaminate"))
    annotated: Counter[str] = field(default_factory=Counter)
    """Documents that stay although a filter has something to say of them, by reason."""
    languages: Counter[str] = field(default_factory=Counter)
    """Documents by the language that the filter found, and those among them that it does not keep."""
    unwanted: Counter[str] = field(default_factory=Counter)
    redactions: Counter[str] = field(default_factory=Counter)
    """What was redacted, by kind."""
    found: Found = field(default_factory=Found)
    """What the documents shared with evaluation texts."""
    kept: Counter[int] = field(default_factory=Counter)
    """Documents that go on, by the number of their file or range."""
    facts: list[dict[str, Any]] = field(default_factory=list)
    """Per file or range: number, bytes, xxh3, records."""
    samples: Samples = field(default_factory=Samples)
    objects: Counter[int] = field(default_factory=Counter)
    """Per source, the JSON objects and rows that were read, and those that have the text field."""
    with_key: Counter[int] = field(default_factory=Counter)
    keys: dict[int, list[str]] = field(default_factory=dict)
    retries: int = 0
    """Reads of a store that were taken up again."""
    parts: list[Path] = field(default_factory=list)

    def merge(self, other: "ReadResult") -> None:
        """Take in what became of the files after these."""
        for mine, more in ((self.read, other.read), (self.clean, other.clean), (self.sample, other.sample), (self.filter, other.filter),
                           (self.decontaminate, other.decontaminate)):
            mine.merge(more)
        for counts, found in ((self.annotated, other.annotated), (self.languages, other.languages), (self.unwanted, other.unwanted),
                              (self.redactions, other.redactions)):
            counts.update(found)
        for numbers, counted in ((self.kept, other.kept), (self.objects, other.objects), (self.with_key, other.with_key)):
            numbers.update(counted)
        self.found.merge(other.found)
        self.facts += other.facts
        self.samples.merge([other.samples], ("number", "record"))
        self.keys = other.keys | self.keys
        self.retries += other.retries
        self.parts += other.parts


def check(spec: PrepareSpec) -> tuple[list[TextFile], Evaluations | None]:
    """The files of a prepare job, and the evaluation texts that its documents must not hold. Raises InputError for what it names and what
    is not there or not installed, StorageError for a store that cannot be read, before any work."""
    files = find_files(spec.sources)
    check_given(spec.tokenizer)
    if spec.conversations:
        check_template(spec.tokenizer, spec.conversations)
    what = "conversations" if spec.conversations else "labels" if spec.labels else ""
    read = ("jsonl", "json", "parquet", *(("docstrings",) if spec.conversations else ()))
    if what and (other := next((file for file in files if file.format not in read), None)):
        more = "; of Python sources format: docstrings makes conversations" if spec.conversations else ""
        raise InputError(f"{other.name} is {other.format}, and {what} are read from jsonl, json and parquet",
                         where=f"sources.{other.source}.path: {spec.sources[other.source].path}",
                         remedy=f"name the files by a glob{more}")
    for i, source in enumerate(spec.sources):
        with own_keys(i, source):
            clean("é", spec.cleaning(source))              # not ASCII: that would need no library
            Filters(spec.filtering(source))
    return files, Evaluations.read(spec.decontaminate) if spec.decontaminate else None


@contextlib.contextmanager
def own_keys(place: int, source: Source) -> Iterator[None]:
    """An error about `clean` or `filter` names the key of the source where that is what gives it."""
    try:
        yield
    except InputError as error:
        section, _, rest = error.where.partition(".")
        if (own := getattr(source, section, None)) and rest.split(".")[0].split(":")[0] in own.model_fields_set:
            error.where = f"sources.{place}.{error.where}"
        raise


def read_documents(task: ReadTask) -> ReadResult:
    """Read, clean and filter. Raises StorageError where the scratch folder cannot be written or a store fails, CorpusError for a filter
    of the user's that fails."""
    job = _Read(task)
    for number, file in enumerate(task.files, task.first):
        job.read(number, file)
    job.decontaminate()
    for filters in job.filters.values():
        job.result.languages.update(filters.languages)
        job.result.unwanted.update(filters.unwanted)
    job.store.flush()
    job.result.parts = job.store.parts
    return job.result


def check_keys(spec: PrepareSpec, found: ReadResult) -> None:
    """Raises CorpusError for a source whose fields are in no record, which is a mistake in the spec."""
    for i, source in enumerate(spec.sources):
        if found.objects[i] and not found.with_key[i]:
            keys = found.keys.get(i, [])
            wanted = spec.conversations.keys if spec.conversations else (source.text_key,)
            near = nearest(wanted[0], keys)
            name = f"sources.{i}.text_key" if not spec.conversations else f"conversations.{'prompt' if wanted[1:] else 'messages'}_key"
            fields = f"field{'s' if wanted[1:] else ''} {' and '.join(map(repr, wanted))}"
            raise CorpusError(f"none of {found.objects[i]:,} records has the {fields}; the first has {', '.join(keys) or 'none'}",
                              where=f"{name}: {source.path}",
                              remedy=f"did you mean {near}?" if near else f"set {name.split('.')[-1]} to the field that holds "
                                                                          f"{'them' if spec.conversations else 'the text'}")


@dataclass(frozen=True)
class _Document:
    """One that has passed the filters."""

    record: Record
    file: TextFile
    number: int
    text: str
    turns: str
    bytes: int
    reasons: list[str]


class _Read:
    """The documents of one task on their way, in the order of the steps."""

    def __init__(self, task: ReadTask) -> None:
        self.task, self.result, self.store = task, ReadResult(), _Store(task)
        self.filters: dict[int, Filters] = {}
        self.evaluations: Evaluations | None = pickle.loads(task.evaluations.read_bytes()) if task.evaluations else None
        self.waiting: list[_Document] = []
        self.waiting_bytes = 0

    def read(self, number: int, file: TextFile) -> None:
        """Take in a file: what was read, and what of it is a document."""
        rules = self.task.rules[file.source]
        if file.source not in self.filters:
            self.filters[file.source] = Filters(rules.filter)
        labels = self.task.labels
        if labels:                                         # it stays with the document, for `encode`
            file = replace(file, keep=tuple(dict.fromkeys((*file.keep, labels.label_key))))
        result, reader = self.result, Reader(file, rules.clean.max_document_bytes, self.task.conversations)
        for record in reader.records():
            if labels and record.documents and not record.reason:
                record = _labelled(record, labels)
            result.read.taken["documents"] += record.documents
            if record.reason:
                self._reject(result.read, record.reason, record, file, number, record.documents, record.bytes, {"detail": record.detail})
            elif record.documents:
                self._clean(record, file, number)
            else:
                result.read.reject("markup", 0, record.bytes)
        result.read.taken["bytes"] += reader.stream_bytes
        result.facts.append({"number": number, "bytes": reader.raw.num_bytes, "xxh3": reader.raw.digest.hexdigest(),
                             "records": reader.num_records})
        result.retries += reader.raw.retries
        result.objects[file.source] += reader.objects
        result.with_key[file.source] += reader.with_key
        if reader.keys:
            result.keys.setdefault(file.source, reader.keys)

    def _clean(self, record: Record, file: TextFile, number: int) -> None:
        size = len(record.text) if record.text.isascii() else len(record.text.encode())
        self.result.read.reject("markup", 0, record.bytes - size)
        add(self.result.read.given, 1, size)
        step = self.result.clean
        add(step.taken, 1, size)
        rules = self.task.rules[file.source]
        cleaned, turns = clean_turns(record.turns, rules.clean) if record.turns else (clean(record.text, rules.clean), "")
        for name, taken in cleaned.taken.items():
            step.reject(name, 0, taken)
        self.result.redactions.update(cleaned.redactions)
        document = _Document(record, file, number, cleaned.text, turns, cleaned.bytes, [])
        sample = {"text": cleaned.text[:SAMPLE_CHARS]}
        if cleaned.reason:
            self._reject(step, cleaned.reason, record, file, number, 1, cleaned.bytes, sample)
            return
        add(step.given, 1, cleaned.bytes)
        step = self.result.sample
        add(step.taken, 1, cleaned.bytes)
        if rules.weight < 1 and not is_sampled(document_hash(document.text, turns), rules.weight):
            self._reject(step, "sampled_out", record, file, number, 1, cleaned.bytes, sample)
            return
        add(step.given, 1, cleaned.bytes)
        step = self.result.filter
        add(step.taken, 1, cleaned.bytes)
        said = without_system(cleaned.text, turns)
        dropped, reasons = self.filters[file.source].judge(said, path=file.name, meta=record.meta)
        if dropped:
            self._reject(step, dropped, record, file, number, 1, cleaned.bytes, sample)
            return
        add(step.given, 1, cleaned.bytes)
        self.result.annotated.update(reasons)
        self.waiting.append(replace(document, reasons=reasons))
        self.waiting_bytes += cleaned.bytes
        if self.waiting_bytes >= WAITING_BYTES:
            self.decontaminate()

    def decontaminate(self) -> None:
        """Pass on what waits, but for documents that hold a part of an evaluation text: they are looked at many at a time."""
        step, evaluations = self.result.decontaminate, self.evaluations
        hits = evaluations.hits_each([one.text for one in self.waiting], self.result.found) if evaluations else [{} for _ in self.waiting]
        for one, found in zip(self.waiting, hits, strict=True):
            add(step.taken, 1, one.bytes)
            if found:
                self._reject(step, f"contaminated_{min(found)}", one.record, one.file, one.number, 1, one.bytes,
                             {"text": one.text[:SAMPLE_CHARS]})
                continue
            add(step.given, 1, one.bytes)
            self.result.kept[one.number] += 1
            self.store.add(one)
        self.waiting, self.waiting_bytes = [], 0

    def _reject(self, step: Step, reason: str, record: Record, file: TextFile, number: int, documents: int, size: int,
                sample: dict[str, Any]) -> None:
        step.reject(reason, documents, size)
        self.result.samples.add(reason, {"number": number, "record": record.number, "bytes": size, **sample})


def _labelled(record: Record, labels: Labels) -> Record:
    """The record, or a reject where it has no label that can be taken."""
    try:
        labels_of(record.meta.get(labels.label_key), labels)
    except Refused as refused:
        return record._replace(text="", reason=refused.reason, detail=refused.detail)
    return record


class _Store:
    """Documents by partition, written out whenever a bounded buffer is full."""

    def __init__(self, task: ReadTask) -> None:
        self.task, self.parts, self.held = task, list[Path](), 0
        self.rows: list[list[tuple[Any, ...]]] = [[] for _ in range(task.partitions)]

    def add(self, one: _Document) -> None:
        content = document_hash(one.text, one.turns)
        key = order_key(content, self.task.seed)
        meta = json.dumps(one.record.meta, sort_keys=True, ensure_ascii=False) if one.record.meta else ""
        self.rows[partition(key, self.task.partitions)].append(
            (key, content, one.number, one.file.source, one.record.number, one.record.id, meta, one.reasons, one.text,
             one.turns))
        self.held += one.bytes + len(meta) + 200
        if self.held >= BUFFER_BYTES:
            self.flush()

    def flush(self) -> None:
        if not self.held:
            return
        path = self.task.scratch / f"read-{self.task.number:06d}-{len(self.parts):04d}.arrow"
        with replacing(path) as partial, pa.OSFile(partial, "wb") as file, pa.ipc.new_file(file, SCHEMA) as writer:
            for rows in self.rows:
                columns = list(zip(*rows, strict=True)) or [()] * len(SCHEMA)
                writer.write_batch(pa.record_batch([pa.array(column, kind.type) for column, kind in zip(columns, SCHEMA, strict=True)],
                                                   schema=SCHEMA))
                rows.clear()
        self.parts, self.held = [*self.parts, path], 0
