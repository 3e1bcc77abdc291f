"""Token files of nanoGPT, build-nanogpt and llm.c open as datasets without conversion."""

import functools
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from glassgpt.config.schema import DataConfig
from glassgpt.data import formats
from glassgpt.data.dataset import TokenStream, open_dataset, verify
from glassgpt.data.prepare import prepare
from glassgpt.tokenizers.builtin import CharacterTokenizer, gpt2_tokenizer
from glassgpt.utils.errors import UserError

gpt2 = functools.cache(gpt2_tokenizer)
TRAIN, VALIDATION = np.arange(1000, dtype=np.uint16) % 300, np.arange(120, dtype=np.uint16)


@pytest.fixture(autouse=True)
def one_gpt2(monkeypatch: pytest.MonkeyPatch) -> None:
    """Build GPT-2's tokenizer once."""
    monkeypatch.setattr(formats, "gpt2_tokenizer", gpt2)


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


def save_large_tokenizer(folder: Path) -> None:
    """Write a tokenizer of more than 65,536 ids."""
    characters = "".join(chr(code) for code in range(80_000) if not 0xD800 <= code < 0xE000)
    (folder / "tokenizer.json").write_text(CharacterTokenizer(characters).to_json(), encoding="utf-8")


def test_ids_that_need_four_bytes_are_read_from_nanogpts_files(tmp_path: Path) -> None:
    """Two bytes cannot hold the ids of such a tokenizer. Files of two bytes have ids outside its vocabulary then."""
    save_large_tokenizer(tmp_path)
    tokens = np.arange(1000, dtype="<u4") * 77
    for name in ("train.bin", "val.bin"):
        tokens.tofile(tmp_path / name)
    assert all_tokens(open_dataset(tmp_path).train) == tokens.tolist()
    tokens.astype("<u2").tofile(tmp_path / "train.bin")
    with pytest.raises(UserError, match=r"train\.bin has token id"):
        open_dataset(tmp_path)


@pytest.mark.parametrize("text", ["1 2 3\n4 5 6 " * 20, "\n" * 99, "a\n\n" * 30, "a b" * 8])
def test_a_text_with_a_frequent_character_at_every_second_place_is_not_taken_for_four_bytes(
    text: str, tmp_path: Path
) -> None:
    characters = sorted(set(text))
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"itos": dict(enumerate(characters))}))
    for name in ("train.bin", "val.bin"):
        np.array([characters.index(each) for each in text], dtype="<u2").tofile(tmp_path / name)
    dataset = open_dataset(tmp_path)
    assert dataset.tokenizer.decode(dataset.train.read(0, len(text))) == text


def test_entries_of_several_characters_in_meta_pkl_stay_whole(tmp_path: Path) -> None:
    nanogpt(tmp_path)
    for name in ("train.bin", "val.bin"):
        np.array([0, 1, 2] * 50, dtype="<u2").tofile(tmp_path / name)
    for names in ({0: "do", 1: "re", 2: "mi"}, ["do", "re", "mi"]):
        (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"itos": names}))
        tokenizer = open_dataset(tmp_path).tokenizer
        assert tokenizer.decode([0, 1, 2]) == "doremi"
        assert tokenizer.encode("miredo").tolist() == [2, 1, 0]
        with pytest.raises(UserError, match=r"'f' .* at offset 4"):
            tokenizer.encode("dorefa")


@pytest.mark.parametrize(
    "meta",
    [
        {"itos": {0: "a", 1: "b", "2": "c"}},
        {"itos": {1: "a", 2: "b", 3: "c"}},
        {"itos": ["a", "", "c"]},
        {"itos": ["a", "b", "a"]},
        {"itos": ["ab", "b", "ab"]},
        {"itos": ["a", b"b", "c"]},
        {"itos": [0, 1, 2]},
        {"itos": ["a", ["b"], "c"]},
        {"itos": ["a", "\ud800", "c"]},
        {"itos": ["ab", "\ud800", "c"]},
        {"itos": []},
        {"itos": ["a", "b", "c"], "stoi": {"a": 0, "b": 2, "c": 1}},
        ["a", "b", "c"],
        None,
    ],
    ids=repr,
)
def test_a_meta_pkl_of_anything_else_is_refused(meta: Any, tmp_path: Path) -> None:
    for name in ("train.bin", "val.bin"):
        np.array([0, 1, 2] * 50, dtype="<u2").tofile(tmp_path / name)
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta))
    with pytest.raises(UserError, match=r"meta\.pkl"):
        open_dataset(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "meta.pkl"])
def test_a_folder_named_like_a_tokenizer_is_not_ignored(name: str, tmp_path: Path) -> None:
    nanogpt(tmp_path)
    (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=name):
        open_dataset(tmp_path)


def test_llama_tokens_take_four_bytes(tmp_path: Path) -> None:
    for split in ("train", "val"):
        llmc_shard(tmp_path / f"tiny_{split}.bin", np.array([50_256, 3, 4], dtype="<u4"), magic=20240801, version=7)
    save_large_tokenizer(tmp_path)
    dataset = open_dataset(tmp_path)
    assert all_tokens(dataset.train) == [50_256, 3, 4]
    assert dataset.train.parts[0].dtype == np.dtype("<u4")


def damage_version(folder: Path) -> None:
    llmc(folder)
    llmc_shard(folder / "fineweb_train_000003.bin", TRAIN, version=2)


def damage_no_tokenizer(folder: Path) -> None:
    for split in ("train", "val"):
        llmc_shard(folder / f"a_{split}.bin", TRAIN.astype("<u4"), magic=20240801, version=7)


def damage_count(folder: Path) -> None:
    llmc(folder)
    path = folder / "fineweb_train_000002.bin"
    path.write_bytes(path.read_bytes()[:8] + (-300).to_bytes(4, "little", signed=True) + path.read_bytes()[12:])


def damage_width(folder: Path) -> None:
    TRAIN.astype("<u4").tofile(folder / "train.bin")


def damage_byte_order(folder: Path) -> None:
    TRAIN.astype(">u4").tofile(folder / "train.bin")


def damage_header(folder: Path) -> None:
    """Write a header that Python's parser cannot hold."""
    build_nanogpt(folder)
    header = ("-" * 9000 + "1").encode()
    content = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header
    (folder / "edufineweb_train_000003.npy").write_bytes(content)


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
        (damage_version, r"000003\.bin has version 2 .* version 1"),
        (damage_no_tokenizer, r"a_train\.bin has tokens of Llama 3; .*tokenizer\.json"),
        (damage_count, r"000002\.bin has 1624 bytes instead of the 424"),
        (damage_width, r"train\.bin has tokens of four bytes"),
        (damage_byte_order, r"train\.bin has tokens of four bytes"),
        (damage_header, r"000003\.npy is damaged"),
        (damage_magic, r"000003\.bin is not a token file of llm\.c"),
    ],
)
def test_the_error_names_the_damaged_file(damage: Any, message: str, tmp_path: Path) -> None:
    if damage in (damage_id, damage_odd, damage_width, damage_byte_order):
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
