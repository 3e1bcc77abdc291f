"""Datasets: token shards as one sequence, with the tokenizer that made them.

Shapes: `N` tokens in a split, `T` context length, `B` sequences a batch.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from glassgpt.data.formats import foreign_files, foreign_manifest, foreign_tokenizer, open_shards
from glassgpt.data.shards import DTYPES, INDEX_DTYPE, SPLITS, TOKENIZER, index_path, read_index
from glassgpt.tokenizers.builtin import Tokenizer, load_tokenizer
from glassgpt.utils.errors import UserError
from glassgpt.utils.files import sha256_of

Ids = npt.NDArray[np.int64]

FORMAT, VERSION = "glassgpt-dataset", 2
MANIFEST = "manifest.json"


class TokenStream:
    """The tokens (N,) of a split: one or several arrays, in memory or on disk, read as one sequence."""

    def __init__(
        self, parts: Sequence[npt.NDArray[Any]], name: str = "text", indexes: Sequence[Path] | None = None
    ) -> None:
        self.parts = [np.asarray(part) for part in parts]  # plain views: slicing a memmap object is ten times slower
        self._ends = np.cumsum([0, *(len(part) for part in parts)])
        self.name = name
        """What an error calls it, such as `train split of …`."""
        self._indexes = indexes

    def __len__(self) -> int:
        return int(self._ends[-1])

    def joined(self, other: "TokenStream", name: str) -> "TokenStream":
        """This text and another one behind it."""
        known = self._indexes is not None and other._indexes is not None
        return TokenStream(
            [*self.parts, *other.parts], name, [*(self._indexes or ()), *(other._indexes or ())] if known else None
        )

    def document_starts(self) -> Ids | None:
        """The first token (documents,) of each document that starts here, in order; None where that is not known.

        A document's tokens begin with the marks that its tokenizer puts before a text. The first one here may go on from before.
        """
        if self._indexes is None:
            return None
        starts = [
            read_index(path)["start"].astype(np.int64) + end
            for path, end in zip(self._indexes, self._ends[:-1], strict=True)
        ]
        return np.concatenate([*starts, np.empty(0, dtype=np.int64)])

    def read(self, start: int, length: int) -> Ids:
        """Tokens (length,) from `start` on, across the borders of parts. Raises `IndexError` outside 0 to N."""
        if not 0 <= start <= start + length <= len(self):
            raise IndexError(f"tokens {start} to {start + length} of a {self.name} that has {len(self)}")
        tokens = np.empty(length, dtype=np.int64)
        filled = 0
        part = int(np.searchsorted(self._ends, start, side="right")) - 1
        while filled < length:
            begin = start + filled - int(self._ends[part])
            piece = self.parts[part][begin : begin + length - filled]
            tokens[filled : filled + len(piece)] = piece
            filled, part = filled + len(piece), part + 1
        return tokens

    def evaluation_batches(
        self, context_length: int, batch_size: int, limit: int | None = None, rank: int = 0, world_size: int = 1
    ) -> Iterator[tuple[int, Ids, Ids]]:
        """The place of a batch's first target, its inputs and its targets, both (B, T): every token but the first is a target once.

        They come in the text's order, and the windows do not overlap. The last batch may hold fewer than `batch_size` of them, and
        a remainder of r < T tokens comes at the end as (1, r). `limit` stops after that many targets. Of several ranks each gets
        every `world_size`-th batch, maybe none. Raises `UserError` for fewer than 2 tokens.
        """
        if len(self) < 2:
            raise UserError(f"the {self.name} has {len(self)} tokens, and it takes 2 to evaluate; give more text")
        targets = len(self) - 1 if limit is None else min(limit, len(self) - 1)
        windows, remainder = divmod(targets, context_length)
        batches = [
            (first * context_length, min(batch_size, windows - first), context_length)
            for first in range(0, windows, batch_size)
        ]
        if remainder:
            batches.append((windows * context_length, 1, remainder))
        for start, count, length in batches[rank::world_size]:
            tokens = self.read(start, count * length + 1)
            yield start + 1, tokens[:-1].reshape(count, length), tokens[1:].reshape(count, length)


@dataclass(frozen=True)
class Dataset:
    """A prepared dataset: both splits, the tokenizer that made them, the manifest, and a fingerprint of it all."""

    directory: Path
    train: TokenStream
    validation: TokenStream
    tokenizer: Tokenizer
    manifest: Mapping[str, Any]
    fingerprint: str
    """sha256 over tokenizer and tokens, without times and paths: the same text prepared in the same way has the same one."""

    @property
    def whole(self) -> TokenStream:
        """Both splits as one text."""
        return self.train.joined(self.validation, f"text of {self.manifest['source']['name']}")


def open_dataset(directory: Path) -> Dataset:
    """Open what `prepare` has made, or token files of another project. The tokens stay on disk until they are read.

    Raises `UserError` where the directory is no dataset, or a file is missing or of the wrong size (`prepare.verify` also
    compares the shards' hashes).
    """
    manifest = read_manifest(directory)
    if manifest is None and foreign_files(directory) is not None:
        return _open_foreign(directory)
    if manifest is None:
        raise UserError(
            f"{directory} is no prepared dataset (it has no {MANIFEST} of one); make one: glassgpt prepare SOURCE --out DIR"
        )
    refuse_damage(directory, manifest)
    train, validation = (_open_split(directory, manifest, split) for split in SPLITS)
    tokenizer = load_tokenizer(directory / TOKENIZER)
    return Dataset(directory, train, validation, tokenizer, manifest, _fingerprint(manifest))


def _open_foreign(directory: Path) -> Dataset:
    manifest, shards = foreign_manifest(directory), open_shards(directory)
    train, validation = (
        TokenStream([shard.open() for shard in shards[split]], f"{split} split of {manifest['source']['name']}")
        for split in SPLITS
    )
    return Dataset(directory, train, validation, foreign_tokenizer(directory), manifest, _fingerprint(manifest))


def dataset_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a dataset that is as whole as can be told without reading all tokens. Raises `UserError` where it is not."""
    manifest = read_manifest(directory)
    if manifest is None:
        return foreign_manifest(directory)
    refuse_damage(directory, manifest)
    return manifest


def is_dataset(directory: Path) -> bool:
    """Whether a directory holds what `open_dataset` opens, or something that means to be that and is damaged."""
    return read_manifest(directory) is not None or foreign_files(directory) is not None


def _open_split(directory: Path, manifest: Mapping[str, Any], split: str) -> TokenStream:
    dtype = DTYPES[manifest["dtype"]]
    shards = manifest["splits"][split]["shards"]
    paths = [directory / shard["name"] for shard in shards]
    maps = [
        np.memmap(path, dtype=dtype, mode="r", shape=(shard["tokens"],))
        for path, shard in zip(paths, shards, strict=True)
    ]
    return TokenStream(maps, f"{split} split of {manifest['source']['name']}", [index_path(path) for path in paths])


def _fingerprint(manifest: Mapping[str, Any]) -> str:
    content = {
        "tokenizer": manifest["tokenizer"]["sha256"],
        "dtype": manifest["dtype"],
        "shards": {split: [shard["sha256"] for shard in manifest["splits"][split]["shards"]] for split in SPLITS},
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_manifest(directory: Path) -> dict[str, Any] | None:
    """The manifest of a dataset's directory; nothing where there is none, or one of something else or of another version."""
    try:
        manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    ours = isinstance(manifest, dict) and manifest.get("format") == FORMAT and manifest.get("version") == VERSION
    return manifest if ours else None


def shards_of(manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The manifest's entries of all shards, those for training first."""
    return [shard for split in SPLITS for shard in manifest["splits"][split]["shards"]]


def files_of(manifest: Mapping[str, Any]) -> set[str]:
    """The names of all files of a dataset that `prepare` has made."""
    shards = [shard["name"] for shard in shards_of(manifest)]
    return {MANIFEST, TOKENIZER, *shards, *(index_path(Path(name)).name for name in shards)}


def find_damage(directory: Path, manifest: Mapping[str, Any]) -> str | None:
    """What is wrong with a dataset's files, as far as can be told without reading all tokens; nothing where they seem whole."""
    width = np.dtype(DTYPES[manifest["dtype"]]).itemsize
    for shard in shards_of(manifest):
        path = directory / shard["name"]
        for file, expected in (
            (path, shard["tokens"] * width),
            (index_path(path), shard["documents"] * INDEX_DTYPE.itemsize),
        ):
            if not file.is_file():
                return f"{file.name} is missing"
            if file.stat().st_size != expected:
                return f"{file.name} has {file.stat().st_size} bytes and should have {expected}"
    tokenizer = directory / TOKENIZER
    if not tokenizer.is_file() or sha256_of(tokenizer) != manifest["tokenizer"]["sha256"]:
        return f"{TOKENIZER} is missing or changed"
    return None


def refuse_damage(directory: Path, manifest: Mapping[str, Any]) -> None:
    """Raise `UserError` for what `find_damage` finds."""
    if damage := find_damage(directory, manifest):
        raise UserError(f"the dataset {directory} is damaged: {damage}; remove the directory and prepare it again")
