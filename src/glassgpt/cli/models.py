"""generate, info, export and report: commands that use a model."""

import dataclasses
import itertools
import os
import stat
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import FlagCreatePairsOff, OmitArgPrefixes, Positional, UseAppendAction, arg

from glassgpt.cli.options import Reference, decoded, parse
from glassgpt.config.schema import SamplingConfig
from glassgpt.utils.errors import UserError
from glassgpt.utils.files import readable


@dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """Options of `glassgpt generate`."""

    reference: Reference
    prompt: Annotated[
        str | None,
        arg(metavar="TEXT", help_behavior_hint="(default: piped standard input, otherwise a new document)"),
    ] = None
    """Text to continue, or - to read it from standard input."""
    prompt_file: Annotated[Path | None, arg(metavar="FILE")] = None
    """File whose text to continue, in UTF-8."""
    sampling: OmitArgPrefixes[SamplingConfig] = field(default_factory=SamplingConfig)
    greedy: FlagCreatePairsOff[bool] = False
    """Always take the most likely token: the same as --temperature 0."""
    stop: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="TEXT")] = ()
    """Stop before this text; may be given several times."""
    n: int = 1
    """Number of samples, generated in one batch."""
    seed: int = 1337
    """Seed of the random draws."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of weights and arithmetic; auto is bfloat16 on GPUs that have it, otherwise float32."""
    quantize: Annotated[str | None, arg(metavar="int8", help_behavior_hint="(default: none)")] = None
    """int8 generates faster on a CPU, with weights rounded to 8 bits."""
    no_cache: FlagCreatePairsOff[bool] = False
    """Compute each token from the whole text, without the cache of keys and values."""


def generate(arguments: Sequence[str]) -> None:
    """Continue a text with a trained model."""
    options = parse(GenerateOptions, "generate", generate, arguments)
    prompt = _prompt(options)
    from glassgpt.generation import generate as generation
    from glassgpt.generation import inference
    from glassgpt.interop import references

    device = inference.device_for(options.quantize, options.device)
    model, tokenizer = references.load(options.reference, device=device)
    if options.quantize is not None:
        model = inference.quantize(model, options.quantize)
    settings = dataclasses.asdict(options.sampling) | ({"temperature": 0.0} if options.greedy else {})
    settings |= {name: getattr(options, name) for name in ("stop", "n", "seed", "precision")}
    tokens = generation.generate(model, tokenizer, prompt, use_cache=not options.no_cache, **settings)
    texts = [prompt or ""] * options.n
    if options.n == 1:
        for text in itertools.chain(texts, tokens):
            print(text, end="", flush=True)
        print()
        return
    for token in tokens:
        texts[token.sample] += token.text
    print(f"\n{'-' * 40}\n".join(texts))


def _prompt(options: GenerateOptions) -> str | None:
    """The prompt from the command line, a file or standard input; None if there is none."""
    if options.prompt is not None and options.prompt_file is not None:
        raise UserError("--prompt and --prompt-file cannot be combined; use one of them")
    if options.prompt_file is not None:
        with readable(options.prompt_file):
            return decoded(options.prompt_file.read_bytes(), str(options.prompt_file))
    if options.prompt == "-":
        return decoded(_standard_input(), "standard input")
    if options.prompt is None:
        return decoded(_standard_input(), "standard input") or None if _is_piped() else None
    return decoded(os.fsencode(options.prompt), "--prompt")  # invalid UTF-8 reaches Python as lone surrogates


def _is_piped() -> bool:
    """Whether standard input is a pipe or a file, and not a terminal, /dev/null or closed."""
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (AttributeError, OSError, ValueError):  # None, replaced, or closed
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode)


def _standard_input() -> bytes:
    # A pipe that is neither written to nor closed would leave the user without any output.
    note = "glassgpt: waiting for the prompt on standard input; end it with Ctrl-D, or use --prompt TEXT"
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
    """Show a model's training so far, its dimensions and its size."""
    options = parse(InfoOptions, "info", info, arguments)
    from glassgpt.interop import references

    print(references.describe(options.reference))


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Options of `glassgpt export`."""

    reference: Reference
    out: Annotated[Path, arg(metavar="DIR")]
    """Directory to write; it must be empty or not exist yet."""


def export(arguments: Sequence[str]) -> None:
    """Save a model and its tokenizer as a directory that Hugging Face's transformers can load."""
    options = parse(ExportOptions, "export", export, arguments)
    from glassgpt.interop import references

    family = references.export(options.reference, options.out)
    has_tokenizer = (options.out / "tokenizer.json").is_file()
    tokenizer = " and AutoTokenizer" if has_tokenizer else "; without a tokenizer"
    print(f"{options.out}: {family}, for AutoModelForCausalLM{tokenizer}")


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """Options of `glassgpt report`."""

    runs: Annotated[Positional[tuple[str, ...]], arg(metavar="RUN [RUN ...]", help_behavior_hint="")]
    """Run directory, such as runs/demo; several are compared."""
    out: Annotated[
        Path | None,
        arg(metavar="FILE", help_behavior_hint="(default: RUN/report.html; for several runs ./report.html)"),
    ] = None
    """File to write. An existing file is replaced only if it is a report."""


def report(arguments: Sequence[str]) -> None:
    """Write a report of one run, or a comparison of several: one HTML file with charts and samples that opens offline.

    A comparison shows losses, gradient norms, speed and HellaSwag over steps, tokens or time, the settings that differ,
    and samples side by side.
    """
    options = parse(ReportOptions, "report", report, arguments)
    if not options.runs:
        raise UserError("report needs a run directory, such as runs/demo (glassgpt report --help)")
    from glassgpt.report.page import write_report

    first, *others = options.runs
    print(write_report(first, *others, out=options.out))
