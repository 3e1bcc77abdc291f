"""Progress lines of long tasks."""

import time
from collections.abc import Callable

Log = Callable[[str], None]


class ProgressLine:
    """Logs a line every few seconds."""

    def __init__(self, log: Log | None, interval: float = 5.0) -> None:
        self._log, self._interval = log, interval
        self._start = self._last = time.monotonic()

    def update(self, message: str | Callable[[float], str]) -> None:
        """Log the message if a line is due. A function makes it from the seconds since the start."""
        now = time.monotonic()
        if self._log is not None and now - self._last >= self._interval:
            self._last = now
            self._log(message if isinstance(message, str) else message(now - self._start))
