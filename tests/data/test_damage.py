"""Damaged datasets: found before they are used, named in one error, and repaired by preparing again."""

import copy
import json
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from glassgpt.config.schema import DataConfig
from glassgpt.data.batches import Batches
from glassgpt.data.dataset import is_dataset, open_dataset, verify
from glassgpt.data.inspect import dataset_facts
from glassgpt.data.prepare import prepare
from glassgpt.data.sources import PreparedDataset, resolve
from glassgpt.utils.errors import UserError
from glassgpt.utils.files import PARTIAL_PREFIX, sealed_json
from prepare_harness import contents

TOKENS = "train-00000-00000.bin"


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DataConfig:
    """Write six documents, and return the config that makes a dataset of several shards of them."""
    monkeypatch.setenv("GLASSGPT_CACHE", str(tmp_path / "cache"))
    rows = [f"document {i} of six, " * (20 + i) for i in range(6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return DataConfig(source=str(tmp_path / "rows.jsonl"), tokenizer="bytes", shard_tokens=900, deduplicate=True)


def flip(path: Path, offset: int, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1 << bit
    path.write_bytes(content)


def test_a_flipped_bit_of_any_file_is_named_and_repaired(config: DataConfig) -> None:
    directory = prepare(config)
    undamaged, draw = contents(directory), random.Random(0)
    for name in sorted(undamaged):
        flip(directory / name, draw.randrange(len(undamaged[name])), draw.randrange(8))
        with pytest.raises(UserError, match=str(directory)):
            open_dataset(directory)
        assert is_dataset(directory)
        lines: list[str] = []
        assert prepare(config, log=lines.append) == directory
        assert contents(directory) == undamaged
        assert any("damaged" in line for line in lines)


def test_zeros_in_a_shard_are_found_by_every_use(config: DataConfig, tmp_path: Path) -> None:
    directory = prepare(config, tmp_path / "out")
    open_dataset(directory)
    (directory / TOKENS).write_bytes(bytes((directory / TOKENS).stat().st_size))
    for use in (open_dataset, verify, lambda path: open_dataset(prepare(DataConfig(source=str(path))))):
        with pytest.raises(UserError, match=TOKENS):
            use(directory)
    prepare(config, directory)
    open_dataset(directory)


REMOVED = object()


def edits(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Yield places in a JSON value, each with what replaces what is there: a value of another type, or `REMOVED`."""
    if isinstance(value, dict | list):
        for key, each in value.items() if isinstance(value, dict) else enumerate(value[:1]):
            for wrong in (REMOVED, None, [], {}, "../x", -1, 1.5, 10**30, float("nan"), True):
                if type(wrong) is not type(each):
                    yield (*path, key), wrong
            yield from edits(each, (*path, key))


def edited(value: Any, path: tuple[Any, ...], wrong: Any) -> Any:
    """Return a copy of a JSON value with one place replaced."""
    inner = changed = copy.deepcopy(value)
    for key in path[:-1]:
        inner = inner[key]
    if wrong is REMOVED:
        del inner[path[-1]]
    else:
        inner[path[-1]] = wrong
    return changed


def test_no_manifest_gives_another_error(config: DataConfig, tmp_path: Path) -> None:
    """Also not one without a checksum, as version 0.2 wrote it."""
    directory = prepare(config, tmp_path / "out")
    path = directory / "manifest.json"
    undamaged = json.loads(path.read_text())
    fingerprint = open_dataset(directory).fingerprint
    del undamaged["checksum"]
    path.write_text(json.dumps(undamaged))
    assert open_dataset(directory).fingerprint == fingerprint
    errors, chosen = [], random.Random(2).sample(list(edits(undamaged)), 40)
    for number, (place, wrong) in enumerate(chosen):
        path.write_text(json.dumps(edited(undamaged, place, wrong)))
        assert resolve(str(directory)) == PreparedDataset(directory.resolve())
        for use in (open_dataset, dataset_facts):
            try:
                use(directory)
            except UserError as error:
                errors.append(str(error))
        if number % 10 == 0:
            prepare(config, directory, overwrite=True)  # which repairs it
            verify(directory)
            assert "checksum" in path.read_text()
    assert all(str(directory) in error for error in errors)
    assert len(errors) > 0.6 * 2 * len(chosen)  # the rest describes the text, which may be anything


@pytest.mark.parametrize("text", ["{", "[]", '"x"', "[" * 100_000, "NaN", "", "\ufffd", '{"a": 1, "a": 1}'])
def test_a_dataset_with_a_broken_manifest_is_no_folder_of_text(config: DataConfig, tmp_path: Path, text: str) -> None:
    directory = prepare(config, tmp_path / "out")
    (directory / "manifest.json").write_text(text)
    (directory / "notes.txt").write_text("some text " * 99)
    with pytest.raises(UserError, match=rf"{directory}.*damaged"):
        prepare(DataConfig(source=str(directory)))
    with pytest.raises(UserError, match=r"notes\.txt"):
        prepare(config, directory)
    (directory / "notes.txt").unlink()
    verify(prepare(config, directory))


def test_a_key_that_occurs_twice_is_damage(config: DataConfig, tmp_path: Path) -> None:
    path = prepare(config, tmp_path / "out") / "manifest.json"
    path.write_text(path.read_text().replace('"dtype"', '"dtype": "uint16",\n "dtype"'))
    with pytest.raises(UserError, match="twice"):
        open_dataset(path.parent)


def test_a_damaged_memory_of_a_hash_is_no_damage_of_the_file(config: DataConfig, tmp_path: Path) -> None:
    directory = prepare(config)
    for record in (tmp_path / "cache" / "scans").iterdir():
        saved = json.loads(record.read_text())
        record.write_text(json.dumps({**saved, "value": "0" * 64}))
    open_dataset(directory)


def test_ids_that_change_in_a_file_that_is_open_are_one_error(config: DataConfig, tmp_path: Path) -> None:
    dataset = open_dataset(prepare(config, tmp_path / "out"))
    batches = Batches([dataset.train], 8, 4, 0, "sequential")
    before = batches.batch_at(0)
    tokens = np.memmap(dataset.directory / TOKENS, "<u2", "r+")
    tokens[5] = 300
    for read in (lambda: batches.batch_at(0), lambda: list(dataset.whole.evaluation_batches(8, 4))):
        with pytest.raises(UserError, match="id 300"):
            read()
    tokens[5] = before[0, 5]
    assert (batches.batch_at(0) == before).all()


def test_a_file_that_is_cut_off_while_it_is_open_is_an_error_and_a_replaced_one_is_not(
    config: DataConfig, tmp_path: Path
) -> None:
    """Reading beyond the end of a mapped file would end the process by SIGBUS."""
    dataset = open_dataset(prepare(config, tmp_path / "out"))
    path, last = dataset.directory / TOKENS, len(dataset.train) - 8
    before = dataset.train.read(0, 8), dataset.train.read(last, 8)
    copy = path.rename(tmp_path / "copy")  # the open file goes on under another name
    path.write_bytes(b"")
    assert (dataset.train.read(0, 8) == before[0]).all()
    copy.rename(path)
    os.truncate(path, 0)
    with pytest.raises(UserError, match=TOKENS):
        dataset.train.windows(np.array([0, last]), 8)
    assert (dataset.train.read(last, 8) == before[1]).all()  # of another file


@pytest.fixture
def half_built(config: DataConfig, tmp_path: Path) -> Path:
    """A build that was killed after its last shard, before its manifest."""
    with (
        mock.patch("glassgpt.data.builder.DatasetBuilder._find_problem", side_effect=KeyboardInterrupt),
        pytest.raises(KeyboardInterrupt),
    ):
        prepare(config, tmp_path / "out")
    return tmp_path / f"{PARTIAL_PREFIX}out"


def test_damage_of_an_unfinished_build_is_repaired(config: DataConfig, half_built: Path, tmp_path: Path) -> None:
    expected, draw = contents(prepare(config, tmp_path / "expected")), random.Random(1)
    unfinished = contents(half_built)
    assert {"build.json", "duplicates.npz", "unit-00000.json", "tokenizer.json"} <= unfinished.keys()
    for name in sorted(name for name in unfinished if not name.endswith(".lock")):
        damage = draw.choice(["flip", "empty", "missing"])
        shutil.rmtree(half_built, ignore_errors=True)
        half_built.mkdir()
        for each, content in unfinished.items():
            (half_built / each).write_bytes(content)
        path = half_built / name
        if damage == "flip":
            flip(path, draw.randrange(len(unfinished[name])), draw.randrange(8))
        elif damage == "empty":
            path.write_bytes(b"")
        else:
            path.unlink()
        assert contents(prepare(config, tmp_path / "out")) == expected, (name, damage)
        shutil.rmtree(tmp_path / "out")


def test_sealed_marks_of_shards_are_used_again(config: DataConfig, half_built: Path, tmp_path: Path) -> None:
    before = {path.name: path.stat().st_ino for path in half_built.glob("*.bin")}
    prepare(config, tmp_path / "out")
    assert {path.name: path.stat().st_ino for path in (tmp_path / "out").glob("*.bin")} == before
    assert sealed_json({"a": 1}) == sealed_json(json.loads('{"a": 1}'))
