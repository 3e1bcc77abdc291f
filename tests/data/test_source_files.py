"""Files fetched ahead by threads: order, lookahead, errors, cancelling and progress."""

import threading
import time
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest

from glassgpt.data.source_files import SourceFile, fetch_all


def silent(line: str) -> None:
    pass


class Fetches:
    """Files that record their fetches: those begun, and how many at once at most."""

    def __init__(self, count: int, seconds: float = 0.0) -> None:
        self.lock = threading.Lock()
        self.seconds = seconds
        self.begun: list[int] = []
        self.under_way = self.most = 0
        self.files = [SourceFile(f"{i}.txt", 10, partial(self.fetch, i)) for i in range(count)]

    def fetch(self, index: int) -> Path:
        with self.lock:
            self.begun.append(index)
            self.under_way += 1
            self.most = max(self.most, self.under_way)
        time.sleep(self.seconds * (1 + index % 3))
        with self.lock:
            self.under_way -= 1
        return Path(f"{index}.txt")


def test_files_come_in_order_and_several_at_once() -> None:
    fetches = Fetches(20, 0.01)
    came = list(fetch_all(fetches.files, parallel=4, log=silent))
    assert [(file.name, str(path)) for file, path in came] == [(f"{i}.txt", f"{i}.txt") for i in range(20)]
    assert fetches.most == 4
    assert sorted(fetches.begun) == list(range(20))


def test_fetches_stay_close_to_a_slow_reader() -> None:
    fetches = Fetches(30)
    for read, _ in enumerate(fetch_all(fetches.files, parallel=2, log=silent), 1):
        time.sleep(0.005)
        assert len(fetches.begun) <= read + 4
    assert len(fetches.begun) == 30


def test_an_error_is_raised_in_order_and_ends_the_threads() -> None:
    before = threading.active_count()
    fetches = Fetches(10)

    def fail() -> Path:
        raise ValueError("gone")

    fetches.files[3] = SourceFile("3.txt", 10, fail)
    came: list[str] = []
    with pytest.raises(ValueError, match="gone"):
        came.extend(file.name for file, _ in fetch_all(fetches.files, parallel=3, log=silent))
    assert 9 not in fetches.begun
    assert came == ["0.txt", "1.txt", "2.txt"]
    assert threading.active_count() == before


def test_closing_cancels_running_fetches() -> None:
    """A fetch would take a minute; others are never begun."""
    before = threading.active_count()
    stops = [threading.Event() for _ in range(9)]
    begun: list[int] = []

    def fetch(index: int) -> Path:
        begun.append(index)
        if index and stops[index].wait(60):
            raise RuntimeError("stopped")
        return Path("first")

    files = [SourceFile(str(i), 1, partial(fetch, i), cancel=stops[i].set) for i in range(9)]
    with closing(fetch_all(files, parallel=2, log=silent)) as fetched:
        assert next(fetched)[1] == Path("first")
        while len(begun) < 3:
            time.sleep(0.001)
    assert sorted(begun) == [0, 1, 2]
    assert [stop.is_set() for stop in stops[:3]] == [False, True, True]
    assert threading.active_count() == before


def test_progress_lines_appear_only_while_something_is_downloaded() -> None:
    came = {0: 0, 1: 0}

    def fetch(index: int) -> Path:
        for _ in range(10):
            time.sleep(0.02)
            came[index] += 100_000_000
        return Path(str(index))

    files = [SourceFile(str(i), 1_000_000_000, partial(fetch, i), present=partial(came.__getitem__, i)) for i in (0, 1)]
    local = SourceFile("local", 500_000_000, lambda: Path("local"))
    lines: list[str] = []
    assert len(list(fetch_all([*files, local], log=lines.append, every=0.05))) == 3
    assert lines[-1] == "downloaded 2.00 GB of 3 files"
    assert len(lines) >= 2
    assert all(
        line.startswith("downloading: ") and "of 3 files, " in line and " of 2.50 GB, " in line for line in lines[:-1]
    )
    assert lines[0].endswith("B/s")
    lines.clear()
    list(fetch_all([*files, local], log=lines.append, every=0.0))  # all there from the start
    assert lines == []
