"""The list of the book's lessons with their questions."""

from markup import escaped

from glassgpt.learn.catalog import Lesson, lessons


def _item(lesson: Lesson) -> str:
    return f"{lesson.number}. [{lesson.title}](lessons/{lesson.path.stem}.md): {escaped(lesson.question)}"


def lesson_list() -> str:
    """Return the Markdown of a numbered list: title, link and question of each lesson."""
    return "\n".join(map(_item, lessons()))
