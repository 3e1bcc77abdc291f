"""Files fetched ahead by threads: order, lookahead, errors, cancelling and progress."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest

from glassgpt.data.source_files import SourceFile, fetch_all

OnBytes = Callable[[int], None]


def silent(line: str) -> None:
    pass


class Fetches:
    """Source files that record which fetches began and the largest number of concurrent fetches."""

    def __init__(self, count: int, seconds: float = 0.0) -> None:
        self.lock = threading.Lock()
        self.seconds = seconds
        self.begun: list[int] = []
        self.running = self.most_concurrent = 0
        self.files = [SourceFile(f"{i}.txt", 10, partial(self.fetch, i)) for i in range(count)]

    def fetch(self, index: int, on_bytes: OnBytes) -> Path:
        with self.lock:
            self.begun.append(index)
            self.running += 1
            self.most_concurrent = max(self.most_concurrent, self.running)
        time.sleep(self.seconds * (1 + index % 3))
        with self.lock:
            self.running -= 1
        return Path(f"{index}.txt")


def test_files_arrive_in_order_and_several_are_fetched_concurrently() -> None:
    fetches = Fetches(20, 0.01)
    received = list(fetch_all(fetches.files, parallel=4, log=silent))
    assert [(file.name, str(path)) for file, path in received] == [(f"{i}.txt", f"{i}.txt") for i in range(20)]
    assert fetches.most_concurrent == 4
    assert sorted(fetches.begun) == list(range(20))


def test_at_most_four_fetches_run_ahead_of_a_slow_reader() -> None:
    fetches = Fetches(30)
    for read, _ in enumerate(fetch_all(fetches.files, parallel=2, log=silent), 1):
        time.sleep(0.005)
        assert len(fetches.begun) <= read + 4
    assert len(fetches.begun) == 30


def test_an_error_is_raised_in_order_and_ends_the_threads() -> None:
    before = threading.active_count()
    fetches = Fetches(10)

    def fail(on_bytes: OnBytes) -> Path:
        raise ValueError("gone")

    fetches.files[3] = SourceFile("3.txt", 10, fail)
    received: list[str] = []
    with pytest.raises(ValueError, match="gone"):
        received.extend(file.name for file, _ in fetch_all(fetches.files, parallel=3, log=silent))
    assert 9 not in fetches.begun
    assert received == ["0.txt", "1.txt", "2.txt"]
    assert threading.active_count() == before


def test_closing_cancels_running_fetches() -> None:
    """The two running fetches, of a minute each, are cancelled; no others begin."""
    before = threading.active_count()
    begun: list[int] = []
    cancelled: list[int] = []

    def fetch(index: int, on_bytes: OnBytes) -> Path:
        begun.append(index)
        for _ in range(6000 if index else 0):
            time.sleep(0.01)
            try:
                on_bytes(1)
            except CancelledError:
                cancelled.append(index)
                raise
        return Path("first")

    files = [SourceFile(str(i), 1, partial(fetch, i), missing=1) for i in range(9)]
    with closing(fetch_all(files, parallel=2, log=silent)) as fetched:
        assert next(fetched)[1] == Path("first")
        while len(begun) < 3:
            time.sleep(0.001)
    assert sorted(begun) == [0, 1, 2]
    assert sorted(cancelled) == [1, 2]
    assert threading.active_count() == before


def test_progress_lines_appear_only_while_something_is_downloaded() -> None:

    def fetch(on_bytes: OnBytes) -> Path:
        for _ in range(10):
            time.sleep(0.02)
            on_bytes(100_000_000)
        return Path("downloaded")

    files = [SourceFile(str(i), 1_000_000_000, fetch, missing=1_000_000_000) for i in (0, 1)]
    local = SourceFile("local", 500_000_000, Path("local"))
    lines: list[str] = []
    assert len(list(fetch_all([*files, local], log=lines.append, every=0.05))) == 3
    assert lines[-1] == "downloaded 2.00 GB of 3 files"
    assert len(lines) >= 2
    assert all(
        line.startswith("downloading: ") and "of 3 files, " in line and " of 2.50 GB, " in line for line in lines[:-1]
    )
    assert lines[0].endswith("B/s")
    lines.clear()
    here = [SourceFile(file.name, file.bytes, Path(file.name)) for file in files]
    list(fetch_all([*here, local], log=lines.append, every=0.0))
    assert lines == []
