"""The charts of a report, as the page's script draws them.

A chart has `title`, `section`, `format` of its numbers, `log` (of its y axis), `tall` and `traces`. A trace has `name`, `style`
(`line`, `faint`, `points`, `reference`), `color` (a number, where its style has none), its places on each x axis and `y`.
"""

import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from glassgpt.config.schema import DataConfig
from glassgpt.evaluation.baselines import GPT2_FINEWEB_LOSS, PUBLISHED
from glassgpt.model.param_groups import PARAM_GROUPS
from glassgpt.report.runs import RunRecords
from glassgpt.report.series import MAX_POINTS, column, smoothed, smoothing_window, thinned
from glassgpt.runs.metrics import Record

TRAINING, NORMS = "Training", "Norms"
_MIN_POINTS = 500


def charts_of(runs: Sequence[RunRecords]) -> list[Record]:
    """The charts of one run or several; one without a single finite number is left out."""
    charts = _of_one(runs[0]) if len(runs) == 1 else _of_several(runs)
    return [chart for chart in charts if any(y is not None for trace in chart["traces"] for y in trace["y"])]


def _chart(
    title: str, form: str, traces: Iterable[Record], *, log: bool = False, tall: bool = False, section: str = TRAINING
) -> Record:
    return {"title": title, "section": section, "format": form, "log": log, "tall": tall, "traces": list(traces)}


# --- one run --------------------------------------------------------------------------------------------------------------


def _of_one(run: RunRecords) -> list[Record]:
    steps = column(run.training, "step")
    window = smoothing_window(len(steps))

    def noisy(key: str) -> list[Record]:
        values, smooth = column(run.training, key), f"mean of {window:,} steps"
        return [
            _trace(run, "each step", steps, values, "faint"),
            _trace(run, smooth, steps, smoothed(values, window), "line"),
        ]

    def plain(name: str, key: str) -> list[Record]:
        return [_trace(run, name, steps, column(run.training, key), "line")]

    losses = [*noisy("loss"), _evaluated(run, "validation", "val_loss"), *_loss_lines([run])]
    has_peak = bool(np.isfinite(column(run.training, "peak_share")).any())
    charts = [
        _chart("Loss (nats per token)", ".4~g", losses, tall=True),
        _chart("Learning rate", ".3~g", plain("lr", "lr")),
        _chart("Gradient norm before clipping", ".3~g", noisy("grad_norm"), log=True),
        _chart("Tokens per second", ".4~s", noisy("tokens_per_second")),
        _chart("Share of the device's peak", ".3~%", noisy("peak_share"))
        if has_peak
        else _chart("Memory (bytes)", ".4~s", plain("memory", "memory_bytes")),
    ]
    if any("hellaswag_acc_norm" in record for record in run.evaluations):
        charts.append(
            _chart("HellaSwag", ".1~%", [_hellaswag(run, "HellaSwag, normalised"), *_hellaswag_lines([run])], tall=True)
        )
    for title, key in (
        ("Gradient norms by part, before clipping", "grad_norms"),
        ("Weight norms by part", "weight_norms"),
    ):
        traces = (_evaluated(run, name, key, part, color) for color, (part, name) in enumerate(PARAM_GROUPS.items()))
        charts.append(_chart(title, ".3~g", (t for t in traces if t["y"]), log=True, tall=True, section=NORMS))
    return charts


# --- several runs ---------------------------------------------------------------------------------------------------------


def _of_several(runs: Sequence[RunRecords]) -> list[Record]:
    limit = max(_MIN_POINTS, MAX_POINTS // len(runs))

    def each(of_run: Callable[[RunRecords, int], Record]) -> list[Record]:
        return [of_run(run, color) for color, run in enumerate(runs)]

    def trained(key: str, smooth: bool = True) -> list[Record]:
        def of_run(run: RunRecords, color: int) -> Record:
            steps, values = column(run.training, "step"), column(run.training, key)
            values = smoothed(values, smoothing_window(len(steps))) if smooth else values
            return _trace(run, run.name, steps, values, "line", color, limit)

        return each(of_run)

    def evaluated(key: str, part: str | None = None) -> list[Record]:
        return each(lambda run, color: _evaluated(run, run.name, key, part, color))

    lines, scores = _loss_lines(runs), each(lambda run, color: _hellaswag(run, run.name, color))
    charts = [
        _chart("Training loss, smoothed (nats per token)", ".4~g", trained("loss"), tall=True),
        _chart("Validation loss (nats per token)", ".4~g", [*evaluated("val_loss"), *lines], tall=True),
        _chart("Validation, bits per byte", ".4~g", evaluated("val_bits_per_byte")),
        _chart(
            "HellaSwag",
            ".1~%",
            [*scores, *_hellaswag_lines(runs)] if any(trace["y"] for trace in scores) else [],
            tall=True,
        ),
        _chart("Learning rate", ".3~g", trained("lr", smooth=False)),
        _chart("Gradient norm before clipping, smoothed", ".3~g", trained("grad_norm"), log=True),
        _chart("Tokens per second, smoothed", ".4~s", trained("tokens_per_second")),
        _chart("Share of the device's peak, smoothed", ".3~%", trained("peak_share")),
        _chart("Memory (bytes)", ".4~s", trained("memory_bytes", smooth=False)),
        _chart(
            "Embedding-gradient norm before clipping",
            ".3~g",
            evaluated("grad_norms", "embedding"),
            log=True,
            section=NORMS,
        ),
    ]
    weights = (
        _chart(f"Weight norm: {name}", ".4~g", evaluated("weight_norms", part), section=NORMS)
        for part, name in PARAM_GROUPS.items()
    )
    return [*charts, *weights]


# --- traces ---------------------------------------------------------------------------------------------------------------


def _evaluated(run: RunRecords, name: str, key: str, part: str | None = None, color: int | None = None) -> Record:
    """A value of the evaluations. Those that do not have it (before the first update there is no gradient) are left out, as a whole."""
    asked = [r for r in run.evaluations if key in r and (part is None or part in (r[key] or {}))]
    return _trace(run, name, column(asked, "step"), column(asked, key, part), "points", color)


def _hellaswag(run: RunRecords, name: str, color: int | None = None) -> Record:
    return _evaluated(run, name, "hellaswag_acc_norm", color=color)


_FINEWEB = DataConfig(source="fineweb-edu", validation="first_shard", tokenizer="gpt2")
_DECIDES_VALIDATION = (
    "source",
    "column",
    "mixture",
    "tokenizer",
    "validation",
    "validation_source",
    "deduplicate",
    "shard_tokens",
)


def _loss_lines(runs: Sequence[RunRecords]) -> list[Record]:
    """Others' losses, where the validation text of all runs is the same: that of `_FINEWEB`, whatever else a config says."""
    data = [run.config.get("data", {}) for run in runs]
    same = all(
        d.get(name, getattr(DataConfig(), name)) == getattr(_FINEWEB, name)
        for d in data
        for name in _DECIDES_VALIDATION
    )
    return (
        [_reference("GPT-2 124M", GPT2_FINEWEB_LOSS, runs, [column(run.training, "step") for run in runs])]
        if same
        else []
    )


def _hellaswag_lines(runs: Sequence[RunRecords]) -> list[Record]:
    """Others' scores, where the items are all that there are, and theirs, as published."""
    if not all(run.evaluations and run.evaluations[-1].get("hellaswag_published") for run in runs):
        return []
    steps = [column(run.evaluations, "step") for run in runs]
    rows = [row for row in PUBLISHED if row.style in ("build-nanogpt", "GPT-3 paper")]
    return [_reference(row.model, row.acc_norm, runs, steps) for row in rows]


def _reference(name: str, value: float, runs: Sequence[RunRecords], steps: Sequence[np.ndarray]) -> Record:
    """A level line over all of the runs' steps."""
    ends: dict[str, list[float]] = {"x": [], "tokens": [], "seconds": []}
    for run, own in zip(runs, steps, strict=True):
        for axis, places in run.places(np.array([own.min(), own.max()]) if len(own) else np.array([0.0, 1.0])).items():
            ends[axis] += [float(place) for place in places if math.isfinite(place)]
    found = {axis: [min(places), max(places)] if places else [None, None] for axis, places in ends.items()}
    return {"name": name, "style": "reference", **found, "y": [value, value]}


def _trace(
    run: RunRecords,
    name: str,
    steps: np.ndarray,
    y: np.ndarray,
    style: str,
    color: int | None = None,
    limit: int = MAX_POINTS,
) -> Record:
    """A series of one run, thinned."""
    kept = thinned(y, limit)
    places = {axis: _numbers(each) for axis, each in run.places(steps[kept]).items()}
    return {
        "name": name,
        "style": style,
        "color": color,
        **places,
        "y": [float(v) if math.isfinite(v) else None for v in y[kept]],
    }


def _numbers(values: np.ndarray) -> list[float | None]:
    """Without a fraction where there is none, which takes less room."""
    return [None if not math.isfinite(v) else int(v) if v == int(v) else float(v) for v in values]
