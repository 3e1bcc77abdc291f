"""What a user did wrong, said in a line or two: what, where, and how to go on."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake that the user can mend. The command line prints its text without a traceback and exits with code 2.

    Any other exception is a defect of glassgpt, and keeps its traceback.
    """


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the nearest valid name, or an empty string when none is near."""
    nearest = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.6)
    return f"; did you mean {nearest[0]!r}?" if nearest else ""
