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

from glassgpt.data.work_units import Report
from glassgpt.utils.errors import UserError

R = TypeVar("R")


def run_tasks(task: Callable[..., R], arguments: Iterable[Sequence[Any]], workers: int, report: Report) -> list[R]:
    """Call a task (a module-level function) with each of the arguments and a `report`; return the results in order.

    With 1 worker it runs in this process. `arguments` may wait for downloads. Raises the first exception of a task; the
    workers are killed then, and also if this process is interrupted or killed.
    """
    if workers == 1:
        return [task(*each, report) for each in arguments]
    futures: list[Future[R]] = []
    running: set[Future[R]] = set()
    with _pool(workers) as pool:
        try:
            for each in arguments:
                futures.append(pool.submit(task, *each, _no_report))
                running.add(futures[-1])
                while len(running) >= workers:
                    running = _wait(running, report)
            while running:
                running = _wait(running, report)
        except BrokenProcessPool:
            raise UserError(
                "a worker process was killed, as the system does if memory runs out; use fewer --workers "
                "(--workers 1 shows other reasons)"
            ) from None
        except MemoryError:
            raise UserError("out of memory; use fewer --workers") from None
    return [future.result() for future in futures]


def _no_report() -> None:
    """Workers do not report: progress is measured from the files that they write."""


def _wait(running: set[Future[R]], report: Report) -> set[Future[R]]:
    """Wait up to a second for a task, and return those that still run. Raises the exception of one that failed."""
    done, running = wait(running, timeout=1, return_when=FIRST_COMPLETED)
    for future in done:
        future.result()
    report()
    return running


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
    """A process that Ctrl-C does not reach, and that does not import the user's script."""

    def start(self) -> None:
        with _clean_environment(), _blocked_interrupt():
            super().start()


@contextmanager
def _clean_environment() -> Iterator[None]:
    """Keep a new process from running the user's files.

    multiprocessing would import the script again, and so run it if it has no `__main__` guard. Its Python would also
    import modules from the working directory, which may have a `queue.py`.
    """
    main, safe_path = sys.modules["__main__"], os.environ.get("PYTHONSAFEPATH")
    sys.modules["__main__"] = types.ModuleType("__main__")
    os.environ["PYTHONSAFEPATH"] = "1"
    try:
        yield
    finally:
        sys.modules["__main__"] = main
        del os.environ["PYTHONSAFEPATH"]
        if safe_path is not None:
            os.environ["PYTHONSAFEPATH"] = safe_path


@contextmanager
def _blocked_interrupt() -> Iterator[None]:
    """Block SIGINT in new processes: Ctrl-C reaches every process of a terminal, and would print their tracebacks."""
    resource_tracker.ensure_running()  # starting it later would unblock the signal
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _initialize(threads: int) -> None:
    """Set up a worker: the threads of its tokenizer, and its exit if the parent is killed."""
    os.environ["RAYON_NUM_THREADS"] = str(threads)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
