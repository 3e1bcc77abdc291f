"""The plan of a dataset: which documents are for validation, and the work units into which its files are divided.

The shards depend on the plan, the tokenizer and the text alone. A plan is computed again when a build resumes.
"""

import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from glassgpt.config.schema import DataConfig, ReadingConfig
from glassgpt.data.readers import Part, read_documents
from glassgpt.data.shards import SPLITS
from glassgpt.data.sources import Source
from glassgpt.tokenizers.builtin import Tokenizer, build_tokenizer
from glassgpt.utils.errors import UserError

# Between documents, if the tokenizer has no end-of-text token.
SEPARATOR = "\n\n"
# Bytes of files in a work unit, for each token of a shard: about one shard of plain text, several if it is compressed.
_UNIT_BYTES = 4
_GOLDEN_RATIO = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How documents become shards."""

    tokenizer_sha256: str
    dtype: str
    shard_tokens: int
    fraction: float | None = None  # this share of the documents is for validation, evenly spaced
    document: tuple[int, int] | None = None  # so is this file's row: the only such document, or the first of its share
    cut: int | None = None  # if the source is one document: its text after this many characters

    def is_validation(self, unit: int, number: int, place: tuple[int, int]) -> bool:
        """Whether document `number` of a work unit, at this file and row, is for validation.

        With a fraction of 0.1, it is one document in ten. Which one differs from unit to unit, so that many units of
        few documents have their share together; in the first unit it is the middle one.
        """
        if place == self.document or self.fraction is None:
            return place == self.document
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
    sources: Sequence[Source], data: DataConfig, tokenizer: Tokenizer | None = None
) -> tuple[Plan, list[WorkUnit], Tokenizer]:
    """Plan a dataset. The tokenizer is the one passed, or the one that `data` names.

    `sources` are the text and, if it has a source of its own, the validation text. A character tokenizer gets the
    characters of all of them. Raises `UserError` for a source without text.
    """
    own = ReadingConfig(**{field.name: getattr(data, field.name) for field in dataclasses.fields(ReadingConfig)})
    with_reading = [(source, source.reading or own) for source in sources]
    # Number, from 1, of the first document that the fraction would choose for validation if there were one work unit.
    first_chosen = math.ceil(0.5 / data.validation_fraction)
    places, characters = _first_documents(*with_reading[0], max(2, first_chosen))
    tokenizer = tokenizer or build_tokenizer(data.tokenizer, _all_texts(with_reading))
    plan = Plan(
        tokenizer_sha256=hashlib.sha256(tokenizer.to_json().encode()).hexdigest(),
        dtype="uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32",
        shard_tokens=data.shard_tokens,
    )
    if len(sources) == 1 and data.validation == "fraction":
        if len(places) == 1:
            # Exact; a float could be one character off. For tinyshakespeare it is nanoGPT's `data[:int(n*0.9)]`.
            cut = int(characters * (1 - Fraction(str(data.validation_fraction))))
            plan = dataclasses.replace(plan, cut=cut)
        elif len(places) >= first_chosen:
            plan = dataclasses.replace(plan, fraction=data.validation_fraction, document=places[first_chosen - 1])
        else:
            plan = dataclasses.replace(plan, document=places[-1])
    return plan, list(_work_units(with_reading, _UNIT_BYTES * data.shard_tokens)), tokenizer


def _first_documents(source: Source, reading: ReadingConfig, count: int) -> tuple[list[tuple[int, int]], int]:
    """File and row of the first documents, at most `count`, and the number of their characters."""
    places, characters = [], 0
    skipped: list[str] = []
    for file, part in _parts(source, reading, lambda row, reason: skipped.append(reason)):
        if part.starts:
            places.append((file, part.row))
            if len(places) == count:
                break
        characters += len(part.text)
    if not places and skipped:
        raise UserError(f"{source.location} has no text: all {len(skipped):,} rows were skipped ({skipped[0]})")
    if not places:
        raise UserError(f"{source.location} has no text: it is empty or only white space")
    return places, characters


def _all_texts(sources: Iterable[tuple[Source, ReadingConfig]]) -> Iterator[str]:
    """All text that the tokenizer must be able to encode."""
    documents = 0
    for source, reading in sources:
        for _, part in _parts(source, reading):
            documents += part.starts
            yield part.text
    if documents > 1:
        yield SEPARATOR


def _work_units(sources: Sequence[tuple[Source, ReadingConfig]], least_bytes: int) -> Iterator[WorkUnit]:
    """Consecutive files of a source, until they have at least this many bytes."""
    number = first = 0
    for (source, reading), split in zip(sources, SPLITS, strict=False):
        files = source.files()
        names, size = [], 0
        for position, file in enumerate(files, start=1):
            names.append(file.name)
            size += file.bytes
            if size >= least_bytes or position == len(files):
                yield WorkUnit(number, tuple(names), first, reading, split if len(sources) > 1 else None)
                number, first = number + 1, first + len(names)
                names, size = [], 0


def _parts(
    source: Source, reading: ReadingConfig, on_skip: Callable[[int, str], None] | None = None
) -> Iterator[tuple[int, Part]]:
    """The documents with text, each part with the number of its file."""
    for number, file in enumerate(source.files()):
        parts = read_documents(file.fetch(), reading, name=file.name, on_skip=on_skip)
        for part in without_blank(parts, lambda: None):
            yield number, part


def without_blank(parts: Iterable[Part], on_blank: Callable[[], None]) -> Iterator[Part]:
    """The parts of documents that are not empty or only white space; `on_blank` is called for each that is.

    A document of several parts has text, even if its first part is blank.
    """
    held: Part | None = None
    for part in parts:
        if held is not None and part.starts:
            on_blank()
        elif held is not None:
            yield held
        held = part if part.starts and not part.text.strip() else None
        if held is None:
            yield part
    if held is not None:
        on_blank()
