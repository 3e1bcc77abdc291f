"""The plan of a dataset: its files in groups, and which documents are for validation. All that shards depend on besides the text."""

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from glassgpt.config.schema import DataConfig
from glassgpt.data.readers import Part, ReadOptions, read_parts
from glassgpt.data.shards import SPLITS
from glassgpt.data.sources import Source
from glassgpt.tokenizers.builtin import Tokenizer, build_tokenizer
from glassgpt.utils.errors import UserError
from glassgpt.utils.files import write_atomic

PLAN = "plan.json"
# Between documents, where the tokenizer has no end-of-text token.
SEPARATOR = "\n\n"
# Bytes of files in a group, for each token of a shard: about the text of a shard where files are plain, several where they are compressed.
_GROUP_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class Group:
    """Files that follow one another. `first_file` is the number of the first one in the whole source."""

    files: tuple[str, ...]
    first_file: int
    reading: ReadOptions
    split: str | None = None
    """The split of all its documents; None where the plan's rule tells."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All that shards depend on beside the text and the tokenizer, the rules for validation among it."""

    groups: tuple[Group, ...]
    dtype: str
    shard_tokens: int
    fraction: float | None = None
    """This share of the documents, evenly spaced."""
    document: tuple[int, int] | None = None
    """The document in this file and row: the last one of a few, or the first that the share has for sure."""
    cut: int | None = None
    """The text from this character on, of a source that is one document."""

    def save(self, directory: Path) -> None:
        """Write the plan into the directory in which the dataset is made."""
        write_atomic(directory / PLAN, json.dumps(dataclasses.asdict(self)))

    @classmethod
    def load(cls, directory: Path) -> "Plan":
        """The plan that `save` has written."""
        values = json.loads((directory / PLAN).read_bytes())
        groups = tuple(
            Group(**{**group, "files": tuple(group["files"]), "reading": ReadOptions(**group["reading"])})
            for group in values.pop("groups")
        )
        document = values.pop("document")
        return cls(groups=groups, document=None if document is None else tuple(document), **values)


class Planner:
    """Looks through the sources: the text, and, where validation has one of its own, that; each with the options to read it."""

    def __init__(self, sources: Sequence[tuple[Source, ReadOptions]], data: DataConfig) -> None:
        self._sources, self._data = sources, data

    def plan(self, given: Tokenizer | None) -> tuple[Plan, Tokenizer]:
        """The plan, and the tokenizer: that which is given, else the one that `data` names.

        One of characters has those of all texts. Raises `UserError` for a source without text.
        """
        bad: list[str] = []
        places, characters = self._survey(lambda row, reason: bad.append(reason))
        if not places and bad:
            raise UserError(
                f"{self._sources[0][0].location} has no text in it: all {len(bad):,} rows are left out ({bad[0]})"
            )
        if not places:
            raise UserError(f"{self._sources[0][0].location} has no text in it: it is empty or only white space")
        tokenizer = given or build_tokenizer(self._data.tokenizer, self._all_texts())
        fraction = cut = document = None
        if len(self._sources) == 1 and self._data.validation == "fraction":
            if len(places) >= self._first_chosen and len(places) > 1:
                fraction, document = self._data.validation_fraction, places[self._first_chosen - 1]
            elif len(places) > 1:
                document = places[-1]
            else:
                # Exact, where floating point could end one character off: for tinyshakespeare it is nanoGPT's `data[:int(n*0.9)]`.
                cut = int(characters * (1 - Fraction(str(self._data.validation_fraction))))
        plan = Plan(
            groups=tuple(self._groups()),
            dtype="uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32",
            shard_tokens=self._data.shard_tokens,
            fraction=fraction,
            document=document,
            cut=cut,
        )
        return plan, tokenizer

    def _survey(self, skipped: Callable[[int, str], None]) -> tuple[list[tuple[int, int]], int]:
        """File and row of the first documents, as many as matter here, and their characters."""
        places, characters = [], 0
        for file, part in _parts(*self._sources[0], skipped):
            if part.starts:
                places.append((file, part.row))
                if len(places) == max(2, self._first_chosen):
                    break
            characters += len(part.text)
        return places, characters

    @property
    def _first_chosen(self) -> int:
        """Number, from 1, of the first document that the fraction has for validation, were all of one group: see `groups`."""
        return math.ceil(0.5 / self._data.validation_fraction)

    def _all_texts(self) -> Iterator[str]:
        """What a vocabulary of characters must hold."""
        documents = 0
        for source, reading in self._sources:
            for _, part in _parts(source, reading):
                documents += part.starts
                yield part.text
        if documents > 1:
            yield SEPARATOR

    def _groups(self) -> Iterator[Group]:
        """Files that follow one another, until they are large enough."""
        first = 0
        for number, (source, reading) in enumerate(self._sources):
            split = None if len(self._sources) == 1 else SPLITS[number]
            names: list[str] = []
            size = 0
            for file in source.files():
                names.append(file.name)
                size += file.bytes
                if size >= _GROUP_BYTES * self._data.shard_tokens:
                    yield Group(files=tuple(names), first_file=first, reading=reading, split=split)
                    first, names, size = first + len(names), [], 0
            if names:
                yield Group(files=tuple(names), first_file=first, reading=reading, split=split)
                first += len(names)


def _parts(
    source: Source, reading: ReadOptions, skipped: Callable[[int, str], None] | None = None
) -> Iterator[tuple[int, Part]]:
    """The documents with text, each part with the number of its file; `skipped` as in `read_parts`."""
    for number, file in enumerate(source.files()):
        for part in with_text(read_parts(file.fetch(), reading, name=file.name, skipped=skipped), lambda: None):
            yield number, part


def with_text(parts: Iterable[Part], blank: Callable[[], None]) -> Iterator[Part]:
    """The parts of documents that are not empty or only white space; `blank` is called for each that is.

    A document of several parts has text, whatever the first of them looks like.
    """
    held: Part | None = None
    for part in parts:
        if held is not None and part.starts:
            blank()
        elif held is not None:
            yield held
        held = part if part.starts and not part.text.strip() else None
        if held is None:
            yield part
    if held is not None:
        blank()
