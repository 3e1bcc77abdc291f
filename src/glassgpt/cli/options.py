"""What several commands need."""

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

from tyro.conf import Positional, arg

from glassgpt.cli.parsing import parse_options
from glassgpt.utils.errors import UserError

Command = Callable[[Sequence[str]], None]
Options = TypeVar("Options")
REFERENCE_HELP = (
    "A run (runs/demo, runs/demo@best, runs/demo@500) or checkpoint; a Hugging Face directory, .safetensors file or "
    "hub id (gpt2); a .pt file of nanoGPT or build-nanogpt."
)
Reference = Annotated[Positional[str], arg(metavar="REF", help=REFERENCE_HELP)]


def description(command: Command) -> str:
    """The help of a command: its docstring. The first line is also its row in an overview."""
    return "\n".join(line.strip() for line in (command.__doc__ or "").strip().splitlines())


def parse(
    options: type[Options],
    name: str,
    command: Command,
    arguments: Sequence[str],
    *,
    default: Options | None = None,
    hint: str = "",
) -> Options:
    """The options of `glassgpt NAME`. See `parse_options`."""
    return parse_options(options, f"glassgpt {name}", description(command), arguments, default=default, hint=hint)


def option_of(argument: str) -> str:
    """The option that an argument names, with dashes and without a value: `--top_k=3` is `--top-k`."""
    return argument.partition("=")[0].replace("_", "-")


def gives(arguments: Sequence[str], option: str) -> bool:
    """Whether an option is given on the command line, with dashes or underscores."""
    return option in map(option_of, arguments)


def is_main_process() -> bool:
    """Whether this process prints: the only one, or the first one of torchrun's."""
    return os.environ.get("RANK", "0") == "0"


def say(line: str) -> None:
    """Print a line on standard output at once."""
    print(line, flush=True)


def say_aside(line: str) -> None:
    """Print a line on standard error: it is not part of the result."""
    print(line, file=sys.stderr, flush=True)


def decoded(data: bytes, origin: str) -> str:
    """Text in UTF-8. Raises `UserError` that names the origin and the first wrong byte."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{origin} is not valid UTF-8: byte {data[error.start]:#04x} at offset {error.start}") from None


def require_json(path: Path) -> None:
    """Raise `UserError` if figures cannot be written to this file, or would replace another one. Makes its folder."""
    from glassgpt.utils.files import explain_os_errors

    with explain_os_errors("write", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise UserError(f"--json {path} is a directory; name a file")
        if path.is_file() and path.read_bytes()[:1] not in (b"", b"{"):
            raise UserError(f"--json {path} exists and is not JSON; name another file")
        siblings = ("manifest.json", "config.toml", "config.json")
        if path.is_file() and any((path.parent / name).is_file() for name in siblings):
            raise UserError(f"--json {path} belongs to a dataset, a run or a model; name another file")


def write_json(path: Path, figures: Mapping[str, Any]) -> None:
    """Write figures as a JSON object, one line each; numbers that JSON lacks (infinite, not a number) become null."""
    from glassgpt.utils.files import finite, write_atomic

    # Not `indent`: it would write each of ten million numbers on its own line, slowly.
    rows = (f"  {json.dumps(name)}: {json.dumps(finite(value), allow_nan=False)}" for name, value in figures.items())
    write_atomic(path, "{\n" + ",\n".join(rows) + "\n}\n")
