"""`kind: evaluate`: how well a model, or an endpoint, predicts the windows of corpora or their labels, and does at tasks."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from distlm.spec.base import Job, Part, Rule, exactly_one, without_effect
from distlm.spec.explain import shown
from distlm.spec.mixture import CorpusName


def web(value: str) -> str:
    """An address of the web. Raises Rule."""
    if not value.startswith(("http://", "https://")):
        raise Rule("", f"{shown(value)}: must begin with http:// or https://")
    return value


class Address(Part):
    """An endpoint of the OpenAI API that scores prompts: /v1/completions with echo and logprobs. Or one of ours with a classifier."""

    url: Annotated[str, AfterValidator(web)]
    """Its address, with or without /v1 at the end."""
    api_key_file: str
    """A file of mode 600 with the key that it takes."""
    model: str | None = None
    """The name under which it serves the model, or an adapter. Default: that of the first model that it tells of."""


def address(value: Any) -> Any:
    """A mapping is an address, and its mistakes stand where they are, not under each form that an endpoint can have."""
    if isinstance(value, dict):
        return Address.model_validate(value, by_alias=True, by_name=False)
    if value is not None and not isinstance(value, str | Address):
        raise Rule("", f"{shown(value)}: must be text, or a section with url, api_key_file and model")
    return value


def corpora(value: Any) -> Any:
    """One corpus or several."""
    if not isinstance(value, str) and not (isinstance(value, list) and all(isinstance(one, str) for one in value)):
        raise Rule("", f"{shown(value)}: must be text, or a list of texts; a number is put in quotes")
    if not value or (isinstance(value, list) and "" in value):
        raise Rule("", f"{shown(value)}: must name a corpus")
    return value


def maybe_corpora(value: Any) -> Any:
    """One corpus, several or none."""
    return value if value is None else corpora(value)


class Scoring(Job):
    """What a job has that lets workers score the windows of corpora."""

    corpus: Annotated[str | list[str], BeforeValidator(corpora, json_schema_input_type=CorpusName | Annotated[
        list[CorpusName], Field(min_length=1)])]
    """A prepared corpus, by name or path, or a list of them, all with the model's tokenizer."""
    split: Literal["train", "val", "test"] = "val"
    """The split whose windows are taken."""
    windows: Annotated[int | None, Field(ge=1)] = None
    """The first so many windows of each corpus, which are those that a run evaluates. Default: all."""
    mask_documents: bool | None = None
    """Whether attention stays inside a document, whose positions begin at 0 and whose first token gives no loss. Default: true where a
    corpus is packed by best-fit, else false, as in training."""
    batch_windows: Annotated[int, Field(ge=1)] = 8
    """Windows, or texts of a task, of one forward pass or of one request to an endpoint. Each worker takes every n-th batch."""
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic of a model; auto: bf16 on GPU, fp32 on CPU."""
    workers: Annotated[int, Field(ge=1)] = 1
    """Worker processes, each with a copy of the model. The result is the same with any number."""
    gpus_per_worker: Annotated[int, Field(ge=0, le=1)] = 0
    """GPUs of a worker; 0 evaluates on CPU."""
    cpus_per_worker: Annotated[float, Field(gt=0)] = 1
    """Logical CPUs that a worker reserves."""
    threads_per_worker: Annotated[int | None, Field(ge=1)] = None
    """Threads of a worker's matrix products. Default: the node's cores over the workers."""

    @property
    def corpora(self) -> list[str]:
        """The corpora as they are named."""
        return [self.corpus] if isinstance(self.corpus, str) else self.corpus or []

    @model_validator(mode="after")
    def _once(self) -> "Scoring":
        if twice := next((one for i, one in enumerate(self.corpora) if one in self.corpora[:i]), None):
            raise Rule("corpus", f"{twice} is there twice; give it once")
        return self


class EvaluateSpec(Scoring):
    """Loss, perplexity, bits per byte, accuracy and calibration of a model or an endpoint on corpora, and what it comes to in tasks; of a
    classifier loss, accuracy, precision, recall, F1, ROC AUC, calibration and confusion on corpora with labels. Exactly one of model,
    endpoint."""

    kind: Literal["evaluate"] = "evaluate"
    """The kind of the job."""
    model: Annotated[str | None, Field(min_length=1)] = None
    """A run by name or path, or a folder that `AutoModelForCausalLM.from_pretrained` loads; of a classifier, that
    `AutoModelForSequenceClassification.from_pretrained` does."""
    endpoint: Annotated[str | Address | None, BeforeValidator(address)] = None
    """An endpoint of ours by name or by its URL.
    Or a section with url, api_key_file and model."""
    corpus: Annotated[str | list[str] | None, BeforeValidator(maybe_corpora, json_schema_input_type=CorpusName | Annotated[
        list[CorpusName], Field(min_length=1)] | None)] = None  # type: ignore[assignment]
    """A prepared corpus, by name or path, or a list of them, all with the model's tokenizer, and with the labels of a classifier. Default:
    none, where there are tasks."""
    tasks: list[Annotated[str, Field(min_length=1)]] = []
    """Files of tasks of the lm-evaluation-harness (YAML), or of groups of them, whose data are local files: multiple choice, generated
    answers, perplexity of texts. Needs the extra lm-eval."""
    shots: Annotated[int | None, Field(ge=0)] = None
    """Examples before each question of a task. Default: what its file says, else none."""
    limit: Annotated[int | None, Field(ge=1)] = None
    """The first so many documents of each task. Default: all."""
    chat: bool = False
    """Whether tasks are asked as conversations by the tokenizer's chat template, the examples as turns before the question."""
    tokenizer: Annotated[str | None, Field(min_length=1)] = None
    """A run by name, or a folder with a tokenizer: by it an endpoint is asked of tasks. Default: that of the corpora, else of what an
    endpoint of ours serves."""
    calibration_bins: Annotated[int, Field(ge=1, le=1000)] = 15
    """Bins of equal width into which predictions go by their confidence."""
    prompts: list[Annotated[str, Field(min_length=1)]] = []
    """Texts that are completed greedily and shown in the report."""
    max_tokens: Annotated[int, Field(ge=1)] = 64
    """Tokens of each completion."""
    concurrent: Annotated[int, Field(ge=1, le=256)] = 8
    """Requests that are on their way to an endpoint at once."""

    @model_validator(mode="after")
    def _rules(self) -> "EvaluateSpec":
        exactly_one(self, "model", "endpoint")
        if self.model is None:
            without_effect(self, "with an endpoint", "workers", "gpus_per_worker", "cpus_per_worker", "threads_per_worker", "dtype")
        else:
            without_effect(self, "without an endpoint", "concurrent", "tokenizer")
        if self.corpus is None:
            if not self.tasks:
                raise Rule("", "corpus, tasks or both must be given")
            without_effect(self, "without a corpus", "split", "windows", "mask_documents", "calibration_bins", "prompts")
        if not self.tasks:
            without_effect(self, "without tasks", "shots", "limit", "chat", "tokenizer")
        if twice := next((one for i, one in enumerate(self.tasks) if one in self.tasks[:i]), None):
            raise Rule("tasks", f"{twice} is there twice; give it once")
        if not self.prompts:
            without_effect(self, "without prompts", "max_tokens")
        return self
