"""What a run has written so far (`history`) and what it writes from then on (`Follower`). This module only reads."""

import itertools
import re
from array import array
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import numpy as np
import numpy.typing as npt

from glassgpt.figures.axes import thinned
from glassgpt.interpretability.snapshots import read_probe
from glassgpt.playground.model_pool import kept_checkpoints
from glassgpt.playground.schemas import pack
from glassgpt.report.runs import read_text, smoothed, smoothing_window
from glassgpt.runs.metrics import LINE, SECTION, FollowedFile, number_in, parse_metrics, read_metrics, read_samples
from glassgpt.runs.run_directory import RunDirectory
from glassgpt.utils.errors import UserError

COLUMNS = tuple("step loss lr grad_norm tokens_per_second memory_bytes peak_share tokens_seen seconds".split())
SMOOTHED = ("loss", "grad_norm", "tokens_per_second")  # these columns also have a smoothed version, `NAME_mean`
MAX_ROWS = 3000  # most training steps in a history: about two per pixel
MAX_BYTES = 1 << 20  # bytes of metrics per poll; the rest comes with the next one
MAX_SAMPLES_BYTES = 1 << 28  # of samples in a history; the rest comes with the polls, too
START = "0-0-0-0"  # the cursor of a run's first record
_CURSOR = re.compile(r"([0-9]{1,15})-([0-9]{1,10})-([0-9]{1,15})-([0-9]{1,10})")


class Follower:
    """Finds what is new in a run's files at each poll."""

    def __init__(self, run: RunDirectory, cursor: str | None = None) -> None:
        """`cursor`: where a history or another follower ended; None is the end of the files. Raises `UserError`."""
        position = _CURSOR.fullmatch(START if cursor is None else cursor)
        if position is None:
            raise UserError("after must be the cursor of a history or an event")
        numbers = [int(number) for number in position.groups()]
        self._run = run
        self._sent: dict[str, Any] = {}
        self.metrics = FollowedFile(run.metrics_path, LINE, *numbers[:2])
        self.samples = FollowedFile(run.samples_path, SECTION, *numbers[2:])
        if cursor is None:
            self.metrics.skip_to_end()
            self.samples.skip_to_end()

    @property
    def cursor(self) -> str:
        return f"{self.metrics.cursor}-{self.samples.cursor}"

    def poll(self) -> Iterator[tuple[str, Any]]:
        """Names and values of the new events, `status` first. The first poll sends status and lists in any case."""
        yield from self._if_changed("status", {**self._run.read_status(), "state": self._run.state})
        try:
            metrics, samples = self.metrics.read(MAX_BYTES), self.samples.read()
        except UserError:  # a pipe or a link took the place of a file: the history, which the page reads next, says so
            yield from self._if_changed("reset", {})
            return
        if metrics is None or samples is None:  # the run was cut back or replaced
            at_end = Follower(self._run)
            self.metrics, self.samples = at_end.metrics, at_end.samples
            yield "reset", {}
        else:
            new = read_metrics(metrics)
            if new.training or new.evaluations:
                yield "metrics", {"training": new.training, "evaluations": new.evaluations}
            if sections := parse_samples(samples):
                yield "samples", sections
        yield from self._if_changed("snapshots", self._run.probed_steps)
        yield from self._if_changed("checkpoints", list(kept_checkpoints(self._run)))

    def _if_changed(self, name: str, value: Any) -> Iterator[tuple[str, Any]]:
        if name not in self._sent or self._sent[name] != value:
            self._sent[name] = value
            yield name, value


def parse_samples(data: bytes) -> list[dict[str, Any]]:
    return [{"step": step, "texts": texts} for step, texts in read_samples(data)]


def history(run: RunDirectory) -> dict[str, Any]:
    """What a run has written so far, except its models, with thinned training steps; and the cursor to follow it."""
    follower = Follower(run, START)
    evaluations, numbers = [], array("d")  # one dict per step would take ten times the memory
    for record in itertools.chain.from_iterable(map(parse_metrics, follower.metrics.pieces())):
        if "val_loss" in record:
            evaluations.append(record)
        elif "loss" in record:
            numbers.extend(number_in(record, name) for name in COLUMNS)
    environment: dict[str, Any] = {}
    with suppress(UserError):
        environment = run.read_environment()
    return {
        "config": read_text(run.config_path),
        "environment": environment,
        "status": {**run.read_status(), "state": run.state},
        "training": columns(np.array(numbers).reshape(-1, len(COLUMNS))),
        "evaluations": evaluations,
        "samples": parse_samples(b"".join(follower.samples.pieces(MAX_SAMPLES_BYTES))),
        "snapshots": run.probed_steps,
        "checkpoints": list(kept_checkpoints(run)),
        "cursor": follower.cursor,
    }


def columns(training: npt.NDArray[np.float64]) -> dict[str, list[Any]]:
    """Training steps (steps, COLUMNS) as thinned columns, with `NAME_mean` as in a report and `time` in seconds."""
    by_name = dict(zip(COLUMNS, training.T, strict=True))
    window = smoothing_window(len(training))
    derived = {f"{name}_mean": smoothed(by_name[name], window) for name in SMOOTHED}
    derived["time"] = np.nancumsum(by_name["seconds"])
    rows = thinned(by_name["loss"], MAX_ROWS)
    return {name: values[rows].tolist() for name, values in (by_name | derived).items()}


def snapshot(run: RunDirectory, step: int) -> bytes:
    """A probe snapshot, packed. Raises `UserError` for a step without one."""
    try:
        probe = read_probe(run.probe_path(step))
    except OSError:
        steps = ", ".join(map(str, run.probed_steps)) or "none"
        raise UserError(f"the run has no snapshot of step {step} (any more); it has {steps}") from None
    return pack(probe.tensors, probe.values)
