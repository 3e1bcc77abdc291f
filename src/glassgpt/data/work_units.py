"""Prepare one work unit of a dataset: encode its files and write their shards.

The shards of a unit do not depend on who prepares it, how many workers there are, or how often they were killed. A unit
resumes after its last finished shard: the files before that are read again, but not encoded.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import filelock
import numpy as np
import numpy.typing as npt

from glassgpt.data.plan import SEPARATOR, Plan, WorkUnit, without_blank
from glassgpt.data.readers import Part, read_documents
from glassgpt.data.shards import SPLITS, TOKENIZER, ShardWriter, Tokens, text_bytes, text_hash
from glassgpt.tokenizers.builtin import Tokenizer, load_tokenizer
from glassgpt.utils.errors import UserError
from glassgpt.utils.files import explain_os_errors, write_atomic

# Characters encoded at once: enough for a tokenizer that uses several cores, and little memory.
_BATCH_CHARACTERS = 1 << 22
Report = Callable[[], None]


@dataclass
class Counts:
    """The documents and rows of a work unit."""

    documents: int = 0  # with text, duplicates included
    blank: int = 0  # empty or only white space
    bad: int = 0  # rows without text that were skipped
    duplicates: int = 0  # left out


def saved_counts(directory: Path, unit: int) -> Counts | None:
    """The counts of a finished unit; None for an unfinished one."""
    path = _counts_path(directory, unit)
    return Counts(**json.loads(path.read_bytes())) if path.is_file() else None


def _counts_path(directory: Path, unit: int) -> Path:
    return directory / f"unit-{unit:05d}.json"


def shard_prefix(split: str, unit: int) -> str:
    """The start of the names of a unit's shards."""
    return f"{split}-{unit:05d}"


@lru_cache(maxsize=1)
def _tokenizer(directory: Path, sha256: str) -> Tokenizer:
    """Loaded once per process and content, as it takes as long as encoding some megabytes."""
    return load_tokenizer(directory / TOKENIZER)


def prepare_unit(directory: Path, plan: Plan, unit: WorkUnit, paths: Sequence[Path], report: Report) -> None:
    """Write the shards of a unit into the directory of the dataset's tokenizer, then mark it as finished.

    `paths` are the unit's files. `report` is called now and then. Raises `UserError` for a bad file.
    """
    # A worker whose parent was killed may still be exiting.
    lock = filelock.FileLock(directory / f".unit-{unit.number:05d}.lock")
    with explain_os_errors("write", directory), lock:
        if saved_counts(directory, unit.number) is None:
            counts = _write_shards(directory, plan, unit, paths, report)
            write_atomic(_counts_path(directory, unit.number), json.dumps(dataclasses.asdict(counts)))


def hash_unit(unit: WorkUnit, paths: Sequence[Path], report: Report) -> npt.NDArray[np.uint64]:
    """The hash (documents,) of each document of a unit, by which duplicates are found."""
    hashes: list[int] = []
    for _, _, part in _documents(unit, paths, Counts()):
        data = text_bytes(part.text)
        if part.starts:
            hashes.append(text_hash(data))
        else:
            hashes[-1] = text_hash(data, hashes[-1])
        report()
    return np.array(hashes, dtype=np.uint64)


def _documents(unit: WorkUnit, paths: Sequence[Path], counts: Counts) -> Iterator[tuple[int, str, Part]]:
    """The documents in parts, each with its file's number in the source and its place for an error; counts them."""

    def on_skip(row: int, reason: str) -> None:
        counts.bad += 1

    def on_blank() -> None:
        counts.blank += 1

    for number, (name, path) in enumerate(zip(unit.files, paths, strict=True), start=unit.first_file):
        parts = read_documents(path, unit.reading, name=name, on_skip=on_skip)
        for part in without_blank(parts, on_blank):
            counts.documents += part.starts
            yield number, f"{name}, row {part.row}", part


# --------------------------------------------------------------------------------------------------------------- shards


@dataclass(frozen=True)
class _Piece:
    """A document or a part of one, as it goes into a split. `number` counts the split's documents in this unit."""

    text: str
    starts: bool
    number: int
    place: str


def _write_shards(directory: Path, plan: Plan, unit: WorkUnit, paths: Sequence[Path], report: Report) -> Counts:
    counts, tokenizer = Counts(duplicates=int(unit.duplicates.sum())), _tokenizer(directory, plan.tokenizer_sha256)
    writers = {
        split: ShardWriter(directory, shard_prefix(split, unit.number), plan.dtype, plan.shard_tokens)
        for split in SPLITS
    }
    try:
        for batch in _batches(_pieces(plan, unit, _documents(unit, paths, counts))):
            for split, writer in writers.items():
                missing = [piece for piece in batch[split] if piece.number >= writer.done]
                for piece, ids in zip(missing, _encode(missing, tokenizer, unit.number), strict=True):
                    writer.add(ids, piece.text, piece.starts)
            report()
        for writer in writers.values():
            writer.close()
    finally:
        for writer in writers.values():
            writer.abandon()
    return counts


def _pieces(plan: Plan, unit: WorkUnit, documents: Iterator[tuple[int, str, Part]]) -> Iterator[tuple[str, _Piece]]:
    """What goes into which split, in the order of the files."""
    numbers = dict.fromkeys(SPLITS, -1)
    number = kept = -1
    offset, split, is_duplicate = 0, "train", False
    for file, place, part in documents:
        if part.starts:
            number += 1
            # A file that has grown has more documents than hashes; the change is found and refused in the end.
            is_duplicate = number < len(unit.duplicates) and bool(unit.duplicates[number])
        if is_duplicate:
            continue
        if part.starts:
            kept += 1
            is_validation = plan.is_validation(unit.number, kept, (file, part.row))
            split = unit.split or ("validation" if is_validation else "train")
            numbers[split] += 1
        cut = len(part.text) if plan.cut is None else min(max(plan.cut - offset, 0), len(part.text))
        offset += len(part.text)
        if cut:
            yield split, _Piece(part.text[:cut], part.starts, numbers[split], place)
        if cut < len(part.text):
            yield "validation", _Piece(part.text[cut:], False, 0, place)


def _batches(pieces: Iterator[tuple[str, _Piece]]) -> Iterator[dict[str, list[_Piece]]]:
    """The pieces by split, some megabytes at a time."""
    batch: dict[str, list[_Piece]] = {split: [] for split in SPLITS}
    size = 0
    for split, piece in pieces:
        batch[split].append(piece)
        size += len(piece.text)
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = {split: [] for split in SPLITS}, 0
    if size:
        yield batch


def _encode(pieces: Sequence[_Piece], tokenizer: Tokenizer, unit: int) -> Iterator[Tokens]:
    """The ids of each piece, after the marks of `document_marks` if it starts a document.

    Without an end-of-text token, an empty line separates documents.
    """
    is_separated = tokenizer.end_of_text is None
    texts = [
        SEPARATOR + piece.text if is_separated and piece.starts and (unit, piece.number) != (0, 0) else piece.text
        for piece in pieces
    ]
    try:
        ids, offsets = tokenizer.encode_documents(texts)
    except UserError:
        _refuse_one(pieces, texts, tokenizer)
        raise
    if len(ids) and int(ids.max()) >= tokenizer.vocab_size:
        raise UserError(
            f"the tokenizer returned id {ids.max()}, but has {tokenizer.vocab_size:,} ids: its file is damaged"
        )
    marks = np.array(document_marks(tokenizer), dtype=np.uint32)
    bounds = offsets.astype(np.int64)
    for piece, start, end in zip(pieces, bounds[:-1], bounds[1:], strict=True):
        own = ids[start:end]
        yield np.concatenate([marks, own]) if piece.starts and len(marks) else own


def document_marks(tokenizer: Tokenizer) -> list[int]:
    """The ids before each document: end of text (of the document before), then the prefix of prompts.

    The prefix is empty for most tokenizers; it is <s> for Llama, which was trained so. An id that is both stands once.
    """
    marks = [*([] if tokenizer.end_of_text is None else [tokenizer.end_of_text]), *tokenizer.prompt_prefix]
    return marks[:1] if len(marks) == 2 and marks[0] == marks[1] else marks


def _refuse_one(pieces: Sequence[_Piece], texts: Sequence[str], tokenizer: Tokenizer) -> None:
    """Raise the tokenizer's `UserError` with the place of the document that it cannot encode."""
    for piece, text in zip(pieces, texts, strict=True):
        try:
            tokenizer.encode_documents([text])
        except UserError as error:
            raise UserError(f"{piece.place}: {error}") from None
