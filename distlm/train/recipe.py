"""A training spec and its corpora, resolved to the numbers that the loop runs on."""

import hashlib
import importlib.util
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from distlm.corpus.folds import folded
from distlm.corpus.listing import tells_sources
from distlm.corpus.manifest import Manifest, manifest_hash, read_manifest
from distlm.corpus.mix import Mix
from distlm.corpus.stream import BatchSizes, Plan, Windows, silent
from distlm.errors import InputError, SpecError
from distlm.model.adapter import adapter_sizes, check_dora
from distlm.model.build import Shape, model_config, parameter_sizes, recompute, skeleton
from distlm.model.complete import check_prompts, encode_prompts
from distlm.model.encoder import is_encoder, read_frame
from distlm.model.find import check_torchao, find_model
from distlm.model.float8 import check_float8
from distlm.model.nf4 import check_nf4
from distlm.model.sequence import check_sequence
from distlm.model.tensor import check_tensor
from distlm.spec.base import Rule
from distlm.spec.batch import check_batch
from distlm.spec.mixture import Mixture
from distlm.spec.optimizer import check_groups
from distlm.spec.train import Evaluate, TrainSpec, check_steps
from distlm.storage import Storage, read_json
from distlm.train.disks import on_disks
from distlm.train.flops import config_flops, forward_flops
from distlm.train.memory import check_states, make_load, memory_limit
from distlm.train.objectives import objective_of
from distlm.train.zero import check_raw, zero_options


@dataclass(frozen=True)
class ValPart:
    """The validation windows of one corpus."""

    corpus: str
    """The corpus folder."""
    windows: int
    """The first so many are evaluated."""
    share: float
    """What their mean loss counts for; all shares add up to 1."""
    name: str
    """That of the corpus; of several of one name, its folder."""
    sources: tuple[str, ...] = ()
    """The names of its sources by their places, where each is measured by itself, if there are several: not those of a fold, whose
    documents are those of two splits."""


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a run, except where it runs."""

    spec: TrainSpec
    corpus: str
    """The corpus folder; of a mixture, that of its first corpus, whose tokenizer is that of all."""
    corpus_hash: str
    """The manifest's; of a mixture, a hash over its manifests' hashes, weights and schedule."""
    shape: Shape
    parameters: int
    """Of the model and its adapter, tied ones counted once."""
    global_sequences: int
    """Of a step after the batch's warm-up."""
    micro_sequences: int
    num_steps: int
    evaluate_every: int
    checkpoint_every: int
    val: tuple[ValPart, ...]
    """Empty where there are no validation windows."""
    mix: Mix | None = None
    """Which corpus gives which sample, where the spec names a mixture."""
    mask_documents: bool = False
    """Attention keeps to a document."""
    marked: bool = False
    """Not every token gives loss, or documents are masked: the stream carries marks."""
    flops_per_token: float = 0.0
    """Forward and backward, by `train.flops`, and a teacher's forward pass."""
    warmup: tuple[tuple[int, int], ...] = ()
    """(sequences of a step, steps of that size) of the batch's warm-up."""
    whole: bool = False
    """A micro-batch of pairs is computed with all its padding, so that it has the most tokens that any may have: for a dry run."""
    held: int = 0
    """Bytes that a dry run holds beside its steps, in place of what only other micro-batches would take."""

    @property
    def world(self) -> int:
        """All ranks."""
        return self.spec.scale.workers

    @property
    def group(self) -> int:
        """Neighbouring ranks that read the same samples: those that hold one model together, or divide its sequences."""
        return self.spec.sharding.tensor_parallel * self.spec.sharding.sequence_parallel

    def part(self, rank: int) -> tuple[int, int]:
        """(which, of how many) of the parts of each sequence is a rank's."""
        parts = self.spec.sharding.sequence_parallel
        return rank // self.spec.sharding.tensor_parallel % parts, parts

    @property
    def sizes(self) -> BatchSizes:
        """Sequences of each step."""
        return BatchSizes(self.global_sequences, self.warmup)

    @property
    def accumulation(self) -> int:
        """Micro-batches of a rank in a step after the batch's warm-up."""
        return self.global_sequences // self.spec.data_workers // self.micro_sequences

    def micro_batches(self, step: int) -> int:
        """Micro-batches of a rank in a step."""
        return self.sizes.of(step) // self.spec.data_workers // self.micro_sequences

    def samples(self, step: int) -> tuple[int, int]:
        """The first and the last sample of a step."""
        return self.sizes.before(step), self.sizes.before(step + 1) - 1

    def tokens(self, steps: int) -> int:
        """Tokens of the first so many steps."""
        return self.sizes.before(steps) * self.shape.context

    def tokens_of(self, step: int) -> int:
        """Tokens of a step."""
        return self.sizes.of(step) * self.shape.context

    @property
    def num_samples(self) -> int:
        """Sequences of the whole run."""
        return self.sizes.before(self.num_steps)

    @property
    def corpora(self) -> tuple[str, ...]:
        """The corpus folders, in the order of the mixture."""
        return self.mix.corpora if self.mix else (self.corpus,)

    @property
    def val_windows(self) -> int:
        """Validation windows that are evaluated."""
        return sum(part.windows for part in self.val)

    def plan(self) -> Plan:
        return Plan(self.corpus, self.global_sequences, self.world, self.num_steps, self.spec.seed, self.mix, self.marked, self.group,
                    self.warmup, bool(self.shape.labels), self.spec.fold)


def make_recipe(spec: TrainSpec, storage: Storage) -> Recipe:
    """Resolve `spec` against its corpora. Raises SpecError and InputError, before any work."""
    manifests = read_corpora(spec, storage)
    manifest = manifests[0]
    context = manifest.context
    if spec.model.context not in (None, context):
        raise SpecError(f"{spec.model.context} is not the context of the corpus {manifest.name}, {context}", where="model.context",
                        remedy=f"leave it out, or prepare the corpus with context: {spec.model.context}")
    objective = objective_of(spec)
    objective.check(spec, manifests)
    if spec.fold:
        manifests = [folded(one, spec.fold) for one in manifests]
        manifest = manifests[0]
    for one in manifests:
        train = one.splits["train"]
        if train.windows == 0:
            raise InputError(f"the training split has {train.tokens} tokens and no window of {context}", where=str(one.path),
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
    if spec.distill is not None:
        source = str(find_model(spec.distill.teacher, storage, "distill.teacher"))
        spec = spec.model_copy(update={"distill": spec.distill.model_copy(update={"teacher": source})})
    if spec.track.wandb and importlib.util.find_spec("wandb") is None:
        raise SpecError("the package wandb is not installed", where="track.wandb", remedy="pip install 'distlm[wandb]'")
    if spec.sharding.deepspeed:
        check_raw(spec)
    shape = objective.shape(manifest)
    config = model_config(spec.model, shape, spec.regularization.dropout)
    sizes = parameter_sizes(config)
    trained = adapter_sizes(config, spec.adapter) if spec.adapter else sizes
    if spec.adapter and spec.adapter.base:
        check_nf4(config)
    if spec.adapter and spec.adapter.method == "dora" and spec.compile:
        check_dora()
    if spec.sharding.tensor_parallel > 1:
        check_tensor(config, spec.sharding.tensor_parallel)
    if spec.precision == "fp8":
        check_torchao("precision")
        check_float8(config)
    if spec.activation_checkpointing:
        recompute(skeleton(config), spec.activation_checkpointing)
    try:
        micro = check_batch(sequences, spec.batch, spec.data_workers)
        warmup = spec.batch.warmup.stages(sequences, context) if spec.batch.warmup else ()
        batches = BatchSizes(sequences, warmup)
        steps = _num_steps(spec, batches, sum(one.splits["train"].windows for one in manifests), context)
        spec = spec.model_copy(update={"schedule": spec.schedule.in_steps(lambda tokens: batches.steps(tokens / context))})
        check_steps(spec, steps)
        check_groups(spec.optimizer.groups, list(trained))
    except Rule as rule:
        raise SpecError(str(rule), where=rule.key) from None
    if spec.model.source is not None:
        check_tokenizer(Path(spec.model.source), manifest, framed=is_encoder(config))
    padded = not shape.labels and any(one.best_fit for one in manifests)
    masked = padded if spec.batch.mask_documents is None else spec.batch.mask_documents
    if masked:
        from distlm.model.documents import check_family

        check_family(config)
    taught = check_teacher(spec.distill.teacher, config, manifest, shape, masked) if spec.distill else 0.0
    if spec.sharding.sequence_parallel > 1:
        check_sequence(config, context, spec.sharding.sequence_parallel, spec.sharding.tensor_parallel)
    every = spec.checkpoint.every_steps or max(1, min(1000, steps // 4))
    recipe = Recipe(spec, str(manifest.path), mixture_hash(spec, manifests), shape, sum({**sizes, **trained}.values()), sequences,
                    micro, steps, spec.evaluate.every_steps or (every if spec.evaluate.worker else max(1, steps // 10)), every, (),
                    make_mix(spec, manifests, batches.before(steps)), masked, masked or padded,
                    config_flops(config, sizes, context, trained if spec.adapter else None) + taught, warmup)
    if spec.checkpoint.average > (saved := math.ceil(steps / recipe.checkpoint_every)):
        raise SpecError(f"{spec.checkpoint.average} checkpoints are averaged, and {steps:,} steps save {saved}", where="checkpoint.average",
                        remedy=f"set it to {saved}, or lower checkpoint.every_steps")
    milestone = spec.checkpoint.milestone_steps
    if milestone and milestone % recipe.checkpoint_every:
        near = -(-milestone // recipe.checkpoint_every) * recipe.checkpoint_every
        raise SpecError(f"{milestone} is no multiple of the {recipe.checkpoint_every:,} steps between checkpoints",
                        where="checkpoint.milestone_steps", remedy=f"try {near}, or set checkpoint.every_steps")
    check_evaluations(recipe)
    check_epochs(recipe, manifests)
    if memory_limit(spec) is not None:
        check_states(make_load(spec, config, shape, recipe.parameters, micro, recipe.accumulation, masked))
    parts = val_parts(recipe, manifests)
    if spec.fold and parts[0].windows < (held_out := manifest.splits["val"].windows):
        raise SpecError(f"fold {spec.fold.index} of {spec.fold.of} holds out {held_out:,} documents, and {parts[0].windows:,} of them "
                        "would be evaluated", where="evaluate.max_windows", remedy=f"set it to {held_out} or more")
    if not parts and (spec.evaluate != Evaluate() or spec.checkpoint.keep_best):
        why, remedy = without_val(manifests)
        where = "checkpoint.keep_best" if spec.evaluate == Evaluate() else "evaluate"
        raise InputError(f"there is nothing to evaluate on: {why}", where=where, remedy=f"leave it out, or {remedy}")
    if recipe.marked:
        for part in parts:
            check_targets(part, recipe.mask_documents)
    return replace(recipe, val=parts)


def inputs_of(spec: TrainSpec, storage: Storage) -> dict[str, Any]:
    """What a run reads, by path and hash, for its lineage; of a mixture, all its corpora too. Raises SpecError and InputError, before
    any work."""
    recipe = make_recipe(spec, storage)
    read_prompts(recipe)
    model = {"model": recipe.spec.model.source} if recipe.spec.model.source else {}
    mixture = {"mixture": {folder: manifest_hash(folder) for folder in recipe.corpora}} if recipe.mix else {}
    teacher = {"teacher": recipe.spec.distill.teacher} if recipe.spec.distill else {}
    return {"corpus": recipe.corpus, "corpus_hash": recipe.corpus_hash, **mixture, **model, **teacher}


def read_corpora(spec: TrainSpec, storage: Storage) -> list[Manifest]:
    """The manifests of a spec's corpora. Raises InputError for one that is not there, and for two that cannot be mixed."""
    key = "corpus.mix.{}.corpus" if isinstance(spec.corpus, Mixture) else "corpus"
    manifests = [read_manifest(find_corpus(share.corpus, storage, key.format(i))) for i, share in enumerate(spec.mixture)]
    first = manifests[0]
    for i, other in enumerate(manifests[1:], 1):
        where = key.format(i)
        if other.path in [one.path for one in manifests[:i]]:
            raise InputError(f"{other.path} is in the mixture twice", where=where, remedy="give it once, with the sum of the weights")
        if other.context != first.context:
            raise InputError(f"the corpus {other.name} has windows of {other.context} tokens and {first.name} of {first.context}",
                             where=where, remedy=f"prepare {other.name} with context: {first.context}")
        if other.data["tokenizer"]["hash"] != first.data["tokenizer"]["hash"]:
            raise InputError(f"the tokenizer of the corpus {other.name} is not that of {first.name}", where=where,
                             remedy=f"prepare {other.name} with tokenizer: {{from: {first.tokenizer}}}")
    return manifests


def mixture_hash(spec: TrainSpec, manifests: list[Manifest]) -> str:
    """What stands for all that decides the samples, but for seed and duration."""
    hashes = [manifest_hash(manifest.path) for manifest in manifests]
    if not isinstance(spec.corpus, Mixture):
        return hashes[0]
    weights, final = _weights(spec.corpus)
    schedule = [final, spec.corpus.anneal_fraction] if final else None
    return hashlib.sha256(json.dumps([hashes, weights, schedule]).encode()).hexdigest()


def make_mix(spec: TrainSpec, manifests: list[Manifest], num_samples: int) -> Mix | None:
    """The mixture's order of samples over a run of `num_samples`; None for one corpus."""
    if not isinstance(spec.corpus, Mixture):
        return None
    weights, final = _weights(spec.corpus)
    begin = num_samples - round(spec.corpus.anneal_fraction * num_samples)
    return Mix(tuple(str(one.path) for one in manifests), weights, spec.seed, final, (begin, num_samples) if final else (0, 0))


def _weights(mixture: Mixture) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Weights and final weights, each adding up to 1; the latter empty where weights are constant."""
    total = math.fsum(share.weight for share in mixture.mix)
    final = [share.final_weight for share in mixture.mix if share.final_weight is not None]
    return tuple(share.weight / total for share in mixture.mix), tuple(weight / math.fsum(final) for weight in final)


def check_evaluations(recipe: Recipe) -> None:
    """Raises SpecError where a worker of its own cannot evaluate the run's checkpoints when evaluations are due."""
    spec, every = recipe.spec, recipe.checkpoint_every
    if spec.evaluate.worker is None:
        return
    if recipe.evaluate_every % every:
        near = -(-recipe.evaluate_every // every) * every
        raise SpecError(f"{recipe.evaluate_every:,} is no multiple of the {every:,} steps between checkpoints, which evaluate.worker "
                        "evaluates", where="evaluate.every_steps", remedy=f"try {near}, or set checkpoint.every_steps")
    options = zero_options(spec)
    if on_disks(options) or options.get("round_robin_gradients"):
        raise SpecError("a worker of its own cannot read checkpoints whose states lie on disks, or are dealt in turns by "
                        "round_robin_gradients", where="evaluate.worker", remedy="leave it out")


def check_epochs(recipe: Recipe, manifests: list[Manifest]) -> None:
    """Raises SpecError where the duration needs more passes of a corpus than the spec allows."""
    if recipe.mix is None:
        return
    counts = recipe.mix.counts(recipe.num_samples)
    for i, (share, manifest) in enumerate(zip(recipe.spec.mixture, manifests, strict=True)):
        windows = manifest.splits["train"].windows
        if share.epochs is not None and counts[i] > share.epochs * windows:
            steps, passes = int(recipe.num_steps * share.epochs * windows / counts[i]), counts[i] / windows
            while steps and _count(recipe, manifests, steps, i) > share.epochs * windows:
                steps -= 1
            raise SpecError(f"{recipe.num_steps:,} steps take {counts[i]:,} samples of {manifest.name}, {passes:.2f} passes over its "
                            f"{windows:,} windows, and {share.epochs:g} are allowed", where=f"corpus.mix.{i}.epochs",
                            remedy=f"train for {steps:,} steps, lower its weight, or allow {math.ceil(passes)}")


def _count(recipe: Recipe, manifests: list[Manifest], steps: int, corpus: int) -> int:
    """The samples that a run of another length takes of a corpus."""
    samples = recipe.sizes.before(steps)
    mix = make_mix(recipe.spec, manifests, samples)
    assert mix
    return int(mix.counts(samples)[corpus])


def val_parts(recipe: Recipe, manifests: list[Manifest]) -> tuple[ValPart, ...]:
    """The validation windows: of each corpus its share of `evaluate.max_windows`, or all that it has. Shares are those of the samples of
    the whole run, so that the loss is the mixture's whatever the splits hold; a corpus without validation windows has none."""
    have = np.asarray([manifest.splits["val"].windows for manifest in manifests])
    samples = np.asarray(recipe.num_samples, dtype=np.float64)
    shares = np.asarray([float(recipe.mix.expected(i, samples) / samples) if recipe.mix else 1.0 for i in range(len(have))]) * (have > 0)
    if not have.any():
        return ()
    shares = shares / shares.sum()
    wanted = np.maximum(1, np.floor(shares * recipe.spec.evaluate.max_windows)).astype(int)
    names, known = [manifest.name for manifest in manifests], not recipe.spec.fold
    return tuple(ValPart(str(manifest.path), int(min(want, has)), float(share),
                         manifest.name if names.count(manifest.name) == 1 else str(manifest.path),
                         tuple(manifest.source_names) if known and len(manifest.sources) > 1 and tells_sources(manifest) else ())
                 for manifest, want, has, share in zip(manifests, wanted, have, shares, strict=True) if has)


def without_val(manifests: list[Manifest]) -> tuple[str, str]:
    """(why no corpus has a validation window, what helps)."""
    why = [(one.path.name, *one.splits["val"].why_empty(bool(one.labels))) for one in manifests]
    return (" and ".join(f"the corpus {name} has no validation window: {text}" for name, text, _ in why),
            " and ".join(f"prepare {name} with {remedy}" for name, _, remedy in why))


def check_targets(part: ValPart, mask_documents: bool) -> None:
    """Raises InputError where no token of the windows that are evaluated gives loss."""
    windows = Windows(part.corpus, "val")
    if silent(windows.marks(*windows.first(part.windows)), mask_documents)[:, 1:].all():
        raise InputError(f"no token of the {part.windows} validation windows that are evaluated gives loss", where=part.corpus,
                         remedy="prepare the corpus with a larger split.val_fraction")


def find_corpus(name: str, storage: Storage, where: str = "corpus") -> Path:
    """The folder of a corpus by path or by name. `where` is the spec's key, for the error."""
    path = Path(name).expanduser()
    if "/" in name or name.startswith((".", "~")):
        return path.absolute()
    folder = storage.corpus(name)
    if not folder.is_dir():
        from distlm.spec.load import nearest

        near = nearest(name, [p.name for p in folder.parent.iterdir()] if folder.parent.is_dir() else [])
        raise InputError(f"there is no corpus {name} under {folder.parent}", where=where,
                         remedy=f"did you mean {near}?" if near else "prepare it first with a spec of `kind: prepare`")
    return folder


def check_tokenizer(model: Path, manifest: Manifest, key: str = "model.from", framed: bool = False) -> None:
    """Raises InputError where a checkpoint brings another tokenizer than the corpus's: its weights would read other tokens. `framed`: also
    where it puts other tokens around a text."""
    ours, theirs = manifest.tokenizer / "tokenizer.json", model / "tokenizer.json"
    if theirs.is_file() and (read_json(ours).get("model") != read_json(theirs).get("model")
                             or (framed and read_frame(manifest.tokenizer) != read_frame(model))):
        raise InputError(f"the tokenizer of the checkpoint is not that of the corpus {manifest.name}", where=f"{key}: {model}",
                         remedy=f"prepare the corpus with tokenizer: {{from: {model}}}")


def check_teacher(source: str, student: Any, manifest: Manifest, shape: Shape, masked: bool) -> float:
    """FLOPs that a teacher takes for a token. Raises InputError and SpecError where it cannot tell a model of the configuration `student`
    what it thinks of the corpus's tokens."""
    from distlm.model.distill import KEY, teacher_config

    config = teacher_config(source, shape)
    check_tokenizer(Path(source), manifest, KEY)
    theirs, ours = (one.get_text_config().vocab_size for one in (config, student))
    if theirs != ours:
        raise InputError(f"the teacher has logits for {theirs} tokens and the model for {ours}", where=f"{KEY}: {source}",
                         remedy=f"set model.config with vocab_size: {theirs}, or take a teacher with {ours}")
    if masked:
        from distlm.model.documents import check_family

        check_family(config)
    return forward_flops(config, parameter_sizes(config), shape.context)


def _num_steps(spec: TrainSpec, sizes: BatchSizes, windows: int, context: int) -> int:
    duration = spec.duration
    if duration.steps is not None:
        return duration.steps
    if duration.tokens is not None:
        return sizes.steps(duration.tokens / context)
    return sizes.steps((duration.epochs or 0) * windows)


def manifest_of(recipe: Recipe) -> Manifest:
    """Of the corpus, or of a mixture's first."""
    return read_manifest(recipe.corpus)


def read_prompts(recipe: Recipe) -> list[list[int]]:
    """The tokens of the prompts that an evaluation completes. Raises InputError for one that has none, or that is too long."""
    spec = recipe.spec.evaluate
    if not spec.prompts:
        return []
    prompts = encode_prompts(manifest_of(recipe).tokenizer, spec.prompts)
    check_prompts(prompts, spec.max_tokens, recipe.shape.context, "evaluate.prompts")
    return prompts
