"""generate, info, export and report: what to do with a model."""

import os
import stat
import sys
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import FlagCreatePairsOff, Positional, UseAppendAction, arg

from glassgpt.cli.options import Reference, decoded, parse
from glassgpt.utils.errors import UserError


@dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """Options of `glassgpt generate`."""

    reference: Reference
    prompt: Annotated[
        str | None, arg(metavar="TEXT", help_behavior_hint="(default: what is piped in, else as a document begins)")
    ] = None
    """Text to continue, or - to read it from standard input."""
    prompt_file: Annotated[Path | None, arg(metavar="FILE")] = None
    """File whose text to continue, in UTF-8."""
    max_new_tokens: int = 256
    """Tokens to write."""
    temperature: float = 0.8
    """Divides the logits: below 1 is safer, above 1 wilder, 0 is greedy."""
    top_k: int | None = None
    """Keep the k likeliest tokens only."""
    top_p: float | None = None
    """Keep the likeliest tokens that together have this probability."""
    min_p: float | None = None
    """Keep tokens at least this share as likely as the likeliest."""
    greedy: FlagCreatePairsOff[bool] = False
    """Always take the likeliest token: the same as --temperature 0."""
    stop: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="TEXT")] = ()
    """End where this text comes up; may be given several times."""
    n: int = 1
    """Number of samples, written side by side."""
    seed: int = 1337
    """Seed of the draws."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    quantize: Annotated[str | None, arg(metavar="int8", help_behavior_hint="(default: float32)")] = None
    """int8 writes faster on a CPU, with matrices rounded to 8 bits."""
    no_cache: FlagCreatePairsOff[bool] = False
    """Compute each token from the whole text again, without the cache of keys and values."""


def generate(arguments: Sequence[str]) -> None:
    """Continue a text with a trained model."""
    options = parse(GenerateOptions, "generate", generate, arguments)
    prompt = _prompt(options)
    from glassgpt.generation import generate as generation
    from glassgpt.generation import inference as writing
    from glassgpt.interop import references as reference

    model, tokenizer = reference.load(options.reference, device=writing.device_for(options.quantize, options.device))
    if options.quantize is not None:
        model = writing.quantized(model, options.quantize)
    pieces = generation.generate(
        model,
        tokenizer,
        prompt,
        max_new_tokens=options.max_new_tokens,
        temperature=0.0 if options.greedy else options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
        stop=options.stop,
        n=options.n,
        seed=options.seed,
        use_cache=not options.no_cache,
    )
    if options.n == 1:
        _write_stream(prompt or "", pieces)
    else:
        _write_samples(prompt or "", pieces, options.n)


def _write_stream(prompt: str, pieces: Iterable[str]) -> None:
    print(prompt, end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()


def _write_samples(prompt: str, pieces: Iterable[Any], n: int) -> None:
    texts = [prompt] * n
    for piece in pieces:
        texts[piece.sample] += piece
    rule = "\n" + "-" * 40 + "\n"
    print(rule.join(texts))


def _prompt(options: GenerateOptions) -> str | None:
    """The prompt as given on the command line, in a file or on standard input; None where there is none."""
    if options.prompt is not None and options.prompt_file is not None:
        raise UserError("--prompt and --prompt-file exclude each other: give one of them")
    if options.prompt_file is not None:
        try:
            return decoded(options.prompt_file.read_bytes(), str(options.prompt_file))
        except OSError as error:
            raise UserError(f"cannot read {options.prompt_file}: {error.strerror}") from None
    if options.prompt == "-":
        return decoded(_standard_input(), "standard input")
    if options.prompt is None:
        return decoded(_standard_input(), "standard input") or None if _is_piped() else None
    return decoded(os.fsencode(options.prompt), "--prompt")  # bytes that are no text reach Python as lone surrogates


def _is_piped() -> bool:
    """Whether standard input is a pipe or a file: not a terminal, not /dev/null, and not closed."""
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (AttributeError, OSError, ValueError):  # None, a stand-in, or closed
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode)


def _standard_input() -> bytes:
    # A pipe that nobody writes to or closes would leave the user looking at nothing.
    note = "glassgpt: waiting for the prompt on standard input; end it with Ctrl-D, or give --prompt TEXT"
    timer = threading.Timer(2.0, print, args=(note,), kwargs={"file": sys.stderr})
    timer.daemon = True
    timer.start()
    try:
        return sys.stdin.buffer.read()
    finally:
        timer.cancel()


@dataclass(frozen=True, kw_only=True)
class InfoOptions:
    """Options of `glassgpt info`."""

    reference: Reference


def info(arguments: Sequence[str]) -> None:
    """Say what a model is: its training so far, its dimensions and its size."""
    options = parse(InfoOptions, "info", info, arguments)
    from glassgpt.interop import references as reference

    print(reference.describe(options.reference))


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Options of `glassgpt export`."""

    reference: Reference
    out: Annotated[Path, arg(metavar="DIR")]
    """Directory to write, which must be empty or not there yet."""


def export(arguments: Sequence[str]) -> None:
    """Write a model as a directory that Hugging Face's transformers loads as it is, tokenizer included."""
    options = parse(ExportOptions, "export", export, arguments)
    from glassgpt.interop import references as reference

    family = reference.export(options.reference, options.out)
    has_tokenizer = (options.out / "tokenizer.json").is_file()
    print(
        f"{options.out}: {family}, for AutoModelForCausalLM"
        + (" and AutoTokenizer" if has_tokenizer else "; it has no tokenizer")
    )


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """Options of `glassgpt report`."""

    runs: Annotated[Positional[tuple[str, ...]], arg(metavar="RUN [RUN ...]", help_behavior_hint="")]
    """Directory of a run, such as runs/demo; of several, to compare them."""
    out: Annotated[
        Path | None,
        arg(metavar="FILE", help_behavior_hint="(default: RUN/report.html; of several runs report.html here)"),
    ] = None
    """File to write. What is there already is replaced only if it is a report."""


def report(arguments: Sequence[str]) -> None:
    """Write a run's report, or compare runs: one HTML file with charts and samples, which opens without network.

    Of several runs it shows losses, norms, speed and HellaSwag over steps, tokens or time, what differs in their configs, and their
    samples side by side.
    """
    options = parse(ReportOptions, "report", report, arguments)
    if not options.runs:
        raise UserError("report needs a run: name its directory, such as runs/demo (glassgpt report --help)")
    from glassgpt import report as reporting

    first, *others = options.runs
    print(reporting.write_report(first, *others, out=options.out))
