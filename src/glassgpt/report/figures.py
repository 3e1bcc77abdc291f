"""Curves of runs as inline figures, for lessons and notebooks: the same series as in a report."""

from pathlib import Path

from glassgpt.figures import Figure, lines
from glassgpt.report.charts import CURVES, evaluation_traces, training_traces
from glassgpt.report.runs import read_runs
from glassgpt.runs.metrics import Record
from glassgpt.utils.errors import UserError, did_you_mean


def losses(*runs: str | Path) -> Figure:
    """Draw training loss (smoothed) and validation loss in nats per token over the steps of one run or of several.

    One run also shows the loss of each step. Raises `UserError` for a directory that is not a run.
    """
    records = read_runs(runs)
    training = training_traces(records, "loss", smooth=True)
    validation = evaluation_traces(records, "val_loss", "validation")
    if len(records) > 1:
        validation = [trace | {"name": f"{trace['name']}, validation"} for trace in validation]
    return _drawn([*training, *validation], "Loss", "nats per token")


def curve(runs: str | Path | list[str | Path], key: str) -> Figure:
    """Draw a number that a run records, over its steps: `lr`, `grad_norm`, `tokens_per_second`, `val_loss` and others.

    `key` is a key of `metrics.jsonl`. A list draws one curve per run. Raises `UserError` if no run records that number.
    """
    records = read_runs(runs if isinstance(runs, list) else [runs])
    title, _, _, smooth, log = next((row for row in CURVES if row[1] == key), (key, key, "", False, False))
    kinds = training_traces(records, key, smooth), evaluation_traces(records, key, key)
    traces = next((kind for kind in kinds if any(y is not None for trace in kind for y in trace["y"])), None)
    if traces is None:
        known = {name for run in records for record in (*run.training, *run.evaluations) for name in record}
        raise UserError(f"no record of {records[0].name} has the number {key!r}{did_you_mean(key, known)}")
    return _drawn(traces, title, "", log)


def _drawn(traces: list[Record], title: str, unit: str, log: bool = False) -> Figure:
    """Traces of a report as a figure."""
    traces = [trace for trace in traces if trace["x"]]
    series = {trace["name"]: (trace["x"], trace["y"]) for trace in traces}
    points = [trace["name"] for trace in traces if trace["style"] == "points"]
    faint = [trace["name"] for trace in traces if trace["style"] == "faint"]
    return lines(series, title=title, x="step", y=unit, log_y=log, points=points, faint=faint)
