"""Documents that repeat earlier ones: by 64-bit hashes of their texts, kept a file a group while a dataset is made."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from glassgpt.utils.files import write_atomic


def has_hashes(directory: Path, group: int) -> bool:
    """Whether the hashes of a group's documents are there."""
    return _hashes_path(directory, group).is_file()


def save_hashes(directory: Path, group: int, hashes: Sequence[int]) -> None:
    """Keep the hash of each document of a group."""
    write_atomic(_hashes_path(directory, group), np.array(hashes, dtype="<u8").tobytes())


def mark_duplicates(directory: Path, groups: int) -> None:
    """For each group, record which of its documents repeat one that came before, in this group or another."""
    hashes = [np.fromfile(_hashes_path(directory, number), dtype="<u8") for number in range(groups)]
    repeated = np.split(repeats(np.concatenate(hashes)), np.cumsum([len(part) for part in hashes]))
    for number in range(groups):
        write_atomic(_duplicates_path(directory, number), repeated[number].tobytes())


def left_out(directory: Path, group: int) -> npt.NDArray[np.bool_]:
    """Whether each document of a group, counted over all its files, is to be left out; empty where none is."""
    path = _duplicates_path(directory, group)
    return np.fromfile(path, dtype=np.bool_) if path.is_file() else np.empty(0, dtype=np.bool_)


def repeats(hashes: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
    """For each hash (N,), whether it has come before."""
    repeated = np.ones(len(hashes), dtype=np.bool_)
    # A range of values at a time: sorting takes several times the memory of what it sorts.
    ranges = max(1, len(hashes) >> 24)
    for number in range(ranges):
        chosen = np.flatnonzero(hashes % np.uint64(ranges) == number)
        repeated[chosen[np.unique(hashes[chosen], return_index=True)[1]]] = False
    return repeated


def _hashes_path(directory: Path, number: int) -> Path:
    return directory / f"hashes-{number:05d}.bin"


def _duplicates_path(directory: Path, number: int) -> Path:
    return directory / f"duplicates-{number:05d}.bin"
