"""Where text comes from: a registered name, a text file, a folder of them, or a dataset that is already prepared."""

import ast
import hashlib
import os
import re
import stat
import sys
import sysconfig
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ..errors import UserError, did_you_mean
from ..files import sha256_of, user_path
from .download import cache_directory, download
from .tokens import read_manifest


@dataclass(frozen=True)
class Document:
    """A text, and where it is from (a path, or a name)."""

    text: str
    origin: str


class Source(Protocol):
    """Documents with a name, and a way to tell whether they are still the same."""

    @property
    def name(self) -> str:
        """What it is called in messages and in the name of a dataset's directory."""
        ...

    @property
    def location(self) -> str:
        """What tells it from every other source on this machine: the registered name, or the absolute path."""
        ...

    def documents(self, encoding: str = "utf-8", errors: str = "strict") -> Iterator[Document]:
        """The documents, always in the same order. Raises `UserError` where one cannot be had, read or decoded."""
        ...

    def identity(self) -> dict[str, Any]:
        """What the text depends on, as JSON. Kept with a dataset, it tells later whether the dataset is stale."""
        ...

    def is_unchanged(self, recorded: Mapping[str, Any]) -> bool:
        """Whether the documents are still those of an `identity` recorded earlier."""
        ...


@dataclass(frozen=True)
class PreparedDataset:
    """A directory that `prepare` has made."""

    directory: Path


# ---------------------------------------------------------------------------------------------------------------- files


@dataclass(frozen=True)
class TextFiles:
    """A text file, or all .txt and .md files in a folder and below it. Newlines are kept as they are."""

    root: Path

    @property
    def name(self) -> str:
        return self.root.stem or "text"

    @property
    def location(self) -> str:
        return str(self.root)

    def files(self) -> list[Path]:
        """The files in the order of their names. Raises `UserError` for a folder without any."""
        if not self.root.is_dir():
            return [self.root]
        files = sorted(_files_below(self.root, (".txt", ".md")), key=self._relative)
        if not files:
            raise UserError(f"the folder {self.root} has no .txt or .md file in it; name a text file, or a folder that has some")
        return files

    def documents(self, encoding: str = "utf-8", errors: str = "strict") -> Iterator[Document]:
        for path in self.files():
            yield Document(_decode(_read(path), path, encoding, errors), str(path))

    def identity(self) -> dict[str, Any]:
        return {"files": [{**self._glance(path), "sha256": _hash(path)} for path in self.files()]}

    def is_unchanged(self, recorded: Mapping[str, Any]) -> bool:
        old, files = recorded.get("files", []), self.files()
        glances = [self._glance(path) for path in files]
        if [{**entry, "sha256": None} for entry in old] == [{**glance, "sha256": None} for glance in glances]:
            return True
        # A file copied or touched has another time and the same text: only then is the text read.
        if [(e["path"], e["bytes"]) for e in old] != [(g["path"], g["bytes"]) for g in glances]:
            return False
        return all(entry["sha256"] == _hash(path) for entry, path in zip(old, files, strict=True))

    def _relative(self, path: Path) -> str:
        return path.name if path == self.root else path.relative_to(self.root).as_posix()

    def _glance(self, path: Path) -> dict[str, Any]:
        """What can be told of a file without reading it."""
        with _readable(path):
            status = path.stat()
        return {"path": self._relative(path), "bytes": status.st_size, "mtime_ns": status.st_mtime_ns}


def _files_below(folder: Path, suffixes: tuple[str, ...], left_out: Iterable[str] = ()) -> Iterator[Path]:
    """The files with these suffixes in a folder and below it; hidden ones, links to folders and folders left out are passed over."""

    def fail(error: OSError) -> None:
        raise UserError(f"cannot read the folder {error.filename}: {error.strerror}") from error

    skipped = frozenset(left_out)
    for directory, folders, names in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in skipped]
        yield from (Path(directory, name) for name in names if not name.startswith(".") and name.lower().endswith(suffixes))


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


def _read(path: Path) -> bytes:
    with _readable(path):
        return path.read_bytes()


def _hash(path: Path) -> str:
    with _readable(path):
        return sha256_of(path)


def _decode(data: bytes, path: Path, encoding: str, errors: str) -> str:
    """The file's text without its byte-order mark: decoding bytes at once leaves every newline as it is."""
    if encoding.lower().replace("_", "-") == "utf-8-sig":  # whose offsets in errors do not count the mark
        encoding = "utf-8"
    try:
        return data.decode(encoding, errors).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not valid {encoding}: byte 0x{error.object[error.start]:02x} at offset {error.start} ({error.reason});\n"
            "name its encoding with --encoding (latin-1, cp1252, utf-16, ...), or go on with --errors replace (or ignore)"
        ) from None


# ---------------------------------------------------------------------------------------------------------- shakespeare

SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


@dataclass(frozen=True)
class Shakespeare:
    """tinyshakespeare, 1,115,394 characters of his plays (Karpathy, 2015): downloaded once, then read from the cache."""

    name: str = "shakespeare"
    location: str = "shakespeare"

    def documents(self, encoding: str = "utf-8", errors: str = "strict") -> Iterator[Document]:
        path = cache_directory() / "downloads" / "tinyshakespeare.txt"
        manual = (
            f"Without network: get that file on another machine and put it at {path}, or name it, or any other text, with --data FILE; "
            "--data python-docs needs no download"
        )
        download(SHAKESPEARE_URL, path, SHAKESPEARE_SHA256, what="shakespeare", manual=manual)
        yield Document(_decode(_read(path), path, "utf-8", "strict"), SHAKESPEARE_URL)

    def identity(self) -> dict[str, Any]:
        return {"sha256": SHAKESPEARE_SHA256}

    def is_unchanged(self, recorded: Mapping[str, Any]) -> bool:
        return recorded == self.identity()


# ---------------------------------------------------------------------------------------------------------- python-docs


@dataclass(frozen=True)
class PythonDocs:
    """The English of the running Python's own documentation: about a megabyte that is always there.

    `pydoc_data.topics` (the text behind `help("yield")`) and the docstrings of the standard library, cleaned for a small
    character model: paragraphs of prose only, each once and on one line, in 78 different characters. The documents are in the
    order of their hashes, so that the end of the text, which is kept for validation, is a fair sample of it all.
    """

    name: str = "python-docs"
    location: str = "python-docs"

    def documents(self, encoding: str = "utf-8", errors: str = "strict") -> Iterator[Document]:
        seen: set[str] = set()
        texts = []
        for raw in (*_topics(), *_docstrings()):
            paragraphs = [paragraph for paragraph in dict.fromkeys(_prose_of(raw)) if paragraph not in seen]
            seen.update(paragraphs)
            text = "\n\n".join(paragraphs)
            if len(text) >= _SHORTEST_DOCUMENT:
                texts.append(text)
        for text in sorted(texts, key=lambda text: hashlib.sha256(text.encode()).digest()):
            yield Document(text, self.name)

    def identity(self) -> dict[str, Any]:
        # This file's own hash stands for the rules of cleaning.
        return {"python": sys.version, "rules": sha256_of(Path(__file__))}

    def is_unchanged(self, recorded: Mapping[str, Any]) -> bool:
        return recorded == self.identity()


_SHORTEST_DOCUMENT = 80
# Tests and tools within the standard library, and folders that are no part of it, or say nothing.
_NOT_LIBRARY = ["__pycache__", "dist-packages", "ensurepip", "idlelib", "lib-dynload", "lib2to3", "pydoc_data", "site-packages"]
_NOT_LIBRARY += ["test", "tests", "turtledemo", "_pyrepl", "distutils", "encodings"]
_FUNCTION_WORDS = frozenset(
    re.findall(
        r"\w+",
        "a all also an and any are as at be been but by can cannot do does each either for from has have if in into is it its may "
        "more must no not of on one only or other over same should so some such than that the their them then there these they this "
        "to until up use used was were when where which while will with within without would you your",
    )
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


def _topics() -> list[str]:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise UserError(
            "this Python comes without its documentation (pydoc_data is missing: some Linux packages split it off), so there is no "
            "python-docs;\ninstall the full Python (apt-get install libpython3-stdlib), or give --data FILE"
        ) from None
    return [topics[name] for name in sorted(topics)]


def _docstrings() -> Iterator[str]:
    """The docstrings of the standard library in the order of its files, which are parsed and never run."""
    library = Path(sysconfig.get_path("stdlib"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old escapes in the library's strings are not ours to mend
        for path in sorted(_files_below(library, (".py",), _NOT_LIBRARY)) if library.is_dir() else ():
            try:
                tree = ast.parse(_read(path))
            except (SyntaxError, ValueError):  # templates that are no Python
                continue
            yield from _docstrings_in(tree)


def _docstrings_in(tree: ast.Module) -> Iterator[str]:
    # Statements only: `ast.walk` would visit every expression, and take four times as long.
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
    text = raw.translate(_STRAIGHT)
    for block in _BREAK.split(text):
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
        len(words) >= 8 and common >= 0.25 * len(words) and letters >= 0.9 * len(paragraph) and _PLAIN_TEXT.fullmatch(paragraph) is not None
    )


# --------------------------------------------------------------------------------------------------------------- lookup

REGISTERED: Mapping[str, Source] = {source.name: source for source in (PythonDocs(), Shakespeare())}


def absolute_source(source: str) -> str:
    """The same source by a name that holds from any working directory. Raises `UserError` as `resolve` does."""
    found = resolve(source)
    return str(found.directory) if isinstance(found, PreparedDataset) else found.location


def resolve(source: str) -> Source | PreparedDataset:
    """What a source's string stands for: a registered name first, else a path. Raises `UserError` where it is neither."""
    if source in REGISTERED:
        return REGISTERED[source]
    path = user_path(source)
    choices = f"a source is a text file, a folder of .txt and .md files, a prepared dataset, or one of: {', '.join(REGISTERED)}"
    if not source:
        raise UserError(f"no text is named: give --data SOURCE;\n{choices}")
    try:
        mode = path.stat().st_mode if source.strip() else None
    except (FileNotFoundError, NotADirectoryError):
        mode = None
    except OSError as error:
        raise UserError(f"cannot read {source[:200]!r}: {error.strerror};\n{choices}") from error
    if mode is None:
        raise UserError(f"there is no file, folder or registered source {source!r}{did_you_mean(source, REGISTERED)};\n{choices}")
    if stat.S_ISDIR(mode):
        return PreparedDataset(path.resolve()) if read_manifest(path) is not None else TextFiles(path.resolve())
    if not stat.S_ISREG(mode):
        raise UserError(f"{source} is neither a regular file nor a folder;\n{choices}")
    return TextFiles(path.resolve())
