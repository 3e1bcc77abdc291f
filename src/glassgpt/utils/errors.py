"""Errors that a user can fix, and helpers for their texts: what is wrong, where, and how to fix it."""

import difflib
import os
import shlex
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path


class UserError(ValueError):
    """An error that the user can fix. The command line prints its text without a traceback and exits with code 2."""


class RankError(UserError):
    """What ended a run of several processes, reported by the rank where it happened."""


def program() -> str:
    """Return how to call this installation: `glassgpt` if the shell finds it by that name, otherwise its path."""
    here = shutil.which("glassgpt", path=str(Path(sys.executable).parent))
    first = shutil.which("glassgpt")
    if here is None or (first is not None and Path(first).samefile(here)):
        return "glassgpt"
    return shlex.quote(os.path.relpath(here) if Path(here).is_relative_to(Path.cwd()) else here)


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """Return `"; did you mean 'x'?"` with the nearest valid name, or an empty string if none is near."""
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
    """Whether memory ran out, on a CPU or a GPU."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch is not imported for this
        return True
    # torch's CPU allocator raises a plain RuntimeError, which only its text identifies.
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
