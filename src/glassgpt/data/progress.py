"""Lines, every few seconds, on how far a long piece of work is."""

import time
from collections.abc import Callable

Log = Callable[[str], None]


class Meter:
    """Says every few seconds how much was done, and how fast."""

    def __init__(self, log: Log, what: str, interval: float = 5.0) -> None:
        self._log, self._what, self._interval = log, what, interval
        self._characters, self._tokens = 0, 0
        self._began = self._said = time.monotonic()

    def __call__(self, characters: int, tokens: int) -> None:
        self._characters, self._tokens = self._characters + characters, self._tokens + tokens
        now = time.monotonic()
        if now - self._said >= self._interval:
            self._said = now
            pace = self._characters / (now - self._began)
            self._log(f"{self._what} {self._characters / 1e6:,.0f}M characters, {pace / 1e6:,.1f}M a second")


class Ticker:
    """Says every few seconds how much of something large is done."""

    def __init__(self, log: Log, done: str, total: int, unit: str, interval: float = 5.0) -> None:
        self._log, self._done, self._total, self._unit, self._interval = log, done, total, unit, interval
        self._count, self._said = 0, time.monotonic()

    def __call__(self, count: int) -> None:
        """So much more is done."""
        self._count += count
        if time.monotonic() - self._said >= self._interval:
            self._said = time.monotonic()
            self._log(f"{self._done} {self._count / 1e6:,.0f}M of {self._total / 1e6:,.0f}M {self._unit}")
