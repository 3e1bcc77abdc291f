"""A run's records as series of numbers: read, smoothed, thinned to what a screen can show."""

import math
from collections.abc import Sequence

import numpy as np

from glassgpt.runs.metrics import Record

MAX_POINTS = 5000
"""Points of a series: about two a pixel on the widest screens, and a page of a few MB for a run of any length."""


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
