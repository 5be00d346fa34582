"""What a language model comes to on windows: the measures of all their tokens, of each corpus and of each source.

    outcome(task, made_by, [worker.score(batch) for batch in range(len(task.batches))])["loss"]
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from distlm.evaluate.task import Reader, Rows, Task
from distlm.train.totals import Sums, measures


def read(reader: Reader, batch: int) -> Rows:
    """The windows of a batch, and which of their predictions count. Raises CorpusError for a corpus that is damaged."""
    return reader.read(batch)


def measure(by: Any) -> Callable[[Any], Any]:
    """The method of a worker, or of whoever asks an endpoint."""
    return by.score


def outcome(task: Task, made_by: str, sums: list[Sums]) -> dict[str, Any]:
    """The measures of all tokens, of each corpus and of each of its sources that has tokens. Batches are added up in their order."""
    whole = np.zeros_like(sums[0])
    for one in sums:
        whole += one
    corpora = {}
    for part in task.parts:
        mine = whole[part.first_group:part.first_group + len(part.sources)]
        sources = {name: measures(row) for name, row in zip(part.sources, mine, strict=True) if row[0]} if part.by_source else {}
        corpora[part.name] = {**measures(mine.sum(0)), "windows": part.windows, "masked": part.mask_documents, "sources": sources}
    return {"evaluated": made_by, "split": task.split, "windows": task.windows, **measures(whole.sum(0)), "corpora": corpora}
