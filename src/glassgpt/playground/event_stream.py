"""A run's files, read whole or followed while the run writes on: this only reads, so a page cannot hurt a run.

A follower remembers how far it has read each growing file, and a checksum of the last bytes before that place: where they are there no
more, the run was cut back or replaced. The place as text is a cursor, with which another follower goes on later.
"""

import re
from array import array
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from glassgpt.interpretability.snapshots import read_probe
from glassgpt.playground.catalog import kept_checkpoints
from glassgpt.playground.wire_format import pack
from glassgpt.report.series import smoothed, smoothing_window, thinned
from glassgpt.runs.metrics import (
    FollowedFile,
    Record,
    complete_lines,
    complete_sections,
    number_in,
    parse_metrics,
    read_metrics,
    read_samples,
)
from glassgpt.runs.run_directory import RunDirectory
from glassgpt.utils.errors import UserError

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
_CURSOR = re.compile(r"([0-9]{1,15})-([0-9]{1,10})-([0-9]{1,15})-([0-9]{1,10})")


class Follower:
    """What is new in a run's files, each time it looks."""

    def __init__(self, run: RunDirectory, cursor: str | None = None) -> None:
        """`cursor`: where another one was, or a history; without it, this one begins at the files' ends. Raises `UserError`."""
        self._run = run
        self._told: dict[str, Any] = {}
        if cursor is None:
            self._skip()
            return
        numbers = _CURSOR.fullmatch(cursor)
        if numbers is None:
            raise UserError("this is no place in a run's files")
        self._metrics = FollowedFile(run.metrics_path, complete_lines, int(numbers[1]), int(numbers[2]))
        self._samples = FollowedFile(run.samples_path, complete_sections, int(numbers[3]), int(numbers[4]))

    @property
    def cursor(self) -> str:
        """Where it is."""
        return f"{self._metrics.cursor}-{self._samples.cursor}"

    def look(self) -> list[Event]:
        """The names and values of what is new, `status` first; all that has no place in a file the first time."""
        grown = list(self._grown())
        return [*self._changed("status", status_of(self._run)), *grown, *self._lists()]

    def _grown(self) -> Iterator[Event]:
        metrics, samples = self._metrics.read(MOST_BYTES), self._samples.read()
        if metrics is None or samples is None:
            self._skip()
            yield "reset", {}
            return
        new = read_metrics(metrics)
        if new.training or new.evaluations:
            yield "metrics", {"training": new.training, "evaluations": new.evaluations}
        if sections := read_samples(samples):
            yield "samples", _as_records(sections)

    def _lists(self) -> Iterator[Event]:
        yield from self._changed("snapshots", probed_steps(self._run))
        yield from self._changed("checkpoints", list(kept_checkpoints(self._run)))

    def _changed(self, name: str, value: Any) -> Iterator[Event]:
        if name not in self._told or self._told[name] != value:
            self._told[name] = value
            yield name, value

    def _skip(self) -> None:
        """Go to the end of the files."""
        self._metrics = FollowedFile(self._run.metrics_path, complete_lines)
        self._samples = FollowedFile(self._run.samples_path, complete_sections)
        self._metrics.read()
        self._samples.read()


def _as_records(sections: Sequence[tuple[int, list[str]]]) -> list[Record]:
    return [{"step": step, "texts": texts} for step, texts in sections]


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
    metrics = FollowedFile(run.metrics_path, complete_lines)
    samples = FollowedFile(run.samples_path, complete_sections)
    lines, sections = metrics.read() or b"", samples.read() or b""
    evaluations, numbers = [], array("d")  # one dict per step would take ten times the memory
    for _, record in parse_metrics(lines):
        if record is not None and "val_loss" in record:
            evaluations.append(record)
        elif record is not None and "loss" in record:
            numbers.extend(number_in(record, name) for name in COLUMNS)
    return {
        "config": _text(run.config_path),
        "environment": _environment(run),
        "status": status_of(run),
        "training": columns(np.array(numbers).reshape(-1, len(COLUMNS))),
        "evaluations": evaluations,
        "samples": _as_records(read_samples(sections)),
        "snapshots": probed_steps(run),
        "checkpoints": list(kept_checkpoints(run)),
        "cursor": f"{metrics.cursor}-{samples.cursor}",
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
    values = {"step": found.step, "prompts": prompts, "head_types": found.head_types, "samples": found.samples}
    return pack({**arrays, "head_scores": found.head_scores}, values)
