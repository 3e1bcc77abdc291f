"""The files of a folder: each one once, also through links, and none that this package wrote."""

import os
import stat
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

from glassgpt.data.shards import is_shard_name
from glassgpt.utils.download import cache_directory
from glassgpt.utils.errors import UserError
from glassgpt.utils.files import readable

_RUN_CONFIGS = {"config.toml", ".partial-removed-config.toml"}
_RUN_FILES = {"environment.json", "status.json", "metrics.jsonl", "checkpoints"}
_MOST_PROBLEMS = 10  # that an error lists
_MOST_OTHERS = 10_000  # names kept: a folder may have millions of images next to its texts


class FolderFiles(NamedTuple):
    """What is below a folder, by names relative to it."""

    files: dict[str, os.stat_result]  # in the order of their names
    left_out: list[str]  # files and folders that are not read, with the reason
    others: list[str]  # some files with other names, in order


def find_files(
    root: Path, wanted: Callable[[str], bool], may_hold: Callable[[str], bool], problems: list[str] | None = None
) -> FolderFiles:
    """Find the regular files with wanted names below a folder, in the folders that may hold some.

    A folder or file with several names (links, hard links) counts once, by a name without links if there is one.
    What cannot be read (folders, wanted links to nothing) is added to `problems`; by default it is a `UserError`.
    """
    folders, linked_folders = deque([""]), deque[str]()
    visited: dict[tuple[int, int], str] = {}
    found: list[tuple[bool, str, os.stat_result]] = []
    left_out: list[str] = []
    others: list[str] = []
    failures: list[str] = [] if problems is None else problems
    while folders or linked_folders:
        entries = None
        through_link = not folders
        folder = (folders or linked_folders).popleft()
        with collected(failures), readable(root / folder):
            status = (root / folder).stat()
            entries = sorted(os.scandir(root / folder), key=lambda entry: entry.name)
        if entries is None:
            continue
        first = visited.setdefault((status.st_dev, status.st_ino), folder)
        reason = f"{first or 'the folder'} again" if first != folder else None
        if reason := reason or _own_kind(root / folder, {entry.name for entry in entries}, is_root=not folder):
            left_out.append(f"{folder or root} ({reason})")
            continue
        for entry in entries:
            name = f"{folder}/{entry.name}" if folder else entry.name
            is_linked = through_link or entry.is_symlink()
            is_folder = False
            with collected(failures), readable(entry.path):
                is_folder = Path(entry.path).is_dir() if entry.is_symlink() else entry.is_dir()
            if is_folder:
                if may_hold(name):
                    (linked_folders if is_linked else folders).append(name)
            elif wanted(name):
                with collected(failures), readable(entry.path):
                    found.append((is_linked, name, entry.stat()))
            elif entry.is_symlink() and may_hold(name) and not Path(entry.path).exists():
                left_out.append(f"{name} (a link to nothing)")
            elif not entry.name.startswith(".") and len(others) < _MOST_OTHERS:
                others.append(name)
    if problems is None:
        require_none(failures, root)
    files = _once(found, left_out)
    return FolderFiles(dict(sorted(files.items())), sorted(left_out), sorted(others))


@contextmanager
def collected(problems: list[str]) -> Iterator[None]:
    """Add the text of a `UserError` to the problems instead of raising it."""
    try:
        yield
    except UserError as error:
        problems.append(str(error))


def require_none(problems: Sequence[str], root: Path) -> None:
    """Raise `UserError` with the first problems of the files of a folder, one a line, if there are some."""
    problems = list(dict.fromkeys(problems))
    if len(problems) == 1:
        raise UserError(problems[0])
    if problems:
        lines = [each.replace("\n", " ") for each in problems[:_MOST_PROBLEMS]]
        more = [f"and {len(problems) - len(lines):,} more"] if len(problems) > len(lines) else []
        advice = f"mend or move them, or name the files to read by a pattern in quotes, such as '{root}/**/*.jsonl'"
        raise UserError("\n".join([f"{len(problems):,} files cannot be read:", *lines, *more, advice]))


def _once(found: list[tuple[bool, str, os.stat_result]], left_out: list[str]) -> dict[str, os.stat_result]:
    """The regular ones of the files found, each by one name; the others are added to `left_out`."""
    files: dict[str, os.stat_result] = {}
    names: dict[tuple[int, int], str] = {}
    for is_linked, name, status in sorted(found, key=lambda each: each[:2]):
        if not stat.S_ISREG(status.st_mode):
            left_out.append(f"{name} (not a regular file)")
            continue
        first = names.setdefault((status.st_dev, status.st_ino), name)
        if first != name and (is_linked or status.st_nlink > 1):  # some file systems have inode numbers of no meaning
            left_out.append(f"{name} ({first} again)")
        else:
            files[name] = status
    return files


def _own_kind(folder: Path, names: set[str], is_root: bool) -> str | None:
    """What a folder is if this package wrote it, recognised by the files in it; None for others."""
    if (names & _RUN_CONFIGS and names & _RUN_FILES) or {"environment.json", "status.json"} <= names:
        return "a run"
    if any(map(is_shard_name, names)) or {"build.json", "tokenizer.json"} <= names:
        return "a dataset"
    if is_root:  # texts that the user names may lie next to a model
        return None
    if {"datasets", "scans"} <= names or folder.resolve() == cache_directory().resolve():
        return "the cache"
    is_model = names & {"config.json", "config.toml"} and any(name.endswith(".safetensors") for name in names)
    return "a model" if is_model else None


def is_below(name: str, pattern: str, *, partly: bool = False, hidden: tuple[str, ...] = (".",)) -> bool:
    """Whether a pattern matches a file's path, as `glob` does; `partly`: whether it may match one in this folder.

    Parts that begin as `hidden` match only a part of a pattern that does, too.
    """
    wanted = pattern.split("/")
    wanted = [part for i, part in enumerate(wanted) if part != "**" or wanted[i - 1 : i] != ["**"]]

    def match(parts: Sequence[str], wanted: Sequence[str]) -> bool:
        if not parts or not wanted:
            return not parts and (partly or not wanted)
        is_visible = not parts[0].startswith(hidden)
        if wanted[0] == "**":
            rest = wanted[1:] or ["*"]  # a last `**` means every file below
            return match(parts, rest) or (is_visible and match(parts[1:], wanted))
        fits = fnmatchcase(parts[0], wanted[0]) and (is_visible or wanted[0].startswith(hidden))
        return fits and match(parts[1:], wanted[1:])

    return match(name.split("/"), wanted)
