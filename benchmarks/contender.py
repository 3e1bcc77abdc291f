"""A program in an alternating comparison: it runs in its own process when asked, and sleeps otherwise.

In a shared process, the threads of one library would occupy the cores of the next, and peaks of memory would mix.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any


class Contender:
    """A process that runs `command`, whose program calls `serve`. It ends with the context."""

    def __init__(self, command: list[str], environment: Mapping[str, str] | None = None) -> None:
        self._process: subprocess.Popen[str] = subprocess.Popen(
            [sys.executable, *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.result: Any = None

    def __enter__(self) -> "Contender":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.__exit__(None, None, None)  # closes its input, which ends it

    def seconds(self, *numbers: int) -> float:
        """Seconds that the work on these numbers takes; its result is in `result`."""
        time.sleep(0.3)  # until the threads of the previous contender sleep
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(*numbers, file=self._process.stdin, flush=True)
        for line in self._process.stdout:
            if line.startswith("seconds "):
                _, seconds, result = line.split(maxsplit=2)
                self.result = json.loads(result)
                return float(seconds)
        raise RuntimeError(f"a contender ended with {self._process.wait()}; its own message is above")

    @property
    def peak(self) -> int:
        """Largest resident memory so far, in bytes (Linux)."""
        with open(f"/proc/{self._process.pid}/status", encoding="utf-8") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))


def serve(work: Callable[..., object]) -> None:
    """For each line of numbers on standard input: print the seconds that `work(*numbers)` takes, and its result as
    JSON.
    """
    for line in sys.stdin:
        began = time.perf_counter()
        result = work(*map(int, line.split()))
        print(f"seconds {time.perf_counter() - began} {json.dumps(result)}", flush=True)
