"""Signals that stop a run: the last complete update is saved first."""

import contextlib
import os
import signal
import sys
import threading
from typing import Any, Self

NOTICE = b"\nstopping, then saving the last complete step (a second Ctrl-C or SIGTERM quits without saving)\n"


class Interrupts:
    """Catches SIGINT, SIGTERM and SIGHUP in a `with` block; `signal` is the first one.

    A second SIGINT or SIGTERM ends the process at once, but not under torchrun, which repeats the scheduler's signal.
    A second SIGHUP does nothing: both the terminal and the shell report a lost connection. Python allows signal
    handlers in the main thread only; in another thread (of a notebook, say) nothing is caught.
    """

    def __init__(self, *, repeats_mean_quit: bool, announces: bool) -> None:
        """`announces`: acknowledge the first Ctrl-C or SIGTERM on standard error."""
        self.signal: int | None = None
        self._repeats_mean_quit, self._announces = repeats_mean_quit, announces
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> Self:
        numbers = [signal.SIGINT, signal.SIGTERM]
        if sys.platform != "win32" and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # ignored under nohup
            numbers.append(signal.SIGHUP)
        if threading.current_thread() is threading.main_thread():
            self._handlers = {number: signal.signal(number, self._receive) for number in numbers}
        return self

    def _receive(self, number: int, frame: object) -> None:
        if self.signal is None:
            self.signal = number
            if number in (signal.SIGINT, signal.SIGTERM) and self._announces:
                with contextlib.suppress(OSError):  # os.write: a handler may interrupt a print
                    os.write(2, NOTICE)
        elif self._repeats_mean_quit and number == signal.SIGINT:
            raise KeyboardInterrupt
        elif self._repeats_mean_quit and number == signal.SIGTERM:
            os._exit(128 + number)

    def __exit__(self, *error: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
