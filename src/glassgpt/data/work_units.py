"""The plan of a dataset, and the preparation of one work unit: consecutive files, encoded and written as shards.

The shards depend on the plan, the tokenizer and the text alone, not on workers and kills. A build that resumes computes
the plan again. A unit resumes after its last finished shard: the files before that are read again, but not encoded.
"""

import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache
from pathlib import Path

import filelock
import numpy as np
import numpy.typing as npt

from glassgpt.config.schema import DataConfig, ReadingConfig
from glassgpt.data.readers import Counts, Part, read_documents
from glassgpt.data.shards import SPLITS, TOKENIZER, ShardWriter, Tokens, text_hash
from glassgpt.data.sources import Source, read_source
from glassgpt.tokenizers.base import batches_by_size, encode_text
from glassgpt.tokenizers.builtin import Tokenizer, build_tokenizer, load_tokenizer
from glassgpt.utils.errors import UserError
from glassgpt.utils.files import explain_os_errors, write_atomic

SEPARATOR = "\n\n"  # between documents, if the tokenizer has no end-of-text token
_UNIT_BYTES = 4  # of files, per token of a shard: about one shard of plain text, several if it is compressed
_BATCH_CHARACTERS = 1 << 22  # encoded at once: enough for a tokenizer that uses several cores, and little memory
_GOLDEN_RATIO = (math.sqrt(5) - 1) / 2
Report = Callable[[], None]
Hashes = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Plan:
    """How documents become shards."""

    directory: Path  # of the build, with the tokenizer's file
    tokenizer_sha256: str
    dtype: str
    shard_tokens: int
    fraction: float | None = None  # this share of the documents is for validation, evenly spaced
    document: tuple[int, int] | None = None  # so is this file's row: the only such document, or the first of its share
    cut: int | None = None  # if the source is one document: its text after this many characters

    def is_validation(self, unit: int, number: int, place: tuple[int, int]) -> bool:
        """Whether document `number` of a work unit, at this file and row, is for validation."""
        if place == self.document or self.fraction is None:
            return place == self.document
        # With 0.1, one in ten: in the first unit the middle one, in others another, since units may have few documents.
        phase = (0.5 + unit * _GOLDEN_RATIO) % 1
        return math.floor((number + 1) * self.fraction + phase) > math.floor(number * self.fraction + phase)


@dataclass(frozen=True)
class WorkUnit:
    """Consecutive files of one source, prepared as one task."""

    number: int
    files: tuple[str, ...]
    first_file: int  # its number in all sources
    reading: ReadingConfig
    split: str | None  # of all its documents; None if the plan decides
    duplicates: npt.NDArray[np.bool_] = field(default_factory=lambda: np.empty(0, dtype=np.bool_))
    """Documents (documents,) to leave out; may be empty."""


def make_plan(
    directory: Path, sources: Sequence[Source], data: DataConfig, tokenizer: Tokenizer | None = None
) -> tuple[Plan, list[WorkUnit], Tokenizer]:
    """Plan a dataset in this directory, by default with the tokenizer of `data`. Raises `UserError` without text."""
    # Number, from 1, of the first document that the fraction would choose for validation if there were one work unit.
    first_chosen = math.ceil(0.5 / data.validation_fraction)
    places, characters = _first_documents(sources[0], data, max(2, first_chosen))
    tokenizer = tokenizer or build_tokenizer(data.tokenizer, all_texts(sources, data))
    dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    plan = Plan(directory, tokenizer.sha256, dtype, data.shard_tokens)
    if len(sources) == 1 and data.validation == "fraction":
        if len(places) == 1:
            # Exact; a float could be one character off. For tinyshakespeare it is nanoGPT's `data[:int(n*0.9)]`.
            plan = dataclasses.replace(plan, cut=int(characters * (1 - Fraction(str(data.validation_fraction)))))
        elif len(places) >= first_chosen:
            plan = dataclasses.replace(plan, fraction=data.validation_fraction, document=places[first_chosen - 1])
        else:
            plan = dataclasses.replace(plan, document=places[-1])
    return plan, list(_work_units(sources, data)), tokenizer


def _first_documents(source: Source, reading: ReadingConfig, count: int) -> tuple[list[tuple[int, int]], int]:
    """File and row of the first documents, at most `count`, and the number of their characters."""
    places, characters, counts = [], 0, Counts()
    for file, part in read_source(source, reading, counts):
        if part.starts:
            places.append((file, part.row))
            if len(places) == count:
                break
        characters += len(part.text)
    if not places:
        reason = "it is empty or only white space"
        if counts.bad:
            reason = f"all {counts.bad:,} rows were skipped ({counts.first_bad})"
        raise UserError(f"{source.location} has no text: {reason}")
    return places, characters


def all_texts(sources: Sequence[Source], reading: ReadingConfig) -> Iterator[str]:
    """All text that the tokenizer must be able to encode."""
    counts = Counts()
    for source in sources:
        for _, part in read_source(source, reading, counts):
            yield part.text
    if counts.documents > 1:
        yield SEPARATOR


def _work_units(sources: Sequence[Source], data: DataConfig) -> Iterator[WorkUnit]:
    """Consecutive files of a source, until they have enough bytes."""
    number = first = 0
    for source, split in zip(sources, SPLITS, strict=False):
        files, names, size = source.files(), [], 0
        for file in files:
            names.append(file.name)
            size += file.bytes
            if size >= _UNIT_BYTES * data.shard_tokens or file is files[-1]:
                own_split = split if len(sources) > 1 else None
                yield WorkUnit(number, tuple(names), first, source.reading or data, own_split)
                number, first = number + 1, first + len(names)
                names, size = [], 0


def counts_path(directory: Path, unit: int) -> Path:
    """The file with the counts of a unit, which marks it as finished."""
    return directory / f"unit-{unit:05d}.json"


@lru_cache(maxsize=1)  # per process and content, as loading takes as long as encoding some megabytes
def _tokenizer(directory: Path, sha256: str) -> Tokenizer:
    return load_tokenizer(directory / TOKENIZER)


def prepare_unit(plan: Plan, unit: WorkUnit, paths: Sequence[Path], report: Report = lambda: None) -> None:
    """Write the shards of a unit with these files, then mark it as finished. Raises `UserError` for a bad file."""
    finished = counts_path(plan.directory, unit.number)
    # A worker whose parent was killed may still be exiting.
    lock = filelock.FileLock(plan.directory / f".unit-{unit.number:05d}.lock")
    with explain_os_errors("write", plan.directory), lock, ExitStack() as stack:
        if finished.is_file():
            return
        counts = Counts(duplicates=int(unit.duplicates.sum()))
        tokenizer = _tokenizer(plan.directory, plan.tokenizer_sha256)
        writers = {}
        for split in SPLITS:
            writer = ShardWriter(plan.directory, f"{split}-{unit.number:05d}", plan.dtype, plan.shard_tokens)
            writers[split] = writer
            stack.callback(writer.abandon)
        for batch in batches_by_size(_pieces(plan, unit, paths, counts), _BATCH_CHARACTERS):
            missing = [piece for piece in batch if piece.number >= writers[piece.split].done]
            for piece, ids in zip(missing, _encode(missing, tokenizer, unit.number), strict=True):
                writers[piece.split].add(ids, piece.text, piece.starts)
            report()
        for writer in writers.values():
            writer.close()
        write_atomic(finished, json.dumps(dataclasses.asdict(counts)))


def hash_unit(plan: Plan, unit: WorkUnit, paths: Sequence[Path], report: Report = lambda: None) -> Hashes:
    """The hash (documents,) of each document of a unit, by which duplicates are found."""
    hashes: list[int] = []
    for _, part in _documents(unit, paths, Counts()):
        before = None if part.starts else hashes.pop()
        hashes.append(text_hash(encode_text(part.text), before))
        report()
    return np.array(hashes, dtype=np.uint64)


def repeats(hashes: Hashes) -> npt.NDArray[np.bool_]:
    """Whether each hash (N,) occurred before."""
    repeated = np.ones(len(hashes), dtype=np.bool_)
    # A range of values at a time, as sorting takes several times the memory of what it sorts.
    ranges = max(1, len(hashes) >> 24)
    for number in range(ranges):
        chosen = np.flatnonzero(hashes % np.uint64(ranges) == number)
        repeated[chosen[np.unique(hashes[chosen], return_index=True)[1]]] = False
    return repeated


def _documents(unit: WorkUnit, paths: Sequence[Path], counts: Counts) -> Iterator[tuple[int, Part]]:
    """The documents in parts, each with the number of its file in this unit."""
    for number, (name, path) in enumerate(zip(unit.files, paths, strict=True)):
        for part in read_documents(path, unit.reading, name=name, counts=counts):
            yield number, part


@dataclass(frozen=True)
class _Piece:
    """A document or a part of one, as it goes into a split. `number` counts the split's documents in this unit."""

    split: str
    text: str
    starts: bool
    number: int
    place: str  # for an error

    def __len__(self) -> int:
        return len(self.text)


def _pieces(plan: Plan, unit: WorkUnit, paths: Sequence[Path], counts: Counts) -> Iterator[_Piece]:
    """What goes into which split, in the order of the files."""
    numbers = dict.fromkeys(SPLITS, -1)
    number = kept = -1
    offset, split, is_duplicate = 0, "train", False
    for file, part in _documents(unit, paths, counts):
        if part.starts:
            number += 1
            # A file that has grown has more documents than hashes; the change is found and refused in the end.
            is_duplicate = number < len(unit.duplicates) and bool(unit.duplicates[number])
        if is_duplicate:
            continue
        if part.starts:
            kept += 1
            is_validation = plan.is_validation(unit.number, kept, (unit.first_file + file, part.row))
            split = unit.split or ("validation" if is_validation else "train")
            numbers[split] += 1
        cut = len(part.text) if plan.cut is None else min(max(plan.cut - offset, 0), len(part.text))
        offset += len(part.text)
        place = f"{unit.files[file]}, row {part.row}"
        if cut:
            yield _Piece(split, part.text[:cut], part.starts, numbers[split], place)
        if cut < len(part.text):
            yield _Piece("validation", part.text[cut:], False, 0, place)


def _encode(pieces: Sequence[_Piece], tokenizer: Tokenizer, unit: int) -> Iterator[Tokens]:
    """The ids of each piece. A document starts with its marks; without an end-of-text token, an empty line is first."""
    is_separated = tokenizer.end_of_text is None
    texts = [
        SEPARATOR + piece.text if is_separated and piece.starts and (unit, piece.number) != (0, 0) else piece.text
        for piece in pieces
    ]
    try:
        ids, offsets = tokenizer.encode_documents(texts)
    except UserError:
        for piece, text in zip(pieces, texts, strict=True):  # which one cannot be encoded?
            try:
                tokenizer.encode_documents([text])
            except UserError as error:
                raise UserError(f"{piece.place}: {error}") from None
        raise
    if len(ids) and int(ids.max()) >= tokenizer.vocab_size:
        known = f"its {tokenizer.vocab_size:,} ids"
        raise UserError(f"the tokenizer returned id {ids.max()}, beyond {known}: it is damaged")
    marks = np.array(tokenizer.document_marks, dtype=np.uint32)
    for piece, (start, end) in zip(pieces, itertools.pairwise(offsets.tolist()), strict=True):
        yield np.concatenate([marks, ids[start:end]]) if piece.starts and len(marks) else ids[start:end]
