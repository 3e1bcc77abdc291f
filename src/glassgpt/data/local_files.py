"""Local text files as a source: one file, the files of a folder, or those that match a pattern."""

import glob
import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from glassgpt.config.schema import ReadingConfig
from glassgpt.data.readers import SUFFIXES, is_readable
from glassgpt.data.source_files import SourceFile
from glassgpt.utils.errors import UserError
from glassgpt.utils.files import files_below, readable, sha256_of, user_path

MOST_LEFT_OUT = 10_000
"""Most names in a source's `left_out`, as a folder may have millions of images next to its texts."""


@dataclass(frozen=True)
class LocalFiles:
    """A file, the readable files in a folder and its subfolders, or those that match a pattern (`data/*.parquet`)."""

    root: Path
    """The file or folder, or the pattern as an absolute path."""
    is_pattern: bool = False
    reading: ReadingConfig | None = None

    @property
    def name(self) -> str:
        """The file's or folder's name; for a pattern, that of its folder."""
        return (self._folder.name if self.is_pattern else self.root.name.split(".")[0]) or "text"

    @property
    def location(self) -> str:
        """The absolute path."""
        return str(self.root)

    @property
    def _folder(self) -> Path:
        """The folder to which names are relative: for a pattern, the last one without a wildcard."""
        if not self.is_pattern:
            return self.root if self.root.is_dir() else self.root.parent
        return next(path for path in map(_without_wildcards, [self.root, *self.root.parents]) if path is not None)

    def files(self) -> list[SourceFile]:
        """The files in the order of their names. Raises `UserError` if there are none."""
        return [SourceFile(self._relative(path), _size(path), partial(Path, path)) for path in self._paths()]

    def identity(self) -> dict[str, Any]:
        """Each file's name, size, time and hash."""
        return {"files": [{**self._status(path), "sha256": _hash(path)} for path in self._paths()]}

    def is_unchanged(self, recorded: Mapping[str, Any]) -> bool:
        """Whether the files are the same. They are only read if a time differs, as after a copy."""
        old, paths = recorded.get("files", []), self._paths()
        new = [self._status(path) for path in paths]
        if [{**entry, "sha256": None} for entry in old] == [{**entry, "sha256": None} for entry in new]:
            return True
        if [(entry["path"], entry["bytes"]) for entry in old] != [(entry["path"], entry["bytes"]) for entry in new]:
            return False
        return all(entry["sha256"] == _hash(path) for entry, path in zip(old, paths, strict=True))

    def same_text(self, one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
        """Whether names, sizes and hashes are the same."""
        first, second = ([{**entry, "mtime_ns": None} for entry in identity["files"]] for identity in (one, other))
        return first == second

    @property
    def left_out(self) -> tuple[str, ...]:
        """Names of a folder's other files, except hidden ones."""
        if self.is_pattern or not self.root.is_dir():
            return ()
        others = files_below(self.root, lambda name: not _is_text(name))
        return tuple(sorted(map(self._relative, itertools.islice(others, MOST_LEFT_OUT))))

    def _paths(self) -> list[Path]:
        if self.is_pattern:
            # A set, since `**/**` matches a file several times.
            matches = {Path(name) for name in glob.glob(str(self.root), recursive=True)}
            paths = [path for path in matches if path.is_file()]
            problem = f"no file matches {self.root}"
        elif self.root.is_dir():
            paths = list(files_below(self.root, _is_text))
            problem = f"folder {self.root} has no readable text file"
        else:
            return [self.root]
        if not paths:
            suffixes = ", ".join(suffix for suffix in SUFFIXES if suffix.count(".") == 1 and suffix != ".json")
            raise UserError(f"{problem}; name a text file, or a folder with some ({suffixes}; also .gz, .bz2 and .zst)")
        return sorted(paths, key=self._relative)

    def _relative(self, path: Path) -> str:
        return path.relative_to(self._folder).as_posix()

    def _status(self, path: Path) -> dict[str, Any]:
        with readable(path):
            status = path.stat()
        return {"path": self._relative(path), "bytes": status.st_size, "mtime_ns": status.st_mtime_ns}


def _is_text(name: str) -> bool:
    """Whether a folder's file is read. A plain .json is mostly metadata or a model's, so it must be named itself."""
    return is_readable(name) and not name.lower().endswith(".json")


def _size(path: Path) -> int:
    with readable(path):
        return path.stat().st_size


def _hash(path: Path) -> str:
    with readable(path):
        return sha256_of(path)


# A wildcard after `glob.escape`.
_ESCAPED = re.compile(r"\[([*?[])\]")


def _without_wildcards(pattern: Path) -> Path | None:
    """The path that a pattern without wildcards stands for; None for one with wildcards."""
    return None if glob.has_magic(_ESCAPED.sub("", str(pattern))) else Path(_ESCAPED.sub(r"\1", str(pattern)))


def absolute_pattern(pattern: str) -> Path:
    """The pattern as an absolute one. Only its own wildcards count: the working directory may be called `a[1]`."""
    first, *rest = Path(pattern).parts
    start = user_path(first)
    if start.is_absolute():
        return Path(glob.escape(str(start)), *rest)
    return Path(glob.escape(str(Path.cwd())), first, *rest)
