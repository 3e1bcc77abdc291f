"""The rows of a parquet file. It needs pyarrow, and is imported only where there is such a file."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import parquet, types

from glassgpt.data.rows import BadRow, missing
from glassgpt.utils.errors import UserError
from glassgpt.utils.files import readable

_BUFFER = 1 << 20  # bytes read at once
_BATCH_BYTES = 1 << 24  # text in a batch of rows


def parquet_rows(path: Path, name: str, column: str) -> Iterator[str | BadRow]:
    """The text of each row, in little memory. Errors call the file by its `name`.

    Raises `UserError` for a file that cannot be read or is damaged, and for a column that is not there or holds no text.
    """
    with readable(name):
        open(path, "rb").close()  # Arrow's errors for a file that is gone, or may not be read, are long ones
    with _sound(name, "its footer"):
        # Without a buffer's size, the column of a whole row group lies in memory: 412 instead of 134 MB for one of 300 MB.
        table = parquet.ParquetFile(path, pre_buffer=False, buffer_size=_BUFFER, page_checksum_verification=True)
        _check_column(table.schema_arrow, name, column)
    row = 0
    with table:
        for group in range(table.num_row_groups):
            with _sound(name, f"row group {group}"):
                for texts in _batches(table, group, column):
                    for number, text in enumerate(texts, row):
                        yield (
                            BadRow(f"row {number} (counted from 0)", f"{column!r} is null, not text")
                            if text is None
                            else text
                        )
                    row += len(texts)
        if row != table.metadata.num_rows:  # the footer has no checksum
            raise UserError(
                f"{name} is damaged: it has {row:,} rows, and not {table.metadata.num_rows:,}; get the file anew"
            )


def _batches(table: Any, group: int, column: str) -> Iterator[list[str | None]]:
    """The texts of a row group by batches that fit in memory."""
    metadata = table.metadata.row_group(group)
    # By bytes, as rows differ: a batch of 1,000 may be a megabyte or a gigabyte. Those of all columns, since Arrow ends the
    # process (std::terminate) when asked for those of one in some damaged files.
    fitting = _BATCH_BYTES * metadata.num_rows // max(1, metadata.total_byte_size)
    for batch in table.iter_batches(
        min(max(1, fitting), 1024), row_groups=[group], columns=[column], use_threads=False
    ):
        yield batch.column(0).to_pylist()


@contextmanager
def _sound(name: str, place: str) -> Iterator[None]:
    """Turn what Arrow says of damaged data into a `UserError`; it has several classes for that, OSError among them."""
    try:
        yield
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"{name} is damaged, or no parquet file: {place} cannot be read ({reason}); get the file anew"
        ) from error


def _check_column(schema: Any, name: str, column: str) -> None:
    """Refuse a file without the column, or one where it is no text."""
    if column not in schema.names:
        raise UserError(f"{name} {missing(column, schema.names)}; name the column of the text with --column")
    if schema.names.count(column) > 1:
        raise UserError(f"{name} has {schema.names.count(column)} columns {column!r}: rename all but one")
    kind = schema.field(schema.names.index(column)).type
    plain = kind.value_type if types.is_dictionary(kind) else kind
    if not (types.is_string(plain) or types.is_large_string(plain) or types.is_string_view(plain)):
        raise UserError(f"the column {column!r} of {name} holds {kind}, not text; name another with --column")
