"""The files of a source, some still to be downloaded: fetched ahead of the reader, and handed out in order."""

import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from glassgpt.data.progress import Log, ProgressLine
from glassgpt.utils.formatting import format_bytes

# Seconds that a cancelled download may take to notice it.
_GRACE = 1.0


@dataclass(frozen=True)
class SourceFile:
    """A file of a source.

    `name` is its path within the folder or repository, for errors and manifests; its suffixes give the format. `fetch`
    returns the local path and may download it, in a thread. `present` returns how many of its `bytes` are here (None:
    all of them), and `cancel`, called from another thread, ends a running fetch with an exception.
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

    At most `2 * parallel` files are ahead of the reader, so that a slow reader does not fill the disk. `log` gets a
    line on the progress every `every` seconds. The exception of a fetch is raised when its file's turn comes. Then, and
    when the generator is closed, running fetches are cancelled.
    """
    results: list[Future[Path]] = [Future() for _ in files]
    progress, total, first = ProgressLine(log, every), sum(file.bytes for file in files), _present_bytes(files)

    def message(seconds: float) -> str:
        present, done = _present_bytes(files), sum(result.done() for result in results)
        amount = f"{format_bytes(present)} of {format_bytes(total)}"
        return f"downloading: {done} of {len(files)} files, {amount}, {format_bytes((present - first) / seconds)}/s"

    with _fetching(files, results, parallel) as window:
        for file, result in zip(files, results, strict=True):
            while first < total and not wait([result], timeout=0.1).done:
                progress.update(message)
            yield file, result.result()
            window.release()
    if first < total:
        log(f"downloaded {format_bytes(total - first)} of {len(files)} files")


@contextmanager
def _fetching(
    files: Sequence[SourceFile], results: Sequence[Future[Path]], parallel: int
) -> Iterator[threading.Semaphore]:
    """Run threads that fetch the files. They wait at the semaphore, which the reader releases after each file."""
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

    # Daemon threads instead of a ThreadPoolExecutor: at exit, Python would wait for a download from a silent server.
    threads = [threading.Thread(target=work, name=f"fetch-{i}", daemon=True) for i in range(min(parallel, len(files)))]
    for thread in threads:
        thread.start()
    try:
        yield window
    finally:
        closing.set()
        for file, result in zip(files, results, strict=True):
            if file.cancel is not None and not result.done():
                file.cancel()
        window.release(len(threads) or 1)
        deadline = time.monotonic() + _GRACE
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))


def _present_bytes(files: Sequence[SourceFile]) -> int:
    return sum(file.bytes if file.present is None else min(file.present(), file.bytes) for file in files)
