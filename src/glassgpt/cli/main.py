"""The command line: which command is meant, and how it ends. Every `--help` works without importing torch or numpy."""

import errno
import importlib.metadata
import io
import os
import sys
from collections.abc import Mapping, Sequence

from glassgpt.cli.data import DataInfo, Prepare, ShowTokenizer, TrainTokenizer
from glassgpt.cli.evaluate import Bench, Evaluate
from glassgpt.cli.learn import Learn, LearnCheck
from glassgpt.cli.models import Export, Generate, Info, Play, Report
from glassgpt.cli.options import Command, as_typed, gives
from glassgpt.cli.train import Plan, Recipes, Resume, Train
from glassgpt.utils.errors import NO_THREADS, RankError, UserError, did_you_mean, is_out_of_memory, is_out_of_threads
from glassgpt.utils.files import os_error_reason
from glassgpt.utils.launcher import launcher_number
from glassgpt.utils.openmp import limit_spinning

ABOUT = "Train GPT-2-class language models from any text, and generate with them."
MORE = "`glassgpt COMMAND --help` explains a command's options. `glassgpt --version` prints the version."


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line (`sys.argv` by default) and return its exit code.

    0: done; 1: `learn check` found a wrong answer; 2: an error that the user can fix, printed on standard error in a
    line or two; 130: interrupted. Any other exception is a defect and keeps its traceback. `--help` ends in
    `SystemExit(0)`.
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
        return _fail(as_typed(error, given)) if is_printed else 2
    except KeyboardInterrupt:
        print("glassgpt: interrupted", file=sys.stderr)
        return 130
    except OSError as error:
        if error.filename is not None or error.errno in (errno.EMFILE, errno.ENFILE, errno.EIO, errno.ENOMEM):
            where = f"{error.filename}: " if error.filename is not None else ""
            return _fail(f"{where}{os_error_reason(error)}")
        # Otherwise the reader of a pipe is gone (`| head`), or standard output goes to a full disk.
        if error.errno not in (errno.EPIPE, errno.ENOSPC):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the interpreter's own last flush
        return _fail("cannot write standard output: the disk is full") if error.errno == errno.ENOSPC else 0
    except (MemoryError, RuntimeError) as error:
        if is_out_of_threads(error):
            return _fail(NO_THREADS)
        if not is_out_of_memory(error):
            raise
        advice = "use a lower --micro-batch-size (also with --resume) or a smaller model"
        return _fail(f"out of memory; {advice if given[:1] == ['train'] else 'this needs more than is free'}")


def _run(arguments: Sequence[str]) -> int:
    """Run the command that the first one or two words name, or print an overview. Returns the exit code."""
    if arguments[:1] == ["--version"]:
        print(f"glassgpt {importlib.metadata.version('glassgpt')}")
        return 0
    if arguments[:1] != ["train"] and arguments and launcher_number("WORLD_SIZE", 1) > 1:
        raise UserError(f"{arguments[0]} runs in one process; only train runs under torchrun")
    for words in (2, 1):  # the longest name first: `learn check` is not a lesson
        name = " ".join(arguments[:words])
        if name in COMMANDS:
            command = Resume if name == "train" and gives(arguments, "--resume") else COMMANDS[name]
            return command.parse(name, arguments[words:]).run() or 0
    # The first word of two-word commands alone stands for all of them.
    first = next(iter(arguments), "")
    group = {name: command for name, command in COMMANDS.items() if name.startswith(f"{first} ")}
    commands, words = (group, 2) if group else (COMMANDS, 1)
    if not arguments or arguments[words - 1 : words] in (["-h"], ["--help"]):
        rows = [f"  {name:<17}{(command.__doc__ or '').splitlines()[0]}" for name, command in commands.items()]
        print("\n".join(["usage: glassgpt COMMAND [OPTIONS]", "", ABOUT, "", *rows, "", MORE]))
        return 0 if arguments else 2
    wrong = " ".join(arguments[:words])
    kind = "option" if wrong.startswith("-") else "command"
    nearest = did_you_mean(wrong, [*COMMANDS, "--help", "--version"])
    problem = f"{first} needs a second word" if group and not arguments[1:] else f"unknown {kind} {wrong!r}{nearest}"
    raise UserError(f"{problem} (commands: {', '.join(commands)})")


def _fail(text: str) -> int:
    print(f"glassgpt: error: {UserError(text)}", file=sys.stderr)
    return 2


COMMANDS: Mapping[str, type[Command]] = {
    "prepare": Prepare,
    "plan": Plan,
    "train": Train,
    "generate": Generate,
    "play": Play,
    "eval": Evaluate,
    "info": Info,
    "export": Export,
    "report": Report,
    "recipes": Recipes,
    "learn": Learn,
    "learn check": LearnCheck,
    "bench": Bench,
    "tokenizer train": TrainTokenizer,
    "tokenizer show": ShowTokenizer,
    "data info": DataInfo,
}
