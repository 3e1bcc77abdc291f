"""The rows of JSON lines and of CSV, from the pieces of text in which a file comes."""

import csv
import io
import itertools
import json
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from glassgpt.utils.errors import UserError, did_you_mean

# Characters in one line of JSON or one field of CSV: beyond, the file is hardly what its name says, and would fill the memory.
_LONGEST_LINE = 1 << 28


class BadRow(NamedTuple):
    """A row that holds no text."""

    place: str
    """Where it is in the file."""
    reason: str


def missing(column: str, columns: Iterable[str]) -> str:
    """What is said where a column is not among those there."""
    columns = list(columns)
    listed = ", ".join(map(repr, columns[:20])) + (", ..." if len(columns) > 20 else "")
    return f"has no {column!r}{did_you_mean(column, columns)} (it has {listed or 'nothing'})"


def _blocks(pieces: Iterable[str], name: str) -> Iterator[str]:
    """The text in blocks that end with a newline, but for the last."""
    held: list[str] = []
    size = 0
    for piece in pieces:
        end = piece.rfind("\n") + 1
        if end:
            yield "".join([*held, piece[:end]])
            held, size = [], 0
        held.append(piece[end:])
        size += len(piece) - end
        if size > _LONGEST_LINE:
            raise UserError(f"{name} has a line of more than {_LONGEST_LINE:,} characters: is it what its name says?")
    if rest := "".join(held):
        yield rest


# ----------------------------------------------------------------------------------------------------------- JSON lines


def jsonl_rows(pieces: Iterable[str], name: str, key: str) -> Iterator[str | BadRow]:
    """The text under the key in each line that is not blank. Raises `UserError` for a file that is no JSON lines at all."""
    line = 0
    for block in _blocks(_no_array(pieces, name), name):
        # Not splitlines: within a string, JSON may have other line separators as they are.
        for content in block.removesuffix("\n").split("\n"):
            line += 1
            if content and not content.isspace():
                yield _text_of(content, f"line {line}", key)


def _no_array(pieces: Iterable[str], name: str) -> Iterator[str]:
    """The same pieces. The other form of a .json file is told by its beginning, since it may be one line of gigabytes."""
    begun = False
    for piece in pieces:
        if not begun and (start := piece.lstrip()):
            begun = True
            if start.startswith("["):
                raise UserError(
                    f"{name} is a JSON array; give one object a line (JSON lines), as `jq -c '.[]'` writes them"
                )
        yield piece


def _text_of(content: str, place: str, key: str) -> str | BadRow:
    """The text of one line of JSON."""
    try:
        record = json.loads(content)
    except json.JSONDecodeError as error:
        return BadRow(place, f"no valid JSON ({error.msg}, column {error.colno})")
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; lists within lists
        return BadRow(place, f"no JSON that can be read ({error})")
    if not isinstance(record, dict):
        return BadRow(place, f"{_json_type(record)} instead of an object such as {{{json.dumps(key)}: ...}}")
    if key not in record:
        return BadRow(place, missing(key, record))
    text = record[key]
    if not isinstance(text, str):
        return BadRow(place, f"{key!r} is {_json_type(text)}, not text")
    if "\\u" in content:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            half = f"\\u{ord(text[error.start]):04x}"
            return BadRow(place, f"{key!r} has half a surrogate pair, {half}, and is not valid Unicode")
    return text


def _json_type(value: object) -> str:
    names = {
        type(None): "null",
        bool: "true or false",
        int: "a number",
        float: "a number",
        str: "a string",
        list: "a list",
    }
    return names.get(type(value), "an object")


# ------------------------------------------------------------------------------------------------------------------ CSV


def csv_rows(pieces: Iterable[str], name: str, column: str) -> Iterator[str | BadRow]:
    """The column's text in each record after the header; blank lines are no records. Raises `UserError` for a bad header."""
    csv.field_size_limit(_LONGEST_LINE)  # one for the whole process: 131,072 characters unless somebody raises it
    lines = itertools.chain.from_iterable(io.StringIO(block, newline="") for block in _blocks(pieces, name))
    # Strict: else a quote that is not closed makes one field of the rest of the file, without a word.
    records = _csv_records(csv.reader(lines, strict=True))
    place, header = next(records, ("line 1", []))
    if isinstance(header, BadRow):
        raise UserError(f"{name}, {place}: {header.reason}")
    if column not in header:
        raise UserError(f"the header of {name} {missing(column, header)}; name the column of the text with --column")
    if header.count(column) > 1:
        raise UserError(f"the header of {name} has {column!r} {header.count(column)} times: rename all but one")
    index = header.index(column)
    for place, record in records:
        if isinstance(record, BadRow) and "unexpected end of data" in record.reason:
            # No row to leave out: from there on all rows are within the quotes.
            raise UserError(
                f"{name}, {place}: a quote that is not closed, so nothing after it can be told apart; close it"
            )
        if isinstance(record, BadRow):
            yield record
        elif len(record) != len(header):
            yield BadRow(place, f"{len(record)} fields where the header has {len(header)}")
        else:
            yield record[index]


def _csv_records(reader: Any) -> Iterator[tuple[str, list[str] | BadRow]]:
    """Each record, or what is wrong with it, with the place where it begins."""
    while True:
        place = f"line {reader.line_num + 1}"
        try:
            record = next(reader, None)
        except csv.Error as error:
            yield place, BadRow(place, f"no valid CSV ({error})")
            continue
        if record is None:
            return
        if record:
            yield place, record
