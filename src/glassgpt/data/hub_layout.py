"""Which files of a dataset's repository are its subsets and splits: told by its README's metadata, else by their names.

The rules are those that the hub documents (https://huggingface.co/docs/hub/datasets-manual-configuration and
https://huggingface.co/docs/hub/datasets-file-names-and-splits), so that a name means here what it means to `load_dataset`.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from glassgpt.utils.errors import UserError, did_you_mean

# What can be read. `.json` is how some (allenai/c4) name JSON lines.
_FORMATS = {".parquet": "parquet", ".jsonl": "jsonl", ".json": "jsonl", ".csv": "csv", ".txt": "txt"}
_COMPRESSIONS = (".gz", ".zst", ".bz2")
_NO_DATA = {"config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
"""Names of files beside the data, about it."""

_SPLIT_WORDS = {
    "train": "train|training",
    "validation": "validation|valid|dev|val",
    "test": "test|testing|eval|evaluation",
}
_SHARD = re.compile(r"data/([^/]+)-\d{5}-of-\d{5}[^/]*\.[^/]*")


@dataclass(frozen=True)
class Subset:
    """A subset (a «configuration»). `patterns`: of each split; None: the names below `folder` tell."""

    name: str
    default: bool = False
    folder: str = ""
    patterns: Mapping[str, tuple[str, ...]] | None = None


def format_of(name: str) -> str | None:
    """`parquet`, `jsonl`, `csv` or `txt` by a file's suffixes, those of a compression aside; None for anything else."""
    base = name.rpartition("/")[2].lower()
    for compression in _COMPRESSIONS:
        base = base.removesuffix(compression)
    return None if base in _NO_DATA else _FORMATS.get(f".{base.rpartition('.')[2]}" if "." in base else "")


# ------------------------------------------------------------------------------------------------------------- metadata


def subsets_of(metadata: Mapping[str, Any], what: str) -> list[Subset]:
    """The subsets that a README's metadata names: none without `configs`. Raises `UserError` for forms that are not documented."""
    configs = metadata.get("configs") or []
    if not isinstance(configs, list):
        raise UserError(f"the metadata in the README.md of {what} cannot be understood: configs is no list")
    return [_subset(config, what) for config in configs]


def _subset(config: Any, what: str) -> Subset:
    if not isinstance(config, Mapping) or "config_name" not in config:
        raise UserError(f"the metadata in the README.md of {what} cannot be understood: a config without config_name")
    name, folder = str(config["config_name"]), _relative(str(config.get("data_dir") or ""), what)
    data_files = config.get("data_files")
    patterns = None if data_files is None else _patterns(data_files, folder, f"{what}, subset {name!r}")
    return Subset(name, bool(config.get("default")), folder, patterns)


def _patterns(data_files: Any, folder: str, what: str) -> dict[str, tuple[str, ...]]:
    """The patterns of each split, whichever way they are written: a path, paths, paths by split, or `split` and `path` pairs."""
    by_split: dict[str, Any]
    if isinstance(data_files, Mapping):
        by_split = {str(split): paths for split, paths in data_files.items()}
    elif isinstance(data_files, list) and data_files and all(isinstance(item, Mapping) for item in data_files):
        if any("split" not in item or "path" not in item for item in data_files):
            raise UserError(
                f"the metadata in the README.md of {what} cannot be understood: data_files without split or path"
            )
        by_split = {str(item["split"]): item["path"] for item in data_files}
    else:
        by_split = {"train": data_files}
    found = {}
    for split, paths in by_split.items():
        listed = [paths] if isinstance(paths, str) else paths
        if not isinstance(listed, list) or not listed or not all(isinstance(path, str) for path in listed):
            raise UserError(
                f"the metadata in the README.md of {what} cannot be understood: the data_files of split {split!r}"
            )
        found[split] = tuple("/".join(filter(None, (folder, _relative(path, what)))) for path in listed)
    return found


def _relative(path: str, what: str) -> str:
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if "://" in path or ".." in parts:
        raise UserError(f"{what} names files outside its repository ({path}); only those in it can be had")
    return "/".join(parts)


def choose_subset(subsets: Sequence[Subset], name: str | None, what: str) -> Subset:
    """The subset of that name; without a name the default one, or the only one. Raises `UserError` with those that there are."""
    named = {subset.name: subset for subset in subsets}
    if name is not None:
        if name in named:
            return named[name]
        raise UserError(f"{what} has no subset {name!r}, only {listing(named)}{did_you_mean(name, named)}")
    defaults = [subset for subset in subsets if subset.default] or [named[key] for key in ("default",) if key in named]
    if defaults or len(subsets) == 1:
        return (defaults or list(subsets))[0]
    raise UserError(f"{what} has several subsets and no default: name one of {listing(named)}")


def unknown_split(split: str, splits: Iterable[str], what: str) -> UserError:
    """The error for a split that is not there."""
    known = list(splits)
    return UserError(f"{what} has no split {split!r}, only {listing(known)}{did_you_mean(split, known)}")


def listing(names: Iterable[str], limit: int = 20) -> str:
    """Names for a message, the first ones of many."""
    known = list(names)
    more = f" and {len(known) - limit} more" if len(known) > limit else ""
    return f"{', '.join(known[:limit])}{more}" or "none"


# ---------------------------------------------------------------------------------------------------------------- names


def matches(name: str, pattern: str) -> bool:
    """Whether a pattern names a file: `*`, `?` and `[...]` within a part of its path, `**` for any number of parts.

    What is hidden (its name, or a folder's, begins with `.` or `__`) is meant only where the pattern says so too.
    """
    parts, wanted = name.split("/"), pattern.split("/")
    hidden = [part for part in parts if part.startswith((".", "__"))]
    return len(hidden) == sum(part.startswith((".", "__")) for part in wanted) and _parts_match(parts, wanted)


def _parts_match(parts: Sequence[str], wanted: Sequence[str]) -> bool:
    if not wanted:
        return not parts
    if wanted[0] == "**":
        rest = wanted[1:] or ["*"]  # a last `**` means every file below
        return any(_parts_match(parts[skip:], rest) for skip in range(len(parts)))
    return bool(parts) and fnmatchcase(parts[0], wanted[0]) and _parts_match(parts[1:], wanted[1:])


def place_of(pattern: str) -> tuple[str, bool]:
    """The folder that holds all a pattern can match, and whether folders below it have to be looked at too."""
    *folders, _ = parts = pattern.split("/")
    fixed = next((i for i, part in enumerate(folders) if re.search(r"[*?[]", part)), len(folders))
    return "/".join(folders[:fixed]), fixed < len(folders) or parts[-1] == "**"


def splits_by_name(names: Iterable[str], folder: str = "") -> dict[str, list[str]]:
    """The files of each split, where only their names tell: of those below `folder` that can be read and are not hidden.

    The first of these rules that finds any: `data/SPLIT-00000-of-00009.*`; a folder named after a split; a file named so; all
    is for training.
    """
    prefix = f"{folder}/" if folder else ""
    below = [
        name
        for name in sorted(names)
        if name.startswith(prefix) and format_of(name) and matches(name[len(prefix) :], "**")
    ]
    shards: dict[str, list[str]] = {}
    for name in below:
        if match := _SHARD.fullmatch(name[len(prefix) :]):
            shards.setdefault(match[1], []).append(name)
    if shards:
        return shards
    for telling in (slice(None, -1), slice(-1, None)):  # the folders, then the file itself
        found = {
            split: [name for name in below if _says(name[len(prefix) :].split("/")[telling], words)]
            for split, words in _SPLIT_WORDS.items()
        }
        if any(found.values()):
            return {split: chosen for split, chosen in found.items() if chosen}
    return {"train": below} if below else {}


def _says(parts: Iterable[str], words: str) -> bool:
    """Whether one of the words stands in a name, delimited by what is no letter."""
    return any(re.search(rf"(?:^|[-._ 0-9])(?:{words})(?:[-._ 0-9]|$)", part) for part in parts)
