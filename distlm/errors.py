"""Every error that a user can meet, with the exit code that a shell sees.

An error says in one line what is wrong, where, the rule, and the remedy:

    raise SpecError("3 does not divide 32 sequences over 2 workers", where="a.yaml:12: batch.micro_sequences",
                    remedy="try 1, 2, 4, 8 or 16")
"""

from typing import Any

CAUSES = ("completed", "user", "preempted", "worker_died", "node_lost", "head_lost", "oom", "hang", "nonfinite_loss",
          "loss_spike", "bad_input", "bad_spec", "storage", "timeout", "internal")
"""The closed list of reasons for which a run ends."""


PREFIX = "distlm: error: "
"""Begins the line in which the command line tells of an error."""


class DistlmError(Exception):
    """Base of all errors of distlm. `cause` is one of CAUSES, `exit_code` is what the process returns."""

    exit_code = 3
    cause = "internal"

    def __init__(self, message: str, *, where: str = "", remedy: str = "", cause: str = "") -> None:
        super().__init__(message)
        self.message, self.where, self.remedy = message, where, remedy
        if cause:
            assert cause in CAUSES, cause
            self.cause = cause

    def __str__(self) -> str:
        text = f"{self.where}: {self.message}" if self.where else self.message
        return f"{text}; {self.remedy}" if self.remedy else text

    def __reduce__(self) -> Any:                           # keyword arguments survive the way through Ray
        return _rebuild, (type(self), self.message, self.where, self.remedy, self.cause)


def out_of_memory(error: BaseException) -> bool:
    """Whether an allocation has failed, on a GPU or in the host's memory: of most of these PyTorch and the system tell by text alone."""
    words = "can't allocate memory", "Cannot allocate memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDA error: out of memory"
    return (isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"           # PyTorch's, and Ray's
            or (isinstance(error, OSError | RuntimeError) and any(text in str(error) for text in words)))


def _rebuild(kind: type[DistlmError], message: str, where: str, remedy: str, cause: str) -> DistlmError:
    return kind(message, where=where, remedy=remedy, cause=cause)


class SpecError(DistlmError):
    """The spec is wrong: found before any work."""

    exit_code, cause = 2, "bad_spec"


class InputError(DistlmError):
    """What the user named does not exist or cannot be used: found before any work."""

    exit_code, cause = 2, "bad_input"


class CorpusError(DistlmError):
    """Text cannot become a corpus, or a corpus is damaged."""

    cause = "bad_input"


class CheckpointError(DistlmError):
    """No checkpoint can be trusted, or one does not fit this job."""

    cause = "storage"


class TrainError(DistlmError):
    """Training ended before it was done; `cause` says why."""


class EvaluationError(DistlmError):
    """An evaluation ended before it was done; `cause` says why."""


class ServeError(DistlmError):
    """An endpoint could not be brought up, or refused a request."""


class ClusterError(DistlmError):
    """The cluster cannot be reached, or is too small for the job."""

    exit_code, cause = 4, "head_lost"


class StorageError(DistlmError):
    """A folder cannot be read or written."""

    exit_code, cause = 4, "storage"
