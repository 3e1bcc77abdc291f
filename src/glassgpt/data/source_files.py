"""The files of a source, some still to be downloaded: fetched ahead of the reader, and handed out in order."""

import threading
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from pathlib import Path

from glassgpt.utils.formatting import format_bytes

Log = Callable[[str], None]

# Seconds that a cancelled download may take to notice it.
_GRACE = 1.0


@dataclass(frozen=True)
class SourceFile:
    """A file of a source.

    `name` is its path within the folder or repository, for errors and manifests; its suffixes give the format. `fetch` returns
    the local path and may download it, in a thread. `present` returns how many of its `bytes` are here (None: all of them), and
    `cancel`, called from another thread, ends a running fetch with an exception.
    """

    name: str
    bytes: int
    fetch: Callable[[], Path]
    present: Callable[[], int] | None = None
    cancel: Callable[[], None] | None = None


def fetch_all(
    files: Sequence[SourceFile], *, parallel: int = 4, log: Log, every: float = 5.0
) -> Generator[tuple[SourceFile, Path], None, None]:
    """Yield each file with its local path, in order, while `parallel` threads fetch the next ones.

    At most `2 * parallel` files are ahead of the reader, so that a slow reader does not fill the disk. `log` gets a line on the
    progress every `every` seconds. The exception of a fetch is raised when its file's turn comes. Then, and when the generator is
    closed, running fetches are cancelled.
    """
    # Daemon threads instead of a ThreadPoolExecutor: at exit, Python would wait for a download from a silent server.
    results: list[Future[Path]] = [Future() for _ in files]
    todo, todo_lock = iter(zip(files, results, strict=True)), threading.Lock()
    window, closing = threading.Semaphore(2 * parallel), threading.Event()

    def work() -> None:
        while window.acquire() and not closing.is_set():
            with todo_lock:
                file, result = next(todo, (None, None))
            if file is None or result is None:
                return
            try:
                result.set_result(file.fetch())
            except BaseException as error:  # raised in the reader
                result.set_exception(error)

    threads = [threading.Thread(target=work, name=f"fetch-{i}", daemon=True) for i in range(min(parallel, len(files)))]
    progress = _Progress(files, log, every)
    try:
        for thread in threads:
            thread.start()
        for file, result in zip(files, results, strict=True):
            while not result.done():
                progress.report(results)
                wait([result], timeout=0.1)
            progress.report(results)
            yield file, result.result()
            window.release()
        progress.finish()
    finally:
        closing.set()
        for file, result in zip(files, results, strict=True):
            if file.cancel is not None and not result.done():
                file.cancel()
        for _ in threads:
            window.release()
        deadline = time.monotonic() + _GRACE
        for thread in threads:
            if thread.ident is not None:
                thread.join(max(0.0, deadline - time.monotonic()))


class _Progress:
    """Logs how far the downloads are; nothing if everything is here."""

    def __init__(self, files: Sequence[SourceFile], log: Log, every: float) -> None:
        self._files, self._log, self._every = files, log, every
        self._total = sum(file.bytes for file in files)
        self._first = self._last = self._present()
        self._start = self._last_time = time.monotonic()

    def _present(self) -> int:
        return sum(file.bytes if file.present is None else min(file.present(), file.bytes) for file in self._files)

    def report(self, results: Sequence[Future[Path]]) -> None:
        """Log a line if one is due."""
        now = time.monotonic()
        if self._first == self._total or now - self._last_time < self._every:
            return
        present, done = self._present(), sum(result.done() for result in results)
        speed = max(0, present - self._last) / (now - self._last_time)
        amount = f"{format_bytes(present)} of {format_bytes(self._total)}"
        self._log(f"downloading: {done} of {len(self._files)} files, {amount}, {format_bytes(speed)}/s")
        self._last, self._last_time = present, now

    def finish(self) -> None:
        """Log the last line."""
        if self._first < self._total:
            seconds = time.monotonic() - self._start
            self._log(
                f"downloaded {format_bytes(self._total - self._first)} of {len(self._files)} files in {seconds:.0f} s"
            )
