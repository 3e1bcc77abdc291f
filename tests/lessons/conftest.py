"""Tests that take a `lesson` run for each lesson."""

import ast

import pytest

from glassgpt.learn.catalog import Lesson
from lesson_harness import LESSONS


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "lesson" in metafunc.fixturenames:
        metafunc.parametrize("lesson", LESSONS, ids=lambda lesson: lesson.path.stem)


@pytest.fixture
def cells(lesson: Lesson) -> list[ast.FunctionDef]:
    """Return the notebook's cells and functions in order."""
    tree = ast.parse(lesson.path.read_text(encoding="utf-8"))
    return [node for node in tree.body if isinstance(node, ast.FunctionDef)]
