"""The lessons on disk: `lessons/NN_name.py`, each with its exercises in `lessons/exercises/NN_name.py`."""

import ast
import inspect
import re
import runpy
from dataclasses import dataclass
from pathlib import Path

from glassgpt.learn.exercises import Exercise
from glassgpt.utils.errors import UserError, did_you_mean


@dataclass(frozen=True)
class Lesson:
    """A lesson. Its notebook's docstring gives the title, and after an empty line the question that it answers."""

    path: Path
    title: str
    question: str

    @property
    def number(self) -> int:
        """The number in the file's name."""
        return int(self.path.stem[:2])

    def exercises(self) -> dict[str, Exercise]:
        """The exercises by name, in order. Executes the lesson's module of exercises."""
        values = runpy.run_path(str(self.path.parent / "exercises" / self.path.name)).values()
        return {value.name: value for value in values if isinstance(value, Exercise)}

    def exercises_as_markdown(self) -> str:
        """The exercises for the end of the lesson: what to write, and the answers, folded."""
        parts = []
        for number, each in enumerate(self.exercises().values(), 1):
            answer = f"/// details | Answer to exercise {number}\n\n```python\n{each.source}\n```\n\n///"
            signature = each.stub.partition('    """')[0]  # without the question: as text, it wraps on narrow pages
            parts.append(
                f"**Exercise {number}.** {inspect.getdoc(each.answer)}\n\n```python\n{signature}```\n\n{answer}"
            )
        return "\n\n".join(parts)


def lessons() -> list[Lesson]:
    """All lessons in order. Reads only their docstrings."""
    found, installed = [], Path(__file__).parent / "lessons"
    folder = installed if installed.is_dir() else Path(__file__).parents[3] / "lessons"  # of a clone
    for path in sorted(folder.glob("[0-9][0-9]_*.py")):
        title, _, question = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n\n")
        found.append(Lesson(path, title, " ".join(question.split())))
    return found


def find_lesson(word: str) -> Lesson:
    """The lesson with this number, or with this word in the name of its file. Raises `UserError`."""
    found = lessons()
    for lesson in found:
        if (word.isdecimal() and int(word) == lesson.number) or word == lesson.path.stem:
            return lesson
    names = [lesson.path.stem for lesson in found]
    matching = [lesson for lesson in found if re.sub("[ -]", "_", word.lower()) in lesson.path.stem]
    if len(matching) == 1:
        return matching[0]
    problem = f"several lessons match {word!r}" if word and matching else f"there is no lesson {word!r}"
    raise UserError(f"{problem}{did_you_mean(word, names)}; `glassgpt learn` lists all {len(found)} with their numbers")
