"""Groups of a source's files: each is prepared by itself, so that several processes, or machines, can share the work.

What a group's shards hold depends on the plan alone, never on who makes them, on how many there are or on how often they were
killed. A group goes on behind its last finished shard: the files before that are read again, but not encoded.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import numpy.typing as npt

from glassgpt.data.dedup import has_hashes, left_out, save_hashes
from glassgpt.data.plan import SEPARATOR, Group, Plan, with_text
from glassgpt.data.readers import Part, read_parts
from glassgpt.data.shards import SPLITS, TOKENIZER, ShardWriter, text_bytes, text_hash
from glassgpt.tokenizers.builtin import Tokenizer, load_tokenizer
from glassgpt.utils.errors import UserError
from glassgpt.utils.files import explain_os_errors, write_atomic

# Characters encoded at once: enough to keep a parallel tokenizer busy, and little beside what torch alone takes.
_BATCH_CHARACTERS = 1 << 22
# Called now and then with the characters and the tokens that were done since the last call.
Report = Callable[[int, int], None]


@dataclass(frozen=True)
class _Piece:
    """A document or a part of one, as it goes into a split. `number` counts the split's documents in this group."""

    text: str
    begins: bool
    number: int
    place: str


@dataclass
class Counts:
    """What a group's files held besides documents that were written."""

    documents: int = 0
    """Documents with text, those left out as duplicates included."""
    blank: int = 0
    """Documents that are empty or only white space."""
    bad: int = 0
    """Rows without text, left out on request."""
    duplicates: int = 0
    """Documents left out on request, since the same text came before."""


class GroupReader:
    """The documents of a group's files, blank ones left out."""

    def __init__(self, group: Group, paths: Sequence[Path]) -> None:
        self._group, self._paths = group, paths
        self.counts = Counts()

    def parts(self) -> Iterator[tuple[int, str, Part]]:
        """The parts, each with the number of its file in the source and its place for an error."""
        for number, (name, path) in enumerate(
            zip(self._group.files, self._paths, strict=True), start=self._group.first_file
        ):
            for part in with_text(
                read_parts(path, self._group.reading, name=name, skipped=self._count_bad), self._count_blank
            ):
                self.counts.documents += part.starts
                yield number, f"{name}, row {part.row}", part

    def _count_bad(self, row: int, reason: str) -> None:
        self.counts.bad += 1

    def _count_blank(self) -> None:
        self.counts.blank += 1


def shard_prefix(split: str, group: int) -> str:
    """How the names of a group's shards of a split begin."""
    return f"{split}-{group:05d}"


def group_record(directory: Path, number: int) -> dict[str, Any] | None:
    """The counts of a group that is done; None where it is not."""
    path = _record_path(directory, number)
    return json.loads(path.read_bytes()) if path.is_file() else None


def _record_path(directory: Path, number: int) -> Path:
    return directory / f"group-{number:05d}.json"


class Workshop:
    """A directory in which a dataset is made, with what all its groups need."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    @cached_property
    def plan(self) -> Plan:
        """The plan that `Plan.save` has written."""
        return Plan.load(self.directory)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The dataset's tokenizer: reading it takes as long as encoding some megabytes."""
        return load_tokenizer(self.directory / TOKENIZER)


def prepare_group(shop: Workshop, number: int, paths: Sequence[Path], report: Report) -> None:
    """Write the shards of a group, whose files lie at `paths`. Done already, it stays as it is.

    Raises `UserError` for what is wrong with a file, naming it.
    """
    with _alone(shop, number):
        if group_record(shop.directory, number) is None:
            counts = _write_group(shop, number, paths, report)
            write_atomic(_record_path(shop.directory, number), json.dumps(dataclasses.asdict(counts)))


@contextmanager
def _alone(shop: Workshop, number: int) -> Iterator[None]:
    """Wait for whoever is at this group: a worker whose parent was killed may still be dying."""
    with explain_os_errors("write", shop.directory), filelock.FileLock(shop.directory / f".group-{number:05d}.lock"):
        yield


def _write_group(shop: Workshop, number: int, paths: Sequence[Path], report: Report) -> Counts:
    plan, directory = shop.plan, shop.directory
    writers = {
        split: ShardWriter(directory, shard_prefix(split, number), plan.dtype, plan.shard_tokens) for split in SPLITS
    }
    reader = GroupReader(plan.groups[number], paths)
    repeated = left_out(directory, number)
    try:
        for batch in _batches(_pieces(plan, number, reader, repeated)):
            tokens = 0
            for split, writer in writers.items():
                missing = [piece for piece in batch[split] if piece.number >= writer.done]
                for piece, ids in zip(missing, _encode(missing, shop.tokenizer, number), strict=True):
                    writer.add(ids, piece.text, piece.begins)
                    tokens += len(ids)
            report(sum(len(piece.text) for pieces in batch.values() for piece in pieces), tokens)
        for writer in writers.values():
            writer.close()
    except BaseException:
        for writer in writers.values():
            writer.abandon()
        raise
    reader.counts.duplicates = int(repeated.sum())
    return reader.counts


def _pieces(
    plan: Plan, number: int, reader: GroupReader, repeated: npt.NDArray[np.bool_]
) -> Iterator[tuple[str, _Piece]]:
    """What goes into which split, in the order of the files."""
    numbers = dict.fromkeys(SPLITS, -1)
    kept, offset, split, is_left_out = -1, 0, "train", False
    for file, place, part in reader.parts():
        if part.starts:
            document = reader.counts.documents - 1
            is_left_out = document < len(repeated) and bool(
                repeated[document]
            )  # beyond: the file has grown, and is refused in the end
        if is_left_out:
            continue
        if part.starts:
            kept += 1
            split = plan.groups[number].split or _split_of(plan, number, kept, file, part.row)
            numbers[split] += 1
        cut = len(part.text) if plan.cut is None else min(max(plan.cut - offset, 0), len(part.text))
        offset += len(part.text)
        if cut:
            yield split, _Piece(part.text[:cut], part.starts, numbers[split], place)
        if cut < len(part.text):
            yield "validation", _Piece(part.text[cut:], False, 0, place)


_GOLDEN_RATIO = (math.sqrt(5) - 1) / 2


def _split_of(plan: Plan, group: int, number: int, file: int, row: int) -> str:
    """The split of the group's document `number`.

    By a share of 0.1 every tenth document is for validation. Which one of the first ten, differs from group to group, so that groups
    of few documents have their share together; in the first group it is the middle one, which the plan names besides.
    """
    chosen = (file, row) == plan.document
    if plan.fraction is not None:
        phase = (0.5 + group * _GOLDEN_RATIO) % 1
        chosen |= math.floor((number + 1) * plan.fraction + phase) > math.floor(number * plan.fraction + phase)
    return "validation" if chosen else "train"


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


def _encode(pieces: Sequence[_Piece], tokenizer: Tokenizer, group: int) -> Iterator[npt.NDArray[np.uint32]]:
    """The ids of each piece; before each document the end of the one before it, and what a text of this tokenizer begins with.

    The latter is none for most: <s> for Llama, which was trained so, and whose prompts `generate` begins so too. Without a token
    for the end, an empty line stands between documents.
    """
    separated = tokenizer.end_of_text is None
    texts = [
        SEPARATOR + piece.text if separated and piece.begins and (group, piece.number) != (0, 0) else piece.text
        for piece in pieces
    ]
    try:
        ids, offsets = tokenizer.encode_documents(texts)
    except UserError:
        _refuse_one(pieces, texts, tokenizer)
        raise
    if len(ids) and int(ids.max()) >= tokenizer.vocab_size:
        raise UserError(
            f"the tokenizer gives id {ids.max()}, which is none of its {tokenizer.vocab_size:,}: its file is damaged"
        )
    marks = np.array(document_marks(tokenizer), dtype=np.uint32)
    bounds = offsets.astype(np.int64)
    for piece, begin, end in zip(pieces, bounds[:-1], bounds[1:], strict=True):
        own = ids[begin:end]
        yield np.concatenate([marks, own]) if piece.begins and len(marks) else own


def document_marks(tokenizer: Tokenizer) -> list[int]:
    """The ids before each document's own: the end of text, and the prefix of prompts, once where they are the same."""
    marks = [*([] if tokenizer.end_of_text is None else [tokenizer.end_of_text]), *tokenizer.prompt_prefix]
    return marks[:1] if len(marks) == 2 and marks[0] == marks[1] else marks


def _refuse_one(pieces: Sequence[_Piece], texts: Sequence[str], tokenizer: Tokenizer) -> None:
    """Raise the tokenizer's `UserError` with the place of the document that it refuses."""
    for piece, text in zip(pieces, texts, strict=True):
        try:
            tokenizer.encode_documents([text])
        except UserError as error:
            raise UserError(f"{piece.place}: {error}") from None


def hash_group(shop: Workshop, number: int, paths: Sequence[Path], report: Report) -> None:
    """Write the hashes of a group's documents, from which `mark_duplicates` learns what to leave out. Done already, it stays."""
    with _alone(shop, number):
        if not has_hashes(shop.directory, number):
            save_hashes(shop.directory, number, _hashes(shop.plan.groups[number], paths, report))


def _hashes(group: Group, paths: Sequence[Path], report: Report) -> list[int]:
    """The hash of each document."""
    reader = GroupReader(group, paths)
    hashes: list[int] = []
    for _, _, part in reader.parts():
        if part.starts:
            hashes.append(text_hash(text_bytes(part.text)))
        else:
            hashes[-1] = text_hash(text_bytes(part.text), hashes[-1])
        report(len(part.text), 0)
    return hashes
