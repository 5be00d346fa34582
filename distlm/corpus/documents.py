"""The first task: read files, clean their documents, and put them on the scratch folder by the range of their order keys.

Every file that this writes has one Arrow record batch per partition, so that the next task finds its partition in each by number.
"""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from distlm.corpus.accounts import SAMPLE_CHARS, Samples, Step, add
from distlm.corpus.clean import clean
from distlm.corpus.read import Reader, Record, TextFile
from distlm.corpus.split import HASH_BYTES, content_hash, order_key, partition
from distlm.spec.prepare import Clean
from distlm.storage import writing

SCHEMA = pa.schema([("key", pa.binary(HASH_BYTES)), ("hash", pa.binary(HASH_BYTES)), ("file", pa.int32()), ("record", pa.int64()),
                    ("text", pa.large_string())])
BUFFER_BYTES = 32 << 20


@dataclass(frozen=True)
class ReadTask:
    """Files that one task reads; `first` is the number of the first among all."""

    number: int
    first: int
    files: list[TextFile]
    rules: Clean
    seed: int
    partitions: int
    scratch: Path


@dataclass
class ReadResult:
    """What became of the files."""

    read: Step = field(default_factory=lambda: Step("read"))
    clean: Step = field(default_factory=lambda: Step("clean"))
    facts: list[dict[str, Any]] = field(default_factory=list)
    """Per file: number, bytes, xxh3, documents that were kept."""
    samples: Samples = field(default_factory=Samples)
    objects: Counter[int] = field(default_factory=Counter)
    """Per source, the JSON objects and rows that were read, and those that have the text field."""
    with_key: Counter[int] = field(default_factory=Counter)
    keys: dict[int, list[str]] = field(default_factory=dict)
    parts: list[Path] = field(default_factory=list)


def read_documents(task: ReadTask) -> ReadResult:
    """Read and clean. Raises StorageError where the scratch folder cannot be written."""
    result = ReadResult()
    store = _Store(task)
    for number, file in enumerate(task.files, task.first):
        reader = Reader(file, task.rules.max_document_bytes)
        kept = 0
        for record in reader.records():
            kept += _take(record, number, file, task, result, store)
        result.read.taken["bytes"] += reader.stream_bytes
        result.facts.append({"number": number, "bytes": reader.raw_bytes, "xxh3": reader.digest.hexdigest(), "documents": kept})
        result.objects[file.source] += reader.objects
        result.with_key[file.source] += reader.with_key
        result.keys.setdefault(file.source, reader.keys)
    store.flush()
    result.parts = store.parts
    return result


def _take(record: Record, number: int, file: TextFile, task: ReadTask, result: ReadResult, store: "_Store") -> int:
    """Account for a record, and store it if it is kept: 1, else 0."""
    result.read.taken["documents"] += record.documents
    if record.reason:
        result.read.reject(record.reason, record.documents, record.bytes)
        result.samples.add(record.reason, {"number": number, "source": file.name, "record": record.number, "bytes": record.bytes,
                                           "detail": record.detail})
        return 0
    if not record.documents:
        result.read.reject("markup", 0, record.bytes)
        return 0
    size = len(record.text) if record.text.isascii() else len(record.text.encode())
    result.read.reject("markup", 0, record.bytes - size)
    for step_side in (result.read.given, result.clean.taken):
        add(step_side, 1, size)
    document = clean(record.text, task.rules)
    result.clean.reject("control_characters", 0, document.control_bytes)
    result.clean.reject("unicode", 0, document.unicode_bytes)
    if document.reason:
        result.clean.reject(document.reason, 1, document.bytes)
        result.samples.add(document.reason, {"number": number, "source": file.name, "record": record.number, "bytes": document.bytes,
                                             "text": document.text[:SAMPLE_CHARS]})
        return 0
    add(result.clean.given, 1, document.bytes)
    store.add(number, record.number, document.text, document.bytes)
    return 1


class _Store:
    """Documents by partition, written out whenever a bounded buffer is full."""

    def __init__(self, task: ReadTask) -> None:
        self.task, self.parts, self.held = task, list[Path](), 0
        self.rows: list[list[tuple[bytes, bytes, int, int, str]]] = [[] for _ in range(task.partitions)]

    def add(self, file: int, record: int, text: str, size: int) -> None:
        content = content_hash(text.encode())
        key = order_key(content, self.task.seed)
        self.rows[partition(key, self.task.partitions)].append((key, content, file, record, text))
        self.held += size + 100
        if self.held >= BUFFER_BYTES:
            self.flush()

    def flush(self) -> None:
        if not self.held:
            return
        path = self.task.scratch / f"read-{self.task.number:06d}-{len(self.parts):04d}.arrow"
        with writing(path), pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, SCHEMA) as writer:
            for rows in self.rows:
                columns = list(zip(*rows, strict=True)) or [()] * len(SCHEMA)
                writer.write_batch(pa.record_batch([pa.array(column, kind.type) for column, kind in zip(columns, SCHEMA, strict=True)],
                                                   schema=SCHEMA))
                rows.clear()
        self.parts, self.held = [*self.parts, path], 0
