"""Where text comes from: a registered name, local files, a dataset of the hub, or a prepared dataset."""

import glob
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from glassgpt.config.schema import ReadingConfig
from glassgpt.data.builtin_texts import GeneratedText, PythonDocs, RepeatedStrings, Shakespeare
from glassgpt.data.dataset import is_dataset
from glassgpt.data.folders import FolderFiles, collected, find_files, is_below, require_none
from glassgpt.data.hub_datasets import HUB_NAMES, HubSource, hub_location
from glassgpt.data.readers import SUFFIXES, Counts, Part, read_documents, require_head
from glassgpt.data.source_files import SourceFile
from glassgpt.utils.errors import UserError, did_you_mean, nearby_path
from glassgpt.utils.files import readable, sha256_of, user_path


@dataclass(frozen=True)
class LocalFiles:
    """A file, the readable files in a folder and its subfolders, or those that match a pattern (`data/*.parquet`).

    All sources have these properties and methods.
    """

    root: Path  # the file or folder; names are relative to the folder
    pattern: str = ""  # what the names match; empty if all readable files of the folder are meant
    reading: ReadingConfig | None = None  # how the files must be read, whatever the user's options; None: as these say

    @property
    def name(self) -> str:
        """The name in messages and of a dataset's directory: the file's or folder's, or that of a pattern's folder."""
        return (self.root.name if self.pattern else self.root.name.split(".")[0]) or "text"

    @property
    def location(self) -> str:
        """The absolute path, or the registered name or hub id: unique on this machine."""
        return str(self.root / self.pattern)

    def files(self, problems: list[str] | None = None) -> list[SourceFile]:
        """The files, always in the same order (of their names). Raises `UserError` if there are none.

        What cannot be read is added to `problems`; by default it is a `UserError`.
        """
        return [SourceFile(entry["path"], entry["bytes"], path) for path, entry in self._entries(problems)]

    def identity(self) -> dict[str, Any]:
        """A JSON value that identifies the text, kept with a dataset: each file's name, size, time and hash."""
        return {"files": [{**entry, "sha256": _hash(path)} for path, entry in self._entries()]}

    def is_unchanged(self, recorded: Mapping[str, Any]) -> bool:
        """Whether the text is still that of an earlier `identity`. Files are read only if a time differs."""
        problems: list[str] = []
        old, new = recorded.get("files"), self._entries(problems)
        return not problems and isinstance(old, list) and len(old) == len(new) and all(map(_is_same, old, new))

    @property
    def left_out(self) -> tuple[str, ...]:
        """What is in the folder but not read: what may surprise, with the reason, then files of other types."""
        if not self.pattern and not self.root.is_dir():
            return ()
        found = self._find()
        return (*found.left_out, *(() if self.pattern else found.others))

    def _find(self, problems: list[str] | None = None) -> FolderFiles:
        """The files of the folder that are meant."""
        if self.pattern:
            matches = partial(is_below, pattern=self.pattern)
            return find_files(self.root, matches, partial(matches, partly=True), problems)
        return find_files(self.root, _is_text, lambda folder: not folder.rpartition("/")[2].startswith("."), problems)

    def _entries(self, problems: list[str] | None = None) -> list[tuple[Path, dict[str, Any]]]:
        """Each file with its name, size and time."""
        if self.pattern or self.root.is_dir():
            found = self._find(problems)
            files = {name: (self.root / name, status) for name, status in found.files.items()}
            if not files and not problems:
                problem = f"folder {self.root} has no readable text file"
                if self.pattern:
                    problem = f"no file matches {self.location}"
                reasons = f" (not read: {', '.join(found.left_out[:3])})" if found.left_out else ""
                suffixes = ", ".join(suffix for suffix in SUFFIXES if suffix.count(".") == 1 and suffix != ".json")
                advice = f"name a text file, or a folder with some ({suffixes}; also .gz, .bz2 and .zst)"
                raise UserError(f"{problem}{reasons}; {advice}")
        else:
            with readable(self.root):
                files = {self.root.name: (self.root, self.root.stat())}
        return [
            (path, {"path": name, "bytes": status.st_size, "mtime_ns": status.st_mtime_ns})
            for name, (path, status) in files.items()
        ]


def _is_same(was: Any, entry: tuple[Path, Mapping[str, Any]]) -> bool:
    """Whether a file is as it was recorded; the record may be damaged."""
    path, now = entry
    return (
        isinstance(was, dict)
        and (was.get("path"), was.get("bytes")) == (now["path"], now["bytes"])
        and (was.get("mtime_ns") == now["mtime_ns"] or was.get("sha256") == _hash(path))
    )


def _is_text(name: str) -> bool:
    """Whether a folder's file is read. A plain .json is mostly metadata or a model's, so it must be named itself."""
    name = name.rpartition("/")[2].lower()
    return name.endswith(SUFFIXES) and not name.endswith(".json") and not name.startswith(".")


def _hash(path: Path) -> str:
    with readable(path):
        return sha256_of(path)


Source = LocalFiles | HubSource | GeneratedText | Shakespeare


@dataclass(frozen=True)
class PreparedDataset:
    """A directory with a prepared dataset, or with token files of another project."""

    directory: Path


# Hub sources are created at each lookup, since they keep the hub's answers.
_BUILTIN: Mapping[str, Source] = {each.name: each for each in (PythonDocs(), Shakespeare(), RepeatedStrings())}
REGISTERED: tuple[str, ...] = (*_BUILTIN, *HUB_NAMES)
_CHOICES = (
    "a source is a file, a folder, a pattern of files, a prepared dataset, a dataset of the Hugging Face Hub "
    f"(hf:owner/name:subset), or one of: {', '.join(REGISTERED)}"
)


def resolve(source: str) -> Source | PreparedDataset:
    """Find a source: a registered name, then a path, a pattern, or a hub dataset. Raises `UserError` if it is none."""
    if source in _BUILTIN:
        return _BUILTIN[source]
    if source in HUB_NAMES:
        return HubSource(source)
    path = user_path(source)
    try:
        path.stat()  # raises an error for a name that is too long, which `exists` may not
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        raise UserError(f"cannot read {source[:200]!r}: {error.strerror};\n{_CHOICES}") from error
    if not source.strip():
        problem = "no text: use --data SOURCE"
    elif path.is_dir() and is_dataset(path):
        return PreparedDataset(path.resolve())
    elif path.is_dir() or path.is_file():
        return LocalFiles(path.resolve())
    elif path.exists():
        problem = f"{source} is neither a regular file nor a folder"
    elif path.is_symlink():
        problem = f"{source} is a link to {path.readlink()}, which does not exist; mend the link"
    elif "://" in source:
        command = f"curl -LO {shlex.quote(source[:200])}"
        problem = f"{source[:200]} is a URL, not a file; download it and name the file: {command}"
    elif glob.has_magic(source):  # only its own wildcards count: a folder may be called `a[1]`
        pattern = Path.cwd() / path
        root = next(folder for folder in pattern.parents if folder.is_dir())
        return LocalFiles(root, str(pattern.relative_to(root)))
    elif (location := hub_location(source)) is not None:
        return HubSource(location)
    else:
        nearby = nearby_path(source)
        hint = f"; did you mean {nearby}?" if nearby else did_you_mean(source, REGISTERED)
        problem = f"there is no file, folder or registered source {source!r}{hint}"
    raise UserError(f"{problem};\n{_CHOICES}")


def absolute_source(source: str) -> str:
    """The source by a name that is valid in any working directory. Raises `UserError` as `resolve` does."""
    resolved = resolve(source)
    return str(resolved.directory) if isinstance(resolved, PreparedDataset) else resolved.location


def require_texts(source: LocalFiles, options: ReadingConfig) -> None:
    """Raise one `UserError` for all files of a source whose first rows cannot be read."""
    problems = list[str]()
    for file in source.files(problems):
        with collected(problems):
            require_head(file.fetch(), file.name, file.bytes, source.reading or options)
    require_none(problems, source.root)


def read_source(source: Source, options: ReadingConfig, counts: Counts | None = None) -> Iterator[tuple[int, Part]]:
    """Yield the documents of a source as `read_documents` does, each with the number of its file."""
    for number, file in enumerate(source.files()):
        for part in read_documents(file.fetch(), source.reading or options, name=file.name, counts=counts):
            yield number, part
