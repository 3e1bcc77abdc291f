"""A run's records as series of numbers: read, smoothed, thinned to what a screen can show."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from glassgpt.utils.errors import UserError

Record = dict[str, Any]

MAX_POINTS = 5000
"""Points of a series: about two a pixel on the widest screens, and a page of a few MB for a run of any length."""


def read_metrics(path: Path) -> tuple[list[Record], list[Record]]:
    """The training records and the evaluations of a `metrics.jsonl`, in the file's order; both empty where it does not exist.

    A half-written last line (a running or killed trainer) is left out; other damage raises `UserError` with the line's number.
    """
    lines = path.read_bytes().split(b"\n") if path.is_file() else []
    training: list[Record] = []
    evaluations: list[Record] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        record = _record(line)
        if record is None:
            if number == len(lines):  # without its newline
                break
            raise UserError(
                f"{path}, line {number}, is damaged: it is no record of numbers as a JSON object. Remove the line to go on"
            )
        if {"step", "val_loss"} <= record.keys():
            evaluations.append(record)
        elif {"step", "loss"} <= record.keys():
            training.append(record)
    return training, evaluations


def _record(line: bytes) -> Record | None:
    """A line's record; None where it is no JSON object, or what should be numbers in it are none, or larger than any float."""
    try:
        record = json.loads(line, parse_constant=lambda _: None, parse_int=_whole)
    except (ValueError, OverflowError, RecursionError):
        return None
    if not isinstance(record, dict):
        return None
    losses = [value for key, value in record.items() if key == "loss" or key.startswith("val_")]
    step_fits = type(record.get("step", 0)) is int
    return record if step_fits and all(value is None or type(value) in (int, float) for value in losses) else None


def _whole(digits: str) -> int:
    float(number := int(digits))  # raises where it has too many
    return number


def column(records: Sequence[Record], key: str, part: str | None = None) -> np.ndarray:
    """A key's values (of a `part` in it) as float64; NaN where it is missing, null or not finite."""
    found = [record.get(key) if part is None else (record.get(key) or {}).get(part) for record in records]
    values = np.array([value if isinstance(value, int | float) else math.nan for value in found], dtype=np.float64)
    return np.where(np.isfinite(values), values, np.nan)


def smoothing_window(steps: int) -> int:
    """Steps that a smoothed curve takes the mean of: a fiftieth of all, and an odd number."""
    return 2 * max(1, steps // 50) + 1


def smoothed(values: np.ndarray, window: int) -> np.ndarray:
    """The centred mean of `window` (odd) values, NaN left out; NaN stays NaN.

    Centred, since a trailing mean lags: it would lie above the validation loss of a model that learns. At the start, where
    the loss falls fastest, the window shrinks on both sides alike; at the end it only loses its far half.
    """
    finite = np.isfinite(values)
    index = np.arange(len(values))
    half = np.minimum(window // 2, index)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    low, high = index - half, np.minimum(index + half + 1, len(values))
    means = (sums[high] - sums[low]) / np.maximum(counts[high] - counts[low], 1)
    return np.where(finite, means, np.nan)


def thinned(values: np.ndarray, limit: int) -> np.ndarray:
    """Indices of at most `limit` values that draw the same picture: both ends, and in equal stretches lowest, highest and a gap."""
    if len(values) <= limit:
        return np.arange(len(values))
    kept = {0, len(values) - 1}
    for stretch in np.array_split(np.arange(len(values)), (limit - 2) // 3):
        part = values[stretch]
        gaps = np.isnan(part)
        if gaps.any():
            kept.add(int(stretch[gaps.argmax()]))
        if not gaps.all():
            kept |= {int(stretch[np.nanargmin(part)]), int(stretch[np.nanargmax(part)])}
    return np.array(sorted(kept))
