"""Whether tokens are measured or labels: the one place that tells. All that differs is in the module of a kind.

    kind = kind_of(task)
    kind.outcome(task, made_by, [getattr(worker, kind.METHOD)(batch) for batch in range(len(task.batches))])
"""

from typing import Any, Protocol

from distlm.evaluate import labels, tokens
from distlm.evaluate.task import Reader, Task


class Kind(Protocol):
    """What `tokens` and `labels` have."""

    METHOD: str
    """The method by which a worker, or whoever asks an endpoint, measures a batch."""

    def read(self, reader: Reader, batch: int) -> Any:
        """What of a batch an endpoint is asked of. Raises CorpusError for a corpus that is damaged."""

    def outcome(self, task: Task, made_by: str, batches: list[Any]) -> dict[str, Any]:
        """The measures, of what METHOD gave for every batch, in order."""


def kind_of(task: Task) -> Kind:
    return labels if task.labels else tokens
