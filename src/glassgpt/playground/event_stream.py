"""A run's files, read whole or followed while the run writes on: this only reads, so a page cannot hurt a run.

A follower remembers how far it has read each growing file, and a checksum of the last bytes before that place: where they are there no
more, the run was cut back or replaced. The place as text is a cursor, with which another follower goes on later.
"""

import io
import json
import math
import re
import zlib
from array import array
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from glassgpt.interpretability.snapshots import read_probe
from glassgpt.playground.catalog import kept_checkpoints
from glassgpt.playground.wire_format import pack
from glassgpt.report.series import smoothed, smoothing_window, thinned
from glassgpt.runs.run_directory import RunDirectory
from glassgpt.utils.errors import UserError

Record = dict[str, Any]
Event = tuple[str, Any]

COLUMNS = (
    "step",
    "loss",
    "lr",
    "grad_norm",
    "tokens_per_second",
    "memory_bytes",
    "peak_share",
    "tokens_seen",
    "seconds",
)
SMOOTHED = ("loss", "grad_norm", "tokens_per_second")
"""Columns that have a `_mean` beside them."""
MOST_ROWS = 3000
"""Training steps of a history: about two a pixel."""
MOST_BYTES = 1 << 20
"""Of a file that are read at once while following; the rest the next time."""
CHECKED_BYTES = 256
_CURSOR = re.compile(r"([0-9]{1,15})-([0-9]{1,10})-([0-9]{1,15})-([0-9]{1,10})")


@dataclass
class Place:
    """How far a growing file has been read."""

    offset: int = 0
    checksum: int = 0
    """Of the `CHECKED_BYTES` before the offset."""

    def read(self, path: Path, most: int = MOST_BYTES) -> bytes | None:
        """What stands behind this place, at most so much; None where what stood before it does no more."""
        start = max(0, self.offset - CHECKED_BYTES)
        try:
            with open(path, "rb") as file:
                file.seek(start)
                data = file.read(self.offset - start + most)
        except OSError:
            data = b""
        before = data[: self.offset - start]
        if len(before) < self.offset - start or zlib.crc32(before) != self.checksum:
            return None
        self._before = before
        return data[self.offset - start :]

    def advance(self, data: bytes) -> None:
        """What `read` gave has been taken as far as this."""
        last = (self._before + data)[-CHECKED_BYTES:]
        self.offset, self.checksum = self.offset + len(data), zlib.crc32(last)

    def __str__(self) -> str:
        return f"{self.offset}-{self.checksum}"


def whole_lines(data: bytes) -> bytes:
    """The data up to its last line break: what comes behind is still being written."""
    return data[: data.rfind(b"\n") + 1]


def records_in(data: bytes) -> Iterator[tuple[bool, Record]]:
    """The records in whole lines of a metrics.jsonl, and whether each is an evaluation. A line that is no record is left out."""
    for line in io.BytesIO(data):
        record = None
        with suppress(ValueError, RecursionError):
            record = json.loads(line)
        if isinstance(record, dict) and "step" in record and ("val_loss" in record or "loss" in record):
            yield "val_loss" in record, record


def read_samples(data: bytes) -> list[Record]:
    """The steps and texts in whole sections of a samples.md. Only lines without indent are headings."""
    found: list[Record] = []
    for line in data.decode(errors="replace").split("\n"):
        if step := re.fullmatch(r"## Step ([0-9]{1,15})", line):
            found.append({"step": int(step[1]), "texts": []})
        elif found and re.fullmatch(r"### Sample [0-9]+", line):
            found[-1]["texts"].append([])
        elif found and found[-1]["texts"] and line.startswith("    "):
            found[-1]["texts"][-1].append(line[4:])
    return [{"step": section["step"], "texts": ["\n".join(lines) for lines in section["texts"]]} for section in found]


def whole_sections(data: bytes) -> bytes:
    """A samples.md's data as far as its sections are whole: each is written at once, so that a last line without its end tells."""
    if data.endswith(b"\n") or not data:
        return data
    return data[: max(0, data.rfind(b"\n## Step "))]


class Follower:
    """What is new in a run's files, each time it looks."""

    def __init__(self, run: RunDirectory, cursor: str | None = None) -> None:
        """`cursor`: where another one was, or a history; without it, this one begins at the files' ends. Raises `UserError`."""
        self._run = run
        self._metrics, self._samples = Place(), Place()
        self._told: dict[str, Any] = {}
        if cursor is None:
            self._skip()
            return
        numbers = _CURSOR.fullmatch(cursor)
        if numbers is None:
            raise UserError("this is no place in a run's files")
        self._metrics = Place(int(numbers[1]), int(numbers[2]))
        self._samples = Place(int(numbers[3]), int(numbers[4]))

    @property
    def cursor(self) -> str:
        """Where it is."""
        return f"{self._metrics}-{self._samples}"

    def look(self) -> list[Event]:
        """The names and values of what is new, `status` first; all that has no place in a file the first time."""
        grown = list(self._grown())
        return [*self._changed("status", status_of(self._run)), *grown, *self._lists()]

    def _grown(self) -> Iterator[Event]:
        metrics, samples = (
            self._metrics.read(self._run.metrics_path),
            self._samples.read(self._run.samples_path, _everything(self._run.samples_path)),
        )
        if metrics is None or samples is None:
            self._skip()
            yield "reset", {}
            return
        metrics, samples = whole_lines(metrics), whole_sections(samples)
        self._metrics.advance(metrics)
        self._samples.advance(samples)
        if records := list(records_in(metrics)):
            training = [record for is_evaluation, record in records if not is_evaluation]
            yield (
                "metrics",
                {"training": training, "evaluations": [record for is_evaluation, record in records if is_evaluation]},
            )
        if sections := read_samples(samples):
            yield "samples", sections

    def _lists(self) -> Iterator[Event]:
        yield from self._changed("snapshots", probed_steps(self._run))
        yield from self._changed("checkpoints", list(kept_checkpoints(self._run)))

    def _changed(self, name: str, value: Any) -> Iterator[Event]:
        if name not in self._told or self._told[name] != value:
            self._told[name] = value
            yield name, value

    def _skip(self) -> None:
        """Go to the end of the files."""
        self._metrics, self._samples = Place(), Place()
        for place, path, whole in (
            (self._metrics, self._run.metrics_path, whole_lines),
            (self._samples, self._run.samples_path, whole_sections),
        ):
            place.advance(whole(place.read(path, _everything(path)) or b""))


def _everything(path: Path) -> int:
    with suppress(OSError):
        return path.stat().st_size
    return 0


def status_of(run: RunDirectory) -> Record:
    """A run's status; its state is `stopped` where it says that it is running and is no more."""
    return {**run.read_status(), "state": run.state}


def probed_steps(run: RunDirectory) -> list[int]:
    """The steps of a run's snapshots."""
    with suppress(OSError):
        return run.probed_steps
    return []


def history(run: RunDirectory) -> Record:
    """All that a run has written so far but its models, the steps of its training thinned; and the cursor to follow it from here."""
    metrics, samples = Place(), Place()
    lines = whole_lines(metrics.read(run.metrics_path, _everything(run.metrics_path)) or b"")
    sections = whole_sections(samples.read(run.samples_path, _everything(run.samples_path)) or b"")
    metrics.advance(lines)
    samples.advance(sections)
    evaluations, numbers = [], array("d")  # a dict a step would take ten times the memory
    for is_evaluation, record in records_in(lines):
        if is_evaluation:
            evaluations.append(record)
        else:
            numbers.extend(_number(record.get(name)) for name in COLUMNS)
    return {
        "config": _text(run.config_path),
        "environment": _environment(run),
        "status": status_of(run),
        "training": columns(np.array(numbers).reshape(-1, len(COLUMNS))),
        "evaluations": evaluations,
        "samples": read_samples(sections),
        "snapshots": probed_steps(run),
        "checkpoints": list(kept_checkpoints(run)),
        "cursor": f"{metrics}-{samples}",
    }


def columns(training: npt.NDArray[np.float64]) -> dict[str, list[Any]]:
    """Training steps (steps, COLUMNS) as columns, of at most `MOST_ROWS` of them: those that draw the same curve of the loss.

    What cannot be made from some of them is made from all: `loss_mean` and its like, smoothed as in a report, and `time`, the seconds
    in training steps so far.
    """
    read = dict(zip(COLUMNS, training.T, strict=True))
    window = smoothing_window(len(training))
    made = {f"{name}_mean": smoothed(read[name], window) for name in SMOOTHED}
    made["time"] = np.nancumsum(read["seconds"])
    kept = thinned(read["loss"], MOST_ROWS)
    return {
        name: [float(value) if np.isfinite(value) else None for value in values[kept]]
        for name, values in (read | made).items()
    }


def _number(value: Any) -> float:
    """A record's number, NaN for what is none."""
    is_one = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300  # false for nan
    return float(value) if is_one else math.nan


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode(errors="replace")
    except OSError:
        return ""


def _environment(run: RunDirectory) -> Record:
    with suppress(UserError):
        return run.read_environment()
    return {}


def snapshot(run: RunDirectory, step: int) -> bytes:
    """A probe snapshot, packed. Raises `UserError` for a step without one."""
    steps = probed_steps(run)
    if step not in steps:
        there = f"there are those of {', '.join(map(str, steps))}" if steps else "there is none"
        raise UserError(f"the run has no snapshot of step {step}: {there}")
    try:
        found = read_probe(run.probe_path(step))
    except OSError:
        raise UserError(f"the snapshot of step {step} was removed meanwhile") from None
    names = ("attention", "lens_ids", "lens_p", "next_rank", "surprisal")
    arrays = {f"{name}.{number}": getattr(seen, name) for number, seen in enumerate(found.prompts) for name in names}
    prompts = [{"ids": seen.prompt.ids, "pieces": seen.prompt.pieces} for seen in found.prompts]
    values = {"step": found.step, "prompts": prompts, "kinds": found.kinds, "samples": found.samples}
    return pack({**arrays, "head_kinds": found.head_kinds}, values)
