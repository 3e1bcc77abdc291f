"""All lessons: their form, their exercises, and that they run without a network."""

import ast
import inspect
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from glassgpt.learn.catalog import Lesson, find_lesson
from glassgpt.utils.errors import UserError
from lesson_harness import LESSONS, load

FIGURES = "bars heatmap lines side_by_side tokens attribution curve head head_scores heads lens losses".split()
# A process that cannot connect to any host runs the notebook.
WITHOUT_NETWORK = """
import runpy, socket, sys
def refuse(*_): raise AssertionError("a lesson connects to a host")
socket.socket.connect = socket.socket.connect_ex = refuse
runpy.run_path(sys.argv[1], run_name="__main__")
"""


def text_of(cell: ast.FunctionDef) -> str:
    """Return the Markdown of a cell, or an empty text."""
    calls = [node for node in ast.walk(cell) if isinstance(node, ast.Call) and ast.unparse(node.func) == "mo.md"]
    texts = [node.value for call in calls for node in ast.walk(call) if isinstance(node, ast.Constant)]
    return "".join(text for text in texts if isinstance(text, str))


def is_shown(cell: ast.FunctionDef) -> bool:
    """Return whether the reader sees the cell's code."""
    return "hide_code=True" not in ast.unparse(cell.decorator_list[0])


def draws(cell: ast.FunctionDef) -> bool:
    """Return whether a cell ends with a figure."""
    *_, last = [node for node in cell.body if not isinstance(node, ast.Return)]
    calls = [node.func for node in ast.walk(last) if isinstance(node, ast.Call)]
    return any(isinstance(func, ast.Name) and func.id in FIGURES for func in calls)


def test_lessons_are_numbered_from_one() -> None:
    assert [lesson.number for lesson in LESSONS] == list(range(1, 17))


def test_title_and_question(lesson: Lesson, cells: list[ast.FunctionDef]) -> None:
    assert lesson.question.endswith("?")
    first = inspect.cleandoc(text_of(cells[0]))
    assert first.startswith(f"# {lesson.number}. {lesson.title}\n\n**{lesson.question[:10]}")


def test_length(lesson: Lesson, cells: list[ast.FunctionDef]) -> None:
    assert sum(len(text_of(cell).split()) for cell in cells) <= 1_200
    shown = [cell for cell in cells if is_shown(cell)]
    assert len(shown) <= 12
    for cell in shown:
        is_function = ast.unparse(cell.decorator_list[0]).startswith("app.function")
        body = [node for node in cell.body if is_function or not isinstance(node, ast.Return)]
        start = cell.lineno if is_function else body[0].lineno
        assert (body[-1].end_lineno or 0) - start < 15, ast.unparse(cell)


def test_a_prediction_comes_before_each_figure(cells: list[ast.FunctionDef]) -> None:
    predicted, number = False, 0
    for cell in cells:
        predicted |= "**Predict.**" in text_of(cell)
        if draws(cell):
            assert predicted, ast.unparse(cell)
            predicted, number = False, number + 1
    assert 2 <= number <= 4


def test_at_least_one_control(lesson: Lesson) -> None:
    assert re.search(r"mo\.ui\.(slider|dropdown)\(", lesson.path.read_text(encoding="utf-8"))


def test_checkers_accept_the_answer_and_explain_wrong_ones(lesson: Lesson) -> None:
    wrong = load(Path(__file__).parent / "wrong_answers" / lesson.path.name).WRONG
    exercises = lesson.exercises()
    assert len(exercises) == 3
    assert wrong.keys() == exercises.keys()
    shown: dict[str, Any] = {}  # the answers as a student copies them into the file, which imports only these
    exec("\n\n".join(["import math\nimport torch", *(each.source for each in exercises.values())]), shown)
    for name, exercise in exercises.items():
        assert exercise.grade(shown[name]) is None, name
        reasons = [exercise.grade(answer) for answer in wrong[name]]
        assert None not in reasons, (name, reasons)
        assert len(set(reasons)) >= 3, (name, reasons)
        assert exercise.grade(lambda *_: None) is not None, name


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_lessons_run_as_scripts_without_network(lesson: Lesson, tmp_path: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-W", "error", "-c", WITHOUT_NETWORK, str(lesson.path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert seconds < 60  # of CPU time, since wall time depends on what else runs
    assert list(tmp_path.iterdir()) == []


def test_finding_lessons() -> None:
    assert find_lesson("4").number == find_lesson("04_attention").number == find_lesson("04").number == 4
    with pytest.raises(UserError, match="17"):
        find_lesson("17")
