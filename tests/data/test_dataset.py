"""Opening and verifying datasets."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from glassgpt.config.schema import DataConfig
from glassgpt.data import dataset
from glassgpt.data.dataset import open_dataset, verify
from glassgpt.data.prepare import prepare
from glassgpt.utils.errors import UserError
from glassgpt.utils.files import sha256_of

SHARD = "train-00000-00000.bin"


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Prepare a dataset of two shards; its manifest lists five files with their SHA-256."""
    monkeypatch.setenv("GLASSGPT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 20)
    return prepare(DataConfig(source=str(tmp_path / "text.txt"), tokenizer="bytes"), tmp_path / "out")


@pytest.fixture
def hashed(directory: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], set[str]]:
    """Return a function that lists the files that `verify` hashed since its last call, except the tokenizer."""
    names: list[str] = []

    def recorded(path: Path) -> str:
        names.append(path.name)
        return sha256_of(path)

    def since_last_call() -> set[str]:
        read = set(names) - {"tokenizer.json"}  # opening a dataset always hashes it
        names.clear()
        return read

    monkeypatch.setattr(dataset, "sha256_of", recorded)
    return since_last_call


def flip(path: Path) -> None:
    """Flip a bit of a file, but keep its size and modification time."""
    status, content = path.stat(), bytearray(path.read_bytes())
    content[10] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_an_unchanged_file_is_hashed_only_once(directory: Path, hashed: Callable[[], set[str]], tmp_path: Path) -> None:
    shards = {path.name for suffix in ("bin", "idx") for path in directory.glob(f"*.{suffix}")}
    assert (verify(directory), hashed()) == (5, set())  # the builder recorded the hashes of the files it wrote
    for record in (tmp_path / "cache" / "scans").iterdir():
        record.unlink()
    assert (verify(directory), hashed()) == (5, shards)
    assert (verify(directory), hashed()) == (5, set())
    os.utime(directory / SHARD)
    assert (verify(directory), hashed()) == (5, {SHARD})
    assert (verify(directory, force=True), hashed()) == (5, shards)
    assert (verify(directory), hashed()) == (5, set())


def test_verify_names_a_changed_file(directory: Path) -> None:
    verify(directory)
    flip(directory / SHARD)
    with pytest.raises(UserError, match=SHARD):
        verify(directory, force=True)
    os.utime(directory / SHARD)
    with pytest.raises(UserError, match=SHARD):
        verify(directory)


def test_a_copied_file_is_hashed_again(directory: Path, hashed: Callable[[], set[str]]) -> None:
    """The copy has the same size and modification time, but another inode."""
    verify(directory)
    hashed()
    path, status = directory / SHARD, (directory / SHARD).stat()
    content = path.read_bytes()
    (directory / "copy").write_bytes(content)
    os.replace(directory / "copy", path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    verify(directory)
    assert hashed() == {SHARD}


def test_verify_works_without_a_cache_and_with_a_damaged_one(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    for cache in (tmp_path / "file", Path("/proc/none")):
        monkeypatch.setenv("GLASSGPT_CACHE", str(cache))
        assert verify(directory) == 5
    monkeypatch.setenv("GLASSGPT_CACHE", str(tmp_path / "cache"))
    verify(directory)
    for damaged in ("", "[]", "{", "{}"):
        for record in (tmp_path / "cache" / "scans").iterdir():
            record.write_text(damaged)
        assert verify(directory) == 5


def test_a_directory_without_a_dataset_is_refused(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps({"name": "a web page", "version": 1}))
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(UserError, match="is not a dataset"):
            open_dataset(path)
