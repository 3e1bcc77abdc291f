"""Token shards on the disk: whole documents one after the other, and beside each shard an index of where they start.

A shard `NAME.bin` is raw little-endian `uint16` or `uint32`. Its index `NAME.idx` has two little-endian `uint64` a document: the
token it starts at, and a hash of its text by which duplicates are found (see `text_hash`; of a document larger than a shard, of
what the first one has). While a dataset is being made, `NAME.json` says that a shard is finished: what a killed process leaves
without one is written anew.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from glassgpt.utils.files import flush_to_disk, sha256_of, write_atomic

SPLITS = ("train", "validation")
TOKENIZER = "tokenizer.json"
DTYPES: Mapping[str, str] = {"uint16": "<u2", "uint32": "<u4"}
INDEX_DTYPE = np.dtype([("start", "<u8"), ("hash", "<u8")])
# Tokens kept back, so that the disk is not asked for each document.
_BUFFERED = 1 << 20
# Tokens read at once where all of them are.
_CHUNK_TOKENS = 1 << 22


def text_bytes(text: str) -> bytes:
    """A text in UTF-8. Half a surrogate pair, which a tokenizer refuses with its place, passes here."""
    return text.encode("utf-8", "surrogatepass")


def text_hash(data: bytes, before: int | None = None) -> int:
    """64 bits that tell texts apart; of a text in parts, the last one's, each given the hash of those before it."""
    digest = hashlib.blake2b(b"" if before is None else before.to_bytes(8, "little"), digest_size=8)
    digest.update(data)
    return int.from_bytes(digest.digest(), "little")


@dataclass
class _Extent:
    """How far a shard reaches."""

    tokens: int = 0
    bytes: int = 0
    characters: int = 0


class ShardWriter:
    """Writes documents into shards of at most `limit` tokens, each document into one, unless it is larger than a shard by itself.

    It goes on behind the shards that are finished already: the documents before number `done` are in them.
    """

    def __init__(self, directory: Path, prefix: str, dtype: str, limit: int) -> None:
        self._directory, self._prefix, self._dtype, self._limit = directory, prefix, np.dtype(DTYPES[dtype]), limit
        finished = finished_shards(directory, prefix)
        self._number = len(finished)
        # Tokens of a document that goes on from the last finished shard into the next one.
        self._to_drop = int(finished[-1]["unfinished"]) if finished else 0
        # The rest of a text cut in two begins nowhere, and so counts as no document where it is finished: hence at least one.
        self.done = max(sum(shard["documents"] for shard in finished), bool(finished)) - (self._to_drop > 0)
        """Number of the first document, from 0, of which something is still to be written."""
        # Where the last document begins in this shard, zero also for one that goes on from the shard before; and its tokens there.
        self._open = _Extent()
        self._open_before = self._to_drop
        self._begin()

    def add(self, ids: npt.NDArray[np.uint32], text: str, begins: bool) -> None:
        """Append a document, or (`begins` false) a further part of the last one; `ids` are its tokens, marks included."""
        data = text_bytes(text)
        counted = _Extent(0, len(data), len(text))
        if self._to_drop:
            dropped = min(self._to_drop, len(ids))
            self._to_drop, ids, begins, counted = self._to_drop - dropped, ids[dropped:], False, _Extent()
        if self._end.tokens and self._end.tokens + len(ids) > self._limit:
            if begins:
                self._finish()
            elif self._open.tokens:
                self._move_open_document()
            elif self._end.tokens == self._limit:
                self._finish_within_document()
        if begins:
            self._open, self._open_before = _Extent(self._end.tokens, self._end.bytes, self._end.characters), 0
            self._documents.append((self._end.tokens, text_hash(data)))
        elif self._documents:
            start, before = self._documents[-1]
            self._documents[-1] = (start, text_hash(data, before))
        self._end.bytes += counted.bytes
        self._end.characters += counted.characters
        while self._end.tokens + len(ids) > self._limit:  # larger than a whole shard, so it fills several
            room = self._limit - self._end.tokens
            self._put(ids[:room])
            ids = ids[room:]
            self._finish_within_document()
        self._put(ids)

    def close(self) -> None:
        """Finish the last shard; of one that has no token nothing is left."""
        if self._end.tokens:
            self._finish()
        self.abandon()
        self._path(".bin").unlink()

    def abandon(self) -> None:
        """Close the file and leave it as it is: unfinished."""
        self._file.close()

    def _path(self, suffix: str) -> Path:
        return self._directory / f"{self._prefix}-{self._number:05d}{suffix}"

    def _begin(self) -> None:
        self._end = _Extent()
        self._open = _Extent()
        self._documents: list[tuple[int, int]] = []
        self._pending: list[npt.NDArray[np.uint32]] = []
        self._pending_tokens = 0
        self._file: IO[bytes] = open(self._path(".bin"), "wb")  # noqa: SIM115 - closed when the shard is finished

    def _put(self, ids: npt.NDArray[np.uint32]) -> None:
        self._pending.append(ids)
        self._pending_tokens += len(ids)
        self._end.tokens += len(ids)
        if self._pending_tokens >= _BUFFERED:
            self._flush()

    def _flush(self) -> None:
        if self._pending:
            self._file.write(np.concatenate(self._pending).astype(self._dtype).tobytes())
        self._pending, self._pending_tokens = [], 0

    def _move_open_document(self) -> None:
        """Finish the shard before the document that has outgrown it, and begin the next one with what there is of that."""
        self._flush()
        self._file.flush()
        begun, whole, (_, digest) = self._open, self._end, self._documents.pop()
        path = self._path(".bin")
        part = np.fromfile(path, self._dtype, offset=begun.tokens * self._dtype.itemsize).astype(np.uint32)
        self._file.truncate(begun.tokens * self._dtype.itemsize)
        self._end = begun
        self._finish()
        self._documents.append((0, digest))
        self._put(part)
        self._end.bytes, self._end.characters = whole.bytes - begun.bytes, whole.characters - begun.characters

    def _finish_within_document(self) -> None:
        self._open_before += self._limit
        self._finish(unfinished=self._open_before)

    def _finish(self, unfinished: int = 0) -> None:
        """Put the shard and its index on the disk for good, and say so. `unfinished`: see `finished_shards`."""
        self._flush()
        self._file.close()
        index = index_path(self._path(".bin"))
        index.write_bytes(np.array(self._documents, dtype=INDEX_DTYPE).tobytes())  # tofile's errors do not say why
        for path in (self._path(".bin"), index):
            flush_to_disk(path)
        entry = {
            "name": self._path(".bin").name,
            **vars(self._end),
            "documents": len(self._documents),
            "sha256": sha256_of(self._path(".bin")),
            "index_sha256": sha256_of(index),
            "unfinished": unfinished,
        }
        write_atomic(self._path(".json"), json.dumps(entry))
        self._number += 1
        self._begin()


def finished_shards(directory: Path, prefix: str) -> list[dict[str, Any]]:
    """The manifest's entries of the shards that are finished, in their order.

    `unfinished` is the number of tokens, in this shard and those before it, of a document that goes on in the next one; else 0.
    """
    entries: list[dict[str, Any]] = []
    while (path := directory / f"{prefix}-{len(entries):05d}.json").is_file():
        entries.append(json.loads(path.read_bytes()))
    return entries


def index_path(shard: Path) -> Path:
    """The index of a shard."""
    return shard.with_suffix(".idx")


def read_index(path: Path) -> npt.NDArray[Any]:
    """An index (documents,) with the fields `start` and `hash`."""
    return np.fromfile(path, INDEX_DTYPE)


@dataclass(frozen=True)
class TokenFile:
    """Tokens in a file, behind `offset` bytes of header."""

    path: Path
    dtype: str
    offset: int
    tokens: int

    def open(self) -> npt.NDArray[Any]:
        """The tokens (tokens,), read from the disk when they are used."""
        return np.memmap(self.path, self.dtype, "r", self.offset, (self.tokens,))

    def chunks(self) -> Iterator[npt.NDArray[Any]]:
        """The tokens some millions at a time, each of which is gone from memory when the next one comes: mapped, they would all stay."""
        width = np.dtype(self.dtype).itemsize
        for start in range(0, self.tokens, _CHUNK_TOKENS):
            yield np.fromfile(
                self.path, self.dtype, min(_CHUNK_TOKENS, self.tokens - start), offset=self.offset + start * width
            )
