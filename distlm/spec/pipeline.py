"""`kind: pipeline`: a job whose steps are jobs."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from distlm.spec.base import Job, Name, Rule


def _step(data: dict[str, Any]) -> dict[str, Any]:
    """What a step has beside the keys of its kind. Raises Rule."""
    if not isinstance(data.get("file", ""), str):
        raise Rule("file", f"{data['file']!r}: must be text")
    if not isinstance(data.get("set") or {}, dict):
        raise Rule("set", f"{data['set']!r}: must be a section; write set: {{optimizer.lr: 0.001}}")
    needs = data.get("needs") or []
    if not isinstance(needs, str) and not (isinstance(needs, list) and all(isinstance(step, str) for step in needs)):
        raise Rule("needs", f"{needs!r}: must be the name of a step or a list of names")
    return data


class PipelineSpec(Job):
    """Steps by name. `${step}` and `${step.output}` stand for what another step made, `${step.tasks.NAME.METRIC}` for what a task of an
    evaluation came to."""

    kind: Literal["pipeline"] = "pipeline"
    """The kind of the job."""
    steps: Annotated[dict[Name, Annotated[dict[str, Any], AfterValidator(_step)]], Field(min_length=1)]
    """Each step is a job spec, inline, or `{file: other.yaml, set: {...}}`; `needs: [step]` orders steps that share no reference."""
    prompt: str | None = None
    """What each endpoint of the pipeline completes at the end, to show that it does."""
    chat: bool = False
    """Whether the prompt is what a user says in a chat, and no text to be gone on with."""
