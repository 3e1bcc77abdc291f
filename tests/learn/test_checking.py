"""Grading students' files: right, wrong, broken, slow and hostile ones."""

import json
import socket
from pathlib import Path

import pytest
import torch

from glassgpt.cli.main import main
from glassgpt.learn.catalog import find_lesson
from glassgpt.learn.checking import check_file
from glassgpt.learn.exercises import WrongAnswerError, exercise, expect_close, expect_none_of, student_file
from glassgpt.utils.errors import UserError

RIGHT = "def variance_of_scores(D, sigma):\n    return sigma**2\n"


def graded(tmp_path: Path, text: str, seconds: float = 20.0) -> dict[str, str | None]:
    """Return the result of each exercise in a file with this text."""
    path = tmp_path / "answers.py"
    path.write_text(text, encoding="utf-8")
    return {grade.exercise: grade.reason for grade in check_file(path, seconds)}


def test_a_new_file_of_exercises_has_no_answers_and_the_reference_answers_are_right(tmp_path: Path) -> None:
    exercises = find_lesson("4").exercises()
    stubs = student_file("title", exercises.values())
    assert set(graded(tmp_path, stubs).values()) == {"not answered yet"}
    answers = "\n\n".join(["import math\nimport torch", *(each.source for each in exercises.values())])
    assert graded(tmp_path, answers) == dict.fromkeys(exercises)


@pytest.mark.slow
def test_what_students_print_is_not_a_result(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    noisy = RIGHT.replace("    return", '    import os; os.write(1, b"\\n{}\\n"); print("hello")\n    return')
    assert graded(tmp_path, 'print("x")\n' + noisy)["variance_of_scores"] is None
    assert capfd.readouterr().out == ""


def test_errors_name_the_line(tmp_path: Path) -> None:
    text = "def attention_weights(q, k):\n    x = 1\n    return q.missing\n\n" + RIGHT
    grades = graded(tmp_path, text)
    reason = grades["attention_weights"] or ""
    assert "line 3" in reason
    assert "AttributeError" in reason
    assert grades["variance_of_scores"] is None
    assert "window_average" in (grades["window_average"] or "")


@pytest.mark.slow
def test_answers_that_do_not_end_or_end_the_process(tmp_path: Path) -> None:
    text = "import os, sys\ndef window_average(x, window):\n    while True: pass\n"
    text += "def attention_weights(q, k):\n    os._exit(0)\n" + RIGHT
    grades = graded(tmp_path, text, seconds=1)
    assert "1 s" in (grades["window_average"] or "")
    assert grades["attention_weights"] is not None
    assert grades["variance_of_scores"] is None
    assert graded(tmp_path, "import sys\n" + RIGHT.replace("return sigma**2", "sys.exit(0)"))["variance_of_scores"]


ODD_ERROR = """
class Odd(Exception):
    def __str__(self):
        raise ValueError

def window_average(x, window):
    raise Odd

def attention_weights(q, k):
    raise KeyboardInterrupt("\x1b[2J" + 100_000 * "x")
"""
FORK = """
import os

def window_average(x, window):
    if os.fork():
        os.wait()
    return x

def attention_weights(q, k):
    if not os.fork():
        while True:
            pass
    return q
"""


@pytest.mark.slow
def test_odd_errors_are_named_in_one_short_line(tmp_path: Path) -> None:
    grades = graded(tmp_path, ODD_ERROR + RIGHT)
    assert grades["window_average"] == "raised Odd in line 7"
    assert grades["variance_of_scores"] is None
    reason = grades["attention_weights"] or ""
    assert reason.startswith("raised KeyboardInterrupt in line 10: ")
    assert reason.isprintable()
    assert len(reason) < 400


def test_answers_that_change_their_arguments_are_graded_by_their_results(tmp_path: Path) -> None:
    text = "import torch\ndef attention_weights(q, k):\n    q.zero_(), k.zero_()\n    return (q @ k.mT).softmax(-1)\n"
    text += "def window_average(x, window):\n    old = x.clone()\n    for t in range(len(x)):\n"
    grades = graded(tmp_path, text + "        x[t] = old[max(0, t - window + 1) : t + 1].mean(0)\n    return x\n")
    assert grades["attention_weights"] is not None
    assert grades["window_average"] is None


@pytest.mark.slow
def test_the_files_of_a_student_import_each_other(tmp_path: Path) -> None:
    (tmp_path / "of_mine.py").write_text("def variance(sigma):\n    return sigma**2\n", encoding="utf-8")
    text = "from of_mine import variance\ndef variance_of_scores(D, sigma):\n    return variance(sigma)\n"
    assert graded(tmp_path, text)["variance_of_scores"] is None


@pytest.mark.slow
def test_one_name_of_another_lesson_does_not_add_it(tmp_path: Path) -> None:
    stub = "def window_average(x, window):\n    raise NotImplementedError\n"
    grades = graded(tmp_path, RIGHT + stub + "def split_heads(x):\n    return x\nnearest = 3\n")
    assert set(grades) == set(find_lesson("4").exercises())


@pytest.mark.slow
def test_an_answer_that_forks_is_graded_once(tmp_path: Path) -> None:
    path = tmp_path / "answers.py"
    path.write_text(FORK + RIGHT, encoding="utf-8")
    names = [grade.exercise for grade in check_file(path)]  # although a copy runs for ever
    assert sorted(names) == sorted(find_lesson("4").exercises())


@pytest.mark.slow
def test_answers_that_write_among_the_grades_are_refused(tmp_path: Path) -> None:
    noisy = "import os\n" + RIGHT + "for number in range(3, 64):\n    try:\n        os.write(number, b'noise\\n')\n"
    with pytest.raises(UserError, match=r"answers\.py"):
        graded(tmp_path, noisy + "    except OSError:\n        pass\n")


@pytest.mark.slow
def test_files_in_the_working_directory_hide_no_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("numbers.py", "token.py"):
        Path(name).write_text(RIGHT)
        assert {grade.exercise: grade.reason for grade in check_file(Path(name))}["variance_of_scores"] is None


@pytest.mark.slow
def test_the_time_limit_also_ends_code_that_never_gives_up_the_interpreter(tmp_path: Path) -> None:
    endless = 'import re\ndef window_average(x, window):\n    re.match("(a+)+$", "a" * 64 + "b")\n' + RIGHT
    grades = graded(tmp_path, endless, seconds=1)
    assert "1 s" in (grades["window_average"] or "")
    assert grades["variance_of_scores"] is None


@pytest.mark.slow
def test_only_the_stub_counts_as_not_answered(tmp_path: Path) -> None:
    text = "import torch\ndef window_average(x, window):\n    return torch.ones(2, dtype=torch.int64).softmax(0)\n"
    grades = graded(tmp_path, text + "def attention_weights(q, k):\n    raise NotImplementedError\n")
    assert "NotImplementedError in line 3" in (grades["window_average"] or "")  # torch's own, for integers
    assert grades["attention_weights"] == "not answered yet"


UNUSABLE = ["import nothing_of_this_name", "", "raise SystemExit(0)", "1/0"]


@pytest.mark.parametrize("text", ["def (", "x = 1", *(pytest.param(text, marks=pytest.mark.slow) for text in UNUSABLE)])
def test_files_that_cannot_be_checked(text: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"answers\.py"):
        graded(tmp_path, text)
    with pytest.raises(UserError, match=r"missing\.py"):
        check_file(tmp_path / "missing.py")


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, figures = tmp_path / "a.py", tmp_path / "figures.json"
    assert main(["learn", "4", "--exercises", str(file)]) == 0
    before = file.read_text()
    assert main(["learn", "4", "--exercises", str(file)]) == 2  # answers may be in it
    assert file.read_text() == before
    assert main(["learn", "check", str(file), "--json", str(figures)]) == 1
    (result,) = json.loads(figures.read_text())["files"]
    assert (result["right"], result["exercises"]) == (0, 3)
    exercises = find_lesson("4").exercises().values()
    file.write_text("\n\n".join(["import math\nimport torch", *(each.source for each in exercises)]), encoding="utf-8")
    assert main(["learn", "check", str(file)]) == 0
    capsys.readouterr()
    assert main(["learn"]) == 0
    assert "Attention from averages" in capsys.readouterr().out
    assert main(["learn", "99"]) == 2
    assert main(["learn", "check"]) == 2


def test_a_file_that_cannot_be_checked_does_not_keep_others_from_their_grades(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken, fine, figures = tmp_path / "broken.py", tmp_path / "fine.py", tmp_path / "figures.json"
    broken.write_text("def (", encoding="utf-8")
    fine.write_text(RIGHT, encoding="utf-8")
    assert main(["learn", "check", str(broken), str(fine), "--json", str(figures)]) == 2
    assert "broken.py" in capsys.readouterr().err
    first, second = json.loads(figures.read_text())["files"]
    assert (first["right"], first["exercises"], "SyntaxError" in first["problem"]) == (0, 0, True)
    assert (second["right"], second["exercises"]) == (1, 3)


def test_a_taken_port_is_refused_before_a_token_exists(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert main(["learn", "4", "--port", str(port), "--no-browser"]) == 2
    shown = capsys.readouterr()
    assert str(port) in shown.err
    assert "token" not in shown.out


@pytest.mark.parametrize(
    ("result", "expected", "fact"),
    [
        (torch.zeros(2), torch.zeros(3), r"\(2,\)"),
        (torch.tensor([1.0, 2.0]), torch.tensor([1.0, 3.0]), r"\[1\]"),
        (torch.tensor([[1.0, torch.nan]]), torch.tensor([[1.0, 3.0]]), r"\[0, 1\]"),
        ("text", 1.0, "text"),
        (None, torch.zeros(1), "None"),
        (2.0, 1.0, "2"),
        (torch.nan, 1.0, "nan"),
    ],
)
def test_differences_are_named(result: object, expected: object, fact: str) -> None:
    with pytest.raises(WrongAnswerError, match=fact):
        expect_close(result, expected, "it")


def test_equal_values_are_close() -> None:
    inf = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0])
    expect_close(inf, inf.clone(), "it")
    expect_close(torch.tensor(1.0), 1.0, "it")
    expect_close(torch.tensor([1.0 + 1e-7]), torch.tensor([1.0]), "it")


def test_an_exercise_is_its_answer() -> None:
    @exercise
    def double(x: int) -> int:
        """Return twice x."""
        return 2 * x

    assert double(3) == 6
    assert "return 2 * x" in double.source
    assert "return 2" not in double.stub


def test_known_mistakes_are_named() -> None:
    mistakes = {"transposed": torch.tensor([[1.0, 3.0], [2.0, 4.0]]), "no scale": torch.tensor(2.0)}
    with pytest.raises(WrongAnswerError, match="transposed"):
        expect_none_of(torch.tensor([[1.0, 3.0], [2.0, 4.0]]), mistakes)
    expect_none_of(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), mistakes)
    expect_none_of(None, mistakes)
