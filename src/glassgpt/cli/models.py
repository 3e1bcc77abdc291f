"""generate, play, info, export and report: commands that use models."""

import dataclasses
import itertools
import os
import stat
import sys
import threading
from dataclasses import field
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import OmitArgPrefixes, Positional, UseAppendAction, arg

from glassgpt.cli.options import REFERENCE_HELP, Command, File, Flag, Reference, default
from glassgpt.config.schema import SamplingConfig
from glassgpt.config.validation import Seed, Size, between
from glassgpt.utils.errors import UserError
from glassgpt.utils.files import decoded, read_file, readable


class Generate(Command):
    """Continue a text with a trained model."""

    reference: Reference
    # Text to continue, or - to read it from standard input.
    prompt: Annotated[str | None, default("piped standard input, otherwise a new document", "TEXT")] = None
    prompt_file: File = None  # File whose text to continue, in UTF-8.
    sampling: OmitArgPrefixes[SamplingConfig] = field(default_factory=SamplingConfig)
    greedy: Flag = False  # Always take the most likely token: the same as --temperature 0.
    # Stop before this text; may be given several times.
    stop: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="TEXT")] = ()
    n: Size[int] = 1  # Number of samples, generated in one batch.
    seed: Seed[int] = 1337  # Seed of the random draws.
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps.
    # Precision of weights and arithmetic; auto is bfloat16 on GPUs that have it, otherwise float32.
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    # int8 generates faster on a CPU, with weights rounded to 8 bits.
    quantize: Annotated[str | None, default("none", "int8")] = None
    no_cache: Flag = False  # Compute each token from the whole text, without the cache of keys and values.

    def run(self) -> None:
        prompt = self._prompt()
        from glassgpt.generation import generate as generation
        from glassgpt.generation import inference
        from glassgpt.interop import references

        device = inference.device_for(self.quantize, self.device)
        model, tokenizer = references.load(self.reference, device=device)
        if self.quantize is not None:
            model = inference.quantize(model, self.quantize)
        settings = dataclasses.asdict(self.sampling) | ({"temperature": 0.0} if self.greedy else {})
        settings |= {name: getattr(self, name) for name in ("stop", "n", "seed", "precision")}
        tokens = generation.generate(model, tokenizer, prompt, use_cache=not self.no_cache, **settings)
        texts = [prompt or ""] * self.n
        if self.n == 1:
            for text in itertools.chain(texts, tokens):
                print(text, end="", flush=True)
            print()
            return
        for token in tokens:
            texts[token.sample] += token.text
        print(f"\n{'-' * 40}\n".join(texts))

    def _prompt(self) -> str | None:
        """The prompt from the command line, a file or standard input; None if there is none."""
        if self.prompt is not None and self.prompt_file is not None:
            raise UserError("--prompt and --prompt-file cannot be combined; use one of them")
        if self.prompt_file is not None:
            with readable(self.prompt_file):
                return decoded(read_file(self.prompt_file), str(self.prompt_file))
        if self.prompt == "-":
            return decoded(_standard_input(), "standard input")
        if self.prompt is None:
            return decoded(_standard_input(), "standard input") or None if _is_piped() else None
        return decoded(os.fsencode(self.prompt), "--prompt")  # invalid UTF-8 reaches Python as lone surrogates


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


class Play(Command):
    """Open a page that shows what models compute and how runs learn. Without REF, it shows all runs in ./runs."""

    references: Annotated[
        Positional[tuple[str, ...]], arg(metavar="[REF ...]", help=REFERENCE_HELP, help_behavior_hint="")
    ] = ()
    # Port to listen on.
    port: Annotated[int | None, between(1, 65535), default("7860, or the next free one", "N")] = None
    # Name or address to listen on, so that other machines can connect with the token. 0.0.0.0 is any address.
    host: Annotated[str | None, default("this machine only", "H")] = None
    no_browser: Flag = False  # Do not open a browser.
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps.

    def run(self) -> None:
        from glassgpt.playground import server
        from glassgpt.utils.device import find_device

        references, device, browser = list(self.references), find_device(self.device), not self.no_browser
        server.play(references, device=device, host=self.host, port=self.port, browser=browser)


class Info(Command):
    """Show a model's training so far, its dimensions and its size."""

    reference: Reference

    def run(self) -> None:
        from glassgpt.interop import references

        print(references.describe(self.reference))


class Export(Command):
    """Save a model and its tokenizer as a directory that Hugging Face's transformers can load."""

    reference: Reference
    out: Annotated[Path, arg(metavar="DIR")]  # Directory to write; it must be empty or not exist yet.
    # Precision of the weights; half of the size in bfloat16 and float16.
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"

    def run(self) -> None:
        from glassgpt.interop import references

        family = references.export(self.reference, self.out, self.dtype)
        has_tokenizer = (self.out / "tokenizer.json").is_file()
        tokenizer = " and AutoTokenizer" if has_tokenizer else "; without a tokenizer"
        print(f"{self.out}: {family}, for AutoModelForCausalLM{tokenizer}")


class Report(Command):
    """Write a report of one run, or a comparison of several: one HTML file with charts and samples that opens offline.

    A comparison shows losses, gradient norms, speed and HellaSwag over steps, tokens or time, the settings that differ,
    and samples side by side.
    """

    # Run directory, such as runs/demo; several are compared.
    runs: Annotated[Positional[tuple[str, ...]], arg(metavar="RUN [RUN ...]", help_behavior_hint="")]
    # File to write. An existing file is replaced only if it is a report.
    out: Annotated[Path | None, default("RUN/report.html; for several runs ./report.html", "FILE")] = None

    def run(self) -> None:
        if not self.runs:
            raise UserError("report needs a run directory, such as runs/demo (glassgpt report --help)")
        from glassgpt.report.page import write_report

        print(write_report(*self.runs, out=self.out))
