"""Numbers, texts, tokens and progress as people read them: the one place that formats bytes, durations and excerpts."""

import re
import time
import unicodedata
from collections.abc import Callable

Log = Callable[[str], None]


def format_bytes(count: float) -> str:
    """A number of bytes in decimal units: `456 bytes`, `12.3 kB`, `4.5 MB`, `1.61 GB`."""
    for unit, size, digits in (("GB", 1e9, 2), ("MB", 1e6, 1), ("kB", 1e3, 1)):
        if count >= size:
            return f"{count / size:,.{digits}f} {unit}"
    return f"{count:.0f} bytes"


def format_duration(seconds: float | None) -> str:
    """Seconds as `1:05` or `2:03:04`; `?` if None."""
    if seconds is None:
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def format_number(value: float | None, spec: str) -> str:
    """A number by a format specification; `?` if None (not measured)."""
    return "?" if value is None else format(value, spec)


def one_line(text: str, width: int) -> str:
    """Text on one line of at most `width` characters, without control characters that move a terminal's cursor."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text[: 4 * width]).split())
    return line if len(line) <= width else line[: width - 1].rstrip() + "…"


def excerpt(text: str, length: int) -> str:
    """The first `length` characters of a text, lines kept and indented, without control characters."""
    lines = text.strip()[:length].splitlines()
    shown = "\n".join("  " + "".join(c if c.isprintable() else " " for c in line) for line in lines)
    return f"{shown}…" if len(text.strip()) > length else shown


_MARKS = {" ": "␣", "\n": "⏎", "\t": "→", "\r": "␍"}
# Printable in Python's view, but invisible in every font: fillers, joiners, variation selectors, an empty pattern.
_INVISIBLE = re.compile(
    r"[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]"
)


def escape_token(data: bytes) -> str:
    """Return a token's bytes as text in which everything is visible.

    White space becomes ␣ ⏎ → ␍, a byte outside a whole character <e2>, an invisible character <U+200B>; a combining
    mark at the beginning gets a ◌ to stand on.
    """
    # A byte that cannot be decoded becomes the lone surrogate 0xDC00 + byte, which no UTF-8 decodes to.
    text = data.decode("utf-8", errors="surrogateescape")
    head = "◌" if text and unicodedata.combining(text[0]) else ""
    return head + "".join(map(_mark, text))


def _mark(character: str) -> str:
    if "\udc80" <= character <= "\udcff":
        return f"<{ord(character) - 0xDC00:02x}>"
    is_visible = character.isprintable() and not _INVISIBLE.match(character)
    return _MARKS.get(character, character if is_visible else f"<U+{ord(character):04X}>")


class RemainingTime:
    """Estimates the remaining seconds from the mean speed since the first step that it saw."""

    def __init__(self, last_step: int, clock: Callable[[], float]) -> None:
        self._last_step, self._clock = last_step, clock
        self._start: tuple[int, float] | None = None

    def left(self, step: int) -> float | None:
        """Seconds from `step` to the last step; None at the first step seen, when there is no speed yet."""
        if self._start is None or step <= self._start[0]:
            self._start = (step, self._clock())
            return None
        first, start = self._start
        return (self._last_step - step) * (self._clock() - start) / (step - first)


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
