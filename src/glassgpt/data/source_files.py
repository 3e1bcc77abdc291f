"""The files of a source, some of them still to be downloaded: fetched ahead of whoever reads them, handed out in their order."""

import threading
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

Log = Callable[[str], None]

# How long an ended download may take to notice; a thread that hangs in a silent connection is left behind, and writes no more.
_GRACE = 1.0


@dataclass(frozen=True)
class SourceFile:
    """A file of a source, on the disk already or to be downloaded first.

    `name` is what errors and manifests call it: its path within the folder or repository; its suffixes tell the format.
    `fetch` returns the local path, downloading where it is not there yet; several files may be fetched at once, by threads.

    `present` tells how many of its bytes have come (None: it is on the disk), and `cancel`, called from another thread, ends a
    fetch under way, and any later one of this object, with an exception.
    """

    name: str
    bytes: int
    fetch: Callable[[], Path]
    present: Callable[[], int] | None = None
    cancel: Callable[[], None] | None = None


def fetch_all(
    files: Sequence[SourceFile], *, parallel: int = 4, log: Log, every: float = 5.0
) -> Generator[tuple[SourceFile, Path], None, None]:
    """Each file with its local path, in the given order, while threads fetch the next ones.

    `parallel` files are fetched at once, and never more than twice as many are ahead of the one handed out last, so that a slow
    reader does not fill the disk. Every `every` seconds `log` gets a line on how far it is, whenever the reader waits or asks.
    An exception of a fetch is raised when its file's turn has come. Then, and when the generator is closed (which an exception
    in the reader does later than `contextlib.closing` does), the fetches under way are cancelled.
    """
    fetching = _Fetching(files, 2 * parallel)
    progress = _Progress(files, log, every)
    threads = [
        threading.Thread(target=fetching.work, name=f"fetch-{i}", daemon=True) for i in range(min(parallel, len(files)))
    ]
    try:
        for thread in threads:
            thread.start()
        for index, file in enumerate(files):
            while (result := fetching.result(index, 0.1)) is None:
                progress.tell(fetching.done())
            if isinstance(result, BaseException):
                raise result
            progress.tell(fetching.done())
            yield file, result
        progress.end()
    finally:
        fetching.end()
        deadline = time.monotonic() + _GRACE
        for thread in threads:
            if thread.ident is not None:
                thread.join(max(0.0, deadline - time.monotonic()))


@dataclass
class _Fetching:
    """What the threads share: which file is next, and what became of each."""

    files: Sequence[SourceFile]
    ahead: int
    _next: int = 0
    _handed: int = 0
    _ending: bool = False
    _results: dict[int, Path | BaseException] = field(default_factory=dict)
    _changed: threading.Condition = field(default_factory=threading.Condition)

    def work(self) -> None:
        """A thread's whole life: fetch the next file, until there is none."""
        while (index := self._take()) is not None:
            result: Path | BaseException
            try:
                result = self.files[index].fetch()
            except BaseException as error:  # raised to the reader, when the file's turn has come
                result = error
            with self._changed:
                self._results[index] = result
                self._changed.notify_all()

    def _take(self) -> int | None:
        with self._changed:
            self._changed.wait_for(lambda: self._ending or self._next < self._handed + self.ahead)
            if self._ending or self._next >= len(self.files):
                return None
            self._next += 1
            return self._next - 1

    def result(self, index: int, timeout: float) -> Path | BaseException | None:
        """What became of a file, whose turn it is: None where it is not known after `timeout` seconds."""
        with self._changed:
            if not self._changed.wait_for(lambda: index in self._results, timeout):
                return None
            self._handed = index + 1
            self._changed.notify_all()
            return self._results[index]

    def done(self) -> int:
        """How many fetches are over."""
        with self._changed:
            return len(self._results)

    def end(self) -> None:
        """Let no thread begin another file, and cancel those that are under way."""
        with self._changed:
            self._ending = True
            under_way = [file for i, file in enumerate(self.files[: self._next]) if i not in self._results]
            self._changed.notify_all()
        for file in under_way:
            if file.cancel is not None:
                file.cancel()


class _Progress:
    """Says how far the downloads are; nothing where everything is there."""

    def __init__(self, files: Sequence[SourceFile], log: Log, every: float) -> None:
        self.files, self.log, self.every = files, log, every
        self.total = sum(file.bytes for file in files)
        self.first = self.last = self._present()
        self.began = self.told = time.monotonic()

    def _present(self) -> int:
        return sum(file.bytes if file.present is None else min(file.present(), file.bytes) for file in self.files)

    def tell(self, done: int) -> None:
        """A line, where one is due and there is something to download."""
        now = time.monotonic()
        if self.first == self.total or now - self.told < self.every:
            return
        present = self._present()
        rate = max(0, present - self.last) / (now - self.told)
        files = f"{done} of {len(self.files)} files"
        self.log(f"downloading: {files}, {_size(present)} of {_size(self.total)}, {_size(rate)}/s")
        self.last, self.told = present, now

    def end(self) -> None:
        """The last line."""
        if self.first < self.total:
            seconds = time.monotonic() - self.began
            self.log(f"downloaded {_size(self.total - self.first)} of {len(self.files)} files in {seconds:.0f} s")


def _size(count: float) -> str:
    """Bytes as people read them, in powers of a thousand."""
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"
