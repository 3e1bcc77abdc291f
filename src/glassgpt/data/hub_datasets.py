"""Datasets of the Hugging Face Hub: the files of a subset and split at one commit, downloaded when they are needed."""

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from glassgpt.config.schema import ReadingConfig
from glassgpt.data.hub_layout import (
    Subset,
    choose_subset,
    converted_subsets,
    folder_of,
    format_of,
    matches,
    name_some,
    splits_by_name,
    subsets_by_folder,
    subsets_of,
    unknown_name,
)
from glassgpt.data.source_files import SourceFile
from glassgpt.utils.errors import UserError
from glassgpt.utils.files import write_atomic
from glassgpt.utils.hub import ATTEMPTS, DatasetRepository, Download, HubFile, HubUnreachableError, find_hub_id

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
class HubDataset:
    """The files of a split at a commit. `left_out`: those in another format than most of its bytes."""

    hub_id: str
    commit: str
    subset: str | None
    split: str
    entries: Sequence[HubFile]
    left_out: Sequence[str] = ()


@dataclass(frozen=True)
class HubSource:
    """A `Source`: a split of a subset, looked up when it is first needed. `location`: `ID[:SUBSET[:SPLIT]]`."""

    location: str
    reading: ReadingConfig | None = None

    @property
    def name(self) -> str:
        return self.location.partition(":")[0].rpartition("/")[2]

    @cached_property
    def dataset(self) -> HubDataset:
        """What the hub has. Raises `UserError` if there is no such dataset, subset, split or readable file."""
        name, subset, split = (*self.location.split(":"), "", "")[:3]
        hub_id, default = HUB_NAMES.get(name, (name, None))
        return _find(hub_id, subset or default, split or "train")

    def files(self) -> list[SourceFile]:
        repository = DatasetRepository(self.dataset.hub_id, self.dataset.commit)
        downloads = [Download(repository, entry) for entry in self.dataset.entries]
        return [SourceFile(d.file.name, d.file.bytes, d.run, d.present_bytes, d.cancelled.set) for d in downloads]

    def identity(self) -> dict[str, Any]:
        """What the text depends on. Small files have git's sha1 instead of a sha256."""
        files = [asdict(entry) for entry in self.dataset.entries]
        files = [{key: value for key, value in file.items() if key != "git_sha1" or value} for file in files]
        at = {"repository": self.dataset.hub_id, "commit": self.dataset.commit}
        return {**at, "subset": self.dataset.subset, "split": self.dataset.split, "files": files}

    def is_unchanged(self, recorded: Mapping[str, Any]) -> bool:
        """Always true: a prepared dataset stays that of its commit, and needs no network."""
        return True

    @property
    def left_out(self) -> tuple[str, ...]:
        return tuple(self.dataset.left_out)


def _find(hub_id: str, subset: str | None, split: str) -> HubDataset:
    """Return the files at the hub's newest commit.

    If the hub cannot be reached, return the last result if all its files are in the cache.
    """
    key = hashlib.sha256(json.dumps([subset, split]).encode()).hexdigest()[:16]
    record = DatasetRepository(hub_id, "").cache / "glassgpt" / f"{key}.json"
    known, missing = _read_record(record), []
    if known is None:
        print(f"downloading {hub_id} from the Hugging Face Hub", file=sys.stderr)
    else:
        cached_bytes = DatasetRepository(known.hub_id, known.commit).cached_bytes
        missing = [entry.name for entry in known.entries if cached_bytes(entry) != entry.bytes]
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
        return HubDataset(**{**record, "entries": [HubFile(**entry) for entry in record["entries"]]})
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _look_up(hub_id: str, name: str | None, split: str, attempts: int) -> HubDataset:
    """The files of a subset and split; those of the hub's own conversion if nothing else can be read."""
    repository = DatasetRepository.open(hub_id, attempts=attempts)
    what = f"the dataset {repository.hub_id}"
    subsets = subsets_of(repository.metadata(), what) or subsets_by_folder(_list_files(repository))
    if not subsets:
        names = name_some(list(_list_files(repository)), 5)
        try:
            repository = DatasetRepository.open(repository.hub_id, _CONVERTED)
            subsets = converted_subsets(_list_files(repository))
        except UserError as error:
            if isinstance(error, HubUnreachableError):
                raise
        if not subsets:
            raise UserError(f"{what} has no {_READABLE}, also not in the hub's own conversion, but {names}")
        what = f"the hub's conversion of {what}"
    subset = choose_subset(subsets, name, what)
    what = f"{what}, subset {subset.name!r}," if subset.name else what
    splits = _splits_of(repository, subset, split)
    if split not in splits and f"partial-{split}" in splits:
        raise UserError(f"{what} has only the first part of the split {split!r}")
    if split not in splits:
        raise unknown_name("split", split, list(splits), what)
    return _select(repository, subset.name, split, splits[split], what)


@cache  # per commit, whose files never change
def _list_files(repository: DatasetRepository, folder: str = "", recursive: bool = True) -> dict[str, HubFile]:
    """The files in a folder by their names, sorted."""
    return {file.name: file for file in sorted(repository.files(folder, recursive), key=lambda file: file.name)}


def _splits_of(repository: DatasetRepository, subset: Subset, split: str) -> dict[str, list[HubFile]]:
    """The files of the wanted split; the other splits without files, since listing them costs requests."""
    if subset.patterns is None:
        files = _list_files(repository, subset.folder)
        return {name: [files[each] for each in names] for name, names in splits_by_name(files, subset.folder).items()}
    chosen: dict[str, HubFile] = {}  # by name: patterns may overlap
    for pattern in subset.patterns.get(split, ()):
        files = _list_files(repository, *folder_of(pattern))
        chosen |= {name: file for name, file in files.items() if matches(name, pattern) and name != "README.md"}
    return {other: list(chosen.values()) if other == split else [] for other in subset.patterns}


def _select(
    repository: DatasetRepository, subset: str | None, split: str, files: Sequence[HubFile], what: str
) -> HubDataset:
    """The files of a split in the format that most of its bytes are in."""
    sizes: Counter[str | None] = Counter()
    for file in files:
        sizes[format_of(file.name)] += file.bytes
    del sizes[None]
    if not sizes.total():
        names = name_some(sorted(file.name for file in files), 5)
        raise UserError(f"{what} has no {_READABLE} in its split {split!r}, but {names}")
    ((most, _),) = sizes.most_common(1)
    kept = {file.name: file for file in files if file.bytes and format_of(file.name) == most}
    left_out = [file.name for file in files if file.name not in kept]
    return HubDataset(repository.hub_id, repository.commit, subset, split, list(kept.values()), left_out)
