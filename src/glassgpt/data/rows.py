"""A row of a file that holds no text, and a column that is missing: what errors say about them."""

from collections.abc import Sequence
from typing import NamedTuple

from glassgpt.utils.errors import UserError, did_you_mean

NAME_COLUMN = "name the column of the text with --column (train: --data.column)"


class BadRow(NamedTuple):
    """A row without text."""

    place: str  # such as `line 3`
    reason: str
    lacks_column: bool = False
    can_be_skipped: bool = True  # False if it is not certain where the row ends

    def error(self, name: str, *, is_first: bool) -> UserError:
        """The error for this row of a file. `is_first`: no row with text is before it."""
        advice = "fix it, or skip such rows with --skip-bad (train: --data.skip-bad)"
        if not self.can_be_skipped:
            advice = "fix it: where this row ends is not certain, so it cannot be skipped"
        elif self.lacks_column and is_first:  # more likely a wrong --column than a bad row
            advice = NAME_COLUMN
        return UserError(f"{name}, {self.place}: {self.reason};\n{advice}")


def lacks(column: str, columns: Sequence[str]) -> str:
    """That a column is missing, with the columns there are."""
    listed = ", ".join(map(repr, columns[:20])) + (", ..." if len(columns) > 20 else "")
    return f"has no {column!r}{did_you_mean(column, columns)} (it has {listed or 'nothing'})"


def index_of(column: str, columns: Sequence[str], where: str) -> int:
    """The number of a column. Raises `UserError` if it is missing or ambiguous."""
    if columns.count(column) > 1:
        raise UserError(f"{where} has {column!r} {columns.count(column)} times: rename all but one")
    if column not in columns:
        raise UserError(f"{where} {lacks(column, columns)}; {NAME_COLUMN}")
    return columns.index(column)
