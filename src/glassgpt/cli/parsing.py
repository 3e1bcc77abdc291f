"""Command lines into dataclasses by tyro, with errors of one or two lines and defaults that show what they are."""

import dataclasses
import typing
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import tyro

# Private in tyro 1.0, and the only place that has parse errors as objects rather than as a printed box.
from tyro import _errors as parse_errors
from tyro.constructors import (
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    PrimitiveTypeInfo,
    UnsupportedTypeAnnotationError,
)

from glassgpt.utils.errors import UserError, did_you_mean

Options = TypeVar("Options")


def parse_options(
    options: type[Options],
    program: str,
    description: str,
    arguments: Sequence[str],
    *,
    default: Options | None = None,
    hint: str = "",
) -> Options:
    """Read a command's options; `--help` ends in `SystemExit(0)`, a mistake in a `UserError`.

    `hint`: what to do about an unexpected argument.
    """

    def refuse(event: parse_errors.ParseErrorEvent) -> None:
        raise UserError(f"{_message(event, options, hint)} ({program} --help)")

    with parse_errors.on_parse_error(refuse):
        return tyro.cli(
            options,
            prog=program,
            description=description,
            args=arguments,
            default=tyro.MISSING_NONPROP if default is None else default,
            registry=_registry(),
        )


def _message(event: parse_errors.ParseErrorEvent, options: type, hint: str) -> str:
    """What is wrong with the arguments."""
    unexpected = getattr(event, "tokens", None) or getattr(event, "unrecognized_tokens", None)
    if unexpected:
        first = unexpected[0]
        if first.startswith("-"):
            nearest = did_you_mean(first.partition("=")[0], option_names(options))
            return f"unknown option {first!r}{nearest or (f'; {hint}' if hint else '')}"
        return f"unexpected argument {first!r}{f'; {hint}' if hint else ''}"
    if isinstance(event, parse_errors.MissingArgs):
        missing = event.missing_arguments[0].arg
        name = missing.lowered.metavar if missing.is_positional() else missing.display_name()
        text = missing.field.helptext
        return f"{name} is missing: {text() if callable(text) else text}"
    argument = getattr(event, "argument", None)
    name = f"{argument.display_name()}: " if argument is not None else ""
    if isinstance(event, parse_errors.InvalidChoice):
        nearest = did_you_mean(event.value, event.choices)
        return f"{name}must be one of {', '.join(map(repr, event.choices))}, got {event.value!r}{nearest}"
    if isinstance(event, parse_errors.BadValue):
        return f"{name}a value is missing" if event.offending_value is None else f"{name}takes no value"
    return f"{name}{getattr(event, 'message', 'these arguments do not fit together')}"


def option_names(options: type, prefix: str = "--") -> Iterator[str]:
    """The names of all options; the settings of a field `config` have no prefix."""
    for name, kind in typing.get_type_hints(options).items():
        if dataclasses.is_dataclass(kind) and isinstance(kind, type):
            yield from option_names(kind, prefix if name == "config" else f"{prefix}{name}.")
        else:
            yield prefix + name.replace("_", "-")


def _registry() -> ConstructorRegistry:
    """How values are read and shown: numbers with a readable error, `none`, and defaults with visible line breaks."""
    registry = ConstructorRegistry()
    for rule in (_plain_value, _optional_value, _weights, _texts):
        registry.primitive_rule(rule)
    return registry


def _plain_value(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    kind = info.type
    names = {int: ("a whole number", "N"), float: ("a number", "X"), str: ("text", "TEXT")}
    if kind not in names:
        return None
    name, metavar = names[kind]

    def read(texts: list[str]) -> Any:
        try:
            return kind(texts[0])
        except ValueError:
            raise ValueError(f"must be {name}, got {texts[0]!r}") from None

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=read,
        is_instance=lambda value: type(value) is kind,
        str_from_instance=lambda value: [_shown(str(value))],
    )


def _shown(text: str) -> str:
    return text if text.isprintable() else repr(text)[1:-1]


def _optional_value(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    members = typing.get_args(info.type)
    if len(members) != 2 or type(None) not in members:
        return None
    member = next(m for m in members if m is not type(None))
    inner = ConstructorRegistry.get_primitive_spec(PrimitiveTypeInfo.make(member, set(info.markers)))
    if isinstance(inner, UnsupportedTypeAnnotationError):
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=f"{inner.metavar}|none",
        instance_from_str=lambda texts: None if texts[0].lower() == "none" else inner.instance_from_str(texts),
        is_instance=lambda value: value is None or bool(inner.is_instance(value)),
        str_from_instance=lambda value: ["none"] if value is None else inner.str_from_instance(value),
    )


def _weights(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """Names with weights, as `a.txt=0.7 b.txt=0.3`."""
    if info.type != dict[str, float]:
        return None

    def read(texts: list[str]) -> dict[str, float]:
        weights = {}
        for text in [] if texts == ["none"] else texts:
            name, _, weight = text.rpartition("=")
            try:
                weights[name or text] = float(weight if name else "")
            except ValueError:
                raise ValueError(f"must be SOURCE=WEIGHT, such as my.txt=0.3, got {text!r}") from None
        return weights

    return PrimitiveConstructorSpec(
        nargs="*",
        metavar="SRC=WEIGHT",
        instance_from_str=read,
        is_instance=lambda value: isinstance(value, dict),
        str_from_instance=lambda value: [f"{name}={weight}" for name, weight in value.items()] or ["none"],
    )


def _texts(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """Several texts, as "one" "another"; `none` alone is an empty list."""
    if info.type != list[str]:
        return None
    return PrimitiveConstructorSpec(
        nargs="*",
        metavar="TEXT ...",
        instance_from_str=lambda texts: [] if texts == ["none"] else texts,
        is_instance=lambda value: isinstance(value, list),
        str_from_instance=lambda value: [_shown(text) for text in value] or ["none"],
    )
