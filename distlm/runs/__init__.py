"""The folder of a job: its spec, lineage, events, metrics. The folder is the truth, whatever became of the process."""

from distlm.runs.folder import STATES, RunFolder
from distlm.runs.lineage import lineage

__all__ = ["STATES", "RunFolder", "lineage"]
