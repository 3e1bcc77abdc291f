"""Work in threads for which the end of the process does not wait."""

import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from glassgpt.utils.errors import NO_THREADS, is_out_of_threads

T = TypeVar("T")


def in_background(work: Callable[[], T], name: str) -> Future[T]:
    """Call a function in a daemon thread of this name. At exit, Python would wait for those of a ThreadPoolExecutor.

    If the system refuses another thread, the function is called here and now, after a warning.
    """
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    try:
        threading.Thread(target=run, name=name, daemon=True).start()
    except RuntimeError as error:
        if not is_out_of_threads(error):
            raise
        print(f"glassgpt: warning: {NO_THREADS}; {name} runs in the foreground", file=sys.stderr)
        run()
    return future
