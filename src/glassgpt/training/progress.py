"""Plain-text progress of a training run. `cli/console.py` has a live display for terminals."""

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from glassgpt.config.schema import TrainConfig
from glassgpt.utils.formatting import RemainingTime, excerpt, format_duration, format_number, one_line


class Progress:
    """Plain lines for a file or a pipe: each evaluation, and a step every few seconds, always the first and the last.

    Subclass it for another display; an exception that it raises ends the run without a save. Records are those of
    `metrics.jsonl`, except that numbers that are not finite stay as they are.

    interval: seconds between lines about steps. stream: standard output by default. clock: monotonic seconds.
    """

    def __init__(
        self, interval: float = 5.0, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._interval, self._stream, self._clock = interval, stream, clock
        self._is_open, self._sample, self._last_step = True, "", 0
        self._shown: float | None = None  # when the last line about a step was printed
        self._remaining = RemainingTime(0, clock)

    def started(self, run: Path, config: TrainConfig, summary: str, first_step: int, last_step: int) -> None:
        """Training starts or resumes. `summary`: of the model. `last_step`: number of updates at the end."""
        self._last_step, self._shown = last_step, None
        self._remaining = RemainingTime(last_step, self._clock)
        self._print(summary)
        sources = ", ".join(config.data.sources)
        self._print(f"training on {sources} into {run}: {last_step} steps of {config.batch_tokens} tokens", "bold")

    def step(self, record: Mapping[str, Any]) -> None:
        """One update is done."""
        step, now = int(record["step"]), self._clock()
        left = self._remaining.left(step)
        if self._shown is not None and step != self._last_step and now - self._shown < self._interval:
            return
        self._shown = now
        loss, lr = format_number(record.get("loss"), ".4f"), format_number(record.get("lr"), ".2e")
        speed = f"{format_number(record.get('tokens_per_second'), ',.0f')} tokens/s  {format_duration(left)} left"
        self._print(f"step {step}/{self._last_step}  loss {loss}  lr {lr}  {speed}")

    def evaluated(self, record: Mapping[str, Any]) -> None:
        """The validation split was evaluated."""
        loss, perplexity, bits = (record.get(f"val_{name}") for name in ("loss", "perplexity", "bits_per_byte"))
        line = f"step {record['step']}/{self._last_step}  validation loss {format_number(loss, '.4f')}"
        line += f"  perplexity {format_number(perplexity, ',.2f')}  {format_number(bits, '.3f')} bits per byte"
        if "hellaswag_acc_norm" in record:
            line += f"  HellaSwag {record['hellaswag_acc_norm']:.1%} of {record['hellaswag_items']:,}"
        self._print(line, "green")

    def sampled(self, step: int, samples: Sequence[str]) -> None:
        """Samples were generated after `step` updates."""
        self._sample = samples[0] if samples else ""
        if samples:
            self._print(f"step {step}/{self._last_step}  sample: {one_line(samples[0], 120)}", "dim")

    def message(self, text: str) -> None:
        """A notice or a warning of a line or two."""
        self._print(text, "yellow")

    def finished(self, run: Path) -> None:
        """The last step is done and saved."""
        if self._sample:
            self._print(f"\n{excerpt(self._sample, 600)}\n")
        self._print(f"done: {run}", "bold")

    def _print(self, text: str, style: str = "") -> None:
        """Print lines. `style`: a style of rich, for displays that have colours."""
        stream = self._stream or sys.stdout
        encoding = getattr(stream, "encoding", None) or "utf-8"
        if self._is_open:
            try:  # a closed pipe, a full disk or a locale without the character must not end a run of many hours
                print(text.encode(encoding, "backslashreplace").decode(encoding), file=stream, flush=True)
            except OSError:
                self._is_open = False


class SilentProgress(Progress):
    """Shows nothing."""

    def _print(self, text: str, style: str = "") -> None:
        pass
