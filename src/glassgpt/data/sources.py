"""Where text comes from: a registered name, local files, or a dataset that is already prepared."""

import glob
import itertools
import json
import re
import stat
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import filelock

from glassgpt.data import builtin_texts as python_docs
from glassgpt.data.dataset import is_dataset
from glassgpt.data.hub_datasets import HubDataset, find_dataset
from glassgpt.data.readers import SUFFIXES, Part, ReadOptions, is_readable, read_parts
from glassgpt.data.source_files import SourceFile
from glassgpt.utils.download import cache_directory, download
from glassgpt.utils.errors import UserError, did_you_mean, nearby_path
from glassgpt.utils.files import explain_os_errors, files_below, readable, sha256_of, user_path, write_atomic
from glassgpt.utils.hub import find_hub_id


class Source(Protocol):
    """Files with a name, and a way to tell whether they are still the same."""

    @property
    def name(self) -> str:
        """What it is called in messages and in the name of a dataset's directory."""
        ...

    @property
    def location(self) -> str:
        """What tells it from every other source on this machine: the registered name, or the absolute path."""
        ...

    @property
    def reading(self) -> ReadOptions | None:
        """How its files are to be read, whatever the user says of files of their own; None where that is to be heeded."""
        ...

    def files(self) -> list[SourceFile]:
        """The files, always in the same order. Raises `UserError` where there are none."""
        ...

    def identity(self) -> dict[str, Any]:
        """What the text depends on, as JSON. Kept with a dataset, it tells later whether the dataset is stale."""
        ...

    def is_unchanged(self, recorded: Mapping[str, Any]) -> bool:
        """Whether the text is still that of an `identity` recorded earlier."""
        ...

    def same_text(self, one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
        """Whether two identities are of the same text."""
        ...

    @property
    def left_out(self) -> tuple[str, ...]:
        """Names of files that lie among the others and are not read, `MOST_LEFT_OUT` of them at most."""
        ...


MOST_LEFT_OUT = 10_000
"""Names in a source's `left_out`: a folder may have millions of pictures beside its texts."""


@dataclass(frozen=True)
class PreparedDataset:
    """A directory that `prepare` has made, or one of another project's token files."""

    directory: Path


def read_source(source: Source, options: ReadOptions) -> Iterator[Part]:
    """All documents of a source, one after the other, long ones in parts. Raises `UserError` where one cannot be had or read."""
    for file in source.files():
        yield from read_parts(file.fetch(), source.reading or options, name=file.name)


# ---------------------------------------------------------------------------------------------------------------- files


@dataclass(frozen=True)
class LocalFiles:
    """A file, the readable files in a folder and below it, or those that match a pattern such as `data/*.parquet`."""

    root: Path
    """The file or folder, or the pattern as an absolute path."""
    is_pattern: bool = False
    reading: ReadOptions | None = None

    @property
    def name(self) -> str:
        """The file's or folder's name; of a pattern, that of its folder."""
        return (self._folder.name if self.is_pattern else self.root.name.split(".")[0]) or "text"

    @property
    def location(self) -> str:
        """The absolute path."""
        return str(self.root)

    @property
    def _folder(self) -> Path:
        """The folder from which names are told: the last one of a pattern that has no wildcard."""
        if not self.is_pattern:
            return self.root if self.root.is_dir() else self.root.parent
        return next(path for path in map(_literal, [self.root, *self.root.parents]) if path is not None)

    def files(self) -> list[SourceFile]:
        """The files in the order of their names. Raises `UserError` for a folder or a pattern without any."""
        return [SourceFile(self._relative(path), self._size(path), lambda path=path: path) for path in self._paths()]  # type: ignore[misc]

    def identity(self) -> dict[str, Any]:
        """Each file's name, size, time and hash."""
        return {"files": [{**self._glance(path), "sha256": _hash(path)} for path in self._paths()]}

    def is_unchanged(self, recorded: Mapping[str, Any]) -> bool:
        """Whether the files are the same. One that was copied or touched has another time and the same text: only then is it read."""
        old, paths = recorded.get("files", []), self._paths()
        glances = [self._glance(path) for path in paths]
        if [{**entry, "sha256": None} for entry in old] == [{**glance, "sha256": None} for glance in glances]:
            return True
        if [(e["path"], e["bytes"]) for e in old] != [(g["path"], g["bytes"]) for g in glances]:
            return False
        return all(entry["sha256"] == _hash(path) for entry, path in zip(old, paths, strict=True))

    def same_text(self, one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
        """Whether names, sizes and hashes are the same, whatever the times."""
        first, second = ([{**entry, "mtime_ns": None} for entry in identity["files"]] for identity in (one, other))
        return first == second

    @property
    def left_out(self) -> tuple[str, ...]:
        """What a folder has beside text; hidden files are not meant to be found."""
        if self.is_pattern or not self.root.is_dir():
            return ()
        others = files_below(self.root, lambda name: not _is_text(name))
        return tuple(sorted(map(self._relative, itertools.islice(others, MOST_LEFT_OUT))))

    def _paths(self) -> list[Path]:
        if self.is_pattern:
            # A set, since `**/**` finds a file several times.
            found = [
                path for path in {Path(name) for name in glob.glob(str(self.root), recursive=True)} if path.is_file()
            ]
        elif self.root.is_dir():
            found = list(files_below(self.root, _is_text))
        else:
            return [self.root]
        if not found:
            what = (
                f"no file matches {self.root}"
                if self.is_pattern
                else f"the folder {self.root} has no file that can be read"
            )
            kinds = ", ".join(suffix for suffix in SUFFIXES if suffix.count(".") == 1 and suffix != ".json")
            raise UserError(f"{what}; name a text file, or a folder that has some ({kinds}; also .gz, .bz2 and .zst)")
        return sorted(found, key=self._relative)

    def _relative(self, path: Path) -> str:
        return path.relative_to(self._folder).as_posix()

    def _size(self, path: Path) -> int:
        with readable(path):
            return path.stat().st_size

    def _glance(self, path: Path) -> dict[str, Any]:
        """What can be told of a file without reading it."""
        with readable(path):
            status = path.stat()
        return {"path": self._relative(path), "bytes": status.st_size, "mtime_ns": status.st_mtime_ns}


def _is_text(name: str) -> bool:
    """Whether a file of a folder is read. A plain .json is more often about the data, or about a model: it is read where it is named."""
    return is_readable(name) and not name.lower().endswith(".json")


# What `glob.escape` makes of a wildcard.
_ESCAPED = re.compile(r"\[([*?[])\]")


def _literal(pattern: Path) -> Path | None:
    """The path that a pattern without wildcards stands for, None for one that has some."""
    return None if glob.has_magic(_ESCAPED.sub("", str(pattern))) else Path(_ESCAPED.sub(r"\1", str(pattern)))


def _absolute(pattern: str) -> Path:
    """The same pattern from the root on. Wildcards are the user's alone: a working directory or a home may be called `a[1]`."""
    first, *rest = Path(pattern).parts
    start = user_path(first)
    return (
        Path(glob.escape(str(start)), *rest)
        if start.is_absolute()
        else Path(glob.escape(str(Path.cwd())), first, *rest)
    )


def _hash(path: Path) -> str:
    with readable(path):
        return sha256_of(path)


# ----------------------------------------------------------------------------------------------------------- registered

# Registered text is read as it is, whatever column or encoding is named for files of the user's own.
_PLAIN = ReadOptions()

SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
SHAKESPEARE_BYTES = 1_115_394


@dataclass(frozen=True)
class Shakespeare:
    """tinyshakespeare, 1,115,394 characters of his plays (Karpathy, 2015): downloaded once, then read from the cache."""

    name: str = "shakespeare"
    location: str = "shakespeare"
    reading: ReadOptions | None = _PLAIN
    left_out: tuple[str, ...] = ()

    def files(self) -> list[SourceFile]:
        """The one file."""
        return [SourceFile("tinyshakespeare.txt", SHAKESPEARE_BYTES, self._fetch)]

    def _fetch(self) -> Path:
        path = cache_directory() / "downloads" / "tinyshakespeare.txt"
        manual = (
            f"Without network: get that file on another machine and put it at {path}, or name it, or any other text, with --data FILE; "
            "--data python-docs needs no download"
        )
        return download(SHAKESPEARE_URL, path, SHAKESPEARE_SHA256, what="shakespeare", manual=manual)

    def identity(self) -> dict[str, Any]:
        """The file's hash."""
        return {"sha256": SHAKESPEARE_SHA256}

    def is_unchanged(self, recorded: Mapping[str, Any]) -> bool:
        """Always: it is known by its hash."""
        return recorded == self.identity()

    def same_text(self, one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
        """Whether they are equal."""
        return one == other


@dataclass(frozen=True)
class PythonDocs:
    """The documentation of the running Python: see `python_docs`. Written into the cache once."""

    name: str = "python-docs"
    location: str = "python-docs"
    reading: ReadOptions | None = _PLAIN
    left_out: tuple[str, ...] = ()

    def files(self) -> list[SourceFile]:
        """The one file, which is made now where it is missing. Raises `UserError` where this Python has no documentation."""
        version = f"{sys.version_info.major}.{sys.version_info.minor}.{sys.version_info.micro}-{self.identity()['rules'][:12]}"
        path = cache_directory() / "downloads" / f"python-docs-{version}.jsonl"
        with explain_os_errors("write", path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with filelock.FileLock(path.with_name(f".{path.name}.lock")):
                if not path.is_file():
                    write_atomic(path, "".join(json.dumps({"text": text}) + "\n" for text in python_docs.python_docs()))
        return [SourceFile("python-docs.jsonl", path.stat().st_size, lambda: path)]

    def identity(self) -> dict[str, Any]:
        """The Python, and the hash of the file that stands for the rules of cleaning."""
        return {"python": sys.version, "rules": sha256_of(Path(python_docs.__file__))}

    def is_unchanged(self, recorded: Mapping[str, Any]) -> bool:
        """Whether it is still the same Python and the same rules."""
        return recorded == self.identity()

    def same_text(self, one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
        """Whether they are equal."""
        return one == other


# ------------------------------------------------------------------------------------------------------------------ hub

# Names for datasets of the Hugging Face hub: the id there and the subset that is meant where none is named.
_HUB_NAMES: Mapping[str, tuple[str, str | None]] = {
    "fineweb-edu": ("HuggingFaceFW/fineweb-edu", "sample-10BT"),
    "openwebtext": ("Skylion007/openwebtext", None),
    "tinystories": ("roneneldan/TinyStories", None),
}


@dataclass(frozen=True)
class HubSource:
    """A split of a subset of a dataset of the Hugging Face hub, as `location` names it: `ID`, `ID:SUBSET` or `ID:SUBSET:SPLIT`."""

    location: str
    reading: ReadOptions | None = None

    @property
    def name(self) -> str:
        """The dataset's name without its owner."""
        return self.location.partition(":")[0].rpartition("/")[2]

    @cached_property
    def _found(self) -> HubDataset:
        named, subset, split = (*self.location.split(":"), "", "")[:3]
        hub_id, default = _HUB_NAMES.get(named, (named, None))
        try:
            return find_dataset(hub_id, subset or default, split or "train")
        except UserError as error:
            if named in _HUB_NAMES:
                raise
            raise UserError(
                f"there is no file or folder {named}, and as a dataset of the Hugging Face hub: {error}"
            ) from error

    def files(self) -> list[SourceFile]:
        """The files of the split. Raises `UserError` where the hub has none, or cannot be reached."""
        return self._found.files()

    def identity(self) -> dict[str, Any]:
        """The commit, and each file's name and hash."""
        return self._found.identity()

    def is_unchanged(self, recorded: Mapping[str, Any]) -> bool:
        """Always: a prepared dataset stays that of the commit it was made from, and needs no network."""
        return True

    def same_text(self, one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
        """Whether the files are the same, whatever the commit: most change something beside them."""
        return {**one, "commit": None} == {**other, "commit": None}

    @property
    def left_out(self) -> tuple[str, ...]:
        """The split's files in another format than most of it. Raises `UserError` as `files` does."""
        return self._found.left_out[:MOST_LEFT_OUT]


# --------------------------------------------------------------------------------------------------------------- lookup

# Those of the hub are made anew at each look-up: they remember what the hub has answered.
_LOCAL: Mapping[str, Source] = {source.name: source for source in (PythonDocs(), Shakespeare())}
REGISTERED: tuple[str, ...] = (*_LOCAL, *_HUB_NAMES)


def absolute_source(source: str) -> str:
    """The same source by a name that holds from any working directory. Raises `UserError` as `resolve` does."""
    found = resolve(source)
    return str(found.directory) if isinstance(found, PreparedDataset) else found.location


def _hub_location(source: str) -> str | None:
    """`NAME[:SUBSET[:SPLIT]]` of a dataset on the hub if `source` names one, a leading `hf:` removed."""
    location = source.removeprefix("hf:")
    name, _, rest = location.partition(":")
    is_named = name in _HUB_NAMES or (
        "/" in name and find_hub_id(source[: len(source) - len(location)] + name) is not None
    )
    return location if is_named and rest.count(":") <= 1 else None


def resolve(source: str) -> Source | PreparedDataset:
    """What a source's string stands for: a registered name first, else a path or pattern. Raises `UserError` where it is none."""
    if source in _LOCAL:
        return _LOCAL[source]
    if source in _HUB_NAMES:
        return HubSource(source)
    path = user_path(source)
    choices = (
        "a source is a file, a folder, a pattern of files, a prepared dataset, a dataset of the Hugging Face Hub (hf:owner/name:subset), "
        f"or one of: {', '.join(REGISTERED)}"
    )
    if not source:
        raise UserError(f"no text is named: give --data SOURCE;\n{choices}")
    try:
        mode = path.stat().st_mode if source.strip() else None
    except (FileNotFoundError, NotADirectoryError):
        mode = None
    except OSError as error:
        raise UserError(f"cannot read {source[:200]!r}: {error.strerror};\n{choices}") from error
    if mode is None and glob.has_magic(source):
        return LocalFiles(_absolute(source), is_pattern=True)
    if mode is None and (location := _hub_location(source)) is not None:
        return HubSource(location)
    if mode is None:
        nearby = nearby_path(source)
        hint = f"; did you mean {nearby}?" if nearby else did_you_mean(source, REGISTERED)
        raise UserError(f"there is no file, folder or registered source {source!r}{hint};\n{choices}")
    if stat.S_ISDIR(mode):
        return PreparedDataset(path.resolve()) if is_dataset(path) else LocalFiles(path.resolve())
    if not stat.S_ISREG(mode):
        raise UserError(f"{source} is neither a regular file nor a folder;\n{choices}")
    return LocalFiles(path.resolve())
