"""An adapter as peft writes it, for a model that is served as it is: found, read, and held against its base.

    folders = find_adapters({"poems": "my-run"}, storage)
    check_adapters(folders, model)                         # InputError where one cannot be served over this model
    for module, a, b, magnitude in AdapterFolder.read(folders["poems"]).matrices(): ...
"""

import contextlib
import functools
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from distlm.errors import InputError, StorageError
from distlm.model.adapter import base_hash
from distlm.model.build import has_classifier, last_line, read_config, skeleton
from distlm.model.complete import end_ids
from distlm.model.export import of_a_model
from distlm.model.find import check_whole
from distlm.spec.load import nearest
from distlm.storage import Storage, read_json

if TYPE_CHECKING:
    import torch

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
READ = {"peft_type", "lora_alpha", "alpha_pattern", "use_rslora", "use_dora", "init_lora_weights", "base_model_name_or_path"}
"""Keys of adapter_config.json that are honoured."""
UNNEEDED = {"r", "rank_pattern", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out",
            "task_type", "auto_mapping", "inference_mode", "lora_dropout", "peft_version", "revision", "eva_config", "megatron_config",
            "megatron_core", "qalora_group_size", "ensure_weight_tying"}
"""Those that say what the matrices and their names say, or what matters in training alone."""
INITIAL = (True, False, "gaussian", "eva", "orthogonal", "mica")
"""Beginnings of A and B that leave the base as it is."""
PREFIX = "base_model.model."
PART = re.compile(r"(.+)\.(?:(lora_A|lora_B)\.weight|(lora_magnitude_vector)(?:\.weight)?)")
TOKENIZER_ENDINGS = (".json", ".jinja", ".model", ".txt")
MERGED = "serve the model that it makes, merged, by itself"
AGAIN = "copy the adapter again"


def find_adapters(named: Mapping[str, str], storage: Storage) -> dict[str, Path]:
    """The folder of each adapter of an endpoint. Raises InputError for one that is not there."""
    return {name: find_adapter(text, storage, f"adapters.{name}") for name, text in named.items()}


def find_adapter(text: str, storage: Storage, key: str) -> Path:
    """The folder with the adapter of a run, by name or path, or of peft's. Raises InputError."""
    places = [Path(text).expanduser().absolute()]
    with contextlib.suppress(StorageError):                # an absolute path, or one with ..
        places.insert(0, storage.run(text))
    for place in places:
        for folder in (place / "export" / "adapter", place / "adapter", place):
            if (folder / CONFIG).is_file():
                return folder
        if place.is_dir():
            raise InputError("there is no adapter in it", where=f"{key}: {place}",
                             remedy=f"name a run with `adapter:` that has ended well, or a folder with {CONFIG}")
    runs = storage.run("x").parent
    near = nearest(text, [path.name for path in runs.iterdir()] if runs.is_dir() else [])
    raise InputError(f"there is no run and no folder {text!r}", where=key,
                     remedy=f"did you mean {near}?" if near else f"the runs are in {runs}")


def home_of(folder: Path) -> Path:
    """Where the tokenizer and the lineage of an adapter lie: in the export of its run, or beside the adapter itself."""
    return folder.parent if folder.name == "adapter" and (folder.parent / "distlm.json").is_file() else folder


def ends_of(folder: Path) -> frozenset[int]:
    """Tokens that end a sequence by the generation_config.json of an adapter's run; none where there is no such file."""
    path = home_of(folder) / "generation_config.json"
    return frozenset(end_ids(read_json(path).get("eos_token_id") if path.is_file() else None))


def tokenizer_files(home: Path) -> list[Path]:
    """Those from which the tokenizer there is read; none where it lies beside no adapter, which then has its model's."""
    found = sorted(file for file in home.iterdir() if not of_a_model(file) and file.suffix in TOKENIZER_ENDINGS and file.name != CONFIG)
    return found if any(file.name == "tokenizer_config.json" for file in found) else []


def load_tokenizers(folders: Mapping[str, Path], model: Path, own: Any, vocabulary: int) -> dict[str, tuple[Path, Any]]:
    """Of each adapter the folder of its tokenizer, beside it or else `model`, and the tokenizer, which is `own` where it is the model's;
    equal ones are loaded once. Raises InputError for one that cannot be read, or that has tokens which the model has not."""
    from transformers import AutoTokenizer

    found, loaded = dict[str, tuple[Path, Any]](), {_files_of_tokenizer(model): own}
    for name, folder in folders.items():
        home = home_of(folder) if tokenizer_files(home_of(folder)) else model
        files, where = _files_of_tokenizer(home), f"adapters.{name}: {home}"
        if files not in loaded:
            try:
                loaded[files] = AutoTokenizer.from_pretrained(home, local_files_only=True)
            except Exception as error:                     # of no narrower kind where tokenizer.json is torn
                raise InputError(f"its tokenizer cannot be read: {last_line(error)}", where=where,
                                 remedy="copy its files again, or take tokenizer_config.json away for the model's own") from None
            if len(loaded[files]) > vocabulary:
                raise InputError(f"its tokenizer has {len(loaded[files])} tokens, and the model {vocabulary}", where=where, remedy=MERGED)
        found[name] = home, loaded[files]
    return found


def check_adapters(folders: Mapping[str, Path], model: Path) -> None:
    """Raises InputError where one cannot be served over `model`. Reads the adapters' weights, and the model's once, where an adapter tells
    its base's."""
    if not folders:
        return
    check_whole(model)
    config = read_config(model, f"model: {model}")
    if has_classifier(config):
        raise InputError("the model is a classifier, and adapters are served over language models", where="adapters",
                         remedy="leave them out")
    config.problem_type = None
    meta: Any = skeleton(config)
    modules = dict(meta.named_modules())
    hash_of = functools.cache(base_hash)
    for name, folder in folders.items():
        where = f"adapters.{name}: {folder}"
        adapter = AdapterFolder.read(folder, where)
        recorded = adapter.base_hash or (hash_of(str(Path(adapter.base).resolve())) if adapter.has_base_here else "")
        if recorded and recorded != hash_of(str(model.resolve())):
            raise InputError(f"was trained on {adapter.base}, whose weights are not those of {model}", where=where,
                             remedy="serve it over the model that it was trained on; its files are compared by name and content")
        adapter.check_fits(modules, where)
        adapter.check_finite(where)
    load_tokenizers(folders, model, None, meta.get_input_embeddings().num_embeddings)


@dataclass(frozen=True)
class AdapterFolder:
    """What lies in the folder, but for the matrices themselves."""

    folder: Path
    config: dict[str, Any]
    names: dict[str, dict[str, str]]
    """Module of the base -> lora_A, lora_B and lora_magnitude_vector -> the name in the file."""
    shapes: dict[str, list[int]]
    """Of the tensors in the file."""

    @classmethod
    def read(cls, folder: Path, where: str = "") -> "AdapterFolder":
        """Raises InputError for what can only be served merged, and for what is not whole."""
        from safetensors import SafetensorError, safe_open

        where = where or str(folder)
        config = read_json(folder / CONFIG)
        if wrong := _malformed(config):
            raise InputError(f"{CONFIG}: {wrong}", where=where, remedy=AGAIN)
        for key, value in config.items():
            if wrong := _refused(key, value):
                raise InputError(f"{CONFIG}: {key}: {wrong}", where=where, remedy=MERGED)
        if not (folder / WEIGHTS).is_file():
            raise InputError(f"there is no {WEIGHTS} beside {CONFIG}", where=where, remedy="save it again with safe_serialization=True")
        try:
            with safe_open(folder / WEIGHTS, framework="pt") as file:
                shapes = {name: list(file.get_slice(name).get_shape()) for name in file.keys()}     # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise InputError(f"{WEIGHTS} cannot be read: {last_line(error)}", where=where, remedy=AGAIN) from None
        names: dict[str, dict[str, str]] = {}
        for name in shapes:
            found = PART.fullmatch(name.removeprefix(PREFIX))
            if not found:
                raise InputError(f"{WEIGHTS}: {name} is no part of a low-rank adapter of a linear layer", where=where, remedy=MERGED)
            names.setdefault(found[1], {})[found[2] or found[3]] = name
        wanted = {"lora_A", "lora_B", *(["lora_magnitude_vector"] if config.get("use_dora") else [])}
        if wrong := next((module for module, parts in names.items() if set(parts) != wanted), "" if names else "every layer"):
            raise InputError(f"{WEIGHTS} does not hold {', '.join(sorted(wanted))} of {wrong}", where=where, remedy=AGAIN)
        for module, parts in names.items():
            a, b, *magnitude = (shapes[parts[part]] for part in sorted(parts))
            if not (len(a) == len(b) == 2 and a[0] == b[1] > 0 and all(one == b[:1] for one in magnitude)):
                raise InputError(f"{WEIGHTS}: {module} has tensors of the shapes {', '.join(map(str, (a, b, *magnitude)))}, which are not "
                                 f"[rank, inputs], [outputs, rank]{' and [outputs]' * bool(magnitude)}", where=where, remedy=AGAIN)
        return cls(folder, config, names, shapes)

    def check_fits(self, modules: Mapping[str, Any], where: str) -> None:
        """Raises InputError where a layer is not one of the base's `modules`, or has another shape there."""
        for name, parts in self.names.items():
            sizes = layer_sizes(modules.get(name))
            if sizes is None:
                raise InputError(f"the model has no linear layer {name}", where=where,
                                 remedy="serve it over the model that it was trained on")
            found = self.shapes[parts["lora_A"]][-1], self.shapes[parts["lora_B"]][0]
            if found != sizes:
                raise InputError(f"{name} takes {found[0]} and gives {found[1]} numbers, and {sizes[0]} and {sizes[1]} in the model",
                                 where=where, remedy="serve it over the model that it was trained on")

    def check_finite(self, where: str) -> None:
        """Raises InputError where a weight is no finite number. Reads them all."""
        for name, *matrices in self.matrices():
            if not all(matrix is None or matrix.isfinite().all() for matrix in matrices):
                raise InputError(f"{WEIGHTS}: {name} has weights that are not finite", where=where, remedy="train it again")

    @property
    def base(self) -> str:
        """The base as the adapter names it: a folder, a name elsewhere, or ""."""
        return str(self.config.get("base_model_name_or_path") or "")

    @property
    def base_hash(self) -> str:
        """That of the base's weights where it is on record, as it is for a run of ours; else ""."""
        path = home_of(self.folder) / "distlm.json"
        return str(read_json(path).get("base_hash") or "") if path.is_file() else ""

    @property
    def has_base_here(self) -> bool:
        return bool(self.base) and any(Path(self.base).glob("*.safetensors"))

    @property
    def caveat(self) -> str:
        """What is to be told where nothing says whether the adapter belongs to the model; "" where it is known."""
        known = self.base_hash or self.has_base_here
        return "" if known else f"its base {self.base or '(it names none)'} is not here: only the shapes were compared"

    @property
    def rank(self) -> int:
        """The largest of its layers."""
        return max(self.shapes[parts["lora_A"]][0] for parts in self.names.values())

    @property
    def num_parameters(self) -> int:
        return sum(size[0] * (size[1] if len(size) > 1 else 1) for size in self.shapes.values())

    def scaling(self, module: str, rank: int) -> float:
        """What B A is multiplied by: alpha / rank (Hu et al. 2021), or alpha / sqrt(rank) (Kalajdzievski 2023)."""
        patterns = self.config.get("alpha_pattern") or {}
        key = next((key for key in patterns if re.match(rf"(.*\.)?({key})$", module)), "")
        alpha = float(patterns[key] if key else self.config.get("lora_alpha", 8))
        return alpha / (rank ** 0.5 if self.config.get("use_rslora") else rank)

    def matrices(self) -> "Iterator[tuple[str, torch.Tensor, torch.Tensor, torch.Tensor | None]]":
        """(module, A [rank, in], B [out, rank] with its scaling, DoRA's magnitude [out]) in float32."""
        from safetensors.torch import load_file

        values = load_file(self.folder / WEIGHTS)
        for module, parts in self.names.items():
            found = {part: values[name].float() for part, name in parts.items()}
            a = found["lora_A"]
            yield module, a, found["lora_B"] * self.scaling(module, len(a)), found.get("lora_magnitude_vector")


def layer_sizes(module: Any) -> tuple[int, int] | None:
    """Inputs and outputs of a linear layer, gpt2's of another kind among them; None for anything else."""
    import torch
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, Conv1D):
        return module.weight.shape[0], module.weight.shape[1]
    return (module.in_features, module.out_features) if isinstance(module, torch.nn.Linear) else None


def _files_of_tokenizer(folder: Path) -> frozenset[tuple[str, str]]:
    """Name and hash of each file that a tokenizer is made of."""
    return frozenset((file.name, xxhash.xxh3_128_hexdigest(file.read_bytes())) for file in tokenizer_files(folder))


def _malformed(config: Any) -> str:
    """What in an adapter_config.json is of no use to anybody; "" where there is nothing."""
    if not isinstance(config, dict):
        return "is no mapping"
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        return f"alpha_pattern: {patterns!r} is no mapping"
    for key, alpha in {"lora_alpha": config.get("lora_alpha", 8), **patterns}.items():
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
            return f"{key}: {alpha!r} is no number"
        try:
            re.compile(key)
        except re.error as error:
            return f"alpha_pattern: {key!r} is no regular expression: {error}"
    return ""


def _refused(key: str, value: Any) -> str:
    """Why a value of adapter_config.json cannot be served beside other adapters; "" where it can."""
    if key == "peft_type":
        return "" if value == "LORA" else f"{value} is no low-rank adapter, LORA"
    if key == "init_lora_weights":
        return "" if value in INITIAL else f"{value} changes the base's own weights"
    if key == "modules_to_save" and value:
        return f"{', '.join(map(str, value)) if isinstance(value, list) else value} would be whole layers of its own"
    if key == "bias" and value != "none":
        return f"{value} trains what is the base's"
    return "" if key in READ | UNNEEDED or not value or value == "none" else f"{value} is not supported"
