"""`kind: pipeline`: a job whose steps are jobs."""

from typing import Annotated, Any, Literal

from pydantic import Field

from distlm.spec.base import Job, Name


class PipelineSpec(Job):
    """Steps by name. `${step}` and `${step.output}` stand for what another step made."""

    kind: Literal["pipeline"] = "pipeline"
    """The kind of the job."""
    steps: Annotated[dict[Name, dict[str, Any]], Field(min_length=1)]
    """Each step is a job spec, inline, or `{file: other.yaml, set: {...}}`; `needs: [step]` orders steps that share no reference."""
    prompt: str | None = None
    """What each endpoint of the pipeline completes at the end, to show that it does."""
