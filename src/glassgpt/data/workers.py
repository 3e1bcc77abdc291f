"""Processes that prepare groups side by side: `python -m glassgpt.data.workers DIRECTORY` is one.

It reads tasks from standard input and answers on standard output, a JSON object a line. (`multiprocessing` would import the
user's script again, and prepare its data again, where that has no `if __name__ == "__main__"`.)
"""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from glassgpt.data.work_units import Report, Workshop, hash_group, prepare_group
from glassgpt.utils.errors import UserError

TASKS: Mapping[str, Callable[[Workshop, int, Sequence[Path], Report], None]] = {
    "hash": hash_group,
    "prepare": prepare_group,
}


def run_groups(
    task: str, directory: Path, groups: Iterable[tuple[int, Sequence[Path]]], workers: int, report: Report
) -> None:
    """Do a task for each group, whose files lie at the given paths, in `workers` processes; in this one where that is 1.

    `groups` may wait for downloads. Raises what the first task that fails raises, after an end of the others.
    """
    if workers == 1:
        shop = Workshop(directory)
        for number, paths in groups:
            TASKS[task](shop, number, paths, report)
        return
    with ExitStack() as stack:
        messages: queue.Queue[tuple[_Worker, dict[str, Any]]] = queue.Queue()
        pool = [stack.enter_context(_Worker(directory, workers, messages)) for _ in range(workers)]
        idle, busy = list(pool), 0
        todo = iter(groups)
        while True:
            while idle and (job := next(todo, None)) is not None:
                idle.pop().give(task, *job)
                busy += 1
            if not busy:
                return
            worker, message = messages.get()
            if "error" in message:
                raise UserError(message["error"]) if message["by_user"] else RuntimeError(message["error"])
            report(message["characters"], message["tokens"])
            if message["done"]:
                idle.append(worker)
                busy -= 1


class _Worker:
    """A process that does one task after the other. It ends with this one, even where that is killed: its input ends then."""

    def __init__(self, directory: Path, of: int, messages: "queue.Queue[tuple[_Worker, dict[str, Any]]]") -> None:
        # Twice its share of the cores for the tokenizer: a worker may be the last one, or wait for the disk.
        threads = 2 * max(1, (os.cpu_count() or 1) // of)
        here, known = str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")
        with _no_interrupt():
            self._process = subprocess.Popen(
                # -P: the user's folder may have a json.py of its own.
                [sys.executable, "-P", "-m", "glassgpt.data.workers", str(directory)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                encoding="utf-8",
                env=os.environ
                | {
                    "RAYON_NUM_THREADS": str(threads),
                    "PYTHONPATH": os.pathsep.join([here, *([known] if known else [])]),
                },
            )
        self._paths: Sequence[Path] = ()
        self._thread = threading.Thread(target=self._listen, args=(messages,), daemon=True)
        self._thread.start()

    def __enter__(self) -> "_Worker":
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.kill()
        self._process.wait()
        self._thread.join()
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):  # a task that it did not live to read
            self._process.stdin.close()
        self._process.stdout.close()

    def give(self, task: str, number: int, paths: Sequence[Path]) -> None:
        """Have the worker do a task. That it is dead already is told by its last message."""
        assert self._process.stdin is not None
        self._paths = paths
        with suppress(BrokenPipeError):
            self._process.stdin.write(
                json.dumps({"task": task, "group": number, "paths": [str(path) for path in paths]}) + "\n"
            )
            self._process.stdin.flush()

    def _listen(self, messages: "queue.Queue[tuple[_Worker, dict[str, Any]]]") -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with suppress(ValueError):  # the half of a line that it was killed in
                messages.put((self, json.loads(line)))
        messages.put((self, {"error": self._end(self._process.wait()), "by_user": True}))

    def _end(self, code: int) -> str:
        """What is said of a process that has ended by itself."""
        more = f" and {len(self._paths) - 1:,} more" if len(self._paths) > 1 else ""
        what = (
            f"the process that prepared {self._paths[0]}{more}" if self._paths else "a process that was to prepare text"
        )
        if code == -9:
            return f"{what} was killed, as the system does where memory runs out; fewer --workers take less of it"
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        return f"{what} {how}; where no reason is told above, a damaged file may be one: --workers 1 and single files find it"


@contextmanager
def _no_interrupt() -> Iterator[None]:
    """Keep Ctrl-C, which reaches every process of the terminal, from those started here: whoever gave the tasks ends them."""
    if sys.platform == "win32":
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _work(shop: Workshop) -> None:
    """Do the tasks that come in, until no more can come."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # for Windows: see `_no_interrupt`
    tasks: queue.Queue[dict[str, Any]] = queue.Queue()
    threading.Thread(target=_receive, args=(tasks,), daemon=True).start()
    while True:
        task, meter = tasks.get(), _Meter()
        try:
            TASKS[task["task"]](shop, task["group"], [Path(path) for path in task["paths"]], meter)
        except UserError as error:
            _say({"error": str(error), "by_user": True})
        except MemoryError:
            _say({"error": "memory ran out; fewer --workers take less of it", "by_user": True})
        except Exception:
            _say({"error": traceback.format_exc(), "by_user": False})
        else:
            meter.say(done=True)


def _receive(tasks: "queue.Queue[dict[str, Any]]") -> None:
    for line in sys.stdin:
        tasks.put(json.loads(line))
    os._exit(0)  # whoever gave the tasks is gone; what is unfinished can be gone on with


class _Meter:
    """Says how much was done, a few times a second."""

    def __init__(self) -> None:
        self._characters, self._tokens, self._said = 0, 0, time.monotonic()

    def __call__(self, characters: int, tokens: int) -> None:
        self._characters, self._tokens = self._characters + characters, self._tokens + tokens
        if time.monotonic() - self._said > 0.25:
            self.say()

    def say(self, done: bool = False) -> None:
        """What was done since the last time, and whether that was all of the task."""
        _say({"characters": self._characters, "tokens": self._tokens, "done": done})
        self._characters, self._tokens, self._said = 0, 0, time.monotonic()


def _say(message: Mapping[str, Any]) -> None:
    try:
        print(json.dumps(message), flush=True)
    except BrokenPipeError:
        os._exit(0)  # as in `_receive`


if __name__ == "__main__":
    _work(Workshop(Path(sys.argv[1])))
