"""A sweep's space: keys of the training spec, their values, and the trials that they make, all known before any work.

    spec = load_spec("jobs/tune.yaml").spec
    for values in samples(spec):                           # {"optimizer.lr": 0.0013}, ...
        train = trial_spec(spec, values, "000-lr-0.0013")
"""

import copy
import functools
import itertools
import math
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import BaseModel

from distlm.errors import InputError, SpecError
from distlm.spec.explain import KeyPath, shown
from distlm.spec.load import Loaded, References, dotted, leaves, locator, nearest, nearest_file, parse, put, validate, with_spec
from distlm.spec.train import TrainSpec
from distlm.spec.tune import Dimension, TuneSpec
from distlm.storage import Storage

OWN = ("name", "kind", "storage")
"""Keys of a training spec that the sweep itself sets."""
GIVE_WAY = ("name", "storage")
"""Those of them that a file has as a spec of its own, and that have no effect inside a sweep's spec."""


def inline(loaded: Loaded) -> Loaded:
    """Put a training spec that is named as a file, relative to the sweep's, in its place. Raises SpecError."""
    spec = loaded.spec
    assert isinstance(spec, TuneSpec)
    if not isinstance(spec.train, str):
        return loaded
    data, origins = read_train(spec.train, Path(loaded.path).parent, locator(loaded)(("train",)))
    return with_spec(loaded, spec.model_copy(update={"train": data}), {f"train.{key}": text for key, text in origins.items()})


def read_train(name: str, folder: Path, where: str) -> tuple[dict[str, Any], dict[str, str]]:
    """`read_file` for a sweep's training spec: the name and the storage root of a single run give way to the sweep's."""
    data, found = read_file(name, folder, where)
    return {k: v for k, v in data.items() if k not in GIVE_WAY}, {k: v for k, v in found.items() if k not in GIVE_WAY}


def read_file(name: str, folder: Path, where: str) -> tuple[dict[str, Any], dict[str, str]]:
    """A spec file's data, not validated, and the line of every value. Raises SpecError."""
    path = folder / Path(name).expanduser()
    try:
        data, lines = parse(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        near = nearest_file(path) if isinstance(error, FileNotFoundError) else None
        raise SpecError(f"{name} cannot be read: {getattr(error, 'strerror', None) or error}", where=where,
                        remedy=f"did you mean {near}?" if near else f"a file is named relative to {folder}") from None
    found = {}
    for key, _ in leaves(data):
        line = next((lines[key[:end]] for end in range(len(key), 0, -1) if key[:end] in lines), 0)
        found[dotted(key)] = f"{path.name}:{line}"
    return data, found


def check(spec: TuneSpec, where: Callable[[KeyPath], str], *, references: References = False) -> None:
    """Every key of the space, the base spec, the ends of every range and every trial. `where` tells the place of a key of the sweep's
    spec. With `references`, values that hold `${...}` are passed over, as `validate` does. Raises SpecError."""
    for key in spec.space:
        check_key(key, where(("space", key)))
        if section := next((one for one in spec.space if key.startswith(f"{one}.")), ""):
            raise SpecError(f"it lies in {section}, which the space sets as a whole", where=where(("space", key)),
                            remedy="leave one of the two out")
    for key, dimension in spec.space.items():
        if any(isinstance(v, str) and "${" in v for v in (dimension.choice or []) + (dimension.grid or [])):
            raise SpecError("a space cannot hold references", where=where(("space", key)))
    assert isinstance(spec.train, dict)
    if (kind := spec.train.get("kind", "train")) != "train":
        raise SpecError(f"{shown(kind)}: a sweep tries training specs", where=where(("train", "kind")), remedy="leave it out")
    for key in GIVE_WAY:
        if spec.train.get(key) is not None:
            raise SpecError(f"{shown(spec.train[key])} has no effect in a sweep, which sets it", where=where(("train", key)),
                            remedy="leave it out" if key == "name" else "set storage beside train")
    base = base_data(spec)
    if spec.folds is not None:
        check_folds(spec, base, where)
    first = samples(spec)[0]
    whole = with_values(base, first)                       # a key that the space sets may be missing from the base
    try:
        validate(whole, references=references, place=lambda key: where(("train", *key)))
    except SpecError as error:
        if not any(f"train.{key}:" in str(error) for key in spec.space):
            raise
    trains: list[TrainSpec | None] = []
    ends, drawn = extremes(spec, first), samples(spec)
    for values in itertools.chain(ends, drawn):
        try:
            trains.append(validate(with_values(base, values), "train", references=references))
        except SpecError as error:
            text = ", ".join(f"{key}={value!r}" for key, value in values.items())
            broken = str(error).splitlines()[0].removeprefix("train: ")
            whole_number = "whole number" in broken
            hint = "draw whole numbers with choice or grid" if whole_number else "every value of the space must give a valid spec"
            raise SpecError(f"with {text}: {broken}", where=where(("space",)), remedy=hint) from None
    longest = max(((train and train.duration.steps) or math.inf for train in trains), default=math.inf)
    if spec.asha and spec.asha.grace_steps >= longest:
        raise SpecError(f"{spec.asha.grace_steps} has no effect where no trial takes more than {longest} steps: none would stop early",
                        where=where(("asha", "grace_steps")), remedy="lower it, or leave asha out")
    if any(train and train.evaluate.worker for train in trains):
        raise SpecError("a trial is judged as it evaluates, and an evaluation beside its steps comes later", remedy="leave it out",
                        where=where(("train", "evaluate", "worker")))
    check_comparable(spec, [train for train in trains[len(ends):] if train is not None], where)


def check_folds(spec: TuneSpec, base: dict[str, Any], where: Callable[[KeyPath], str]) -> None:
    """Raises SpecError where documents cannot be divided into folds, or are already."""
    if key := next((key for key in spec.space if key.split(".")[0] == "fold"), ""):
        raise SpecError("folds sets it", where=where(("space", key)), remedy="leave one of the two out")
    if base.get("fold") is not None:
        raise SpecError("folds beside train sets it", where=where(("train", "fold")), remedy="leave one of the two out")
    if "objective" not in spec.space and (objective := base.get("objective", "pretrain")) != "classify" and "${" not in str(objective):
        raise SpecError(f"is for objective: classify, not for {objective}", where=where(("folds",)), remedy="leave it out")


def check_comparable(spec: TuneSpec, trials: list[TrainSpec], where: Callable[[KeyPath], str]) -> None:
    """Raises SpecError where a trial does not measure the metric, where nobody knows what is better of it, and where what the trials differ
    in scales it."""
    from distlm.train.objectives import objective_of

    if "${" in spec.metric:
        return
    for train in trials:
        known = objective_of(train).METRICS
        if spec.metric not in known:
            near = nearest(spec.metric, known)
            raise SpecError(f"a run with objective: {train.objective} does not measure {spec.metric!r}", where=where(("metric",)),
                            remedy=f"did you mean {near}?" if near else f"it measures {', '.join(known)}")
        metric = known[spec.metric]
        if not metric.mode and spec.mode is None:
            raise SpecError("this key is missing", where=where(("mode",)),
                            remedy=f"set min or max: whether less or more of {spec.metric} is better depends on what is wanted")
        if metric.mode and spec.mode not in (None, metric.mode):
            raise SpecError(f"{spec.mode}: of {spec.metric} {'less' if metric.mode == 'min' else 'more'} is better", where=where(("mode",)),
                            remedy="leave it out")
        for key in metric.scaled_by:
            if len({repr(functools.reduce(getattr, key.split("."), one)) for one in trials}) > 1:
                instead = next(name for name, other in known.items() if other.mode and key not in other.scaled_by)
                raise SpecError(f"{spec.metric} depends on {key}, in which the trials differ: they cannot be compared by it",
                                where=where(("metric",)), remedy=f"set metric: {instead}")


def mode_of(spec: TuneSpec) -> str:
    """Whether the least ("min") or the largest ("max") value of the metric is the best."""
    from distlm.train.objectives import objective_of

    return spec.mode or objective_of(base_spec(spec)).METRICS[spec.metric].mode


def check_metric(spec: TuneSpec, trials: list[TrainSpec], storage: Storage) -> None:
    """Raises InputError where trials would be judged by what their corpus cannot give."""
    from distlm.train.objectives import objective_of
    from distlm.train.recipe import read_corpora, without_val

    seen: list[Any] = []
    for trial in trials if objective_of(trials[0]).METRICS[spec.metric].evaluated else ():
        if trial.corpus in seen:
            continue
        seen.append(trial.corpus)
        manifests = read_corpora(trial, storage)
        if not any(one.splits["val"].windows for one in manifests):
            why, remedy = without_val(manifests)
            raise InputError(f"no trial would have a {spec.metric}: {why}", where="metric", remedy=f"set metric: loss, or {remedy}")
        if spec.metric == "val_ece" and any(one.multiple_labels for one in manifests):
            raise InputError("no trial would have a val_ece: documents have any number of labels", where="metric",
                             remedy="set metric: val_loss")


def check_key(key: str, where: str) -> None:
    """Raises SpecError, with the nearest name, where `key` is none of a training spec."""
    if key in OWN:
        raise SpecError(f"{key} is set by the sweep", where=where)
    known = list(keys(TrainSpec))
    model: Any = TrainSpec
    for part in key.split("."):
        fields = {f.alias or n: f for n, f in model.model_fields.items()} if model is not None else {}
        if part not in fields:
            near = nearest(key, known) or nearest(key.split(".")[-1], [k.split(".")[-1] for k in known])
            near = next((k for k in known if k == near or k.endswith(f".{near}")), "") if near else ""
            raise SpecError("a training spec has no such key", where=where, remedy=f"did you mean {near}?" if near else
                            f"there are {', '.join(known)}")
        annotation = fields[part].annotation
        if _free(annotation):
            return
        model = next((a for a in (annotation, *get_args(annotation)) if isinstance(a, type) and issubclass(a, BaseModel)), None)


def keys(model: Any, prefix: str = "") -> Any:
    """The dotted keys of a model's values, as they are written in YAML."""
    for name, field in model.model_fields.items():
        key = prefix + (field.alias or name)
        part = next((a for a in (field.annotation, *get_args(field.annotation)) if isinstance(a, type) and issubclass(a, BaseModel)), None)
        if part and get_origin(field.annotation) is not list:
            yield from keys(part, f"{key}.")
        elif key not in OWN:
            yield key


def _free(annotation: Any) -> bool:
    """Whether a field takes a mapping with any keys."""
    return any(getattr(a, "__origin__", None) is dict for a in (annotation, *get_args(annotation)))


def samples(spec: TuneSpec) -> list[dict[str, Any]]:
    """The values of every trial, a pure function of space, trials, folds and seed; more trials leave the first ones as they are. The folds
    of a point follow each other."""
    grids = {key: dimension.grid for key, dimension in spec.space.items() if dimension.grid is not None}
    pure, repeats = len(grids) == len(spec.space), spec.repeats
    rng = random.Random(spec.seed)
    base_seed = base_data(spec).get("seed", 0)
    found = []
    for repeat in range(repeats):
        for point in itertools.product(*grids.values()):
            fixed = dict(zip(grids, point, strict=True))
            values = {key: fixed[key] if key in fixed else draw(dimension, rng) for key, dimension in spec.space.items()}
            if pure and repeats > 1 and "seed" not in values and isinstance(base_seed, int):
                values["seed"] = base_seed + repeat
            found += [values] if spec.folds is None else [{**values, "fold": {"index": i, "of": spec.folds}} for i in range(spec.folds)]
    return found


def draw(dimension: Dimension, rng: random.Random) -> Any:
    """One value, six digits of it, inside the bounds."""
    if dimension.choice is not None:
        return rng.choice(dimension.choice)
    if dimension.uniform:
        low, high = dimension.uniform
        value = rng.uniform(low, high)
    else:
        assert dimension.loguniform
        low, high = dimension.loguniform
        value = math.exp(rng.uniform(math.log(low), math.log(high)))
    return min(max(float(f"{value:.6g}"), low), high)


def extremes(spec: TuneSpec, values: dict[str, Any]) -> list[dict[str, Any]]:
    """`values` with every key in turn at each of its ends, or each of its choices."""
    found = []
    for key, d in spec.space.items():
        found += [{**values, key: value} for value in [*(d.uniform or ()), *(d.loguniform or ()), *(d.choice or ()), *(d.grid or ())]]
    return found


def base_data(spec: TuneSpec) -> dict[str, Any]:
    assert isinstance(spec.train, dict), "space.inline puts the file in its place first"
    return {"kind": "train", "name": spec.name, **{k: v for k, v in spec.train.items() if k not in OWN}}


def with_values(base: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    data = copy.deepcopy(base)
    for key, value in values.items():
        put(data, key, copy.deepcopy(value))
    return data


def base_spec(spec: TuneSpec) -> TrainSpec:
    """The training spec of the first trial: what all trials read is named in it."""
    return trial_spec(spec, samples(spec)[0], spec.name)


def trial_spec(spec: TuneSpec, values: dict[str, Any], name: str) -> TrainSpec:
    """The training spec of one trial. Raises SpecError."""
    return validate({**with_values(base_data(spec), values), "name": name}, f"trial {name}")


def trial_name(index: int, values: dict[str, Any]) -> str:
    """`003-lr-0.00131-weight_decay-0.1`, `003-lr-0.00131-fold-3`: sorts in order, names a folder."""
    text = "".join(f"-{key.split('.')[-1]}-{value}" for key, value in values.items() if key != "fold")
    fold = f"-fold-{values['fold']['index']}" if "fold" in values else ""
    return f"{index:03d}" + re.sub(r"[^A-Za-z0-9._-]+", "_", text)[:60].rstrip("._-") + fold


