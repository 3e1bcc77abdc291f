"""Token shards on disk: whole documents one after another, each shard with an index of where they start.

A shard `NAME.bin` holds little-endian `uint16` or `uint32` tokens. Its index `NAME.idx` holds two little-endian
`uint64` per document: the token at which it starts, and a hash of its text, by which duplicates are found (see
`text_hash`; for a document larger than a shard, the hash of the part in its first shard). While a dataset is built,
`NAME.json` marks a finished shard: a shard without one is written again.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from glassgpt.tokenizers.base import encode_text
from glassgpt.utils.files import flush_to_disk, sha256_of, write_atomic

SPLITS = ("train", "validation")
TOKENIZER = "tokenizer.json"
DTYPES: Mapping[str, str] = {"uint16": "<u2", "uint32": "<u4"}
INDEX_DTYPE = np.dtype([("start", "<u8"), ("hash", "<u8")])
_NAME = re.compile(rf"({'|'.join(SPLITS)})-\d{{5,}}-\d{{5,}}\.(bin|idx)")
_BUFFER_BYTES = 1 << 21  # of a file that is written
_CHUNK_TOKENS = 1 << 22  # read at once if all tokens of a file are read

Tokens = npt.NDArray[np.uint32]


def text_hash(data: bytes, before: int | None = None) -> int:
    """A 64-bit hash of a text. For a text in parts, hash each part with the hash of the parts `before` it."""
    digest = hashlib.blake2b(b"" if before is None else before.to_bytes(8, "little"), digest_size=8)
    digest.update(data)
    return int.from_bytes(digest.digest(), "little")


class _Part(NamedTuple):
    """A document or a part of one, encoded. `hash` is that of the document up to here."""

    ids: npt.NDArray[Any]
    bytes: int
    characters: int
    hash: int
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
        self._held: list[_Part] = []  # of the last document, until it is known whether this shard has room for it
        self._hash = 0
        self._file: IO[bytes] | None = None
        self._start_shard()

    def add(self, ids: Tokens, text: str, starts: bool) -> None:
        """Append a document, or (`starts` false) a further part of the last one, with its tokens and its text."""
        if starts:
            self._write_held()
            self._is_written = False  # whether the start of the last document is in the shard already
        data = encode_text(text)
        self._hash = text_hash(data, None if starts else self._hash)
        self._held.append(_Part(ids.astype(self._dtype), len(data), len(text), self._hash, starts))
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
        self._documents: list[tuple[int, int]] = []
        self._sha256 = hashlib.sha256()

    def _write_held(self) -> None:
        held, self._held = self._held, []
        for part in held:
            if not part.starts and len(part.ids) and self._tokens == self._limit:
                self._finish_shard(is_split=True)
            if part.starts:
                self._documents.append((self._tokens, part.hash))
            elif self._documents:
                self._documents[-1] = (self._documents[-1][0], part.hash)
            self._bytes += part.bytes
            self._characters += part.characters
            ids = part.ids
            while self._tokens + len(ids) > self._limit:
                room = self._limit - self._tokens
                self._write_tokens(ids[:room])
                ids = ids[room:]
                self._finish_shard(is_split=True)
            self._write_tokens(ids)
        self._is_written = True

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
        index.write_bytes(np.array(self._documents, dtype=INDEX_DTYPE).tobytes())
        flush_to_disk(path)
        flush_to_disk(index)
        entry = {
            "name": path.name,
            "tokens": self._tokens,
            "bytes": self._bytes,
            "characters": self._characters,
            "documents": len(self._documents),
            "sha256": self._sha256.hexdigest(),
            "index_sha256": sha256_of(index),
            "is_split": is_split,
        }
        write_atomic(path.with_suffix(".json"), json.dumps(entry))
        self._number += 1
        self._start_shard()


def finished_shards(directory: Path, prefix: str) -> list[dict[str, Any]]:
    """The manifest's entries of the finished shards in order; `is_split`: the last document continues in the next."""
    entries: list[dict[str, Any]] = []
    while (path := directory / f"{prefix}-{len(entries):05d}.json").is_file():
        entries.append(json.loads(path.read_bytes()))
    return entries


def is_shard_name(name: str) -> bool:
    """Whether a file of this name is a shard or an index."""
    return _NAME.fullmatch(name) is not None


def index_path(shard: Path) -> Path:
    """The path of a shard's index."""
    return shard.with_suffix(".idx")


def read_index(path: Path) -> npt.NDArray[Any]:
    """Read an index (documents,) with the fields `start` and `hash`."""
    return np.fromfile(path, INDEX_DTYPE)


@dataclass(frozen=True)
class TokenFile:
    """Tokens in a file, after a header of `offset` bytes."""

    path: Path
    dtype: str
    offset: int
    tokens: int

    def open(self) -> npt.NDArray[Any]:
        """Map the tokens (tokens,) into memory; they are read from the disk when used."""
        return np.memmap(self.path, self.dtype, "r", self.offset, (self.tokens,))

    def chunks(self) -> Iterator[npt.NDArray[Any]]:
        """Read the tokens a few million at a time, freeing each chunk; mapped, all of them would stay in memory."""
        width = np.dtype(self.dtype).itemsize
        for start in range(0, self.tokens, _CHUNK_TOKENS):
            count = min(_CHUNK_TOKENS, self.tokens - start)
            yield np.fromfile(self.path, self.dtype, count, offset=self.offset + start * width)
