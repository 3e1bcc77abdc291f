"""Errors that a user can fix, and helpers for their texts: what is wrong, where, and how to fix it."""

import difflib
import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

NO_THREADS = "the system refuses another thread (see `ulimit -u` and the container's limit of processes)"
# Plain RuntimeErrors of torch's allocators, of CUDA and its libraries, and of sizes that no address space holds.
_OUT_OF_MEMORY = re.compile("DefaultCPUAllocator|bad_alloc|[Oo]ut of memory|ALLOC_FAILED|llocate memory|size.*overflow")


class UserError(ValueError):
    """An error that the user can fix. The command line prints its text without a traceback and exits with code 2.

    Its text has no control characters, which could change a terminal, and no very long line.
    """

    def __str__(self) -> str:
        return "\n".join(map(_safe_line, super().__str__().split("\n")))


class RankError(UserError):
    """What ended a run of several processes, reported by the rank where it happened."""


def program() -> str:
    """Return how to call this installation: `glassgpt` if the shell finds it by that name, otherwise its path."""
    here = shutil.which("glassgpt", path=str(Path(sys.executable).parent))
    first = shutil.which("glassgpt")
    if here is None or (first is not None and Path(first).samefile(here)):
        return "glassgpt"
    return shlex.quote(os.path.relpath(here) if Path(here).is_relative_to(Path.cwd()) else here)


def shown(value: object) -> str:
    """Return a value as errors quote it, shortened in the middle: `'a b'`, `999…999 (50 digits)`."""
    try:
        text = repr(value)
    except ValueError:  # a hexadecimal number in TOML may have more digits than Python prints
        return "a number of thousands of digits"
    if type(value) is int and len(text) > 25:
        return f"{text[:3]}…{text[-3:]} ({len(text)} digits)"
    return text if len(text) <= 300 else f"{text[:200]}…{text[-50:]} ({len(text):,} characters)"


def _safe_line(line: str) -> str:
    line = line if len(line) <= 600 else f"{line[:400]}…{line[-200:]}"
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """Return `"; did you mean 'x'?"` with the nearest valid name, or an empty string if none is near."""
    nearest = difflib.get_close_matches(name, {*valid} - {name}, n=1, cutoff=0.6) if len(name) < 200 else []
    return f"; did you mean {nearest[0]!r}?" if nearest else ""


def nearby_path(text: str) -> str | None:
    """Return the existing path that `text` is most likely a typo of (`rnus/dmo`: `runs/demo`), or None."""
    try:
        return str(Path("runs", text)) if Path("runs", text).exists() else _nearest_path(Path(text))
    except (OSError, ValueError):  # a part of it is not a folder, not readable, or no possible name
        return None


def _nearest_path(path: Path) -> str | None:
    nearest = Path(path.anchor)
    for part in path.parts[len(nearest.parts) :]:
        if (nearest / part).exists():
            nearest /= part
            continue
        names = [name for name in os.listdir(nearest) if name != part]  # itself: a link to nothing
        stems = difflib.get_close_matches(Path(part).stem, {Path(name).stem for name in names}, n=3, cutoff=0.7)
        names = [name for name in names if Path(name).stem in stems]  # names must be alike without `.txt` as well
        close = difflib.get_close_matches(part, names, n=1, cutoff=0.7)
        if not close:
            return None
        nearest /= close[0]
    return str(nearest)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on a CPU or a GPU."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch is not imported for this
        return True
    return isinstance(error, RuntimeError) and _OUT_OF_MEMORY.search(str(error)) is not None


def is_out_of_threads(error: BaseException) -> bool:
    """Whether the system refused to start a thread."""
    return isinstance(error, RuntimeError) and "can't start new thread" in str(error)
