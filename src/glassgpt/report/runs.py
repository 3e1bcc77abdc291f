"""What a report reads of a run, in any state of the run, and its records as series: smoothed and thinned."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from glassgpt.config.schema import TrainConfig
from glassgpt.runs.metrics import Metrics, Record, number_in, read_metrics, read_samples
from glassgpt.runs.run_directory import RunDirectory, step_paths
from glassgpt.utils.errors import UserError
from glassgpt.utils.files import explain_os_errors, own_file, parse_toml, read_file

MAX_POINTS = 5000  # of a series: about two per pixel on the widest screens, and a page of a few MB for any run


@dataclass(frozen=True)
class RunRecords(Metrics):
    """A run's files, read once."""

    name: str  # the directory's, with as many parents as distinguish the runs of a report
    config_text: str
    config: Record  # nested as in the file; empty if it cannot be read
    environment: Record
    samples: list[tuple[int, list[str]]]  # step and texts
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
    if len(set(resolved)) < len(runs):
        twice = max(resolved, key=resolved.count)
        raise UserError(f"{twice} is named twice; a report compares different runs")
    length = 1  # of the ends of the paths that distinguish them
    while len({path.parts[-length:] for path in resolved}) < len(runs):
        length += 1
    return [_read(run, "/".join(path.parts[-length:])) for run, path in zip(runs, resolved, strict=True)]


def _read(run: RunDirectory, name: str) -> RunRecords:
    config_text, environment, config = read_text(run.config_path), {}, {}
    with contextlib.suppress(UserError):  # missing or damaged
        environment = run.read_environment()
    with contextlib.suppress(UserError):
        TrainConfig.from_toml(config_text, str(run.config_path))  # checks all types
        config = parse_toml(config_text, str(run.config_path))
    return RunRecords(
        **vars(read_metrics(run.metrics_path)),
        name=name,
        config_text=config_text,
        config=config,
        environment=environment,
        samples=read_samples(run.samples_path),
        checkpoints=[path.name for path in step_paths(run.checkpoints)],
    )


def read_text(path: Path) -> str:
    """A file's text; empty if it does not exist yet, or not any more."""
    with explain_os_errors("read", path), contextlib.suppress(FileNotFoundError):
        return read_file(own_file(path)).decode(errors="replace")
    return ""


def column(records: Sequence[Record], key: str, group: str | None = None) -> np.ndarray:
    """A key's values (of a parameter group in it) as float64; NaN if missing, null or not finite."""
    values = (number_in(r, key) if group is None else number_in(r.get(key) or {}, group) for r in records)
    return np.fromiter(values, dtype=np.float64, count=len(records))


def smoothing_window(steps: int) -> int:
    """Steps over which a smoothed curve is the mean: a fiftieth of all, rounded to an odd number."""
    return 2 * max(1, steps // 50) + 1


def smoothed(values: np.ndarray, window: int) -> np.ndarray:
    """The centred mean of `window` (odd) values without NaN; NaN stays NaN.

    Centred, since a trailing mean lags: it would be above the validation loss of a model that learns. At the start,
    where the loss falls fastest, the window shrinks on both sides; at the end it only loses its later half.
    """
    finite = np.isfinite(values)
    index = np.arange(len(values))
    half = np.minimum(window // 2, index)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    low, high = index - half, np.minimum(index + half + 1, len(values))
    means = (sums[high] - sums[low]) / np.maximum(counts[high] - counts[low], 1)
    return np.where(finite, means, np.nan)
