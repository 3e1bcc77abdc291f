"""Texts that are always available: Python's documentation, random strings, and Shakespeare's plays by download.

python-docs is about a megabyte of English for a small character model: `pydoc_data.topics` (of `help("yield")`) and the
docstrings of the standard library. Only paragraphs of prose are kept, each once and on one line, in 78 characters.
"""

import ast
import hashlib
import json
import random
import re
import string
import sys
import sysconfig
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import filelock

from glassgpt.config.schema import ReadingConfig
from glassgpt.data.folders import find_files
from glassgpt.data.source_files import SourceFile
from glassgpt.utils.download import cache_directory, download
from glassgpt.utils.errors import UserError
from glassgpt.utils.files import explain_os_errors, sha256_of, write_atomic

SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
SHAKESPEARE_BYTES = 1_115_394


class BuiltinText(ABC):
    """What these sources share: one file, which is downloaded or written into the cache once."""

    reading = ReadingConfig()  # whatever the user's options
    left_out: tuple[str, ...] = ()

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What the text depends on; equal for the same text."""

    def is_unchanged(self, recorded: Mapping[str, Any]) -> bool:
        return recorded == self.identity()


class Shakespeare(BuiltinText):
    """tinyshakespeare, 1,115,394 characters of his plays (Karpathy, 2015)."""

    name = location = "shakespeare"

    def files(self) -> list[SourceFile]:
        return [SourceFile("tinyshakespeare.txt", SHAKESPEARE_BYTES, self._fetch)]

    def _fetch(self, on_bytes: Callable[[int], None]) -> Path:
        path = cache_directory() / "downloads" / "tinyshakespeare.txt"
        copy = f"download that file on another machine and copy it to {path}, or use --data FILE"
        manual = f"Without network: {copy}; --data python-docs needs no download"
        return download(SHAKESPEARE_URL, path, SHAKESPEARE_SHA256, what="shakespeare", manual=manual)

    def identity(self) -> dict[str, Any]:
        return {"sha256": SHAKESPEARE_SHA256}


class GeneratedText(BuiltinText):
    """A text that the code of this file computes."""

    name: str
    location: str

    @abstractmethod
    def documents(self) -> list[str]:
        """The documents in order. The cache keeps them, so they are computed once."""

    def files(self) -> list[SourceFile]:
        """The one file, which is written now if it is missing. Raises `UserError` as `documents` does."""
        version = hashlib.sha256(json.dumps(self.identity()).encode()).hexdigest()[:12]
        path = cache_directory() / "downloads" / f"{self.name}-{version}.jsonl"
        with explain_os_errors("write", path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with filelock.FileLock(path.with_name(f".{path.name}.lock")):
                if not path.is_file():
                    write_atomic(path, "".join(json.dumps({"text": text}) + "\n" for text in self.documents()))
        return [SourceFile(f"{self.name}.jsonl", path.stat().st_size, path)]

    def identity(self) -> dict[str, Any]:
        """The hash of this file, which has the rules."""
        return {"rules": sha256_of(Path(__file__))}


class PythonDocs(GeneratedText):
    """The documentation of the running Python (see `python_docs`)."""

    name = location = "python-docs"

    def documents(self) -> list[str]:
        return python_docs()

    def identity(self) -> dict[str, Any]:
        """The Python version, and the hash of this file."""
        return {"python": sys.version, **super().identity()}


class RepeatedStrings(GeneratedText):
    """Random strings that repeat (see `repeated_strings`)."""

    name = location = "repeated-strings"

    def documents(self) -> list[str]:
        return repeated_strings()


def repeated_strings(count: int = 5000, length: int = 96, seed: int = 0) -> list[str]:
    """Documents of `length` characters: a random string of 8 to 24 lower-case letters, repeated. Always the same.

    The text is predictable only by what followed the same letters before: strings do not recur in other documents, and
    periods differ. It trains induction heads (Olsson et al., 2022, "In-context Learning and Induction Heads").
    """
    draw, texts = random.Random(seed).random, list[str]()  # Python guarantees the numbers of `random` alone
    for _ in range(count):
        period = 8 + int(17 * draw())
        once = "".join(string.ascii_lowercase[int(26 * draw())] for _ in range(period))
        texts.append((once * length)[:length])
    return texts


def python_docs() -> list[str]:
    """The documents in the order of their hashes, so that any part is a fair sample. Raises `UserError` without any."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise UserError(
            "this Python has no documentation for python-docs (pydoc_data is missing, as in some Linux packages);\n"
            "install the full Python (apt-get install libpython3-stdlib), or use --data FILE"
        ) from None
    seen: set[str] = set()
    texts = []
    for raw in (*(topics[name] for name in sorted(topics)), *_docstrings()):
        paragraphs = [paragraph for paragraph in dict.fromkeys(_prose_of(raw)) if paragraph not in seen]
        seen.update(paragraphs)
        text = "\n\n".join(paragraphs)
        if len(text) >= _SHORTEST_DOCUMENT:
            texts.append(text)
    return sorted(texts, key=lambda text: hashlib.sha256(text.encode()).digest())


_SHORTEST_DOCUMENT = 80
# Folders of tests, tools and other packages in the standard library's directory.
_NOT_LIBRARY = (
    "__pycache__ dist-packages ensurepip idlelib lib-dynload lib2to3 pydoc_data site-packages test tests turtledemo "
    "_pyrepl distutils encodings".split()
)
_FUNCTION_WORDS = frozenset(
    "a all also an and any are as at be been but by can cannot do does each either for from has have if in into is it "
    "its may more must no not of on one only or other over same should so some such than that the their them then "
    "there these they this to until up use used was were when where which while will with within without would you "
    "your".split()
)
_STRAIGHT = str.maketrans({"“": '"', "”": '"', "’": "'", "‘": "'", "´": "'", "–": "-", "—": "--", "…": "..."})
_MARKUP = [
    (re.compile(r":[a-z:]+:`~?([^`]*)`"), r"\1"),  # :class:`~http.Client`
    (re.compile(r"``?([^`']+?)(?:``?|'(?!\w))"), r"\1"),  # ``code``, `code`, `code'
    (re.compile(r"(?<![\w*])(\*\*?)(\w[^*]*)\1(?![\w*])"), r"\2"),  # *emphasis*, **strong**
]
_BREAK = re.compile(r"\n\s*\n|\n\s*[-=~*]{3,}[ \t]*(?:\n|$)")  # an empty line, or the rule below a heading
_PLAIN_TEXT = re.compile(r"[A-Za-z0-9 .,;:!?'\"()*_/-]+")
_WORD = re.compile(r"[A-Za-z]+(?:'[a-z]+)?")


def _docstrings() -> Iterator[str]:
    """The docstrings of the standard library in the order of its files, which are parsed and never run."""
    library = Path(sysconfig.get_path("stdlib"))
    files = find_files(library, lambda name: name.endswith(".py"), _is_library).files if library.is_dir() else ()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about old escapes in the library's strings
        for path in sorted(library / name for name in files):
            try:
                tree = ast.parse(path.read_bytes())
            except (SyntaxError, ValueError):  # templates
                continue
            yield from _docstrings_in(tree)


def _is_library(folder: str) -> bool:
    return folder.rpartition("/")[2] not in _NOT_LIBRARY and "/." not in f"/{folder}"


def _docstrings_in(tree: ast.Module) -> Iterator[str]:
    # Statements only: `ast.walk` visits every expression, and takes four times as long.
    todo: list[ast.AST] = [tree]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node, clean=False)
            if docstring and len(docstring) > _SHORTEST_DOCUMENT:
                yield docstring
        for block in ("finalbody", "handlers", "orelse", "body"):
            todo.extend(child for child in reversed(getattr(node, block, [])) if hasattr(child, "body"))


def _prose_of(raw: str) -> Iterator[str]:
    """The paragraphs that are English prose, each on one line, in plain ASCII and without markup."""
    for block in _BREAK.split(raw.translate(_STRAIGHT)):
        paragraph = " ".join(block.split())
        for pattern, replacement in _MARKUP:
            paragraph = pattern.sub(replacement, paragraph)
        if _is_prose(paragraph):
            yield paragraph


def _is_prose(paragraph: str) -> bool:
    """Prose has function words and few signs; code, tables, grammar, lists of names and headings do not."""
    words = _WORD.findall(paragraph)
    common = sum(word.lower() in _FUNCTION_WORDS for word in words)
    letters = sum(character.isalpha() or character == " " for character in paragraph)
    return (
        len(words) >= 8
        and common >= 0.25 * len(words)
        and letters >= 0.9 * len(paragraph)
        and _PLAIN_TEXT.fullmatch(paragraph) is not None
    )
