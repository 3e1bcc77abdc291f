"""What a user did wrong, said in a line or two: what, where, and how to go on."""

import difflib
import os
import shlex
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path


class UserError(ValueError):
    """A mistake that the user can mend. The command line prints its text without a traceback and exits with code 2.

    Any other exception is a defect of glassgpt, and keeps its traceback.
    """


class RankError(UserError):
    """What ended a run of several processes, said by the rank that it happened on."""


def program() -> str:
    """How the user can call the command line: `glassgpt` where the shell finds this one, else by its path."""
    here = shutil.which("glassgpt", path=str(Path(sys.executable).parent))
    found = shutil.which("glassgpt")
    if here is None or (found is not None and Path(found).samefile(here)):
        return "glassgpt"
    return shlex.quote(os.path.relpath(here) if Path(here).is_relative_to(Path.cwd()) else here)


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the nearest valid name, or an empty string when none is near."""
    nearest = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.6)
    return f"; did you mean {nearest[0]!r}?" if nearest else ""


def nearby_path(text: str) -> str | None:
    """Return the existing path that `text` is most likely a typo of (`rnus/dmo`: `runs/demo`), or None."""
    if Path("runs", text).exists():
        return str(Path("runs", text))
    path = Path(text)
    nearest = Path(path.anchor)
    for part in path.parts[len(nearest.parts) :]:
        if (nearest / part).exists():
            nearest /= part
            continue
        try:
            close = difflib.get_close_matches(part, os.listdir(nearest), n=1, cutoff=0.7)
        except OSError:  # not a folder, or not readable
            return None
        if not close:
            return None
        nearest /= close[0]
    return str(nearest)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory has run out, on a CPU or a GPU."""
    # By name and text: torch may not be there, its exception on GPUs is a RuntimeError, and on CPUs only its text tells.
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "DefaultCPUAllocator" in str(error)
    )
