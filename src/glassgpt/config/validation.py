"""Strict dataclasses: each field is checked against its type and range on construction, and errors name the field.

Not pydantic: its import takes longer than all of `glassgpt --help`, and tyro would still need plain dataclasses.
"""

import dataclasses
import functools
import math
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, TypeVar

from glassgpt.utils.errors import UserError, did_you_mean

SECTIONS = ("model", "data", "optim", "sample", "probe")
_TYPE_NAMES: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    str: "a string",
    bool: "true or false",
    types.NoneType: "nothing",
}


# The type of each field. Cached: resolving the annotations takes most of the time of building a config.
types_of: Callable[[Any], dict[str, Any]] = functools.cache(typing.get_type_hints)


def _choices(annotation: Any) -> tuple[Any, ...]:
    """The members of a union, or the annotation alone."""
    return typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)


def _describe(annotation: Any) -> str:
    """A type in words: `a whole number or nothing`."""
    return " or ".join(_describe_one(choice) for choice in _choices(annotation))


def _describe_one(choice: Any) -> str:
    origin, arguments = typing.get_origin(choice), typing.get_args(choice)
    if origin is Literal:
        return " or ".join(map(repr, arguments))
    if origin is dict:
        return f"a table with {_describe(arguments[1])} for each key, {_describe(arguments[0])}"
    if origin is list:
        return f"a list, each item of it {_describe(arguments[0])}"
    return _TYPE_NAMES.get(choice, getattr(choice, "__name__", str(choice)))


def _fits(value: Any, annotation: Any) -> bool:
    return any(_fits_one(value, choice) for choice in _choices(annotation))


def _fits_one(value: Any, choice: Any) -> bool:
    origin, arguments = typing.get_origin(choice), typing.get_args(choice)
    if origin is Literal:
        return value in arguments
    if origin is dict:
        return type(value) is dict and all(
            _fits(key, arguments[0]) and _fits(item, arguments[1]) for key, item in value.items()
        )
    if origin is list:
        return type(value) is list and all(_fits(item, arguments[0]) for item in value)
    if choice is float and type(value) is int:
        return abs(value) <= sys.float_info.max
    # Not isinstance: True is an int, but n_layer = true is a mistake.
    return type(value) is choice and (choice is not float or math.isfinite(value))


class StrictConfig:
    """Base of config dataclasses: checks the types of all fields on construction, then calls `check`."""

    section = ""  # of the TOML file; without an annotation, so that it is not a field

    def __init_subclass__(cls) -> None:
        name = cls.__name__.removesuffix("Config").lower()
        cls.section = name if name in SECTIONS else cls.section

    def __post_init__(self) -> None:
        for name, annotation in types_of(type(self)).items():
            value = getattr(self, name)
            if not _fits(value, annotation):
                raise UserError(f"{self.name_of(name)} must be {_describe(annotation)}, got {value!r}")
            if type(value) is int and float in _choices(annotation) and int not in _choices(annotation):
                object.__setattr__(self, name, float(value))  # so that 1 and 1.0 compare and print alike
        self.check()

    def check(self) -> None:
        """Raise `UserError` for values that are out of range or contradict each other."""

    @classmethod
    def name_of(cls, field_name: str) -> str:
        """A field's name in errors, with its section: `model.n_layer`."""
        return f"{cls.section}.{field_name}" if cls.section else field_name

    def require(self, field_name: str, holds: bool, valid: str) -> None:
        """Raise `UserError` with the field, its value and the valid values unless `holds`."""
        if not holds:
            raise UserError(f"{self.name_of(field_name)} must be {valid}, got {getattr(self, field_name)!r}")


C = TypeVar("C", bound=StrictConfig)


def build(config_class: type[C], values: Mapping[str, Any], base: C | None = None) -> C:
    """A config from nested mappings; values that are left out come from `base`.

    Raises `UserError` for an unknown name, a wrong type, and a missing value without a default.
    """
    hints = types_of(config_class)
    arguments = {name: getattr(base, name) for name in hints} if base is not None else {}
    for name, value in values.items():
        if name not in hints:
            raise UserError(f"unknown setting {config_class.name_of(name)!r}{did_you_mean(name, hints)}")
        arguments[name] = _build_value(hints[name], value, getattr(base, name, None))
    for field in dataclasses.fields(typing.cast(Any, config_class)):
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and field.name not in arguments:
            raise UserError(f"{config_class.name_of(field.name)} is missing: it must be {_describe(hints[field.name])}")
    return config_class(**arguments)


def _build_value(annotation: Any, value: Any, base: Any) -> Any:
    """Turn mappings into configs, also inside lists; anything else is kept for the type check."""
    if isinstance(value, Mapping) and isinstance(annotation, type) and issubclass(annotation, StrictConfig):
        return build(annotation, value, base=base)
    if isinstance(value, list) and typing.get_origin(annotation) is list:
        return [_build_value(typing.get_args(annotation)[0], item, None) for item in value]
    return value


def nearest_divisors(number: int, wanted: int) -> str:
    """The three divisors of a number that are nearest to the wanted one."""
    divisors = [n for n in range(1, number + 1) if number % n == 0]
    return ", ".join(map(str, sorted(sorted(divisors, key=lambda n: abs(n - wanted))[:3])))


def nearest_multiples(number: int, quantum: int) -> str:
    """The positive multiples of a quantum around a number."""
    lower = number // quantum * quantum
    return " or ".join(str(n) for n in (lower, lower + quantum) if n)


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of a config by their dotted names; a mixture counts as one value."""
    for name, value in values.items():
        if isinstance(value, dict) and name != "mixture":
            yield from flatten(value, f"{name}.")
        else:
            yield prefix + name, value


def without_none(values: dict[str, Any]) -> dict[str, Any]:
    return {k: without_none(v) if isinstance(v, dict) else v for k, v in values.items() if v is not None and v != {}}


def halvings(end: int, quantum: int) -> list[int]:
    """A number halved once, twice and so on, while the result is a multiple of the quantum."""
    halves = []
    while end % (2 * quantum) == 0:
        end //= 2
        halves.append(end)
    return halves


def doubled(start: int | None, end: int, progress: float) -> int:
    """A number that doubles from `start` to `end` at even distances while `progress` goes from 0 to 1."""
    if start is None or progress >= 1:
        return end
    doublings = (end // start).bit_length() - 1
    return start << int(progress * doublings)
