"""Token files of nanoGPT, build-nanogpt and llm.c, which are datasets as they are.

nanoGPT: `train.bin` and `val.bin`, raw `uint16`, or `uint32` if the tokenizer has more than 65,536 ids; `meta.pkl` has
the characters of a character dataset.
build-nanogpt: `NAME_train_000001.npy` and `NAME_val_000000.npy`.
llm.c: `NAME_train*.bin` and `NAME_val*.bin`, with a header of 256 32-bit words (magic number, version, token count).
"""

import hashlib
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from glassgpt.data.shards import SPLITS, TOKENIZER, TokenFile
from glassgpt.tokenizers.builtin import Tokenizer, gpt2_tokenizer, load_tokenizer, vocabulary_tokenizer
from glassgpt.utils.download import cache_directory
from glassgpt.utils.errors import UserError
from glassgpt.utils.files import readable, write_atomic
from glassgpt.utils.safe_pickle import read_plain_pickle

T = TypeVar("T")

_HEADER_WORDS = 256
# llm.c's magic numbers, versions and types of the tokens: GPT-2's and Llama 3's.
_LLMC: Mapping[int, tuple[int, str]] = {20240520: (1, "<u2"), 20240801: (7, "<u4")}
_TOO_FEW = 32  # tokens in which a pattern may be a coincidence
_SCAN = "tokens at even and odd places"  # of what `remembered` keeps
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


def open_token_files(directory: Path) -> tuple[dict[str, list[TokenFile]], Tokenizer, dict[str, Any]]:
    """The files of each split, the tokenizer (the directory's own, otherwise GPT-2's) and a manifest as of `prepare`.

    All tokens are read the first time. Raises `UserError` if there are no files, for damaged, empty or mixed ones, for
    ids outside the vocabulary, and for Llama's tokens without a tokenizer.
    """
    found, tokenizer = find_token_files(directory), _own_tokenizer(directory)
    if not found:
        raise UserError(f"{directory} is not a dataset; create one: glassgpt prepare SOURCE --out DIR")
    raw = "<u4" if tokenizer is not None and tokenizer.vocab_size > 1 << 16 else "<u2"
    files = {split: [_open(path, raw) for path in paths] for split, paths in found.items()}
    dtypes = {file.dtype: file.path.name for file in itertools.chain(*files.values())}
    if len(dtypes) > 1:
        names = ", ".join(f"{name} has tokens of type {dtype}" for dtype, name in dtypes.items())
        raise UserError(f"{directory} mixes two datasets: {names}")
    first = files["train"][0]
    if tokenizer is None and first.dtype == "<u4" and project_of(first) == "llm.c":
        raise UserError(f"{first.path} has tokens of Llama 3; put its {TOKENIZER} in the same directory")
    tokenizer = tokenizer or gpt2_tokenizer()
    splits: dict[str, Any] = {split: {"tokens": sum(file.tokens for file in files[split])} for split in SPLITS}
    for split in SPLITS:
        splits[split]["shards"] = shards = []
        for file in files[split]:
            if not file.tokens:
                raise UserError(f"{file.path} has no tokens; remove it, or create it again")
            scan = remembered(file.path, _SCAN, partial(_scan, file))
            _require_ids(file, scan["largest"], scan["above_one"], tokenizer)
            shards.append({"name": file.path.name, "tokens": file.tokens, "sha256": scan["sha256"]})
    manifest = {
        "source": {"name": directory.name},
        "tokenizer": {"kind": tokenizer.kind, "vocab_size": tokenizer.vocab_size, "sha256": tokenizer.sha256},
        "dtype": np.dtype(first.dtype).name,
        "splits": splits,
    }
    return files, tokenizer, manifest


def _open(path: Path, raw: str) -> TokenFile:
    """Open a file. `raw`: the type of tokens without a header."""
    if path.suffix == ".npy":
        return _open_npy(path)
    with readable(path):
        size = path.stat().st_size
        header = np.fromfile(path, "<i4", count=_HEADER_WORDS)
    version, dtype = _LLMC.get(int(header[0]), (0, None)) if len(header) == _HEADER_WORDS else (0, None)
    if dtype is None:
        if path.name not in ("train.bin", "val.bin"):
            raise UserError(f"{path} is not a token file of llm.c: it does not start with one of its magic numbers")
        width = np.dtype(raw).itemsize
        if size % width:
            raise UserError(f"{path} has {size} bytes, but each token of its tokenizer takes {width} bytes")
        return TokenFile(path, raw, 0, size // width)
    if header[1] != version:
        raise UserError(f"{path} has version {header[1]} of llm.c's format; only version {version} is supported")
    expected = header.nbytes + int(header[2]) * np.dtype(dtype).itemsize
    if size != expected:
        raise UserError(f"{path} has {size} bytes instead of the {expected} of its header: it is damaged or truncated")
    return TokenFile(path, dtype, header.nbytes, int(header[2]))


def _open_npy(path: Path) -> TokenFile:
    try:
        tokens = np.lib.format.open_memmap(path, mode="r")  # not np.load, which also opens archives
    except Exception as error:  # a damaged header can raise nearly anything
        raise UserError(f"{path} is damaged, or not a NumPy array: {error or type(error).__name__}") from error
    if tokens.ndim != 1 or tokens.dtype.str not in ("<u2", "<u4"):
        held = f"{tokens.dtype} of shape {tokens.shape}"
        raise UserError(f"{path} holds {held} instead of a row of little-endian uint16 or uint32")
    return TokenFile(path, tokens.dtype.str, tokens.offset, len(tokens))


def _own_tokenizer(directory: Path) -> Tokenizer | None:
    """The tokenizer in `tokenizer.json`, otherwise nanoGPT's characters (`meta.pkl`), otherwise None."""
    if (directory / TOKENIZER).exists():
        return load_tokenizer(directory / TOKENIZER)
    path = directory / "meta.pkl"
    if not path.exists():
        return None
    meta = read_plain_pickle(path)
    names, numbers = (meta.get("itos"), meta.get("stoi")) if isinstance(meta, dict) else (None, None)
    names = dict(enumerate(names)) if isinstance(names, list) else names
    if not isinstance(names, dict) or names.keys() != set(range(len(names))):
        raise UserError(f"{path} has no characters (itos) with ids from 0 on; put a {TOKENIZER} in its directory")
    texts = [names[i] for i in range(len(names))]
    for i, text in enumerate(texts):
        if not isinstance(text, str) or not text or (isinstance(numbers, dict) and numbers.get(text, i) != i):
            raise UserError(f"{path}: entry {i} of itos, {str(text)[:20]!r}, is not a text, or has another id in stoi")
    try:
        return vocabulary_tokenizer(texts)
    except UserError as error:
        raise UserError(f"cannot use {path}: {error}") from None


def _require_ids(file: TokenFile, largest: Sequence[int], above_one: Sequence[int], tokenizer: Tokenizer) -> None:
    """Raise `UserError` if the ids at even and at odd places (see `_scan`) are not tokens of the file's type."""
    # At most this is the upper half of a four-byte token. No text has GPT-2's ids 0 and 1 at every second place.
    upper = 1 if tokenizer.kind in ("gpt2", "bpe") else 0
    is_raw = not file.offset and file.dtype == "<u2" and file.tokens >= _TOO_FEW
    if is_raw and min(largest) <= upper and max(above_one) > file.tokens // 4:
        advice = "write them as little-endian uint16, or with numpy.save as NAME_train_0.npy and NAME_val_0.npy"
        raise UserError(
            f"{file.path} has tokens of four bytes: every second 16-bit number is at most {min(largest)};\n{advice}"
        )
    if max(largest) >= tokenizer.vocab_size:
        known = f"tokenizer {tokenizer.kind} has ids 0 to {tokenizer.vocab_size - 1}"
        advice = f"put the right {TOKENIZER} in its directory, and write tokens as little-endian numbers"
        raise UserError(f"{file.path} has token id {max(largest)}, but {known};\n{advice}")


def verify_token_files(directory: Path, force: bool) -> int:
    """Compare token files with what they were when first opened, and return their number; see `dataset.verify`."""
    files = list(itertools.chain(*open_token_files(directory)[0].values()))
    for file in files:
        if force and _scan(file) != remembered(file.path, _SCAN, partial(_scan, file)):
            raise UserError(f"{file.path} has changed since it was first opened, but its size and time have not")
    return len(files)


def _scan(file: TokenFile) -> dict[str, Any]:
    """The hash of all tokens, and at even and at odd places the largest id and the number of ids above 1."""
    digest, largest, above_one = hashlib.sha256(), [0, 0], [0, 0]
    for chunk in file.chunks():  # of an even number of tokens each
        digest.update(chunk.data)
        for place in range(2):
            largest[place] = max(largest[place], int(chunk[place::2].max(initial=0)))
            above_one[place] += int(np.count_nonzero(chunk[place::2] > 1))
    return {"sha256": digest.hexdigest(), "largest": largest, "above_one": above_one}


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
