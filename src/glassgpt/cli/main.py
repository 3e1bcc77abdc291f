"""The command line: which command is meant, and how it ends. Every `--help` works without importing torch or numpy."""

import errno
import importlib.metadata
import io
import os
import sys
from collections.abc import Mapping, Sequence

from glassgpt.cli.data import data_info, prepare, show_tokenizer, train_tokenizer
from glassgpt.cli.evaluate import evaluate
from glassgpt.cli.models import export, generate, info, report
from glassgpt.cli.options import Command, description
from glassgpt.cli.planning import bench, plan
from glassgpt.cli.play import play
from glassgpt.cli.train import recipes, train
from glassgpt.utils.errors import RankError, UserError, did_you_mean, is_out_of_memory
from glassgpt.utils.openmp import limit_spinning

ABOUT = "Train GPT-2-class language models from any text, and generate with them."


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line (`sys.argv` by default) and return its exit code.

    0: done; 2: an error that the user can fix, printed on standard error in a line or two; 130: interrupted. Any other
    exception is a defect and keeps its traceback. `--help` ends in `SystemExit(0)`.
    """
    if sys.stdout is None:  # closed by the shell: `>&-`
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] != ["generate"]:  # its parallel regions are so short that waking up would take a tenth of its time
        limit_spinning()
    try:
        try:
            return _run(given)
        finally:
            sys.stdout.flush()  # here, where a closed pipe can still be caught
    except UserError as error:
        # Of the same error on all processes of torchrun, one per host prints it.
        is_printed = isinstance(error, RankError) or os.environ.get("LOCAL_RANK", "0") == "0"
        return _fail(str(error)) if is_printed else 2
    except KeyboardInterrupt:
        print("glassgpt: interrupted", file=sys.stderr)
        return 130
    except OSError as error:  # the reader of a pipe is gone (`| head`), or standard output goes to a full disk
        if error.errno not in (errno.EPIPE, errno.ENOSPC):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the interpreter's own last flush
        return _fail("cannot write standard output: the disk is full") if error.errno == errno.ENOSPC else 0
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        advice = "use a lower --micro-batch-size (also with --resume) or a smaller model"
        return _fail(f"out of memory; {advice if given[:1] == ['train'] else 'this needs more than is free'}")


def _run(arguments: Sequence[str]) -> int:
    if arguments[:1] == ["--version"]:
        print(f"glassgpt {importlib.metadata.version('glassgpt')}")
        return 0
    if arguments[:1] != ["train"] and arguments and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(f"{arguments[0]} runs in one process; only train runs under torchrun")
    return _dispatch(arguments, COMMANDS)


def _dispatch(arguments: Sequence[str], commands: Mapping[str, Command], group: str = "") -> int:
    """Run the command that the first argument names, or print an overview. Returns the exit code."""
    name, prefix = next(iter(arguments), ""), f"{group} " if group else ""
    if name in ("-h", "--help") or not (name or group):
        print(_overview(commands, prefix, description(COMMANDS[group]) if group else ABOUT))
        return 0 if name else 2
    if name not in commands:
        kind = "option" if name.startswith("-") else "command"
        problem = f"unknown {kind} {prefix + name!r}" if name else f"{group} needs a command"
        nearest = did_you_mean(name, [*commands, "--help", "--version"])
        raise UserError(f"{problem}{nearest} (commands: {', '.join(prefix + each for each in commands)})")
    commands[name](arguments[1:])
    return 0


def _overview(commands: Mapping[str, Command], prefix: str, about: str) -> str:
    rows = [f"  {name:<11}{description(command).splitlines()[0]}" for name, command in commands.items()]
    tail = f"`glassgpt {prefix}COMMAND --help` explains a command's options."
    tail += "" if prefix else " `glassgpt --version` prints the version."
    return "\n".join([f"usage: glassgpt {prefix}COMMAND [OPTIONS]", "", about, "", *rows, "", tail])


def _fail(text: str) -> int:
    print(f"glassgpt: error: {text}", file=sys.stderr)
    return 2


def tokenizer(arguments: Sequence[str]) -> None:
    """Train a tokenizer, or show how one splits text."""
    _dispatch(arguments, SUBCOMMANDS["tokenizer"], "tokenizer")


def data(arguments: Sequence[str]) -> None:
    """Show the contents of a dataset, and verify it."""
    _dispatch(arguments, SUBCOMMANDS["data"], "data")


SUBCOMMANDS: Mapping[str, Mapping[str, Command]] = {
    "tokenizer": {"train": train_tokenizer, "show": show_tokenizer},
    "data": {"info": data_info},
}
COMMANDS: Mapping[str, Command] = {
    "prepare": prepare,
    "plan": plan,
    "train": train,
    "generate": generate,
    "play": play,
    "eval": evaluate,
    "info": info,
    "export": export,
    "report": report,
    "recipes": recipes,
    "bench": bench,
    "tokenizer": tokenizer,
    "data": data,
}
