"""Axes of charts: linear and logarithmic scales, their ticks, and series with fewer points."""

import math
from dataclasses import dataclass

import numpy as np

SMALLEST, LARGEST = 1e-3, 1e6  # outside, ticks are written with an exponent


@dataclass(frozen=True)
class Scale:
    """Maps values to pixels. Values without a place (not finite; on a log scale, not above 0) become NaN."""

    low: float
    high: float
    start: float  # the pixel of `low`
    stop: float
    log: bool = False

    def __call__(self, values: np.ndarray) -> np.ndarray:
        low, high = self._warp(np.array([self.low, self.high])).tolist()
        places: np.ndarray = self.start + (self._warp(values) - low) / (high - low) * (self.stop - self.start)
        return places

    def _warp(self, values: np.ndarray) -> np.ndarray:
        if not self.log:
            return np.where(np.isfinite(values), values, np.nan)
        return np.log10(np.where(np.isfinite(values) & (values > 0), values, np.nan))

    def ticks(self, count: int) -> list[float]:
        """About `count` round values from low to high."""
        return log_ticks(self.low, self.high, count) if self.log else linear_ticks(self.low, self.high, count)


def scale_of(values: np.ndarray, start: float, stop: float, log: bool, pad: float = 0.04) -> Scale:
    """A scale over all values that have a place, with a margin; from 0 to 1 (log: 0.1 to 1) if none has."""
    placed = values[np.isfinite(values) & ((values > 0) if log else True)]
    if not placed.size:
        return Scale(0.1 if log else 0.0, 1.0, start, stop, log)
    low, high = float(placed.min()), float(placed.max())
    if low == high:
        margin = abs(low) / 2 or 1.0
        return Scale(low / 2 if log else low - margin, 2 * high if log else high + margin, start, stop, log)
    if log:
        factor = (high / low) ** pad
        return Scale(low / factor, high * factor, start, stop, log)
    margin = pad * (high - low)
    return Scale(low if low == 0 and pad < 0.05 else low - margin, high + margin, start, stop, log)


def linear_ticks(low: float, high: float, count: int) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten from low to high: about `count`, at least 2 between them."""
    rough = (high - low) / max(1, count)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12 - math.floor(math.log10(step))) for i in range(first, last + 1)]


def log_ticks(low: float, high: float, count: int) -> list[float]:
    """Powers of ten from low to high; over less than two decades also 2 and 5 times those; or round values."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    every = max(1, math.ceil((last - first) / max(1, count)))
    powers = [10.0**p for p in range(first, last + 1) if p % every == 0]
    factors = (1,) if math.log10(high / low) >= 2 else (1, 2, 5)
    ticks = [f * p for p in powers for f in factors if low * (1 - 1e-9) <= f * p <= high * (1 + 1e-9)]
    return ticks if len(ticks) >= 2 else linear_ticks(low, high, count)


def tick_texts(ticks: list[float]) -> list[str]:
    """Ticks as text, with the same number of decimals where they are evenly spaced."""
    return [_tick_text(tick, ticks) for tick in ticks]


def _tick_text(tick: float, ticks: list[float]) -> str:
    largest = max(abs(t) for t in ticks)
    if tick == 0:
        return "0"
    if largest >= LARGEST or abs(tick) < SMALLEST:
        mantissa, _, exponent = f"{tick:.3e}".partition("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}".replace("-", "−")
    text = f"{tick:,.6f}".rstrip("0").rstrip(".")
    return text.replace("-", "−")


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
