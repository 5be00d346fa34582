"""The model of a run, as its ranks compute with it and whoever measures its checkpoints."""

from typing import Any

import torch

from distlm.corpus.manifest import read_manifest
from distlm.model.activation import without_tanh
from distlm.model.adapter import add_adapter
from distlm.model.attention import use_cpu_attention
from distlm.model.build import blank_model, build_model, compile_layers, model_config, precision_dtype, recompute
from distlm.model.complete import end_ids
from distlm.model.documents import check_documents_apart
from distlm.model.encoder import is_encoder
from distlm.model.float8 import use_float8
from distlm.model.sequence import exchange_in_attention, sequence_group
from distlm.train.recipe import Recipe
from distlm.train.zero import made_once, settle_blank
from distlm.train.zeros import keep_zeros


def trained_model(recipe: Recipe, rank: int, device: torch.device) -> Any:
    """The model with its first weights on the CPU, an adapter's on `device`, with whatever the spec asks of its layers: attention, what is
    computed again, fp8, compilation. Where rank 0 alone draws them, others have none yet. All ranks take part. Raises TrainError and
    SpecError."""
    spec = recipe.spec
    config = model_config(spec.model, recipe.shape, spec.regularization.dropout)
    blank = rank > 0 and made_once(spec)
    if spec.adapter:                                       # what stands still is held once, in the precision that it is computed with
        place = None if spec.sharding.zero == 3 else device                    # stage 3 divides it first
        model = build_model(spec.model, config, spec.seed, precision_dtype(spec.precision), place, spec.adapter.base == "nf4")
        add_adapter(model, spec.adapter, spec.seed, spec.compile)
    elif blank:
        model = blank_model(config)
    else:
        model = build_model(spec.model, config, spec.seed)
    if made_once(spec) and spec.model.source is not None and not settle_blank(model):
        model, blank = build_model(spec.model, config, spec.seed), False
    end_at_answers(model, recipe)
    if spec.keep_zeros:
        keep_zeros(model)
    if device.type == "cpu" and not is_encoder(config):   # it is causal
        use_cpu_attention(model)
    if recipe.mask_documents and not blank:                # where rank 0 refuses, the others end with it
        check_documents_apart(model)
    if spec.sharding.sequence_parallel > 1:
        group = sequence_group(spec.sharding.sequence_parallel, spec.sharding.tensor_parallel)
        exchange_in_attention(model, group, recipe.mask_documents)
    if spec.activation_checkpointing:
        recompute(model, spec.activation_checkpointing)
    if spec.precision == "fp8":
        use_float8(model, emulate=device.type == "cpu")   # no spec asks that of a CPU, tests do
    if spec.compile:
        if device.type == "cpu":
            without_tanh(model)
        compile_layers(model)
    return model


def end_at_answers(model: Any, recipe: Recipe) -> None:
    """Let what the model says end at the tokens that end an answer by the templates of all corpora, too: completions of prompts, and those
    of the export."""
    if ends := [end for corpus in recipe.corpora for end in read_manifest(corpus).ends]:     # a classifier's corpora have none
        every = [*dict.fromkeys([*end_ids(model.generation_config.eos_token_id), *ends])]
        model.generation_config.eos_token_id = every if every[1:] else every[0]
