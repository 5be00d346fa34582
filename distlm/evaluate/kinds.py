"""Whether tokens are measured or labels: how a batch is read and measured, and what comes of all. A page, a plan and a terminal see by
the names of labels which it was.

    kind = kind_of(task)
    kind.outcome(task, made_by, [kind.measure(worker)(batch) for batch in range(len(task.batches))])
"""

from collections.abc import Callable
from typing import Any, Protocol

from distlm.evaluate import labels, tokens
from distlm.evaluate.task import Reader, Task


class Kind(Protocol):
    """What `tokens` and `labels` have."""

    def measure(self, by: Any) -> Callable[[Any], Any]:
        """The method by which a worker, or whoever asks an endpoint, measures a batch."""

    def read(self, reader: Reader, batch: int) -> Any:
        """What of a batch an endpoint is asked of. Raises CorpusError for a corpus that is damaged."""

    def outcome(self, task: Task, made_by: str, batches: list[Any]) -> dict[str, Any]:
        """The measures, of what `measure` gave for every batch, in order."""


def kind_of(task: Task) -> Kind:
    return labels if task.labels else tokens
