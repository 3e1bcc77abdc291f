"""What can be asked of a model: its layers, heads, tokens and weights, checked with an answer that says what there is."""

from glassgpt.utils.errors import UserError


def require_index(what: str, index: int, count: int) -> None:
    """Raise `UserError` unless there is a layer, head, position or token id of that number."""
    if not 0 <= index < count:
        there = "only 0" if count == 1 else f"0 to {count - 1}"
        raise UserError(f"there is no {what} {index}: there is {there}")
