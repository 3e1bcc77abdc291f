"""Token shards as one sequence, and batches as a pure function of the step.

Shapes: `N` tokens in a split, `T` context length, `B` sequences a batch. A window is T + 1 tokens: T inputs and, one further,
T targets; the last token of one window is the first of the next, so every token between them is predicted once.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ..errors import UserError
from ..files import sha256_of
from ..seeding import seed_for
from ..tokenizers import Tokenizer, load_tokenizer

Ids = npt.NDArray[np.int64]

FORMAT, VERSION = "glassgpt-dataset", 1
MANIFEST, TOKENIZER = "manifest.json", "tokenizer.json"
SPLITS = ("train", "validation")
DTYPES: Mapping[str, str] = {"uint16": "<u2", "uint32": "<u4"}


class TokenStream:
    """The tokens (N,) of a split: one or several arrays, in memory or on disk, read as one sequence."""

    def __init__(self, parts: Sequence[npt.NDArray[Any]], name: str = "text") -> None:
        self.parts = [np.asarray(part) for part in parts]  # plain views: slicing a memmap object is ten times slower
        self._ends = np.cumsum([0, *(len(part) for part in parts)])
        self.name = name
        """What an error calls it, such as `train split of …`."""

    def __len__(self) -> int:
        return int(self._ends[-1])

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

    def evaluation_batches(self, context_length: int, batch_size: int, limit: int | None = None) -> Iterator[tuple[Ids, Ids]]:
        """Inputs and targets, both (B, T), in which every token but the first is a target exactly once, in the text's order.

        The windows do not overlap. The last batch may hold fewer than `batch_size` of them, and a remainder of r < T tokens
        comes at the end as (1, r). `limit` stops after that many targets. Raises `UserError` for fewer than 2 tokens.
        """
        if len(self) < 2:
            raise UserError(f"the {self.name} has {len(self)} tokens, and it takes 2 to evaluate; give more text")
        targets = len(self) - 1 if limit is None else min(limit, len(self) - 1)
        windows, remainder = divmod(targets, context_length)
        for first in range(0, windows, batch_size):
            count = min(batch_size, windows - first)
            yield self._windows(first * context_length, count, context_length)
        if remainder:
            yield self._windows(windows * context_length, 1, remainder)

    def _windows(self, start: int, count: int, length: int) -> tuple[Ids, Ids]:
        tokens = self.read(start, count * length + 1)
        return tokens[:-1].reshape(count, length), tokens[1:].reshape(count, length)


class Batches:
    """`batch_at(step)` draws the whole global batch from (seed, epoch, step): there is no other state, so none to save.

    An epoch has n = (N - T) // T windows side by side, which tile the text from an offset in [0, T) drawn anew each epoch, so
    that over the epochs a token is seen in every place of the context. (A text of T + 1 to 2T - 1 tokens gives one window.)
    Orders: `shuffled` takes each window once an epoch, in a keyed permutation; `sequential` takes them in the text's order at
    offset 0, in every epoch alike; `random` draws each window's start on its own, as nanoGPT does.

    Raises `UserError` for a stream of fewer than T + 1 tokens.
    """

    def __init__(
        self,
        stream: TokenStream,
        context_length: int,
        batch_size: int,
        seed: int,
        order: Literal["shuffled", "sequential", "random"] = "shuffled",
    ) -> None:
        if len(stream) < context_length + 1:
            raise UserError(
                f"the {stream.name} has {len(stream):,} tokens, and a context of {context_length:,} needs at least "
                f"{context_length + 1:,};\ngive more text, or a smaller model.context_length"
            )
        self.windows_per_epoch = max(1, (len(stream) - context_length) // context_length)
        """n: windows in an epoch, whatever the order."""
        self._stream, self._context_length, self._batch_size = stream, context_length, batch_size
        self._seed, self._order = seed, order

    def batch_at(self, step: int) -> Ids:
        """The windows (B, T + 1) of a step, counted from 0."""
        length = self._context_length + 1
        return np.stack([self._stream.read(start, length) for start in self._starts(step).tolist()])

    def _starts(self, step: int) -> Ids:
        """The first token (B,) of each window of a step."""
        if self._order == "random":
            generator = np.random.default_rng(seed_for(self._seed, "batch", step))
            return generator.integers(len(self._stream) - self._context_length, size=self._batch_size)
        sequences = step * self._batch_size + np.arange(self._batch_size, dtype=np.int64)
        epochs, positions = np.divmod(sequences, self.windows_per_epoch)
        if self._order == "sequential":
            return positions * self._context_length
        starts = np.empty_like(positions)
        for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):  # a batch may lie in two epochs, or many short ones
            windows = shuffled(positions[epochs == epoch], self.windows_per_epoch, seed_for(self._seed, "batch", epoch))
            starts[epochs == epoch] = self._offset(epoch) + windows * self._context_length
        return starts

    def _offset(self, epoch: int) -> int:
        """Where the first window of an epoch starts: anywhere that leaves room for the last one."""
        room = len(self._stream) - self.windows_per_epoch * self._context_length
        generator = np.random.default_rng(seed_for(self._seed, "offset", epoch))
        return int(generator.integers(min(self._context_length, room)))


_ROUNDS = 8


def shuffled(positions: Ids, n: int, key: int) -> Ids:
    """A permutation of 0 to n - 1, chosen by `key`, at the given positions (any shape): the window that each one gets.

    A Feistel network permutes the numbers of an even count of bits; where the result is n or more, it is applied again until
    it falls below ("cycle walking"; Black and Rogaway, Ciphers with Arbitrary Finite Domains, 2002), fewer than 4 times on
    average. Nothing is stored: a permutation of 10B tokens' windows would take 1.25 GB.
    """
    # At least 64 numbers: with 16, the 24 permutations of 4 already come measurably unevenly (chi-square, 12,000 keys).
    half_bits = max(3, ((n - 1).bit_length() + 1) // 2)
    keys = np.random.SeedSequence(key).generate_state(_ROUNDS, np.uint64).astype(np.uint64)
    values = _feistel(positions.astype(np.uint64), half_bits, keys)
    while (outside := values >= n).any():
        values[outside] = _feistel(values[outside], half_bits, keys)
    return values.astype(np.int64)


def _feistel(values: npt.NDArray[np.uint64], half_bits: int, keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """A bijection of the numbers of 2 x half_bits bits: each round mixes one half into the other, which can be undone."""
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = values >> shift, values & mask
    for key in keys:
        left, right = right, left ^ (_mixed(right ^ key) & mask)
    return (left << shift) | right


def _mixed(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Every bit of the result depends on every bit of the value: the finalizer of SplitMix64 (Steele et al., 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


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
        return TokenStream([*self.train.parts, *self.validation.parts], name=f"text of {self.manifest['source']['name']}")


def open_dataset(directory: Path) -> Dataset:
    """Open what `prepare` has made. The tokens stay on disk until they are read.

    Raises `UserError` where the directory is no dataset, or a file is missing or of the wrong size (`prepare.verify` also
    compares the shards' hashes).
    """
    manifest = read_manifest(directory)
    if manifest is None:
        raise UserError(f"{directory} is no prepared dataset (it has no {MANIFEST} of one); make one: glassgpt prepare SOURCE --out DIR")
    refuse_damage(directory, manifest)
    train, validation = (_open_split(directory, manifest, split) for split in SPLITS)
    tokenizer = load_tokenizer(directory / TOKENIZER)
    return Dataset(directory, train, validation, tokenizer, manifest, _fingerprint(manifest))


def _open_split(directory: Path, manifest: Mapping[str, Any], split: str) -> TokenStream:
    dtype = DTYPES[manifest["dtype"]]
    shards = manifest["splits"][split]["shards"]
    maps = [np.memmap(directory / shard["name"], dtype=dtype, mode="r", shape=(shard["tokens"],)) for shard in shards]
    return TokenStream(maps, name=f"{split} split of {manifest['source']['name']}")


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


def find_damage(directory: Path, manifest: Mapping[str, Any]) -> str | None:
    """What is wrong with a dataset's files, as far as can be told without reading all tokens; nothing where they seem whole."""
    width = np.dtype(DTYPES[manifest["dtype"]]).itemsize
    for split in SPLITS:
        for shard in manifest["splits"][split]["shards"]:
            path = directory / shard["name"]
            if not path.is_file():
                return f"{shard['name']} is missing"
            if path.stat().st_size != shard["tokens"] * width:
                return f"{shard['name']} has {path.stat().st_size} bytes and should have {shard['tokens'] * width}"
    tokenizer = directory / TOKENIZER
    if not tokenizer.is_file() or sha256_of(tokenizer) != manifest["tokenizer"]["sha256"]:
        return f"{TOKENIZER} is missing or changed"
    return None


def refuse_damage(directory: Path, manifest: Mapping[str, Any]) -> None:
    """Raise `UserError` for what `find_damage` finds."""
    if damage := find_damage(directory, manifest):
        raise UserError(f"the dataset {directory} is damaged: {damage}; remove the directory and prepare it again")
