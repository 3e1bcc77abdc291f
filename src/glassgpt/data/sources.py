"""Where text comes from: a registered name, local files, a dataset of the hub, or a prepared dataset."""

import glob
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from glassgpt.config.schema import ReadingConfig
from glassgpt.data.builtin_texts import PythonDocs, Shakespeare
from glassgpt.data.dataset import is_dataset
from glassgpt.data.hub_datasets import HUB_NAMES, HubSource, hub_location
from glassgpt.data.local_files import LocalFiles, absolute_pattern
from glassgpt.data.readers import Part, read_documents
from glassgpt.data.source_files import SourceFile
from glassgpt.utils.errors import UserError, did_you_mean, nearby_path
from glassgpt.utils.files import user_path


class Source(Protocol):
    """Files with a name, and a way to find out whether they have changed."""

    @property
    def name(self) -> str:
        """Its name in messages and in the name of a dataset's directory."""

    @property
    def location(self) -> str:
        """The registered name, absolute path or hub id: unique on this machine."""

    @property
    def reading(self) -> ReadingConfig | None:
        """How its files must be read, whatever the user's options; None if the options apply."""

    def files(self) -> list[SourceFile]:
        """The files, always in the same order. Raises `UserError` if there are none."""

    def identity(self) -> dict[str, Any]:
        """A JSON value that identifies the text, kept with a dataset."""

    def is_unchanged(self, recorded: Mapping[str, Any]) -> bool:
        """Whether the text is still that of an earlier `identity`."""

    def same_text(self, one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
        """Whether two identities belong to the same text."""

    @property
    def left_out(self) -> tuple[str, ...]:
        """Names of files that are in the folder but not read, at most `MOST_LEFT_OUT`."""


@dataclass(frozen=True)
class PreparedDataset:
    """A directory with a prepared dataset, or with token files of another project."""

    directory: Path


def read_source(source: Source, options: ReadingConfig) -> Iterator[Part]:
    """Yield all documents of a source, long ones in parts. Raises `UserError` for a file that cannot be read."""
    for file in source.files():
        yield from read_documents(file.fetch(), source.reading or options, name=file.name)


# --------------------------------------------------------------------------------------------------------------- lookup

# Hub sources are created at each lookup, since they keep the hub's answers.
_LOCAL: Mapping[str, Source] = {source.name: source for source in (PythonDocs(), Shakespeare())}
REGISTERED: tuple[str, ...] = (*_LOCAL, *HUB_NAMES)


def absolute_source(source: str) -> str:
    """The source by a name that is valid in any working directory. Raises `UserError` as `resolve` does."""
    resolved = resolve(source)
    return str(resolved.directory) if isinstance(resolved, PreparedDataset) else resolved.location


def resolve(source: str) -> Source | PreparedDataset:
    """Find the source of a name: a registered name, then a path, a pattern, or a hub dataset.

    Raises `UserError` if there is none.
    """
    if source in _LOCAL:
        return _LOCAL[source]
    if source in HUB_NAMES:
        return HubSource(source)
    path = user_path(source)
    choices = (
        "a source is a file, a folder, a pattern of files, a prepared dataset, a dataset of the Hugging Face Hub "
        f"(hf:owner/name:subset), or one of: {', '.join(REGISTERED)}"
    )
    if not source:
        raise UserError(f"no text: use --data SOURCE;\n{choices}")
    try:
        mode = path.stat().st_mode if source.strip() else None
    except (FileNotFoundError, NotADirectoryError):
        mode = None
    except OSError as error:
        raise UserError(f"cannot read {source[:200]!r}: {error.strerror};\n{choices}") from error
    if mode is None and glob.has_magic(source):
        return LocalFiles(absolute_pattern(source), is_pattern=True)
    if mode is None and (location := hub_location(source)) is not None:
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
