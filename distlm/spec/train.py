"""`kind: train`: from a corpus to a run with checkpoints and an export."""

import math
import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from distlm.spec.base import Job, Part, Rule, Seed, exactly_one, without_effect
from distlm.spec.explain import shown
from distlm.spec.gpus import GPUS, find_gpu
from distlm.spec.presets import PRESETS

CorpusName = Annotated[str, Field(min_length=1)]


class Share(Part):
    """One corpus of a mixture."""

    corpus: CorpusName
    """A prepared corpus, by name or path; all of a mixture have the same context and tokenizer."""
    weight: Annotated[float, Field(ge=0)]
    """Its share of the samples, relative to the sum of all weights: 0.7 and 0.3 are the same as 7 and 3."""
    epochs: Annotated[float | None, Field(gt=0)] = None
    """At most so many passes over its training split: a longer duration is refused. Default: as many as it takes."""
    final_weight: Annotated[float | None, Field(ge=0)] = None
    """Its weight at the end; given for every corpus of the mixture or for none. Default: the weights stay as they are."""

    @model_validator(mode="after")
    def _used(self) -> "Share":
        if not self.weight and not self.final_weight:
            raise Rule("weight", "0 would take no sample of this corpus; leave it out, or give it a final_weight")
        return self


Shares = Annotated[list[Share], Field(min_length=1)]


class Mixture(Part):
    """Several corpora of which every batch takes its samples in proportion. A plain list stands for `{mix: ...}`."""

    mix: Shares
    """The corpora, each with its weight."""
    anneal_fraction: Annotated[float, Field(gt=0, le=1)] = 0.2
    """With final_weight: the share of all samples, at the end, over which the weights change linearly from weight to final_weight."""

    @model_validator(mode="after")
    def _rules(self) -> "Mixture":
        names = [share.corpus for share in self.mix]
        for i, share in enumerate(self.mix):
            if share.corpus in names[:i]:
                raise Rule("mix", f"{share.corpus} is there twice; give it once, with the sum of the weights")
        finals = [share.final_weight for share in self.mix if share.final_weight is not None]
        if finals and len(finals) < len(self.mix):
            missing = next(share.corpus for share in self.mix if share.final_weight is None)
            raise Rule("mix", f"{missing} has no final_weight and others have; give one to each corpus, or to none")
        if finals and not sum(finals):
            raise Rule("mix", "every final_weight is 0; one at least must be above it")
        if not sum(share.weight for share in self.mix):
            raise Rule("mix", "every weight is 0; one at least must be above it")
        if not finals:
            without_effect(self, "where no corpus has a final_weight", "anneal_fraction")
        return self


def _mixture(value: Any) -> Any:
    """A mapping or a list is a mixture, and its mistakes stand where they are, not under each form that a corpus can have."""
    if isinstance(value, dict | list):
        return Mixture.model_validate({"mix": value} if isinstance(value, list) else value, by_alias=True, by_name=False)
    if value == "":
        raise Rule("", "'': must not be empty")
    if not isinstance(value, str | Mixture):
        raise Rule("", f"{shown(value)}: must be text, or a list of sections with corpus and weight; a number is put in quotes")
    return value


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
    """A folder that `AutoModelForCausalLM.from_pretrained` loads, or a run of ours by name or path."""
    context: Annotated[int | None, Field(ge=8)] = None
    """Tokens of context. Default, and only value possible: the corpus's."""
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


def _micro(value: Any) -> Any:
    if value != "auto" and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise Rule("", f"{shown(value)}: must be a whole number of 1 or more, or auto")
    return value


Micro = Annotated[int | Literal["auto"], BeforeValidator(_micro, json_schema_input_type=Annotated[int, Field(ge=1)] | Literal["auto"])]


class Batch(Part):
    """One optimizer step. Its loss is the sum over all tokens that give loss divided by their count, however it is cut into
    micro-batches."""

    global_tokens: Annotated[int | None, Field(ge=1)] = None
    """Tokens of a step over all workers: a multiple of the context."""
    global_sequences: Annotated[int | None, Field(ge=1)] = None
    """The same as a number of sequences."""
    micro_sequences: Micro | None = None
    """Sequences of one forward pass on one worker. auto tries before the run which is the largest that fits a worker's memory, by steps of
    which nothing is kept. Default: the largest divisor of a worker's share up to 16."""
    mask_documents: bool | None = None
    """Whether attention stays inside a document, whose positions begin at 0 and whose first token gives no loss. Default: true where a
    corpus is packed by best-fit, else false."""

    @model_validator(mode="after")
    def _one(self) -> "Batch":
        exactly_one(self, "global_tokens", "global_sequences")
        return self


OPTIMIZER_KEYS = {"adamw": ("betas", "eps"), "muon": ("momentum", "betas", "eps"), "lion": ("betas",), "adafactor": ("beta2_decay",),
                  "sgd": ("momentum",)}
"""Keys that only some optimizers read."""
OPTIMIZER_DEFAULTS: dict[str, dict[str, Any]] = {"lion": {"betas": (0.9, 0.99)}, "sgd": {"momentum": 0.9}}
"""Where an optimizer's default is not the field's."""


class ParameterGroup(Part):
    """Parameters that are treated in their own way."""

    match: Annotated[str, Field(min_length=1)]
    """A regular expression that is searched for in the parameters' names, as transformers names them: model.embed_tokens.weight. A
    parameter belongs to the first group that matches it."""
    lr_factor: Annotated[float, Field(ge=0)] = 1.0
    """The learning rate over that of the schedule."""
    weight_decay: Annotated[float | None, Field(ge=0)] = None
    """Decay, of vectors too. Default: optimizer.weight_decay for parameters with two dimensions or more."""

    @model_validator(mode="after")
    def _compiles(self) -> "ParameterGroup":
        try:
            re.compile(self.match)
        except re.error as error:
            raise Rule("match", f"{self.match!r} is no regular expression: {error}") from None
        return self


class Optimizer(Part):
    """How gradients become updates. Weight decay is decoupled (Loshchilov and Hutter 2019), and for matrices alone."""

    name: Literal["adamw", "muon", "lion", "adafactor", "sgd"] = "adamw"
    """adamw; muon for the matrices of hidden layers and adamw for the rest (Jordan et al. 2024), scaled so that adamw's rate and decay
    suit it (Liu et al. 2025); lion (Chen et al. 2023); adafactor (Shazeer and Stern 2018); sgd, whose decay is added to the gradient."""
    lr: Annotated[float, Field(gt=0)] = 1e-3
    """Peak learning rate; of adafactor, relative to a parameter's root mean square."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """Decay of parameters with two dimensions or more."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    """adamw, muon's adamw, lion: decay rates of the two moments; of lion, of the update and of the momentum, 0.9 and 0.99 by default."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """adamw, muon's adamw: added to the denominator."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """muon, sgd: decay rate of the momentum; 0.9 by default with sgd."""
    beta2_decay: Annotated[float, Field(gt=-1, lt=0)] = -0.8
    """adafactor: at step t the second moment forgets t to the power of this."""
    clip: Annotated[float, Field(ge=0)] = 1.0
    """Largest global gradient norm; 0 turns clipping off. Under ZeRO 1 to 3 the norm that DeepSpeed knows of muon, and that metrics.jsonl
    shows, is the update's: there it must be 0."""
    groups: list[ParameterGroup] = []
    """Parameters with another decay or learning rate than the rest."""

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, data: Any) -> Any:
        return {**OPTIMIZER_DEFAULTS.get(str(data.get("name")), {}), **data} if isinstance(data, dict) else data

    @model_validator(mode="after")
    def _effect(self) -> "Optimizer":
        for key in dict.fromkeys(key for keys in OPTIMIZER_KEYS.values() for key in keys):
            if key not in OPTIMIZER_KEYS[self.name]:
                without_effect(self, f"with {self.name}, whose keys are {', '.join(OPTIMIZER_KEYS[self.name])}", key)
        return self


class Schedule(Part):
    """The learning rate as a function of the step: warm-up, then the named shape."""

    name: Literal["cosine", "linear", "constant", "inverse_sqrt", "wsd"] = "cosine"
    """cosine and linear fall to min_ratio; inverse_sqrt falls with the root of the step; wsd (warm-up, stable, decay) is constant until
    its last part falls linearly."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps over which the rate rises linearly."""
    warmup_tokens: Annotated[int | None, Field(ge=1)] = None
    """The same in tokens, rounded up to whole steps."""
    decay_fraction: Annotated[float, Field(gt=0, le=1)] = 0.2
    """wsd: the share of all steps that decays."""
    min_ratio: Annotated[float, Field(ge=0, le=1)] = 0.1
    """cosine, linear, wsd: the final rate over the peak rate."""

    @model_validator(mode="after")
    def _effect(self) -> "Schedule":
        if self.warmup_tokens is not None and self.warmup_steps:
            raise Rule("warmup_tokens", f"{self.warmup_tokens} stands beside warmup_steps {self.warmup_steps}; leave one of them out")
        if self.name != "wsd":
            without_effect(self, f"with {self.name}: only wsd decays at the end", "decay_fraction")
        if self.name == "constant":
            without_effect(self, "with constant, which does not fall", "min_ratio")
        if self.name == "inverse_sqrt":
            without_effect(self, "with inverse_sqrt, which has no floor", "min_ratio")
        return self

    def in_steps(self, tokens_per_step: int) -> "Schedule":
        """The same schedule with its warm-up counted in steps."""
        if self.warmup_tokens is None:
            return self
        return self.model_copy(update={"warmup_tokens": None, "warmup_steps": math.ceil(self.warmup_tokens / tokens_per_step)})


class Regularization(Part):
    """What keeps a model from fitting its samples too closely. The training loss that is shown is the plain cross-entropy all the same, and
    evaluation uses none of it."""

    dropout: Annotated[float | None, Field(ge=0, lt=1)] = None
    """Share of activations that are set to 0 wherever the model's family can: llama in attention alone, gpt2 after embeddings and layers
    too. Default: 0, or what model.config or the checkpoint of model.from says."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the target's probability that is spread over the whole vocabulary (Szegedy et al. 2016, section 7)."""
    z_loss: Annotated[float, Field(ge=0)] = 0.0
    """Weight of log² Z, the squared logarithm of the softmax's denominator; 1e-4 in PaLM (Chowdhery et al. 2022, section 5)."""


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


DEEPSPEED_KEYS = {"train_batch_size": "batch.global_sequences", "train_micro_batch_size_per_gpu": "batch.micro_sequences",
         "gradient_accumulation_steps": "batch.micro_sequences", "gradient_clipping": "optimizer.clip", "optimizer": "optimizer",
         "scheduler": "schedule", "bf16": "precision", "fp16": "precision",
         "amp": "precision", "torch_autocast": "precision",
         "activation_checkpointing": "activation_checkpointing", "zero_optimization.stage": "sharding.zero",
         "tensor_parallel": "sharding.tensor_parallel", "sequence_parallel_size": "sharding.sequence_parallel"}
"""DeepSpeed's keys that the spec sets elsewhere, and where."""


class Offload(Part):
    """What lies outside of the GPUs' memory (Ren et al. 2021; Rajbhandari et al. 2021): the same steps, slower. A run on CPUs makes them
    too and saves no memory."""

    optimizer: Literal["cpu", "nvme"] | None = None
    """Where the optimizer's states and the fp32 weights lie, which are updated on the CPU: cpu from ZeRO stage 1 on, nvme with stage 3."""
    parameters: Literal["cpu", "nvme"] | None = None
    """Where the weights lie until a layer needs them; with ZeRO stage 3."""
    path: Annotated[str | None, Field(min_length=1)] = None
    """A folder on a fast disk of every node, for nvme."""

    @model_validator(mode="after")
    def _rules(self) -> "Offload":
        nvme = [key for key in ("optimizer", "parameters") if getattr(self, key) == "nvme"]
        if not self.optimizer and not self.parameters:
            raise Rule("", "neither optimizer nor parameters is given; give one of them, or leave offload out")
        if nvme and not self.path:
            raise Rule("path", f"{nvme[0]}: nvme needs a folder on a fast disk; give path, or set {nvme[0]}: cpu")
        if self.path and not nvme:
            raise Rule("path", f"{self.path} has no effect where nothing lies on nvme; leave it out")
        return self


class ZeroPlusPlus(Part):
    """ZeRO++ (Wang et al. 2023): less traffic between nodes under ZeRO stage 3."""

    hierarchical_partition: Annotated[int, Field(ge=1)] = 1
    """Weights are kept a second time over groups of so many workers, those of a node, from which the backward pass gathers them. A divisor
    of scale.workers; 1 for none."""
    quantized_weights: bool = False
    """Weights are gathered in 8 bits, on GPUs; steps are no longer exactly those of other stages."""
    quantized_gradients: bool = False
    """Gradients are reduced in 4 bits, on GPUs; steps are no longer exactly those of other stages."""


class Sharding(Part):
    """How DeepSpeed divides the model over the workers."""

    zero: Literal[0, 1, 2, 3] = 0
    """ZeRO stage: 1 shards optimizer states, 2 gradients too, 3 parameters too (Rajbhandari et al. 2020)."""
    tensor_parallel: Annotated[int, Field(ge=1)] = 1
    """Neighbouring workers that hold one model together, a part of each layer's matrices on every one (Shoeybi et al. 2019), and read the
    same samples; embeddings and the last layer are whole on each. A divisor of scale.workers, of the model's attention and key-value heads
    and of its feed-forward width. ZeRO divides the states of each part over those workers that have it."""
    sequence_parallel: Annotated[int, Field(ge=1)] = 1
    """Neighbouring workers that divide each sequence among them (Jacobs et al. 2023): each computes with its part of the tokens, and in
    attention with its part of the heads over all of them. Activations take so much less memory, weights as much as without. A divisor of
    scale.workers, of the context and of the model's attention and key-value heads."""
    offload: Offload | None = None
    """What lies in the host's memory or on its disks. Left out, all is on the device that computes."""
    zeropp: ZeroPlusPlus = ZeroPlusPlus()
    """Less traffic between nodes, with ZeRO stage 3."""
    deepspeed: dict[str, Any] = {}
    """Raw DeepSpeed keys for experts. A key that the spec sets elsewhere is refused."""

    @model_validator(mode="after")
    def _rules(self) -> "Sharding":
        if self.zero < 3:
            without_effect(self, f"with zero: {self.zero}: only stage 3 shards weights", "zeropp")
        if self.offload is None:
            return self
        if self.offload.parameters and self.zero < 3:
            raise Rule("offload.parameters", f"{self.offload.parameters} needs weights that are sharded; set zero: 3, or leave it out")
        least = 3 if self.offload.optimizer == "nvme" else 1
        if self.offload.optimizer and self.zero < least:
            raise Rule("offload.optimizer", f"{self.offload.optimizer} needs ZeRO stage {least} at least, and zero is {self.zero}; set "
                                            f"zero: {least}, or leave it out")
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
    """Memory of a worker: its GPU's, or its share of a node's. A job whose model states exceed it is refused. Default: that of `gpu`."""
    price_per_worker_hour: Annotated[float | None, Field(ge=0)] = None
    """What a worker costs an hour, in any currency: `distlm plan` says what the job will."""

    @model_validator(mode="after")
    def _known(self) -> "Scale":
        if self.gpu is not None:
            if not self.gpus_per_worker:
                without_effect(self, "where gpus_per_worker is 0", "gpu")
            if find_gpu(self.gpu) is None:
                raise Rule("gpu", f"{self.gpu!r} is not in the table of GPUs; there are {', '.join(GPUS)}; or leave it out and set "
                                  "memory_gib")
        return self


class Evaluate(Part):
    """Validation loss during training."""

    every_steps: Annotated[int | None, Field(ge=1)] = None
    """Default: a tenth of the run. The first and the last step always evaluate."""
    max_windows: Annotated[int, Field(ge=1)] = 512
    """Windows of the validation split that are used, the same ones every time; of a mixture's corpora, each its share of them, one at
    least, and the loss is the mean of theirs by their shares of the samples."""


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
    """So many with the lowest val_loss are kept beside the newest; every checkpoint is then evaluated before it is saved."""
    average: Annotated[int, Field(ge=1)] = 1
    """The newest ones whose mean is exported, in fp32; distlm.json in the export has its own val_loss then, and metrics.jsonl the last
    step's. 1 exports the last step."""

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
    write their stacks to their logs and end with the cause hang, naming the rank that hangs. 0 turns it off. Evaluation, checkpoints and
    the export are not timed."""


class Track(Part):
    """Where a run's metrics go beside its folder, from the job's driver. A service that does not answer never ends a run."""

    mlflow: Annotated[str | None, Field(pattern="^https?://")] = None
    """The address of an MLflow server. What its client takes from the environment holds: MLFLOW_TRACKING_TOKEN, or
    MLFLOW_TRACKING_USERNAME and _PASSWORD, and MLFLOW_EXPERIMENT_NAME, which is distlm unless it is set."""
    wandb: Annotated[str | None, Field(min_length=1)] = None
    """A project of Weights & Biases; with the extra `distlm[wandb]`, and the key or WANDB_MODE=offline in the environment."""


class Retry(Part):
    """How often a run is resumed from its last checkpoint, by cause."""

    worker_died: Annotated[int, Field(ge=0)] = 2
    """A worker process ended."""
    node_lost: Annotated[int, Field(ge=0)] = 2
    """A node left the cluster."""
    preempted: Annotated[int, Field(ge=0)] = 10
    """A worker was sent SIGTERM: all have saved at the end of their step. A driver that is sent it ends with them and is not retried."""


class TrainSpec(Job):
    """From a corpus to a trained model."""

    kind: Literal["train"] = "train"
    """The kind of the job."""
    corpus: Annotated[str | Mixture, BeforeValidator(_mixture, json_schema_input_type=CorpusName | Shares | Mixture)]
    """A prepared corpus, by name or path.
    Or a mixture: a list of sections with corpus and weight, which is short for a section with mix."""
    model: ModelSpec
    """What is trained."""
    objective: Literal["pretrain", "sft"] = "pretrain"
    """What the loss is: the next token's cross-entropy, over the tokens that give one. sft is the same, and asks for corpora of
    conversations."""
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
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """bf16 computes in bfloat16 and keeps fp32 master weights; fp16 does so in float16 with a scaled loss, for GPUs without bfloat16."""
    loss_scale: LossScale = LossScale()
    """With fp16: what the loss is multiplied by, so that small gradients are not 0."""
    activation_checkpointing: Annotated[int, Field(ge=0)] = 0
    """Every n-th layer keeps its input alone and is computed again in the backward pass (Chen et al. 2016): 1 for every layer, which takes
    the least memory and about a third more time. 0 keeps all activations."""
    compile: bool = False
    """Whether layers are compiled by torch.compile (Ansel et al. 2024) as the run begins, which takes up to a minute: faster steps, whose
    losses differ in their last bits from those without. On CPU every node needs a C++ compiler. Not with ZeRO stage 3."""
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

    @model_validator(mode="after")
    def _rules(self) -> "TrainSpec":
        for key, ours in DEEPSPEED_KEYS.items():
            section, _, name = key.partition(".")
            raw = self.sharding.deepspeed.get(section, {})
            if name and not isinstance(raw, dict):
                raise Rule(f"sharding.deepspeed.{section}", f"{raw!r} is no mapping")
            if name in raw if name else section in self.sharding.deepspeed:
                raise Rule(f"sharding.deepspeed.{key}", f"contradicts {ours}, which sets it; leave it out and set {ours}")
        check_optimizer(self.optimizer, self.sharding.zero)
        check_offload(self)
        check_zeropp(self)
        check_tensor_parallel(self, self.sharding.zero)
        check_sequence_parallel(self)
        if self.compile and self.sharding.zero == 3:
            raise Rule("compile", "true cannot be with ZeRO stage 3, which gathers weights in the midst of a layer; leave it out, or set "
                                  "sharding.zero: 2")
        if self.model.mup and self.optimizer.name not in ("adamw", "lion"):
            raise Rule("model.mup", f"its rules are for adamw and lion, not for {self.optimizer.name}; leave it out, or take adamw")
        if self.precision != "fp16":
            without_effect(self, f"with {self.precision}", "loss_scale")
        elif not self.scale.gpus_per_worker:
            raise Rule("precision", "fp16 needs GPUs, and scale.gpus_per_worker is 0; take bf16 or fp32")
        elif not self.sharding.zero:
            raise Rule("sharding.zero", "0 cannot be with fp16, whose loss scale DeepSpeed handles rightly under ZeRO alone; set zero: 1, "
                                        "or take bf16")
        if self.ema and self.checkpoint.average > 1:
            raise Rule("checkpoint.average", f"{self.checkpoint.average} stands beside ema, which is exported; leave one of them out")
        if self.optimizer.name == "muon" and self.sharding.zero and self.guard.spike and self.guard.spike.action == "skip":
            raise Rule("guard.spike.action", "skip: DeepSpeed's muon changes its momentum before the update can be left out under ZeRO; "
                                             "set stop or warn, or zero: 0")
        if self.duration.steps is not None:
            check_steps(self, self.duration.steps)
        if self.batch.global_sequences is not None:
            check_batch(self.batch.global_sequences, self.batch.micro_sequences, self.data_workers)
        return self


def group_of(name: str, groups: Sequence[ParameterGroup]) -> ParameterGroup | None:
    """The first group that matches a parameter's name."""
    return next((group for group in groups if re.search(group.match, name)), None)


def check_groups(groups: Sequence[ParameterGroup], names: list[str]) -> None:
    """Raises Rule for a group that holds no parameter of a model's `names`."""
    used = [group_of(name, groups) for name in names]
    for i, group in enumerate(groups):
        if not any(one is group for one in used):
            earlier = any(re.search(group.match, name) for name in names)
            raise Rule(f"optimizer.groups.{i}.match",
                       f"{group.match!r} matches only what an earlier group holds; leave it out, or put it first" if earlier else
                       f"{group.match!r} matches no parameter; their names are like {', '.join(names[:1] + names[len(names) // 2:][:1])}")


def check_optimizer(optimizer: Optimizer, zero: int) -> None:
    """Raises Rule where DeepSpeed's sharding would make other steps of an optimizer."""
    if optimizer.name == "adafactor" and zero:
        raise Rule("sharding.zero", f"{zero} flattens matrices, of which adafactor keeps rows and columns; set zero: 0, or take adamw")
    if optimizer.name == "muon" and zero and optimizer.clip:
        raise Rule("optimizer.clip", f"{optimizer.clip:g} would clip muon's orthogonal updates under ZeRO-{zero}, not the gradient; set "
                                     "clip: 0, which muon does not need, or zero: 0")


def check_offload(spec: TrainSpec) -> None:
    """Raises Rule where raw keys contradict `sharding.offload`, and where what is offloaded cannot be averaged."""
    offload, averaged = spec.sharding.offload, spec.ema or spec.checkpoint.average > 1
    for ours, key in (("optimizer", "offload_optimizer"), ("parameters", "offload_param")):
        device = getattr(offload, ours, None)
        raw = spec.sharding.deepspeed.get("zero_optimization", {}).get(key, {})
        twice = [name for name in ("device", "nvme_path") if isinstance(raw, dict) and name in raw]
        if device and twice:
            raise Rule(f"sharding.deepspeed.zero_optimization.{key}.{twice[0]}",
                       f"contradicts sharding.offload.{ours}, which sets it; leave one of them out")
        if averaged and "nvme" in (device, raw.get("device") if isinstance(raw, dict) else None):
            where = f"sharding.offload.{ours}" if device else f"sharding.deepspeed.zero_optimization.{key}"
            raise Rule(where, "weights on disks cannot be averaged; leave out ema and checkpoint.average, or set it to cpu" if device else
                       "weights on disks cannot be averaged; leave out ema and checkpoint.average, or set device: cpu")


ZEROPP_KEYS = {"hierarchical_partition": "zero_hpz_partition_size", "quantized_weights": "zero_quantized_weights",
               "quantized_gradients": "zero_quantized_gradients"}
"""Keys of `sharding.zeropp` and DeepSpeed's."""


def check_zeropp(spec: TrainSpec) -> None:
    """Raises Rule where ZeRO++ does not fit the workers, or raw keys contradict it."""
    zeropp, workers = spec.sharding.zeropp, spec.scale.workers
    size = zeropp.hierarchical_partition
    if workers % size:
        near = [n for n in range(1, workers + 1) if workers % n == 0]
        raise Rule("sharding.zeropp.hierarchical_partition", f"{size} does not divide {workers} workers; try {', '.join(map(str, near))}")
    for ours, theirs in ZEROPP_KEYS.items():
        if getattr(zeropp, ours) == type(zeropp).model_fields[ours].default:
            continue
        if ours != "hierarchical_partition" and not spec.scale.gpus_per_worker:
            raise Rule(f"sharding.zeropp.{ours}", "DeepSpeed has its kernels for GPUs alone, and scale.gpus_per_worker is 0; leave it out")
        if theirs in spec.sharding.deepspeed.get("zero_optimization", {}):
            raise Rule(f"sharding.deepspeed.zero_optimization.{theirs}", f"contradicts sharding.zeropp.{ours}, which sets it; leave one of "
                                                                         "them out")


def check_tensor_parallel(spec: TrainSpec, zero: int) -> None:
    """Raises Rule where `sharding.tensor_parallel` does not fit the workers, or what else the spec asks for under a ZeRO stage."""
    degree, workers = spec.sharding.tensor_parallel, spec.scale.workers
    if degree == 1:
        return
    if workers % degree:
        near = [n for n in range(1, workers + 1) if workers % n == 0]
        raise Rule("sharding.tensor_parallel", f"{degree} does not divide {workers} workers; try {', '.join(map(str, near))}")
    if spec.precision != "fp32" and not zero:
        raise Rule("sharding.zero", f"0 cannot be with {spec.precision} and tensor_parallel: {degree}, where DeepSpeed's norm of the "
                                    "gradient has the parts of a group's first worker alone; set zero: 1, or take fp32")
    if spec.optimizer.name in ("muon", "adafactor"):
        raise Rule("optimizer.name", f"{spec.optimizer.name} needs whole matrices, and tensor_parallel: {degree} cuts them; take adamw, "
                                     "lion or sgd")
    raw = spec.sharding.deepspeed.get("zero_optimization", {})
    for where, given in (("compile", spec.compile), ("sharding.offload", spec.sharding.offload),
                         ("sharding.deepspeed.zero_optimization", any(key.startswith("offload") for key in raw))):
        if given:
            raise Rule(where, f"is not proved to make the same steps with tensor_parallel: {degree}; leave one of them out")


def check_sequence_parallel(spec: TrainSpec) -> None:
    """Raises Rule where `sharding.sequence_parallel` does not fit the workers, or what else the spec asks for."""
    degree, workers = spec.sharding.sequence_parallel, spec.scale.workers
    if degree == 1:
        return
    if workers % degree:
        near = [n for n in range(1, workers + 1) if workers % n == 0]
        raise Rule("sharding.sequence_parallel", f"{degree} does not divide {workers} workers; try {', '.join(map(str, near))}")
    for where, given in (("compile", spec.compile), ("sharding.tensor_parallel", spec.sharding.tensor_parallel > 1)):
        if given:
            raise Rule(where, f"is not proved to make the same steps with sequence_parallel: {degree}; leave one of them out")


def check_steps(spec: TrainSpec, steps: int) -> None:
    """Raises Rule where what is counted in steps does not fit a run of `steps`."""
    warmup = spec.schedule.warmup_steps
    if warmup > steps:
        raise Rule("schedule.warmup_steps", f"{warmup} are more than the {steps} of duration.steps; shorten the warm-up")
    decay = max(1, round(spec.schedule.decay_fraction * steps)) if spec.schedule.name == "wsd" else 0
    if warmup + decay > steps:
        raise Rule("schedule.warmup_steps", f"{warmup} steps of warm-up overlap the last {decay} of {steps}, which decay; shorten the "
                                            "warm-up or lower decay_fraction")


def check_batch(global_sequences: int, micro_sequences: int | Literal["auto"] | None, workers: int) -> int:
    """Return the sequences of a micro-batch, for which auto may take another number later. Raises Rule where the global batch cannot be cut
    as the spec asks."""
    if global_sequences % workers:
        low = global_sequences // workers * workers
        near = [n for n in (low, low + workers) if n]
        raise Rule("batch.global_sequences" if workers <= global_sequences else "scale.workers",
                   f"{global_sequences} sequences cannot be divided over {workers} workers; try {' or '.join(map(str, near))} sequences")
    share = global_sequences // workers
    if micro_sequences is None or micro_sequences == "auto":
        return max(n for n in range(1, 17) if share % n == 0)
    if share % micro_sequences:
        small = [n for n in range(1, math.isqrt(share) + 1) if share % n == 0] if share < 1 << 40 else [1]
        divisors = sorted({*small, *(share // n for n in small)}, key=lambda n: abs(math.log(n / micro_sequences)))[:6]
        raise Rule("batch.micro_sequences", f"{micro_sequences} does not divide {global_sequences} sequences over {workers} workers "
                                            f"({share} each); try {', '.join(map(str, sorted(divisors)))}")
    return micro_sequences
