"""The environment variables by which torchrun, or another launcher, places a process among those of a run."""

import os
import re

from glassgpt.utils.errors import RankError


def launcher_number(name: str, default: int = 0) -> int:
    """The number in a variable such as `WORLD_SIZE`; `default` if it is not set. Raises `RankError`."""
    text = os.environ.get(name, str(default))
    if not re.fullmatch("[0-9]{1,9}", text):
        raise RankError(f"the environment variable {name} must be a whole number, got {text!r}; torchrun sets it")
    return int(text)


def under_torchrun() -> bool:
    """Whether torchrun, or another launcher that sets its variables, has started this process.

    Raises `RankError` if only one of them is set: each process would train alone, in the same directory.
    """
    given = [name in os.environ for name in ("RANK", "WORLD_SIZE")]
    if any(given) and not all(given) and (launcher_number("RANK") or launcher_number("WORLD_SIZE", 1) > 1):
        raise RankError("RANK and WORLD_SIZE must both be set, or neither of them; torchrun sets both")
    return all(given)
