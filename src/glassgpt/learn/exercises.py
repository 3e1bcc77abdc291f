"""Exercises: functions to complete, each with a reference answer and a checker that says why an answer is wrong.

@exercise
def mean(x: Tensor) -> Tensor:
    '''Return the mean of x (T,).'''
    return x.sum() / len(x)

@mean.check
def _(answer):
    x = torch.tensor([1.0, 2.0, 6.0])
    expect_close(answer(x), torch.tensor(3.0), "the mean of 1, 2 and 6")
"""

import ast
import contextlib
import copy
import inspect
import math
import textwrap
import traceback
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from glassgpt.utils.formatting import one_line

LONGEST_REASON = 300  # characters
Answer = Callable[..., Any]


class WrongAnswerError(Exception):
    """Why an answer is wrong, in words for the student."""


class Exercise:
    """A function for students to write. `answer` is the reference; its docstring is the question."""

    def __init__(self, answer: Answer) -> None:
        self.answer, self.name = answer, answer.__name__
        self._checker: Callable[[Answer], None] | None = None

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        """Call the reference answer."""
        return self.answer(*arguments, **keywords)

    def check(self, checker: Callable[[Answer], None]) -> Callable[[Answer], None]:
        """Decorate the checker: a function of an answer that calls `expect` and `expect_close`."""
        self._checker = checker
        return checker

    def grade(self, answer: Answer) -> str | None:
        """Why an answer is wrong; None if it is right."""
        assert self._checker is not None, f"exercise {self.name} has no checker"
        try:
            self._checker(_on_copies(answer))
        except WrongAnswerError as reason:
            return one_line(str(reason), LONGEST_REASON)
        except BaseException as error:  # answers may call sys.exit or raise KeyboardInterrupt
            if type(error) is NotImplementedError and not error.args:  # of the stub; torch's have a text
                return "not answered yet"
            return f"raised {type(error).__name__}{_line_of(error, answer)}{message_of(error)}"
        return None

    @property
    def stub(self) -> str:
        """The source of the function with its docstring, for the student to complete."""
        return _source(self.answer, keep_body=False)

    @property
    def source(self) -> str:
        """The source of the reference answer without its docstring."""
        return _source(self.answer, keep_body=True)


exercise = Exercise  # the decorator of a reference answer


def _on_copies(answer: Answer) -> Answer:
    """The answer with copies of its arguments: the checker's own stay as they are if the answer works in place."""

    def call(*arguments: Any, **keywords: Any) -> Any:
        return answer(*copy.deepcopy(arguments), **copy.deepcopy(keywords))

    return call


def expect(condition: object, reason: str) -> None:
    """Raise `WrongAnswerError` with this reason unless the condition holds."""
    if not condition:
        raise WrongAnswerError(reason)


def expect_close(result: Any, expected: Any, what: str, tolerance: float = 1e-5) -> None:
    """Raise `WrongAnswerError` unless two tensors, arrays or numbers have the same shape and nearly the same values.

    The reason names `what` was compared, and the first place where they differ.
    """
    if isinstance(expected, int | float):
        is_number = isinstance(result, int | float) or (hasattr(result, "item") and math.prod(result.shape) == 1)
        expect(is_number, f"{what}: expected a number, not {_named(result)}")
        value = float(result)
        close = math.isclose(value, expected, rel_tol=tolerance, abs_tol=tolerance)
        expect(close, f"{what}: expected {expected:.6g}, not {value:.6g}")
        return
    expect(hasattr(result, "shape"), f"{what}: expected {_named(expected)}, not {_named(result)}")
    shapes = tuple(result.shape), tuple(expected.shape)
    expect(shapes[0] == shapes[1], f"{what}: expected shape {shapes[1]}, not {shapes[0]}")
    values, answers = (map(float, each.reshape(-1).tolist()) for each in (result, expected))
    for place, (value, right) in enumerate(zip(values, answers, strict=True)):
        if value == right or (math.isnan(value) and math.isnan(right)):
            continue
        if not math.isclose(value, right, rel_tol=tolerance, abs_tol=tolerance):
            raise WrongAnswerError(f"{what}: expected {right:.6g} {_where(place, shapes[1])}, not {value:.6g}")


def expect_none_of(result: Any, mistakes: Mapping[str, Any]) -> None:
    """Raise `WrongAnswerError` if the result is nearly one of these wrong ones: `mistakes` maps reasons to them."""
    for reason, mistake in mistakes.items():
        try:
            expect_close(result, mistake, reason)
        except WrongAnswerError:
            continue
        raise WrongAnswerError(reason)


def message_of(error: BaseException) -> str:
    """ ": " and the first line of a student's error; nothing if it has none or cannot be shown."""
    with contextlib.suppress(BaseException):  # __str__ may be the student's, too
        return f": {one_line(str(error).partition(chr(10))[0], LONGEST_REASON)}".removesuffix(": ")
    return ""


def student_file(title: str, exercises: Iterable[Exercise]) -> str:
    """A Python file with all functions to complete."""
    head = f'"""Exercises: {title}. Check this file with: glassgpt learn check FILE"""\n\nimport math\n\nimport torch\n'
    return "\n\n".join([head, *(exercise.stub + "\n" for exercise in exercises)])


def _source(function: Answer, keep_body: bool) -> str:
    source = textwrap.dedent(inspect.getsource(function))
    definition, lines = ast.parse(source).body[0], source.splitlines()
    assert isinstance(definition, ast.FunctionDef)
    documentation = definition.body[0]
    assert isinstance(documentation, ast.Expr), f"{definition.name} has no docstring"
    assert documentation.end_lineno is not None
    head, body = lines[definition.lineno - 1 : documentation.lineno - 1], lines[documentation.end_lineno :]
    if keep_body:
        return "\n".join(head + body)
    question = lines[documentation.lineno - 1 : documentation.end_lineno]
    return "\n".join([*head, *question, "    raise NotImplementedError"])


def _line_of(error: BaseException, answer: Answer) -> str:
    """Where an error was raised in the student's file, if it was there."""
    file = getattr(getattr(answer, "__code__", None), "co_filename", None)
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    return f" in line {lines[-1]}" if lines else ""


def _named(value: Any) -> str:
    return f"{type(value).__name__} of shape {tuple(value.shape)}" if hasattr(value, "shape") else repr(value)[:60]


def _where(place: int, shape: tuple[int, ...]) -> str:
    """The index of an element by its place in row-major order."""
    return f"at {[int(i) for i in np.unravel_index(place, shape)]}" if shape else "as its value"
