"""The commands and their options, as their `--help` prints them."""

import contextlib
import io
import os
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple
from unittest import mock

from generated_settings import all_settings
from markup import escaped, fence

from glassgpt.cli.main import COMMANDS
from glassgpt.cli.main import main as run_command_line
from glassgpt.config.schema import ExecutionConfig, TrainConfig

# A run is resumed by the options of another command, so it has a section of its own.
PAGES = {**{name: name.split() for name in COMMANDS}, "train --resume": ["train", "--resume", "RUN"]}
CONFIGS = {"train": TrainConfig, "plan": TrainConfig, "train --resume": ExecutionConfig}


class Option(NamedTuple):
    """A row of a help text: how an option is written, and what it does."""

    signature: str
    text: str

    @property
    def name(self) -> str:
        """The option without its value."""
        return self.signature.split()[0].rstrip(",")


class Help(NamedTuple):
    """A help text: paragraphs, usage, and options."""

    about: str
    usage: str
    options: list[Option]


def help_of(words: Sequence[str]) -> Help:
    """Run a command's `--help` in this process, and read what it prints."""
    output = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)
    with (
        mock.patch.dict(os.environ, {"COLUMNS": "100", "NO_COLOR": "1"}),
        contextlib.redirect_stdout(output),
        contextlib.suppress(SystemExit),
    ):
        run_command_line([*words, "--help"])
    output.seek(0)
    about, _, rest = output.read().partition("\nusage: ")
    usage, _, rows = rest.partition("\n\n")
    return Help(about.strip(), usage, list(_options(rows)))


def _options(rows: str) -> Iterator[Option]:
    """The options in the boxes of a help text. A box may begin with its own description, which ends with a line."""
    for box in rows.split("╭─")[1:]:
        lines = [line.strip("│").removeprefix(" ").rstrip() for line in box.splitlines() if line.startswith("│")]
        rules = [number for number, line in enumerate(lines) if line.startswith("──")]
        # An option is on the left, its text on the right, in the same line or in the lines below.
        for entry in re.split(r"\n(?! )", "\n".join(lines[rules[0] + 1 if rules else 0 :])):
            signature, text = re.split(r" {2,}|\n +", entry, maxsplit=1)
            if not signature.startswith("-h"):
                yield Option(signature, " ".join(text.split()).removesuffix(" (default: False)"))  # a switch


def commands() -> str:
    """Return the Markdown of all commands, a section each."""
    return "\n".join(_section(name, help_of(words)) for name, words in PAGES.items())


def _section(name: str, shown: Help) -> str:
    lines = [f"## glassgpt {name}", "", escaped(shown.about), "", fence("text", body=shown.usage)]
    lines.append(fence("{program}", f"glassgpt {name}"))
    settings = {f"--{each.replace('_', '-')}" for each in (all_settings(CONFIGS[name]) if name in CONFIGS else ())}
    own = [option for option in shown.options if option.name not in settings]
    lines += [fence("{option}", option.signature, escaped(option.text)) for option in own]
    if len(own) < len(shown.options):
        group, example = ("execution settings", "eval_every") if name == "train --resume" else ("settings", "optim.lr")
        option = f"--{example.replace('_', '-')}"
        lines.append(f"All [{group}](settings.md) are options too: `{option}` sets {{confval}}`{example}`.")
    return "\n".join(lines) + "\n"
