"""Token files of nanoGPT, build-nanogpt and llm.c, which are datasets as they are.

nanoGPT: `train.bin` and `val.bin`, raw `uint16`; `meta.pkl` has the characters of a character dataset.
build-nanogpt: `NAME_train_000001.npy` and `NAME_val_000000.npy`.
llm.c: `NAME_train*.bin` and `NAME_val*.bin`, with a header of 256 32-bit words (magic number, version, token count).
"""

import hashlib
import itertools
import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from glassgpt.data.shards import SPLITS, TOKENIZER, TokenFile
from glassgpt.tokenizers.builtin import CharacterTokenizer, Tokenizer, gpt2_tokenizer, load_tokenizer
from glassgpt.utils.download import cache_directory
from glassgpt.utils.errors import UserError
from glassgpt.utils.files import readable, write_atomic
from glassgpt.utils.safe_pickle import read_plain_pickle

T = TypeVar("T")

_HEADER_WORDS = 256
# llm.c's magic numbers and the type of the tokens: GPT-2's and Llama 3's.
_LLMC_DTYPES: Mapping[int, str] = {20240520: "<u2", 20240801: "<u4"}
# File name patterns of the training and the validation split.
_PATTERNS = (("train.bin", "val.bin"), ("*_train_*.npy", "*_val_*.npy"), ("*_train*.bin", "*_val*.bin"))


def find_token_files(directory: Path) -> dict[str, list[Path]]:
    """The token files of each split in order; empty unless there are some for both splits."""
    for patterns in _PATTERNS:
        files = {
            split: sorted(path for path in directory.glob(pattern) if path.is_file())
            for split, pattern in zip(SPLITS, patterns, strict=True)
        }
        if all(files.values()):
            return files
    return {}


def project_of(file: TokenFile) -> str:
    """The project whose format a token file has."""
    if file.path.suffix == ".npy":
        return "build-nanogpt"
    return "llm.c" if file.offset else "nanoGPT"


def open_token_files(directory: Path) -> dict[str, list[TokenFile]]:
    """Open the files of `find_token_files`. Raises `UserError` for a damaged or empty file, and for differing types."""
    files = {split: [*map(_open, paths)] for split, paths in find_token_files(directory).items()}
    dtypes: dict[str, str] = {}
    for file in itertools.chain(*files.values()):
        dtypes[file.dtype] = file.path.name
        if not file.tokens:
            raise UserError(f"{file.path} has no tokens; remove it, or create it again")
    if len(dtypes) > 1:
        names = ", ".join(f"{name} has tokens of type {dtype}" for dtype, name in dtypes.items())
        raise UserError(f"{directory} mixes two datasets: {names}")
    return files


def _open(path: Path) -> TokenFile:
    if path.suffix == ".npy":
        return _open_npy(path)
    with readable(path):
        size = path.stat().st_size
        header = np.fromfile(path, "<i4", count=_HEADER_WORDS)
    dtype = _LLMC_DTYPES.get(int(header[0])) if len(header) == _HEADER_WORDS else None
    if dtype is None:
        if path.name not in ("train.bin", "val.bin"):
            raise UserError(f"{path} is not a token file of llm.c: it does not start with one of its magic numbers")
        if size % 2:
            raise UserError(f"{path} has {size} bytes, an odd number; nanoGPT's tokens take two bytes each")
        return TokenFile(path, "<u2", 0, size // 2)
    expected = header.nbytes + int(header[2]) * np.dtype(dtype).itemsize
    if size != expected:
        raise UserError(f"{path} has {size} bytes instead of the {expected} of its header: it is damaged or truncated")
    return TokenFile(path, dtype, header.nbytes, int(header[2]))


def _open_npy(path: Path) -> TokenFile:
    try:
        tokens = np.lib.format.open_memmap(path, mode="r")  # not np.load, which also opens archives
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path} is damaged, or not a NumPy array: {error}") from error
    if tokens.ndim != 1 or tokens.dtype.str not in ("<u2", "<u4"):
        held = f"{tokens.dtype} of shape {tokens.shape}"
        raise UserError(f"{path} holds {held} instead of a row of little-endian uint16 or uint32")
    return TokenFile(path, tokens.dtype.str, tokens.offset, len(tokens))


def external_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer in `tokenizer.json`, otherwise nanoGPT's characters (`meta.pkl`), otherwise GPT-2's."""
    if (directory / TOKENIZER).is_file():
        return load_tokenizer(directory / TOKENIZER)
    if (directory / "meta.pkl").is_file():
        match read_plain_pickle(directory / "meta.pkl"):
            case {"itos": dict(characters)} if sorted(characters) == list(range(len(characters))):
                return CharacterTokenizer("".join(characters[i] for i in range(len(characters))))
        raise UserError(f"{directory / 'meta.pkl'} has no characters (itos); put a {TOKENIZER} in its directory")
    return gpt2_tokenizer()


def external_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of token files in the format of a prepared dataset's. All tokens are read the first time.

    Raises `UserError` for damaged files, and for ids outside the vocabulary.
    """
    files, tokenizer = open_token_files(directory), external_tokenizer(directory)
    splits: dict[str, Any] = {split: {"tokens": 0, "shards": []} for split in SPLITS}
    for split in SPLITS:
        for file in files[split]:
            scan = remembered(file.path, "tokens", partial(_scan, file))
            if scan["largest"] >= tokenizer.vocab_size:
                known = f"tokenizer {tokenizer.kind} has ids 0 to {tokenizer.vocab_size - 1}"
                advice = f"put the right {TOKENIZER} in its directory"
                raise UserError(f"{file.path} has token id {scan['largest']}, but {known};\n{advice}")
            splits[split]["tokens"] += file.tokens
            splits[split]["shards"].append({"name": file.path.name, "tokens": file.tokens, "sha256": scan["sha256"]})
    return {
        "source": {"name": directory.name},
        "tokenizer": {"kind": tokenizer.kind, "vocab_size": tokenizer.vocab_size, "sha256": tokenizer.sha256},
        "dtype": np.dtype(files["train"][0].dtype).name,
        "splits": splits,
    }


def verify_token_files(directory: Path, force: bool) -> int:
    """Compare token files with what they were when first opened, and return their number; see `dataset.verify`."""
    files = list(itertools.chain(*open_token_files(directory).values()))
    for file in files:
        if force and _scan(file) != remembered(file.path, "tokens", partial(_scan, file)):
            raise UserError(f"{file.path} has changed since it was first opened, but its size and time have not")
    return len(files)


def _scan(file: TokenFile) -> dict[str, Any]:
    """The hash and the largest id of all tokens."""
    digest, largest = hashlib.sha256(), 0
    for chunk in file.chunks():
        digest.update(chunk.data)
        largest = max(largest, int(chunk.max()))
    return {"sha256": digest.hexdigest(), "largest": largest}


def remembered(path: Path, what: str, compute: Callable[[], T], force: bool = False) -> T:
    """Compute a JSON value from a file, or take it from the cache if the file's size, time and inode are the same."""
    status = path.stat()  # before the file is read, so that a later change is noticed
    state = [str(path.resolve()), what, status.st_size, status.st_mtime_ns, status.st_ino]
    name = hashlib.sha256(json.dumps(state[:2]).encode()).hexdigest()[:32]
    record = cache_directory() / "scans" / f"{name}.json"
    with suppress(OSError, ValueError, TypeError, KeyError):
        saved = json.loads(record.read_bytes())
        if saved["state"] == state and not force:
            value: T = saved["value"]
            return value
    value = compute()
    with suppress(OSError, UserError):
        record.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(record, json.dumps({"state": state, "value": value}))
    return value
