"""What a report reads of a run, in any state of the run."""

import contextlib
import json
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from glassgpt.report.series import column
from glassgpt.runs.metrics import Metrics, Record, read_metrics, read_samples
from glassgpt.runs.run_directory import RunDirectory
from glassgpt.utils.errors import UserError


@dataclass(frozen=True)
class RunRecords(Metrics):
    """A run's files, read once."""

    name: str
    """The directory's name, with as many parents as distinguish the runs of a report."""
    config_text: str
    config: Record
    """Nested as in the file; empty if it cannot be read."""
    environment: Record
    samples: list[tuple[int, list[str]]]
    """Step and texts."""
    checkpoints: list[str]

    def places(self, steps: np.ndarray) -> dict[str, np.ndarray]:
        """Where steps are on each x axis: `x` (steps), `tokens` seen, `seconds` in updates, without evaluations."""
        done = np.searchsorted(column(self.training, "step"), steps, side="right")
        tokens = np.concatenate([[0.0], column(self.training, "tokens_seen")])
        seconds = np.concatenate([[0.0], np.nancumsum(column(self.training, "seconds"))])
        return {"x": steps, "tokens": tokens[done], "seconds": seconds[done].round(3)}


def read_runs(paths: Sequence[str | Path]) -> list[RunRecords]:
    """Read the runs in these directories. Raises `UserError` for one that is not a run, or is named twice."""
    runs = [RunDirectory(path) for path in paths]
    for run in runs:
        run.require_run()
    resolved = [run.path.resolve() for run in runs]
    for path in resolved:
        if resolved.count(path) > 1:
            raise UserError(f"{path} is named twice; a report compares different runs")
    return [_read(run, name) for run, name in zip(runs, _distinct_names(resolved), strict=True)]


def _distinct_names(paths: Sequence[Path]) -> list[str]:
    """The ends of the paths, long enough to distinguish them."""
    for length in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-length:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return names


def _read(run: RunDirectory, name: str) -> RunRecords:
    config_text, environment, config = _text(run.config_path), {}, {}
    with contextlib.suppress(ValueError, TypeError):  # still being written
        environment = dict(json.loads(_text(run.environment_path)))
    with contextlib.suppress(tomllib.TOMLDecodeError):
        config = tomllib.loads(config_text)
    return RunRecords(
        **vars(read_metrics(run.metrics_path)),
        name=name,
        config_text=config_text,
        config=config,
        environment=environment,
        samples=read_samples(run.samples_path),
        checkpoints=sorted(path.name for path in run.checkpoints.glob("*") if path.name.isdigit()),
    )


def _text(path: Path) -> str:
    return path.read_bytes().decode(errors="replace") if path.is_file() else ""
