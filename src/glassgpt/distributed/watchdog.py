"""A thread on each rank that ends the process if another rank fails, and finds the rank that the others wait for."""

import itertools
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, NoReturn

from torch.distributed.distributed_c10d import Store

from glassgpt.utils.errors import UserError

# Seconds between two looks at the store.
PERIOD = 1.0
# How much longer a rank may take before its first update is complete: the first step compiles, and reads data for the
# first time.
FIRST_UPDATE_FACTOR = 6


def hang_timeout() -> float:
    """Seconds after which a rank that the others wait for counts as missing."""
    text = os.environ.get("GLASSGPT_HANG_SECONDS", "600")
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not seconds >= 3 * PERIOD:
        raise UserError(f"GLASSGPT_HANG_SECONDS must be a number of seconds, at least {3 * PERIOD:.0f}, got {text!r}")
    return seconds


@dataclass(frozen=True)
class Status:
    """What a rank last reported about itself."""

    beat: int  # increases while its watchdog lives
    phases: int  # how many it has entered
    heartbeats: int  # within the phase
    phase: str
    may_take_long: bool  # others may wait for it in this phase without limit
    has_updated: bool  # it has completed an update
    process: str


@dataclass(frozen=True)
class Failure:
    """Why the ranks end, and the rank that reported it."""

    rank: int
    host: str
    reason: str


class Watchdog(threading.Thread):
    """Ends this process if another rank fails or is missing.

    Ranks write their `Status` into the store of the group (torchrun's, or rank 0's). A rank is missing if it no longer
    reports, or if it is in an earlier phase than the others and makes no progress.
    """

    def __init__(self, store: Store, rank: int, size: int) -> None:
        """`store` needs a connection of its own: a thread that waits for a key blocks its connection."""
        super().__init__(name="glassgpt-watchdog", daemon=True)
        self.on_failure: Callable[[str], None] = lambda reason: None  # called with the reason before the process ends
        self._store = store
        self._rank, self._size = rank, size
        self._phase: tuple[int, int, str, bool] = (0, 0, "the start", False)
        self._has_updated = False
        self._last_changes: dict[str, tuple[Any, float]] = {}
        self._last_look = time.monotonic()
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._timeout = hang_timeout()
        self._report(0)

    def enter_phase(self, name: str, may_take_long: bool) -> None:
        """This rank enters the next phase."""
        self._phase = (self._phase[0] + 1, 0, name, may_take_long)

    def heartbeat(self) -> None:
        """This rank makes progress within its phase."""
        phases, heartbeats, name, may_take_long = self._phase
        self._phase = (phases, heartbeats + 1, name, may_take_long)

    def update_completed(self) -> None:
        """This rank has completed an update: from now on the plain timeout applies to it."""
        self._has_updated = True

    def set_mark(self, key: str) -> None:
        """Set a mark that other ranks can see."""
        with self._lock:
            self._store.set(f"mark/{key}", "1")

    def has_mark(self, key: str) -> bool:
        """Whether a rank has set this mark."""
        with self._lock:
            return bool(self._store.check([f"mark/{key}"]))

    def announce(self, reason: str) -> Failure:
        """Publish why the ranks must end. Returns what was published first: this, or another rank's failure."""
        own = Failure(self._rank, socket.gethostname(), reason)
        try:
            with self._lock:
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
                reason = self._failure_elsewhere() or self._find_missing(beat)
            except RuntimeError:  # the store ended with torchrun, or with the rank that held it
                if self._stopped.wait(3 * PERIOD):
                    return
                reason = "the process that connects the ranks has ended"
                print(f"glassgpt: error: {reason}", file=sys.stderr, flush=True)
            if reason is not None:
                try:
                    self.on_failure(reason)
                finally:
                    end_process()

    def _announced_failure(self) -> Failure | None:
        with self._lock:
            return Failure(**json.loads(self._store.get("failure"))) if self._store.check(["failure"]) else None

    def _failure_elsewhere(self) -> str | None:
        """Why another rank failed. Its own host has printed that; rank 0 repeats it if it is on another host."""
        failure = self._announced_failure()
        if failure is None or failure.rank == self._rank:
            return None
        if self._rank == 0 and failure.host != socket.gethostname():
            print(f"glassgpt: error: {failure.reason}", file=sys.stderr, flush=True)
        return failure.reason

    def _find_missing(self, beat: int) -> str | None:
        """Report this rank's status; return the reason to end if a rank is missing. The first to notice prints it."""
        self._report(beat)
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
            if silent > self._timeout:
                problem = f"no sign of life for {silent:.0f} s, last seen at {status.phase}"
            elif is_behind and idle[rank] > timeout:
                problem = f"at {status.phase} for {idle[rank]:.0f} s, while others wait at {furthest.phase}"
            else:
                continue
            return self._announce_and_print(f"rank {rank} ({status.process}) is missing: {problem}")
        if min(idle) > timeout and not any(status.may_take_long for status in statuses):
            phases = "; ".join(f"rank {rank} ({s.process}) at {s.phase}" for rank, s in enumerate(statuses))
            limit = "the limit is GLASSGPT_HANG_SECONDS"
            return self._announce_and_print(f"no rank made progress for {min(idle):.0f} s ({limit}): {phases}")
        return None

    def _announce_and_print(self, reason: str) -> str:
        first = self.announce(reason)
        if first.rank == self._rank:
            print(f"glassgpt: error: {reason}", file=sys.stderr, flush=True)
        return first.reason

    def _statuses(self) -> list[Status]:
        with self._lock:
            values = self._store.multi_get([f"rank/{rank}" for rank in range(self._size)])
        return [Status(**json.loads(value)) for value in values]

    def _report(self, beat: int) -> None:
        own = Status(beat, *self._phase, self._has_updated, f"{socket.gethostname()}, process {os.getpid()}")
        with self._lock:
            self._store.set(f"rank/{self._rank}", json.dumps(asdict(own)))

    def _seconds_since(self, key: str, value: Any) -> float:
        """Seconds since `key` was first seen with this value."""
        now = time.monotonic()
        if self._last_changes.get(key, (None, now))[0] != value:
            self._last_changes[key] = (value, now)
        return now - self._last_changes[key][1]


def end_process() -> NoReturn:
    """End at once, whatever other threads wait for."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(1)
