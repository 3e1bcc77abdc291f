"""A thread on each rank that ends the process if another rank fails, and finds the rank that the others wait for."""

import itertools
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any, NoReturn

from torch.distributed.distributed_c10d import Store

from glassgpt.utils.errors import UserError

PERIOD = 1.0  # seconds between two looks at the store
# How much longer a rank may take before its first update is complete: it compiles, and reads data for the first time.
FIRST_UPDATE_FACTOR = 6


def hang_timeout() -> float:
    """Seconds after which a rank that the others wait for counts as missing."""
    text = os.environ.get("GLASSGPT_HANG_SECONDS", "600")
    with suppress(ValueError):
        if (seconds := float(text)) >= 3 * PERIOD:
            return seconds
    raise UserError(f"GLASSGPT_HANG_SECONDS must be a number of seconds, at least {3 * PERIOD:.0f}, got {text!r}")


@dataclass(frozen=True)
class Status:
    """What a rank last reported about itself."""

    process: str = ""
    beat: int = 0  # increases while its watchdog lives
    phases: int = 0  # how many it has entered
    heartbeats: int = 0  # within the phase
    phase: str = "the start"
    may_take_long: bool = False  # others may wait for it in this phase without limit
    has_updated: bool = False  # it has completed an update


@dataclass(frozen=True)
class Failure:
    """Why the ranks end, and the rank that reported it."""

    rank: int
    host: str
    reason: str


class Watchdog(threading.Thread):
    """Ends this process if another rank fails or is missing, after a call of `on_failure` with the reason.

    Ranks write their `Status` into the store of the group (torchrun's, or rank 0's). A rank is missing if it no longer
    reports, or if it is in an earlier phase than the others and makes no progress.
    """

    def __init__(
        self, store: Store, rank: int, size: int, status: Callable[[], Status], on_failure: Callable[[str], None]
    ) -> None:
        """`store`: a connection of its own, since a thread that waits for a key blocks its connection."""
        super().__init__(name="glassgpt-watchdog", daemon=True)
        self._store, self._rank, self._size = store, rank, size
        self._status, self._on_failure = status, on_failure
        self._last_changes: dict[str, tuple[Any, float]] = {}
        self._last_look = time.monotonic()
        self._stopped = threading.Event()
        self._timeout = hang_timeout()
        self._report(0)

    def announce(self, reason: str) -> Failure:
        """Publish why the ranks must end. Returns what was published first: this, or another rank's failure."""
        own = Failure(self._rank, socket.gethostname(), reason)
        try:
            return Failure(**json.loads(self._store.compare_set("failure", "", json.dumps(asdict(own)))))
        except RuntimeError:  # the store ended with the rank that held it
            return own

    def lost_ranks(self, wait: float) -> list[str]:
        """The ranks that do not report for `wait` seconds; none if a failure is announced meanwhile."""
        deadline = time.monotonic() + wait
        try:
            before = self._statuses()
            while time.monotonic() < deadline:
                if self._announced_failure() is not None:
                    return []
                time.sleep(PERIOD / 10)
            pairs = enumerate(zip(before, self._statuses(), strict=True))
        except RuntimeError:  # the store ended with the rank that held it
            return []
        return [f"rank {n} ({now.process})" for n, (then, now) in pairs if n != self._rank and then.beat == now.beat]

    def stop(self) -> None:
        """Stop watching, and wait for the thread: inside the store's code it would abort the interpreter's exit."""
        self._stopped.set()
        if self.is_alive():
            self.join(timeout=5 * PERIOD)

    def run(self) -> None:
        """Look once per period until stopped."""
        for beat in itertools.count(1):
            if self._stopped.wait(PERIOD):
                return
            try:
                reason = self._look(beat)
            except RuntimeError:  # the store ended with torchrun, or with the rank that held it
                if self._stopped.wait(3 * PERIOD):
                    return
                reason = "the process that connects the ranks has ended"
                print_error(reason)
            if reason is not None:
                try:
                    self._on_failure(reason)
                finally:
                    end_process()

    def _announced_failure(self) -> Failure | None:
        return Failure(**json.loads(self._store.get("failure"))) if self._store.check(["failure"]) else None

    def _look(self, beat: int) -> str | None:
        """Report this rank's status; return the reason to end if another rank failed or a rank is missing."""
        failure = self._announced_failure()
        if failure is not None and failure.rank != self._rank:
            if self._rank == 0 and failure.host != socket.gethostname():  # only its own host has printed it
                print_error(failure.reason)
            return failure.reason
        self._report(beat)
        problem = self._find_missing()
        if problem is None:
            return None
        first = self.announce(problem)
        if first.rank == self._rank:
            print_error(problem)
        return first.reason

    def _find_missing(self) -> str | None:
        statuses, now = self._statuses(), time.monotonic()
        if now - self._last_look > 5 * PERIOD:  # this process itself was stopped, and perhaps all of them were
            self._last_changes.clear()
        self._last_look = now
        furthest = max(statuses, key=lambda status: status.phases)
        idle = [self._seconds_since(f"phase {n}", (s.phases, s.heartbeats)) for n, s in enumerate(statuses)]
        timeout = self._timeout * (1 if all(s.has_updated for s in statuses) else FIRST_UPDATE_FACTOR)
        for rank, status in enumerate(statuses):
            silent = self._seconds_since(f"beat {rank}", status.beat)
            is_behind = status.phases < furthest.phases and not status.may_take_long
            missing = f"rank {rank} ({status.process}) is missing:"
            if silent > self._timeout:
                return f"{missing} no sign of life for {silent:.0f} s, last seen at {status.phase}"
            if is_behind and idle[rank] > timeout:
                return f"{missing} at {status.phase} for {idle[rank]:.0f} s, while others wait at {furthest.phase}"
        if min(idle) <= timeout or any(status.may_take_long for status in statuses):
            return None
        phases = "; ".join(f"rank {rank} ({s.process}) at {s.phase}" for rank, s in enumerate(statuses))
        return f"no rank made progress for {min(idle):.0f} s (the limit is GLASSGPT_HANG_SECONDS): {phases}"

    def _statuses(self) -> list[Status]:
        return [Status(**json.loads(v)) for v in self._store.multi_get([f"rank/{n}" for n in range(self._size)])]

    def _report(self, beat: int) -> None:
        self._store.set(f"rank/{self._rank}", json.dumps(asdict(replace(self._status(), beat=beat))))

    def _seconds_since(self, key: str, value: Any) -> float:
        """Seconds since `key` was first seen with this value."""
        now = time.monotonic()
        if self._last_changes.get(key, (None, now))[0] != value:
            self._last_changes[key] = (value, now)
        return now - self._last_changes[key][1]


def print_error(message: str) -> None:
    """On standard error, as the command line prints it."""
    print(f"glassgpt: error: {message}", file=sys.stderr, flush=True)


def end_process() -> NoReturn:
    """End at once, whatever other threads wait for."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)
