"""Command lines into dataclasses by tyro, with errors of one or two lines and defaults that show what they are."""

import contextlib
import io
import re
import typing
from collections.abc import Sequence
from typing import Any, TypeVar

import tyro
from tyro.constructors import (
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    PrimitiveTypeInfo,
    UnsupportedTypeAnnotationError,
)

from glassgpt.utils.errors import UserError

Options = TypeVar("Options")


def parse_options(
    options: type[Options],
    program: str,
    description: str,
    arguments: Sequence[str],
    *,
    default: Options | None = None,
    bare: str = "",
    unknown: str = "",
) -> Options:
    """Read a command's options; `--help` ends in `SystemExit(0)`, a mistake in a `UserError`.

    `bare` and `unknown` say how to go on after a word, or an option, that has no place."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(
                options,
                prog=program,
                description=description,
                args=arguments,
                default=tyro.MISSING_NONPROP if default is None else default,
                registry=_registry(),
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UserError(_plain_error(said.getvalue(), bare, unknown) + f" ({program} --help)") from None


def _plain_error(box: str, bare: str, unknown: str) -> str:
    """tyro's framed message in a line or two: its first paragraph, the nearest option where it names one, and what helps."""
    lines = [line.strip(" │|") for line in re.sub(r"\x1b\[[0-9;]*m", "", box).splitlines()[1:-1]]
    rule = next((i for i, line in enumerate(lines) if line and not line.strip("─-")), len(lines))
    message = re.sub(r"^Error parsing (\S+:)", r"\1", " ".join(lines[:rule]))
    if not message:  # not the frame that this expects: better too much than nothing
        return box.strip()
    if not message.startswith("Unrecognized options: "):
        message = re.sub(r"^Missing from [^:]*: (\S+) (.*) \(required\)$", r"\1 is missing: \2", message)
        return re.sub(r"^config\.\w+: ", "", message)  # the place of a config says less than its own message
    words = message.removeprefix("Unrecognized options: ")
    nearest = re.search(r":\s+(--[\w.-]+)", " ".join(lines[rule:]))
    if not words.startswith("-"):
        return f"{words!r} has no place here{'; ' if bare else ''}{bare}"
    word = words.split(",")[0]
    return f"there is no option {word!r}{f'; did you mean {nearest[1]!r}?' if nearest else ''}{'; ' if unknown else ''}{unknown}"


def _registry() -> ConstructorRegistry:
    """How values are read and shown: numbers with an error one can read, `none`, and defaults with their line breaks visible."""
    registry = ConstructorRegistry()
    registry.primitive_rule(_plain_value)
    registry.primitive_rule(_optional_value)
    registry.primitive_rule(_weights)
    registry.primitive_rule(_texts)
    return registry


def _plain_value(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    kind = info.type
    names = {int: "a whole number", float: "a number", str: "text"}
    if kind not in names:
        return None

    def read(texts: list[str]) -> Any:
        try:
            return kind(texts[0])
        except ValueError:
            raise ValueError(f"must be {names[kind]}, got {texts[0]!r}") from None

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar={int: "N", float: "X", str: "TEXT"}[kind],
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
    """Several texts, as "one" "another"; `none` alone is no text."""
    if info.type != list[str]:
        return None
    return PrimitiveConstructorSpec(
        nargs="*",
        metavar="TEXT ...",
        instance_from_str=lambda texts: [] if texts == ["none"] else texts,
        is_instance=lambda value: isinstance(value, list),
        str_from_instance=lambda value: [_shown(text) for text in value] or ["none"],
    )
