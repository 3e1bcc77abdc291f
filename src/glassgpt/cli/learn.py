"""learn: list the lessons, open one, write a file of exercises; learn check: grade such files."""

import contextlib
import dataclasses
import importlib.util
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from glassgpt.cli.options import Command, File, Flag, default, require_json, say, write_json
from glassgpt.config.validation import between
from glassgpt.utils.browser import open_in_browser
from glassgpt.utils.errors import UserError
from glassgpt.utils.files import explain_os_errors, os_error_reason, write_atomic


class Learn(Command):
    """List the lessons of the book, or open one as a live page.

    The page runs on this machine and needs no network. `glassgpt learn check FILE` checks your answers to exercises.
    """

    # Number or name of a lesson.
    lesson: Annotated[Positional[str], arg(metavar="[LESSON]", help_behavior_hint="(default: list all)")] = ""
    exercises: File = None  # Write the lesson's exercises to this Python file, for you to complete, and stop.
    # Port to listen on.
    port: Annotated[int | None, between(1, 65535), default("a free one", "N")] = None
    no_browser: Flag = False  # Do not open a browser.

    def run(self) -> None:
        from glassgpt.learn.catalog import find_lesson, lessons

        if not self.lesson:
            if self.exercises is not None:
                raise UserError("--exercises needs a lesson, such as: glassgpt learn 4 --exercises FILE")
            for each in lessons():
                print(f"{each.number:>2}  {each.title}\n    {each.question}")
            print("\nOpen one: glassgpt learn 4. Its exercises: glassgpt learn 4 --exercises FILE")
            return
        lesson = find_lesson(self.lesson)
        if self.exercises is not None:
            from glassgpt.learn.exercises import student_file

            text = student_file(f"lesson {lesson.number}, {lesson.title}", lesson.exercises().values())
            if self.exercises.exists():
                raise UserError(f"{self.exercises} exists; name another file, so that no answers are lost")
            with explain_os_errors("write", self.exercises):
                write_atomic(self.exercises, text)
            print(f"complete {self.exercises}, then: glassgpt learn check {self.exercises}")
            return
        self._open(lesson.path)

    def _open(self, notebook: Path) -> None:
        """Serve a notebook until interrupted."""
        if importlib.util.find_spec("marimo") is None:
            raise UserError("opening a lesson needs marimo: pip install 'glassgpt[learn]'")
        port, token = _free_port(self.port), secrets.token_urlsafe(16)
        command = [sys.executable, "-P", "-m", "marimo", "--quiet", "run", str(notebook), "--include-code"]
        command += ["--headless", "--host", "127.0.0.1", "--port", str(port), "--token", "--token-password-file", "-"]
        environment = {**os.environ, "MARIMO_SKIP_UPDATE_CHECK": "1"}
        signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # so that the server ends, too
        server = subprocess.Popen(command, stdin=subprocess.PIPE, text=True, env=environment)
        assert server.stdin is not None
        with contextlib.suppress(BrokenPipeError), server.stdin:  # of a server that ended at once: see `_answers`
            server.stdin.write(token)  # not as an argument, which other users see
        login_file = None
        try:
            if not _answers(port, server):
                raise UserError(f"marimo could not serve the lesson on port {port}; choose another with --port")
            url = f"http://127.0.0.1:{port}/?access_token={token}&show-code=true"
            say(f"glassgpt: {url} (Ctrl-C ends it)")
            if not self.no_browser:
                login_file = open_in_browser(url)
            server.wait()
        finally:
            if login_file is not None:
                login_file.unlink(missing_ok=True)
            server.terminate()
            server.wait()


class LearnCheck(Command):
    """Check the answers in files of exercises: right, or why not, and a score.

    It executes the files. Each answer has 20 seconds. The exit code is 1 if an answer is wrong, and 2 if a file cannot
    be checked; the others are checked all the same.
    """

    # Files that `glassgpt learn LESSON --exercises FILE` wrote and a student completed.
    files: Annotated[Positional[tuple[Path, ...]], arg(metavar="FILE [FILE ...]", help_behavior_hint="")] = ()
    json: File = None  # Also write the results to this file.

    def run(self) -> int:
        if not self.files:
            raise UserError("learn check needs a file of exercises (glassgpt learn check --help)")
        require_json(self.json)
        results, problems = list[dict[str, Any]](), list[str]()
        try:
            for path in self.files:
                try:
                    results.append(_graded(path))
                except UserError as error:  # one file must not keep a class from its grades
                    problems.append(str(error))
                    results.append({"file": str(path), "right": 0, "exercises": 0, "grades": [], "problem": str(error)})
        finally:  # also of the files before an interruption
            write_json(self.json, {"files": results})
        if problems:
            raise UserError("\n".join(problems))
        return int(any(result["right"] != result["exercises"] for result in results))


def _graded(path: Path) -> dict[str, Any]:
    """Print the grades of a file, and return them for the JSON file."""
    from glassgpt.learn.checking import check_file

    grades = check_file(path)
    right, width = sum(grade.reason is None for grade in grades), max(len(grade.exercise) for grade in grades)
    print(f"{path}: {right} of {len(grades)} right")
    for grade in grades:
        print(f"  lesson {grade.lesson:<2}  {grade.exercise:<{width}}  {grade.reason or 'right'}")
    rows = [dataclasses.asdict(grade) for grade in grades]
    return {"file": str(path), "right": right, "exercises": len(grades), "grades": rows}


def _free_port(wanted: int | None) -> int:
    """The wanted port, or any. Raises `UserError` if it is taken: whoever listens there would get the token."""
    try:
        with socket.create_server(("127.0.0.1", wanted or 0)) as listener:
            port: int = listener.getsockname()[1]
            return port
    except OSError as error:
        raise UserError(f"cannot listen on port {wanted} ({os_error_reason(error)}); choose another --port") from None


def _answers(port: int, server: subprocess.Popen[str]) -> bool:
    """Wait until the server accepts connections. False if it ended instead, or after a minute."""
    deadline = time.monotonic() + 60
    while server.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return True
        time.sleep(0.1)
    return False
