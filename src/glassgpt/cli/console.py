"""A live progress display for terminals, with rich."""

import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any, TextIO, cast

from rich import progress as bars
from rich.console import Console
from rich.text import Text

from glassgpt.config.schema import TrainConfig
from glassgpt.training.progress import Progress
from glassgpt.utils.formatting import format_duration, format_number


class LastingStream:
    """A stream that drops what it cannot write: a terminal that is gone with its connection must not end a run."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class RichProgress(Progress, AbstractContextManager["RichProgress"]):
    """One live line with bar, losses, speed and remaining time; evaluations, samples and messages scroll above it."""

    def __init__(self, console: Console | None = None) -> None:
        super().__init__()
        self._console = console or Console(file=cast(TextIO, LastingStream(sys.stdout)))
        self._bar = bars.Progress(
            bars.BarColumn(bar_width=None),
            bars.MofNCompleteColumn(),
            bars.TextColumn("loss {task.fields[loss]}"),
            bars.TextColumn("val {task.fields[validation]}", style="green"),
            bars.TextColumn("{task.fields[rate]} tok/s"),
            bars.TextColumn("{task.fields[left]} left", style="cyan"),
            console=self._console,
            refresh_per_second=4,  # its thread shares the cores with training
            expand=True,
        )
        self._task = self._bar.add_task("", total=None, loss="?", validation="?", rate="?", left="?")

    def __exit__(self, *error: object) -> None:
        self._bar.stop()  # restores the terminal, whatever ends the run

    def started(self, run: Path, config: TrainConfig, summary: str, first_step: int, last_step: int) -> None:
        super().started(run, config, summary, first_step, last_step)
        self._bar.update(self._task, total=last_step, completed=first_step)
        self._bar.start()

    def step(self, record: Mapping[str, Any]) -> None:
        self._bar.update(
            self._task,
            completed=int(record["step"]),
            loss=format_number(record.get("loss"), ".3f"),
            rate=format_number(record.get("tokens_per_second"), ",.0f"),
            left=format_duration(self._remaining.left(int(record["step"]))),
        )

    def evaluated(self, record: Mapping[str, Any]) -> None:
        self._bar.update(self._task, validation=format_number(record.get("val_loss"), ".3f"))
        super().evaluated(record)

    def finished(self, run: Path) -> None:
        self._bar.stop()
        super().finished(run)

    def _print(self, text: str, style: str = "") -> None:
        self._console.print(Text(text, style=style))  # a Text, since a sample's [brackets] are not markup
