"""The English of the running Python's own documentation: about a megabyte that is always there.

`pydoc_data.topics` (the text behind `help("yield")`) and the docstrings of the standard library, cleaned for a small character
model: paragraphs of prose only, each once and on one line, in 78 different characters.
"""

import ast
import hashlib
import re
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from glassgpt.utils.errors import UserError
from glassgpt.utils.files import files_below


def python_docs() -> list[str]:
    """The documents, in the order of their hashes, so that any part of them is a fair sample of all.

    Raises `UserError` where this Python has no documentation.
    """
    seen: set[str] = set()
    texts = []
    for raw in (*_topics(), *_docstrings()):
        paragraphs = [paragraph for paragraph in dict.fromkeys(_prose_of(raw)) if paragraph not in seen]
        seen.update(paragraphs)
        text = "\n\n".join(paragraphs)
        if len(text) >= _SHORTEST_DOCUMENT:
            texts.append(text)
    return sorted(texts, key=lambda text: hashlib.sha256(text.encode()).digest())


_SHORTEST_DOCUMENT = 80
# Tests and tools within the standard library, and folders that are no part of it, or say nothing.
_NOT_LIBRARY = [
    "__pycache__",
    "dist-packages",
    "ensurepip",
    "idlelib",
    "lib-dynload",
    "lib2to3",
    "pydoc_data",
    "site-packages",
]
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
        for path in (
            sorted(files_below(library, lambda name: name.endswith(".py"), _NOT_LIBRARY)) if library.is_dir() else ()
        ):
            try:
                tree = ast.parse(path.read_bytes())
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
        len(words) >= 8
        and common >= 0.25 * len(words)
        and letters >= 0.9 * len(paragraph)
        and _PLAIN_TEXT.fullmatch(paragraph) is not None
    )
