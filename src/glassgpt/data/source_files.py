"""The files of a source, some still to be downloaded: fetched ahead of the reader, and handed out in order."""

import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

from glassgpt.utils.formatting import Log, ProgressLine, format_bytes

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
    progress, total, first = ProgressLine(log, every), sum(file.bytes for file in files), _present_bytes(files)
    slots, closing, waiting = threading.Semaphore(parallel), threading.Event(), iter(files)
    ahead: deque[tuple[SourceFile, Future[Path], threading.Thread]] = deque()

    def fetch(file: SourceFile, result: Future[Path]) -> None:
        with slots:
            try:
                if not closing.is_set():
                    result.set_result(file.fetch())
            except BaseException as error:  # raised in the reader
                result.set_exception(error)

    def start(count: int) -> None:
        for file in islice(waiting, count):
            result: Future[Path] = Future()
            # Daemon threads instead of a ThreadPoolExecutor: at exit, Python would wait for a silent server.
            ahead.append((file, result, threading.Thread(target=fetch, args=(file, result), daemon=True)))
            ahead[-1][2].start()

    def message(read: int, seconds: float) -> str:
        present, done = _present_bytes(files), read + sum(result.done() for _, result, _ in ahead)
        amount = f"{format_bytes(present)} of {format_bytes(total)}"
        return f"downloading: {done} of {len(files)} files, {amount}, {format_bytes((present - first) / seconds)}/s"

    try:
        start(2 * parallel)
        for read, file in enumerate(files):
            result = ahead[0][1]
            while first < total and not wait([result], timeout=0.1).done:
                progress.update(partial(message, read))
            yield file, result.result()
            ahead.popleft()[2].join()
            start(1)
    finally:
        closing.set()
        for file, result, _ in ahead:
            if file.cancel is not None and not result.done():
                file.cancel()
        deadline = time.monotonic() + _GRACE
        for _, _, thread in ahead:
            thread.join(max(0.0, deadline - time.monotonic()))
    if first < total:
        log(f"downloaded {format_bytes(total - first)} of {len(files)} files")


def _present_bytes(files: Sequence[SourceFile]) -> int:
    return sum(file.bytes if file.present is None else min(file.present(), file.bytes) for file in files)
