"""The base of all specs: frozen, strict, documented by the strings under their fields."""

from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from distlm.storage import NO_OBJECT_STORES

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]
Seed = Annotated[int, Field(ge=0, lt=2**32)]               # what numpy and torch both take


Overriding = object()
"""Marks a section whose keys are those of another one, which it overrides: documentation does not name them again."""


class Part(BaseModel):
    """A section of a spec. Unknown keys are errors, no type is taken for another, and nothing changes after validation."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, use_attribute_docstrings=True, populate_by_name=True,
                              protected_namespaces=(), allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _as_yaml(cls, value: Any, info: ValidationInfo) -> Any:
        """Where YAML and strict types part: a list is a tuple, 1e9 is a whole number as in JSON Schema, and true is no 1."""
        forms = _forms(cls.model_fields[info.field_name or ""].annotation)
        kinds = [get_origin(form) or form for form in forms]
        if isinstance(value, list) and tuple in kinds:
            return tuple(value)
        if isinstance(value, float) and value.is_integer() and int in kinds and float not in kinds:
            return int(value)
        if isinstance(value, bool) and Literal in kinds and bool not in kinds:
            choices = [choice for form in forms if get_origin(form) is Literal for choice in get_args(form)]
            raise Rule("", f"{str(value).lower()} is not one of {', '.join(map(str, choices))}")
        return value


def _forms(annotation: Any) -> list[Any]:
    """The alternatives of an annotation."""
    if get_origin(annotation) is Annotated:
        return _forms(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [form for one in get_args(annotation) for form in _forms(one)]
    return [annotation]


def _root(value: str | None) -> str | None:
    if value and "://" in value:
        raise Rule("", f"{value}: {'; '.join(NO_OBJECT_STORES)}")
    return value


class Job(Part):
    """What every kind of job has."""

    name: Name
    """The job's name: that of its folder under the storage root."""
    storage: Annotated[str | None, AfterValidator(_root)] = None
    """The storage root, a path that every node sees. Default: $DISTLM_STORAGE, else ~/distlm."""


class Rule(ValueError):
    """A rule between several keys is broken: `key` is the dotted path of the one to change."""

    def __init__(self, key: str, message: str) -> None:
        super().__init__(message)
        self.key = key


def exactly_one(part: Part, *keys: str) -> Any:
    """Return the value of the one key of `keys` that is set. Raises Rule where none or several are."""
    names = {key: type(part).model_fields[key].alias or key for key in keys}
    given = [key for key in keys if getattr(part, key) is not None]
    if len(given) != 1:
        found = " and ".join(names[key] for key in given) or "none"
        raise Rule("", f"exactly one of {', '.join(names.values())} must be given, not {found}")
    return getattr(part, given[0])


def without_effect(part: Part, why: str, *keys: str) -> None:
    """Raises Rule where one of `keys` has another value than its default, though it has no effect. The default itself may be given:
    a resolved spec names it."""
    for key in keys:
        field = type(part).model_fields[key]
        if getattr(part, key) != field.default:
            raise Rule(key, f"{getattr(part, key)} has no effect {why}; leave it out")
