"""Token files of nanoGPT, build-nanogpt and llm.c open as datasets without conversion."""

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from glassgpt.config.schema import DataConfig
from glassgpt.data.dataset import TokenStream, open_dataset, verify
from glassgpt.data.prepare import prepare
from glassgpt.tokenizers.builtin import CharacterTokenizer
from glassgpt.utils.errors import UserError

TRAIN, VALIDATION = np.arange(1000, dtype=np.uint16) % 300, np.arange(120, dtype=np.uint16)


def nanogpt(folder: Path) -> None:
    TRAIN.tofile(folder / "train.bin")
    VALIDATION.tofile(folder / "val.bin")


def build_nanogpt(folder: Path) -> None:
    """Write shards as build-nanogpt does: the validation shard comes first, with number 0."""
    np.save(folder / "edufineweb_val_000000", VALIDATION)
    np.save(folder / "edufineweb_train_000001", TRAIN[:700])
    np.save(folder / "edufineweb_train_000002", TRAIN[700:])


def llmc_shard(path: Path, tokens: np.ndarray, magic: int = 20240520, version: int = 1) -> None:
    header = np.zeros(256, dtype="<i4")
    header[:3] = magic, version, len(tokens)
    path.write_bytes(header.tobytes() + tokens.tobytes())


def llmc(folder: Path) -> None:
    llmc_shard(folder / "fineweb_val_000000.bin", VALIDATION)
    llmc_shard(folder / "fineweb_train_000001.bin", TRAIN[:700])
    llmc_shard(folder / "fineweb_train_000002.bin", TRAIN[700:])


KINDS = {"nanogpt": nanogpt, "build-nanogpt": build_nanogpt, "llm.c": llmc}


def all_tokens(stream: TokenStream) -> list[int]:
    return [int(token) for token in stream.read(0, len(stream))]


@pytest.mark.parametrize("kind", KINDS)
def test_the_tokens_are_read_in_place(kind: str, tmp_path: Path) -> None:
    KINDS[kind](tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    assert prepare(DataConfig(source=str(tmp_path))) == tmp_path
    dataset = open_dataset(tmp_path)
    assert all_tokens(dataset.train) == TRAIN.tolist()
    assert all_tokens(dataset.validation) == VALIDATION.tolist()
    assert (dataset.tokenizer.kind, dataset.tokenizer.vocab_size) == ("gpt2", 50257)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    verify(tmp_path)


def test_the_fingerprint_does_not_depend_on_the_directory(tmp_path: Path) -> None:
    fingerprints = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        llmc(tmp_path / name)
        fingerprints.append(open_dataset(tmp_path / name).fingerprint)
    TRAIN[::-1].tofile(tmp_path / "train.bin")
    VALIDATION.tofile(tmp_path / "val.bin")
    assert fingerprints[0] == fingerprints[1] != open_dataset(tmp_path).fingerprint


def test_a_changed_file_has_another_fingerprint(tmp_path: Path) -> None:
    nanogpt(tmp_path)
    before = open_dataset(tmp_path).fingerprint
    path = tmp_path / "train.bin"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    assert open_dataset(tmp_path).fingerprint != before


def test_verify_detects_a_change_that_keeps_size_and_time(tmp_path: Path) -> None:
    nanogpt(tmp_path)
    open_dataset(tmp_path)
    verify(tmp_path)
    path, times = tmp_path / "train.bin", (tmp_path / "train.bin").stat()
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(UserError, match=r"train\.bin"):
        verify(tmp_path, force=True)


def test_nanogpts_characters_are_read_from_meta_pkl(tmp_path: Path) -> None:
    nanogpt(tmp_path)
    characters = "".join(map(chr, range(32, 332)))
    meta = {"vocab_size": 300, "itos": dict(enumerate(characters)), "stoi": {c: i for i, c in enumerate(characters)}}
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta))
    dataset = open_dataset(tmp_path)
    assert dataset.tokenizer.to_json() == CharacterTokenizer(characters).to_json()
    assert dataset.tokenizer.decode(dataset.validation.read(0, 3)) == ' !"'
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"itos": os.system}))
    with pytest.raises(UserError, match=r"meta\.pkl"):
        open_dataset(tmp_path)
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"something": "else"}))
    with pytest.raises(UserError, match=r"meta\.pkl.*itos"):
        open_dataset(tmp_path)
    (tmp_path / "tokenizer.json").write_text(CharacterTokenizer(characters[::-1]).to_json())
    assert open_dataset(tmp_path).tokenizer.decode([299]) == " "


def test_llama_tokens_take_four_bytes(tmp_path: Path) -> None:
    for split in ("train", "val"):
        llmc_shard(tmp_path / f"tiny_{split}.bin", np.array([50_256, 3, 4], dtype="<u4"), magic=20240801, version=7)
    dataset = open_dataset(tmp_path)
    assert all_tokens(dataset.train) == [50_256, 3, 4]
    assert dataset.train.parts[0].dtype == np.dtype("<u4")


def damage_id(folder: Path) -> None:
    np.array([1] * 700 + [60_000], dtype="<u2").tofile(folder / "train.bin")


def damage_odd(folder: Path) -> None:
    (folder / "train.bin").write_bytes(b"abc")


def damage_types(folder: Path) -> None:
    build_nanogpt(folder)
    np.save(folder / "edufineweb_train_000003", np.arange(5, dtype=np.uint32))


def damage_shape(folder: Path) -> None:
    build_nanogpt(folder)
    np.save(folder / "edufineweb_train_000003", np.zeros((2, 5)))


def damage_npy(folder: Path) -> None:
    build_nanogpt(folder)
    path = folder / "edufineweb_train_000002.npy"
    path.write_bytes(path.read_bytes()[:-7])


def damage_pickled(folder: Path) -> None:
    build_nanogpt(folder)
    np.save(folder / "edufineweb_train_000003", np.array([print], dtype=object), allow_pickle=True)


def damage_length(folder: Path) -> None:
    llmc(folder)
    path = folder / "fineweb_train_000002.bin"
    path.write_bytes(path.read_bytes()[:-2])


def damage_magic(folder: Path) -> None:
    llmc(folder)
    llmc_shard(folder / "fineweb_train_000003.bin", TRAIN, magic=7)


def damage_empty(folder: Path) -> None:
    for name in ("train.bin", "val.bin"):
        (folder / name).write_bytes(b"")


def damage_empty_validation(folder: Path) -> None:
    nanogpt(folder)
    (folder / "val.bin").write_bytes(b"")


def damage_empty_llmc(folder: Path) -> None:
    llmc(folder)
    llmc_shard(folder / "fineweb_train_000003.bin", TRAIN[:0])


def damage_empty_npy(folder: Path) -> None:
    build_nanogpt(folder)
    np.save(folder / "edufineweb_train_000003", TRAIN[:0])


def damage_no_bytes_npy(folder: Path) -> None:
    build_nanogpt(folder)
    (folder / "edufineweb_train_000003.npy").write_bytes(b"")


def damage_order(folder: Path) -> None:
    build_nanogpt(folder)
    for path in folder.glob("*.npy"):
        np.save(path, np.load(path).astype(">u2"))


def damage_archive(folder: Path) -> None:
    build_nanogpt(folder)
    with open(folder / "edufineweb_train_000003.npy", "wb") as file:
        np.savez(file, TRAIN)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_id, r"train\.bin has token id 60000.*gpt2 has ids 0 to 50256"),
        (damage_odd, r"train\.bin has 3 bytes"),
        (damage_types, r"npy .*<u2, .*000003\.npy .*<u4"),
        (damage_shape, r"000003\.npy holds float64 of shape \(2, 5\)"),
        (damage_npy, r"000002\.npy is damaged, or not a NumPy array"),
        (damage_pickled, r"000003\.npy is damaged, or not a NumPy array"),
        (damage_length, r"000002\.bin has 1622 bytes instead of the 1624"),
        (damage_empty, r"train\.bin has no tokens"),
        (damage_empty_validation, r"val\.bin has no tokens"),
        (damage_empty_llmc, r"000003\.bin has no tokens"),
        (damage_empty_npy, r"000003\.npy has no tokens"),
        (damage_no_bytes_npy, r"000003\.npy is damaged, or not a NumPy array"),
        (damage_order, r"holds >u2 of shape .* little-endian"),
        (damage_archive, r"000003\.npy is damaged, or not a NumPy array"),
        (damage_magic, r"000003\.bin is not a token file of llm\.c"),
    ],
)
def test_the_error_names_the_damaged_file(damage: Any, message: str, tmp_path: Path) -> None:
    if damage in (damage_id, damage_odd):
        nanogpt(tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError, match=message):
        open_dataset(tmp_path)


def test_a_folder_named_like_a_token_file_is_not_a_dataset(tmp_path: Path) -> None:
    (tmp_path / "train.bin").mkdir()
    VALIDATION.tofile(tmp_path / "val.bin")
    with pytest.raises(UserError, match="is not a dataset"):
        open_dataset(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_named(tmp_path: Path) -> None:
    nanogpt(tmp_path)
    (tmp_path / "train.bin").chmod(0)
    with pytest.raises(UserError, match=r"cannot read .*train\.bin: Permission denied"):
        open_dataset(tmp_path)


def test_a_training_split_alone_is_not_a_dataset(tmp_path: Path) -> None:
    TRAIN.tofile(tmp_path / "train.bin")
    with pytest.raises(UserError, match="is not a dataset"):
        open_dataset(tmp_path)
