"""What a classifier comes to on documents with labels: training's own loss and scores, of all documents, each corpus and each source.

    outcome(task, made_by, [worker.observe(batch) for batch in range(len(task.batches))])["f1_macro"]
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from distlm.errors import EvaluationError
from distlm.evaluate.task import Labelled, Reader, Task
from distlm.train.scores import SCORES, calibration, scores_of


class Observed(NamedTuple):
    """What a classifier makes of documents."""

    rows: NDArray[np.float32]
    """[documents, k + names]: labels as corpus.stream has them, and logits."""
    groups: NDArray[np.int64]
    """[documents]: the source of each, by its number among those of all corpora."""


def read(reader: Reader, batch: int) -> Labelled:
    """The documents of a batch, with their labels. Raises CorpusError for a corpus that is damaged."""
    return reader.labelled(batch)


def measure(by: Any) -> Callable[[Any], Any]:
    """The method of a worker, or of whoever asks an endpoint."""
    return by.observe


def observed(documents: Labelled, rows: NDArray[np.float32]) -> Observed:
    """Of a batch. Raises EvaluationError where a logit is not finite."""
    if not np.isfinite(rows).all():
        raise not_finite(documents)
    return Observed(rows, documents.groups)


def not_finite(documents: Labelled) -> EvaluationError:
    """What is told where a logit of one of these is not finite."""
    return EvaluationError(f"the classifier's logits are not finite for a document of {documents.part.name}", cause="nonfinite_loss",
                           remedy="its weights may be damaged, or too large for its dtype: try dtype: fp32")


def outcome(task: Task, made_by: str, batches: Sequence[Observed]) -> dict[str, Any]:
    """The measures of all documents, of each corpus and of each of its sources that has documents. Batches are in their order."""
    rows, groups = (np.concatenate(each) for each in zip(*batches, strict=True))
    corpora = {}
    for part in task.parts:
        places = range(part.first_group, part.first_group + len(part.sources))
        sources = {name: measures(task, rows[groups == i]) for name, i in zip(part.sources, places, strict=True)
                   if part.by_source and (groups == i).any()}
        corpora[part.name] = {**measures(task, rows[np.isin(groups, places)]), "windows": part.windows, "sources": sources}
    return {"evaluated": made_by, "split": task.split, "windows": task.windows, "labels": [*task.labels],
            "multiple_labels": task.multiple_labels, **measures(task, rows), "corpora": corpora}


def measures(task: Task, rows: NDArray[np.float32]) -> dict[str, Any]:
    """What documents come to, for JSON: None is a number that there is not. The loss is the mean over documents, in nats, all labels by 1;
    the calibration is that of the likeliest label, and there is none where documents may have several."""
    import torch

    from distlm.model.loss import label_loss

    given, logits = rows[:, :-len(task.labels)], rows[:, -len(task.labels):]
    loss = label_loss(torch.from_numpy(logits.astype(np.float64)), torch.from_numpy(given.astype(np.int64)), task.multiple_labels)
    return {"documents": len(rows), "loss": float(loss) / len(rows), **dict.fromkeys(SCORES),
            **scores_of(rows, task.labels, task.multiple_labels),
            **({"ece": None, "reliability": []} if task.multiple_labels else calibration(given[:, 0], logits, task.bins))}
