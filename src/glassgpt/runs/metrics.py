"""The growing files of a run: `metrics.jsonl` and `samples.md`. This module is the only one that reads or writes them.

`metrics.jsonl` holds one JSON object per update (with `loss`) or evaluation (with `val_loss`); numbers that are not
finite are null. `samples.md` holds one section per step, `## Step 000500`, with `### Sample 1` and the text indented by
four spaces.

Readers leave a last line without its newline, which is still being written, and skip a line that is not a record. What
training did not write is kept in a copy when a resumed run cuts the logs back.
"""

import hashlib
import io
import itertools
import json
import math
import os
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from glassgpt.utils.files import (
    explain_os_errors,
    finite,
    open_regular,
    own_file,
    read_file,
    require_flat,
    unused_path,
    write_atomic,
)

Record = dict[str, Any]

EDITED_PREFIX = "edited-"  # of the copy of a log that was edited by hand
LINE, SECTION = b"\n", b"\n## Step "
MOST_LOG_BYTES = 1 << 31  # of a log that is shown: six million updates
MOST_RECORD_BYTES = 1 << 24  # a longer line of metrics is damaged, and a longer section of samples is not followed
_TABLES = ("grad_norms", "weight_norms", "val_losses")  # numbers by the name of a parameter group or of a text
_NUMBERS = frozenset(
    "loss lr grad_norm seconds tokens_per_second tokens_seen peak_share memory_bytes hellaswag_acc hellaswag_acc_norm "
    "hellaswag_items".split()
)
_CHECKED_BYTES = 256
_RECORD_START = '{"step": '  # of each line that training writes
_SAMPLES_STARTS = ("    ", "## Step ", "### Sample ")
_SAMPLES_TITLE = "# Samples\n"
_SAMPLE = r"### Sample [0-9]+\n\n((?:    .*\n)+)"
_SECTION = re.compile(rf"^## Step ([0-9]{{1,15}})\n(?:\n{_SAMPLE})*", re.MULTILINE)
# Markdown and Python end a line at a lone carriage return, too: the rest of a sample must not lose its indent there.
_LINE_END = re.compile(r"\r\n?|\n")


class MetricsWriter:
    """Appends records to `metrics.jsonl`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with explain_os_errors("write", path):
            self.file: IO[bytes] = open(path, "ab")  # noqa: SIM115

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record and hand it to the system, so that readers see it and a SIGKILL cannot lose it."""
        line = json.dumps(finite(record), allow_nan=False).encode() + b"\n"
        with explain_os_errors("write", self._path):
            self.file.write(line)
            self.file.flush()

    def sync(self) -> None:
        """Wait until all records are on the disk: a checkpoint relies on the records up to its step."""
        with explain_os_errors("write", self._path):
            os.fsync(self.file.fileno())

    def close(self) -> None:
        """Close the file. This retries a record that a full disk refused; `write` has already reported that."""
        with suppress(OSError):
            self.file.close()


def parse_metrics(data: bytes) -> Iterator[Record]:
    """Yield the records in complete lines."""
    yield from (record for _, _, record in _lines(data) if record is not None)


def _lines(data: bytes) -> Iterator[tuple[int, bytes, Record | None]]:
    """Yield each complete line that is not blank: its number from 1, itself, and its record, None if it is damaged."""
    for number, line in enumerate(io.BytesIO(data), 1):
        if line.endswith(b"\n") and line.strip():
            yield number, line, _record(line)


def _record(line: bytes) -> Record | None:
    """The record, or None if the line is not an object with a step, or has a value of a type that is never written.

    The page and the report compute with all known values. Unknown ones are kept as they are.
    """
    if len(line) > MOST_RECORD_BYTES:
        return None
    try:  # integers that do not fit into a float stay strings
        record = json.loads(line, parse_constant=lambda _: None, parse_int=lambda s: int(s) if len(s) < 300 else s)
        require_flat(record)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or type(step := record.get("step")) is not int or not 0 <= step <= 10**15:
        return None
    tables = [value for key in _TABLES if (value := record.get(key)) is not None]
    if not all(isinstance(table, dict) for table in tables):
        return None
    values = [v for k, v in record.items() if k in _NUMBERS or (k.startswith("val_") and k not in _TABLES)]
    numbers = itertools.chain(values, *(table.values() for table in tables))
    return record if all(value is None or type(value) in (int, float) for value in numbers) else None


def number_in(record: Record, key: str) -> float:
    """The record's number under a key; NaN if it is missing or not a finite number."""
    value = record.get(key)
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else math.nan


@dataclass(frozen=True)
class Metrics:
    """A run's records in the file's order."""

    training: list[Record]
    evaluations: list[Record]
    damaged: list[int]  # numbers of the lines that were skipped; the report names them


def read_metrics(source: Path | bytes) -> Metrics:
    """Read a `metrics.jsonl` (empty if it does not exist), or data from it. Records with neither loss are left out."""
    metrics = Metrics([], [], [])
    for number, _, record in _lines(_content(source, MOST_LOG_BYTES)):
        if record is None:
            metrics.damaged.append(number)
        elif "val_loss" in record:
            metrics.evaluations.append(record)
        elif "loss" in record:
            metrics.training.append(record)
    return metrics


def _content(source: Path | bytes, most: int = 1 << 60) -> bytes:
    if isinstance(source, bytes):
        return source
    with explain_os_errors("read", source), suppress(FileNotFoundError, IsADirectoryError):
        return read_file(own_file(source), most)
    return b""


def mark_of(source: Path | bytes) -> str:
    """Length and sha256 of a log: a checkpoint records them, and a resumed run finds out if the log was changed."""
    content = _content(source)
    return f"{len(content)}-{hashlib.sha256(content).hexdigest()}"


def begins_as_marked(path: Path, mark: object) -> bool:
    """Whether a log still begins with the content that had this mark."""
    length = re.match(r"[0-9]{1,15}(?=-)", str(mark))
    return length is not None and mark_of(_content(path)[: int(length[0])]) == mark


def truncate_metrics(path: Path, step: int, evaluated: int) -> Path | None:
    """Remove the updates after `step`, the evaluations after step `evaluated`, and a half-written last line.

    Returns as `truncate_samples` does.
    """
    content, kept = _content(path), []
    is_foreign = not _may_be_cut_off(content[content.rfind(b"\n") + 1 :].decode(errors="replace"), _RECORD_START)
    for _, line, record in _lines(content):
        if record is None:
            is_foreign = True
        elif record["step"] <= (evaluated if "val_loss" in record else step):
            kept.append(line)
    return _cut(path, b"".join(kept), is_foreign)


def _may_be_cut_off(line: str, *starts: str) -> bool:
    """Whether a line could be what a kill left of one that training wrote."""
    return any(line.startswith(start) or start.startswith(line) for start in starts)


def _cut(path: Path, content: bytes, is_foreign: bool) -> Path | None:
    """Replace a log by its beginning. If other lines were added or its beginning edited, return a copy of it."""
    before, copy = _content(path), None
    if is_foreign or (before and not before.startswith(content)):
        copy = unused_path(path.with_name(f"{EDITED_PREFIX}{path.name}"))
        write_atomic(copy, before)
    write_atomic(path, content)
    return copy


def append_samples(path: Path, step: int, samples: Sequence[str]) -> None:
    """Append a step's samples to `samples.md`, indented, so that no line of them looks like a heading; flush them."""
    text = f"\n## Step {step:06d}\n"
    for number, sample in enumerate(samples, start=1):
        body = "\n".join(f"    {line}" for line in _LINE_END.split(sample))
        text += f"\n### Sample {number}\n\n{body}\n"
    with explain_os_errors("write", path), open(path, "a", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())  # a checkpoint relies on the samples up to its step


def read_samples(source: Path | bytes) -> list[tuple[int, list[str]]]:
    """The steps and texts of a `samples.md` (none if it does not exist), or of data from it."""
    found = []
    for section in _SECTION.finditer(_content(source, MOST_LOG_BYTES).decode(errors="replace")):
        texts = (re.sub(r"^    ", "", body, flags=re.MULTILINE) for body in re.findall(_SAMPLE, section[0]))
        found.append((int(section[1]), [text.removesuffix("\n") for text in texts]))
    return found


def truncate_samples(path: Path, step: int) -> Path | None:
    """Remove the samples after a step, and a section that a kill or a full disk cut off, perhaps inside a character.

    If that removes anything else, such as a user's notes, a copy of the file is kept, and its path returned.
    """
    text = _content(path).decode(errors="replace")
    kept = [f"\n{section[0]}" for section in _SECTION.finditer(text) if int(section[1]) <= step]
    rest = _SECTION.sub("", text.removeprefix(_SAMPLES_TITLE)).split("\n")
    is_foreign = not all(_may_be_cut_off(line, *_SAMPLES_STARTS) for line in rest)
    return _cut(path, "".join([_SAMPLES_TITLE, *kept]).encode(), is_foreign)


@dataclass
class FollowedFile:
    """A growing file, read piece by piece. A checksum of the last bytes shows if it was cut back or replaced."""

    path: Path
    separator: bytes  # `LINE` or `SECTION`: what is incomplete after the last one is left for the next read
    offset: int = 0
    checksum: int = 0

    def read(self, limit: int = MOST_RECORD_BYTES) -> bytes | None:
        """About `limit` bytes appended since the last read, as far as complete; None if earlier bytes changed.

        A record longer than `limit` is read whole, but one of more than `MOST_RECORD_BYTES` is skipped. Raises
        `UserError` if the file is not a regular one, or a link out of its directory.
        """
        data = self._read(limit, skips=limit >= MOST_RECORD_BYTES)
        return self._read(MOST_RECORD_BYTES, skips=True) if data == b"" and limit < MOST_RECORD_BYTES else data

    def _read(self, limit: int, skips: bool) -> bytes | None:
        start = max(0, self.offset - _CHECKED_BYTES)
        try:
            with open_regular(own_file(self.path)) as file:
                file.seek(start)
                data = file.read(self.offset - start + limit)
        except OSError:
            data = b""
        before, data = data[: self.offset - start], data[self.offset - start :]
        if len(before) < self.offset - start or zlib.crc32(before) != self.checksum:
            return None
        is_cut = len(data) == limit  # perhaps inside a record
        complete = data if data.endswith(b"\n") and not is_cut else data[: data.rfind(self.separator) + 1]
        read = data if is_cut and skips and not complete else complete
        self.offset, self.checksum = self.offset + len(read), zlib.crc32((before + read)[-_CHECKED_BYTES:])
        return complete

    def pieces(self, most: int = MOST_LOG_BYTES) -> Iterator[bytes]:
        """Yield what was appended since the last read, piece by piece, up to about `most` bytes."""
        end = self.offset + most
        while self.offset < end and (piece := self.read()):
            yield piece

    def skip_to_end(self) -> None:
        """Continue after the last complete record, of which at most the last `MOST_RECORD_BYTES` are read."""
        with suppress(OSError):
            self.offset = max(0, self.path.stat().st_size - MOST_RECORD_BYTES // 2)
            with open_regular(own_file(self.path)) as file:
                file.seek(max(0, self.offset - _CHECKED_BYTES))
                self.checksum = zlib.crc32(file.read(min(self.offset, _CHECKED_BYTES)))
        self.read()

    @property
    def cursor(self) -> str:
        """Offset and checksum as text, with which another one can continue."""
        return f"{self.offset}-{self.checksum}"
