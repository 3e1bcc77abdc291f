"""Datasets of the Hugging Face Hub: the files of a subset and split at one commit, downloaded when they are needed.

Which files belong to a subset and split follows from the metadata in README.md, or from names. The rules are documented
at https://huggingface.co/docs/hub/datasets-manual-configuration and
https://huggingface.co/docs/hub/datasets-file-names-and-splits, so a name means here what it means to
`datasets.load_dataset`.
"""

import glob
import hashlib
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import PurePosixPath
from typing import Any

from glassgpt.config.schema import ReadingConfig
from glassgpt.data.folders import is_below
from glassgpt.data.source_files import SourceFile
from glassgpt.data.text_files import compression_of
from glassgpt.utils.errors import UserError, did_you_mean
from glassgpt.utils.files import write_atomic
from glassgpt.utils.hub import ATTEMPTS, DatasetRepository, HubFile, HubUnreachableError, find_hub_id, list_files

HUB_NAMES: Mapping[str, tuple[str, str | None]] = {
    "fineweb-edu": ("HuggingFaceFW/fineweb-edu", "sample-10BT"),
    "openwebtext": ("Skylion007/openwebtext", None),
    "tinystories": ("roneneldan/TinyStories", None),
}
"""Registered names: the hub's id, and the default subset."""

# Where the hub keeps its own conversion of datasets that are in other formats, as SUBSET/SPLIT/NUMBER.parquet.
_CONVERTED = "refs/convert/parquet"
# What can be read. `.json` is how some (allenai/c4) name JSON lines.
_FORMATS = {".parquet": "parquet", ".jsonl": "jsonl", ".json": "jsonl", ".csv": "csv", ".txt": "txt"}
_READABLE = ".parquet, .jsonl, .csv or .txt file (plain, .gz, .zst or .bz2)"
_NO_DATA = {"config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
_SHARD = re.compile(r"^data/([^/]+)-\d{5}-of-\d{5}[^/]*\.[^/]*$")
_SPLIT_WORDS = {
    "train": {"train", "training"},
    "validation": {"validation", "valid", "dev", "val"},
    "test": {"test", "testing", "eval", "evaluation"},
}


def hub_location(source: str) -> str | None:
    """Return `NAME[:SUBSET[:SPLIT]]` without a leading `hf:` if a source names a dataset of the hub, otherwise None."""
    location = source.removeprefix("hf:")
    name, _, rest = location.partition(":")
    is_hub = name in HUB_NAMES or ("/" in name and find_hub_id(source.removesuffix(location) + name) is not None)
    return location if is_hub and rest.count(":") <= 1 else None


@dataclass(frozen=True)
class HubDataset(DatasetRepository):
    """A repository with the files of a split. `left_out`: those in another format than most of its bytes."""

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
        """The files of the split. Raises `UserError` if there is no such dataset, subset, split or readable file."""
        name, subset, split = (*self.location.split(":"), "", "")[:3]
        hub_id, default = HUB_NAMES.get(name, (name, None))
        return _find(hub_id, subset or default, split or "train")

    def files(self) -> list[SourceFile]:
        dataset = self.dataset
        return [
            SourceFile(file.name, file.bytes, partial(dataset.download, file), dataset.missing_bytes(file))
            for file in dataset.entries
        ]

    def identity(self) -> dict[str, Any]:
        """What the text depends on. Small files have git's sha1 instead of a sha256."""
        dataset = self.dataset
        files = [asdict(entry) for entry in dataset.entries]
        files = [{key: value for key, value in file.items() if key != "git_sha1" or value} for file in files]
        at = {"repository": dataset.hub_id, "commit": dataset.commit}
        return {**at, "subset": dataset.subset, "split": dataset.split, "files": files}

    def is_unchanged(self, recorded: Mapping[str, Any]) -> bool:
        """Always true: a prepared dataset stays that of its commit, and needs no network."""
        return True

    @property
    def left_out(self) -> tuple[str, ...]:
        return tuple(self.dataset.left_out)


def _find(hub_id: str, subset: str | None, split: str) -> HubDataset:
    """The files at the hub's newest commit. If the hub cannot be reached, the last result if its files are cached."""
    key = hashlib.sha256(json.dumps([subset, split]).encode()).hexdigest()[:16]
    record = DatasetRepository(hub_id, "").cache / "glassgpt" / f"{key}.json"
    known = None
    with suppress(OSError, ValueError, KeyError, TypeError):  # if an earlier call left a valid record
        saved = json.loads(record.read_text(encoding="utf-8"))
        known = HubDataset(**{**saved, "entries": [HubFile(**entry) for entry in saved["entries"]]})
    missing = [file.name for file in known.entries if known.missing_bytes(file)] if known else []
    if known is None:
        print(f"downloading {hub_id} from the Hugging Face Hub", file=sys.stderr)
    try:
        dataset = _look_up(hub_id, subset, split, attempts=ATTEMPTS if known is None or missing else 1)
    except HubUnreachableError as error:
        if known is None:
            raise
        if not missing:
            return known
        cached = f"{len(missing)} of its {len(known.entries)} files are not in the cache ({_name_some(missing, 2)})"
        raise UserError(f"{error}\n{cached}") from None
    with suppress(OSError, UserError):  # a cache that cannot be written to may still be read
        record.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(record, json.dumps(asdict(dataset), indent=1) + "\n")
    return dataset


def _look_up(hub_id: str, name: str | None, split: str, attempts: int) -> HubDataset:
    """The files of a subset and split; those of the hub's own conversion if nothing else can be read."""
    repository = DatasetRepository.open(hub_id, attempts=attempts)
    what = f"the dataset {repository.hub_id}"
    subsets = subsets_of(repository.metadata(), what) or _subsets_by_folder(list_files(repository))
    if not subsets:
        names = _name_some(list(list_files(repository)), 5)
        try:
            repository = DatasetRepository.open(repository.hub_id, _CONVERTED)
            subsets = _converted_subsets(list_files(repository))
        except UserError as error:
            if isinstance(error, HubUnreachableError):
                raise
        if not subsets:
            raise UserError(f"{what} has no {_READABLE}, also not in the hub's own conversion, but {names}")
        what = f"the hub's conversion of {what}"
    subset = choose_subset(subsets, name, what)
    what = f"{what}, subset {subset.name!r}," if subset.name else what
    splits = _splits_of(repository, subset, split)
    if split not in splits and f"partial-{split}" in splits:  # the hub converts only the beginning of large datasets
        raise UserError(f"{what} has only the first part of the split {split!r}")
    if split not in splits:
        raise UserError(f"{what} has no split {split!r}, only {_name_some(list(splits))}{did_you_mean(split, splits)}")
    files = splits[split]
    sizes: Counter[str | None] = Counter()
    for file in files:
        sizes[format_of(file.name)] += file.bytes
    del sizes[None]
    if not sizes.total():
        names = _name_some(sorted(file.name for file in files), 5)
        raise UserError(f"{what} has no {_READABLE} in its split {split!r}, but {names}")
    ((most, _),) = sizes.most_common(1)
    kept = {file.name: file for file in files if file.bytes and format_of(file.name) == most}
    left_out = [file.name for file in files if file.name not in kept]
    return HubDataset(repository.hub_id, repository.commit, subset.name, split, list(kept.values()), left_out)


def _name_some(names: Sequence[str], limit: int = 20) -> str:
    """The first names of a list for a message."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return f"{', '.join(names[:limit])}{more}" or "none"


@dataclass(frozen=True)
class Subset:
    """A subset, or configuration: `patterns` of each split, or None if the names below `folder` give the splits."""

    name: str | None  # None for a whole repository without metadata
    default: bool = False
    folder: str = ""
    patterns: Mapping[str, Sequence[str]] | None = None


def subsets_of(metadata: Mapping[str, Any], what: str) -> list[Subset]:
    """Return the subsets in a README's metadata. Raises `UserError` for undocumented forms."""
    try:
        return [_subset(config) for config in metadata.get("configs") or []]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"the metadata in README.md of {what} is not valid: configs ({error})") from None


def _subset(config: Mapping[str, Any]) -> Subset:
    """Parse one config; any exception means that it has no documented form."""
    name, default, folder = str(config["config_name"]), bool(config.get("default")), config.get("data_dir") or ""
    match config.get("data_files"):
        case None:
            return Subset(name, default, _relative(folder))
        case dict(by_split):
            pass
        case [dict(), *_] as items:
            by_split = {item["split"]: item["path"] for item in items}
        case paths:
            by_split = {"train": paths}
    patterns = {}
    for split, paths in by_split.items():
        paths = [paths] if isinstance(paths, str) else paths
        if not isinstance(paths, list) or not paths:
            raise ValueError(f"data_files of split {split!r}")
        patterns[str(split)] = tuple(_relative(f"{folder}/{_relative(path)}") for path in paths)
    return Subset(name, default, patterns=patterns)


def _relative(path: str) -> str:
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if "://" in path or ".." in parts:
        raise ValueError(f"{path} is outside the repository, and is not downloaded")
    return "/".join(parts)


def _subsets_by_folder(names: Iterable[str]) -> list[Subset]:
    """The subsets without metadata: all files, and those of each folder; none if no file can be read."""
    folders = {str(folder) for name in names if format_of(name) for folder in PurePosixPath(name).parents}
    return [Subset(None, True) if folder == "." else Subset(folder, folder=folder) for folder in sorted(folders)]


def _converted_subsets(names: Iterable[str]) -> list[Subset]:
    """The subsets of the hub's own conversion."""
    patterns: dict[str, dict[str, list[str]]] = {}
    for name in sorted(names):
        if matches(name, "*/*/*.parquet"):
            subset, split, _ = name.split("/")
            patterns.setdefault(subset, {})[split] = [f"{glob.escape(f'{subset}/{split}')}/*.parquet"]
    return [Subset(name, patterns=by_split) for name, by_split in patterns.items()]


def choose_subset(subsets: Sequence[Subset], name: str | None, what: str) -> Subset:
    """Return the subset of that name; without one, the default or only one. Raises `UserError` if there is none."""
    by_name = {subset.name: subset for subset in subsets}
    names = [known for known in by_name if known is not None]
    if name in by_name:
        return by_name[name]
    if name is not None:
        raise UserError(f"{what} has no subset {name!r}, only {_name_some(names)}{did_you_mean(name, names)}")
    default = next((subset for subset in subsets if subset.default), by_name.get("default"))
    if default is None and len(by_name) > 1:
        raise UserError(f"{what} has several subsets and no default; name one of {_name_some(names)}")
    return default or subsets[0]


def _splits_of(repository: DatasetRepository, subset: Subset, split: str) -> dict[str, list[HubFile]]:
    """The files of the wanted split; the other splits without files, since listing them costs requests."""
    if subset.patterns is None:
        files = list_files(repository, subset.folder)
        return {name: [files[each] for each in names] for name, names in splits_by_name(files, subset.folder).items()}
    chosen: dict[str, HubFile] = {}  # by name: patterns may overlap
    for pattern in subset.patterns.get(split, ()):
        files = list_files(repository, *folder_of(pattern))
        chosen |= {name: file for name, file in files.items() if matches(name, pattern) and name != "README.md"}
    return {other: list(chosen.values()) if other == split else [] for other in subset.patterns}


def splits_by_name(names: Iterable[str], folder: str = "") -> dict[str, list[str]]:
    """Return the files of each split, of those below `folder` that can be read and are not hidden."""
    prefix = f"{folder}/" if folder else ""
    inside = (name.removeprefix(prefix) for name in sorted(names) if name.startswith(prefix))
    below = [name for name in inside if format_of(name) and matches(name, "**")]
    # The first rule that finds any split holds.
    rules: tuple[Callable[[str], list[str]], ...] = (
        _SHARD.findall,
        lambda name: _splits_in(name.rpartition("/")[0]),  # a folder named after a split
        lambda name: _splits_in(name.rpartition("/")[2]),  # a file named after one
        lambda name: ["train"],
    )
    splits: dict[str, list[str]] = {}
    for rule in rules:
        for name in below:
            for split in rule(name):
                splits.setdefault(split, []).append(prefix + name)
        if splits:
            break
    return splits


def _splits_in(text: str) -> list[str]:
    """The splits whose words stand in a path."""
    return [split for split, words in _SPLIT_WORDS.items() if words.intersection(re.split(r"[-._ 0-9/]", text))]


def format_of(name: str) -> str | None:
    """Return `parquet`, `jsonl`, `csv` or `txt` by a file's suffix before .gz, .zst or .bz2, None for others."""
    plain = PurePosixPath(name.lower().removesuffix(compression_of(name)))
    return _FORMATS.get(plain.suffix) if plain.name not in _NO_DATA else None


def matches(name: str, pattern: str) -> bool:
    """Whether a pattern matches a file's path; names that begin with `__` are hidden, too."""
    return is_below(name, pattern, hidden=(".", "__"))


def folder_of(pattern: str) -> tuple[str, bool]:
    """Return the folder that has all files a pattern can match, and whether they can be in folders below it."""
    *folders, last = pattern.split("/")
    fixed = next((i for i, part in enumerate(folders) if re.search(r"[*?[]", part)), len(folders))
    return "/".join(folders[:fixed]), fixed < len(folders) or last == "**"
