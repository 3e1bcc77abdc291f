"""Datasets of the Hugging Face Hub: the files of a subset and split at one commit, downloaded when they are needed."""

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from glassgpt.config.schema import ReadingConfig
from glassgpt.data.hub_layout import (
    Subset,
    choose_subset,
    folder_of,
    format_of,
    matches,
    name_some,
    splits_by_name,
    subsets_of,
    unknown_name,
)
from glassgpt.data.source_files import SourceFile
from glassgpt.utils.errors import UserError
from glassgpt.utils.files import write_atomic
from glassgpt.utils.hub import ATTEMPTS, DatasetRepository, HubFile, HubUnreachableError, Transfer, find_hub_id

# Where the hub keeps its own conversion of datasets that are in other formats, as SUBSET/SPLIT/NUMBER.parquet.
_CONVERTED = "refs/convert/parquet"
_READABLE = ".parquet, .jsonl, .csv or .txt file (plain, .gz, .zst or .bz2)"


HUB_NAMES: Mapping[str, tuple[str, str | None]] = {
    "fineweb-edu": ("HuggingFaceFW/fineweb-edu", "sample-10BT"),
    "openwebtext": ("Skylion007/openwebtext", None),
    "tinystories": ("roneneldan/TinyStories", None),
}
"""Registered names: the hub's id, and the default subset."""


def hub_location(source: str) -> str | None:
    """Return `NAME[:SUBSET[:SPLIT]]` without a leading `hf:` if a source names a dataset of the hub, otherwise None."""
    location = source.removeprefix("hf:")
    name, _, rest = location.partition(":")
    is_hub = name in HUB_NAMES or ("/" in name and find_hub_id(source.removesuffix(location) + name) is not None)
    return location if is_hub and rest.count(":") <= 1 else None


@dataclass(frozen=True)
class HubSource:
    """A split of a subset of a dataset, looked up when it is first needed. `location`: `ID[:SUBSET[:SPLIT]]`."""

    location: str
    reading: ReadingConfig | None = None

    @property
    def name(self) -> str:
        """The dataset's name without its owner."""
        return self.location.partition(":")[0].rpartition("/")[2]

    @cached_property
    def _dataset(self) -> "HubDataset":
        name, subset, split = (*self.location.split(":"), "", "")[:3]
        hub_id, default = HUB_NAMES.get(name, (name, None))
        return find_dataset(hub_id, subset or default, split or "train")

    def files(self) -> list[SourceFile]:
        """The files of the split. Raises `UserError` if there are none, or if the hub cannot be reached."""
        return self._dataset.files()

    def identity(self) -> dict[str, Any]:
        """The commit, and each file's name and hash."""
        return self._dataset.identity()

    def is_unchanged(self, recorded: Mapping[str, Any]) -> bool:
        """Always true: a prepared dataset stays that of its commit, and needs no network."""
        return True

    @property
    def left_out(self) -> tuple[str, ...]:
        """The split's files in another format than most of it."""
        return self._dataset.left_out


@dataclass(frozen=True)
class HubDataset:
    """The files of a split at a commit. `left_out`: those in another format than most of its bytes."""

    hub_id: str
    commit: str
    subset: str | None
    split: str
    entries: tuple[HubFile, ...]
    left_out: tuple[str, ...] = ()

    @property
    def repository(self) -> DatasetRepository:
        """Its repository at its commit."""
        return DatasetRepository(self.hub_id, self.commit)

    def files(self) -> list[SourceFile]:
        """Its files, in the order of their names (or of the metadata's paths)."""
        return [self._source_file(entry, Transfer()) for entry in self.entries]

    def _source_file(self, entry: HubFile, transfer: Transfer) -> SourceFile:
        return SourceFile(
            entry.name,
            entry.bytes,
            partial(self.repository.download, entry, transfer),
            present=lambda: self.repository.cached_bytes(entry) or transfer.received,
            cancel=transfer.cancelled.set,
        )

    def identity(self) -> dict[str, Any]:
        """What the text depends on, as JSON. Small files have git's sha1 instead of a sha256."""
        files = [
            {key: value for key, value in asdict(entry).items() if key != "git_sha1" or value} for entry in self.entries
        ]
        at = {"repository": self.hub_id, "commit": self.commit, "subset": self.subset, "split": self.split}
        return {**at, "files": files}

    def missing(self) -> list[str]:
        """Names of the files that are not in the cache, compared by size."""
        return [entry.name for entry in self.entries if self.repository.cached_bytes(entry) != entry.bytes]


def find_dataset(hub_id: str, subset: str | None = None, split: str = "train") -> HubDataset:
    """Find the files of a dataset's split at the hub's newest commit.

    `subset` None is the default one. If the hub cannot be reached, return the last result if all its files are in the
    cache. Raises `UserError` if there is no such dataset, subset, split or readable file, or no network.
    """
    key = hashlib.sha256(json.dumps([subset, split]).encode()).hexdigest()[:16]
    record = DatasetRepository(hub_id, "").cache / "glassgpt" / f"{key}.json"
    known = _read_record(record)
    missing = [] if known is None else known.missing()
    if known is None:
        print(f"downloading {hub_id} from the Hugging Face Hub", file=sys.stderr)
    try:
        dataset = _look_up(hub_id, subset, split, attempts=ATTEMPTS if known is None or missing else 1)
    except HubUnreachableError as error:
        if known is None:
            raise
        if not missing:
            return known
        cached = f"{len(missing)} of its {len(known.entries)} files are not in the cache ({name_some(missing, 2)})"
        raise UserError(f"{error}\n{cached}") from None
    with suppress(OSError, UserError):  # a cache that cannot be written to may still be read
        record.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(record, json.dumps(asdict(dataset), indent=1) + "\n")
    return dataset


def _read_record(path: Path) -> HubDataset | None:
    """What an earlier call found, None if there is no valid record of it."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        entries = tuple(HubFile(**entry) for entry in record.pop("entries"))
        return HubDataset(**{**record, "left_out": tuple(record["left_out"])}, entries=entries)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _look_up(hub_id: str, name: str | None, split: str, attempts: int) -> HubDataset:
    """The files of a subset and split; those of the hub's own conversion if nothing else can be read."""
    repository = DatasetRepository.open(hub_id, attempts=attempts)
    what = f"the dataset {repository.hub_id}"
    subsets = subsets_of(repository.metadata(), what)
    if subsets:
        subset = choose_subset(subsets, name, what)
        splits = _splits_of(repository, subset, split)
        return _select(repository, subset.name, split, splits, f"{what}, subset {subset.name!r},")
    files = repository.files()
    if not any(format_of(file.name) for file in files):
        return _find_converted(repository.hub_id, name, split, files)
    splits = _by_split(files, name or "")
    if not splits:
        folders = {file.name.partition("/")[0] for file in files if "/" in file.name and format_of(file.name)}
        raise UserError(f"{what} has no metadata, and no folder {name!r} with data, only {name_some(sorted(folders))}")
    return _select(repository, name, split, splits, what)


def _by_split(files: Iterable[HubFile], folder: str) -> dict[str, list[HubFile]]:
    by_name = {file.name: file for file in files}
    return {split: [by_name[name] for name in names] for split, names in splits_by_name(by_name, folder).items()}


def _splits_of(repository: DatasetRepository, subset: Subset, split: str) -> dict[str, list[HubFile]]:
    """The files of the wanted split; the other splits without files, since listing them costs requests."""
    if subset.patterns is None:
        return _by_split(repository.files(subset.folder), subset.folder)
    chosen: dict[str, HubFile] = {}  # by name: patterns may overlap
    listed: dict[tuple[str, bool], list[HubFile]] = {}
    for pattern in subset.patterns.get(split, ()):
        place = folder_of(pattern)
        if place not in listed:
            listed[place] = sorted(repository.files(*place), key=lambda file: file.name)
        chosen |= {
            file.name: file for file in listed[place] if matches(file.name, pattern) and file.name != "README.md"
        }
    return {other: list(chosen.values()) if other == split else [] for other in subset.patterns}


def _select(
    repository: DatasetRepository, subset: str | None, split: str, splits: Mapping[str, Sequence[HubFile]], what: str
) -> HubDataset:
    """The files of one split in the format that most of its bytes are in."""
    if split not in splits:
        raise unknown_name("split", split, splits, what)
    sizes: Counter[str] = Counter()
    for file in splits[split]:
        if format_name := format_of(file.name):
            sizes[format_name] += file.bytes
    if not sizes.total():
        raise UserError(f"{what} has no {_READABLE} in its split {split!r}, but {_names(splits[split])}")
    (format_name, _), *_ = sizes.most_common()
    kept = {file.name: file for file in splits[split] if file.bytes and format_of(file.name) == format_name}
    left_out = tuple(file.name for file in splits[split] if file.name not in kept)
    return HubDataset(repository.hub_id, repository.commit, subset, split, tuple(kept.values()), left_out)


def _find_converted(hub_id: str, name: str | None, split: str, files: Sequence[HubFile]) -> HubDataset:
    """The files of the hub's own conversion. Raises `UserError` if there is none, or if it is not complete."""
    nothing = UserError(
        f"the dataset {hub_id} has no {_READABLE}, also not in the hub's own conversion, but {_names(files)}"
    )
    try:
        repository = DatasetRepository.open(hub_id, _CONVERTED)
    except HubUnreachableError:
        raise
    except UserError:
        raise nothing from None
    subsets: dict[str, dict[str, list[HubFile]]] = {}
    for file in sorted(repository.files(), key=lambda file: file.name):
        folder, _, rest = file.name.partition("/")
        if rest.count("/") == 1 and format_of(file.name) == "parquet":
            subsets.setdefault(folder, {}).setdefault(rest.partition("/")[0], []).append(file)
    if not subsets:
        raise nothing
    what = f"the hub's conversion of the dataset {hub_id}"
    subset = choose_subset([Subset(folder) for folder in subsets], name, what).name
    if f"partial-{split}" in subsets[subset]:
        raise UserError(f"{what}, subset {subset!r}, has only the first part of the split {split!r}")
    return _select(repository, subset, split, subsets[subset], f"{what}, subset {subset!r},")


def _names(files: Iterable[HubFile]) -> str:
    return name_some(sorted(file.name for file in files), 5)
