"""The training loop of one rank. Ray is not needed here: ranks may be plain processes.

    fit(recipe, run_folder, steps, rank=0, device=torch.device("cpu"))
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import distributed

from distlm.corpus.manifest import read_manifest
from distlm.errors import TrainError
from distlm.model.adapter import add_adapter, base_hash, merge, put_adapter, save_adapter
from distlm.model.build import buffers, load_model, model_config, restore_buffers
from distlm.model.export import export_model, stored_dtype
from distlm.model.tensor import dimension
from distlm.runs import RunFolder
from distlm.text.clean import common
from distlm.train import checkpoint, preempt
from distlm.train.average import Ema, take_mean
from distlm.train.batch import Batch
from distlm.train.determinism import use_deterministic
from distlm.train.disks import own_disks
from distlm.train.dryrun import DryRun
from distlm.train.evaluate import Evaluator
from distlm.train.guard import Random, SpikeGuard, finite, nonfinite_gradient, nonfinite_loss, without_update
from distlm.train.metrics import MetricsWriter, StepResult
from distlm.train.model import end_at_answers, trained_model
from distlm.train.norm import keeps_norm, known_norm, norm_parts
from distlm.train.objectives import objective_of
from distlm.train.optimizer import set_rate
from distlm.train.phases import Phases
from distlm.train.profile import StepProfile, region
from distlm.train.recipe import Recipe, manifest_of
from distlm.train.saver import Saver
from distlm.train.schedule import learning_rate
from distlm.train.watchdog import Watchdog
from distlm.train.zero import check_node, deepspeed_config, gather_parts, loss_scale, make_engine, set_accumulation, update


def fit(recipe: Recipe, folder: RunFolder, steps: Iterator[NDArray[np.int64]], *, rank: int, device: torch.device, first_step: int = 0,
        resume_from: Path | None = None, look: StepProfile | DryRun | None = None) -> None:
    """Train from `first_step` to the end, evaluate, checkpoint and export. All ranks call it, each with its own `steps`.

    `steps` yields what `ordered_steps` does, one array per optimizer step. `resume_from` is a verified checkpoint of `first_step`.
    With `look` steps are looked at alone: nothing is evaluated, saved or exported. Raises TrainError with its cause.
    """
    spec, objective = recipe.spec, objective_of(recipe.spec)
    check_node(spec)
    use_deterministic(spec.deterministic)
    model = trained_model(recipe, rank, device)
    kept = buffers(model)
    settings = deepspeed_config(spec, recipe.micro_sequences, recipe.accumulation)
    with own_disks(settings["zero_optimization"], folder.path, rank):
        engine = make_engine(spec, objective.module(model, recipe), settings)
        restore_buffers(engine.module.model, kept)
        _train(engine, recipe, folder, steps, rank, device, first_step, resume_from, look)


def _train(engine: Any, recipe: Recipe, folder: RunFolder, steps: Iterator[NDArray[np.int64]], rank: int, device: torch.device,
           first_step: int, resume_from: Path | None, look: StepProfile | DryRun | None) -> None:
    """What `fit` does once there is an engine."""
    spec, objective = recipe.spec, objective_of(recipe.spec)
    engine.train()                                         # a loaded model is not in that mode
    torch.manual_seed((spec.seed << 24) + rank // spec.sharding.tensor_parallel)       # dropout; a checkpoint brings the state it had
    ema = Ema(spec.ema.decay, engine) if spec.ema else None
    if not look:
        objective.begin(engine, recipe, folder, rank, device)
    if resume_from is not None:
        checkpoint.load(engine, resume_from, recipe, rank, ema)
    request, phases = preempt.Request(folder, rank, device), Phases(device.type == "cuda")
    guard = SpikeGuard(spec.guard.spike, checkpoint.recent_losses(resume_from) if resume_from else [])
    evaluator = Evaluator(recipe, rank, device)
    writer = MetricsWriter(folder, recipe, first_step) if rank == 0 and not look else None
    with Watchdog(folder.path, rank, spec.guard.step_timeout_s) as dog, Saver(engine, recipe, folder.path, rank) as saver:
        dog.rest(first_step - 1)
        if not look and lacks_evaluation(recipe, folder, first_step, rank):
            dog.rest(first_step - 1, "evaluation")
            with exported_weights(engine, ema):
                measured = evaluator.measure(engine, first_step)
            dog.rest(first_step - 1)
            if writer:
                writer.start(measured, first_step)
        for step in range(first_step, recipe.num_steps):
            dog.beat(step)
            with phases("data"):
                batch = objective.make_batch(next(steps), recipe).part(*recipe.part(rank))
            dog.beat(step, 1)
            started = time.perf_counter()
            rate = learning_rate(spec.schedule, spec.optimizer.lr, step, recipe.num_steps)
            try:
                result = train_step(engine, batch, recipe, rate, step, guard, dog, phases, request, saver.written)
            except TrainError:
                dog.rest(step, "save")                     # what is on its way is still finished
                raise
            done, measured, leaving = step + 1, {}, result.leaving
            if ema and not result.skipped:
                ema.update(engine, done)
            seconds = time.perf_counter() - started
            dog.rest(step)
            if look:
                if isinstance(look, DryRun) and done == 1 and spec.checkpoint.asynchronous:
                    saver.rehearse(look.folder / "checkpoint", ema)
                look.step()
                continue
            if result.written:
                dog.rest(step, "save")
                saver.commit()
            due = saved(recipe, done)
            if evaluated(recipe, done):
                dog.rest(step, "evaluation")
                leaving = leaving or request.of_any()      # then there may be no time for it
                if not leaving:
                    with exported_weights(engine, ema), phases("evaluate"):
                        measured = evaluator.measure(engine, done)
                    leaving = request.of_any()
            dog.rest(step)
            taken = {"step_s": seconds, **phases.taken()}  # on every rank: what a GPU has timed is held until then
            if writer:
                writer.step(done, result, rate, taken, measured, loss_scale(engine), saver.done())
                if spec.evaluate.worker:
                    writer.arrived()
            if due or leaving:
                dog.rest(step, "save")
                beside = spec.checkpoint.asynchronous and not leaving and done < recipe.num_steps
                saver.save(done, ema, list(guard.losses), measured.get("val_loss"), due=due, beside=beside)
            if leaving:
                if writer:
                    writer.close()
                raise request.ended(done, spec.guard.grace_period_s)
        if look:
            return
        dog.rest(recipe.num_steps - 1, "export")
        mean = {}
        if spec.checkpoint.average > 1:
            mean = {"averaged": take_mean(engine, folder, recipe, rank)}
            measured = evaluator.measure(engine, recipe.num_steps)
            if writer and not any(record.get("averaged") == mean["averaged"] for record in folder.read_metrics()):
                writer.average(mean["averaged"], measured)     # once, also where a run has ended before it was exported
        with exported_weights(engine, ema):
            weights = gather_weights(engine, rank, trained=spec.adapter is not None)
        if rank == 0:
            lineage = {**export_lineage(recipe, folder), **mean}
            export(recipe, engine.module.model, weights, folder.path / "export", lineage)
        if writer:
            writer.close()
        distributed.barrier()


def saved(recipe: Recipe, done: int) -> bool:
    """Whether a checkpoint is due after so many steps."""
    return done % recipe.checkpoint_every == 0 or done == recipe.num_steps


def evaluated(recipe: Recipe, done: int) -> bool:
    """Whether the ranks evaluate after so many steps: with a worker for that (train/validation.py) they do after the last alone."""
    return done == recipe.num_steps or (recipe.spec.evaluate.worker is None and (
        done % recipe.evaluate_every == 0 or (bool(recipe.spec.checkpoint.keep_best) and saved(recipe, done))))


def lacks_evaluation(recipe: Recipe, folder: RunFolder, done: int, rank: int) -> bool:
    """Whether one is to be made before the steps go on: the first, or one that there was no time for. All ranks take part."""
    if done and not evaluated(recipe, done):
        return False
    there = [rank == 0 and done > 0 and any(record["step"] == done and not record.keys().isdisjoint(("val_loss", "samples"))
                                            for record in folder.read_metrics())]
    distributed.broadcast_object_list(there)
    return not there[0]


def exported_weights(engine: Any, ema: Ema | None) -> contextlib.AbstractContextManager[None]:
    """Where the engine has the weights that are evaluated and exported: the average's, or its own. All ranks take part."""
    return ema.in_place(engine) if ema else contextlib.nullcontext()


def train_step(engine: Any, batch: Batch, recipe: Recipe, rate: float, step: int, guard: SpikeGuard, dog: Watchdog,
               phases: Phases, leaving: Callable[[], bool] = lambda: False, written: bool = False) -> StepResult:
    """One optimizer step on this rank's share. `leaving`: whether this rank has been asked to end; `written`: it has written a checkpoint's
    files.

    The loss of a step is the sum over its tokens that give loss divided by their global count; DeepSpeed averages over ranks
    and micro-batches, so the sum of a micro-batch is multiplied by both first. All ranks take part. Raises TrainError, on all ranks and
    before the update, where loss or gradient is not finite, where no token gives loss, or where the spec says to stop at a spike.

    A GPU is given all micro-batches without a wait. The host asks it once, after the last one and before the update, for all that it is to
    know of the step; so the update and the beginning of the next step are queued while it works.
    """
    accumulation = recipe.micro_batches(step)
    set_accumulation(engine, accumulation)
    set_rate(engine.optimizer, rate)
    device, copies = engine.device, recipe.spec.sharding.tensor_parallel       # `copies` of ranks have the same loss
    count = count_targets(batch, recipe, step, device)
    scale = (accumulation * (recipe.world // copies) / count).float()
    means = objective_of(recipe.spec).MEANS
    random = Random.now()
    totals = torch.zeros(3 + len(means), dtype=torch.float64, device=device)
    for i, micro in enumerate(batch.split(recipe.micro_sequences)):
        dog.beat(step, i + 1)
        with phases("forward"):
            loss = engine(*micro.inputs(device))
        totals[0] += loss.detach().double()
        if means:
            totals[3:] += engine.module.sums.double()
        with phases("backward"):
            engine.backward(loss * scale)
        if i < accumulation - 1:
            engine.step()
    totals[1], totals[2] = leaving(), written
    distributed.all_reduce(totals)
    parts = norm_parts(engine)
    told = torch.cat([totals, torch.stack([count, *(part.double() for part in parts)])]).tolist()      # the one wait for the device
    (total, leavers, writers, *sums), (targets, *norms) = told[:len(totals)], told[len(totals):]
    num_targets = int(targets)
    if not num_targets:
        first, last = recipe.samples(step)
        raise TrainError(f"no token gives loss at step {step + 1}, samples {first} to {last}",
                         remedy="raise batch.global_sequences, or leave out what is all padding or prompts", cause="bad_input")
    beside = {name: value / copies / num_targets for name, value in zip(means, sums, strict=True)}
    leave, saved = leavers > 0, writers == recipe.world
    mean = total / copies / num_targets
    if not math.isfinite(mean):
        dog.rest(step)
        raise nonfinite_loss(engine, batch, recipe, step, random, mean)
    limit = guard.limit(mean)
    skipped = limit is not None and guard.skips(mean, limit, step, recipe)
    norm = None if keeps_norm(engine) else norms[0]
    if norm is not None and not finite(norm):
        dog.rest(step)
        raise nonfinite_gradient(engine, batch, recipe, step, random, norm)
    try:
        with region("optimizer"), known_norm(engine, parts, norms), without_update(engine) if skipped else contextlib.nullcontext():
            overflowed = update(engine, recipe.spec.loss_scale.window)   # DeepSpeed itself makes no update of a norm that is not finite
    except OverflowError as error:
        raise TrainError(f"{error}, at step {step + 1}", remedy="lower optimizer.lr", cause="nonfinite_loss") from None
    if overflowed:
        return StepResult(mean, None, num_targets, limit, True, leave, saved, beside)
    norm = norm if norm is not None else float(engine.get_global_grad_norm())
    if not finite(norm):
        dog.rest(step)
        raise nonfinite_gradient(engine, batch, recipe, step, random, norm)
    return StepResult(mean, norm, num_targets, limit, skipped, leave, saved, beside)


def count_targets(batch: Batch, recipe: Recipe, step: int, device: torch.device) -> torch.Tensor:
    """What the loss of the global batch is divided by, a float64 scalar on the device, known there before any loss is computed: for a
    language model the tokens that give loss. Where the batches count, all ranks take part."""
    known = objective_of(recipe.spec).num_targets(recipe, step)
    count = torch.full((), batch.num_targets() if known is None else known, dtype=torch.float64, device=device)
    if known is None:
        distributed.all_reduce(count)
        count /= recipe.spec.sharding.tensor_parallel
    return count


def gather_weights(engine: Any, rank: int, trained: bool = False) -> dict[str, torch.Tensor]:
    """The whole model's weights on rank 0, or those alone that are `trained`, on the CPU, named as the model itself names them; empty
    elsewhere. All ranks take part."""
    import deepspeed

    weights = {}
    for name, parameter in engine.module.model.named_parameters():
        if trained and not parameter.requires_grad:
            continue
        with deepspeed.zero.GatheredParameters([parameter], enabled=engine.zero_optimization_stage() == 3):
            dim = dimension(name) if engine.autotp_size() > 1 else None
            whole = parameter.detach() if dim is None else gather_parts(parameter.detach(), dim)
            if rank == 0:
                weights[name] = whole.cpu().clone()
    if rank == 0 and not trained:
        kept = set(engine.module.model.state_dict())
        weights |= {name: value.detach().cpu().clone() for name, value in engine.module.model.named_buffers() if name in kept}
    return weights


def export(recipe: Recipe, model: Any, weights: dict[str, torch.Tensor], folder: Path, lineage: dict[str, Any]) -> None:
    """Write the model, or an adapter's `weights` merged into the base in the precision of its checkpoint's files, and the adapter alone
    beside it. The val_loss of a model that was trained through a rounded base is not the export's, and is named so."""
    spec, tokenizer = recipe.spec, manifest_of(recipe).tokenizer
    if spec.adapter is None:
        export_model(model, weights, tokenizer, folder, lineage)
        return
    source, config = str(spec.model.source), model_config(spec.model, recipe.shape, spec.regularization.dropout)
    whole = load_model(source, f"model.from: {source}", stored_dtype(Path(source)), config)
    end_at_answers(whole, recipe)
    add_adapter(whole, spec.adapter, spec.seed)
    weights = {name: value.float() for name, value in weights.items()}
    put_adapter(whole, weights)

    def adapter(place: Path) -> None:
        save_adapter(whole, weights, source, place / "adapter")
        merge(whole)

    held = {"base_held_in": spec.adapter.base, "val_loss": None, "val_loss_as_held": lineage["val_loss"]} if spec.adapter.base else {}
    export_model(whole, None, tokenizer, folder, {**lineage, "base": source, "base_hash": base_hash(source), **held}, adapter)


def export_lineage(recipe: Recipe, folder: RunFolder) -> dict[str, Any]:
    """What the endpoint tells about its model."""
    trial = folder.path.parent.name == "trials"
    source = recipe.spec.distill.teacher if recipe.spec.distill else ""
    teacher = {"teacher": source, "teacher_hash": base_hash(source)} if source else {}
    last: dict[str, Any] = next((record for record in reversed(folder.read_metrics()) if "val_loss" in record), {})
    return {"run": folder.path.parent.parent.name if trial else folder.name, "trial": folder.name if trial else None,
            "corpus": ", ".join(Path(corpus).name for corpus in recipe.corpora), "corpus_hash": recipe.corpus_hash,
            "step": recipe.num_steps, "checkpoint": checkpoint.checkpoint_path(folder.path, recipe.num_steps).name,
            "val_loss": last.get("val_loss"), **teacher, **(_reading(recipe) if recipe.shape.labels else {})}


def _reading(recipe: Recipe) -> dict[str, Any]:
    """What a classifier's endpoint is to make of a text first, so that it has the tokens of a document of that text: `clean`, the rules
    that all documents passed, unless a corpus does not tell, and `cut_tokens`, to which longer ones were cut, if they were in all corpora.
    A language model is sent beginnings."""
    manifests = [read_manifest(corpus) for corpus in recipe.corpora]
    rules = [one.cleaning for one in manifests]
    return {**({"clean": common([one for each in rules for one in each])} if all(rules) else {}),
            **({"cut_tokens": recipe.shape.context} if all(one.cuts for one in manifests) else {})}
