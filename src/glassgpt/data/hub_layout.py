"""Which files of a dataset's repository belong to a subset and split: by the metadata in README.md, or by names.

The rules are documented at https://huggingface.co/docs/hub/datasets-manual-configuration and
https://huggingface.co/docs/hub/datasets-file-names-and-splits, so a name means here what it means to
`datasets.load_dataset`.
"""

import glob
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import PurePosixPath
from typing import Any

from glassgpt.utils.errors import UserError, did_you_mean

# What can be read. `.json` is how some (allenai/c4) name JSON lines.
_FORMATS = {"parquet": "parquet", "jsonl": "jsonl", "json": "jsonl", "csv": "csv", "txt": "txt"}
_NO_DATA = {"config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
_SPLIT_WORDS = {
    split: re.compile(rf"(?:^|[-._ 0-9/])(?:{words})(?:[-._ 0-9/]|$)")
    for split, words in {
        "train": "train|training",
        "validation": "validation|valid|dev|val",
        "test": "test|testing|eval|evaluation",
    }.items()
}
_SHARD = re.compile(r"^data/([^/]+)-\d{5}-of-\d{5}[^/]*\.[^/]*$")


@dataclass(frozen=True)
class Subset:
    """A subset, or configuration: `patterns` of each split, or None if the names below `folder` give the splits.

    The name None is of a whole repository without metadata.
    """

    name: str | None
    default: bool = False
    folder: str = ""
    patterns: Mapping[str, tuple[str, ...]] | None = None


def format_of(name: str) -> str | None:
    """Return `parquet`, `jsonl`, `csv` or `txt` by a file's suffix before .gz, .zst or .bz2, None for others."""
    base = re.sub(r"\.(gz|zst|bz2)$", "", name.rpartition("/")[2].lower())
    _, dot, suffix = base.rpartition(".")
    return _FORMATS.get(suffix) if dot and base not in _NO_DATA else None


def subsets_of(metadata: Mapping[str, Any], what: str) -> list[Subset]:
    """Return the subsets in a README's metadata, none without `configs`. Raises `UserError` for undocumented forms."""
    try:
        return [_subset(config) for config in metadata.get("configs") or []]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"the metadata in README.md of {what} is not valid: configs ({error})") from None


def _subset(config: Mapping[str, Any]) -> Subset:
    """Parse one config; any exception means that it has no documented form."""
    subset = Subset(str(config["config_name"]), bool(config.get("default")), _relative(config.get("data_dir") or ""))
    match config.get("data_files"):
        case None:
            return subset
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
        patterns[str(split)] = tuple(_relative(f"{subset.folder}/{_relative(path)}") for path in paths)
    return replace(subset, patterns=patterns)


def _relative(path: str) -> str:
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if "://" in path or ".." in parts:
        raise ValueError(f"{path} is outside the repository, and is not downloaded")
    return "/".join(parts)


def subsets_by_folder(names: Iterable[str]) -> list[Subset]:
    """Return the subsets without metadata: all files, and those of each folder; none if no file can be read."""
    folders = {str(folder) for name in names if format_of(name) for folder in PurePosixPath(name).parents}
    return [Subset(None, True) if folder == "." else Subset(folder, folder=folder) for folder in sorted(folders)]


def converted_subsets(names: Iterable[str]) -> list[Subset]:
    """Return the subsets of the hub's own conversion, whose files are SUBSET/SPLIT/NUMBER.parquet."""
    patterns: dict[str, dict[str, tuple[str, ...]]] = {}
    for name in sorted(names):
        if matches(name, "*/*/*.parquet"):
            subset, split, _ = name.split("/")
            patterns.setdefault(subset, {})[split] = (f"{glob.escape(f'{subset}/{split}')}/*.parquet",)
    return [Subset(name, patterns=by_split) for name, by_split in patterns.items()]


def choose_subset(subsets: Sequence[Subset], name: str | None, what: str) -> Subset:
    """Return the subset of that name; without one, the default or only one. Raises `UserError` if there is none."""
    by_name = {subset.name: subset for subset in subsets}
    names = [known for known in by_name if known is not None]
    if name is not None and name not in by_name:
        raise unknown_name("subset", name, names, what)
    if name is not None or len(by_name) == 1:
        return by_name.get(name, subsets[0])
    default = next((subset for subset in subsets if subset.default), by_name.get("default"))
    if default is None:
        raise UserError(f"{what} has several subsets and no default; name one of {name_some(names)}")
    return default


def unknown_name(kind: str, name: str, known: Sequence[str], what: str) -> UserError:
    """Return the error for a subset or split that does not exist."""
    return UserError(f"{what} has no {kind} {name!r}, only {name_some(known)}{did_you_mean(name, known)}")


def name_some(names: Sequence[str], limit: int = 20) -> str:
    """Join the first names of a list for a message."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return f"{', '.join(names[:limit])}{more}" or "none"


def matches(name: str, pattern: str) -> bool:
    """Whether a pattern matches a file's path: `*`, `?` and `[...]` within a part, `**` for any number of parts.

    Hidden parts (beginning with `.` or `__`) match only a pattern that has as many.
    """
    parts, wanted = name.split("/"), pattern.split("/")
    hidden = [sum(part.startswith((".", "__")) for part in each) for each in (parts, wanted)]
    return hidden[0] == hidden[1] and _parts_match(parts, wanted)


def _parts_match(parts: Sequence[str], wanted: Sequence[str]) -> bool:
    if not wanted:
        return not parts
    if wanted[0] == "**":
        rest = wanted[1:] or ["*"]  # a last `**` means every file below
        return any(_parts_match(parts[skip:], rest) for skip in range(len(parts)))
    return bool(parts) and fnmatchcase(parts[0], wanted[0]) and _parts_match(parts[1:], wanted[1:])


def folder_of(pattern: str) -> tuple[str, bool]:
    """Return the folder that has all files a pattern can match, and whether they can be in folders below it."""
    *folders, last = pattern.split("/")
    fixed = next((i for i, part in enumerate(folders) if re.search(r"[*?[]", part)), len(folders))
    return "/".join(folders[:fixed]), fixed < len(folders) or last == "**"


def splits_by_name(names: Iterable[str], folder: str = "") -> dict[str, list[str]]:
    """Return the files of each split by their names, of those below `folder` that can be read and are not hidden.

    The first rule that finds any: `data/SPLIT-00000-of-00009.*`; a folder named after a split; a file named after one;
    all is for training.
    """
    prefix = f"{folder}/" if folder else ""
    inside = (name.removeprefix(prefix) for name in sorted(names) if name.startswith(prefix))
    below = [name for name in inside if format_of(name) and matches(name, "**")]
    rules: tuple[Callable[[str], list[str]], ...] = (
        _SHARD.findall,
        lambda name: _splits_in(name.rpartition("/")[0]),
        lambda name: _splits_in(name.rpartition("/")[2]),
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
    """Return the splits whose words stand in a path, delimited by what is not a letter."""
    return [split for split, words in _SPLIT_WORDS.items() if words.search(text)]
