"""`kind: train`: from a corpus to a run with checkpoints and an export."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from distlm.spec.adapter import Adapter
from distlm.spec.base import Job, Part, Rule, Seed, exactly_one, without_effect
from distlm.spec.batch import Batch, check_batch
from distlm.spec.distill import Distill, check_distill
from distlm.spec.dpo import Dpo, check_dpo
from distlm.spec.fold import Fold, check_fold
from distlm.spec.gpus import CUDA_GIB, GPUS, find_gpu
from distlm.spec.mixture import CorpusName, Mixture, Share, Shares, mixture
from distlm.spec.optimizer import Optimizer, Regularization, Schedule, check_optimizer
from distlm.spec.presets import PRESETS
from distlm.spec.sharding import (
    Sharding,
    check_offload,
    check_sequence_parallel,
    check_tensor_parallel,
    check_zeropp,
    offloads_optimizer,
    quantizes_gradients,
)


class Mup(Part):
    """The maximal update parametrization (Yang et al. 2022, table 3): a learning rate that was found at one width holds at others, where
    heads keep their width and the other sizes grow with hidden_size. The export is a model like any other."""

    base_width: Annotated[int, Field(ge=1)]
    """The hidden_size at which the learning rate was found; there mup changes nothing."""


class ModelSpec(Part):
    """The Transformer: exactly one of preset, config, from."""

    preset: Annotated[str | None, Field(json_schema_extra={"enum": [*PRESETS, None]})] = None
    """A shape by name."""
    config: dict[str, Any] | None = None
    """A `transformers` configuration: model_type and whatever that family takes."""
    source: Annotated[str | None, Field(alias="from")] = None
    """A folder that `AutoModelForCausalLM.from_pretrained` loads, or a run of ours by name or path. With objective: classify also one of an
    encoder, such as BERT, RoBERTa or ModernBERT."""
    context: Annotated[int | None, Field(ge=8)] = None
    """Tokens of context. Default, and only value possible: the corpus's. With from it is what lets the corpus have longer windows than the
    checkpoint takes: the positions of a family that rotates by them go on, and the export takes so many."""
    mup: Mup | None = None
    """Initial weights and learning rates that transfer across widths, with adamw or lion. Left out, both are the same at every width."""

    @model_validator(mode="after")
    def _one(self) -> "ModelSpec":
        exactly_one(self, "preset", "config", "source")
        if self.preset is not None and self.preset not in PRESETS:
            raise Rule("preset", f"unknown preset {self.preset!r}; there are {', '.join(PRESETS)}")
        if self.config is not None and "model_type" not in self.config:
            raise Rule("config", "a transformers configuration needs model_type, e.g. llama, gpt2, qwen3")
        if self.mup and self.source is not None:
            raise Rule("mup", "a checkpoint's weights are not drawn anew; leave it out, and set rates by optimizer.groups")
        return self


class Duration(Part):
    """How long: exactly one of steps, tokens, epochs."""

    steps: Annotated[int | None, Field(ge=1)] = None
    """Optimizer steps."""
    tokens: Annotated[int | None, Field(ge=1)] = None
    """Tokens, rounded up to whole steps."""
    epochs: Annotated[float | None, Field(gt=0)] = None
    """Passes over the training split, rounded up to whole steps; of a mixture, so many times all the windows that it holds."""

    @model_validator(mode="after")
    def _one(self) -> "Duration":
        exactly_one(self, "steps", "tokens", "epochs")
        return self


class LossScale(Part):
    """Dynamic loss scaling (Micikevicius et al. 2018, section 3.2): a step whose gradients overflow is skipped and the scale halved, at the
    second such step at first. Skipped steps count as steps, and metrics.jsonl marks them."""

    initial_power: Annotated[int, Field(ge=0, le=32)] = 16
    """It begins at 2 to this power."""
    window: Annotated[int, Field(ge=1)] = 1000
    """It doubles after so many steps without an overflow."""


class Scale(Part):
    """What the job asks of the cluster."""

    workers: Annotated[int, Field(ge=1)] = 1
    """Worker processes: one per GPU, or several CPU ranks."""
    gpus_per_worker: Annotated[int, Field(ge=0, le=1)] = 0
    """GPUs of a worker: 0 trains on CPU over gloo, 1 on GPU over NCCL."""
    cpus_per_worker: Annotated[float, Field(gt=0)] = 1
    """Logical CPUs that a worker reserves."""
    threads_per_worker: Annotated[int | None, Field(ge=1)] = None
    """Threads of a worker's matrix products. Default: the node's cores over the workers on it."""
    gpu: Annotated[str | None, Field(min_length=1)] = None
    """The kind of GPU, such as H100 or L4, whose peak and memory `distlm plan` knows. Default: this machine's, where it has one."""
    memory_gib: Annotated[float | None, Field(gt=0)] = None
    """Memory of a worker: its GPU's, or its share of a node's. A job whose model states exceed it is refused. Default: that of `gpu`;
    for workers on CPU where the machine is the whole cluster, its memory over them, beyond which a plan warns."""
    price_per_worker_hour: Annotated[float | None, Field(ge=0)] = None
    """What a worker costs an hour, in any currency: `distlm plan` says what the job will."""

    @model_validator(mode="after")
    def _known(self) -> "Scale":
        if self.gpus_per_worker and self.memory_gib is not None and self.memory_gib <= CUDA_GIB:
            raise Rule("memory_gib", f"{self.memory_gib:g} leaves a model nothing: CUDA and NCCL take about {CUDA_GIB} GiB of a GPU; give "
                                     "what the GPU has")
        if self.gpu is not None:
            if not self.gpus_per_worker:
                without_effect(self, "where gpus_per_worker is 0", "gpu")
            if find_gpu(self.gpu) is None:
                raise Rule("gpu", f"{self.gpu!r} is not in the table of GPUs; there are {', '.join(GPUS)}; or leave it out and set "
                                  "memory_gib")
        return self


class EvaluationWorker(Part):
    """A worker that evaluates checkpoints while the steps go on."""

    cpus: Annotated[float, Field(gt=0)] = 1
    """Logical CPUs that it reserves beside those of the workers that train. It has as many threads."""
    gpus: Annotated[int, Field(ge=0, le=1)] = 0
    """GPUs of its own: 1 where there is one to spare, 0 for CPU."""


class Evaluate(Part):
    """Validation loss during training, and beside it what the objective measures: of a language model perplexity, bits per byte, accuracy
    and calibration error of the next token, in all and of each corpus and source."""

    every_steps: Annotated[int | None, Field(ge=1)] = None
    """Default: a tenth of the run. The first and the last step always evaluate."""
    max_windows: Annotated[int, Field(ge=1)] = 512
    """Windows of the validation split that are used, the same ones every time; of a mixture's corpora, each its share of them, one at
    least, and the loss is the mean of theirs by their shares of the samples."""
    prompts: list[Annotated[str, Field(min_length=1)]] = []
    """Texts that the model completes at each evaluation, the likeliest token each time: metrics.jsonl and the report show what it adds."""
    max_tokens: Annotated[int, Field(ge=1)] = 64
    """Tokens of each completion."""
    worker: EvaluationWorker | None = None
    """A worker of its own for evaluations, so that the steps do not wait for them: it takes the checkpoints of steps where one is due, all
    of them unless every_steps says otherwise, and its results come as the run goes on. Before the first step and after the last one those
    that train evaluate. A loss that is not finite there is noted, and ends nothing. Its memory is not counted in a plan. `{}` takes one
    CPU. Left out, they evaluate in between too."""

    @model_validator(mode="after")
    def _samples(self) -> "Evaluate":
        if not self.prompts:
            without_effect(self, "without prompts", "max_tokens")
        return self


class Checkpoints(Part):
    """Committed checkpoints: shards, then a manifest with hashes, then the marker."""

    every_steps: Annotated[int | None, Field(ge=1)] = None
    """Default: a quarter of the run, 1,000 steps at most. The last step always saves."""
    asynchronous: bool = True
    """Steps stand still only for a copy of the state to the host's memory, and a thread of each worker writes it. false takes no memory
    for a copy: steps wait until the checkpoint is committed, as after the last step and after SIGTERM. Files are the same."""
    keep: Annotated[int, Field(ge=2)] = 2
    """The newest ones that are kept."""
    milestone_steps: Annotated[int | None, Field(ge=1)] = None
    """Those of every so many steps are kept for ever; a multiple of every_steps. Default: none are."""
    keep_best: Annotated[int, Field(ge=0)] = 0
    """So many with the lowest val_loss are kept beside the newest; every checkpoint is then evaluated before it is saved, or, where
    SIGTERM leaves no time to, when the run is taken up again. With evaluate.worker it is evaluated while it is among the newest, and those
    that it has no time for are not among the best."""
    average: Annotated[int, Field(ge=1)] = 1
    """The newest ones whose mean is exported, in fp32. It is evaluated as the run's model: metrics.jsonl has a second record of the last
    step, with their names as `averaged`. 1 exports the last step."""

    @model_validator(mode="after")
    def _kept(self) -> "Checkpoints":
        if self.average > self.keep:
            raise Rule("average", f"{self.average} are not there at the end with keep {self.keep}; set keep: {self.average}")
        return self


class Ema(Part):
    """An exponential moving average of the weights (Polyak and Juditsky 1992), in fp32."""

    decay: Annotated[float, Field(gt=0, lt=1)] = 0.999
    """What it keeps of itself at a step; at step t (1 + t) / (10 + t) at most, so that the first weights are soon forgotten."""


class Spike(Part):
    """A loss that is far above those of the steps before it: above their median by `factor` robust standard deviations, 1.4826 times
    their median absolute deviation (Hampel 1974). Every loss is taken in, so that a level that stays becomes the usual one."""

    window: Annotated[int, Field(ge=8)] = 100
    """Steps before it that a loss is compared with; nothing is decided until there are so many."""
    factor: Annotated[float, Field(gt=0)] = 10.0
    """How many standard deviations above the median a loss may be."""
    action: Literal["stop", "skip", "warn"] = "stop"
    """stop ends the run before the update; skip makes no update at that step, as PaLM's training left out batches (Chowdhery et al.
    2022, section 5.1); warn notes it. All are recorded in the events, skip and warn in metrics.jsonl too."""


class Guard(Part):
    """What is watched while a run goes on. A loss or gradient that is not finite always ends it before the update."""

    spike: Spike | None = None
    """Loss spikes. Left out, they are not looked for."""
    step_timeout_s: Annotated[float, Field(ge=0)] = 600
    """Seconds that a step may stand still: each of its micro-batches may take so long, and the wait for its samples. Longer, and the ranks
    write their stacks to their logs and end with the cause hang, naming the rank that hangs. Evaluation, checkpoints and the export may
    take longer, as long as every rank answers and none waits for another for about half an hour, or twice this where that is more. 0 turns
    it off."""
    grace_period_s: Annotated[float | None, Field(gt=0)] = None
    """Seconds from SIGTERM to the end of a machine, as its scheduler has them: terminationGracePeriodSeconds of Kubernetes is 30, KillWait
    of Slurm 30, and AWS takes a spot instance two minutes after its notice. A run says once if a step, or an evaluation, and the checkpoint
    after it take longer, and how long they took when it was preempted; where Ray drains a node with a deadline, that holds. Default: not
    known."""


class Track(Part):
    """Where a run's metrics go beside its folder, from the job's driver. A service that does not answer never ends a run."""

    mlflow: Annotated[str | None, Field(pattern="^https?://")] = None
    """The address of an MLflow server. What its client takes from the environment holds: MLFLOW_TRACKING_TOKEN, or
    MLFLOW_TRACKING_USERNAME and _PASSWORD, and MLFLOW_EXPERIMENT_NAME, which is distlm unless it is set."""
    wandb: Annotated[str | None, Field(min_length=1)] = None
    """A project of Weights & Biases; with the extra `distlm[wandb]`, and the key or WANDB_MODE=offline in the environment."""


class Retry(Part):
    """How often a run is resumed from its last checkpoint, by cause. It counts anew after a checkpoint of checkpoint.every_steps that was
    committed since; what is saved because of SIGTERM, or of a node that is drained, is none."""

    worker_died: Annotated[int, Field(ge=0)] = 2
    """A worker process ended."""
    node_lost: Annotated[int, Field(ge=0)] = 2
    """A node left the cluster."""
    hang: Annotated[int, Field(ge=0)] = 2
    """A rank stood still for longer than guard.step_timeout_s, and all have been ended."""
    preempted: Annotated[int, Field(ge=0)] = 10
    """A worker was sent SIGTERM, or Ray drains its node: all have saved at the end of their step. So often between two checkpoints of
    checkpoint.every_steps. A driver that is sent SIGTERM ends with them and is not retried."""


class TrainSpec(Job):
    """From a corpus to a trained model."""

    kind: Literal["train"] = "train"
    """The kind of the job."""
    corpus: Annotated[str | Mixture, BeforeValidator(mixture, json_schema_input_type=CorpusName | Shares | Mixture)]
    """A prepared corpus, by name or path.
    Or a mixture: a list of sections with corpus and weight, which is short for a section with mix."""
    model: ModelSpec
    """What is trained."""
    adapter: Adapter | None = None
    """A low-rank adapter for the checkpoint of model.from, in place of all its weights; with the extra `distlm[adapters]`. Left out, all
    weights are trained."""
    keep_zeros: bool = False
    """Whether every weight that is zero in the checkpoint of model.from stays zero: training that makes up for `kind: compress` by
    magnitude."""
    objective: Literal["pretrain", "sft", "distill", "dpo", "classify"] = "pretrain"
    """What the loss is: the next token's cross-entropy, over the tokens that give one. sft is the same, and asks for corpora of
    conversations. distill learns from a teacher beside it, of texts or conversations. dpo makes the chosen of two answers more likely than
    the rejected one, and asks for corpora of preferences. classify asks for corpora with labels: that of a document's labels, by its last
    token, or as the encoder of model.from reads it."""
    distill: Distill | None = None
    """With objective: distill, the teacher and what its part of the loss is."""
    dpo: Dpo = Dpo()
    """With objective: dpo, what its loss is made of."""
    class_weights: Literal["balanced"] | dict[str, Annotated[float, Field(gt=0)]] | None = None
    """With classify: what the loss of each label is multiplied by, by its name, or balanced, by how rare it is. Default: all by 1."""
    fold: Fold | None = None
    """One fold of a cross-validation; a sweep with `folds` sets it. Left out, the corpus's own split is."""
    batch: Batch = Batch(global_sequences=32)
    """The global batch, the same at every number of workers."""
    optimizer: Optimizer = Optimizer()
    """The optimizer."""
    schedule: Schedule = Schedule()
    """The learning rate over time."""
    regularization: Regularization = Regularization()
    """Dropout, label smoothing, z-loss."""
    duration: Duration
    """How long."""
    precision: Literal["fp32", "bf16", "fp16", "fp8"] = "bf16"
    """bf16 computes in bfloat16 and keeps fp32 master weights; fp16 does so in float16 with a scaled loss, for GPUs without bfloat16. fp8
    is bf16 with the matrix products of the hidden layers in float8 while it trains (Micikevicius et al. 2022): faster steps of wide models,
    on GPUs of compute capability 8.9 and later such as L4 and H100, with compile and the extra `distlm[compress]`."""
    reduce_precision: Literal["fp32", "same"] | None = None
    """In what gradients are added up, over micro-batches and over workers: fp32, or the same precision as the weights, whose rounding grows
    with the number of micro-batches, in half of the traffic and of a gradient's memory. Left out: fp32, but same where the optimizer is
    offloaded under ZeRO stage 1 or 2, where DeepSpeed keeps what is in fp32 on the GPU, and with quantized_gradients."""
    loss_scale: LossScale = LossScale()
    """With fp16: what the loss is multiplied by, so that small gradients are not 0."""
    activation_checkpointing: Annotated[int, Field(ge=0)] = 0
    """Every n-th layer keeps its input alone and is computed again in the backward pass (Chen et al. 2016): 1 for every layer, which takes
    the least memory and about a third more time. 0 keeps all activations."""
    compile: bool = False
    """Whether layers are compiled by torch.compile (Ansel et al. 2024) as the run begins, which takes up to a minute: faster steps, whose
    losses differ in their last bits from those without. On CPU every node needs a C++ compiler. Not with ZeRO stage 3."""
    deterministic: bool = False
    """Whether GPUs add up in one order, with slower kernels where the fastest do not, so that a run that goes on is bit-equal with windows
    of any length too: not yet measured on a GPU. An operation that has no such kernel ends the run with its name. Runs on CPU are bit-equal
    without it."""
    sharding: Sharding = Sharding()
    """ZeRO."""
    scale: Scale = Scale()
    """Workers and their resources."""
    evaluate: Evaluate = Evaluate()
    """Validation."""
    checkpoint: Checkpoints = Checkpoints()
    """Saving."""
    ema: Ema | None = None
    """An average of the weights over steps, which is then what is evaluated and exported. Left out, there is none."""
    guard: Guard = Guard()
    """Watching over the run."""
    retry: Retry = Retry()
    """Going on after a failure."""
    track: Track = Track()
    """Following the run elsewhere."""
    seed: Seed = 0
    """Initial weights and the order of the samples."""

    @property
    def mixture(self) -> list[Share]:
        """The corpora; one alone is a mixture of one."""
        return self.corpus.mix if isinstance(self.corpus, Mixture) else [Share(corpus=self.corpus, weight=1)]

    @property
    def data_workers(self) -> int:
        """Workers that read samples of their own; of a group that shares a model or its sequences one counts."""
        return self.scale.workers // self.sharding.tensor_parallel // self.sharding.sequence_parallel

    @property
    def fp32_sums(self) -> bool:
        """Whether gradients are added up in fp32 where weights are computed with in less."""
        if self.precision == "fp32" or self.reduce_precision:
            return self.precision != "fp32" and self.reduce_precision == "fp32"
        return not (quantizes_gradients(self) or (self.sharding.zero < 3 and offloads_optimizer(self)))

    @model_validator(mode="after")
    def _rules(self) -> "TrainSpec":
        check_optimizer(self.optimizer, self.sharding.zero)
        check_offload(self)
        check_zeropp(self)
        check_tensor_parallel(self, self.sharding.zero)
        check_sequence_parallel(self)
        check_adapter(self)
        check_base(self, self.sharding.zero)
        check_zeros(self)
        check_distill(self)
        check_dpo(self)
        check_classify(self)
        if self.evaluate.prompts and self.sharding.sequence_parallel > 1:
            raise Rule("evaluate.prompts", "cannot be with sharding.sequence_parallel, which divides sequences of one length alone; leave "
                                           "them out, and evaluate the run with kind: evaluate")
        check_evaluation_worker(self)
        check_fold(self)
        check_precision(self)
        check_reduce(self)
        check_compile(self, self.sharding.zero)
        if self.model.mup and self.optimizer.name not in ("adamw", "lion"):
            raise Rule("model.mup", f"its rules are for adamw and lion, not for {self.optimizer.name}; leave it out, or take adamw")
        if self.ema and self.checkpoint.average > 1:
            raise Rule("checkpoint.average", f"{self.checkpoint.average} stands beside ema, which is exported; leave one of them out")
        if self.optimizer.name == "muon" and self.sharding.zero and self.guard.spike and self.guard.spike.action == "skip":
            raise Rule("guard.spike.action", "skip: DeepSpeed's muon changes its momentum before the update can be left out under ZeRO; "
                                             "set stop or warn, or zero: 0")
        if self.duration.steps is not None:
            check_steps(self, self.duration.steps)
        if self.batch.global_sequences is not None:
            check_batch(self.batch.global_sequences, self.batch, self.data_workers)
        return self


def check_adapter(spec: TrainSpec) -> None:
    """Raises Rule where an adapter cannot be what is trained."""
    if spec.adapter is None:
        return
    if spec.model.source is None:
        raise Rule("adapter", "needs a model that is trained already; set model.from, or leave it out")
    for where, given in (("sharding.tensor_parallel", spec.sharding.tensor_parallel > 1), ("sharding.offload", spec.sharding.offload)):
        if given:
            raise Rule(where, "is not proved to make the same steps with an adapter; leave one of them out")
    if spec.optimizer.name == "muon":
        raise Rule("optimizer.name", "muon would make an adapter's narrow matrices orthogonal, which lifts their rank; take adamw")


def check_evaluation_worker(spec: TrainSpec) -> None:
    """Raises Rule where a worker cannot evaluate the run's checkpoints."""
    if spec.evaluate.worker and spec.precision in ("fp16", "fp8") and not spec.evaluate.worker.gpus:
        raise Rule("evaluate.worker.gpus", f"{spec.precision} needs GPUs, and it is 0; set 1, or take bf16 or fp32")


def check_precision(spec: TrainSpec) -> None:
    """Raises Rule where the workers, or what else the spec asks for, cannot be with the precision."""
    if spec.precision != "fp16":
        without_effect(spec, f"with {spec.precision}", "loss_scale")
    if spec.precision in ("fp16", "fp8") and not spec.scale.gpus_per_worker:
        raise Rule("precision", f"{spec.precision} needs GPUs, and scale.gpus_per_worker is 0; take bf16 or fp32")
    if spec.precision == "fp16" and not spec.sharding.zero:
        raise Rule("sharding.zero", "0 cannot be with fp16, whose loss scale DeepSpeed handles rightly under ZeRO alone; set zero: 1, "
                                    "or take bf16")
    gpu = find_gpu(spec.scale.gpu) if spec.scale.gpu else None
    if gpu and not gpu.multiplies(spec.precision):
        able = ", ".join(name for name, one in GPUS.items() if one.multiplies(spec.precision))
        instead = "bf16" if gpu.bf16 else "fp16 with sharding.zero: 1, or fp32"
        raise Rule("precision", f"{spec.precision} is not in the hardware of {spec.scale.gpu}; take {instead}, or one of {able}")
    if spec.precision != "fp8":
        return
    for where, given in (("sharding.tensor_parallel", spec.sharding.tensor_parallel > 1),
                         ("sharding.sequence_parallel", spec.sharding.sequence_parallel > 1)):
        if given:
            raise Rule(where, "cannot be with layers that are compiled, as fp8's are; leave it out, or take bf16")
    if spec.adapter:
        raise Rule("adapter", "is not proved with fp8; leave it out, or take bf16")
    if spec.objective == "dpo":
        raise Rule("precision", "fp8 is not proved with objective: dpo, whose log-probabilities of whole answers add its rounding up; take "
                                "bf16")
    if not spec.compile:
        raise Rule("compile", "fp8 is slower than bf16 where layers are not compiled; set compile: true, or take bf16")


def check_reduce(spec: TrainSpec) -> None:
    """Raises Rule where gradients cannot be added up as the spec says."""
    if spec.precision == "fp32":
        without_effect(spec, "with precision: fp32, in which all is added up", "reduce_precision")
    if spec.reduce_precision != "fp32":
        return
    if quantizes_gradients(spec):
        raise Rule("reduce_precision", "fp32 cannot be with quantized gradients, which are added up in 4 bits; leave one of them out")
    if spec.optimizer.name == "muon" and spec.sharding.zero < 3 and offloads_optimizer(spec):
        raise Rule("reduce_precision", "fp32 cannot be with muon whose states are offloaded under ZeRO stage 1 or 2, where DeepSpeed adds "
                                       "its matrices up as they come; leave it out, or set sharding.zero: 3")


def check_compile(spec: TrainSpec, zero: int) -> None:
    """Raises Rule where compiled layers cannot be under a ZeRO stage."""
    if spec.compile and zero == 3:
        raise Rule("compile", "true cannot be with ZeRO stage 3, which gathers weights in the midst of a layer; leave it out, or set "
                              "sharding.zero: 2")


def check_base(spec: TrainSpec, zero: int) -> None:
    """Raises Rule where an adapter's base cannot be held as the spec asks, under a ZeRO stage."""
    if spec.adapter and spec.adapter.base and zero == 3:
        raise Rule("sharding.zero", f"3 divides weights, and those in {spec.adapter.base} have scales beside them that DeepSpeed does not "
                                    "divide; set zero: 2, or leave adapter.base out")


def check_zeros(spec: TrainSpec) -> None:
    """Raises Rule where weights that are zero would not stay so."""
    if not spec.keep_zeros:
        return
    if spec.model.source is None:
        raise Rule("keep_zeros", "keeps the zeros of a model that was pruned; set model.from, or leave it out")
    for where, given in (("adapter", spec.adapter), ("sharding.tensor_parallel", spec.sharding.tensor_parallel > 1),
                         ("sharding.zeropp.quantized_gradients", spec.sharding.zeropp.quantized_gradients)):
        if given:
            raise Rule(where, "does not leave each weight's gradient to itself, or adds to weights that are zero; leave it or keep_zeros "
                              "out")
    if spec.optimizer.name == "muon":
        raise Rule("optimizer.name", "muon mixes the gradients of a matrix, and zeros would not stay; take adamw, or leave keep_zeros out")


def check_classify(spec: TrainSpec) -> None:
    """Raises Rule where a key is none of a classifier's, or is for one and none is trained."""
    if spec.objective != "classify":
        without_effect(spec, f"with objective: {spec.objective}", "class_weights")
        return
    for where, given in (("sharding.tensor_parallel", spec.sharding.tensor_parallel > 1),
                         ("sharding.sequence_parallel", spec.sharding.sequence_parallel > 1), ("model.mup", spec.model.mup)):
        if given:
            raise Rule(where, "is not proved with objective: classify; leave one of them out")
    rules = spec.regularization
    for where, idle in (("batch.mask_documents", spec.batch.mask_documents is None),
                        ("evaluate.prompts", not spec.evaluate.prompts),
                        ("regularization.label_smoothing", rules.label_smoothing == 0), ("regularization.z_loss", rules.z_loss == 0)):
        if not idle:
            raise Rule(where, "has no effect with objective: classify; leave it out")


def check_steps(spec: TrainSpec, steps: int) -> None:
    """Raises Rule where what is counted in steps does not fit a run of `steps`."""
    warmup = spec.schedule.warmup_steps
    if warmup > steps:
        raise Rule("schedule.warmup_steps", f"{warmup} are more than the {steps} of duration.steps; shorten the warm-up")
    decay = max(1, round(spec.schedule.decay_fraction * steps)) if spec.schedule.name == "wsd" else 0
    if warmup + decay > steps:
        raise Rule("schedule.warmup_steps", f"{warmup} steps of warm-up overlap the last {decay} of {steps}, which decay; shorten the "
                                            "warm-up or lower decay_fraction")
