"""Helpers shared by several commands: options as dataclasses that tyro fills, and their errors in a line or two."""

import dataclasses
import functools
import importlib.metadata
import inspect
import json
import os
import re
import shutil
import sys
import textwrap
import typing
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self, TypeVar

import tyro

# Private in tyro 1.0: parse errors as objects rather than as a printed box, and the rule for dataclasses.
from tyro import _errors as parse_errors
from tyro.conf import FlagCreatePairsOff, Positional, Suppress, arg
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo, StructTypeInfo
from tyro.constructors._struct_spec_dataclass import dataclass_rule

from glassgpt.config.validation import check_ranges
from glassgpt.utils.errors import UserError, did_you_mean, shown

Options = TypeVar("Options")
say = functools.partial(print, flush=True)  # on standard output at once
REFERENCE_HELP = (
    "A run (runs/demo, runs/demo@best, runs/demo@500) or checkpoint; a Hugging Face directory, .safetensors file or "
    "hub id (gpt2); a .pt file of nanoGPT or build-nanogpt."
)
Reference = Annotated[Positional[str], arg(metavar="REF", help=REFERENCE_HELP)]
Flag = Annotated[bool, FlagCreatePairsOff]
File = Annotated[Path | None, arg(metavar="FILE")]


def default(text: str, metavar: str | None = None) -> Any:
    """Annotate an option whose default depends on something else: the help describes it with this text."""
    return arg(metavar=metavar, help_behavior_hint=f"(default: {text})")


@typing.dataclass_transform(kw_only_default=True, frozen_default=True)
class Command(ABC):
    """A command. A subclass becomes a frozen dataclass: a field is an option, its comment the option's help.

    The docstring of the class is the help of the command; its first line is also the command's row in the overview.
    """

    hidden: ClassVar[Collection[str]] = ()  # options that are valid, but have no effect: the help leaves them out

    def __init_subclass__(cls) -> None:
        dataclasses.dataclass(frozen=True, kw_only=True)(cls)

    @classmethod
    def parse(cls, name: str, arguments: Sequence[str]) -> Self:
        """The command with its options from the command line. Raises as `parse_options` does."""
        return parse_options(cls, name, arguments)

    @abstractmethod
    def run(self) -> int | None:
        """Run the command; return its exit code, None for 0. What it needs is imported here: help needs no torch."""


def parse_options(
    options: type[Options], name: str, arguments: Sequence[str], *, base: Options | None = None, hint: str = ""
) -> Options:
    """The options of `glassgpt NAME`. `--help` ends in `SystemExit(0)`, a mistake in a `UserError`.

    `base`: has the values of options that are not given. `hint`: what to do about an unexpected argument.
    """
    program, registry = f"glassgpt {name}", ConstructorRegistry()
    for rule in (_plain_value, _optional_value, _several_values):
        registry.primitive_rule(rule)
    hidden: Collection[str] = ()
    if {"-h", "--help"} & set(arguments):
        hidden = getattr(options, "hidden", ())
        print(_wrapped(inspect.getdoc(options) or ""), end="\n\n")  # tyro does not wrap lines
    registry.struct_rule(functools.partial(_documented, hidden))

    def refuse(event: parse_errors.ParseErrorEvent) -> None:
        error = getattr(sys.exception(), "__context__", None)
        if isinstance(error, UserError):  # of a config, raised by its own check
            raise error from None
        raise UserError(f"{_message(event, options, hint)} ({program} --help)")

    given = list(map(option_of, arguments))
    for option in ("--data.mixture", "--probe.prompts"):  # the last one would count
        if given.count(option) > 1:
            raise UserError(f"{option} is given twice; write all its values after one {option}")
    with parse_errors.on_parse_error(refuse):
        command = tyro.cli(
            options,
            prog=program,
            description="",
            args=arguments,
            default=tyro.MISSING_NONPROP if base is None else base,
            registry=registry,
        )
    check_ranges(command)
    return command


def _wrapped(text: str) -> str:
    """Paragraphs as wide as the terminal."""
    width = shutil.get_terminal_size().columns
    return "\n\n".join(textwrap.fill(paragraph, width, break_on_hyphens=False) for paragraph in text.split("\n\n"))


def _documented(hidden: Collection[str], info: StructTypeInfo) -> Any:
    """A dataclass whose comments are the help of its options. tyro finds comments too, but takes 0.1 s for train."""
    spec = dataclass_rule(info)
    if spec is None:
        return None
    texts = help_texts(info.type)
    fields = []
    for field in spec.fields:
        kind: Any = Annotated[field.type, Suppress] if field.name in hidden else field.type
        fields.append(dataclasses.replace(field, helptext=texts.get(field.name), type=kind))
    return dataclasses.replace(spec, fields=tuple(fields))


def help_texts(options: type) -> dict[str, str]:
    """Return the help of a dataclass's fields by name: the comment of an option, the docstring of a config."""
    texts = field_comments(options)
    for name, kind in typing.get_type_hints(options).items():
        if dataclasses.is_dataclass(kind):
            texts[name] = (kind.__doc__ or "").partition("\n")[0]
    return texts


def field_comments(cls: type) -> dict[str, str]:
    """Return the comments of a class's fields by name, also those of fields that it inherits."""
    texts = dict[str, str]()
    for kind in reversed(cls.__mro__):
        texts |= _field_comments(kind.__module__).get(kind.__name__, {})
    return texts


def _option_names(options: type, prefix: str = "--") -> Iterator[str]:
    """The names of all options. A config among a command's options has no prefix, its sections have one."""
    for name, kind in typing.get_type_hints(options).items():
        if dataclasses.is_dataclass(kind) and isinstance(kind, type):
            yield from _option_names(kind, prefix if issubclass(options, Command) else f"{prefix}{name}.")
        else:
            yield prefix + name.replace("_", "-")


@functools.cache
def _field_comments(module: str) -> dict[str, dict[str, str]]:
    """The comments of a module's dataclasses by class and field: at the end of the field's line, or above it."""
    try:
        source = inspect.getsource(sys.modules[module])
    except (OSError, TypeError):  # a zipped or frozen application without sources: its help texts are empty
        return {}
    comments, above = dict[str, dict[str, str]](), list[str]()
    for line in source.splitlines():
        if line[:1].strip():  # not indented
            fields = comments.setdefault(re.split(r"[(:]", line.removeprefix("class "))[0], {})
        elif line.startswith("    # "):
            above.append(line.removeprefix("    # "))
        else:
            field = re.match(r"    (\w+): .*?(?:  # (.*))?$", line)
            if field and (field[2] or above):
                fields[field[1]] = field[2] or " ".join(above)
            above = []
    return comments


def _message(event: parse_errors.ParseErrorEvent, options: type, hint: str) -> str:
    """Return the error message for wrong arguments."""
    unexpected = getattr(event, "tokens", None) or getattr(event, "unrecognized_tokens", None)
    if unexpected:
        first = unexpected[0]
        if first.startswith("-"):
            names = list(_option_names(options))
            if first in names:
                return f"{shown(first)} is an option, but after -- everything is a name; write it before --"
            nearest = did_you_mean(first.partition("=")[0], names)
            return f"unknown option {shown(first)}{nearest or (f'; {hint}' if hint else '')}"
        return f"unexpected argument {shown(first)}{f'; {hint}' if hint else ''}"
    if isinstance(event, parse_errors.MissingArgs):
        missing = event.missing_arguments[0].arg
        name = missing.lowered.metavar if missing.is_positional() else missing.display_name()
        text = missing.field.helptext
        return f"{name} is missing: {text() if callable(text) else text}"
    argument = getattr(event, "argument", None)
    name = f"{argument.display_name()}: " if argument is not None else ""
    if isinstance(event, parse_errors.InvalidChoice):
        nearest = did_you_mean(event.value, event.choices)
        return f"{name}must be one of {', '.join(map(repr, event.choices))}, got {shown(event.value)}{nearest}"
    if isinstance(event, parse_errors.BadValue):
        no_value = "a value is missing (one that begins with - is written as --prompt=-x, and a file's name as ./-x)"
        return f"{name}{no_value if event.offending_value is None else 'takes no value'}"
    return f"{name}{getattr(event, 'message', 'these arguments do not fit together')}"


def _plain_value(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """Numbers and paths with a readable error, and text whose default is shown with visible line breaks."""
    kind = info.type
    names = {int: ("a whole number", "N"), float: ("a number", "X"), str: ("text", "TEXT"), Path: ("a path", "PATH")}
    if kind not in names:
        return None
    name, metavar = names[kind]

    def read(texts: list[str]) -> Any:
        try:
            if kind is not Path or texts[0]:  # an empty path would be the current directory
                return kind(texts[0])
        except ValueError:
            pass
        raise ValueError(f"must be {name}, got {shown(texts[0])}")

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=read,
        is_instance=lambda value: isinstance(value, kind) if kind is Path else type(value) is kind,
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
    if not isinstance(inner, PrimitiveConstructorSpec):
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=f"{inner.metavar}|none",
        choices=None if inner.choices is None else (*inner.choices, "none"),
        instance_from_str=lambda texts: None if texts[0].lower() == "none" else inner.instance_from_str(texts),
        is_instance=lambda value: value is None or bool(inner.is_instance(value)),
        str_from_instance=lambda value: ["none"] if value is None else inner.str_from_instance(value),
    )


def _several_values(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """Texts as "one" "another", or names with weights as a.txt=0.7 b.txt=0.3; `none` alone is empty."""
    if info.type not in (list[str], dict[str, float]):
        return None
    weighted = info.type == dict[str, float]

    def read(texts: list[str]) -> list[str] | dict[str, float]:
        texts = [] if texts == ["none"] else texts
        if not weighted:
            return texts
        pairs = list(map(_weight, texts))
        if len(weights := dict(pairs)) < len(pairs):
            names = [name for name, _ in pairs]
            raise ValueError(f"{shown(max(names, key=names.count))} is given twice; give each source one weight")
        return weights

    def show(value: Any) -> list[str]:
        texts = [f"{name}={weight}" for name, weight in value.items()] if weighted else map(_shown, value)
        return list(texts) or ["none"]

    return PrimitiveConstructorSpec(
        nargs="*",
        metavar="SRC=WEIGHT" if weighted else "TEXT ...",
        instance_from_str=read,
        is_instance=lambda value: isinstance(value, list | dict),
        str_from_instance=show,
    )


def _weight(text: str) -> tuple[str, float]:
    name, _, weight = text.rpartition("=")
    try:
        return name or text, float(weight if name else "")
    except ValueError:
        raise ValueError(f"must be SOURCE=WEIGHT, such as my.txt=0.3, got {shown(text)}") from None


def option_of(argument: str) -> str:
    """The option that an argument names, with dashes and without a value: `--top_k=3` is `--top-k`."""
    return argument.partition("=")[0].replace("_", "-")


def gives(arguments: Sequence[str], option: str) -> bool:
    """Whether an option is given on the command line, with dashes or underscores."""
    return option in map(option_of, arguments)


def as_typed(error: UserError, arguments: Sequence[str]) -> str:
    """The text of an error. A setting at its beginning (`data.tokenizer`) becomes the option that was typed."""
    text = str(error)
    setting = text.partition(" ")[0]
    name = setting.replace("_", "-")
    short = "--data" if name == "data.source" else f"--{name.rpartition('.')[2]}"
    typed = next((option for option in (f"--{name}", short) if gives(arguments, option)), setting)
    text = text.replace(setting, typed, 1)
    for argument in arguments:
        if "\n" in argument:  # such as a file's name
            text = text.replace(str(UserError(argument)), repr(argument)[1:-1])
    return text


def is_main_process() -> bool:
    """Whether this process prints: the only one, or the first one of torchrun's."""
    return os.environ.get("RANK", "0") == "0"


def say_aside(line: str) -> None:
    """Print a line on standard error: it is not part of the result."""
    print(line, file=sys.stderr, flush=True)


def require_json(path: Path | None) -> None:
    """Raise `UserError` if figures cannot be written to this file, or would replace another one. Makes its folder."""
    from glassgpt.utils.files import open_regular, readable, require_writable

    if path is None:
        return
    with readable(path):
        if path.is_dir():
            raise UserError(f"--json {path} is a directory; name a file")
        if path.is_file():  # reading a pipe or a terminal would wait for input that never comes
            with open_regular(path) as file:
                if (head := file.read(100)) and not re.match(rb'\{\s*"glassgpt": "', head):
                    raise UserError(f"--json {path} exists and is not a file of figures by glassgpt; name another file")
            if any((path.parent / name).is_file() for name in ("manifest.json", "config.toml", "config.json")):
                raise UserError(f"--json {path} belongs to a dataset, a run or a model; name another file")
    require_writable(path)


def write_json(path: Path | None, figures: Mapping[str, Any]) -> None:
    """Write figures as a JSON object, one line each; numbers that JSON lacks (infinite, not a number) become null.

    The version comes first: by it `require_json` recognises a file that may be replaced.
    """
    from glassgpt.utils.files import finite, write_atomic

    figures = {"glassgpt": importlib.metadata.version("glassgpt"), **figures}
    # Not `indent`: it would write each of ten million numbers on its own line, slowly.
    rows = (f"  {json.dumps(name)}: {json.dumps(finite(value), allow_nan=False)}" for name, value in figures.items())
    if path == Path("/dev/stdout"):  # by this process's own stream, after the lines that it has printed
        say("{\n" + ",\n".join(rows) + "\n}")
    elif path is not None:
        write_atomic(path, "{\n" + ",\n".join(rows) + "\n}\n")
