"""From one file to a stream of documents: text, JSON lines, CSV and parquet, plain or compressed, in little memory.

A file is read by pieces, and a document comes in parts of at most `PART_CHARACTERS`, so memory depends neither on the size of
the file nor, but for JSON lines, CSV and parquet, which give a text whole, on that of a document.
"""

import codecs
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from glassgpt.config.schema import TextConfig
from glassgpt.data.chunking import cut
from glassgpt.data.compression import COMPRESSIONS, chunks, compression_of
from glassgpt.data.rows import BadRow, csv_rows, jsonl_rows
from glassgpt.utils.errors import UserError

_JSON_LINES = (".jsonl", ".json", ".ndjson")  # C4 is published as .json.gz
_COMPRESSIBLE = (".txt", ".md", *_JSON_LINES, ".csv")
SUFFIXES = (*_COMPRESSIBLE, ".parquet", *(inner + outer for inner in _COMPRESSIBLE for outer in COMPRESSIONS))
"""The ends of the names of files that a folder is searched for; `name.lower().endswith(SUFFIXES)`."""

PART_CHARACTERS = 1 << 22
"""The longest text given at once. Longer documents come in parts."""


@dataclass(frozen=True)
class ReadOptions:
    """How files are read; plain, so that it can go to another process."""

    column: str = "text"
    """Column of .parquet and .csv files, or key of JSON lines, that holds the text."""
    encoding: str = "utf-8"
    """Encoding of text, .csv and JSON lines."""
    errors: Literal["strict", "replace", "ignore"] = "strict"
    """What to do with bytes that are not valid in the encoding."""
    skip_bad: bool = False
    """Leave out rows that hold no text (null, a number, broken JSON) instead of stopping there."""


def reading_of(data: TextConfig) -> ReadOptions:
    """How the files of a config's source are read."""
    return ReadOptions(column=data.column, encoding=data.encoding, errors=data.errors, skip_bad=data.skip_bad)


class Part(NamedTuple):
    """A document, or a part of one that is longer than `PART_CHARACTERS`."""

    text: str
    row: int
    """The document's number in its file from 0, rows left out included."""
    starts: bool
    """Whether the document begins here."""


def is_readable(name: str) -> bool:
    """Whether the name has one of the known suffixes."""
    return name.lower().endswith(SUFFIXES)


def read_parts(
    path: Path, options: ReadOptions, *, name: str | None = None, skipped: Callable[[int, str], None] | None = None
) -> Iterator[Part]:
    """The documents of a file, in its order. One of text is one document, of whatever suffix it is.

    `name` decides the format, and is what errors call the file: the path, unless given. `skipped` is called with the row and
    the reason for each row left out. Raises `UserError` that names the file, and the row, line or offset, for whatever is wrong.
    """
    name = name or str(path)
    rows = _rows(path, name, options)
    if rows is None:
        for number, part in enumerate(cut(_pieces(path, name, options), PART_CHARACTERS)):
            yield Part(part, 0, number == 0)
        return
    for row, text in enumerate(rows):
        if not isinstance(text, BadRow):
            for number, part in enumerate(cut([text], PART_CHARACTERS)):
                yield Part(part, row, number == 0)
        elif not options.skip_bad:
            raise UserError(f"{name}, {text.place}: {text.reason};\ncorrect it, or leave such rows out with --skip-bad")
        elif skipped is not None:
            skipped(row, f"{text.place}: {text.reason}")


def _rows(path: Path, name: str, options: ReadOptions) -> Iterator[str | BadRow] | None:
    """The rows of a file whose format has some; None for text, as which every other file is read."""
    compression = compression_of(name)
    plain_name = name.lower().removesuffix(compression)
    if plain_name.endswith(_JSON_LINES):
        return jsonl_rows(_pieces(path, name, options), name, options.column)
    if plain_name.endswith(".csv"):
        return csv_rows(_pieces(path, name, options), name, options.column)
    if not plain_name.endswith(".parquet"):
        return None
    if compression:
        raise UserError(f"{name} is compressed from outside, and parquet is read from its end: decompress it first")
    try:
        from glassgpt.data.parquet import parquet_rows
    except ImportError:
        raise UserError(f"reading {name} needs pyarrow: pip install 'glassgpt[data]'") from None
    return parquet_rows(path, name, options.column)


def _pieces(path: Path, name: str, options: ReadOptions) -> Iterator[str]:
    """The file's text by pieces, without its byte-order mark; every newline stays as it is. Raises `UserError`."""
    codec = codecs.lookup(options.encoding)
    decoder = codec.incrementaldecoder(options.errors)
    offset, begun = 0, False
    for chunk in itertools.chain(chunks(path, name), [b""]):
        try:
            text = decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            # What it decodes ends with this chunk, and may begin with bytes of the one before.
            where = offset + len(chunk) - len(error.object) + error.start
            raise UserError(
                f"{name} is not valid {codec.name}: byte 0x{error.object[error.start]:02x} at offset {where} ({error.reason});\n"
                "name its encoding with --encoding (latin-1, cp1252, utf-16, ...), or go on with --errors replace (or ignore)"
            ) from None
        except UnicodeError as error:  # utf-16 and utf-32 without the mark that tells the order of bytes
            raise UserError(
                f"{name} is not valid {codec.name} ({error}); name its encoding with --encoding (utf-16-le, ...)"
            ) from None
        offset += len(chunk)
        if text and not begun:
            text, begun = text.removeprefix("\ufeff"), True
        if text:
            yield text
