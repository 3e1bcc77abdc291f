"""A live progress display for terminals, with rich."""

import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

from rich import progress as bars
from rich.console import Console
from rich.text import Text

from glassgpt.config.schema import TrainConfig
from glassgpt.training.progress import evaluation_line
from glassgpt.utils.formatting import RemainingTime, excerpt, format_duration, format_number, one_line


class LastingStream:
    """A stream whose reader may go: what a terminal that is gone, with its connection, refuses must not end a run."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write, or drop it."""
        with suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Hand on what was written, or drop it."""
        with suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class RichProgress:
    """One live line: bar, steps, loss, validation loss, tokens a second, time left. Evaluations and samples scroll above it.

    Used as a context manager, so that the terminal is put in order whatever ends the run.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(file=LastingStream(sys.stdout))  # type: ignore[arg-type]
        self._bar = bars.Progress(
            bars.BarColumn(bar_width=None),
            bars.MofNCompleteColumn(),
            bars.TextColumn("loss {task.fields[loss]}"),
            bars.TextColumn("val {task.fields[validation]}", style="green"),
            bars.TextColumn("{task.fields[rate]} tok/s"),
            bars.TextColumn("{task.fields[left]} left", style="cyan"),
            console=self._console,
            refresh_per_second=4,  # its thread shares the cores with the training
            expand=True,
        )
        self._task: bars.TaskID | None = None
        self._last_step = 0
        self._pace = RemainingTime(0, time.monotonic)
        self._sample = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def started(self, run: Path, config: TrainConfig, summary: str, first_step: int, last_step: int) -> None:
        """See `progress.Progress`."""
        self._last_step = last_step
        self._pace = RemainingTime(last_step, time.monotonic)
        self._print(summary)
        self._print(f"training on {', '.join(config.data.sources)} into {run}", style="bold")
        self._task = self._bar.add_task(
            "", total=last_step, completed=first_step, loss="?", validation="?", rate="?", left="?"
        )
        self._bar.start()

    def step(self, record: Mapping[str, Any]) -> None:
        """See `progress.Progress`."""
        step = int(record["step"])
        rate = format_number(record.get("tokens_per_second"), ",.0f")
        self._update(
            completed=step,
            loss=format_number(record.get("loss"), ".3f"),
            rate=rate,
            left=format_duration(self._pace.left(step)),
        )

    def evaluated(self, record: Mapping[str, Any]) -> None:
        """See `progress.Progress`."""
        self._update(validation=format_number(record.get("val_loss"), ".3f"))
        self._print(evaluation_line(record, self._last_step), style="green")

    def sampled(self, step: int, samples: Sequence[str]) -> None:
        """See `progress.Progress`."""
        self._sample = samples[0] if samples else ""
        if samples:
            self._print(f"  {one_line(samples[0], max(20, min(200, 2 * self._console.width - 4)))}", style="dim")

    def message(self, text: str) -> None:
        """See `progress.Progress`."""
        self._print(text, style="yellow")

    def finished(self, run: Path) -> None:
        """See `progress.Progress`."""
        self._bar.stop()
        if self._sample:
            self._print(f"\n{excerpt(self._sample, 600)}\n")
        self._print(f"done: {run}", style="bold")

    def _update(self, **fields: Any) -> None:
        if self._task is not None:
            self._bar.update(self._task, **fields)

    def _print(self, text: str, style: str = "") -> None:
        self._console.print(Text(text, style=style))  # a Text, since a sample's [brackets] are no markup
