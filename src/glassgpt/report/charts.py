"""The charts of a report as data, which page.js draws with plotly.js.

A chart has `title`, `section`, number `format`, `log` (of its y axis), `tall` and `traces`. A trace has `name`, `style`
(`line`, `faint`, `points`, or `reference`, a level line), `color` (a number, or null for the style's), `y`, and its
places on each x axis. plotly.graph_objects would fix axis, colours and shown runs, which the reader can change.
"""

import math
from collections.abc import Sequence

import numpy as np

from glassgpt.config.schema import DataConfig
from glassgpt.evaluation.hellaswag_items import PUBLISHED
from glassgpt.figures.axes import thinned
from glassgpt.model.param_groups import PARAM_GROUPS
from glassgpt.report.runs import MAX_POINTS, RunRecords, column, smoothed, smoothing_window
from glassgpt.runs.metrics import Record

Array = np.ndarray
# Title, key in the training records, number format, whether to smooth, whether the y axis is logarithmic.
CURVES = (
    ("Learning rate", "lr", ".3~g", False, False),
    ("Gradient norm before clipping", "grad_norm", ".3~g", True, True),
    ("Tokens per second", "tokens_per_second", ".4~s", True, False),
    ("Share of the device's peak", "peak_share", ".3~%", True, False),
    ("Memory (bytes)", "memory_bytes", ".4~s", False, False),
)


def charts_of(runs: Sequence[RunRecords]) -> list[Record]:
    """The charts of one run or of several compared; charts without a finite number are left out."""
    charts: list[Record] = []

    def add(
        title: str, form: str, traces: list[Record], log: bool = False, tall: bool = False, section: str = "Training"
    ) -> None:
        chart = {"title": title, "section": section, "format": form, "log": log, "tall": tall, "traces": traces}
        measured = [trace["y"] for trace in traces if trace["style"] != "reference"]
        if any(y is not None for values in measured for y in values):
            charts.append(chart)

    is_single = len(runs) == 1
    training, validation = training_traces(runs, "loss", smooth=True), evaluation_traces(runs, "val_loss", "validation")
    validation += _loss_lines(runs)
    if is_single:
        add("Loss (nats per token)", ".4~g", training + validation, tall=True)
    else:
        add("Training loss, smoothed (nats per token)", ".4~g", training, tall=True)
        add("Validation loss (nats per token)", ".4~g", validation, tall=True)
        add("Validation, bits per byte", ".4~g", evaluation_traces(runs, "val_bits_per_byte"))
    scores = evaluation_traces(runs, "hellaswag_acc_norm", "HellaSwag, normalised")
    add("HellaSwag", ".1~%", scores + _hellaswag_lines(runs), tall=True)
    for title, key, form, smooth, log in CURVES:
        title += ", smoothed" if smooth and not is_single else ""
        add(title, form, training_traces(runs, key, smooth), log=log)
    if is_single:  # a chart with a curve per parameter group
        for title, key in (("Gradient norms before clipping", "grad_norms"), ("Weight norms", "weight_norms")):
            traces = [evaluation_traces(runs, key, name, group)[0] for group, name in PARAM_GROUPS.items()]
            traces = [trace | {"color": color} for color, trace in enumerate(traces)]
            add(title, ".3~g", [trace for trace in traces if trace["y"]], log=True, tall=True, section="Norms")
    else:  # a chart per group
        gradients = evaluation_traces(runs, "grad_norms", group="embedding")
        add("Embedding-gradient norm before clipping", ".3~g", gradients, log=True, section="Norms")
        for group, name in PARAM_GROUPS.items():
            add(f"Weight norm: {name}", ".4~g", evaluation_traces(runs, "weight_norms", group=group), section="Norms")
    return charts


def training_traces(runs: Sequence[RunRecords], key: str, smooth: bool) -> list[Record]:
    """Curves of a number that each update records."""
    traces = []
    for number, run in enumerate(runs):
        steps, values = column(run.training, "step"), column(run.training, key)
        window = smoothing_window(len(steps))
        mean = smoothed(values, window) if smooth else values
        if len(runs) > 1:
            limit = max(500, MAX_POINTS // len(runs))
            traces.append(_trace(run, run.name, steps, mean, "line", number, limit))
        else:
            traces.append(_trace(run, "each step", steps, values, "faint" if smooth else "line"))
            if smooth:
                traces.append(_trace(run, f"mean of {window:,} steps", steps, mean, "line"))
    return traces


def evaluation_traces(runs: Sequence[RunRecords], key: str, name: str = "", group: str | None = None) -> list[Record]:
    """Points of a value of the evaluations, of those that have it: before the first update there is no gradient."""
    traces = []
    for number, run in enumerate(runs):
        records = [r for r in run.evaluations if key in r and (group is None or group in (r[key] or {}))]
        label, color = (run.name, number) if len(runs) > 1 else (name, None)
        steps, values = column(records, "step"), column(records, key, group)
        traces.append(_trace(run, label, steps, values, "points", color))
    return traces


GPT2_FINEWEB_LOSS = 3.2924  # of GPT-2 124M in nats per token, as plotted in build-nanogpt's play.ipynb
_FINEWEB = DataConfig(source="fineweb-edu", validation="first_shard", tokenizer="gpt2")
_DECIDES_VALIDATION = "source column mixture tokenizer validation validation_source deduplicate shard_tokens".split()


def _loss_lines(runs: Sequence[RunRecords]) -> list[Record]:
    """GPT-2's loss, if the validation text of all runs is that of `_FINEWEB`."""
    configs = [vars(DataConfig()) | run.config.get("data", {}) for run in runs]
    same = all(config[name] == vars(_FINEWEB)[name] for config in configs for name in _DECIDES_VALIDATION)
    return [_reference("GPT-2 124M", GPT2_FINEWEB_LOSS)] if same else []


def _hellaswag_lines(runs: Sequence[RunRecords]) -> list[Record]:
    """Published scores, if all runs were scored on the same items as these."""
    if not all(run.evaluations and run.evaluations[-1].get("hellaswag_published") for run in runs):
        return []
    return [_reference(row.model, row.acc_norm) for row in PUBLISHED if row.style in ("build-nanogpt", "GPT-3 paper")]


def _reference(name: str, value: float) -> Record:
    return {"name": name, "style": "reference", "color": None, "y": [value, value]}


def _trace(
    run: RunRecords, name: str, steps: Array, y: Array, style: str, color: int | None = None, limit: int = MAX_POINTS
) -> Record:
    """A series of one run, thinned."""
    kept = thinned(y, limit)
    places = {axis: _numbers(values) for axis, values in run.places(steps[kept]).items()}
    return {"name": name, "style": style, "color": color, **places, "y": _numbers(y[kept], whole=False)}


def _numbers(values: Array, whole: bool = True) -> list[float | None]:
    """As JSON has them: null if not finite; whole numbers without a fraction, which is shorter."""
    return [None if not math.isfinite(v) else int(v) if whole and v == int(v) else float(v) for v in values]
