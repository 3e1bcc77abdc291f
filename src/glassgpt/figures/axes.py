"""Axes of charts: linear and logarithmic scales, their ticks, and series with fewer points."""

import math
from dataclasses import dataclass

import numpy as np

_TINY, _HUGE = 1e-250, 1e250  # values beyond have no place: differences and ratios of such values overflow
_SMALLEST, _LARGEST = 1e-3, 1e6  # ticks outside have an exponent


def placed(values: np.ndarray, log: bool = False) -> np.ndarray:
    """The values (N,), NaN for those without a place on an axis: not finite, or not above 0 on a log axis."""
    with np.errstate(invalid="ignore"):
        has_place = (np.abs(values) < _HUGE) & ((values > _TINY) if log else True)
    return np.where(has_place, values, np.nan)


@dataclass(frozen=True)
class Scale:
    """Maps values to pixels; values without a place become NaN."""

    low: float
    high: float
    start: float  # the pixel of `low`
    stop: float
    log: bool = False

    def __call__(self, values: np.ndarray) -> np.ndarray:
        low, high = (math.log10(end) if self.log else end for end in (self.low, self.high))  # also beyond `placed`
        places: np.ndarray = self.start + (self._warp(values) - low) / (high - low) * (self.stop - self.start)
        return places

    def _warp(self, values: np.ndarray) -> np.ndarray:
        return np.log10(placed(values, log=True)) if self.log else placed(values)

    def ticks(self, count: int) -> list[float]:
        """About `count` round values from low to high."""
        return log_ticks(self.low, self.high, count) if self.log else linear_ticks(self.low, self.high, count)


def scale_of(values: np.ndarray, start: float, stop: float, log: bool, pad: float = 0.04) -> Scale:
    """A scale over all values, with a margin; from 0 to 1 (log: 0.1 to 1) if none has a place."""
    kept = placed(values, log)[~np.isnan(placed(values, log))]
    low, high = (float(kept.min()), float(kept.max())) if kept.size else (0.1 if log else 0.0, 1.0)
    if log:
        factor = 10 ** (pad * (math.log10(high) - math.log10(low))) if high > 1.001 * low else 2.0
        return Scale(low / factor, high * factor, start, stop, log)
    largest = max(abs(low), abs(high))
    margin = pad * (high - low) if high - low > max(_TINY, 1e-9 * largest) else max(largest / 2, 1e-3)
    return Scale(low - margin, high + margin, start, stop)


def linear_ticks(low: float, high: float, count: int) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten from low to high: about `count`, at least 2."""
    rough = (high - low) / max(2, count)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    if last - first < 1:
        return linear_ticks(low, high, 2 * count)
    return [round(i * step, 12 - math.floor(math.log10(step))) for i in range(first, last + 1)]


def log_ticks(low: float, high: float, count: int) -> list[float]:
    """Powers of ten from low to high; below two decades also 2 and 5 times those, or linear ticks if these are few."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    every = max(1, math.ceil((last - first) / max(1, count)))
    factors = (1,) if math.log10(high) - math.log10(low) >= 2 else (1, 2, 5)
    candidates = [factor * 10.0**power for power in range(first, last + 1) if power % every == 0 for factor in factors]
    ticks = [tick for tick in candidates if low * (1 - 1e-9) <= tick <= high * (1 + 1e-9)]
    return ticks if len(ticks) >= 2 else linear_ticks(low, high, count)


def tick_texts(ticks: list[float]) -> list[str]:
    """Ticks as texts: with the same number of decimals if they are evenly spaced, or with an exponent."""
    largest, steps = max(abs(tick) for tick in ticks), np.diff(ticks)
    if largest >= _LARGEST or largest < _SMALLEST or (min(ticks) > 0 and min(ticks) < _SMALLEST):
        texts = [_with_exponent(tick) for tick in ticks]
    elif np.allclose(steps, steps[0]):
        decimals = max(0, -math.floor(math.log10(steps[0]) + 1e-9))
        texts = [f"{tick:,.{decimals}f}" if tick else "0" for tick in ticks]
    else:
        texts = [f"{tick:,.6f}".rstrip("0").rstrip(".") for tick in ticks]
    return [text.replace("-", "−") for text in texts]


def _with_exponent(tick: float) -> str:
    mantissa, _, exponent = f"{tick:.6e}".partition("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}" if tick else "0"


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
