"""What a run has written so far (`history`) and what it writes from then on (`Follower`). This module only reads."""

import re
from array import array
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import numpy as np
import numpy.typing as npt

from glassgpt.interpretability.snapshots import read_probe
from glassgpt.playground.catalog import kept_checkpoints
from glassgpt.playground.wire_format import pack
from glassgpt.report.series import smoothed, smoothing_window, thinned
from glassgpt.runs.metrics import (
    LINE,
    SECTION,
    FollowedFile,
    Record,
    number_in,
    parse_metrics,
    read_metrics,
    read_samples,
)
from glassgpt.runs.run_directory import RunDirectory
from glassgpt.utils.errors import UserError

Event = tuple[str, Any]
"""Name and value."""

COLUMNS = tuple("step loss lr grad_norm tokens_per_second memory_bytes peak_share tokens_seen seconds".split())
SMOOTHED = ("loss", "grad_norm", "tokens_per_second")
"""Columns that also have a smoothed version, `NAME_mean`."""
MAX_ROWS = 3000
"""Most training steps in a history: about two per pixel."""
MAX_BYTES = 1 << 20
"""Bytes of metrics per poll; the rest comes with the next one."""
_CURSOR = re.compile(r"([0-9]{1,15})-([0-9]{1,10})-([0-9]{1,15})-([0-9]{1,10})")


class Follower:
    """Finds what is new in a run's files at each poll."""

    def __init__(self, run: RunDirectory, cursor: str | None = None) -> None:
        """`cursor`: where a history or another follower ended; None is the end of the files. Raises `UserError`."""
        self._run = run
        self._sent: dict[str, Any] = {}
        if cursor is None:
            self._skip_to_end()
            return
        numbers = _CURSOR.fullmatch(cursor)
        if numbers is None:
            raise UserError("after must be the cursor of a history or an event")
        self._metrics = FollowedFile(run.metrics_path, LINE, int(numbers[1]), int(numbers[2]))
        self._samples = FollowedFile(run.samples_path, SECTION, int(numbers[3]), int(numbers[4]))

    @property
    def cursor(self) -> str:
        """The position in both files."""
        return f"{self._metrics.cursor}-{self._samples.cursor}"

    def poll(self) -> list[Event]:
        """The new events, `status` first. The first poll sends status and lists in any case."""
        return list(self._events())

    def _events(self) -> Iterator[Event]:
        yield from self._if_changed("status", read_status(self._run))
        yield from self._appended()
        yield from self._if_changed("snapshots", probed_steps(self._run))
        yield from self._if_changed("checkpoints", list(kept_checkpoints(self._run)))

    def _appended(self) -> Iterator[Event]:
        # The second read is for a line that is longer than the limit.
        metrics, samples = self._metrics.read(MAX_BYTES) or self._metrics.read(), self._samples.read()
        if metrics is None or samples is None:  # the run was cut back or replaced
            self._skip_to_end()
            yield "reset", {}
            return
        new = read_metrics(metrics)
        if new.training or new.evaluations:
            yield "metrics", {"training": new.training, "evaluations": new.evaluations}
        if sections := parse_samples(samples):
            yield "samples", sections

    def _if_changed(self, name: str, value: Any) -> Iterator[Event]:
        if name not in self._sent or self._sent[name] != value:
            self._sent[name] = value
            yield name, value

    def _skip_to_end(self) -> None:
        self._metrics = FollowedFile(self._run.metrics_path, LINE)
        self._samples = FollowedFile(self._run.samples_path, SECTION)
        self._metrics.read()
        self._samples.read()


def read_status(run: RunDirectory) -> Record:
    """A run's status; the state of a run whose process has died is `stopped`."""
    return {**run.read_status(), "state": run.state}


def probed_steps(run: RunDirectory) -> list[int]:
    """The steps of a run's snapshots."""
    with suppress(OSError):  # the run was removed in the meantime
        return run.probed_steps
    return []


def parse_samples(data: bytes) -> list[Record]:
    """The steps and texts in a part of samples.md."""
    return [{"step": step, "texts": texts} for step, texts in read_samples(data)]


def history(run: RunDirectory) -> Record:
    """What a run has written so far, except its models, with thinned training steps; and the cursor to follow it."""
    metrics = FollowedFile(run.metrics_path, LINE)
    samples = FollowedFile(run.samples_path, SECTION)
    lines, sections = metrics.read() or b"", samples.read() or b""
    evaluations, numbers = [], array("d")  # one dict per step would take ten times the memory
    for _, record in parse_metrics(lines):
        if record is not None and "val_loss" in record:
            evaluations.append(record)
        elif record is not None and "loss" in record:
            numbers.extend(number_in(record, name) for name in COLUMNS)
    config, environment = "", {}
    with suppress(OSError):
        config = run.config_path.read_bytes().decode(errors="replace")
    with suppress(UserError):
        environment = run.read_environment()
    return {
        "config": config,
        "environment": environment,
        "status": read_status(run),
        "training": columns(np.array(numbers).reshape(-1, len(COLUMNS))),
        "evaluations": evaluations,
        "samples": parse_samples(sections),
        "snapshots": probed_steps(run),
        "checkpoints": list(kept_checkpoints(run)),
        "cursor": f"{metrics.cursor}-{samples.cursor}",
    }


def columns(training: npt.NDArray[np.float64]) -> dict[str, list[Any]]:
    """Training steps (steps, COLUMNS) as columns of at most `MAX_ROWS` values that draw the same curve of the loss.

    `NAME_mean`, smoothed as in a report, and `time`, the seconds of training so far, are computed from all steps.
    """
    by_name = dict(zip(COLUMNS, training.T, strict=True))
    window = smoothing_window(len(training))
    derived = {f"{name}_mean": smoothed(by_name[name], window) for name in SMOOTHED}
    derived["time"] = np.nancumsum(by_name["seconds"])
    rows = thinned(by_name["loss"], MAX_ROWS)
    return {
        name: [float(value) if np.isfinite(value) else None for value in values[rows]]
        for name, values in (by_name | derived).items()
    }


def snapshot(run: RunDirectory, step: int) -> bytes:
    """A probe snapshot, packed. Raises `UserError` for a step without one."""
    steps = probed_steps(run)
    if step not in steps:
        raise UserError(f"the run has no snapshot of step {step}; it has {', '.join(map(str, steps)) or 'none'}")
    try:
        probe = read_probe(run.probe_path(step))
    except OSError:
        raise UserError(f"the snapshot of step {step} was removed in the meantime") from None
    names = ("attention", "lens_ids", "lens_p", "next_rank", "surprisal")
    arrays = {f"{name}.{i}": getattr(seen, name) for i, seen in enumerate(probe.prompts) for name in names}
    prompts = [{"ids": seen.prompt.ids, "pieces": seen.prompt.pieces} for seen in probe.prompts]
    values = {"step": probe.step, "prompts": prompts, "head_types": probe.head_types, "samples": probe.samples}
    return pack({**arrays, "head_scores": probe.head_scores}, values)
