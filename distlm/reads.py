"""What a job reads, by content: what decides whether a job that is complete would make the same again; and whether what it made is there.

    reads(spec, storage)                               # equal where every file that the spec names is what it was
    missing("train", result)                           # "model.safetensors has 10 of 4,096 bytes"; "" where all is there

Each kind of spec has one function that lists its paths; tests/test_reads.py knows every key of a spec that is text.
"""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash

from distlm import execute
from distlm.errors import DistlmError
from distlm.model.export import export_lacks, file_lacks
from distlm.spec import AverageSpec, CompressSpec, EvaluateSpec, PrepareSpec, ServeSpec, TrainSpec, TuneSpec
from distlm.spec.load import Spec
from distlm.spec.prepare import Source
from distlm.storage import Storage

HASHED_BYTES = 64 << 20


def reads(spec: Spec, storage: Storage) -> list[Any]:
    """What stands for the content of all that a job reads. Raises InputError for what does not exist."""
    found: list[Any] = [execute.inputs(spec, storage)]
    if isinstance(spec, PrepareSpec):
        found += prepare_reads(spec)
    elif isinstance(spec, TrainSpec):
        found += train_reads(found[0])
    elif isinstance(spec, TuneSpec):
        found += tune_reads(spec, storage)
    elif isinstance(spec, AverageSpec):
        found += [entry for model in found[0]["models"] for entry in folder_files(Path(model))]
    elif isinstance(spec, EvaluateSpec | CompressSpec):
        found += evaluate_reads(found[0])
    elif isinstance(spec, ServeSpec):
        found += serve_reads(spec, found[0])
    return found


def prepare_reads(spec: PrepareSpec) -> list[Any]:
    """Sources, evaluation sets, language models, the user's functions, the tokenizer."""
    found: list[Any] = source_files(spec.sources)
    for name, path in sorted(spec.decontaminate.against.items()) if spec.decontaminate else ():
        found += [name, *source_files([Source(path=path)])]
    filters = [spec.filter, *(spec.filtering(source) for source in spec.sources)]
    for model in sorted({rules.language.model for rules in filters if rules.language and rules.language.model}):
        found += folder_files(Path(model).expanduser())
    for function in sorted({rules.function for rules in filters if rules.function}):
        found += module_files(function.split(":")[0])
    return found + (folder_files(Path(spec.tokenizer.source).expanduser()) if spec.tokenizer.source else [])


def train_reads(inputs: Mapping[str, Any]) -> list[Any]:
    """The model, and the teacher; corpora stand in `inputs` by their hashes."""
    return [entry for model in models_of(inputs) for entry in folder_files(Path(model))]


def models_of(inputs: Mapping[str, Any]) -> list[str]:
    """The folders of models that a training run reads."""
    return [inputs[key] for key in ("model", "teacher") if key in inputs]


def tune_reads(spec: TuneSpec, storage: Storage) -> list[Any]:
    """What every trial reads, each model once."""
    from distlm.train.recipe import inputs_of
    from distlm.tune import space

    trials = [inputs_of(space.trial_spec(spec, values, spec.name), storage) for values in space.samples(spec)]
    models = sorted({model for trial in trials for model in models_of(trial)})
    return [*trials, *(entry for model in models for entry in folder_files(Path(model)))]


def evaluate_reads(inputs: Mapping[str, Any]) -> list[Any]:
    """The model, or what an endpoint of ours serves, which `inputs` name by its version; corpora stand there by their hashes."""
    return folder_files(Path(inputs["model"])) if "model" in inputs else []


def serve_reads(spec: ServeSpec, inputs: Mapping[str, Any]) -> list[Any]:
    """The model, its adapters with what tells of them, and the key where it is not the endpoint's own."""
    from distlm.model.adapter_folder import home_of

    adapters = [Path(folder) for folder in inputs.get("adapters", {}).values()]
    places = [Path(inputs["model"]), *adapters, *(home for folder in adapters if (home := home_of(folder)) != folder)]
    key = folder_files(Path(spec.api_key_file).expanduser()) if spec.api_key_file else []
    return [*(entry for place in places for entry in folder_files(place)), *key]


def source_files(sources: list[Source]) -> list[tuple[str, int, int, str]]:
    """Path, size, time of change and licence of every file of sources; a broken link has no size. A licence is decided by files that
    need not be of the source themselves."""
    from distlm.corpus.files import find_files

    return sorted((file.place, file.bytes, file.modified, file.license) for file in find_files(sources))


def folder_files(path: Path, pattern: str = "*") -> list[tuple[str, int, int | str]]:
    """Name, size and hash of every file of a folder, or of the one file; of a large one the time of change instead of the hash."""
    files = sorted(file for file in path.glob(pattern) if file.is_file()) if path.is_dir() else [path]
    return [(file.name, size, xxhash.xxh3_64_hexdigest(file.read_bytes()) if size <= HASHED_BYTES else file.stat().st_mtime_ns)
            for file in files for size in [file.stat().st_size]]


def module_files(module: str) -> list[Any]:
    """The file of a module of the user's, which `execute.inputs` has found to be importable; of a package, all that is in it."""
    found = importlib.util.find_spec(module.split(".")[0])
    places = list(found.submodule_search_locations or ()) if found else []
    if places:
        return [entry for place in places for entry in folder_files(Path(place), "**/*.py")]
    return folder_files(Path(found.origin)) if found and found.has_location and found.origin else []


def missing(kind: str, result: Mapping[str, Any]) -> str:
    """What a job that has succeeded made and what is no longer there, or is not whole, by name and size; "" where there is none."""
    if kind == "prepare":
        return _corpus_lacks(Path(result[""]))
    if kind in ("train", "average", "compress"):
        return export_lacks(Path(result["export"])) if "export" in result else ""          # a profile makes none
    return export_lacks(Path(result["best"]) / "export") if kind == "tune" else ""


def _corpus_lacks(folder: Path) -> str:
    from distlm.corpus.manifest import read_manifest, tokenizer_hash

    try:
        manifest = read_manifest(folder)
    except DistlmError as error:
        return str(error)
    sizes = {folder / shard.file: shard.bytes for split in manifest.splits.values() for shard in split.shards}
    if wrong := next((text for path, size in sizes.items() if (text := file_lacks(path, size))), ""):
        return wrong
    return "" if tokenizer_hash(manifest.tokenizer) == manifest.data["tokenizer"]["hash"] else f"{manifest.tokenizer} is not what it was"
