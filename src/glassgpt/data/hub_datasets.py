"""Datasets of the Hugging Face hub as lists of files: those of a subset and split at one commit, each downloaded when it is wanted.

The files come by `download` (resumed after a kill, repeated, verified by the hash that the hub lists) into the hub library's own
cache, where that library, and whatever builds on it, finds them too when it is asked for the same commit (what a branch stands for
is not written there). `HF_ENDPOINT`, `HF_HOME`, `HF_TOKEN`, `HF_HUB_OFFLINE`, `HF_HUB_DOWNLOAD_TIMEOUT` and the usual proxy
variables count.
"""

import hashlib
import json
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from glassgpt.data.hub_layout import (
    Subset,
    choose_subset,
    format_of,
    listing,
    matches,
    place_of,
    splits_by_name,
    subsets_of,
    unknown_split,
)
from glassgpt.data.source_files import SourceFile
from glassgpt.utils.download import DownloadError, download, partial_path
from glassgpt.utils.errors import UserError
from glassgpt.utils.files import explain_os_errors, sha256_of, write_atomic
from glassgpt.utils.hub import (
    DatasetRepository,
    HubFile,
    HubUnreachableError,
    dataset_cache,
    dataset_repository,
    gated,
    is_offline,
)

# Where the hub keeps its own conversion of datasets that are in other formats, as SUBSET/SPLIT/NUMBER.parquet.
_CONVERTED = "refs/convert/parquet"
# Seconds before a failed download is tried again: `download` doubles them.
_PAUSE = 1.0


@dataclass(frozen=True)
class HubDataset:
    """A split of a subset of a dataset, at a commit. `left_out`: its files in another format than most of its bytes are in."""

    hub_id: str
    commit: str
    subset: str | None
    split: str
    entries: tuple[HubFile, ...]
    left_out: tuple[str, ...] = ()

    def files(self) -> list[SourceFile]:
        """Its files, in the order of their names (or of the metadata's paths)."""
        return [_source_file(_Fetch(self, entry, threading.Event())) for entry in self.entries]

    def identity(self) -> dict[str, Any]:
        """What the text depends on, as JSON; small files are known by git's sha1 of them, and no sha256."""
        files = [
            {key: value for key, value in asdict(entry).items() if key != "git_sha1" or value} for entry in self.entries
        ]
        return {
            "repository": self.hub_id,
            "commit": self.commit,
            "subset": self.subset,
            "split": self.split,
            "files": files,
        }


def find_dataset(hub_id: str, subset: str | None = None, split: str = "train") -> HubDataset:
    """The files of a dataset's split at the hub's newest commit.

    `subset` None is the default one. Without network it is what was found last, where all its files are in the cache. Raises
    `UserError` where the dataset, its subset or split is not there, where none of its files can be read, or without network.
    """
    known = _recall(hub_id, subset, split)
    try:
        repository = dataset_repository(hub_id, patient=known is None or bool(_missing(known)))
        found = _look_up(repository, subset, split)
    except HubUnreachableError as error:
        return _from_cache(known, error, hub_id)
    with suppress(UserError):  # a cache that cannot be written to may still be read
        _remember(hub_id, subset, split, found)
    return found


def git_sha1_of(path: Path) -> str:
    """The name that git gives to a file's content."""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


# -------------------------------------------------------------------------------------------------------------- finding


def _look_up(repository: DatasetRepository, name: str | None, split: str) -> HubDataset:
    """The files of a subset and split; those of the hub's conversion, where nothing else can be read."""
    hub_id = repository.hub_id
    subsets = subsets_of(repository.metadata(), hub_id)
    if subsets:
        subset = choose_subset(subsets, name, f"the dataset {hub_id}")
        splits = _splits_of(repository, subset, split)
        return _dataset(repository, subset.name, split, splits, f"the dataset {hub_id}, subset {subset.name!r},")
    files = repository.files()
    if not any(format_of(file.name) for file in files):
        nothing = UserError(f"the dataset {hub_id} has no {_READABLE}, nor has the hub converted it: {_sample(files)}")
        return _converted(hub_id, name, split, nothing)
    by_name = {file.name: file for file in files}
    if name is not None and not splits_by_name(by_name, name):
        folders = {file.name.partition("/")[0] for file in files if "/" in file.name and format_of(file.name)}
        raise UserError(
            f"the dataset {hub_id} has no metadata of subsets, and no folder {name!r} with data, only {listing(sorted(folders))}"
        )
    splits = {key: [by_name[each] for each in names] for key, names in splits_by_name(by_name, name or "").items()}
    return _dataset(repository, name, split, splits, f"the dataset {hub_id}")


def _splits_of(repository: DatasetRepository, subset: Subset, split: str) -> dict[str, list[HubFile]]:
    """The files of the wanted split; the other splits by their names alone, since to list them costs requests."""
    if subset.patterns is None:
        by_name = {file.name: file for file in repository.files(subset.folder)}
        return {key: [by_name[name] for name in names] for key, names in splits_by_name(by_name, subset.folder).items()}
    wanted: dict[str, HubFile] = {}  # by name: patterns may overlap
    listed: dict[tuple[str, bool], list[HubFile]] = {}
    for pattern in subset.patterns.get(split, ()):
        place = place_of(pattern)
        if place not in listed:
            listed[place] = sorted(repository.files(*place), key=lambda file: file.name)
        found = [file for file in listed[place] if matches(file.name, pattern) and file.name != "README.md"]
        wanted |= {file.name: file for file in found}
    return {other: list(wanted.values()) if other == split else [] for other in subset.patterns}


def _dataset(
    repository: DatasetRepository, subset: str | None, split: str, splits: Mapping[str, list[HubFile]], what: str
) -> HubDataset:
    if split not in splits:
        raise unknown_split(split, splits, what)
    files = [file for file in splits[split] if file.bytes]
    sizes: Counter[str] = Counter()
    for file in files:
        if found := format_of(file.name):
            sizes[found] += file.bytes
    if not sizes:
        raise UserError(f"{what} has no {_READABLE} in its split {split!r}: {_sample(splits[split])}")
    chosen = max(sizes, key=lambda each: sizes[each])
    kept = {file.name: file for file in files if format_of(file.name) == chosen}
    left_out = tuple(file.name for file in splits[split] if file.name not in kept)
    return HubDataset(repository.hub_id, repository.commit, subset, split, tuple(kept.values()), left_out)


_READABLE = ".parquet, .jsonl, .csv or .txt file (plain, .gz, .zst or .bz2)"


def _sample(files: Iterable[HubFile]) -> str:
    return f"it holds {listing(sorted(file.name for file in files), 5)}"


def _converted(hub_id: str, name: str | None, split: str, nothing: UserError) -> HubDataset:
    """The hub's own conversion, where there is one, and all of it. Raises `nothing` where there is none."""
    try:
        repository = dataset_repository(hub_id, _CONVERTED)
    except HubUnreachableError:
        raise
    except UserError:
        raise nothing from None
    folders: dict[str, dict[str, list[HubFile]]] = {}
    for file in sorted(repository.files(), key=lambda file: file.name):
        parts = file.name.split("/")
        if len(parts) == 3 and format_of(file.name) == "parquet":
            folders.setdefault(parts[0], {}).setdefault(parts[1], []).append(file)
    if not folders:
        raise nothing
    subset = choose_subset(
        [Subset(folder) for folder in folders], name, f"the hub's conversion of the dataset {hub_id}"
    ).name
    what = f"the hub's conversion of the dataset {hub_id}, subset {subset!r},"
    if f"partial-{split}" in folders[subset]:
        raise UserError(
            f"{what} holds only the first part of the split {split!r}, and the dataset itself cannot be read"
        )
    return _dataset(repository, subset, split, folders[subset], what)


# -------------------------------------------------------------------------------------------------------------- fetching


@dataclass(frozen=True)
class _Fetch:
    """One file on its way. Its blob is named by its hash, as the hub's library does it."""

    dataset: HubDataset
    entry: HubFile
    stop: threading.Event

    @property
    def blob(self) -> Path:
        return dataset_cache(self.dataset.hub_id) / "blobs" / _hash(self.entry)

    @property
    def link(self) -> Path:
        return _link(self.dataset, self.entry)

    def present(self) -> int:
        """How many bytes of it have come."""
        for path in (self.link, self.blob, partial_path(self.blob)):
            with suppress(OSError):
                return path.stat().st_size
        return 0

    def fetch(self) -> Path:
        """The verified file in the cache, downloaded where it is not there or damaged."""
        if self._is_right(self.link):
            return self.link
        if is_offline() and not self._is_right(self.blob):
            where = f"{self.entry.name} of the dataset {self.dataset.hub_id}"
            raise UserError(
                f"{where} is not in the cache, or damaged there, and HF_HUB_OFFLINE is set. {_manual(self.dataset.hub_id)}"
            )
        with explain_os_errors("write", self.link):
            self._download()
            self.link.parent.mkdir(parents=True, exist_ok=True)
            # Another process may link the same file just now: to the same content.
            partial = self.link.with_name(f".{self.link.name}.{os.getpid()}-{threading.get_ident()}")
            try:
                partial.symlink_to(os.path.relpath(self.blob, self.link.parent))
                os.replace(partial, self.link)
            except OSError:  # a file system without links, where the library too moves the file
                os.replace(self.blob, self.link)
        return self.link

    def _is_right(self, path: Path) -> bool:
        right_size = path.is_file() and path.stat().st_size == self.entry.bytes
        return right_size and _hash_of(self.entry)(path) == _hash(self.entry)

    def _download(self) -> None:
        repository, name = DatasetRepository(self.dataset.hub_id, self.dataset.commit), self.entry.name
        url, headers, timeout = repository.request(name)
        try:
            download(
                url,
                self.blob,
                _hash(self.entry),
                f"{name} of the dataset {repository.hub_id}",
                f"What has come is kept for the next attempt. {_manual(repository.hub_id)}",
                size=self.entry.bytes,
                hash_of=_hash_of(self.entry),
                headers=headers,
                stop=self.stop,
                pause=_PAUSE,
                timeout=timeout,
            )
        except DownloadError as error:
            if error.status in (401, 403):
                raise UserError(f"cannot download {name}: {gated(repository.hub_id)}") from None
            raise


def _manual(hub_id: str) -> str:
    """How to go on without network."""
    return f"Without network: `hf download --repo-type dataset {hub_id} --local-dir DIR` on another machine, and name that folder instead"


def _source_file(fetch: _Fetch) -> SourceFile:
    entry = fetch.entry
    return SourceFile(entry.name, entry.bytes, fetch.fetch, present=fetch.present, cancel=fetch.stop.set)


def _hash(entry: HubFile) -> str:
    found = entry.sha256 or entry.git_sha1
    assert found is not None
    return found


def _hash_of(entry: HubFile) -> Callable[[Path], str]:
    return sha256_of if entry.sha256 else git_sha1_of


def _link(dataset: HubDataset, entry: HubFile) -> Path:
    return dataset_cache(dataset.hub_id) / "snapshots" / dataset.commit / entry.name


# ------------------------------------------------------------------------------------------------------ without network


def _record(hub_id: str, subset: str | None, split: str) -> Path:
    """Where it is kept what was found for a subset and split."""
    key = hashlib.sha256(json.dumps([subset, split]).encode()).hexdigest()[:16]
    return dataset_cache(hub_id) / "glassgpt" / f"{key}.json"


def _remember(hub_id: str, subset: str | None, split: str, found: HubDataset) -> None:
    path = _record(hub_id, subset, split)
    with explain_os_errors("write", path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(asdict(found), indent=1) + "\n")


def _recall(hub_id: str, subset: str | None, split: str) -> HubDataset | None:
    """What was found the last time, where that is known and can be read."""
    try:
        record = json.loads(_record(hub_id, subset, split).read_text(encoding="utf-8"))
        entries = tuple(HubFile(**entry) for entry in record.pop("entries"))
        return HubDataset(**{**record, "left_out": tuple(record["left_out"])}, entries=entries)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _from_cache(known: HubDataset | None, error: HubUnreachableError, hub_id: str) -> HubDataset:
    """The dataset as it was found last, if all of it is there."""
    if known is None:
        raise UserError(f"{error}.\n{_manual(hub_id)}") from None
    missing = _missing(known)
    if missing:
        here = f"{len(missing)} of its {len(known.entries)} files are not in the cache ({listing(missing, 2)})"
        raise UserError(f"{error}, and {here}.\n{_manual(hub_id)}") from None
    return known


def _missing(dataset: HubDataset) -> list[str]:
    """The files that are not in the cache, whole by their size."""
    links = [(_link(dataset, entry), entry) for entry in dataset.entries]
    return [entry.name for link, entry in links if not link.is_file() or link.stat().st_size != entry.bytes]
