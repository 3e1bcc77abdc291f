"""The pages of the documentation and their code blocks, as Sybil reads them."""

import itertools
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sybil import Document, Example, Sybil
from sybil.evaluators.skip import Skipper
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser, SkipParser
from sybil.typing import Parser

ROOT = Path(__file__).resolve().parents[1]
# Written when the site is built: folders whose names begin with "_", and the lessons.
GENERATED = re.compile(r"docs/(?:.*/)?_|docs/learn/lessons/")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES = [page for page in PAGES if not GENERATED.match(page.relative_to(ROOT).as_posix())]


def name_of(page: Path) -> str:
    """Return the path of a page within the project."""
    return str(page.relative_to(ROOT))


def parse(page: Path, shell: Any = None) -> Document:
    """Read a page's `sh` and `python` blocks. `shell` runs the text of an `sh` block."""
    parsers: list[Parser] = [
        PythonCodeBlockParser(),
        CodeBlockParser("sh", lambda example: shell(example.parsed)),
        SkipParser(),
    ]
    return Sybil(parsers).parse(page)


@dataclass(frozen=True)
class Skipped:
    """A block that is not run, with the text after `skip: next` in the comment before it."""

    page: Path
    example: Example
    reason: str


def skipped_blocks(page: Path) -> Iterator[Skipped]:
    """Yield the blocks of a page that follow `<!-- skip: next "needs ..." -->`."""
    reason = None
    for example in parse(page):
        if isinstance(example.region.evaluator, Skipper):
            action, reason = example.parsed
            assert action == "next", f"{name_of(page)}:{example.line}: use `skip: next` once per block"
        elif reason is not None:
            yield Skipped(page, example, str(reason).strip())
            reason = None


def commands_of(block: str) -> Iterator[list[str]]:
    """Yield the `glassgpt` commands of an `sh` block as lists of words, the first one after `glassgpt`."""
    for line in block.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words = list(lexer)
        for place, word in enumerate(words):
            if word.rpartition("/")[2] == "glassgpt":
                yield list(itertools.takewhile(lambda word: not set(word) <= set("|&;<>()"), words[place + 1 :]))
