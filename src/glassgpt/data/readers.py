"""Read documents from a file: plain text, never held whole, or JSON lines, CSV or parquet, one document at a time."""

import csv
import io
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple, cast

from glassgpt.config.schema import ReadingConfig
from glassgpt.data.rows import NAME_COLUMN, BadRow, index_of, lacks
from glassgpt.data.text_files import between, compression_of, most_expanded, read_text, split_text
from glassgpt.utils.content import COMPRESSIONS, HEAD_BYTES, WEB_PAGE, require_text
from glassgpt.utils.errors import UserError
from glassgpt.utils.files import open_regular, readable
from glassgpt.utils.formatting import format_bytes

_JSON_LINES = (".jsonl", ".json", ".ndjson")  # C4 is published as .json.gz
_SEPARATED = (".csv", ".tsv")
_COMPRESSIBLE = (".txt", ".md", *_JSON_LINES, *_SEPARATED)
SUFFIXES = (*_COMPRESSIBLE, ".parquet", *(inner + outer for inner in _COMPRESSIBLE for outer in COMPRESSIONS))
"""Suffixes of the files that are read from a folder; `name.lower().endswith(SUFFIXES)`."""

PART_CHARACTERS = 1 << 22
"""The longest text returned at once. Longer documents come in parts."""

_TEXT_OVERHEAD = 256  # bytes that a text of a batch takes besides its characters, in Python and NumPy
# Characters in a line of JSON or a field of CSV. A longer one is hardly what its name says, and would fill the memory.
_LONGEST_LINE = 1 << 28
_LONGEST_HEADER = 1 << 16
_HEAD = 1 << 16  # bytes of a file that are read before the work begins
_PARQUET_BATCH = 1 << 24  # bytes of text in a batch of rows
# Stands between the lines of JSON that are decoded at once. As a constant of JSON, it has no other spelling.
_BETWEEN, _MARK = "-Infinity", object()
_decode_lines = json.JSONDecoder(parse_constant={_BETWEEN: _MARK}.get).decode
_SPECIAL = re.compile(r"<\|\w+\|>|</s>")  # special tokens of GPT-2, chat models (<|im_start|>) and Llama


class Part(NamedTuple):
    """A document, or a part of a document that is longer than `PART_CHARACTERS`."""

    text: str
    row: int  # number of the document in its file from 0; skipped rows count too
    starts: bool  # whether the document starts with this part


class Batch(NamedTuple):
    """Consecutive documents of some files, or (`starts` false) a further part of the last one before."""

    texts: list[str]
    places: list[tuple[int, int]]  # of each text: the number of its file, and its row as in `Part`
    starts: bool


@dataclass
class Counts:
    """What was read, and what was left out."""

    documents: int = 0  # with text, duplicates included
    blank: int = 0  # empty or only white space
    bad: int = 0  # rows without text that were skipped
    first_bad: str = ""  # the place of the first one, and the reason
    duplicates: int = 0
    special_tokens: int = 0  # occurrences of special tokens, which are encoded as any other text
    web_pages: int = 0  # files of text that begin as HTML does


def read_documents(
    path: Path, options: ReadingConfig, *, name: str | None = None, counts: Counts | None = None
) -> Iterator[Part]:
    """Yield the documents of a file that are not blank, in order, and count them.

    The suffix of `name` (default: the path) selects the format, plain text if it is unknown. Raises `UserError` with
    the name and the row, line or byte offset.
    """
    for batch in read_batches([(name or str(path), path)], options, counts or Counts()):
        for text, (_, row) in zip(batch.texts, batch.places, strict=True):
            yield Part(text, row, batch.starts)


def read_batches(files: Iterable[tuple[str, Path]], options: ReadingConfig, counts: Counts) -> Iterator[Batch]:
    """Yield the documents of files, given by name and path, as `read_documents` does, in batches of limited size."""
    merged, size = Batch([], [], True), 0
    try:
        for file, (name, path) in enumerate(files):
            for batch in _file_batches(file, path, name, options, counts):
                # Looking for a single character first takes a tenth of the time.
                tagged = (text for text in batch.texts if "<" in text and ("<|" in text or "</s>" in text))
                counts.special_tokens += sum(len(_SPECIAL.findall(text)) for text in tagged)
                if merged.texts and (size >= PART_CHARACTERS or not batch.starts):
                    yield merged
                    merged, size = Batch([], [], True), 0
                if batch.starts:
                    merged.texts.extend(batch.texts)
                    merged.places.extend(batch.places)
                    size += sum(map(len, batch.texts)) + _TEXT_OVERHEAD * len(batch.texts)
                else:
                    yield batch
    except UserError:
        if merged.texts:  # what was read before the error
            yield merged
        raise
    if merged.texts:
        yield merged


def _file_batches(file: int, path: Path, name: str, options: ReadingConfig, counts: Counts) -> Iterator[Batch]:
    """The documents of a file. Short ones need little Python each: for them, most of the time goes into this module."""
    first_row, has_text = 0, False
    for block in _blocks(path, name, options, counts):
        places = list(zip(itertools.repeat(file), range(first_row, first_row + len(block)), strict=False))
        first_row, start = first_row + len(block), 0
        others = [
            i
            for i, row in enumerate(block)
            if not isinstance(row, str) or len(row) > PART_CHARACTERS or not row or row.isspace()
        ]
        for i in (*others, len(block)):
            if i > start:
                has_text = True
                counts.documents += i - start
                yield Batch(cast(list[str], block[start:i]), places[start:i], True)
            start = i + 1
            if i == len(block):
                break
            if not isinstance(row := block[i], BadRow):
                has_text = True
                yield from _in_parts(row, places[i], counts)
            elif options.skip_bad and row.can_be_skipped:
                counts.bad += 1
                counts.first_bad = counts.first_bad or f"{row.place}: {row.reason}"
            else:
                raise row.error(name, is_first=not has_text)


def require_head(path: Path, name: str, size: int, options: ReadingConfig) -> None:
    """Raise `UserError` for a file of `size` bytes whose first rows cannot be read. A small one is read to its end."""
    is_whole = not compression_of(name) and size <= _HEAD
    has_text = False
    for block in itertools.islice(_blocks(path, name, options, Counts(), _HEAD), None if is_whole else 1):
        for row in block:
            if isinstance(row, BadRow) and not (options.skip_bad and row.can_be_skipped):
                raise row.error(name, is_first=not has_text)
            has_text = has_text or (isinstance(row, str) and bool(row.strip()))


def _in_parts(text: str | Iterable[str], place: tuple[int, int], counts: Counts) -> Iterator[Batch]:
    """A document that is long, blank, or comes in pieces: none if it is blank, otherwise its parts."""
    parts = split_text([text] if isinstance(text, str) else text, PART_CHARACTERS)
    head = [next(parts)]
    if not head[0].strip():
        head += itertools.islice(parts, 1)
        if len(head) == 1:
            counts.blank += 1
            return
    counts.documents += 1
    for number, part in enumerate(itertools.chain(head, parts)):
        yield Batch([part], [place], number == 0)


def _blocks(
    path: Path, name: str, options: ReadingConfig, counts: Counts, chunk: int | None = None
) -> Iterator[Sequence[str | BadRow | Iterable[str]]]:
    """Consecutive rows of a file in lists. Rows of plain text come in pieces, to be read before the next row."""
    compression = compression_of(name)
    plain_name = name.lower().removesuffix(compression)
    pieces = read_text(path, name, options.encoding, options.errors, chunk)
    if plain_name.endswith(_JSON_LINES):
        yield from _jsonl_rows(pieces, name, options.column)
    elif plain_name.endswith(_SEPARATED):
        delimiters = (options.delimiter or ("\t,;|" if plain_name.endswith(".tsv") else ",\t;|")).replace("\\t", "\t")
        rows = _csv_rows(pieces, name, options.column, delimiters)
        yield from iter(lambda: list(itertools.islice(rows, 64)), [])  # an error may come some rows earlier
    elif not plain_name.endswith(".parquet"):
        first = next(pieces, "")
        counts.web_pages += WEB_PAGE.match(first) is not None
        pieces = itertools.chain([first], pieces)
        texts = ((0, piece) for piece in pieces) if options.split_on is None else between(pieces, options.split_on)
        for _, group in itertools.groupby(texts, lambda each: each[0]):
            yield [(text for _, text in group)]
    elif compression:
        raise UserError(f"{name} is a compressed parquet file, which cannot be read in pieces: decompress it first")
    else:
        yield from _parquet_rows(path, name, options.column)


def _lines(pieces: Iterable[str], name: str) -> Iterator[str]:
    """The text in blocks that end with a newline, except for the last."""
    text = ""
    for piece in pieces:
        if end := piece.rfind("\n") + 1:
            yield text + piece[:end]
            text = ""
        text += piece[end:]
        if len(text) > _LONGEST_LINE:
            raise UserError(f"{name} has a line of more than {_LONGEST_LINE:,} characters: not JSON lines or CSV")
    if text:
        yield text


def _jsonl_rows(pieces: Iterable[str], name: str, key: str) -> Iterator[list[str | BadRow]]:
    """The text of each line that is not blank, in lists."""
    line, is_first = 1, True
    for block in _lines(pieces, name):
        rows = _plain_json_texts(block, key)
        if rows is None:
            rows = []
            # Not splitlines: JSON strings may contain other line separators.
            for number, content in enumerate(block.replace("\r\n", "\n").split("\n"), line):
                if not content or content.isspace():
                    continue
                if is_first and content.lstrip().startswith("["):
                    raise UserError(f"{name} is a JSON array; convert it to JSON lines: jq -c '.[]' FILE")
                is_first = False
                rows.append(_json_text(content, f"line {number}", key))
        is_first = is_first and not rows
        line += block.count("\n")
        yield rows


def _plain_json_texts(block: str, key: str) -> list[str | BadRow] | None:
    """The texts of lines of JSON, decoded as one array in a quarter of the time; None if one line is not plain."""
    content = block.removesuffix("\n")
    if _BETWEEN in content:
        return None
    try:
        values = _decode_lines("[" + content.replace("\n", f",{_BETWEEN},") + "]")
        rows: list[str | BadRow] = [record[key] for record in values[::2]]
        "".join(cast(list[str], rows)).encode()  # raises an error for what is not text, or half a surrogate pair
    except (ValueError, TypeError, LookupError, RecursionError):
        return None
    # All marks are in this array, none within a value: each line is one value.
    return rows if values[1::2] == [_MARK] * content.count("\n") else None


def _json_text(content: str, place: str, key: str) -> str | BadRow:
    """The text of one line of JSON."""
    try:
        record = json.loads(content)
    except json.JSONDecodeError as error:
        return BadRow(place, f"invalid JSON ({error.msg}, column {error.colno})")
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; deeply nested lists
        return BadRow(place, f"unreadable JSON ({error})")
    if not isinstance(record, dict):
        return BadRow(place, f"{_json_type(record)} instead of an object such as {{{json.dumps(key)}: ...}}")
    if key not in record:
        return BadRow(place, lacks(key, list(record)), lacks_column=True)
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
    names = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list"}
    return names.get(type(value), "an object")


def _csv_rows(pieces: Iterable[str], name: str, column: str, delimiters: str) -> Iterator[str | BadRow]:
    """The column's text in each record after the header, blank lines left out. Raises `UserError` for a bad header.

    The delimiter is the first one with which the header has the column.
    """
    csv.field_size_limit(_LONGEST_LINE)  # a process-wide limit: 131,072 characters unless somebody raises it
    blocks = _lines(pieces, name)
    first = next(blocks, "")
    starts = {each: csv.reader(io.StringIO(first[:_LONGEST_HEADER], newline=""), delimiter=each) for each in delimiters}
    headers = {delimiter: next(filter(None, start), []) for delimiter, start in starts.items()}
    fallback = max(delimiters, key=lambda delimiter: len(headers[delimiter]))
    delimiter = next((delimiter for delimiter in delimiters if column in headers[delimiter]), fallback)
    before, lines = 0, list[str]()  # the lines of the block that is being read, and the number of those before it

    def lines_of(block: str) -> list[str]:
        nonlocal before, lines
        before, lines = before + len(lines), list(io.StringIO(block, newline=""))
        return lines

    all_lines = itertools.chain.from_iterable(map(lines_of, itertools.chain([first], blocks)))
    # Strict: otherwise an unclosed quote silently makes the rest of the file one field.
    reader = csv.reader(all_lines, strict=True, delimiter=delimiter)
    header: list[str] = []
    index = 0
    while True:
        line = reader.line_num + 1
        try:
            record = next(reader, None)
        except csv.Error as error:
            reason = "unclosed quote" if "unexpected end of data" in str(error) else f"invalid CSV ({error})"
            if '\\"' in lines[reader.line_num - before - 1]:
                reason += '; CSV doubles quotes, "" instead of \\"'
            yield BadRow(f"line {line}", reason, can_be_skipped=False)
            return
        if record == []:
            continue
        if not header:
            header = record or []  # an empty file has no record
            index = index_of(column, header, f"the header of {name}")
        elif record is None:
            return
        elif len(record) != len(header):
            own = "".join(lines[max(0, line - 1 - before) : reader.line_num - before])
            is_doubtful = line <= before or _has_doubtful_quotes(own, delimiter)
            reason = f"{len(record)} fields instead of the header's {len(header)}"
            yield BadRow(f"line {line}", reason + ", and doubtful quotes" * is_doubtful, can_be_skipped=not is_doubtful)
        else:
            yield record[index]


def _has_doubtful_quotes(record: str, delimiter: str) -> bool:
    """Whether a record may end in a later line: not all quotes are in pairs, or one may be a part of the text."""
    return record.count('"') % 2 == 1 or re.search(rf'\\"|"{re.escape(delimiter)}\s', record) is not None


def _parquet_rows(path: Path, name: str, column: str) -> Iterator[list[str | BadRow]]:
    """Texts of the rows, in lists. Raises `UserError` for a damaged file, or a column that is missing or not text."""
    try:
        from pyarrow import parquet, types
    except ImportError:
        raise UserError(f"reading {name} needs pyarrow: pip install 'glassgpt[data]'") from None
    with readable(name), open_regular(path) as file:  # Arrow's own errors for a missing or unreadable file are long
        head = file.read(HEAD_BYTES)
        most = most_expanded(file)
    if not head.startswith(b"PAR1"):
        require_text(head, name)  # names what it is
    with _explain_damage(name, "its footer"):
        # Without a buffer size, the column of a whole row group is in memory: 412 instead of 134 MB for one of 300 MB.
        opened = partial(parquet.ParquetFile, path, pre_buffer=False, buffer_size=1 << 20)
        table = opened(page_checksum_verification=True)
    kind = table.schema_arrow.field(index_of(column, table.schema_arrow.names, name)).type
    plain = kind.value_type if types.is_dictionary(kind) else kind
    if not (types.is_string(plain) or types.is_large_string(plain) or types.is_string_view(plain)):
        raise UserError(f"column {column!r} of {name} holds {kind}, not text; {NAME_COLUMN}")
    row = 0
    with table, opened(read_dictionary=[column], metadata=table.metadata) as dictionaries:
        for group in range(table.num_row_groups):
            with _explain_damage(name, f"row group {group}"):
                metadata = table.metadata.row_group(group)
                if metadata.total_byte_size > min(most, _LONGEST_LINE * max(1, metadata.num_rows)):
                    amount = f"{format_bytes(metadata.total_byte_size)} in {metadata.num_rows:,} rows"
                    raise UserError(f"{name}: row group {group} expands to {amount}, more than a text can need")
                # By bytes, as 1,000 rows may be a megabyte or a gigabyte. Bytes of all columns, since Arrow ends the
                # process (std::terminate) when asked for the bytes of one column in some damaged files.
                fitting = _PARQUET_BATCH * metadata.num_rows // max(1, metadata.total_byte_size)
                safe = _LONGEST_LINE // max(1, metadata.total_byte_size)  # if the longest text is in every row
                rows, wanted = min(max(1, fitting), 1024), {"row_groups": [group], "columns": [column]}
                if safe >= 32:
                    rows = min(rows, safe)
                else:  # so few rows at once would be slow: see how long the texts in the group's dictionary are
                    for batch in itertools.islice(dictionaries.iter_batches(1, use_threads=False, **wanted), 1):
                        texts = getattr(batch.column(0), "dictionary", batch.column(0)).to_pylist()
                        rows = max(1, min(rows, _PARQUET_BATCH // max([1, *map(len, filter(None, texts))])))
                for batch in table.iter_batches(rows, use_threads=False, **wanted):
                    texts = batch.column(0).to_pylist()
                    for i in (i for i in range(len(texts) if None in texts else 0) if texts[i] is None):
                        texts[i] = BadRow(f"row {row + i} (counted from 0)", f"{column!r} is null, not text")
                    yield texts
                    row += len(texts)
        if row != (count := table.metadata.num_rows):  # the footer has no checksum
            raise UserError(f"{name} is damaged: it has {row:,} rows instead of {count:,}; get it again")


@contextmanager
def _explain_damage(name: str, place: str) -> Iterator[None]:
    """Turn Arrow's errors for damaged data into a `UserError`; it has several classes for them, `OSError` included."""
    from pyarrow import ArrowException

    try:
        yield
    except (ArrowException, OSError, UnicodeDecodeError) as error:
        problem = f"{place} cannot be read ({' '.join(str(error).split())[:300]})"
        raise UserError(f"{name} is damaged, or not a parquet file: {problem}; get it again") from error
