"""A job whose steps are jobs: ordered by what they need, filled with what the others made, skipped where nothing has changed.

    kind: pipeline
    name: quickstart
    steps:
      prepare: {kind: prepare, sources: [stdlib]}
      train: {kind: train, corpus: "${prepare}", model: {preset: llama-tiny}, duration: {epochs: 1}}
      serve: {file: serve.yaml, set: {model: "${train}"}, needs: [train]}
"""

import copy
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from distlm import execute
from distlm.errors import InputError, ServeError, SpecError
from distlm.outputs import OUTPUTS, TEXTS, objective_of, output, space_of, split, task_outputs, with_article
from distlm.progress import Progress
from distlm.reads import missing, reads
from distlm.runs import RunFolder
from distlm.serve.client import healthy
from distlm.spec import EvaluateSpec, PrepareSpec, ServeSpec
from distlm.spec.explain import KeyPath
from distlm.spec.load import REFERENCE, Loaded, dotted, dump, leaves, locator, nearest, put, validate, with_spec
from distlm.spec.pipeline import PipelineSpec
from distlm.storage import Storage, read_json
from distlm.tune import space

MAKERS: dict[str, dict[str, tuple[str, ...]]] = {
    "corpus": {"prepare": ("",)}, "endpoint": {"serve": ("", "url", "model")},
    "model": {"train": ("", "export"), "tune": ("best",), "average": ("", "export"), "compress": ("", "export")}}
"""What a key may take -> the kinds of steps that make it, and the outputs, "" for the step itself, that name it."""


def inline(loaded: Loaded) -> Loaded:
    """Put every step's file in its place and give every step its name, `<pipeline>-<step>` where it has none. Raises SpecError."""
    spec, folder = loaded.spec, Path(loaded.path).parent
    assert isinstance(spec, PipelineSpec)
    steps: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for step, given in spec.steps.items():
        data, prefix, where = copy.deepcopy(given), f"steps.{step}", place(loaded, f"steps.{step}")
        if "file" in data:
            if unknown := sorted(set(data) - {"file", "set", "needs"}):
                raise SpecError(f"beside file there can be set and needs, not {', '.join(unknown)}", where=where, remedy="put it under set")
            file = data["file"]
            data, found = space.read_file(str(file), folder, place(loaded, f"{prefix}.file"))
            for key, value in (given.get("set") or {}).items():
                try:
                    put(data, str(key), value)
                except SpecError as error:
                    raise SpecError(error.message, where=place(loaded, f"{prefix}.set.{key}")) from None
                found = {k: text for k, text in found.items() if k != key and not k.startswith(f"{key}.")}
                found |= {name.removeprefix(f"{prefix}.set."): text for name, text in loaded.origins.items()
                          if name == f"{prefix}.set.{key}" or name.startswith(f"{prefix}.set.{key}.")}
            origins |= {f"{prefix}.{key}": text for key, text in found.items()}
            data["needs"] = given.get("needs", [])
            folder_ = (folder / Path(str(file)).expanduser()).parent
        else:
            folder_ = folder
        if data.get("kind") == "pipeline":
            raise SpecError("a pipeline cannot be a step", where=where, remedy="put its steps here")
        if data.get("kind") == "tune" and isinstance(data.get("train"), str) and not REFERENCE.search(data["train"]):
            data["train"], found = space.read_train(data["train"], folder_, place(loaded, f"{prefix}.train"))
            origins |= {f"{prefix}.train.{key}": text for key, text in found.items()}
        if "name" not in data:
            data["name"], origins[f"{prefix}.name"] = f"{spec.name}-{step}", "default"
        steps[step] = data
    return with_spec(loaded, spec.model_copy(update={"steps": steps}), origins)


def check(loaded: Loaded) -> list[str]:
    """The steps in order. Every step is validated as far as it can be before the others have run. Raises SpecError."""
    spec = loaded.spec
    assert isinstance(spec, PipelineSpec)
    problems = []
    names: dict[tuple[str, str], str] = {}
    for step, data in spec.steps.items():
        where = place(loaded, f"steps.{step}")
        try:
            kind = "a model" if data.get("kind") in ("train", "average", "compress") else str(data.get("kind"))
            taken = names.setdefault((kind, str(data["name"])), step)
            if taken != step:
                raise SpecError(f"{data['name']} is the name of the step {taken} too", where=where)
            for key, value in leaves(data):
                for text in value if isinstance(value, list) else [value]:
                    if isinstance(text, str) and "${" in text:
                        check_references(spec.steps, step, key, text, place(loaded, f"steps.{step}.{dotted(key)}"))
            if data.get("storage") is not None:
                raise SpecError(f"{data['storage']} has no effect: a pipeline's steps share its storage",
                                where=place(loaded, f"steps.{step}.storage"), remedy="set storage beside steps")
            check_step(spec.steps, step, locator(loaded, f"steps.{step}"))
            check_context(spec.steps, step, locator(loaded, f"steps.{step}"))
        except SpecError as error:
            problems.append(str(error))
    if problems:
        raise SpecError("\n".join(problems))
    steps = order(spec.steps, lambda step: place(loaded, f"steps.{step}"))
    check_address({step: spec.steps[step] for step in steps}, lambda step, key: locator(loaded, f"steps.{step}")((key,)))
    return steps


def check_step(steps: Mapping[str, Any], step: str, where: Callable[[KeyPath], str]) -> None:
    """Validate a step with stand-ins for what is not there yet. `where` tells the place of its keys."""
    data = {key: stand_in(steps, value) for key, value in steps[step].items() if key != "needs"}

    def may_be_no_text(text: str) -> bool:
        """Whether what the references of a text stand for may be no text."""
        whole = REFERENCE.fullmatch(text)
        return whole is not None and split(steps, whole[1])[1] not in TEXTS

    spec = validate(data, references=may_be_no_text, place=where)
    if data.get("kind") == "tune" and isinstance(data.get("train"), dict) and spec is not None:
        space.check(spec, where, references=may_be_no_text)
    if isinstance(spec, EvaluateSpec) and objective_of(steps, step) == "classify":
        from distlm.evaluate.task import check_classifier

        try:
            check_classifier(spec, [], "what is measured")
        except SpecError as error:
            raise SpecError(error.message, where=where((error.where,)), remedy=error.remedy) from None


def check_references(steps: Mapping[str, Any], step: str, key: KeyPath, text: str, where: str) -> None:
    """Raises SpecError where a text names an output that is not there, or is as a whole a reference to what `key` does not take, to a
    classifier where only language models can be, or to one whose mean with a language model there is not."""
    if "${" in REFERENCE.sub("", text):
        raise SpecError(f"{text!r}: a reference is not closed", where=where, remedy="write ${step} or ${step.output}")
    for reference in REFERENCE.findall(text):
        output(steps, reference, where)
    whole, wanted = REFERENCE.fullmatch(text), takes(steps[step].get("kind"), key)
    other, name = split(steps, whole[1]) if whole else ("", "")
    kind = str(steps[other].get("kind")) if whole else ""
    if wanted == "model" and whole and steps[step].get("kind") == "compress" and objective_of(steps, other) == "classify":
        from distlm.evaluate.task import NO_LANGUAGE_MODEL

        raise SpecError(NO_LANGUAGE_MODEL[0], where=where, remedy=NO_LANGUAGE_MODEL[1])
    if wanted == "model" and whole and steps[step].get("kind") == "average":
        objectives = {objective_of(steps, other), objective_of(steps, step)} - {""}
        if "classify" in objectives and len(objectives) > 1:
            raise SpecError("a classifier and a language model have no mean", where=where, remedy="leave one of them out")
    if not wanted or kind not in OUTPUTS or name in MAKERS[wanted].get(kind, ()) or name.startswith("best."):
        return
    fit = [f"${{{one}{names[0] and '.'}{names[0]}}}" for one, data in steps.items()
           for names in [MAKERS[wanted].get(str(data.get("kind")))] if names and one != step]
    maker = next(iter(MAKERS[wanted]))
    raise SpecError(f"{text} is no {wanted}: {other} is {with_article(kind)} step", where=where,
                    remedy=f"did you mean {' or '.join(fit)}?" if fit else f"{with_article(maker)} step makes one")


def takes(kind: Any, key: KeyPath) -> str:
    """What a key of a step takes: a corpus, a model, an endpoint, or "" for anything."""
    if kind == "tune" and key[0] == "train":
        kind, key = "train", key[1:]
    if kind == "train" and key[:1] == ("corpus",) and key[-1] == "corpus":
        return "corpus"
    if kind == "average":
        return {"corpus": "corpus", "models": "model"}.get(str(key[0]), "")
    if kind in ("evaluate", "compress"):
        return str(key[0]) if key in (("corpus",), ("model",), ("endpoint",)) else ""
    if kind == "serve" and key[:1] == ("adapters",):
        return "model"
    return "model" if (kind, key) in (("serve", ("model",)), ("train", ("model", "from")), ("train", ("distill", "teacher"))) else ""


def check_context(steps: Mapping[str, Any], step: str, where: Callable[[KeyPath], str]) -> None:
    """Raises SpecError where the corpora that a step trains on have another context than its model or than each other."""
    inside: KeyPath = ("train",) if steps[step].get("kind") == "tune" else ()
    data = steps[step]["train"] if inside else steps[step]
    model = data.get("model") if isinstance(data, dict) else None
    asked = model.get("context") if isinstance(model, dict) else None
    found: dict[str, int] = {}
    for key, value in leaves({"corpus": data.get("corpus")}) if isinstance(data, dict) else ():
        whole = REFERENCE.fullmatch(value) if isinstance(value, str) and takes(data.get("kind", "train"), key) else None
        other, name = split(steps, whole[1]) if whole else ("", "")
        context = steps[other].get("context", PrepareSpec.model_fields["context"].default) if other and not name else None
        if not isinstance(context, int):                   # a reference itself, or a corpus that is there
            continue
        if isinstance(asked, int) and asked != context:
            raise SpecError(f"{asked} is not the context of the corpus that {other} makes, {context}",
                            where=where((*inside, "model", "context")), remedy=f"leave it out, or set context: {asked} in {other}")
        if first := next((one for one in found if found[one] != context), ""):
            raise SpecError(f"{other} makes windows of {context} tokens, and {first} of {found[first]}", where=where((*inside, *key)),
                            remedy=f"set context: {found[first]} in {other}")
        found[other] = context


def check_address(steps: Mapping[str, Any], where: Callable[[str, str], str]) -> None:
    """`steps` are in order. Raises SpecError where an endpoint asks for another address than the one that the first has taken."""
    address: dict[str, Any] = {}
    for step, data in steps.items():
        for key in ("host", "port") if data.get("kind") == "serve" else ():
            value = data.get(key, ServeSpec.model_fields[key].default)
            first, taken = address.setdefault(key, (step, value))
            if value != taken and value != 0 and not any(isinstance(one, str) and "${" in one for one in (value, taken)):
                raise SpecError(f"a cluster has one address, and {first} takes {taken or 'a free one'}, not {value}",
                                where=where(step, key), remedy=f"set {key}: {taken} here too, or {key}: {value} there")


def stand_in(steps: Mapping[str, Any], value: Any) -> Any:
    """`value` with every reference to a sweep's best value replaced by a value of its space: rules can be checked with it."""
    if isinstance(value, dict):
        return {k: stand_in(steps, v) for k, v in value.items()}
    if isinstance(value, list):
        return [stand_in(steps, v) for v in value]
    whole = REFERENCE.fullmatch(value) if isinstance(value, str) else None
    if whole:
        step, name = split(steps, whole[1])
        dimension = space_of(steps[step]).get(name.removeprefix("best."))
        values = next(iter(dimension.values()), None) if isinstance(dimension, dict) else None
        return values[0] if isinstance(values, list) and values else value
    return value


def wants(steps: Mapping[str, Any], step: str) -> list[str]:
    """The steps that `step` needs, by `needs` or by reference."""
    texts = [t for _, value in leaves(steps[step]) for t in (value if isinstance(value, list) else [value]) if isinstance(t, str)]
    found = [split(steps, reference)[0] for text in texts for reference in REFERENCE.findall(text)]
    needs = steps[step].get("needs") or []
    return list(dict.fromkeys([*([needs] if isinstance(needs, str) else needs), *found]))


def order(steps: Mapping[str, Any], where: Any = str) -> list[str]:
    """The steps such that each comes after what it needs, otherwise as written. Raises SpecError for cycles and unknown steps."""
    done: list[str] = []
    path: list[str] = []

    def visit(step: str) -> None:
        if step in done:
            return
        if step in path:
            raise SpecError(f"the steps need each other: {' -> '.join([*path[path.index(step):], step])}", where=where(step),
                            remedy="take out one of the references")
        path.append(step)
        for other in wants(steps, step):
            if other not in steps:
                near = nearest(other, steps)
                raise SpecError(f"needs {other!r}, which is no step", where=where(step),
                                remedy=f"did you mean {near}?" if near else f"there are {', '.join(steps)}")
            visit(other)
        path.pop()
        done.append(step)

    for step in steps:
        visit(step)
    return done


def fill(value: Any, steps: Mapping[str, Any], made: Mapping[str, dict[str, Any]]) -> Any:
    """`value` with its references replaced by what the steps made. A reference that is the whole value keeps its type."""
    if isinstance(value, dict):
        return {k: fill(v, steps, made) for k, v in value.items()}
    if isinstance(value, list):
        return [fill(v, steps, made) for v in value]
    if not isinstance(value, str):
        return value

    def lookup(reference: str) -> Any:
        step, name = split(steps, reference)
        found = {**made[step], **task_outputs(made[step])}
        if name not in found:
            near = nearest(name, found)
            raise SpecError(f"${{{reference}}}: the step {step} made no {name}", remedy=f"did you mean {near}?" if near else
                            f"there are {', '.join(k for k in found if k)}")
        if found[name] is None:
            raise SpecError(f"${{{reference}}}: the step {step} came to no number for it", remedy=f"result.json of {step} says more")
        return found[name]

    whole = REFERENCE.fullmatch(value)
    return lookup(whole[1]) if whole else REFERENCE.sub(lambda match: str(lookup(match[1])), value)


def pipeline(spec: PipelineSpec, folder: RunFolder, storage: Storage, progress: Progress) -> dict[str, Any]:
    """Run what is still to be done, step by step, and show what came of it. Raises what a step raises."""
    check_ports(spec, storage)
    made: dict[str, dict[str, Any]] = {}
    marks: dict[str, str] = {}
    folders: dict[str, RunFolder] = {}
    steps = order(spec.steps)
    for i, step in enumerate(steps):
        data = {key: fill(value, spec.steps, made) for key, value in spec.steps[step].items() if key != "needs"}
        loaded = execute.resolve(data)
        folders[step] = RunFolder(storage.folder(loaded.spec.kind, loaded.spec.name))
        mark = fingerprint(loaded, {other: marks[other] for other in wants(spec.steps, step)}, storage)
        made[step] = run_step(spec.name, step, loaded, mark, folders[step], storage, progress)
        marks[step] = identity(loaded.spec.kind, folders[step])
        folder.event("note", message=f"step {step} is complete", step=step, folder=str(folders[step].path))
        progress.update("steps done", i + 1, len(steps))
    kinds = {step: spec.steps[step]["kind"] for step in steps}
    from distlm import summary

    summary.show(spec.prompt, {step: (kinds[step], folders[step], made[step]) for step in steps}, progress, spec.chat)
    flat = {f"{step}.{name}" if name else step: value for step in steps
            for name, value in {**made[step], **task_outputs(made[step])}.items()}
    return {"": str(folder.path), "endpoints": {folders[step].name: made[step]["url"] for step in steps if kinds[step] == "serve"}, **flat}


def check_ports(spec: PipelineSpec, storage: Storage) -> None:
    """Raises ServeError where an endpoint's port cannot be had: at the end would be late. Its own, where it answers already, is fine."""
    for step in spec.steps:
        data = {key: stand_in(spec.steps, value) for key, value in spec.steps[step].items() if key != "needs"}
        serve = validate(data, f"steps.{step}", references=True) if data.get("kind") == "serve" else None
        if serve is None or not serve.port:
            continue
        from distlm.serve import deploy

        record = storage.endpoint(serve.name) / "endpoint.json"
        if record.exists() and f":{serve.port}/" in (endpoint := read_json(record))["url"] and healthy(endpoint):
            continue
        try:
            deploy.address(serve)
        except ServeError as error:
            raise ServeError(error.message, where=f"steps.{step}: {error.where}", remedy=error.remedy, cause=error.cause) from None


def run_step(owner: str, step: str, loaded: Loaded, mark: str, folder: RunFolder, storage: Storage, progress: Progress) -> dict[str, Any]:
    """Skip the step where it is complete and unchanged, resume it where it has failed or a checkpoint gives back what is gone,
    run it anew where it has changed or nothing can. An endpoint that has changed is replaced in place: its address and its key stay."""
    kind = loaded.spec.kind
    resume = False
    if folder.exists():
        state, _ = folder.state()
        record = folder.lineage() if (folder.path / "lineage.json").exists() else {}
        if record.get("pipeline") != owner:
            raise InputError(f"the name {folder.name} is taken by a job that is not of the pipeline {owner}", where=str(folder.path),
                             remedy=f"give the step {step} another name")
        unchanged = record.get("fingerprint") == mark
        lacks = ""
        if unchanged and state == "succeeded":
            outputs = folder.read_result()
            lacks = missing(kind, outputs)
            if not lacks and (kind != "serve" or healthy(outputs)):
                progress.stage(kind, loaded.spec.name)
                progress.note(f"step {step} is complete and unchanged: skipped")
                return outputs
        if unchanged and (not lacks or (kind == "train" and has_checkpoint(folder))):
            progress.note(f"step {step} has {state} before{lacks and ', but ' + lacks}: taken up again")
            resume = True
        elif state in ("starting", "running"):
            raise InputError(f"{folder.name} is {state}", where=str(folder.path), remedy=f"`distlm stop {folder.name}` ends it")
        elif kind == "serve":
            progress.note(f"step {step} or what it reads has changed: its endpoint is replaced and keeps its key")
            resume = True
        else:
            aside = move_aside(folder.path)
            why = f"step {step} is not complete any more, {lacks}" if lacks else f"step {step} or what it reads has changed"
            progress.note(f"{why}: it runs again; what it made before lies in {aside}")
    return execute.run_loaded(loaded, storage, progress, resume=resume, hold=False,
                              extra={"pipeline": owner, "step": step, "fingerprint": mark})


def has_checkpoint(folder: RunFolder) -> bool:
    """Whether a run can go on from what it has saved."""
    from distlm.train import checkpoint

    return checkpoint.latest(folder.path)[0] is not None


def move_aside(path: Path) -> Path:
    """Rename a folder to the first free of `<name>.old-1`, `.old-2`, ..."""
    n = 1
    while (aside := path.with_name(f"{path.name}.old-{n}")).exists():
        n += 1
    path.rename(aside)
    return aside


def fingerprint(loaded: Loaded, needed: Mapping[str, str], storage: Storage) -> str:
    """A hash of all that decides what a step makes: its spec, what it needs, what it reads. Raises InputError for what does not exist."""
    spec = dump(loaded.spec) | {"storage": None}
    return hashlib.sha256(json.dumps([spec, sorted(needed.items()), reads(loaded.spec, storage)]).encode()).hexdigest()


def identity(kind: str, folder: RunFolder) -> str:
    """What stands for the content of a step's folder: a corpus by its manifest, others by when they were made and what came of them; a run
    by when it began first, since one that is taken up again makes the same."""
    if kind == "prepare":
        from distlm.corpus.manifest import manifest_hash

        return manifest_hash(folder.path)
    record, result = folder.lineage(), folder.read_result()
    if kind == "train":
        record = next(iter(record.get("earlier", ())), record)
        result = {key: value for key, value in result.items() if key != "tokens_per_s"}
    return hashlib.sha256(json.dumps([record.get("created"), result], sort_keys=True).encode()).hexdigest()


def place(loaded: Loaded, key: str) -> str:
    """`file.yaml:12: steps.train`: where a section of the spec begins."""
    return locator(loaded, key)(())
