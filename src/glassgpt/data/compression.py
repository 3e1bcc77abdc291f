"""The bytes of a file, plain or compressed (.gz, .bz2, .zst), by pieces: nobody holds all of them.

Where the standard library would take a damaged or cut file for one that ends early, it is refused: lost text would go unseen.
"""

import bz2
import gzip
import sys
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from glassgpt.utils.errors import UserError
from glassgpt.utils.files import readable

COMPRESSIONS = (".gz", ".zst", ".bz2")
"""The ends of the names of compressed files."""

_CHUNK = 1 << 20  # bytes read at once, and decompressed at once whatever the ratio


def compression_of(name: str) -> str:
    """The suffix that tells how a file is compressed; empty for a plain one."""
    return next((suffix for suffix in COMPRESSIONS if name.lower().endswith(suffix)), "")


def chunks(path: Path, name: str) -> Iterator[bytes]:
    """The file's bytes, decompressed as `name` says, which is what errors call the file; no chunk is empty.

    Raises `UserError` for a file that cannot be read, is damaged or cut off.
    """
    compression = compression_of(name)
    with readable(name), open(path, "rb") as raw:
        if not compression:
            yield from iter(partial(raw.read, _CHUNK), b"")
            return
        try:
            if not raw.peek(1):  # no text at all takes some bytes too
                raise EOFError
            yield from _decompressed(raw, compression)
        except EOFError:
            raise UserError(
                f"{name} is cut off: the compressed data goes on after its {raw.tell():,} bytes; get the file anew"
            ) from None
        except _DamagedError as error:
            place = f"within its first {raw.tell():,} bytes"
            raise UserError(
                f"{name} is damaged, or no {compression} file: {error} ({place}); get the file anew"
            ) from error


class _DamagedError(Exception):
    """Compressed data that cannot be decompressed."""


def _decompressed(raw: BinaryIO, compression: str) -> Iterator[bytes]:
    """Raises `EOFError` where the data ends too early, and `_DamagedError`."""
    if compression == ".gz":
        try:
            yield from iter(partial(gzip.GzipFile(fileobj=raw).read, _CHUNK), b"")
        except (gzip.BadGzipFile, zlib.error) as error:
            raise _DamagedError(str(error)) from error
    elif compression == ".bz2":
        # Not bz2.open, which takes a member with a damaged beginning, and all after it, for the end of the file.
        yield from _members(raw, bz2.BZ2Decompressor, OSError)
    else:
        zstd = _zstd()
        # The default refuses what `zstd --long=31` made, as some dumps are; only such files take that much memory.
        options = {zstd.DecompressionParameter.window_log_max: 31}
        yield from _members(raw, lambda: zstd.ZstdDecompressor(options=options), zstd.ZstdError)


def _members(raw: BinaryIO, new: Callable[[], bz2.BZ2Decompressor], broken: type[Exception]) -> Iterator[bytes]:
    """The content of compressed members one after the other, as parallel compressors and `cat` make them.

    `new` makes a decompressor of one member, of `bz2` or of `zstd`, which has the same methods.
    """
    member, data, begun = new(), b"", False
    while True:
        if not data and member.needs_input:
            data = raw.read(_CHUNK >> 3)
            if not data and begun:
                raise EOFError
            if not data:
                return
        begun = True
        try:
            content = member.decompress(data, _CHUNK)
        except broken as error:
            raise _DamagedError(str(error)) from error
        data = b""
        if member.eof:
            member, data, begun = new(), member.unused_data, False
        if content:
            yield content


def _zstd() -> Any:
    """Python's own module, from 3.14 on, or its backport. (The package `zstandard` takes a file that is cut off for whole.)"""
    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        try:
            from backports import zstd
        except ImportError:
            raise UserError("reading .zst needs backports.zstd: pip install 'glassgpt[data]'") from None
    return zstd
