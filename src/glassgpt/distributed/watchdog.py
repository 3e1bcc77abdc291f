"""A thread of each rank that ends it when another one fails, and finds the rank that the others wait for."""

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

from torch.distributed import Store  # type: ignore[attr-defined]

from glassgpt.utils.errors import UserError

# Seconds between two looks at the store.
PERIOD = 1.0


def patience() -> float:
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
class Sighting:
    """Where a rank was when it last told: its place, and how many places it has passed."""

    beat: int
    count: int
    ticks: int
    """Steps within the place: some work for longer than others there."""
    place: str
    may_take_long: bool
    process: str


@dataclass(frozen=True)
class Failure:
    """Why the ranks end, and the rank that says so."""

    by: int
    host: str
    reason: str


class Watch(threading.Thread):
    """Ends this process when another rank fails, or is missing.

    The ranks write into the store of the group (torchrun's, or rank 0's) where each of them is: how many places it has passed and
    the name of the last. One is missing that is not heard from any more, or that is behind the others and does not move.
    """

    def __init__(self, store: Store, rank: int, size: int) -> None:
        """`store`: through a connection of its own, since a thread that waits for a key keeps the connection to itself."""
        super().__init__(name="glassgpt-watch", daemon=True)
        self._store = store
        self._rank, self._size = rank, size
        self._at: tuple[int, int, str, bool] = (0, 0, "the start", False)
        self._seen: dict[str, tuple[Any, float]] = {}
        self._looked = time.monotonic()
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._patience = patience()
        self.tell: Callable[[str], None] = lambda reason: None
        """Is called with the reason before the end."""
        self._show(0)

    def place(self, name: str, may_take_long: bool) -> None:
        """This rank goes on to the next place; others may be made to wait there where it `may_take_long`."""
        self._at = (self._at[0] + 1, 0, name, may_take_long)

    def tick(self) -> None:
        """This rank goes on within its place."""
        count, ticks, name, may_take_long = self._at
        self._at = (count, ticks + 1, name, may_take_long)

    def mark(self, key: str) -> None:
        """Leave a mark for the other ranks."""
        with self._lock:
            self._store.set(f"mark/{key}", "1")

    def is_marked(self, key: str) -> bool:
        """Whether a rank has left that mark."""
        with self._lock:
            return bool(self._store.check([f"mark/{key}"]))

    def announce(self, reason: str) -> Failure:
        """Write down why the ranks are to end. Returns what was written first: this, or another rank's."""
        own = Failure(self._rank, socket.gethostname(), reason)
        try:
            with self._lock:
                return Failure(**json.loads(self._store.compare_set("failure", "", json.dumps(asdict(own)))))
        except RuntimeError:  # the store went with the rank that held it
            return own

    def _first_failure(self) -> Failure | None:
        with self._lock:
            return Failure(**json.loads(self._store.get("failure"))) if self._store.check(["failure"]) else None

    def stop(self) -> None:
        """Look no more. Waits for the thread: in the store's code it would abort the end of the interpreter."""
        self._stopped.set()
        if self.is_alive():
            self.join(timeout=5 * PERIOD)

    def lost(self, wait: float) -> list[str]:
        """The processes that have not shown themselves for so many seconds; none where a failure is announced meanwhile."""
        give_up = time.monotonic() + wait
        try:
            before = self._sightings()
            while time.monotonic() < give_up:
                if self._first_failure() is not None:
                    return []
                time.sleep(PERIOD / 10)
            after = self._sightings()
        except RuntimeError:  # the store went with the rank that held it
            return []
        pairs = enumerate(zip(before, after, strict=True))
        return [
            f"rank {rank} ({now.process})"
            for rank, (then, now) in pairs
            if rank != self._rank and then.beat == now.beat
        ]

    def run(self) -> None:
        """Look, once a period, until stopped."""
        for beat in itertools.count(1):
            if self._stopped.wait(PERIOD):
                return
            try:
                reason = self._failure_elsewhere() or self._missing(beat)
            except RuntimeError:  # the store is gone: with torchrun, or with the rank that held it
                if self._stopped.wait(3 * PERIOD):
                    return
                reason = "the process that holds the ranks together is gone"
                print(f"glassgpt: error: {reason}", file=sys.stderr, flush=True)
            if reason is not None:
                try:
                    self.tell(reason)
                finally:
                    end_process()

    def _failure_elsewhere(self) -> str | None:
        """The reason that another rank has announced, which its own host has been told."""
        failure = self._first_failure()
        if failure is None or failure.by == self._rank:
            return None
        if self._rank == 0 and failure.host != socket.gethostname():
            print(f"glassgpt: error: {failure.reason}", file=sys.stderr, flush=True)
        return failure.reason

    def _missing(self, beat: int) -> str | None:
        """Tell where this rank is; the reason to end where one is missing, which the first to notice prints."""
        self._show(beat)
        sightings = self._sightings()
        now = time.monotonic()
        if now - self._looked > 5 * PERIOD:  # this process was stopped itself, and perhaps all of them were
            self._seen.clear()
        self._looked = now
        furthest = max(sightings, key=lambda sighting: sighting.count)
        idle = [
            self._seconds_since(f"place of {rank}", (seen.count, seen.ticks)) for rank, seen in enumerate(sightings)
        ]
        for rank, (seen, still) in enumerate(zip(sightings, idle, strict=True)):
            silent = self._seconds_since(f"beat of {rank}", seen.beat)
            if silent > self._patience:
                why = f"not heard from for {silent:.0f} s, last seen at {seen.place}"
            elif seen.count < furthest.count and not seen.may_take_long and still > self._patience:
                why = f"at {seen.place} for {still:.0f} s, while others wait at {furthest.place}"
            else:
                continue
            return self._announced(f"rank {rank} ({seen.process}) is missing: {why}")
        if min(idle) > self._patience and not any(seen.may_take_long for seen in sightings):
            places = "; ".join(f"rank {rank} ({seen.process}) at {seen.place}" for rank, seen in enumerate(sightings))
            return self._announced(
                f"no rank has gone on for {min(idle):.0f} s (GLASSGPT_HANG_SECONDS sets how many are allowed): {places}"
            )
        return None

    def _announced(self, reason: str) -> str:
        """The reason to end, which the rank that is the first to announce one prints."""
        first = self.announce(reason)
        if first.by == self._rank:
            print(f"glassgpt: error: {reason}", file=sys.stderr, flush=True)
        return first.reason

    def _sightings(self) -> list[Sighting]:
        with self._lock:
            values = self._store.multi_get([f"rank/{rank}" for rank in range(self._size)])
        return [Sighting(**json.loads(value)) for value in values]

    def _show(self, beat: int) -> None:
        own = Sighting(beat, *self._at, f"{socket.gethostname()}, process {os.getpid()}")
        with self._lock:
            self._store.set(f"rank/{self._rank}", json.dumps(asdict(own)))

    def _seconds_since(self, what: str, value: Any) -> float:
        """Seconds since something was first seen to have this value."""
        now = time.monotonic()
        if self._seen.get(what, (None, now))[0] != value:
            self._seen[what] = (value, now)
        return now - self._seen[what][1]


def end_process() -> NoReturn:
    """End at once, whatever the other threads wait for."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(1)
