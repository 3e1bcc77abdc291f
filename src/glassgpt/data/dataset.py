"""Datasets: token shards read as one sequence, with their tokenizer and manifest.

Shapes: `N` tokens in a split, `T` context length, `B` sequences per batch.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from glassgpt.data import formats
from glassgpt.data.formats import find_token_files, remembered
from glassgpt.data.shards import (
    COUNTS,
    DTYPES,
    INDEX_DTYPE,
    SPLITS,
    TOKENIZER,
    TokenFile,
    index_path,
    is_shard_name,
    read_index,
)
from glassgpt.tokenizers.builtin import Tokenizer, load_tokenizer
from glassgpt.utils.errors import UserError
from glassgpt.utils.files import read_sealed, readable, sha256_of
from glassgpt.utils.formatting import Log, ProgressLine, format_bytes

Ids = npt.NDArray[np.int64]

FORMAT, VERSION = "glassgpt-dataset", 2
MANIFEST = "manifest.json"
# Counts of the source in the manifest, and how tables name them.
SOURCE_COUNTS = {
    "documents": "documents with text in the source",
    "blank_documents": "blank documents, left out",
    "bad_rows": "rows without text, left out (--skip-bad)",
    "special_tokens": "special tokens such as <|endoftext|> in the text, encoded as letters (--split-on splits there)",
    "web_pages": "files that begin as web pages, read with their tags (pandoc -t plain FILE.html extracts the text)",
    "duplicates_removed": "duplicates, left out (--deduplicate)",
    "duplicates": "duplicates in the dataset",
    "validation_documents_in_train": "validation documents that are also in train",
}


class TokenStream:
    """The tokens (N,) of a split: one or several arrays, in memory or on disk, read as one sequence; errors name it."""

    def __init__(
        self,
        parts: Sequence[npt.NDArray[Any]],
        name: str = "text",
        indexes: Sequence[Path] | None = None,
        vocab_size: int | None = None,
    ) -> None:
        self.parts = parts
        self._views = [np.asarray(part) for part in parts]  # slicing a memmap object is ten times slower
        mapped = ((i, part) for i, part in enumerate(parts) if isinstance(part, np.memmap) and part.filename)
        self._files = {i: (path := Path(str(part.filename)), path.stat()) for i, part in mapped}
        self._ends = np.cumsum([0, *(len(part) for part in parts)])
        self.name, self.indexes, self.vocab_size = name, indexes, vocab_size

    def __len__(self) -> int:
        return int(self._ends[-1])

    def document_starts(self) -> Ids | None:
        """The position (documents,) of each document's first token, including its marks; None without an index."""
        if self.indexes is None:
            return None
        starts = [np.empty(0, dtype=np.int64)]
        for path, begin, end in zip(self.indexes, self._ends[:-1], self._ends[1:], strict=True):
            own = read_index(path)["start"].astype(np.int64)
            if (np.diff(own, prepend=0, append=end - begin) < 0).any():
                raise UserError(f"dataset {path.parent} is damaged: {path.name} is out of order; prepare it again")
            starts.append(own + begin)
        return np.concatenate(starts)

    def read(self, start: int, length: int) -> Ids:
        """Return tokens (length,) from `start` on, across parts. Raises as `windows` does."""
        return self.windows(np.array([start]), length).reshape(length)

    def windows(self, starts: Ids, length: int) -> Ids:
        """Return tokens (B, length) from each of the `starts` (B,) on, across parts.

        Raises `IndexError` outside 0 to N, and `UserError` if a file was damaged since it was verified: if it was cut
        off, or has an id outside the vocabulary, if that is known.
        """
        if not 0 <= starts.min() <= starts.max() + length <= len(self):
            raise IndexError(f"{length} tokens from {starts.min()} to {starts.max()} of {len(self)} of a {self.name}")
        self._require_complete(starts, length)
        tokens = np.empty((len(starts), length), dtype=np.int64)
        for row, start in zip(tokens, starts.tolist(), strict=True):
            filled, part = 0, int(np.searchsorted(self._ends, start, side="right")) - 1
            while filled < length:
                begin = start + filled - int(self._ends[part])
                piece = self._views[part][begin : begin + length - filled]
                row[filled : filled + len(piece)] = piece
                filled, part = filled + len(piece), part + 1
        if self.vocab_size is not None and length and tokens.max() >= self.vocab_size:
            problem = f"it has id {tokens.max()}, but there are {self.vocab_size:,} ids"
            raise UserError(f"the {self.name} is damaged: {problem}; a file has changed since it was opened")
        return tokens

    def _require_complete(self, starts: Ids, length: int) -> None:
        """Raise `UserError` if a file to be read was cut off since it was opened: reading it would kill the process."""
        parts = np.searchsorted(self._ends, [starts, starts + max(0, length - 1)], side="right") - 1
        for path, opened in (self._files[part] for part in np.unique(parts).tolist() if part in self._files):
            with suppress(FileNotFoundError):  # a file that was removed or replaced stays readable
                status = path.stat()
                if status.st_size < opened.st_size and status.st_ino == opened.st_ino:
                    raise UserError(f"{path} was cut off while it was used; prepare the dataset again")

    def evaluation_batches(
        self, context_length: int, batch_size: int, limit: int | None = None, rank: int = 0, world_size: int = 1
    ) -> Iterator[tuple[int, Ids, Ids]]:
        """Yield the position of a batch's first target, its inputs and its targets, both (B, T).

        Every token but the first is a target once, in the text's order. The last batch may hold fewer than `batch_size`
        windows; a remainder of r < T tokens comes at the end as (1, r). `limit` stops after this many targets. Each of
        several ranks gets every `world_size`-th batch, maybe none. Raises `UserError` for fewer than 2 tokens.
        """
        if len(self) < 2:
            raise UserError(f"the {self.name} has {len(self)} tokens, and evaluation needs at least 2; use more text")
        targets = len(self) - 1 if limit is None else min(limit, len(self) - 1)
        windows, remainder = divmod(targets, context_length)
        batches = [(first, min(batch_size, windows - first), context_length) for first in range(0, windows, batch_size)]
        if remainder:
            batches.append((windows, 1, remainder))
        for first, count, length in batches[rank::world_size]:
            start = first * context_length
            tokens = self.read(start, count * length + 1)
            yield start + 1, tokens[:-1].reshape(count, length), tokens[1:].reshape(count, length)


@dataclass(frozen=True)
class Dataset:
    """A dataset on disk: its splits, tokenizer and manifest, and a fingerprint of its content."""

    directory: Path
    files: Mapping[str, Sequence[TokenFile]]
    """The token files of each split."""
    train: TokenStream
    validation: TokenStream
    tokenizer: Tokenizer
    manifest: Mapping[str, Any]
    fingerprint: str
    """sha256 of the tokenizer and the tokens, without times and paths: equal for the same text prepared equally."""

    @property
    def is_prepared(self) -> bool:
        """Whether `prepare` wrote it; otherwise it has token files in another format, without an index."""
        return "format" in self.manifest

    @property
    def whole(self) -> TokenStream:
        """Both splits as one text."""
        parts = [*self.train.parts, *self.validation.parts]
        indexes = [*(self.train.indexes or ()), *(self.validation.indexes or ())] if self.is_prepared else None
        return TokenStream(parts, f"text of {self.manifest['source']['name']}", indexes, self.train.vocab_size)


def open_dataset(directory: Path, log: Log | None = None, *, check: bool = True) -> Dataset:
    """Open a prepared dataset, or a directory with token files of another project, after its verification.

    Without `check`, for another process's verification or to look at a damaged dataset, files have only their sizes
    compared, and ids may be outside the vocabulary. Raises `UserError` as `load_manifest` and `verify` do.
    """
    manifest = read_manifest(directory)
    is_prepared = manifest is not None
    if manifest is None:
        files, tokenizer, manifest = formats.open_token_files(directory)  # which compares them
    else:
        verify_files(directory, manifest, log) if check else _require_files(directory, manifest)
        dtype, tokenizer = DTYPES[manifest["dtype"]], load_tokenizer(directory / TOKENIZER)
        shards = {split: manifest["splits"][split]["shards"] for split in SPLITS}
        files = {
            split: [TokenFile(directory / each["name"], dtype, 0, each["tokens"]) for each in shards[split]]
            for split in SPLITS
        }
    train, validation = (
        TokenStream(
            [file.open() for file in files[split]],
            f"{split} split of {manifest['source']['name']}",
            [index_path(file.path) for file in files[split]] if is_prepared else None,
            tokenizer.vocab_size if check else None,
        )
        for split in SPLITS
    )
    content = {
        "tokenizer": manifest["tokenizer"]["sha256"],
        "dtype": manifest["dtype"],
        "shards": {split: [shard["sha256"] for shard in manifest["splits"][split]["shards"]] for split in SPLITS},
    }
    fingerprint = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return Dataset(directory, files, train, validation, tokenizer, manifest, fingerprint)


def load_manifest(directory: Path) -> dict[str, Any]:
    """Load the manifest of a dataset, or make one for token files of another project.

    Raises `UserError` if the directory is not a dataset, or a file has a wrong size; `verify` also compares hashes.
    """
    manifest = read_manifest(directory)
    if manifest is None:
        return formats.open_token_files(directory)[2]
    _require_files(directory, manifest)
    return manifest


def is_dataset(directory: Path) -> bool:
    """Whether a directory is a dataset, even a damaged one."""
    return was_prepared(directory) or bool(find_token_files(directory))


def was_prepared(directory: Path) -> bool:
    """Whether `prepare` wrote a directory: it has shards, or a manifest of some."""
    with readable(directory):
        if directory.is_dir() and any(is_shard_name(path.name) for path in directory.iterdir()):
            return True
    with suppress(UserError):
        return _read(directory).get("format") == FORMAT
    return False


def read_manifest(directory: Path) -> dict[str, Any] | None:
    """The manifest of a prepared dataset, None for other directories. Raises `UserError` if it is damaged."""
    if not was_prepared(directory):
        return None
    try:
        manifest = _read(directory)
    except UserError as error:
        raise _damaged(directory, str(error).partition("; ")[0]) from None
    if (manifest.get("format"), manifest.get("version")) != (FORMAT, VERSION):
        raise _damaged(directory, f"{MANIFEST} has version {manifest.get('version')!r:.60} instead of {VERSION}")
    if not _is_valid(manifest):
        raise _damaged(directory, f"wrong or missing values in {MANIFEST}")
    return manifest


def _read(directory: Path) -> dict[str, Any]:
    return read_sealed(directory / MANIFEST, needs_checksum=False)  # datasets of 0.2 have none


def _is_valid(manifest: Mapping[str, Any]) -> bool:
    """Whether all that is read from a manifest is there, has the right types, and is consistent."""
    try:
        splits = [manifest["splits"][split] for split in SPLITS]
        shards = [shard for split in splits for shard in split["shards"]]
        identities, tokenizer = manifest["source"]["identity"], manifest["tokenizer"]
        texts = [manifest["source"]["name"], manifest["request"]["source"], tokenizer["kind"], tokenizer["sha256"]]
        texts += [shard[key] for shard in shards for key in ("name", "sha256", "index_sha256")]
        counts = {"special_tokens": 0, "web_pages": 0, **manifest}  # version 0.2 did not count these
        numbers = [tokenizer["vocab_size"], *(counts[key] for key in SOURCE_COUNTS)]
        numbers += [each[key] for each in (*splits, *shards) for key in COUNTS]
        return (
            manifest["dtype"] in DTYPES
            and isinstance(identities, list)
            and all(isinstance(each, dict) for each in identities)
            and all(isinstance(text, str) for text in texts)
            and all(is_shard_name(shard["name"], ".bin") for shard in shards)
            and all(type(number) is int and 0 <= number < 1 << 62 for number in numbers)
            and all(split["shards"] for split in splits)
            and all(split[key] == sum(each[key] for each in split["shards"]) for split in splits for key in COUNTS)
        )
    except (KeyError, TypeError):
        return False


def files_of(manifest: Mapping[str, Any]) -> dict[str, tuple[int | None, str]]:
    """The size (None: any) and the sha256 of each file of a prepared dataset, by name, except the manifest."""
    width = np.dtype(DTYPES[manifest["dtype"]]).itemsize
    files: dict[str, tuple[int | None, str]] = {TOKENIZER: (None, manifest["tokenizer"]["sha256"])}
    for shard in (shard for split in SPLITS for shard in manifest["splits"][split]["shards"]):
        files[shard["name"]] = shard["tokens"] * width, shard["sha256"]
        files[index_path(Path(shard["name"])).name] = shard["documents"] * INDEX_DTYPE.itemsize, shard["index_sha256"]
    return files


def _require_files(directory: Path, manifest: Mapping[str, Any]) -> None:
    """Raise `UserError` if a file is missing, or has a wrong size or (the tokenizer) another hash."""
    for name, (size, sha256) in files_of(manifest).items():
        path = directory / name
        with readable(directory):
            if not path.is_file():
                raise _damaged(directory, f"{name} is missing")
            if size is None and sha256_of(path) != sha256:
                raise _damaged(directory, f"{name} has changed")
            if size is not None and path.stat().st_size != size:
                raise _damaged(directory, f"{name} has {path.stat().st_size} bytes instead of {size}")


class DamagedDatasetError(UserError):
    """A prepared dataset is not what `prepare` wrote."""


def _damaged(directory: Path, damage: str) -> UserError:
    advice = "prepare it again with the same command, or restore it"
    return DamagedDatasetError(f"dataset {directory} is damaged: {damage};\n{advice}")


def verify(directory: Path, log: Log | None = None, *, force: bool = False) -> int:
    """Compare every file of a dataset with its sha256 and return the number of files. Raises `UserError`.

    Without `force`, a file is read once while its size, time and inode stay the same. Other projects' files have no
    recorded sha256: they are compared with what they were when first opened.
    """
    manifest = read_manifest(directory)
    if manifest is None:
        return formats.verify_token_files(directory, force)
    return verify_files(directory, manifest, log, force)


def verify_files(directory: Path, manifest: Mapping[str, Any], log: Log | None = None, force: bool = False) -> int:
    """Verify a prepared dataset as `verify` does."""
    _require_files(directory, manifest)
    expected = {directory / name: sha256 for name, (_, sha256) in files_of(manifest).items()}
    total, done, progress = sum(path.stat().st_size for path in expected), 0, ProgressLine(log)
    for path, sha256 in expected.items():
        with readable(path):
            actual = remembered(path, "sha256", partial(sha256_of, path), force)
            if actual != sha256 and not force:  # what is remembered may itself be damaged
                actual = remembered(path, "sha256", partial(sha256_of, path), force=True)
        if actual != sha256:
            raise _damaged(directory, f"the content of {path.name} has changed")
        done += path.stat().st_size
        progress.update(f"verified {format_bytes(done)} of {format_bytes(total)}")
    return len(expected)


def remember_hashes(directory: Path) -> None:
    """Remember the hashes of a dataset that was just written, so that `verify` reads its files only after a change."""
    for name, (_, sha256) in files_of(load_manifest(directory)).items():
        remembered(directory / name, "sha256", partial(str, sha256))
