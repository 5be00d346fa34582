"""A `transformers` model from a spec: same seed, same initial weights, whatever the sharding.

    config = model_config(spec.model, Shape(vocab_size=4096, context=256, eos_id=0))
    model = build_model(spec.model, config, seed=0)
"""

import copy
import inspect
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

from distlm.errors import InputError, SpecError
from distlm.model.encoder import FAMILIES as ENCODERS
from distlm.model.encoder import UNFRAMED, Frame, check_frame, is_encoder, read_frame, room
from distlm.model.find import check_loadable, check_whole
from distlm.model.mup import check_mup, scale_weights
from distlm.spec.load import nearest
from distlm.spec.presets import PRESETS
from distlm.spec.train import ModelSpec
from distlm.storage import read_json

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

DROPOUTS = ("attention_dropout", "hidden_dropout", "residual_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop", "dropout",
            "activation_dropout", "layerdrop", "hidden_dropout_prob", "attention_probs_dropout_prob", "attention_dropout_prob",
            "embedding_dropout", "mlp_dropout", "pooler_dropout", "seq_classif_dropout", "classifier_dropout_prob", "classifier_dropout")
"""Every family's names for it. All are 0 unless the configuration says otherwise."""
NO_ACTIVATIONS = ("layerdrop", "classifier_dropout")
"""Those that leave out whole layers, or that no causal model reads."""
COMMON = ("vocab_size", "max_position_embeddings", "use_cache", "bos_token_id", "eos_token_id", "pad_token_id", "attn_implementation")
"""Keys that every family takes."""
HEAD = "score.weight"
"""The last layer of transformers' classifiers of whole texts by causal families."""
PLAIN_ROTATIONS = ("default", "linear", "llama3")
"""Kinds of rotary positions that do not change with the number of positions."""
LM_HEADS = frozenset({"lm_head.weight", "lm_head.bias", "embed_out.weight"})
MAX_VARIANTS = 64
"""Of a compiled layer: with a sliding window or without, computed again or not, in training and in evaluation, for every size of batch."""
CAUSAL_REMEDY = "take a causal family such as llama, qwen3 or gpt2"


@dataclass(frozen=True)
class Shape:
    """What the corpus decides of a model."""

    vocab_size: int
    context: int
    eos_id: int
    labels: tuple[str, ...] = ()
    """Of a classifier, by their numbers; none for a language model."""
    multiple_labels: bool = False
    """Whether a document may have any number of labels."""
    frame: Frame = UNFRAMED
    """What stands around a text that an encoder reads."""


def model_config(spec: ModelSpec, shape: Shape, dropout: float | None = None) -> "PreTrainedConfig":
    """The configuration that the spec describes, with `dropout` wherever the family has one. Raises SpecError for one that transformers
    does not accept, and InputError for a checkpoint that is missing or does not fit the corpus."""
    config = checkpoint_config(Path(spec.source), shape, longer=spec.context is not None) if spec.source is not None else \
        _new_config(spec, shape)
    if spec.source is not None:
        check_whole(Path(spec.source), "model.from")
    _give_labels(config, shape, spec)
    if spec.mup:
        check_mup(config)
    if dropout is not None:
        left = NO_ACTIVATIONS[:1] if is_encoder(config) else NO_ACTIVATIONS
        names = [name for name in DROPOUTS if name not in left and hasattr(config, name)]
        if dropout and not names:
            raise SpecError(f"the {config.model_type} family has no dropout", where="regularization.dropout", remedy="leave it out")
        if given := [name for name in names if name in (spec.config or {})]:
            raise SpecError(f"stands beside model.config.{given[0]}", where="regularization.dropout", remedy="leave one of them out")
        for name in names:
            setattr(config, name, dropout)
    return config


def _give_labels(config: Any, shape: Shape, spec: ModelSpec) -> None:
    """Make it that of a classifier, whose padding is the end token unless it is an encoder, or of a language model. Raises InputError for
    the checkpoint of a classifier where a language model is trained, or one that tells other labels apart."""
    if not shape.labels:
        if spec.source is not None and has_classifier(config):
            raise InputError(f"the checkpoint is a classifier of {', '.join(map(str, config.id2label.values()))}, and predicts no tokens",
                             where=f"model.from: {spec.source}",
                             remedy="name the language model that it was trained from, or set objective: classify")
        config.problem_type = None
        return
    kind = f"{'multi' if shape.multiple_labels else 'single'}_label_classification"
    if spec.source is not None and has_classifier(config):
        check_tells_labels(config, where := f"model.from: {spec.source}")
        remedy = "or take the model that it was trained from, whose last layer is new"
        if (names := labels_of(config)) != [*shape.labels]:
            raise InputError(f"the checkpoint tells apart {', '.join(names)}, and the corpus {', '.join(shape.labels)}", where=where,
                             remedy=f"prepare the corpus with labels.names: {json.dumps(names, ensure_ascii=False)}, which leaves out "
                                    f"documents with others, {remedy}")
        check_counts(config.problem_type, shape.multiple_labels, where, f"prepare the corpus with labels.multiple: "
                                                                        f"{str(not shape.multiple_labels).lower()}, {remedy}")
    config.id2label = dict(enumerate(shape.labels))
    config.label2id = {name: number for number, name in config.id2label.items()}
    config.problem_type = kind
    if not is_encoder(config):
        give_padding(config, shape.eos_id)


def labels_of(config: Any) -> list[str]:
    """Those that a classifier tells apart, by their numbers."""
    return [str(config.id2label[i]) for i in range(config.num_labels)]


def check_counts(kind: str | None, multiple: bool, where: str, remedy: str) -> None:
    """Raises InputError where a checkpoint gives a text one label and a corpus any number, or the other way round. `kind`: the
    checkpoint's `problem_type`; None where it tells of none."""
    if kind not in (None, f"{'multi' if multiple else 'single'}_label_classification"):
        counts = ("one label", "any number") if multiple else ("any number of labels", "one")
        raise InputError(f"the checkpoint gives a text {counts[0]}, and the corpus {counts[1]}", where=where, remedy=remedy)


def give_padding(config: Any, token: int) -> None:
    """Let a classifier take this token for padding: it reads the last token of a text that is another."""
    config.pad_token_id = config.get_text_config().pad_token_id = token


def check_predicts(config: Any, where: str, more: str = "") -> None:
    """Raises InputError for the configuration of an encoder that is no classifier."""
    if is_encoder(config) and not has_classifier(config):
        raise InputError(f"the checkpoint is an encoder of the {config.model_type} family: it sees the tokens that it would predict",
                         where=where, remedy=f"take a causal family such as llama, qwen3 or gpt2{more}")


def has_classifier(config: Any) -> bool:
    """Whether a checkpoint's configuration is that of a classifier of whole texts."""
    return _are_classifiers(config.architectures)


def is_classifier(folder: Path) -> bool:
    """`has_classifier` of a folder's config.json, without transformers."""
    return _are_classifiers(read_json(folder / "config.json").get("architectures"))


def _are_classifiers(architectures: Sequence[str] | None) -> bool:
    return any(name.endswith("ForSequenceClassification") for name in architectures or ())


def check_tells_labels(config: Any, where: str) -> None:
    """Raises InputError for the configuration of a classifier that gives a text one number, and no label of several."""
    if config.problem_type == "regression" or (config.num_labels < 2 and config.problem_type != "multi_label_classification"):
        raise InputError("it gives a text a number and tells no labels apart" if config.problem_type == "regression" else
                         "it has one label, which every text would have", where=where,
                         remedy="take a classifier of two labels or more, or set problem_type: multi_label_classification in its "
                                "config.json if texts may have any number")


def check_servable(config: Any, where: str) -> None:
    """Raises InputError for the configuration of a classifier that tells no labels apart, or does not know its padding."""
    check_tells_labels(config, where)
    if config.get_text_config().pad_token_id is None:
        raise InputError("the classifier's config.json names no pad_token_id, with which texts are filled up", where=where,
                         remedy="add it: the token that texts never hold, such as the end token")


def check_served(folder: Path) -> None:
    """Raises InputError for a folder with an encoder that is no classifier, and what `check_servable`, and of an encoder `check_frame`, do
    for a classifier."""
    where, told = f"model: {folder}", read_json(folder / "config.json")
    check_predicts(SimpleNamespace(**{"model_type": "", "architectures": None, **told}), where)
    if is_classifier(folder):
        check_servable(config := read_config(folder, where), where)
        if is_encoder(config):
            check_frame(config, read_frame(folder), where)


def settle_kind(config: "PreTrainedConfig") -> None:
    """Let the configuration of a checkpoint say what it is where it does not: a classifier of one label, or a language model."""
    config.problem_type = (config.problem_type or "single_label_classification") if has_classifier(config) else None


def _auto_class(config: "PreTrainedConfig") -> Any:
    """A classifier's configuration says what its loss is."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    return AutoModelForSequenceClassification if config.problem_type else AutoModelForCausalLM


def _new_config(spec: ModelSpec, shape: Shape) -> "PreTrainedConfig":
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING, AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    values = dict(PRESETS[spec.preset] if spec.preset is not None else spec.config or {})
    family = str(values.pop("model_type"))
    given = {"vocab_size": shape.vocab_size, "max_position_embeddings": shape.context, "use_cache": False, "bos_token_id": shape.eos_id,
             "eos_token_id": shape.eos_id, "pad_token_id": None, **values}
    if family == "gpt2":
        given.setdefault("n_positions", given.pop("max_position_embeddings"))
    try:
        known = AutoConfig.for_model(family)
    except (ValueError, KeyError):
        near = nearest(family, CONFIG_MAPPING)
        raise SpecError(f"transformers knows no model_type {family!r}", where="model.config.model_type",
                        remedy=f"did you mean {near}?" if near else CAUSAL_REMEDY) from None
    names = {*known.to_dict(), *known.attribute_map, *inspect.signature(type(known).__init__).parameters, *COMMON}
    if unknown := [name for name in values if name not in names]:
        near = nearest(unknown[0], names)
        raise SpecError(f"the {family} family has no such key", where=f"model.config.{unknown[0]}",
                        remedy=f"did you mean {near}?" if near else "")
    given = {**{name: 0.0 for name in DROPOUTS if hasattr(known, name)}, **given}
    try:
        config = AutoConfig.for_model(family, **given)
    except (ValueError, TypeError, KeyError, AttributeError, StrictDataclassError) as error:
        raise SpecError(f"transformers does not accept this configuration: {last_line(error)}", where="model.config") from None
    if getattr(config, "output_router_logits", False):
        raise SpecError("the router's auxiliary loss is not a part of the training loss", where="model.config.output_router_logits",
                        remedy="leave it out")
    if is_encoder(config):
        causal = hasattr(config, "is_decoder") and family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        if shape.labels:
            raise SpecError(f"{family} is an encoder, and one with random weights knows no language that labels could be told by",
                            where="model.config.model_type", remedy="name a checkpoint of it with model.from")
        raise SpecError(f"{family} is an encoder: it sees the tokens that it is to predict",
                        where=f"model.config.{'is_decoder' if causal else 'model_type'}",
                        remedy="set is_decoder: true, or take a causal family such as llama" if causal else CAUSAL_REMEDY)
    for key, value in (("vocab_size", shape.vocab_size), ("max_position_embeddings", shape.context)):
        if getattr(config, key, value) < value:
            raise SpecError(f"{getattr(config, key)} is less than the corpus needs, {value}", where=f"model.config.{key}",
                            remedy="leave it out: the corpus sets it")
    return config


def checkpoint_config(folder: Path, shape: Shape, key: str = "model.from", longer: bool = False) -> "PreTrainedConfig":
    """The configuration of a checkpoint, with `longer` for windows that are longer than it takes. `key` is the spec's key, for the error.
    Raises InputError for one that is not whole, or does not fit the corpus."""
    where = f"{key}: {folder}"
    config = read_config(folder, where)
    if not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
        raise InputError("there are no weights beside its config.json", where=where, remedy="copy the checkpoint whole")
    if config.vocab_size < shape.vocab_size:
        raise InputError(f"the checkpoint has {config.vocab_size} tokens and the corpus {shape.vocab_size}", where=where,
                         remedy=f"prepare the corpus with tokenizer: {{from: {folder}}}")
    longest, framed = getattr(config, "max_position_embeddings", None), False
    if not shape.labels:
        check_predicts(config, where, ", or set objective: classify" * (key == "model.from"))
    elif framed := is_encoder(config):
        check_frame(config, shape.frame, where)
        longest = room(config, shape.frame)
    short = longest is not None and longest < shape.context
    if short and (framed or not longer):
        more = f", or set model.context: {shape.context} where its positions are rotary" if key == "model.from" and not framed else ""
        beside = f" beside {shape.frame.size} special ones" if framed else " of context"
        raise InputError(f"the checkpoint takes {longest} tokens{beside} and the corpus has windows of {shape.context}", where=where,
                         remedy=f"prepare the corpus with context: {longest}{more}")
    check_loadable(folder, key)
    if short:
        _lengthen(config, shape.context, where)
    config.use_cache = False
    return config


def _lengthen(config: "PreTrainedConfig", context: int, where: str) -> None:
    """Let the model take so many tokens. Raises InputError for a family whose weights have a row for each position, and for rotations that
    go by how many there are."""
    remedy = f"prepare the corpus with context: {config.max_position_embeddings}"
    if scaled := next((kind for kind in _rotations(getattr(config, "rope_parameters", None)) if kind not in PLAIN_ROTATIONS), ""):
        raise InputError(f"its rotations are scaled by {scaled}, which goes by the tokens that it takes: more are other rotations",
                         where=where, remedy=remedy)
    before = parameter_sizes(config)
    config.max_position_embeddings = context
    if learned := next((name for name, size in parameter_sizes(config).items() if size != before[name]), ""):
        raise InputError(f"the {config.model_type} family has learned a row of {learned} for each of its tokens of context, and no more",
                         where="model.context", remedy=f"leave it out, and {remedy}, or take a family with rotary positions such as llama")


def _rotations(parameters: Any) -> list[str]:
    """The kinds of rotary positions that a configuration names, also where layers differ."""
    if not isinstance(parameters, dict):
        return []
    return [str(value) for key, value in parameters.items() if key == "rope_type"] + [
        kind for value in parameters.values() for kind in _rotations(value)]


def read_config(folder: str | Path, where: str) -> "PreTrainedConfig":
    """The configuration of a checkpoint as it is. Raises InputError, which says `where`."""
    from transformers import AutoConfig

    try:
        return cast("PreTrainedConfig", AutoConfig.from_pretrained(folder, local_files_only=True))
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"transformers cannot read its config.json: {last_line(error)}", where=where) from None


def last_line(error: BaseException) -> str:
    """The line of a long message that says what is wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if len(lines) == 1 else f"{lines[0]} {lines[-1]}" if lines else type(error).__name__)[:300]


def blank_model(config: "PreTrainedConfig") -> "PreTrainedModel":
    """The model in fp32 on the CPU as `build_model` makes it, but for its weights: they are whatever its memory held, which takes none
    until something is written there."""
    import torch
    from transformers.initialization import no_init_weights

    with no_init_weights():
        model: PreTrainedModel = _auto_class(config).from_config(copy.deepcopy(config), dtype=torch.float32)
    model.tie_weights()
    return model


def build_model(spec: ModelSpec, config: "PreTrainedConfig", seed: int, dtype: "torch.dtype | None" = None,
                device: "torch.device | None" = None, nf4: bool = False) -> "PreTrainedModel":
    """The model in `dtype`, fp32 unless given, on `device`, the CPU unless given, with weights drawn from `seed`, or those of the
    checkpoint, with `nf4` in 4 bits. Weights that are drawn on a GPU are others than those of a CPU."""
    import torch

    dtype = dtype or torch.float32
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if spec.source is not None:
            return load_model(spec.source, f"model.from: {spec.source}", dtype, config, device=device, nf4=nf4)
        with torch.device(device or "cpu"):
            model = _auto_class(config).from_config(copy.deepcopy(config), dtype=dtype)
    if spec.mup:
        scale_weights(model, spec.mup.base_width)
    return cast("PreTrainedModel", model)


def load_model(source: str | Path, where: str, dtype: "torch.dtype | None", config: "PreTrainedConfig | None" = None, *,
               exact: bool = True, device: "torch.device | None" = None, nf4: bool = False) -> "PreTrainedModel":
    """The model of a checkpoint, in the precision that it is stored in where `dtype` is None, with `nf4` as `model/nf4.py` has it. To a GPU
    each weight is copied by itself, and rounded there: neither it nor the CPU ever holds them all as they were. Raises InputError, which
    says `where`, for one that does not hold every weight of the model: the rest would be drawn at random. Unless `exact` it may hold more.
    Where `config` is a classifier's and the checkpoint a language model's, the head is drawn at random in the place of the other."""
    from safetensors import SafetensorError

    of = read_config(source, where)
    if config is None:
        config = of
        check_predicts(config, where)
        settle_kind(config)
    loader: Any = _auto_class(config)
    remedy = "copy the checkpoint again, or mend its config.json"
    options: dict[str, Any] = {}
    if nf4 or (device and device.type != "cpu"):
        options["device_map"] = {"": device or "cpu"}      # needs accelerate, which peft brings
    if nf4:
        from distlm.model.nf4 import nf4_options, settle

        assert dtype
        options |= nf4_options(dtype)
    try:
        model, report = loader.from_pretrained(source, config=config, dtype=dtype or "auto", local_files_only=True,
                                               output_loading_info=True, **options)
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise InputError(f"transformers cannot load the weights: {last_line(error)}", where=where, remedy=remedy) from None
    missing, more = set(report["missing_keys"]), set(report["unexpected_keys"])
    if config.problem_type and not has_classifier(of):
        missing -= head_names(model)
        more = {name for name in more if not _is_replaced(name, model)}
    for what, names in (("has no weights for", missing), ("has other shapes for", report["mismatched_keys"]),
                        ("has weights that the model has not:", more if exact else ())):
        if names:
            first = sorted(map(str, names))[:3]
            raise InputError(f"the checkpoint {what} {', '.join(first)}{f' and {len(names) - 3} more' if len(names) > 3 else ''}",
                             where=where, remedy=remedy)
    if nf4:
        settle(model)
    elif getattr(model, "hf_quantizer", None) is not None:
        from distlm.model.quantize import use_kernels

        use_kernels(model)
    return cast("PreTrainedModel", model)


def head_names(model: "PreTrainedModel") -> set[str]:
    """The parameters of a classifier that a language model of the family need not have; of an encoder the pooler, which reads its first
    token, is among them."""
    if not is_encoder(model.config):
        return {HEAD}
    base = f"{model.base_model_prefix}."
    return {name for name, _ in model.named_parameters() if not name.startswith(base) or name.startswith(f"{base}pooler.")}


def _is_replaced(name: str, model: "PreTrainedModel") -> bool:
    """Whether a weight of a language model's checkpoint is of what a classifier has another in place of, or computes."""
    if not is_encoder(model.config):
        return name in LM_HEADS
    base = f"{model.base_model_prefix}."
    return not name.startswith(base) or name.startswith(f"{base}pooler.") or name.endswith(".position_ids")


def precision_dtype(precision: str) -> "torch.dtype":
    """What a run of this `precision` computes in."""
    import torch

    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}[precision]


def buffers(model: "torch.nn.Module") -> dict[str, "torch.Tensor"]:
    """Copies of the buffers that no checkpoint holds, such as rotary frequencies. Casting a model to bf16 rounds them, which shifts
    positions by whole radians; `restore_buffers` puts them back."""
    kept = set(model.state_dict())
    return {name: value.clone() for name, value in model.named_buffers() if name not in kept and value.is_floating_point()}


def restore_buffers(model: "torch.nn.Module", saved: dict[str, "torch.Tensor"]) -> None:
    """Put the buffers back in the precision that they had, on the device where they are."""
    for name, value in saved.items():
        owner: Any = model.get_submodule(name.rpartition(".")[0])
        key = name.rpartition(".")[2]
        owner._buffers[key] = value.to(owner._buffers[key].device)


def parameter_sizes(config: "PreTrainedConfig") -> dict[str, int]:
    """The elements of each parameter of a model of this configuration, by name, tied ones once. Raises SpecError where there is no such
    model."""
    return {name: parameter.numel() for name, parameter in skeleton(config).named_parameters()}


def skeleton(config: "PreTrainedConfig") -> "PreTrainedModel":
    """A model of this configuration without its weights: nothing is allocated. Raises SpecError where there is no such model."""
    import torch
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as CLASSIFIERS

    if encoder := is_encoder(config):
        if not config.problem_type or config.model_type not in ENCODERS:
            raise SpecError(f"{config.model_type} is an encoder" + (", and none whose classifiers are known to read a text alone as beside "
                            "others" if config.problem_type else ": it sees the tokens that it would predict"), where="model",
                            remedy=f"take one of {', '.join(ENCODERS)}" if config.problem_type else CAUSAL_REMEDY)
    elif config.model_type not in CAUSAL:                  # transformers would list all that are
        raise SpecError(f"{config.model_type} is no causal language model", where="model", remedy=CAUSAL_REMEDY)
    what = "classifier" if config.problem_type else "causal language model"
    try:
        if config.problem_type and config.model_type not in CLASSIFIERS:
            raise ValueError(f"the family {config.model_type} has none")
        with torch.device("meta"):
            model: PreTrainedModel = _auto_class(config).from_config(copy.deepcopy(config))
            model.tie_weights()
        if config.problem_type and not encoder and HEAD not in dict(model.named_parameters()):
            raise ValueError(f"that of the family {config.model_type} is not a layer behind the last token")
    except (ValueError, TypeError, KeyError, AttributeError, AssertionError, RuntimeError, ImportError) as error:
        raise SpecError(f"no {what} can be built from it: {last_line(error)}", where="model") from None
    return model


def recompute(model: "PreTrainedModel", every: int) -> None:
    """Let every n-th layer be computed again in the backward pass. Raises SpecError where layers of the family cannot be, or are fewer."""
    layers = recomputable(model)
    if not layers:
        raise SpecError(f"the {model.config.model_type} family of transformers cannot compute its layers again",
                        where="activation_checkpointing", remedy="set it to 0")
    if every > len(layers):
        raise SpecError(f"{every} is more than the model's {len(layers)} layers", where="activation_checkpointing",
                        remedy=f"set it to 1 to {len(layers)}, or to 0")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for i, layer in enumerate(layers):
        layer.gradient_checkpointing = i % every == 0


def compile_layers(model: "PreTrainedModel") -> None:
    """Let each layer be compiled when it first runs; layers of one shape share what is made, and all variants of theirs are kept: past
    torch's own limit of 8 a layer would not be compiled, and be slower without a word. Raises SpecError where the family's are not
    known."""
    import torch

    layers = decoder_layers(model)
    if not layers:
        raise SpecError(f"the layers of the {model.config.model_type} family cannot be told from the rest of it", where="compile",
                        remedy="leave it out")
    torch._dynamo.config.recompile_limit = MAX_VARIANTS
    for layer in layers:
        layer.compile()


def recomputable(model: "PreTrainedModel") -> list[Any]:
    """The layers that can be computed again, in their order; none where the family cannot."""
    return decoder_layers(model) if model.supports_gradient_checkpointing else []


def decoder_layers(model: "PreTrainedModel") -> list[Any]:
    """The blocks of attention and feed-forward layers, in their order; none where the family does not mark them."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def num_parameters(config: "PreTrainedConfig") -> int:
    """All elements of `parameter_sizes`."""
    return sum(parameter_sizes(config).values())
