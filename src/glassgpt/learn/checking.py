"""Grade students' files. Their code runs in a process of its own, which a time limit ends.

It runs with the rights of whoever starts the check: use a container for files from strangers.
"""

import contextlib
import importlib.machinery
import json
import os
import signal
import subprocess
import sys
import tempfile
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glassgpt.learn.catalog import lessons
from glassgpt.learn.exercises import message_of
from glassgpt.utils.errors import UserError
from glassgpt.utils.files import read_file, readable

SECONDS = 20.0  # for an exercise


@dataclass(frozen=True)
class Grade:
    """The result of one exercise."""

    lesson: int
    exercise: str
    reason: str | None  # why the answer is wrong; None if it is right


def check_file(path: Path, seconds: float = SECONDS) -> list[Grade]:
    """Grade all exercises of each lesson that a student's file has two functions of (one, if it has no two of any).

    Raises `UserError` if the file cannot be read or executed, or has no function of any exercise.
    """
    with readable(path):
        read_file(path)
    grades: list[Grade] = []
    while True:
        code, output = _run([str(path), str(seconds), str(len(grades))])
        try:
            rows = [json.loads(line) for line in output.splitlines()]
        except ValueError:  # an answer wrote into every open file
            raise UserError(f"cannot check {path}: it wrote among its own grades") from None
        problem = next((row["problem"] for row in rows if "problem" in row), None)
        if problem is not None:
            raise UserError(f"cannot check {path}: {problem}")
        grades += [Grade(**row["grade"]) for row in rows if "grade" in row]
        if rows and rows[-1] == "done":
            return grades
        reason = f"took longer than {seconds:g} s" if code == -signal.SIGALRM else "ended the process"
        if not rows:
            raise UserError(f"cannot check {path}: loading it {reason}")
        number, name = rows[-1]["started"]
        grades.append(Grade(number, name, reason))


def _run(arguments: list[str]) -> tuple[int, bytes]:
    """Run this module in a process of its own: its return code and output. Ends what the process left running."""
    # -P: no module of the working directory, such as a student's numbers.py, hides one of Python's.
    command = [sys.executable, "-P", "-m", "glassgpt.learn.checking", *arguments]
    with tempfile.TemporaryFile() as output:  # a pipe would stay open as long as a process that an answer forked
        process = subprocess.Popen(command, stdout=output, stdin=subprocess.DEVNULL, start_new_session=True)
        try:
            code = process.wait()
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        output.seek(0)
        return code, output.read()


def _grade(path: Path, seconds: float, skip: int) -> Iterator[Any]:
    """Grade the exercises after the first `skip`; yields a row before and after each."""
    _limit(seconds)
    sys.path.append(str(path.parent.resolve()))  # for the student's other files; last, so that they hide nothing
    loader = importlib.machinery.SourceFileLoader("student", str(path))
    module = types.ModuleType("student")
    try:
        loader.exec_module(module)
    except BaseException as error:
        line = f" in line {error.lineno}" if isinstance(error, SyntaxError) and error.lineno else ""
        yield {"problem": f"loading it raised {type(error).__name__}{line}{message_of(error)}"}
        return
    _limit(0)
    names = {name for name, value in vars(module).items() if callable(value)}
    found = [(lesson.number, lesson.exercises()) for lesson in lessons()]
    most = max(len(names & all_.keys()) for _, all_ in found)
    # One function may be the student's own that has the name of another lesson's exercise.
    rows = [(n, each) for n, all_ in found if len(names & all_.keys()) >= min(2, most) for each in all_.values()]
    if not most:
        yield {"problem": "it has no function of an exercise; start with: glassgpt learn LESSON --exercises FILE"}
        return
    for lesson, each in rows[skip:]:
        yield {"started": [lesson, each.name]}
        _limit(seconds)
        function = vars(module).get(each.name)
        process = os.getpid()
        reason = each.grade(function) if callable(function) else f"the file has no function {each.name}"
        if os.getpid() != process:  # the answer forked, and this is the copy
            os._exit(0)
        _limit(0)
        yield {"grade": {"lesson": lesson, "exercise": each.name, "reason": reason}}
    yield "done"


def _limit(seconds: float) -> None:
    """End this process after a time; 0 disables it. The kernel does it: a thread would wait for the interpreter."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # the student's code may have changed it
    signal.setitimer(signal.ITIMER_REAL, seconds)


def _main(arguments: Sequence[str]) -> None:
    sys.dont_write_bytecode = True
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as results:
        os.dup2(2, 1)  # what students print is not a result
        for row in _grade(Path(arguments[0]), float(arguments[1]), int(arguments[2])):
            print(json.dumps(row), file=results, flush=True)


if __name__ == "__main__":
    _main(sys.argv[1:])
