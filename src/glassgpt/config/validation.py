"""Strict dataclasses: every field is checked against its type when a config is made, and errors name the field."""

import dataclasses
import functools
import math
import sys
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from glassgpt.utils.errors import UserError, did_you_mean


@functools.cache  # looked up anew, they would be most of the time that a config takes to build
def types_of(config_class: type) -> dict[str, Any]:
    """The type of each field."""
    return typing.get_type_hints(config_class)


def _choices(annotation: Any) -> tuple[Any, ...]:
    """The members of a union, or the annotation itself."""
    return typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)


def _describe(annotation: Any) -> str:
    names = {
        int: "a whole number",
        float: "a number",
        str: "a string",
        bool: "true or false",
        types.NoneType: "nothing",
    }
    parts: list[str] = []
    for choice in _choices(annotation):
        if typing.get_origin(choice) is Literal:
            parts.extend(repr(value) for value in typing.get_args(choice))
        elif typing.get_origin(choice) is dict:
            key, item = (_describe(part) for part in typing.get_args(choice))
            parts.append(f"a table with {item} for each key, {key}")
        elif typing.get_origin(choice) is list:
            parts.append(f"a list, each item of it {_describe(typing.get_args(choice)[0])}")
        else:
            parts.append(names.get(choice, getattr(choice, "__name__", str(choice))))
    return " or ".join(parts)


def _fits(value: Any, annotation: Any) -> bool:
    for choice in _choices(annotation):
        if typing.get_origin(choice) is Literal:
            if value in typing.get_args(choice):
                return True
        elif typing.get_origin(choice) is dict:
            key_type, value_type = typing.get_args(choice)
            if type(value) is dict and all(_fits(k, key_type) and _fits(v, value_type) for k, v in value.items()):
                return True
        elif typing.get_origin(choice) is list:
            if type(value) is list and all(_fits(item, typing.get_args(choice)[0]) for item in value):
                return True
        elif choice is float:
            if type(value) is float and math.isfinite(value):
                return True
            if type(value) is int and abs(value) <= sys.float_info.max:
                return True
        elif type(value) is choice:  # not isinstance: True is an int, but n_layer = true is a mistake
            return True
    return False


class StrictConfig:
    """Type-checks the fields of a config dataclass at construction, then calls `check` for their values."""

    def __post_init__(self) -> None:
        for name, annotation in types_of(type(self)).items():  # type: ignore[arg-type]
            value = getattr(self, name)
            if not _fits(value, annotation):
                raise UserError(f"{self.name_of(name)} must be {_describe(annotation)}, got {value!r}")
            if type(value) is int and float in _choices(annotation) and int not in _choices(annotation):
                object.__setattr__(self, name, float(value))  # so that 1 and 1.0 are written and compared alike
        self.check()

    def check(self) -> None:
        """Raise `UserError` for values that are impossible alone or together."""

    @classmethod
    def name_of(cls, field_name: str) -> str:
        """A field's name as an error gives it: `model.n_layer`."""
        section = cls.__name__.removesuffix("Config").lower()
        return field_name if section == "train" else f"{section}.{field_name}"

    def require(self, field_name: str, holds: bool, valid: str) -> None:
        """Raise `UserError` naming the field, its value and the valid values unless `holds`."""
        if not holds:
            raise UserError(f"{self.name_of(field_name)} must be {valid}, got {getattr(self, field_name)!r}")


C = TypeVar("C", bound=StrictConfig)


def build(config_class: type[C], values: Mapping[str, Any], base: C | None = None) -> C:
    """A config from nested mappings, what they leave out from `base`.

    Raises `UserError` for an unknown name, a bad value, and one left out that has no default.
    """
    hints = types_of(config_class)  # type: ignore[arg-type]
    arguments = {name: getattr(base, name) for name in hints} if base is not None else {}
    for name, value in values.items():
        if name not in hints:
            raise UserError(f"unknown setting {config_class.name_of(name)!r}{did_you_mean(name, hints)}")
        if isinstance(value, Mapping) and dataclasses.is_dataclass(hints[name]):
            value = build(hints[name], value, base=getattr(base, name, None))
        elif isinstance(value, list) and (item := _checked_item(hints[name])) is not None:
            value = [build(item, each) if isinstance(each, Mapping) else each for each in value]
        arguments[name] = value
    for field in dataclasses.fields(config_class):  # type: ignore[arg-type]
        if (
            field.name not in arguments
            and field.default is dataclasses.MISSING
            and field.default_factory is dataclasses.MISSING
        ):
            raise UserError(f"{config_class.name_of(field.name)} is missing: it must be {_describe(hints[field.name])}")
    return config_class(**arguments)


def _checked_item(annotation: Any) -> type[StrictConfig] | None:
    """What a list's items are where these are built of mappings, too."""
    item = typing.get_args(annotation)[0] if typing.get_origin(annotation) is list else None
    return item if isinstance(item, type) and issubclass(item, StrictConfig) else None
