"""A training spec and a corpus, resolved to the numbers that the loop runs on."""

import math
from dataclasses import dataclass
from pathlib import Path

from distlm.corpus.manifest import Manifest, manifest_hash, read_manifest
from distlm.corpus.stream import Plan
from distlm.errors import InputError, SpecError
from distlm.model.build import Shape, model_config, num_parameters
from distlm.model.find import find_model
from distlm.spec.base import Rule
from distlm.spec.train import TrainSpec, check_batch
from distlm.storage import Storage, read_json


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a run, except where it runs."""

    spec: TrainSpec
    corpus: str
    """The corpus folder."""
    corpus_hash: str
    shape: Shape
    parameters: int
    """Of the model, tied ones counted once."""
    global_sequences: int
    micro_sequences: int
    num_steps: int
    evaluate_every: int
    checkpoint_every: int
    val_windows: int
    """Validation windows that are evaluated; 0 where the corpus holds none."""
    val_bytes_per_token: float
    """UTF-8 bytes that a validation token stands for."""

    @property
    def world(self) -> int:
        return self.spec.scale.workers

    @property
    def accumulation(self) -> int:
        """Micro-batches of a rank in a step."""
        return self.global_sequences // self.world // self.micro_sequences

    @property
    def tokens_per_step(self) -> int:
        return self.global_sequences * self.shape.context

    def plan(self) -> Plan:
        return Plan(self.corpus, self.global_sequences, self.world, self.num_steps, self.spec.seed)


def make_recipe(spec: TrainSpec, storage: Storage) -> Recipe:
    """Resolve `spec` against its corpus. Raises SpecError and InputError, before any work."""
    folder = find_corpus(spec.corpus, storage)
    manifest = read_manifest(folder)
    context, train, val = manifest.context, manifest.splits["train"], manifest.splits["val"]
    if spec.model.context not in (None, context):
        raise SpecError(f"{spec.model.context} is not the context of the corpus {manifest.name}, {context}", where="model.context",
                        remedy=f"leave it out, or prepare the corpus with context: {spec.model.context}")
    if train.windows == 0:
        raise InputError(f"the training split has {train.tokens} tokens and no window of {context}", where=str(folder),
                         remedy="prepare the corpus with a smaller context, or more text")
    sequences = spec.batch.global_sequences
    if sequences is None:
        tokens = spec.batch.global_tokens or 0
        if tokens % context:
            low = max(1, tokens // context) * context
            raise SpecError(f"{tokens} is no multiple of the context {context}", where="batch.global_tokens",
                            remedy=f"try {low} or {low + context}")
        sequences = tokens // context
    if spec.model.source is not None:                      # a run's name becomes the folder of its export
        source = str(find_model(spec.model.source, storage, "model.from"))
        spec = spec.model_copy(update={"model": spec.model.model_copy(update={"source": source})})
    try:
        micro = check_batch(sequences, spec.batch.micro_sequences, spec.scale.workers)
    except Rule as rule:
        raise SpecError(str(rule), where=rule.key) from None
    steps = _num_steps(spec, sequences, train.windows, context)
    shape = Shape(manifest.vocab_size, context, manifest.eos_id)
    parameters = num_parameters(model_config(spec.model, shape))
    if spec.model.source is not None:
        check_tokenizer(Path(spec.model.source), manifest)
    return Recipe(spec, str(folder), manifest_hash(folder), shape, parameters, sequences, micro, steps,
                  spec.evaluate.every_steps or max(1, steps // 10), spec.checkpoint.every_steps or max(1, min(1000, steps // 4)),
                  min(spec.evaluate.max_windows, val.windows), val.bytes / val.tokens if val.tokens else 0.0)


def inputs_of(spec: TrainSpec, storage: Storage) -> dict[str, str]:
    """What a run reads, by path and hash, for its lineage. Raises SpecError and InputError, before any work."""
    recipe = make_recipe(spec, storage)
    model = {"model": recipe.spec.model.source} if recipe.spec.model.source else {}
    return {"corpus": recipe.corpus, "corpus_hash": recipe.corpus_hash, **model}


def find_corpus(name: str, storage: Storage) -> Path:
    """The folder of a corpus by path or by name."""
    path = Path(name).expanduser()
    if "/" in name or name.startswith((".", "~")):
        return path.absolute()
    folder = storage.corpus(name)
    if not folder.is_dir():
        from distlm.spec.load import nearest

        near = nearest(name, [p.name for p in folder.parent.iterdir()] if folder.parent.is_dir() else [])
        raise InputError(f"there is no corpus {name} under {folder.parent}", where="corpus",
                         remedy=f"did you mean {near}?" if near else "prepare it first with a spec of `kind: prepare`")
    return folder


def check_tokenizer(model: Path, manifest: Manifest) -> None:
    """Raises InputError where a checkpoint brings another tokenizer than the corpus's: its weights would read other tokens."""
    ours, theirs = manifest.tokenizer / "tokenizer.json", model / "tokenizer.json"
    if theirs.is_file() and read_json(ours).get("model") != read_json(theirs).get("model"):
        raise InputError(f"the tokenizer of the checkpoint is not that of the corpus {manifest.name}", where=f"model.from: {model}",
                         remedy=f"prepare the corpus with tokenizer: {{from: {model}}}")


def _num_steps(spec: TrainSpec, sequences: int, windows: int, context: int) -> int:
    duration = spec.duration
    if duration.steps is not None:
        return duration.steps
    if duration.tokens is not None:
        return math.ceil(duration.tokens / (sequences * context))
    return math.ceil((duration.epochs or 0) * windows / sequences)


def manifest_of(recipe: Recipe) -> Manifest:
    return read_manifest(recipe.corpus)
