"""The files of a source, some still to be downloaded: fetched ahead of the reader, and handed out in order."""

import threading
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import CancelledError, Future, wait
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

from glassgpt.utils.formatting import Log, ProgressLine, format_bytes
from glassgpt.utils.threads import in_background

# Seconds that a cancelled download may take to notice it.
_GRACE = 1.0


@dataclass(frozen=True)
class SourceFile:
    """A file of a source."""

    name: str  # its path within the folder or repository; its suffixes give the format
    bytes: int
    # The local path, or a function that downloads the file. It calls its argument with the size of each piece that
    # arrives, which may raise `CancelledError` to end it.
    origin: Path | Callable[[Callable[[int], None]], Path]
    missing: int = 0  # of its bytes

    def fetch(self, on_bytes: Callable[[int], None] = lambda count: None) -> Path:
        """Return the local path, after the download."""
        return self.origin if isinstance(self.origin, Path) else self.origin(on_bytes)


def fetch_all(
    files: Sequence[SourceFile], *, parallel: int = 4, log: Log, every: float = 5.0
) -> Generator[tuple[SourceFile, Path], None, None]:
    """Yield each file with its local path, in order, while `parallel` threads fetch the next ones.

    At most `2 * parallel` files are ahead, so that a slow reader does not fill the disk. The exception of a fetch is
    raised when its file's turn comes. Then, and when the generator is closed, running fetches are cancelled.
    """
    total, missing = sum(file.bytes for file in files), sum(file.missing for file in files)
    progress, received, waiting = ProgressLine(log, every), [0] * len(files), enumerate(files)
    slots, closing = threading.Semaphore(parallel), threading.Event()
    ahead: deque[Future[Path]] = deque()

    def fetch(number: int, file: SourceFile) -> Path:
        def on_bytes(count: int) -> None:
            received[number] = min(received[number] + count, file.missing)
            if closing.is_set():
                raise CancelledError

        with slots:
            on_bytes(0)
            return file.fetch(on_bytes)

    def start(count: int) -> None:
        for number, file in islice(waiting, count):
            ahead.append(in_background(partial(fetch, number, file), "glassgpt-fetch"))  # a server may be silent

    def message(read: int, seconds: float) -> str:
        done, amount = read + sum(result.done() for result in ahead), format_bytes(total - missing + sum(received))
        speed = format_bytes(sum(received) / seconds)
        return f"downloading: {done} of {len(files)} files, {amount} of {format_bytes(total)}, {speed}/s"

    try:
        start(2 * parallel)
        for read, file in enumerate(files):
            while missing and not wait([ahead[0]], timeout=0.1).done:
                progress.update(partial(message, read))
            yield file, ahead[0].result()
            ahead.popleft()
            start(1)
    finally:
        closing.set()
        wait(ahead, _GRACE)
    if missing:
        log(f"downloaded {format_bytes(missing)} of {len(files)} files")
