"""What a job will need, found without touching a cluster: parameters, tokens, steps, arithmetic, memory, CPUs and GPUs.

    for what, how_much in needs(resolve("jobs/train.yaml"), Storage.find()):
        print(what, how_much)
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distlm.autoscale import DATA_CPUS, compress_bundles, evaluate_bundles, serve_bundles, total, train_bundles
from distlm.errors import InputError, SpecError
from distlm.machine import machine_memory
from distlm.model.build import check_served
from distlm.model.find import check_name, find_model
from distlm.spec import AverageSpec, CompressSpec, EvaluateSpec, PipelineSpec, PrepareSpec, ServeSpec, TrainSpec, TuneSpec
from distlm.spec.base import Rule
from distlm.spec.batch import check_batch
from distlm.spec.compress import QUANTIZED
from distlm.spec.load import Loaded, Spec, located, validate
from distlm.spec.prepare import BYTES_VOCABULARY, Tokenizer
from distlm.storage import Storage

if TYPE_CHECKING:
    from distlm.clusterfile import Nodes, RayUpFile

Rows = list[tuple[str, str]]
MAX_LABELS = 20
"""Of a classifier, so many are named."""


def needs(loaded: Loaded, storage: Storage, cluster: "RayUpFile | None" = None) -> Rows:
    """(what, how much) rows. `loaded` comes from `execute.resolve`; a `cluster` file may say what its nodes cost. Raises SpecError,
    InputError for what can be seen to fail."""
    if cluster and not isinstance(loaded.spec, TrainSpec | TuneSpec | PipelineSpec):
        raise SpecError(f"a plan of kind: {loaded.spec.kind} has no hours, and so no price", where=f"--cluster {cluster.path}",
                        remedy="leave it out")
    with located(loaded):
        return _needs(loaded.spec, storage, cluster)


def _needs(spec: Spec, storage: Storage, cluster: "RayUpFile | None") -> Rows:
    check_name(spec.kind, spec.name, storage)
    if isinstance(spec, PrepareSpec):
        return of_prepare(spec)
    if isinstance(spec, TrainSpec):
        return of_train(spec, storage, cluster)
    if isinstance(spec, TuneSpec):
        return of_tune(spec, storage, cluster)
    if isinstance(spec, AverageSpec):
        return of_average(spec, storage)
    if isinstance(spec, EvaluateSpec):
        return of_evaluate(spec, storage)
    if isinstance(spec, CompressSpec):
        return of_compress(spec, storage)
    if isinstance(spec, ServeSpec):
        return of_serve(spec, storage)
    return of_pipeline(spec, storage, cluster)


def of_prepare(spec: PrepareSpec) -> Rows:
    from distlm.corpus.documents import check
    from distlm.corpus.files import find_files
    from distlm.corpus.tokenizer import check_template

    later = "${" in (spec.tokenizer.source or "")          # another step makes the tokenizer
    files = find_files(spec.sources) if later else check(spec)[0]
    vocabulary = f"taken from {spec.tokenizer.source}" if spec.tokenizer.source else (
        "256 bytes" if spec.tokenizer.train == "bytes" else f"{spec.tokenizer.vocab_size:,} tokens, trained")
    loss = [("loss", f"conversations: {spec.conversations.loss}")] if spec.conversations else []
    told = check_template(spec.tokenizer, spec.conversations) if spec.conversations and not later else ""
    labels = [("labels", f"{spec.labels.label_key}{', any number' * spec.labels.multiple}")] if spec.labels else []
    return [("files", f"{len(files):,}"), ("bytes", size(sum(file.bytes for file in files))), ("vocabulary", vocabulary),
            *loss, *([("chat template", told)] if told else []), *labels, ("context", f"{spec.context:,} tokens"),
            ("CPUs", str(spec.workers) if spec.workers else "as many as the cluster has")]


def of_train(spec: TrainSpec, storage: Storage, cluster: "RayUpFile | None" = None) -> Rows:
    """A corpus that does not exist yet leaves open what depends on it. Prices of the spec come before those of the cluster file."""
    from distlm.corpus.manifest import read_manifest
    from distlm.train.recipe import find_corpus, make_recipe, read_corpora, read_prompts, without_val

    for share in spec.mixture:
        try:
            read_manifest(find_corpus(share.corpus, storage))
        except InputError as error:
            return [("corpus", f"{share.corpus}: not there yet ({error.message})"), *of_scale(spec)]
    models = (spec.model.source, spec.distill.teacher if spec.distill else None)
    if others := [name for name in models if name and "${" in name]:
        return [("model", f"{' and '.join(others)}, which other steps make"), *of_scale(spec)]
    nodes = nodes_of(spec, cluster)
    if nodes:
        each = {"price_per_worker_hour": nodes.price / spec.scale.workers}
        spec = spec.model_copy(update={"scale": spec.scale.model_copy(update=each)})
    recipe = make_recipe(spec, storage)
    read_prompts(recipe)
    size_ = f"{recipe.shape.vocab_size:,} tokens of vocabulary, context {recipe.shape.context:,}"
    return [("corpus", f"a mixture of {len(recipe.corpora)}, {size_}" if recipe.mix else f"{recipe.corpus}, {size_}"),
            *of_mixture(recipe),
            ("steps", f"{recipe.num_steps:,} of {recipe.global_sequences:,} sequences, {recipe.micro_sequences} in a micro-batch"
             f"{', or as many as fit' if spec.batch.micro_sequences == 'auto' else ''}"),
            *([("batch warm-up", warmup_of(recipe))] if recipe.warmup else []),
            *([("warm-up", f"{recipe.spec.schedule.warmup_steps:,} steps")] if spec.schedule.warmup_tokens else []),
            ("tokens", f"{recipe.tokens(recipe.num_steps):,}"),
            *([("documents", "kept apart: attention stays inside each")] if recipe.mask_documents else []),
            *([("fold", f"{spec.fold.index} of {spec.fold.of}: {recipe.val_windows:,} documents are held out")] if spec.fold else []),
            ("evaluations", f"every {recipe.evaluate_every:,} steps over {recipe.val_windows:,} windows"
             + ", by a worker of their own" * bool(spec.evaluate.worker) if recipe.val else
             f"none: {without_val(read_corpora(spec, storage))[0]}"),
            ("checkpoints", f"every {recipe.checkpoint_every:,} steps" + ", written beside them" * spec.checkpoint.asynchronous),
            *of_model(recipe.spec, recipe.shape, recipe.tokens(recipe.num_steps),
                      (recipe.micro_sequences, recipe.accumulation), recipe.mask_documents, room_of(spec, storage, cluster)),
            *of_scale(spec),
            *([("nodes", f"{nodes.text} an hour")] if nodes else [])]


def nodes_of(spec: TrainSpec, cluster: "RayUpFile | None") -> "Nodes | None":
    """The nodes of a cluster file that hold the workers, where the spec itself has no price."""
    return cluster.nodes_for(train_bundles(spec)[:spec.scale.workers]) if cluster and spec.scale.price_per_worker_hour is None else None


def warmup_of(recipe: Any) -> str:
    """The sizes that steps have before the batch is whole."""
    steps = sum(count for _, count in recipe.warmup)
    sizes = [size for size, _ in recipe.warmup]
    return f"{sizes[0]:,} to {sizes[-1]:,} sequences over the first {steps:,} steps, {recipe.tokens(steps):,} tokens"


def of_mixture(recipe: Any) -> Rows:
    """Share and passes of each corpus; nothing for one corpus."""
    from distlm.corpus.manifest import read_manifest

    if recipe.mix is None:
        return []
    rows = []
    for i, (corpus, count) in enumerate(zip(recipe.corpora, recipe.mix.counts(recipe.num_samples), strict=True)):
        windows = read_manifest(corpus).splits["train"].windows
        weights = [recipe.mix.weights[i], *(recipe.mix.final_weights[i:i + 1])]
        rows.append((f"corpus {i}", f"{corpus}, {' to '.join(f'{weight:.3g}' for weight in weights)} of the samples, "
                                    f"{count / windows:.3g} passes over {windows:,} windows"))
    return rows


GPU_MFU, CPU_MFU, CPU_WIDTH = 0.4, 0.5, 384
"""What a run is taken to reach of the peak: a dense model of a billion parameters on GPUs, one of that width on a CPU. Assumptions, of
which runs on a CPU have 50 to 63 % (README.md)."""


def assumed_mfu(on_gpu: bool, width: int) -> float:
    """Of a narrower model on a CPU less, in proportion: llama-4m, 256 wide, reached 0.71 of llama-10m's, and llama-tiny, 64 wide, 0.14."""
    return GPU_MFU if on_gpu else CPU_MFU * min(1.0, width / CPU_WIDTH)


def of_model(spec: TrainSpec, shape: Any, tokens: int | None, cut: tuple[int, int] = (1, 1), masked: bool = False,
             room: int | None = None) -> Rows:
    """Parameters and activations are counted on the meta device: nothing is allocated. `cut`: micro_sequences and accumulation; `room`:
    bytes of this machine's memory, where the job would run on it."""
    from distlm.model.adapter import adapter_sizes
    from distlm.model.build import model_config, parameter_sizes
    from distlm.model.distill import teacher_config
    from distlm.train.flops import config_flops, forward_flops
    from distlm.train.memory import all_states, host_memory, make_load, peak_memory, start_bytes

    config = model_config(spec.model, shape, spec.regularization.dropout)
    sizes = parameter_sizes(config)
    trained = adapter_sizes(config, spec.adapter) if spec.adapter else None
    parameters, flops = sum({**sizes, **(trained or {})}.values()), config_flops(config, sizes, shape.context, trained)
    load = make_load(spec, config, shape, parameters, *cut, masked)
    teacher: Rows = []
    if spec.distill:
        other = teacher_config(spec.distill.teacher, shape)
        flops += forward_flops(other, parameter_sizes(other), shape.context)
        teacher = [("teacher", f"{spec.distill.teacher}, {load.teacher:,} parameters")]
    memory = peak_memory(load)
    total = f"{flops * tokens:.2e} FLOPs, " if tokens else ""
    own = (f", {sum(trained.values()):,} of them trained" if trained else "") + (f", {load.nf4:,} held in 4 bits" if load.nf4 else "")
    return [("parameters", f"{parameters:,}{own}"), *teacher, ("arithmetic", f"{total}{flops:.2e} FLOPs a token"),
            *of_speed(spec, flops, tokens, load.width), ("memory a worker", summed(memory.parts())),
            *([("host memory a worker", summed(host))] if (host := host_memory(load)) else []),
            *([("host memory at the start", f"{size(sum(start))} of {'each worker' if start[0] else 'rank 0'}")]
              if spec.scale.gpus_per_worker and any(start := start_bytes(load)) else []),
            *([("on disks a worker", summed(disks))] if (disks := on_disks(spec, all_states(load))) else []),
            *of_limit(load, memory.total, room), *of_host(load)]


def on_disks(spec: TrainSpec, states: dict[str, int]) -> dict[str, int]:
    """What of a worker's states lies on nvme."""
    from distlm.train.memory import places

    names = {"parameters": ("weights",), "optimizer": ("optimizer",)}
    return {name: states[name] for part, place in places(spec).items() if place == "nvme" for name in names[part]}


def summed(memory: dict[str, int]) -> str:
    return f"{size(sum(memory.values()))} ({', '.join(f'{name} {size(value)}' for name, value in memory.items() if value)})"


def of_speed(spec: TrainSpec, flops: float, tokens: int | None, width: int) -> Rows:
    """Tokens a second by the peak of the workers and an assumed MFU, hours, and the price where the spec has one."""
    from distlm.train.flops import measured_peak, peak_flops

    scale, cores = spec.scale, os.cpu_count() or 1
    if scale.gpus_per_worker:
        name = scale.gpu or local_gpu()[0]
        peak = peak_flops(name, spec.precision) if name else None
        if peak is None:
            return [("speed", f"not known: {name} is not in the table of GPUs" if name else "not known: scale.gpu names no GPU")]
        peak, of_what = peak * scale.workers, f"{scale.workers} x {peak:.3g} FLOP/s of {name}"
    else:
        threads = min(scale.workers * (scale.threads_per_worker or max(1, cores // scale.workers)), cores)
        peak = measured_peak(spec.precision, threads)
        of_what = f"{peak:.2g} FLOP/s, which products of matrices reach on {threads} of this machine's {cores} cores now"
    share = assumed_mfu(bool(scale.gpus_per_worker), width)
    speed = share * peak / flops
    rows = [("speed", f"{speed:,.0f} tokens/s, if the MFU is {share:.0%} of {of_what}")]
    if tokens:
        hours = tokens / speed / 3600
        rows.append(("time", f"{hours:.3g} hours at this speed, evaluations and checkpoints not counted"))
        if scale.price_per_worker_hour is not None:
            rows.append(("price", f"{hours * scale.workers * scale.price_per_worker_hour:,.2f}, {scale.workers} x "
                                  f"{scale.price_per_worker_hour:g} an hour"))
    return rows


def room_of(spec: TrainSpec, storage: Storage, file: "RayUpFile | None") -> int | None:
    """Bytes of this machine's memory, where workers on CPU would run on it: in a cluster that is up here, or in one for the job itself, if
    that holds them. None elsewhere."""
    from distlm import cluster, head

    if spec.scale.gpus_per_worker or file:
        return None
    try:
        found = cluster.find(storage)
    except InputError:                                     # several are up: `distlm run` will ask which
        return None
    here = (found.address.startswith(("127.0.0.1:", "localhost:")) if found else
            total(train_bundles(spec))["CPU"] <= head.default_cpus())
    return machine_memory() if here else None


def of_limit(load: Any, total: int, room: int | None) -> Rows:
    """A warning where a worker's memory is known and the estimate exceeds it, or where all workers take more than the `room` on this
    machine, with the cheapest change that fits."""
    from distlm.train.memory import CUDA_BYTES, GIB, advice, machine_bytes, memory_limit

    spec = load.spec
    limit, local = memory_limit(spec), local_gpu()[1]
    if limit is None and spec.scale.gpus_per_worker and local:
        limit = local - CUDA_BYTES
    more, whose = "take more workers", ""
    if limit is None and room:
        several = spec.scale.workers > 1
        total, limit, more = machine_bytes(load), room, "take fewer workers, a larger machine" if several else "take a larger machine"
        whose = f" of this machine with all {spec.scale.workers} workers" if several else " of this machine"
    if limit is None or total <= limit:
        return []
    found = advice(load, limit // spec.scale.workers if whose else limit)
    return [("warning", f"does not fit: {total / GIB:.3g} of {limit / GIB:.3g} GiB{whose}; "
                        + (f"it would with {found}{' a worker' * bool(whose)}" if found else
                           f"no ZeRO stage, checkpointing or micro-batch makes it fit: {more}, or a smaller model"))]


def of_host(load: Any) -> Rows:
    """A warning where the workers on GPUs of this machine take more of its own memory than it has, with the cheapest change that fits. What
    GPUs of another kind would have for a node is not known."""
    from distlm.spec.gpus import find_gpu
    from distlm.train.memory import GIB, node_advice, node_memory

    scale = load.spec.scale
    name, _, count = local_gpu()
    if not scale.gpus_per_worker or not count or (scale.gpu and find_gpu(scale.gpu) != find_gpu(name)):
        return []
    workers, limit = min(scale.workers, count), machine_memory()
    if (need := node_memory(load, workers)) <= limit:
        return []
    found = node_advice(load, workers, limit)
    return [("warning of host memory", f"does not fit: {need / GIB:.3g} of the {limit / GIB:.3g} GiB of this machine with {workers} of "
             "the workers; " + (f"it would with {found}" if found else "no ZeRO stage makes it fit: take fewer workers a node, or "
                                "lay on nvme the states that sharding.offload lays on cpu"))]


def local_gpu() -> tuple[str, int, int]:
    """Name and bytes of this machine's first GPU, and how many there are; empty and 0 where there is none."""
    import torch

    if not torch.cuda.is_available():
        return "", 0, 0
    return torch.cuda.get_device_name(0), torch.cuda.get_device_properties(0).total_memory, torch.cuda.device_count()


def of_scale(spec: TrainSpec) -> Rows:
    scale, need = spec.scale, total(train_bundles(spec))
    group = scale.workers // spec.data_workers
    groups = f" in groups of {group}" if group > 1 else ""
    rows = [("workers", f"{scale.workers}{groups}, ZeRO stage {spec.sharding.zero}, {spec.precision}"),
            ("CPUs", f"{need['CPU']:g}: {scale.cpus_per_worker:g} a worker, "
             + (f"{spec.evaluate.worker.cpus:g} for evaluations, " if spec.evaluate.worker else "") + f"{DATA_CPUS} for data")]
    return rows + ([("GPUs", f"{need['GPU']:g}")] if need["GPU"] else [])


def of_tune(spec: TuneSpec, storage: Storage, cluster: "RayUpFile | None" = None) -> Rows:
    from distlm.tune import space

    samples = space.samples(spec)
    asha = "none: every trial runs to its end"
    if spec.asha:
        asha = f"ASHA from step {spec.asha.grace_steps}, the best 1/{spec.asha.reduction} go on"
    first = of_train(space.trial_spec(spec, samples[0], spec.name), storage, cluster)
    folds = f", {spec.folds} folds of each point" if spec.folds else ""
    return [("trials", f"{len(samples)}{folds}, {spec.concurrent or 'as many as the cluster holds'} at once"),
            *((key, described(dimension)) for key, dimension in spec.space.items()), ("early stopping", asha),
            *((f"a trial's {what}", how_much) for what, how_much in first)]


def described(dimension: Any) -> str:
    name = next(name for name in ("uniform", "loguniform", "choice", "grid") if getattr(dimension, name) is not None)
    values = getattr(dimension, name)
    return f"{name}: {values[0]} to {values[1]}" if name.endswith("uniform") else f"{name}: {', '.join(map(str, values))}"


def of_evaluate(spec: EvaluateSpec, storage: Storage) -> Rows:
    """What another step makes, or does not exist yet, leaves open what depends on it."""
    from distlm.corpus.manifest import read_manifest
    from distlm.evaluate.groups import groups_of, read_tasks
    from distlm.evaluate.task import make_task
    from distlm.train.recipe import find_corpus

    rows: Rows = []
    if others := [name for name in [*spec.corpora, spec.model or ""] if "${" in name]:
        rows = [("it reads", f"{', '.join(others)}, which other steps make")]
    else:
        try:
            for name in spec.corpora:
                read_manifest(find_corpus(name, storage))
            model = str(find_model(spec.model, storage)) if spec.model else ""
        except InputError as error:
            rows = [("it reads", f"what is not there yet ({error})")]
    if not rows:
        task = make_task(spec, storage)
        tokens = sum(part.windows * read_manifest(part.corpus).context for part in task.parts)
        rows = [("corpus" if len(task.parts) == 1 else f"corpus {i}", f"{part.corpus}, {part.windows:,} windows of {spec.split}"
                 + ", documents kept apart" * part.mask_documents) for i, part in enumerate(task.parts)]
        rows += [("tokens", f"{tokens:,}")] if task.parts else []
        rows += [("labels", f"{len(task.labels):,}: {', '.join(task.labels[:MAX_LABELS])}")] if task.labels else []
        rows += of_forward(model, tokens) if model and task.parts else []
    if spec.tasks and not any("${" in name for name in spec.tasks):
        files = read_tasks(spec.tasks)
        rows += [("tasks", ", ".join(file.config["task"] for file in files))]
        rows += [(f"group {group.name}", ", ".join(file.config["task"] for file in its)) for group, its in groups_of(files).items()]
    need = total(evaluate_bundles(spec))
    if spec.endpoint is not None:
        place = spec.endpoint if isinstance(spec.endpoint, str) else spec.endpoint.url
        return [*rows, ("endpoint", f"{place}, {spec.concurrent} requests at once")]
    rows += [("workers", str(spec.workers)), ("CPUs", f"{need['CPU']:g}")]
    return rows + ([("GPUs", f"{need['GPU']:g}")] if need["GPU"] else [])


def of_average(spec: AverageSpec, storage: Storage) -> Rows:
    """What an evaluation of one of them needs, and how often."""
    from distlm.average.driver import find_models

    count = len(spec.models)
    uniform = spec.method == "uniform"
    times = f"{count + 1} times, each model and their mean" if uniform else f"{2 * count - 1} times, each model and each mean"
    rows = of_evaluate(spec.scoring(spec.models[0]), storage)
    if rows[0][0] != "it reads" and not any("${" in model for model in spec.models):
        find_models(spec, storage)
        rows = [row for row in rows if row[0] != "model"]
    return [("models", f"{count}, {spec.method}"), ("measured", times), *rows]


def of_compress(spec: CompressSpec, storage: Storage) -> Rows:
    """What its two evaluations need: the model is measured before and after."""
    from distlm.compress.task import evaluation_of, left_whole, task_of

    rows = [row for row in of_evaluate(evaluation_of(spec), storage) if row[0] not in ("workers", "CPUs", "GPUs")]
    whole: list[str] = []
    if dict(rows).get("model"):
        _, model = task_of(spec, storage)                  # raises what can be seen to fail
        whole = left_whole(spec, model) if spec.method in QUANTIZED else []
    need = total(compress_bundles(spec))
    stay = [("left whole", f"{len(whole)} matrices, such as {whole[0]}, which fit no groups of {spec.group_size}")] if whole else []
    return [("method", spec.method), *stay, *rows, *((f"{name}s", f"{amount:g}") for name, amount in need.items() if amount)]


def of_forward(model: str, tokens: int) -> Rows:
    """Parameters of a checkpoint, and the arithmetic of a forward pass over so many tokens: two operations for each parameter and token,
    attention not counted."""
    from distlm.model.build import num_parameters, read_config, settle_kind

    config = read_config(model, f"model: {model}")
    settle_kind(config)
    parameters = num_parameters(config)
    return [("model", model), ("parameters", f"{parameters:,}"), ("arithmetic", f"{2.0 * parameters * tokens:.2e} FLOPs")]


def of_serve(spec: ServeSpec, storage: Storage) -> Rows:
    found: Path | None = None
    try:
        found = None if "${" in spec.model else find_model(spec.model, storage)
        model = str(found or "what another step makes")
    except InputError as error:
        model = f"{spec.model}: not there yet ({error.message})"
    if found is not None:
        check_served(found)
    need = total(serve_bundles(spec))
    rows = [("model", model), *of_adapters(spec, found, storage), ("address", f"{spec.host}:{spec.port or 'a free port'}"),
            ("replicas", str(spec.replicas)), ("CPUs", f"{need['CPU']:g}")]
    return rows + ([("GPUs", f"{need['GPU']:g}")] if need["GPU"] else [])


def of_adapters(spec: ServeSpec, model: Path | None, storage: Storage) -> Rows:
    """What each adds to the memory of a replica. Raises InputError for one that cannot be served over `model`, where that is there."""
    from distlm.model.adapter_folder import AdapterFolder, check_adapters, find_adapter

    rows, folders = list[tuple[str, str]](), dict[str, Path]()
    each = 4 if spec.dtype == "fp32" or (spec.dtype == "auto" and not spec.gpus_per_replica) else 2
    for name, text in spec.adapters.items():
        key = f"adapters.{name}"
        try:
            folders[name] = find_adapter(text, storage, key)
        except InputError as error:
            rows.append((key, "what another step makes" if "${" in text else f"{text}: not there yet ({error.message})"))
            continue
        adapter = AdapterFolder.read(folders[name], f"{key}: {folders[name]}")
        rows.append((key, f"{folders[name]}, rank {adapter.rank}, {size(each * adapter.num_parameters)} of memory in a replica"
                          + (f"; {adapter.caveat}" if adapter.caveat else "")))
    if model is not None:
        check_adapters(folders, model)
    return rows


def of_pipeline(spec: PipelineSpec, storage: Storage, cluster: "RayUpFile | None" = None) -> Rows:
    """Step by step. What a step reads of another is not there yet, but a corpus's vocabulary and context stand in its spec."""
    from distlm import pipeline

    rows: Rows = []
    for step in pipeline.order(spec.steps):
        data = {key: pipeline.stand_in(spec.steps, value) for key, value in spec.steps[step].items() if key != "needs"}
        try:
            parsed = validate(data, f"steps.{step}", references=True)
            found = _of_step(spec, parsed, storage, cluster) if parsed is not None else [("spec", "depends on other steps")]
        except SpecError as error:
            if "${" not in str(error):
                raise
            found = [("spec", "depends on other steps")]
        rows += [(f"{step}: {what}", how_much) for what, how_much in found]
    return rows


def _of_step(pipe: PipelineSpec, spec: Spec, storage: Storage, cluster: "RayUpFile | None") -> Rows:
    if isinstance(spec, TuneSpec):
        from distlm.tune import space

        train: Any = space.base_spec(spec)
    else:
        train = spec
    made = [share.corpus[2:-1] for share in train.mixture if share.corpus.startswith("${")] if isinstance(train, TrainSpec) else []
    if not made:
        return _needs(spec, storage, cluster)
    made_by = pipe.steps.get(made[0], {})
    rows = of_tune(spec, storage)[:len(spec.space) + 2] if isinstance(spec, TuneSpec) else []
    prefix = "a trial's " if rows else ""
    tokenizer = made_by.get("tokenizer") or {}
    if made_by.get("kind") == "prepare" and "from" not in tokenizer and not train.model.source and not train.distill:
        from distlm.model.build import Shape
        from distlm.train.zero import check_raw

        if train.sharding.deepspeed:
            check_raw(train)
        trained = tokenizer.get("vocab_size", Tokenizer.model_fields["vocab_size"].default)
        vocabulary = BYTES_VOCABULARY if tokenizer.get("train") == "bytes" else trained
        context = made_by.get("context", PrepareSpec.model_fields["context"].default)
        labels = ("0", "1") if train.objective == "classify" else ()                   # how many there are is not known yet
        shape = Shape(vocabulary, context, 0, labels)
        rows += [(prefix + what, text) for what, text in of_model(train, shape, None, cut_of(train, context),
                                                                    room=room_of(train, storage, cluster))]
    nodes = nodes_of(train, cluster)                       # the hours are not known before the corpus
    more = [*of_scale(train), *([("nodes", f"{nodes.text} an hour")] if nodes else [])]
    return rows + [(prefix + what, text) for what, text in more]


def cut_of(spec: TrainSpec, context: int) -> tuple[int, int]:
    """micro_sequences and accumulation of a spec whose corpus is not there yet."""
    sequences = spec.batch.global_sequences or max(1, (spec.batch.global_tokens or 0) // context)
    try:
        micro = check_batch(sequences, spec.batch, spec.data_workers)
    except Rule:                                           # which is told when the corpus is there
        return 1, 1
    return micro, sequences // spec.data_workers // micro


def size(count: int) -> str:
    """Bytes for people: `3.1 GB`."""
    value = float(count)
    for unit in ("bytes", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:,.0f} bytes" if unit == "bytes" else f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:,.3g} TB"
