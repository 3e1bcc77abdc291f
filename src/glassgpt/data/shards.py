"""Token shards on disk: whole documents one after another, each shard with an index of where they start.

A shard `NAME.bin` holds little-endian `uint16` or `uint32` tokens. Its index `NAME.idx` holds two little-endian
`uint64` per document: the token at which it starts, and a hash of its text, by which duplicates are found (see
`text_hash`; for a document larger than a shard, the hash of the part in its first shard). While a dataset is built,
`NAME.json` marks a finished shard: a shard without one is written again.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from glassgpt.tokenizers.base import encode_texts
from glassgpt.utils.errors import UserError
from glassgpt.utils.files import flush_to_disk, read_sealed, readable, sealed_json, sha256_of, write_atomic

SPLITS = ("train", "validation")
TOKENIZER = "tokenizer.json"
DTYPES: Mapping[str, str] = {"uint16": "<u2", "uint32": "<u4"}
INDEX_DTYPE = np.dtype([("start", "<u8"), ("hash", "<u8")])
COUNTS = ("characters", "bytes", "tokens", "documents")  # of a shard, and of a split
_NAME = re.compile(rf"({'|'.join(SPLITS)})-\d{{5,}}-\d{{5,}}\.(bin|idx)")
_BUFFER_BYTES = 1 << 21  # of a file that is written
_COMPARED = 1 << 22  # hashes compared at once
_CHUNK_TOKENS = 1 << 22  # read at once if all tokens of a file are read

Tokens = npt.NDArray[np.uint32]


def text_hashes(texts: Iterable[bytes]) -> npt.NDArray[np.uint64]:
    """A 64-bit hash (texts,) of each text."""
    digests = (hashlib.blake2b(text, digest_size=8).digest() for text in texts)
    return np.frombuffer(b"".join(digests), dtype="<u8").astype(np.uint64)


def text_hash(data: bytes, before: int | None = None) -> int:
    """The hash of a text. For a text in parts, hash each part with the hash of the parts `before` it."""
    return int(text_hashes([data if before is None else before.to_bytes(8, "little") + data])[0])


class Encoded(NamedTuple):
    """Documents of a split, encoded, or (`starts` false) a further part of the last one."""

    ids: Tokens
    offsets: npt.NDArray[np.int64]  # (documents + 1,), in `ids`
    texts: Sequence[str]
    starts: bool


class _Run(NamedTuple):
    """Consecutive documents as a shard has them, or a part of one."""

    ids: npt.NDArray[Any]
    entries: npt.NDArray[Any]  # of the index (documents,); `start` counts from the run's first token
    bytes: int
    characters: int
    starts: bool


class ShardWriter:
    """Writes documents into shards of at most `limit` tokens. Only a document larger than a shard is split.

    If the directory has finished shards, the writer continues after the last one that ends with a document.
    """

    def __init__(self, directory: Path, prefix: str, dtype: str, limit: int) -> None:
        self._directory, self._prefix, self._dtype, self._limit = directory, prefix, np.dtype(DTYPES[dtype]), limit
        finished = finished_shards(directory, prefix)
        while finished and finished[-1]["is_split"]:
            (directory / finished.pop()["name"]).with_suffix(".json").unlink()
        # The rest of a document that starts in the other split has no start here, so its shards count no document.
        self.done = max(sum(shard["documents"] for shard in finished), bool(finished))
        """The number of documents in finished shards, which must not be added again."""
        self._number = len(finished)
        self._held: list[_Run] = []  # of the last document, until it is known whether this shard has room for it
        self._hash = 0
        self._file: IO[bytes] | None = None
        self._start_shard()

    def add(self, documents: Encoded) -> None:
        """Append documents, or a further part of the last one."""
        offsets, ids = documents.offsets, documents.ids.astype(self._dtype)
        data = encode_texts(documents.texts)
        index = np.zeros(len(data), dtype=INDEX_DTYPE)
        index["hash"] = text_hashes(data) if documents.starts else text_hash(data[0], self._hash)
        self._hash = int(index["hash"][-1])

        def run(first: int, end: int) -> _Run:
            """Return the documents from `first` to `end`."""
            own = index[first:end]
            own["start"] = offsets[first:end] - offsets[first]
            sizes = [sum(map(len, texts[first:end])) for texts in (data, documents.texts)]
            return _Run(ids[offsets[first] : offsets[end]], own, sizes[0], sizes[1], documents.starts)

        first, last = 0, len(data) - 1
        if documents.starts:
            self._write_held()
            while first < last:
                # The documents that this shard has room for; at least one if it is empty.
                fitting = int(np.searchsorted(offsets, offsets[first] + self._limit - self._tokens, side="right")) - 1
                if fitting == first and self._tokens:
                    self._finish_shard()
                    continue
                end = min(max(fitting, first + 1), last)
                self._write(run(first, end))
                first = end
            self._is_written = False  # whether the start of the last document is in the shard already
        self._held.append(run(first, last + 1))
        held_tokens = sum(len(part.ids) for part in self._held)
        if not self._is_written and self._tokens and self._tokens + held_tokens > self._limit:
            self._finish_shard()
        if self._is_written or not self._tokens:
            self._write_held()

    def close(self) -> None:
        """Finish the last shard."""
        self._write_held()
        if self._tokens:
            self._finish_shard()

    def abandon(self) -> None:
        """Close the file and leave the shard unfinished."""
        if self._file is not None:
            with suppress(OSError):  # what is in its buffer may not fit on the disk
                self._file.close()

    def _start_shard(self) -> None:
        self._path = self._directory / f"{self._prefix}-{self._number:05d}.bin"
        self._tokens = self._bytes = self._characters = 0
        self._is_written = True
        self._index: list[npt.NDArray[Any]] = []
        self._sha256 = hashlib.sha256()

    def _write_held(self) -> None:
        held, self._held = self._held, []
        for part in held:
            self._write(part)
        self._is_written = True

    def _write(self, run: _Run) -> None:
        """Write documents that fit into the shard, or one or a part of one, which may go on in further shards."""
        if not run.starts and len(run.ids) and self._tokens == self._limit:
            self._finish_shard(is_split=True)
        if run.starts:
            run.entries["start"] += self._tokens
            self._index.append(run.entries)
        elif self._index:
            self._index[-1]["hash"][-1] = run.entries["hash"][-1]
        self._bytes += run.bytes
        self._characters += run.characters
        ids = run.ids
        while self._tokens + len(ids) > self._limit:
            room = self._limit - self._tokens
            self._write_tokens(ids[:room])
            ids = ids[room:]
            self._finish_shard(is_split=True)
        self._write_tokens(ids)

    def _write_tokens(self, ids: npt.NDArray[Any]) -> None:
        if self._file is None:
            self._file = open(self._path, "wb", _BUFFER_BYTES)  # noqa: SIM115
        content = ids.tobytes()
        self._file.write(content)
        self._sha256.update(content)
        self._tokens += len(ids)

    def _finish_shard(self, is_split: bool = False) -> None:
        """Flush the shard and its index to the disk, then mark them as finished."""
        assert self._file is not None
        self._file.close()
        self._file = None
        path = self._path
        index = index_path(path)
        # Not `tofile`, whose errors lack a reason.
        documents = np.concatenate([np.empty(0, dtype=INDEX_DTYPE), *self._index])
        index.write_bytes(documents.tobytes())
        flush_to_disk(path)
        flush_to_disk(index)
        entry = {
            "name": path.name,
            "tokens": self._tokens,
            "bytes": self._bytes,
            "characters": self._characters,
            "documents": len(documents),
            "sha256": self._sha256.hexdigest(),
            "index_sha256": sha256_of(index),
            "is_split": is_split,
        }
        write_atomic(path.with_suffix(".json"), sealed_json(entry))
        self._number += 1
        self._start_shard()


def finished_shards(directory: Path, prefix: str) -> list[dict[str, Any]]:
    """The manifest's entries of the finished shards in order; `is_split`: the last document continues in the next."""
    entries: list[dict[str, Any]] = []
    while (path := directory / f"{prefix}-{len(entries):05d}.json").is_file():
        entries.append(read_sealed(path))
    return entries


def is_intact(mark: Path) -> bool:
    """Whether the mark of a finished shard, its tokens and its index are as they were written; all are read."""
    try:
        entry, shard = read_sealed(mark), mark.with_suffix(".bin")
        return (sha256_of(shard), sha256_of(index_path(shard))) == (entry["sha256"], entry["index_sha256"])
    except (OSError, UserError):
        return False


def is_shard_name(name: str, suffix: str = "") -> bool:
    """Whether a file of this name is a shard or an index."""
    return _NAME.fullmatch(name) is not None and name.endswith(suffix)


def index_path(shard: Path) -> Path:
    """The path of a shard's index."""
    return shard.with_suffix(".idx")


def read_index(path: Path) -> npt.NDArray[Any]:
    """Read an index (documents,) with the fields `start` and `hash`."""
    return np.fromfile(path, INDEX_DTYPE)


def count_repeats(train: Sequence[Path], validation: Sequence[Path]) -> tuple[int, int]:
    """The documents in these indexes with the text of an earlier one, and those of validation that are also in train.

    Hashes are compared a range of values at a time, for which the indexes are read again: memory stays limited.
    """
    documents = sum(path.stat().st_size for path in (*train, *validation)) // INDEX_DTYPE.itemsize
    ranges = np.uint64(1 + documents // _COMPARED)
    repeated = common = 0
    for number in range(int(ranges)):
        ours, theirs = (
            np.sort(np.concatenate([h[h % ranges == number] for h in (read_index(path)["hash"] for path in paths)]))
            for paths in (train, validation)
        )
        # Sorting takes a tenth of the time of np.unique and np.isin.
        repeated += int((np.diff(np.sort(np.concatenate([ours, theirs]))) == 0).sum())
        common += int((np.searchsorted(ours, theirs, side="right") > np.searchsorted(ours, theirs)).sum())
    return repeated, common


@dataclass(frozen=True)
class TokenFile:
    """Tokens in a file, after a header of `offset` bytes."""

    path: Path
    dtype: str
    offset: int
    tokens: int

    def open(self) -> npt.NDArray[Any]:
        """Map the tokens (tokens,) into memory; they are read from the disk when used."""
        with readable(self.path):
            return np.memmap(self.path, self.dtype, "r", self.offset, (self.tokens,))

    def chunks(self) -> Iterator[npt.NDArray[Any]]:
        """Read the tokens a few million at a time, freeing each chunk; mapped, all of them would stay in memory."""
        width = np.dtype(self.dtype).itemsize
        for start in range(0, self.tokens, _CHUNK_TOKENS):
            count = min(_CHUNK_TOKENS, self.tokens - start)
            yield np.fromfile(self.path, self.dtype, count, offset=self.offset + start * width)
