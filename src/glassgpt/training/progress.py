"""What a training run tells whoever watches it, and plain lines for outputs that are no terminal."""

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TextIO

from glassgpt.config.schema import TrainConfig
from glassgpt.utils.formatting import RemainingTime, excerpt, format_duration, format_number, one_line


class Progress(Protocol):
    """A watcher of a run. It only listens: an exception that it raises ends the run like any other, without a save.

    Records are those of `metrics.jsonl`, but for numbers that are not finite: they come as they are.
    """

    def started(self, run: Path, config: TrainConfig, summary: str, first_step: int, last_step: int) -> None:
        """The run begins, or goes on: `summary` describes the model, `last_step` is the number of updates at the end."""

    def step(self, record: Mapping[str, Any]) -> None:
        """One update is done."""

    def evaluated(self, record: Mapping[str, Any]) -> None:
        """The validation split was evaluated."""

    def sampled(self, step: int, samples: Sequence[str]) -> None:
        """The model wrote samples after `step` updates."""

    def message(self, text: str) -> None:
        """A notice or a warning, a line or two."""

    def finished(self, run: Path) -> None:
        """The run has done its last step and saved it."""


class PlainProgress:
    """Lines for a file or a pipe: a training step every few seconds, the first and the last always, and each evaluation.

    interval: seconds between lines about steps. stream: standard output unless given. clock: seconds that never go back.
    """

    def __init__(
        self, interval: float = 5.0, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._interval = interval
        self._stream = stream
        self._clock = clock
        self._open = True
        self._shown: float | None = None
        self._last_step = 0
        self._pace = RemainingTime(0, clock)
        self._sample = ""

    def started(self, run: Path, config: TrainConfig, summary: str, first_step: int, last_step: int) -> None:
        """See `Progress`."""
        self._last_step = last_step
        self._pace = RemainingTime(last_step, self._clock)
        self._shown = None
        self._print(summary)
        self._print(
            f"training on {', '.join(config.data.sources)} into {run}: {last_step} steps of {config.batch_tokens} tokens"
        )

    def step(self, record: Mapping[str, Any]) -> None:
        """See `Progress`."""
        step, now = int(record["step"]), self._clock()
        left = self._pace.left(step)
        if self._shown is not None and step != self._last_step and now - self._shown < self._interval:
            return
        self._shown = now
        parts = (
            f"step {step}/{self._last_step}",
            f"loss {format_number(record.get('loss'), '.4f')}",
            f"lr {format_number(record.get('lr'), '.2e')}",
            f"{format_number(record.get('tokens_per_second'), ',.0f')} tokens/s",
            f"{format_duration(left)} left",
        )
        self._print("  ".join(parts))

    def evaluated(self, record: Mapping[str, Any]) -> None:
        """See `Progress`."""
        self._print(evaluation_line(record, self._last_step))

    def sampled(self, step: int, samples: Sequence[str]) -> None:
        """See `Progress`."""
        self._sample = samples[0] if samples else ""
        if samples:
            self._print(f"step {step}/{self._last_step}  writes: {one_line(samples[0], 120)}")

    def message(self, text: str) -> None:
        """See `Progress`."""
        self._print(text)

    def finished(self, run: Path) -> None:
        """See `Progress`."""
        if self._sample:
            self._print(f"\n{excerpt(self._sample, 600)}\n")
        self._print(f"done: {run}")

    def _print(self, text: str) -> None:
        stream = self._stream or sys.stdout
        encoding = getattr(stream, "encoding", None) or "utf-8"
        if self._open:
            try:  # a reader that has gone, a full disk or a locale without the character must not end a run of many hours
                print(text.encode(encoding, "backslashreplace").decode(encoding), file=stream, flush=True)
            except OSError:
                self._open = False


class SilentProgress(PlainProgress):
    """Says nothing, as all ranks but the first do."""

    def _print(self, text: str) -> None:
        pass


def evaluation_line(record: Mapping[str, Any], last_step: int) -> str:
    """An evaluation in one line."""
    loss, perplexity, bits = (record.get(name) for name in ("val_loss", "val_perplexity", "val_bits_per_byte"))
    line = (
        f"step {record['step']}/{last_step}  validation loss {format_number(loss, '.4f')}"
        f"  perplexity {format_number(perplexity, ',.2f')}  {format_number(bits, '.3f')} bits a byte"
    )
    if "hellaswag_acc_norm" in record:
        line += f"  HellaSwag {record['hellaswag_acc_norm']:.1%} of {record['hellaswag_items']:,}"
    return line
