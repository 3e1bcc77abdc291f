"""Strict dataclasses: each field is checked against its type and range on construction, and errors name the field.

Not pydantic: its import takes longer than all of `glassgpt --help`, and tyro would still need plain dataclasses.
"""

import contextlib
import dataclasses
import functools
import inspect
import json
import math
import sys
import types
import typing
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Annotated, Any, Literal, Self, TypeVar

from glassgpt.utils.errors import UserError, did_you_mean, shown

SECTIONS = ("model", "data", "optim", "sample", "probe")
_TYPE_NAMES: dict[Any, str] = {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}
_TYPE_NAMES[types.NoneType] = "nothing"


# The type of each field. Cached: resolving the annotations takes most of the time of building a config.
types_of: Callable[[Any], dict[str, Any]] = functools.cache(typing.get_type_hints)


@dataclasses.dataclass(frozen=True)
class Range:
    """The valid values of a field: their description in errors, and the test."""

    description: str
    contains: Callable[[Any], bool]


def between(lowest: float, highest: float) -> Range:
    """Both limits are valid."""
    return Range(f"at least {lowest:,} and at most {highest:,}", lambda value: lowest <= value <= highest)


def above(lowest: float, highest: float) -> Range:
    """The lower limit is not valid itself."""
    return Range(f"above {lowest:,} and at most {highest:,}", lambda value: lowest < value <= highest)


# Annotations of fields: `Size[int]`, or `Size[int | None]`, which allows None as well. Every number has an upper limit,
# far above any real use, so that what is computed from it stays quick and within the range of 64-bit integers.
T = TypeVar("T")
Count = Annotated[T, between(0, 10**12)]  # steps or tokens; 0 disables something
PositiveCount = Annotated[T, between(1, 10**12)]
Size = Annotated[T, between(1, 2**20)]  # widths, and what is in memory together
Length = Annotated[T, between(1, 2**27)]  # tokens of a context or an update, ids of a vocabulary
Seed = Annotated[T, between(0, 2**63 - 1)]
NotNegative = Annotated[T, between(0, 10**15)]
Positive = Annotated[T, above(0, 10**15)]
Name = Annotated[T, Range("without NUL characters", lambda value: "\0" not in value)]  # of a file, among others
BelowOne = Annotated[T, Range("at least 0 and below 1", lambda value: 0 <= value < 1)]
Share = Annotated[T, Range("above 0 and at most 1", lambda value: 0 < value <= 1)]


@functools.cache
def _ranges_of(cls: Any) -> dict[str, Range]:
    hints = typing.get_type_hints(cls, include_extras=True)
    marks = ((name, mark) for name, hint in hints.items() for mark in getattr(hint, "__metadata__", ()))
    return {name: mark for name, mark in marks if isinstance(mark, Range)}


def check_ranges(options: Any, name_of: Callable[[str], str] = str) -> None:
    """Raise `UserError` for the first field of a dataclass whose value is outside its `Range`."""
    for name, valid in _ranges_of(options.__class__).items():
        value = getattr(options, name)
        if value is not None and not valid.contains(value):
            raise UserError(f"{name_of(name)} must be {valid.description}, got {shown(value)}")


def _describe(annotation: Any) -> str:
    """A type in words: `a whole number or nothing`."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is types.UnionType:
        return " or ".join(map(_describe, arguments))
    if origin is Literal:
        return " or ".join(map(repr, arguments))
    if origin is dict:
        return f"a table with {_describe(arguments[1])} for each key, {_describe(arguments[0])}"
    if origin is list:
        return f"a list, each item of it {_describe(arguments[0])}"
    return _TYPE_NAMES.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _section(name: str, annotation: Any, value: Any) -> str:
    """A section in words, if the type is one. Its first own setting that accepts the value is likely the meant one."""
    if not (isinstance(annotation, type) and issubclass(annotation, StrictConfig)):
        return ""

    def accepts(setting: str) -> bool:
        with contextlib.suppress(UserError, TypeError):
            return value is not None and bool(annotation(**{setting: value}))
        return False

    meant = next(filter(accepts, inspect.get_annotations(annotation)), None)
    return f"a section: [{name}] " + (f"with {meant} = {json.dumps(value)}" if meant else "with its settings below")


def _fits(value: Any, annotation: Any) -> bool:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is types.UnionType:
        return any(_fits(value, choice) for choice in arguments)
    if origin is Literal:
        return value in arguments
    if origin is dict:
        return type(value) is dict and all(_fits(k, arguments[0]) and _fits(v, arguments[1]) for k, v in value.items())
    if origin is list:
        return type(value) is list and all(_fits(item, arguments[0]) for item in value)
    if annotation is float and type(value) is int:
        return abs(value) <= sys.float_info.max
    # Not isinstance: True is an int, but n_layer = true is a mistake.
    return type(value) is annotation and (annotation is not float or math.isfinite(value))


class StrictConfig:
    """Base of config dataclasses: checks types and ranges of all fields on construction, then calls `check`."""

    def __post_init__(self) -> None:
        kind: Any = type(self)
        for name, annotation in types_of(kind).items():
            value = getattr(self, name)
            if not _fits(value, annotation):
                valid = _section(name, annotation, value) or _describe(annotation)
                raise UserError(f"{self.name_of(name)} must be {valid}, got {shown(value)}")
            if type(value) is int and float in (annotation, *typing.get_args(annotation)):
                object.__setattr__(self, name, float(value))  # so that 1 and 1.0 compare and print alike
        check_ranges(self, self.name_of)
        self.check()

    def check(self) -> None:
        """Raise `UserError` for values that are out of range or contradict each other."""

    @classmethod
    def name_of(cls, field_name: str) -> str:
        """A field's name in errors, with its section: `model.n_layer`."""
        section = cls.__name__.removesuffix("Config").lower()
        return f"{section}.{field_name}" if section in SECTIONS else field_name

    def require(self, field_name: str, holds: bool, valid: str, hint: str = "") -> None:
        """Raise `UserError` with the field, its value and the valid values unless `holds`."""
        if not holds:
            value = shown(getattr(self, field_name))
            raise UserError(f"{self.name_of(field_name)} must be {valid}, got {value}{hint}")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], base: Self | None = None) -> Self:
        """A config from nested mappings; values that are left out come from `base`.

        Raises `UserError` for an unknown name, a wrong type, an impossible value, and a missing one without a default.
        """
        hints = types_of(cls)
        arguments = {name: getattr(base, name) for name in hints} if base is not None else {}
        for name, value in values.items():
            if name not in hints:
                raise UserError(f"unknown setting {shown(cls.name_of(name))}{did_you_mean(name, hints)}")
            arguments[name] = _build_value(hints[name], value, getattr(base, name, None))
        for name, parameter in inspect.signature(cls).parameters.items():
            if parameter.default is parameter.empty and name not in arguments:
                raise UserError(f"{cls.name_of(name)} is missing: it must be {_describe(hints[name])}")
        return cls(**arguments)


def _build_value(annotation: Any, value: Any, base: Any) -> Any:
    """Turn mappings into configs, also inside lists; anything else is kept for the type check."""
    if isinstance(value, Mapping) and isinstance(annotation, type) and issubclass(annotation, StrictConfig):
        return annotation.from_dict(value, base)
    if isinstance(value, list) and typing.get_origin(annotation) is list:
        return [_build_value(typing.get_args(annotation)[0], item, None) for item in value]
    return value


def flatten(values: Mapping[str, Any], separator: str = ".", keep: Collection[str] = ()) -> Iterator[tuple[str, Any]]:
    """The leaves of nested mappings by their joined names; a mapping named in `keep` is a leaf."""
    for name, value in values.items():
        if isinstance(value, Mapping) and name not in keep:
            yield from ((f"{name}{separator}{inner}", leaf) for inner, leaf in flatten(value, separator, keep))
        else:
            yield name, value
