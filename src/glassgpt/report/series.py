"""A run's records as series of numbers: read, smoothed, thinned to what a screen can show."""

from collections.abc import Sequence

import numpy as np

from glassgpt.runs.metrics import Record, number_in

MAX_POINTS = 5000
"""Points of a series: about two per pixel on the widest screens, and a page of a few MB for a run of any length."""


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


def thinned(values: np.ndarray, limit: int) -> np.ndarray:
    """Indices of at most `limit` values that draw the same picture: both ends, and extremes and gaps in between."""
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
