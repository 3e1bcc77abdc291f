"""The programs of the documentation's commands, shortened: one step stands for 100, and evaluations read 3,000 tokens.

The tests put `glassgpt` and `torchrun` on PATH as `python short_command.py PROGRAM "$@"`. Nothing else is changed:
the text before `--` of a page's command runs as a reader would run it.
"""

import re
import runpy
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path

from glassgpt.__main__ import main
from glassgpt.config.recipes import recipe

STEPS = 100
COUNTS = ("--steps", "--eval-every", "--checkpoint-every")
DOWNLOADED = ("shakespeare", "finetune")  # recipes whose text is Shakespeare's


def fewer(steps: str) -> str:
    """Return a hundredth of a number of steps, at least 2."""
    return str(max(2, int(steps) // STEPS))


def shorten(words: list[str]) -> list[str]:
    """Return the words of a `glassgpt` command that takes seconds."""
    words = [re.sub(r"(?<=@)\d+$", lambda match: fewer(match[0]), word) for word in words]
    words = [fewer(word) if before in COUNTS else word for before, word in zip(["", *words], words, strict=False)]
    if serves(words):
        return [*words, "--no-browser"]
    if words[0] != "train" or "--resume" in words or "--help" in words:
        return words
    config = recipe(words[1] if words[1:] and not words[1].startswith("-") else "demo")
    steps = [] if {"--steps", "--epochs"} & set(words) else ["--steps", fewer(str(config.steps))]
    every = [] if "--eval-every" in words else ["--eval-every", fewer(str(config.eval_every))]
    data = any(word.startswith("--data") for word in words) or not config.name.startswith(DOWNLOADED)
    out = Path(words[words.index("--out") + 1] if "--out" in words else f"runs/{config.name}")
    if (out / "prepared").exists():  # a run that the tests made for pages which do not train it
        shutil.rmtree(out)
    short = [*steps, *every, "--eval-tokens", "3000", "--sample.max-new-tokens", "8"]
    return [*words, *short, *([] if data else ["--data", "my.txt"])]


def serves(words: list[str]) -> bool:
    """Return whether a command opens a page and runs until it is interrupted."""
    return words[0] == "play" or (words[0] == "learn" and words[1:2] != ["check"] and len(words) == 2)


def visit(words: list[str]) -> int:
    """Start a server, read its page, and end it."""
    command = [sys.executable, "-m", "glassgpt", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        address = next(word for word in server.stdout.readline().split() if word.startswith("http"))
        with urllib.request.urlopen(address.partition("#")[0]) as page:
            titled = b"<title>" in page.read()
        server.terminate()
    return 0 if titled else 1


def run(program: str, words: list[str]) -> int:
    """Run `glassgpt` or `torchrun` with shortened words; return the exit code."""
    if program == "torchrun":
        place = words.index("glassgpt") + 1
        sys.argv = [program, *words[:place], *shorten(words[place:])]
        runpy.run_module("torch.distributed.run", run_name="__main__")
        return 0
    if serves(words) and "--help" not in words:
        return visit(shorten(words))
    sys.argv = [program, *shorten(words)]
    code = main()
    return 0 if words[:2] == ["learn", "check"] and code == 1 else code  # nobody has answered the page's exercises


if __name__ == "__main__":
    sys.exit(run(sys.argv[1], sys.argv[2:]))
