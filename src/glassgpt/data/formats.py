"""Token files of other projects as datasets, where they are and as they are.

nanoGPT: `train.bin` and `val.bin`, raw `uint16`; the characters of a character dataset are in `meta.pkl`. build-nanogpt:
`NAME_train_000001.npy` and `NAME_val_000000.npy`. llm.c and its followers: `NAME_train*.bin` and `NAME_val*.bin`, 256 header words
of 32 bits (magic number, version, number of tokens), then the tokens.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from glassgpt.data.shards import SPLITS, TOKENIZER, TokenFile
from glassgpt.tokenizers.builtin import BPETokenizer, CharacterTokenizer, Tokenizer, load_tokenizer
from glassgpt.utils.download import cache_directory
from glassgpt.utils.errors import UserError
from glassgpt.utils.files import readable, write_atomic
from glassgpt.utils.safe_pickle import read_plain_pickle

_HEADER_WORDS = 256
# llm.c's magic numbers, and the type of the tokens behind them: GPT-2's and Llama 3's.
_LLMC_DTYPES: Mapping[int, str] = {20240520: "<u2", 20240801: "<u4"}


def foreign_files(directory: Path) -> dict[str, list[Path]] | None:
    """The token files of each split, in order; None unless the directory has some for both."""
    for train, validation in (
        ("train.bin", "val.bin"),
        ("*_train_*.npy", "*_val_*.npy"),
        ("*_train*.bin", "*_val*.bin"),
    ):
        patterns = dict(zip(SPLITS, (train, validation), strict=True))
        found = {
            split: sorted(path for path in directory.glob(pattern) if path.is_file())
            for split, pattern in patterns.items()
        }
        if all(found.values()):
            return found
    return None


def open_shards(directory: Path) -> dict[str, list[TokenFile]]:
    """The shards of each split. Raises `UserError` for a file that is none, is too short or empty, or has another type."""
    files = foreign_files(directory)
    assert files is not None, "foreign_files was asked before"
    shards = {split: [_open_shard(path) for path in paths] for split, paths in files.items()}
    dtypes = {shard.dtype: shard.path.name for split in SPLITS for shard in shards[split]}
    for shard in (shard for split in SPLITS for shard in shards[split]):
        if not shard.tokens:
            raise UserError(f"{shard.path} has no tokens in it: make it anew, or remove it if there are others")
    if len(dtypes) > 1:
        (one, first), (two, second), *_ = dtypes.items()
        raise UserError(
            f"{directory}: {first} has tokens of type {one} and {second} of type {two}, so they are of two datasets"
        )
    return shards


def _open_shard(path: Path) -> TokenFile:
    if path.suffix == ".npy":
        return _open_npy(path)
    with readable(path):
        size = path.stat().st_size
        header = np.fromfile(path, "<i4", count=_HEADER_WORDS)
    dtype = _LLMC_DTYPES.get(int(header[0])) if len(header) == _HEADER_WORDS else None
    if dtype is None:
        if path.name not in ("train.bin", "val.bin"):
            raise UserError(f"{path} is no token file of llm.c's: it does not begin with one of its magic numbers")
        if size % 2:
            raise UserError(
                f"{path} has {size} bytes, and tokens of nanoGPT take two each: it is damaged, or something else"
            )
        return TokenFile(path, "<u2", 0, size // 2)
    offset, width = header.nbytes, np.dtype(dtype).itemsize
    expected = offset + int(header[2]) * width
    if size != expected:
        raise UserError(
            f"{path} has {size} bytes, and by its header it should have {expected}: it is damaged, or not yet whole"
        )
    return TokenFile(path, dtype, offset, int(header[2]))


def _open_npy(path: Path) -> TokenFile:
    try:
        tokens = np.lib.format.open_memmap(path, mode="r")  # not np.load, which also opens archives
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path} is no array of NumPy's, or is damaged: {error}") from error
    if tokens.ndim != 1 or tokens.dtype.str not in ("<u2", "<u4"):
        raise UserError(
            f"{path} holds {tokens.dtype} of shape {tokens.shape}; token files hold a row of little-endian uint16 or uint32"
        )
    return TokenFile(path, tokens.dtype.str, tokens.offset, len(tokens))


def foreign_manifest(directory: Path) -> dict[str, Any]:
    """What `prepare` would have written as the manifest, as far as it is known.

    All tokens are read the first time; later, what was found is taken from the cache where the files' sizes and times are the same.
    Raises `UserError` for damaged files and for ids that the tokenizer does not have.
    """
    shards, tokenizer = open_shards(directory), foreign_tokenizer(directory)
    splits = {}
    for split in SPLITS:
        entries = []
        for shard in shards[split]:
            scan = _scan(shard)
            if scan["largest"] >= tokenizer.vocab_size:
                raise _unknown_id(shard, tokenizer)
            entries.append({"name": shard.path.name, "tokens": shard.tokens, "sha256": scan["sha256"]})
        splits[split] = {"tokens": sum(shard.tokens for shard in shards[split]), "shards": entries}
    return {
        "source": {"name": directory.name},
        "tokenizer": {
            "kind": tokenizer.kind,
            "vocab_size": tokenizer.vocab_size,
            "sha256": hashlib.sha256(tokenizer.to_json().encode()).hexdigest(),
        },
        "dtype": {"<u2": "uint16", "<u4": "uint32"}[shards["train"][0].dtype],
        "splits": splits,
    }


def foreign_hashes(directory: Path) -> Iterator[tuple[str, str, str]]:
    """Each token file's name, the sha256 of its tokens when they were first read, and now."""
    shards = open_shards(directory)
    for shard in (shard for split in SPLITS for shard in shards[split]):
        yield shard.path.name, _scan(shard)["sha256"], _read(shard)["sha256"]


def foreign_tokenizer(directory: Path) -> Tokenizer:
    """`tokenizer.json` beside the tokens, else nanoGPT's characters (`meta.pkl`), else GPT-2's vocabulary.

    Raises `UserError` where these are damaged or not to be had.
    """
    if (directory / TOKENIZER).is_file():
        return load_tokenizer(directory / TOKENIZER)
    if (directory / "meta.pkl").is_file():
        match read_plain_pickle(directory / "meta.pkl"):
            case {"itos": dict(characters)} if sorted(characters) == list(range(len(characters))):
                return CharacterTokenizer("".join(characters[i] for i in range(len(characters))))
        raise UserError(
            f"{directory / 'meta.pkl'} has no characters of nanoGPT's (itos); put the dataset's tokenizer.json beside it"
        )
    return BPETokenizer.gpt2()


def _scan(shard: TokenFile) -> dict[str, Any]:
    """Hash and largest id of a shard, kept in the cache for as long as the file stays the same."""
    status = shard.path.stat()
    key = json.dumps([str(shard.path.resolve()), status.st_size, status.st_mtime_ns])
    path = cache_directory() / "scans" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
    with suppress(OSError, ValueError):
        known: dict[str, Any] = json.loads(path.read_bytes())
        return known
    scan = _read(shard)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(scan))
    return scan


def _read(shard: TokenFile) -> dict[str, Any]:
    digest, largest = hashlib.sha256(), 0
    for chunk in shard.chunks():
        digest.update(chunk.data)
        largest = max(largest, int(chunk.max()))
    return {"sha256": digest.hexdigest(), "largest": largest}


def _unknown_id(shard: TokenFile, tokenizer: Tokenizer) -> UserError:
    position = 0
    for chunk in shard.chunks():
        outside = np.flatnonzero(chunk >= tokenizer.vocab_size)
        if len(outside):
            position += int(outside[0])
            break
        position += len(chunk)
    return UserError(
        f"{shard.path}: token {position} is id {shard.open()[position]}, and the tokenizer {tokenizer.kind} has ids 0 to "
        f"{tokenizer.vocab_size - 1};\nput the tokenizer.json that made it beside it"
    )
