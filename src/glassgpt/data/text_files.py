"""The text of a file in pieces: decompressed (gzip, bzip2, zstd), decoded, and split where GPT-2 splits it anyway.

A file is never held whole. A damaged or truncated file is an error, also in the cases in which the standard library
would take it for a file that ends early: lost text would go unnoticed.
"""

import bz2
import codecs
import gzip
import importlib
import itertools
import os
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO

from glassgpt.utils.content import COMPRESSIONS, HEAD_BYTES, require_text
from glassgpt.utils.errors import UserError
from glassgpt.utils.files import open_regular, readable
from glassgpt.utils.formatting import format_bytes

_CHUNK = 1 << 20  # bytes read at once, and decompressed at once whatever the ratio
# Text that grows to more bytes than both is a mistake or an attack. Repetitive logs shrink by less than 100 times.
_MOST_EXPANDED, _MOST_EXPANSION = 1 << 30, 200


def compression_of(name: str) -> str:
    """The suffix of a compressed file, or an empty string."""
    return next((suffix for suffix in COMPRESSIONS if name.lower().endswith(suffix)), "")


def most_expanded(file: BinaryIO) -> int:
    """The bytes that a compressed file may expand to."""
    return max(_MOST_EXPANDED, _MOST_EXPANSION * os.fstat(file.fileno()).st_size)


def read_text(path: Path, name: str, encoding: str, errors: str, chunk: int | None = None) -> Iterator[str]:
    """Yield the file's text, decompressed, without its byte-order mark, at most `chunk` bytes at a time (a megabyte).

    Raises `UserError` for a file that cannot be read, is damaged or truncated, is not text, or not in this encoding.
    """
    codec = codecs.lookup(encoding)
    decoder = codec.incrementaldecoder(errors)
    offset, started = 0, False
    for data in itertools.chain(_text_bytes(path, name, codec.name, chunk or _CHUNK), [b""]):
        try:
            text = decoder.decode(data, final=not data)
        except UnicodeError as error:
            problem = str(error)  # utf-16 and utf-32 without a byte-order mark
            if isinstance(error, UnicodeDecodeError):
                # `error.object` ends with this chunk, and may begin with bytes of the chunk before.
                position = offset + len(data) - len(error.object) + error.start
                problem = f"byte 0x{error.object[error.start]:02x} at offset {position} ({error.reason})"
            advice = "set its --encoding (latin-1, cp1252, utf-16-le, ...), or --errors replace (or ignore)"
            raise UserError(f"{name} is not valid {codec.name}: {problem};\n{advice}") from None
        offset += len(data)
        if text and not started:
            text, started = text.removeprefix("\ufeff"), True
        if text:
            yield text


def _text_bytes(path: Path, name: str, encoding: str, most: int) -> Iterator[bytes]:
    """The file's bytes, decompressed. Raises `UserError` if they do not begin as text does."""
    with readable(name), open_regular(path) as raw:
        start = raw.peek(HEAD_BYTES)
        compression = next((suffix for suffix, magic in COMPRESSIONS.items() if re.match(magic, start)), None)
        compression = compression or compression_of(name)  # which a damaged file may only have in its name
        for number, chunk in enumerate(_decompressed(raw, compression, name, most)):
            if number == 0:
                require_text(chunk[:HEAD_BYTES], f"what {name} decompresses to" if compression else name, encoding)
            yield chunk


def _decompressed(raw: BufferedReader, compression: str, name: str, chunk_bytes: int) -> Iterator[bytes]:
    """The content of the file. No chunk is empty. Raises `UserError` for damage, and if it grows beyond all reason."""
    if not compression:
        while chunk := raw.read(chunk_bytes):  # None from a file of the kernel that has nothing now
            yield chunk
        return
    most, size = most_expanded(raw), 0
    try:
        if not raw.peek(1):  # even an empty text has some compressed bytes
            raise EOFError
        for chunk in _decompress(raw, compression, chunk_bytes):
            yield chunk
            size += len(chunk)
            if size > most:
                advice = "if all of that is text, decompress it first"
                raise UserError(f"{name} expands to more than {format_bytes(most)}; {advice}")
    except EOFError:
        problem = f"its compressed data does not end within its {raw.tell():,} bytes"
        raise UserError(f"{name} is truncated: {problem}; get it again") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        problem = f"{error} (within its first {raw.tell():,} bytes)"
        advice = f"get it again (if it is plain text, take {compression} off its name)"
        raise UserError(f"{name} is damaged, or not a {compression} file: {problem}; {advice}") from error


def _decompress(raw: BinaryIO, compression: str, most: int) -> Iterator[bytes]:
    """The content of the file's members. Raises `EOFError` if truncated, `zlib.error` or `BadGzipFile` if damaged."""
    if compression == ".gz":
        yield from iter(partial(gzip.GzipFile(fileobj=raw).read, most), b"")
        return
    # Not bz2.open: it takes a member with a damaged header, and all after it, for the end of the file.
    new_decompressor, damage = (bz2.BZ2Decompressor, OSError) if compression == ".bz2" else _zstd()
    data = raw.read(_CHUNK >> 3)
    while data:
        member = new_decompressor()
        while not member.eof:
            if member.needs_input and not data:
                data = raw.read(_CHUNK >> 3)
                if not data:
                    raise EOFError
            try:
                content = member.decompress(data, most)
            except damage as error:
                raise zlib.error(str(error)) from error
            data = b""
            if content:
                yield content
        data = member.unused_data or raw.read(_CHUNK >> 3)


def _zstd() -> tuple[Callable[[], Any], type[Exception]]:
    """Return a decompressor factory (methods as bz2's) and the exception for damaged data."""
    try:  # the backport of Python 3.14's module; the package `zstandard` accepts truncated files
        zstd: Any = importlib.import_module("compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd")
    except ImportError:
        raise UserError("reading .zst needs backports.zstd: pip install 'glassgpt[data]'") from None
    # The default refuses the window of `zstd --long=31`, which some published dumps use.
    options = {zstd.DecompressionParameter.window_log_max: 31}
    return partial(zstd.ZstdDecompressor, options=options), zstd.ZstdError


def between(pieces: Iterable[str], separator: str) -> Iterator[tuple[int, str]]:
    """The text between the separators, in pieces, each with the number of separators before it."""
    number, rest = 0, ""
    for piece in pieces:
        *complete, rest = (rest + piece).split(separator)
        for text in complete:
            yield number, text
            number += 1
        end = max(0, len(rest) - len(separator) + 1)  # the characters after it may begin a separator
        yield number, rest[:end]
        rest = rest[end:]
    yield number, rest


# White space as GPT-2's pattern means it by \s (Unicode's property); Python's \s has four control characters more.
_S = r"[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]"
_NOT_S = _S.replace("[", "[^")
# Where GPT-2 splits a text whatever stands around. Its pattern is
# '(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+ : words take at most one space before them, so
# white space always begins a new piece, the last of several is split off, and a single newline is a piece of its own.
# `.*` is greedy, so the match ends at the last such place.
_AFTER_NEWLINE = re.compile(rf"(?s:.*){_NOT_S}\n(?={_NOT_S})")
_BEFORE_SPACE = re.compile(rf"(?s:.*){_NOT_S}(?= {_NOT_S})")
_AT_WHITE_SPACE = re.compile(rf"(?s:.*)(?:{_NOT_S}(?={_S})|(?!\r\n){_S}(?={_S}{_NOT_S}))")


def split_text(pieces: Iterable[str], limit: int) -> Iterator[str]:
    """Split the joined pieces into parts of at most `limit` characters, at least one. They depend on the text alone."""
    text = ""
    for piece in pieces:
        text += piece
        start = 0
        while len(text) - start > limit:
            end = split_point(text, start, limit)
            yield text[start:end]
            start = end
        text = text[start:]
    yield text


def split_point(text: str, start: int, limit: int) -> int:
    """The end of the part that begins at `start`. It depends on the `limit` + 1 characters from there on alone."""
    half, end = start + limit // 2, start + limit
    # Most other tokenizers split at the first two as well. Neither is worth a part of less than half the limit.
    places = (_AFTER_NEWLINE, half), (_BEFORE_SPACE, half), (_AT_WHITE_SPACE, start)
    # All need both kinds of characters. Without this check, a file of one repeated character takes 20 times as long.
    is_mixed = all(re.compile(kind).search(text, start, end + 1) for kind in (_S, _NOT_S))
    for pattern, first in places if is_mixed else ():
        if match := pattern.match(text, first, end + 1):
            return match.end()
    return end - 1 if text[end - 1 : end + 1] == "\r\n" and limit > 1 else end
