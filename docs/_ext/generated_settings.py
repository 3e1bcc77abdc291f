"""The settings of a run: type, default, limits and help of each, from the config dataclasses."""

import dataclasses
import types
import typing
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

from markup import escaped, fence

from glassgpt.cli.options import help_texts
from glassgpt.config.schema import ExecutionConfig, NumericsConfig, TrainConfig
from glassgpt.config.validation import Range

TYPES = {int: "integer", float: "number", str: "text", bool: "`true` or `false`", types.NoneType: "none"}
GROUPS: dict[str, type] = {"Settings that determine the numbers": NumericsConfig, "Execution settings": ExecutionConfig}


class Setting(NamedTuple):
    """One setting, by its name in TOML."""

    name: str
    type: str
    default: str
    valid: str  # the values that are valid, or "" for all of the type
    text: str
    values: list[str]  # of a choice, the default first


def _type_name(annotation: Any) -> str:
    """A type as a reader of TOML knows it."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is types.UnionType:
        return " or ".join(map(_type_name, arguments))
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin is list:
        return f"list of {_type_name(arguments[0])}"
    if origin is dict:
        return f"table of {_type_name(arguments[0])} to {_type_name(arguments[1])}"
    return TYPES[annotation]


def _default(field: "dataclasses.Field[Any]") -> str:
    value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    if value is None:
        return "none"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`" if value not in ([], {}) else "empty"


def settings_of(config: type, prefix: str = "") -> Iterator[Setting]:
    """Yield the settings of a config dataclass in the order of its fields, without its sections."""
    hints, plain = typing.get_type_hints(config, include_extras=True), typing.get_type_hints(config)
    texts = help_texts(config)
    for field in dataclasses.fields(config):
        kind = plain[field.name]
        if dataclasses.is_dataclass(kind):
            continue
        ranges = [mark for mark in getattr(hints[field.name], "__metadata__", ()) if isinstance(mark, Range)]
        values = [str(value) for value in typing.get_args(kind)] if typing.get_origin(kind) is Literal else []
        values.sort(key=lambda value: value != field.default)
        valid = "; ".join(mark.description for mark in ranges)
        yield Setting(prefix + field.name, _type_name(kind), _default(field), valid, texts[field.name], values)


def sections_of(config: type) -> dict[str, type]:
    """The sections of a config by name: `model`, `data` and others."""
    kinds = typing.get_type_hints(config)
    return {f.name: kinds[f.name] for f in dataclasses.fields(config) if dataclasses.is_dataclass(kinds[f.name])}


def all_settings(config: type = TrainConfig) -> dict[str, Setting]:
    """The settings of a config and of its sections by name."""
    rows = list(settings_of(config))
    for name, section in sections_of(config).items():
        rows += settings_of(section, f"{name}.")
    return {row.name: row for row in rows}


def settings() -> str:
    """Return the Markdown of all settings: a section for those fixed once a run has started, one for the others."""
    lines = []
    for title, config in GROUPS.items():
        lines += [f"## {title}", "", escaped(_about(config)), ""]
        lines += map(_entry, settings_of(config))
        for name, section in sections_of(config).items():
            lines += [f"### `[{name}]`", "", escaped(_about(section)), ""]
            lines += map(_entry, settings_of(section, f"{name}."))
    return "\n".join(lines)


def _about(config: type) -> str:
    return " ".join((config.__doc__ or "").split("\n\n")[0].split())


def _entry(setting: Setting) -> str:
    limits = f", {escaped(setting.valid)}" if setting.valid else ""
    facts = f"{{.facts}}\n{setting.type}{limits}. Default: {setting.default}."
    return fence("{confval}", setting.name, f"{escaped(setting.text)}\n\n{facts}")


def slots() -> str:
    """Return the Markdown of a table: the settings of a model that choose between values."""
    rows = [row for row in all_settings().values() if row.name.startswith("model.") and row.values]
    lines = ["| setting | values, the default first |", "| --- | --- |"]
    lines += [f"| {{confval}}`{row.name}` | {', '.join(f'`{value}`' for value in row.values)} |" for row in rows]
    return "\n".join(lines) + "\n"
