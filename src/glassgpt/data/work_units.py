"""The plan of a dataset, and the preparation of one work unit: consecutive files, encoded and written as shards.

The shards depend on the plan, the tokenizer and the text alone, not on workers and kills. A build that resumes computes
the plan again. A unit resumes after its last finished shard: the files before that are read again, but not encoded.
"""

import dataclasses
import itertools
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
from glassgpt.data.readers import Batch, Counts, read_batches
from glassgpt.data.shards import SPLITS, TOKENIZER, Encoded, ShardWriter, text_hash, text_hashes
from glassgpt.data.sources import Source, read_source
from glassgpt.tokenizers.base import encode_texts
from glassgpt.tokenizers.builtin import Tokenizer, build_tokenizer, load_tokenizer
from glassgpt.utils.errors import UserError
from glassgpt.utils.files import explain_os_errors, sealed_json, write_atomic
from glassgpt.utils.formatting import Log, ProgressLine

SEPARATOR = "\n\n"  # between documents, if the tokenizer has no end-of-text token
_UNIT_BYTES = 4  # of files, per token of a shard: about one shard of plain text, several if it is compressed
_GOLDEN_RATIO = (math.sqrt(5) - 1) / 2
Report = Callable[[], None]
Hashes = npt.NDArray[np.uint64]
Mask = npt.NDArray[np.bool_]


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

    def are_validation(self, unit: "WorkUnit", first: int, places: Sequence[tuple[int, int]]) -> Mask:
        """Whether each document (documents,), from number `first` of a work unit on, is for validation."""
        if self.fraction is None:
            chosen = np.zeros(len(places), dtype=np.bool_)
        else:
            # With 0.1, one in ten: in the first unit the middle, in others another, since units may have few documents.
            phase = (0.5 + unit.number * _GOLDEN_RATIO) % 1
            numbers = np.arange(first, first + len(places) + 1)
            chosen = np.diff(np.floor(numbers * self.fraction + phase)) > 0
        if self.document is not None:
            file, row = self.document
            chosen[[place == (file - unit.first_file, row) for place in places]] = True
        return chosen


@dataclass(frozen=True)
class WorkUnit:
    """Consecutive files of one source, prepared as one task."""

    number: int
    files: tuple[str, ...]
    first_file: int  # its number in all sources
    reading: ReadingConfig
    split: str | None  # of all its documents; None if the plan decides
    duplicates: Mask = field(default_factory=lambda: np.empty(0, dtype=np.bool_))
    """Documents (documents,) to leave out; may be empty."""


def make_plan(
    directory: Path, sources: Sequence[Source], data: DataConfig, tokenizer: Tokenizer | None, log: Log
) -> tuple[Plan, list[WorkUnit], Tokenizer]:
    """Plan a dataset in this directory, by default with the tokenizer of `data`. Raises `UserError` without text."""
    # Number, from 1, of the first document that the fraction would choose for validation if there were one work unit.
    first_chosen = math.ceil(0.5 / data.validation_fraction)
    places, characters = _first_documents(sources[0], data, max(2, first_chosen), ProgressLine(log))
    tokenizer = tokenizer or build_tokenizer(data.tokenizer, all_texts(sources, data, ProgressLine(log)))
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


def _first_documents(
    source: Source, reading: ReadingConfig, count: int, progress: ProgressLine
) -> tuple[list[tuple[int, int]], int]:
    """File and row of the first documents, at most `count`, and the number of their characters."""
    places, characters, counts = [], 0, Counts()
    for file, part in read_source(source, reading, counts):
        if part.starts:
            places.append((file, part.row))
            if len(places) == count:
                break
        characters += len(part.text)
        progress.update("planning: reading the first documents")
    if not places:
        reason = "it is empty or only white space"
        if counts.bad:
            reason = f"all {counts.bad:,} rows were skipped ({counts.first_bad})"
        raise UserError(f"{source.location} has no text: {reason}")
    return places, characters


def all_texts(sources: Sequence[Source], reading: ReadingConfig, progress: ProgressLine) -> Iterator[str]:
    """All text that the tokenizer must be able to encode, many documents at a time."""
    counts = Counts()
    for source in sources:
        files = ((file.name, file.fetch()) for file in source.files())
        for batch in read_batches(files, source.reading or reading, counts):
            yield "".join(batch.texts)
            progress.update("planning: reading the text for the tokenizer")
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
        pieces = _pieces(plan, unit, paths, counts) if plan.cut is None else _cut_pieces(plan.cut, unit, paths, counts)
        for piece in pieces:
            missing = piece.after(writers[piece.split].done)
            if missing.texts:
                writers[piece.split].add(_encode(missing, tokenizer, unit))
            report()
        for writer in writers.values():
            writer.close()
        write_atomic(finished, sealed_json(dataclasses.asdict(counts)))


def hash_unit(plan: Plan, unit: WorkUnit, paths: Sequence[Path], report: Report = lambda: None) -> Hashes:
    """The hash (documents,) of each document of a unit, by which duplicates are found."""
    hashes = [np.empty(0, dtype=np.uint64)]
    for texts, _, starts in _batches(unit, paths, Counts()):
        encoded = encode_texts(texts)
        if starts:
            hashes.append(text_hashes(encoded))
        else:
            hashes[-1][-1] = text_hash(encoded[0], int(hashes[-1][-1]))
        report()
    return np.concatenate(hashes)


def repeats(hashes: Hashes) -> Mask:
    """Whether each hash (N,) occurred before."""
    repeated = np.ones(len(hashes), dtype=np.bool_)
    # A range of values at a time, as sorting takes several times the memory of what it sorts.
    ranges = max(1, len(hashes) >> 24)
    for number in range(ranges):
        chosen = np.flatnonzero(hashes % np.uint64(ranges) == number)
        repeated[chosen[np.unique(hashes[chosen], return_index=True)[1]]] = False
    return repeated


def _batches(unit: WorkUnit, paths: Sequence[Path], counts: Counts) -> Iterator[Batch]:
    """The documents of a unit, whose files are numbered within it."""
    return read_batches(zip(unit.files, paths, strict=True), unit.reading, counts)


@dataclass(frozen=True)
class _Piece:
    """Documents of a split or, with `starts` false, a further part of one. `first` counts the split's documents."""

    split: str
    texts: Sequence[str]
    places: Sequence[tuple[int, int]]
    starts: bool
    first: int  # number of the first text's document in its split and unit

    def after(self, done: int) -> "_Piece":
        """The documents from this number on."""
        skipped = max(0, done - self.first)
        if not skipped:
            return self
        first, texts, places = self.first + skipped, self.texts[skipped:], self.places[skipped:]
        return dataclasses.replace(self, texts=texts, places=places, first=first)


def _pieces(plan: Plan, unit: WorkUnit, paths: Sequence[Path], counts: Counts) -> Iterator[_Piece]:
    """What goes into which split, in the order of the files. Of each split, all documents of a batch are one piece."""
    added = dict.fromkeys(SPLITS, 0)
    number = kept = 0
    split: str | None = None  # of the last document; None if it is left out
    for texts, places, starts in _batches(unit, paths, counts):
        if not starts:
            if split is not None:
                yield _Piece(split, texts, places, False, added[split] - 1)
            continue
        # A file that has grown has more documents than hashes; the change is found and refused in the end.
        is_kept = np.ones(len(texts), dtype=np.bool_)
        known = unit.duplicates[number : number + len(texts)]
        is_kept[: len(known)] = ~known
        number += len(texts)
        validation = np.zeros(len(texts), dtype=np.bool_)
        kept_places = list(itertools.compress(places, is_kept.tolist()))
        if unit.split is None:
            validation[is_kept] = plan.are_validation(unit, kept, kept_places)
        elif unit.split == "validation":
            validation[:] = True
        kept += len(kept_places)
        for name, chosen in (("train", is_kept & ~validation), ("validation", is_kept & validation)):
            if own := list(itertools.compress(texts, chosen.tolist())):
                yield _Piece(name, own, list(itertools.compress(places, chosen.tolist())), True, added[name])
                added[name] += len(own)
        split = None if not is_kept[-1] else "validation" if validation[-1] else "train"


def _cut_pieces(cut: int, unit: WorkUnit, paths: Sequence[Path], counts: Counts) -> Iterator[_Piece]:
    """A source of one document: its text up to `cut` characters is for training, the rest for validation."""
    offset = 0
    for texts, places, starts in _batches(unit, paths, counts):
        for text, place in zip(texts, places, strict=True):
            before = min(max(cut - offset, 0), len(text))
            offset += len(text)
            if before:
                yield _Piece("train", [text[:before]], [place], starts, 0)
            if before < len(text):
                yield _Piece("validation", [text[before:]], [place], False, 0)


def _encode(piece: _Piece, tokenizer: Tokenizer, unit: WorkUnit) -> Encoded:
    """Encode documents. Each starts with its marks; without an end-of-text token, an empty line is before it."""
    texts, encoder = piece.texts, tokenizer if piece.starts else tokenizer.within_text
    if tokenizer.end_of_text is None and piece.starts:
        texts = [SEPARATOR + text for text in texts]
        if (unit.number, piece.first) == (0, 0):
            texts[0] = piece.texts[0]
    try:
        ids, offsets = encoder.encode_documents(texts)
    except UserError:
        for (file, row), text in zip(piece.places, texts, strict=True):  # which one cannot be encoded?
            try:
                encoder.encode_documents([text])
            except UserError as error:
                place = f"row {row}" if row else "first document"  # a file of text has only one
                raise UserError(f"{unit.files[file]}, {place}: {error}") from None
        raise
    if len(ids) and int(ids.max()) >= tokenizer.vocab_size:
        known = f"its {tokenizer.vocab_size:,} ids"
        raise UserError(f"the tokenizer returned id {ids.max()}, beyond {known}: it is damaged")
    places, marks = offsets.astype(np.int64), tokenizer.document_marks
    if piece.starts and marks:
        ids = np.insert(ids, np.repeat(places[:-1], len(marks)), np.tile(marks, len(texts)))
        places += np.arange(len(places)) * len(marks)
    return Encoded(ids, places, piece.texts, piece.starts)
