"""Prepare one work unit of a dataset: encode its files and write their shards.

The shards of a unit depend on the plan alone: not on who prepares it, how many workers there are, or how often they were
killed. A unit resumes after its last finished shard; the files before that are read again, but not encoded.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import numpy.typing as npt

from glassgpt.data.plan import SEPARATOR, Plan, WorkUnit, without_blank
from glassgpt.data.readers import Part, read_documents
from glassgpt.data.shards import SPLITS, TOKENIZER, ShardWriter, Tokens, finished_shards, text_bytes, text_hash
from glassgpt.tokenizers.builtin import Tokenizer, load_tokenizer
from glassgpt.utils.errors import UserError
from glassgpt.utils.files import explain_os_errors, write_atomic

# Characters encoded at once: enough for a tokenizer that uses several cores, and little memory.
_BATCH_CHARACTERS = 1 << 22
# Called a few times per second while a unit is prepared.
Report = Callable[[], None]


class BuildDirectory:
    """A directory in which a dataset is built, with the files that its work units share."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._build_file = path / "build.json"

    def start(self, plan: Plan, tokenizer: Tokenizer, purpose: dict[str, Any]) -> None:
        """Save the plan and the tokenizer, with the purpose of the build as JSON."""
        write_atomic(self.path / TOKENIZER, tokenizer.to_json())
        write_atomic(self._build_file, json.dumps({"purpose": purpose, "plan": dataclasses.asdict(plan)}))

    def purpose(self) -> dict[str, Any] | None:
        """The purpose of the build, or None if it was not started."""
        try:
            purpose: dict[str, Any] = json.loads(self._build_file.read_bytes())["purpose"]
        except (OSError, ValueError, KeyError):
            return None
        return purpose

    @cached_property
    def plan(self) -> Plan:
        """The plan of the dataset."""
        return Plan.from_dict(json.loads(self._build_file.read_bytes())["plan"])

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The dataset's tokenizer. Loading it takes as long as encoding some megabytes."""
        return load_tokenizer(self.path / TOKENIZER)

    def counts(self, unit: int) -> "Counts | None":
        """The counts of a finished unit; None for an unfinished one."""
        path = self._unit_path("unit", unit, ".json")
        return Counts(**json.loads(path.read_bytes())) if path.is_file() else None

    def save_counts(self, unit: int, counts: "Counts") -> None:
        """Mark a unit as finished."""
        write_atomic(self._unit_path("unit", unit, ".json"), json.dumps(dataclasses.asdict(counts)))

    def shards(self, split: str, unit: int) -> list[dict[str, Any]]:
        """The finished shards of a unit."""
        return finished_shards(self.path, _shard_prefix(split, unit))

    def hashes(self, unit: int) -> npt.NDArray[np.uint64] | None:
        """The hash (documents,) of each document of a unit; None if they are not computed yet."""
        path = self._unit_path("hashes", unit)
        return np.fromfile(path, dtype="<u8") if path.is_file() else None

    def save_hashes(self, unit: int, hashes: Sequence[int]) -> None:
        """Save the hash of each document of a unit."""
        write_atomic(self._unit_path("hashes", unit), np.array(hashes, dtype="<u8").tobytes())

    def duplicates(self, unit: int) -> npt.NDArray[np.bool_]:
        """Whether to leave out each document (documents,) of a unit; empty without deduplication."""
        path = self._unit_path("duplicates", unit)
        return np.fromfile(path, dtype=np.bool_) if path.is_file() else np.empty(0, dtype=np.bool_)

    def save_duplicates(self, unit: int, duplicates: npt.NDArray[np.bool_]) -> None:
        """Save which documents of a unit to leave out."""
        write_atomic(self._unit_path("duplicates", unit), duplicates.tobytes())

    @contextmanager
    def locked(self, unit: int) -> Iterator[None]:
        """Wait for another process that prepares this unit: a worker whose parent was killed may still be exiting."""
        with explain_os_errors("write", self.path), filelock.FileLock(self._unit_path(".unit", unit, ".lock")):
            yield

    def _unit_path(self, kind: str, unit: int, suffix: str = ".bin") -> Path:
        return self.path / f"{kind}-{unit:05d}{suffix}"


@dataclass
class Counts:
    """The documents and rows of a work unit."""

    documents: int = 0
    """Documents with text, duplicates included."""
    blank: int = 0
    """Documents that are empty or only white space."""
    bad: int = 0
    """Rows without text that were skipped."""
    duplicates: int = 0
    """Duplicates that were left out."""


def prepare_unit(build: BuildDirectory, unit: int, paths: Sequence[Path], report: Report) -> None:
    """Write the shards of a unit, whose files are at `paths`, unless it is finished. Raises `UserError` for a bad file."""
    with build.locked(unit):
        if build.counts(unit) is None:
            build.save_counts(unit, _write_shards(build, unit, paths, report))


def hash_unit(build: BuildDirectory, unit: int, paths: Sequence[Path], report: Report) -> None:
    """Save the hashes of a unit's documents, by which duplicates are found, unless that is done."""
    with build.locked(unit):
        if build.hashes(unit) is None:
            hashes: list[int] = []
            for _, _, part in _documents(build.plan.units[unit], paths, Counts()):
                data = text_bytes(part.text)
                if part.starts:
                    hashes.append(text_hash(data))
                else:
                    hashes[-1] = text_hash(data, hashes[-1])
                report()
            build.save_hashes(unit, hashes)


def _documents(unit: WorkUnit, paths: Sequence[Path], counts: Counts) -> Iterator[tuple[int, str, Part]]:
    """The documents in parts, each with the number of its file in the source and its place for an error; counts them."""

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


def _shard_prefix(split: str, unit: int) -> str:
    return f"{split}-{unit:05d}"


@dataclass(frozen=True)
class _Piece:
    """A document or a part of one, as it goes into a split. `number` counts the split's documents in this unit."""

    text: str
    starts: bool
    number: int
    place: str


def _write_shards(build: BuildDirectory, unit: int, paths: Sequence[Path], report: Report) -> Counts:
    plan, counts, duplicates = build.plan, Counts(), build.duplicates(unit)
    writers = {
        split: ShardWriter(build.path, _shard_prefix(split, unit), plan.dtype, plan.shard_tokens) for split in SPLITS
    }
    documents = _documents(plan.units[unit], paths, counts)
    try:
        for batch in _batches(_pieces(plan, unit, documents, counts, duplicates)):
            for split, writer in writers.items():
                missing = [piece for piece in batch[split] if piece.number >= writer.done]
                for piece, ids in zip(missing, _encode(missing, build.tokenizer, unit), strict=True):
                    writer.add(ids, piece.text, piece.starts)
            report()
        for writer in writers.values():
            writer.close()
    finally:
        for writer in writers.values():
            writer.abandon()
    counts.duplicates = int(duplicates.sum())
    return counts


def _pieces(
    plan: Plan,
    unit: int,
    documents: Iterator[tuple[int, str, Part]],
    counts: Counts,
    duplicates: npt.NDArray[np.bool_],
) -> Iterator[tuple[str, _Piece]]:
    """What goes into which split, in the order of the files."""
    numbers = dict.fromkeys(SPLITS, -1)
    kept, offset, split, is_duplicate = -1, 0, "train", False
    for file, place, part in documents:
        if part.starts:
            number = counts.documents - 1
            # A file that has grown has more documents than hashes; the change is found and refused in the end.
            is_duplicate = number < len(duplicates) and bool(duplicates[number])
        if is_duplicate:
            continue
        if part.starts:
            kept += 1
            split = plan.split_of(unit, kept, file, part.row)
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
            f"the tokenizer returned id {ids.max()} but its vocabulary has {tokenizer.vocab_size:,}: its file is damaged"
        )
    marks = np.array(document_marks(tokenizer), dtype=np.uint32)
    bounds = offsets.astype(np.int64)
    for piece, start, end in zip(pieces, bounds[:-1], bounds[1:], strict=True):
        own = ids[start:end]
        yield np.concatenate([marks, own]) if piece.starts and len(marks) else own


def document_marks(tokenizer: Tokenizer) -> list[int]:
    """The ids before each document: end of text (of the document before), then the prefix of prompts.

    The prefix is empty for most tokenizers; it is <s> for Llama, which was trained so. If both are the same id, it stands
    once.
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
