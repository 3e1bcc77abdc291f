"""Worker processes that prepare work units in parallel."""

import multiprocessing
import os
import signal
import sys
import threading
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.context import SpawnContext, SpawnProcess
from typing import Any, TypeVar

from glassgpt.utils.errors import UserError

R = TypeVar("R")


def run_tasks(
    task: Callable[..., R], arguments: Iterable[Sequence[Any]], workers: int, report: Callable[[], None]
) -> list[R]:
    """Call a task (a module-level function) with each of the arguments; return the results in order.

    With 1 worker the task runs in this process, and gets `report` as a further argument. Raises the first exception of
    a task; then, or if this process is interrupted or killed, the workers are killed.
    """
    if workers == 1:
        return [task(*each, report) for each in arguments]
    futures: list[Future[R]] = []
    running: set[Future[R]] = set()

    def wait_until(most: int) -> None:
        """Wait until at most this many tasks are running. Raises the exception of one that failed."""
        nonlocal running
        while len(running) > most:
            done, running = wait(running, timeout=1, return_when=FIRST_COMPLETED)
            for future in done:
                future.result()
            report()

    with _pool(workers) as pool:
        try:
            for each in arguments:
                futures.append(pool.submit(task, *each))
                running.add(futures[-1])
                wait_until(workers - 1)
            wait_until(0)
        except (BrokenProcessPool, MemoryError):
            advice = "use fewer --workers (--workers 1 shows other reasons)"
            raise UserError(f"out of memory, or a worker process was killed; {advice}") from None
    return [future.result() for future in futures]


@contextmanager
def _pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """A pool whose processes are killed at the end, whatever they do."""
    processes: list[_Worker] = []

    def new_worker(*arguments: Any, **named: Any) -> _Worker:
        processes.append(_Worker(*arguments, **named))
        return processes[-1]

    context = SpawnContext()
    context.Process = new_worker  # type: ignore[misc, assignment] # the pool does not show its processes in Python 3.11
    # Twice a worker's share of the cores, since others wait for the disk, or have nothing left to do.
    threads = 2 * max(1, (os.cpu_count() or 1) // workers)
    pool = ProcessPoolExecutor(workers, context, _initialize, (threads,))
    try:
        yield pool
    finally:
        for process in processes:
            if process.pid is not None:
                process.kill()
        pool.shutdown(cancel_futures=True)


class _Worker(SpawnProcess):
    """A process that Ctrl-C does not reach, as each would print a traceback, and that does not run the user's files."""

    def start(self) -> None:
        resource_tracker.ensure_running()  # starting it later would unblock the signal
        main, environment = sys.modules["__main__"], dict(os.environ)
        signals = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        sys.modules["__main__"] = types.ModuleType("__main__")  # otherwise a script without a guard would run again
        os.environ["PYTHONSAFEPATH"] = "1"  # no modules from the working directory, which may have a `queue.py`
        try:
            super().start()
        finally:
            sys.modules["__main__"] = main
            os.environ.pop("PYTHONSAFEPATH")
            os.environ.update(environment)
            signal.pthread_sigmask(signal.SIG_SETMASK, signals)


def _initialize(threads: int) -> None:
    """Set up a worker: the threads of its tokenizer, and its exit if the parent is killed."""

    def exit_with_parent() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    os.environ["RAYON_NUM_THREADS"] = str(threads)
    threading.Thread(target=exit_with_parent, daemon=True).start()
