"""What is in a dataset: its tokens counted, its documents measured, and a few of them as text.

Tokens are read some millions at a time and never held, so memory does not grow with the dataset; the time is that of reading it.
Shapes: `V` vocabulary, `N` tokens in a split.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from glassgpt.data.dataset import Dataset, Ids, TokenStream, open_dataset, read_manifest
from glassgpt.data.formats import open_shards
from glassgpt.data.progress import Log, Ticker
from glassgpt.data.shards import DTYPES, SPLITS, TokenFile, index_path, read_index
from glassgpt.data.work_units import document_marks
from glassgpt.tokenizers.builtin import Tokenizer
from glassgpt.utils.errors import UserError
from glassgpt.utils.formatting import escape_token

_FREQUENT = 20
_SAMPLE_TOKENS = 200
# Documents up to this length are counted by length, the few longer ones kept as they are: both exact, and of bounded size.
_COUNTED = 1 << 20
_SOURCE_COUNTS = (
    "documents",
    "blank_documents",
    "bad_rows",
    "duplicates_removed",
    "duplicates",
    "validation_documents_in_train",
)


@dataclass(frozen=True, kw_only=True)
class SplitFacts:
    """One split. What is not known of another project's files is None."""

    shards: int
    tokens: int
    documents: int | None
    """Documents that begin in this split."""
    tokens_before: int | None
    """Tokens at the beginning that belong to a document which began elsewhere: in the other split, or in a shard left out."""
    characters: int | None
    bytes: int | None
    """Bytes of text in UTF-8; of another project's files, those that the tokens stand for."""


@dataclass(frozen=True, kw_only=True)
class LengthFacts:
    """Lengths of documents in tokens, the marks before each included."""

    histogram: tuple[tuple[int, int, int], ...]
    """Shortest and longest length of a row, and the documents in it: the rows are powers of two, and none between is left out."""
    median: int
    """The shortest length that at least half of the documents do not exceed."""
    percentile_90: int
    longest: int


@dataclass(frozen=True, kw_only=True)
class FrequentToken:
    """A token, how often it occurs, and its share of all tokens; `piece` as `tokenizer show` prints it."""

    id: int
    count: int
    share: float
    piece: str


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Text from this token of the training split on: a document's beginning, or a stretch where there is one only, or none is known."""

    token: int
    begins_document: bool
    text: str


@dataclass(frozen=True, kw_only=True)
class DatasetFacts:
    """All that `glassgpt data info` tells of a dataset."""

    directory: str
    name: str
    made_by: str
    source: str | None
    """What was prepared: a name, a path or a hub id. None for another project's files."""
    tokenizer: Mapping[str, Any]
    """`kind`, `vocab_size` and `sha256`."""
    end_of_text: int | None
    dtype: str
    disk_bytes: int
    fingerprint: str
    splits: Mapping[str, SplitFacts]
    source_counts: Mapping[str, int] | None
    """What was read and what was left out: see the manifest. None for another project's files."""
    lengths: LengthFacts | None
    """Of the documents of both splits; None where nothing marks them."""
    frequent: tuple[FrequentToken, ...]
    unused_ids: int
    """Ids of the vocabulary that never occur."""
    unknown_tokens: int
    """Tokens that are no id of the vocabulary: some only where files are damaged."""
    samples: tuple[Sample, ...]


def dataset_facts(directory: Path, log: Log | None = None) -> DatasetFacts:
    """The facts of what `prepare` has made, or of token files of another project. `log` hears how far a long count has come.

    Raises `UserError` as `open_dataset` does, and for an index whose documents are in no order.
    """
    dataset = open_dataset(directory)
    tokenizer, manifest, is_ours = dataset.tokenizer, dataset.manifest, read_manifest(directory) is not None
    files = _token_files(dataset, is_ours)
    tick = Ticker(
        log or (lambda line: None), "counted", sum(file.tokens for split in SPLITS for file in files[split]), "tokens"
    )
    counts, lengths = np.zeros(tokenizer.vocab_size + 1, dtype=np.int64), _Lengths()
    contents = {split: _Content(dataset, split, is_ours, lengths) for split in SPLITS}
    for split in SPLITS:
        contents[split].read(files[split], tick)
        counts += contents[split].counts
    return DatasetFacts(
        directory=str(directory),
        name=manifest["source"]["name"],
        made_by="glassgpt" if is_ours else _project(files["train"][0]),
        source=manifest["request"]["source"] if is_ours else None,
        tokenizer=manifest["tokenizer"],
        end_of_text=tokenizer.end_of_text,
        dtype=manifest["dtype"],
        disk_bytes=_disk_bytes(directory, files, is_ours),
        fingerprint=dataset.fingerprint,
        splits={split: contents[split].facts(manifest["splits"][split]) for split in SPLITS},
        source_counts={key: manifest[key] for key in _SOURCE_COUNTS} if is_ours else None,
        lengths=lengths.facts(),
        frequent=_frequent(counts[:-1], tokenizer),
        unused_ids=int((counts[:-1] == 0).sum()),
        unknown_tokens=int(counts[-1]),
        samples=_samples(dataset.train, tokenizer, contents["train"].places()),
    )


def _token_files(dataset: Dataset, is_ours: bool) -> dict[str, list[TokenFile]]:
    if not is_ours:
        return open_shards(dataset.directory)
    dtype, splits = DTYPES[dataset.manifest["dtype"]], dataset.manifest["splits"]
    return {
        s: [TokenFile(dataset.directory / shard["name"], dtype, 0, shard["tokens"]) for shard in splits[s]["shards"]]
        for s in SPLITS
    }


def _project(file: TokenFile) -> str:
    if file.path.suffix == ".npy":
        return "build-nanogpt"
    return "llm.c" if file.offset else "nanoGPT"


def _disk_bytes(directory: Path, files: Mapping[str, Sequence[TokenFile]], is_ours: bool) -> int:
    paths = directory.iterdir() if is_ours else (file.path for split in SPLITS for file in files[split])
    return sum(path.stat().st_size for path in paths if path.is_file())


# ----------------------------------------------------------------------------------------------------- tokens, documents


class _Content:
    """What one reading of a split tells: how often each id occurs, and where documents begin.

    Documents begin where an index says so; without one, where the end-of-text token is: there, or, where both splits end with it,
    behind it (nanoGPT writes it so).
    """

    def __init__(self, dataset: Dataset, split: str, is_ours: bool, lengths: "_Lengths") -> None:
        self._tokens = dataset.train if split == "train" else dataset.validation
        self._tokenizer, self._is_ours, self._lengths = dataset.tokenizer, is_ours, lengths
        self.counts = np.zeros(dataset.tokenizer.vocab_size + 1, dtype=np.int64)
        """Occurrences (V + 1,) of each id, and, last, of all that are no id."""
        self._end_of_text = None if is_ours else dataset.tokenizer.end_of_text
        self._is_behind = self._end_of_text is not None and all(
            len(part) and part.read(len(part) - 1, 1)[0] == self._end_of_text
            for part in (dataset.train, dataset.validation)
        )
        self._documents = 0
        self._before: int | None = None
        self._open: Ids = np.empty(0, dtype=np.int64)
        """Where the last document begins, whose end is not known yet; empty before the first."""
        self._places: list[tuple[int, int] | None] = [None, None, None]

    def read(self, files: Sequence[TokenFile], tick: Ticker) -> None:
        """Read the split, once and from its beginning. Raises `UserError` for an index that cannot be one."""
        position = 0
        if self._is_behind:
            self._begin(np.zeros(1, dtype=np.int64))
        for file in files:
            if self._is_ours:
                self._begin(_starts(file) + position)
            for chunk in file.chunks():
                self._count(chunk)
                if self._end_of_text is not None:
                    starts = np.flatnonzero(chunk == self._end_of_text) + position + self._is_behind
                    self._begin(starts[starts < len(self._tokens)])
                position += len(chunk)
                tick(len(chunk))
        if len(self._open):
            self._measure(np.append(self._open, position))

    def facts(self, recorded: Mapping[str, Any]) -> SplitFacts:
        """What was found, and what the manifest knows besides."""
        is_known = self._is_ours or self._documents > 0
        text_bytes = None if self.counts[-1] else int(self.counts[:-1] @ self._tokenizer.byte_lengths())
        return SplitFacts(
            shards=len(recorded["shards"]),
            tokens=len(self._tokens),
            documents=self._documents if is_known else None,
            tokens_before=(len(self._tokens) if self._before is None else self._before) if is_known else None,
            characters=recorded.get("characters"),
            bytes=recorded.get("bytes", text_bytes),
        )

    def places(self) -> list[tuple[int, int]]:
        """Begin and end of the first document, the one behind the middle of the tokens, and the last; none of a single document."""
        places = sorted({place for place in self._places if place is not None})
        return places if len(places) > 1 else []

    def _count(self, chunk: npt.NDArray[Any]) -> None:
        size = len(self.counts) - 1
        # A flipped bit can make an id of four billion, for which `bincount` would take as many places.
        known = chunk if size > np.iinfo(chunk.dtype).max else np.minimum(chunk, chunk.dtype.type(size))
        self.counts += np.bincount(known, minlength=size + 1)

    def _begin(self, starts: Ids) -> None:
        """Further documents begin here: `starts` (documents,) in the split."""
        if not len(starts):
            return
        if self._before is None:
            self._before = int(starts[0])
        self._documents += len(starts)
        self._measure(np.concatenate([self._open, starts]))
        self._open = starts[-1:]

    def _measure(self, bounds: Ids) -> None:
        """Take note of documents that follow each other between these bounds (documents + 1,)."""
        self._lengths.add(np.diff(bounds))
        if len(bounds) < 2:
            return
        middle = int(np.searchsorted(bounds[:-1], len(self._tokens) // 2))
        first, then, _ = self._places
        if then is None and middle < len(bounds) - 1:
            then = (int(bounds[middle]), int(bounds[middle + 1]))
        self._places = [first or (int(bounds[0]), int(bounds[1])), then, (int(bounds[-2]), int(bounds[-1]))]


def _starts(file: TokenFile) -> Ids:
    """Where documents begin (documents,) in a shard, as its index says."""
    path = index_path(file.path)
    starts = read_index(path)["start"]
    if len(starts) and (starts[-1] > file.tokens or (starts[1:] < starts[:-1]).any()):
        raise UserError(
            f"the dataset {path.parent} is damaged: the documents in {path.name} are in no order; prepare it again"
        )
    return starts.astype(np.int64)


class _Lengths:
    """Lengths of documents, counted."""

    def __init__(self) -> None:
        self._counts = np.zeros(_COUNTED, dtype=np.int64)
        self._longer: list[int] = []

    def add(self, lengths: Ids) -> None:
        """Count these lengths (documents,)."""
        is_long = lengths >= _COUNTED
        counts = np.bincount(lengths[~is_long])
        self._counts[: len(counts)] += counts
        self._longer += lengths[is_long].tolist()

    def facts(self) -> LengthFacts | None:
        """None where there is no document."""
        short = np.flatnonzero(self._counts)
        longer, longer_counts = np.unique(np.array(self._longer, dtype=np.int64), return_counts=True)
        lengths, counts = np.concatenate([short, longer]), np.concatenate([self._counts[short], longer_counts])
        if not len(lengths):
            return None
        until = np.cumsum(counts)
        median, percentile_90 = (
            int(lengths[np.searchsorted(until, -(-int(until[-1]) * tenths // 10))]) for tenths in (5, 9)
        )
        return LengthFacts(
            histogram=_histogram(lengths, counts), median=median, percentile_90=percentile_90, longest=int(lengths[-1])
        )


def _histogram(lengths: Ids, counts: Ids) -> tuple[tuple[int, int, int], ...]:
    """Documents by powers of two, from `lengths` in order and the `counts` of each; a length of 0 is a row of its own."""
    powers = np.frexp(lengths.astype(np.float64))[1]  # 0 for 0, then 1 for 1, 2 for 2 and 3, …
    documents = np.bincount(powers, weights=counts)
    rows = range(int(powers[0]), len(documents))
    return tuple(((1 << power) >> 1, (1 << power) - 1, int(documents[power])) for power in rows)


# -------------------------------------------------------------------------------------------------------------- as text


def _frequent(counts: npt.NDArray[np.int64], tokenizer: Tokenizer) -> tuple[FrequentToken, ...]:
    total = int(counts.sum())
    order = [i for i in np.argsort(-counts, kind="stable")[:_FREQUENT].tolist() if counts[i]]
    return tuple(
        FrequentToken(
            id=i,
            count=int(counts[i]),
            share=int(counts[i]) / total,
            piece=escape_token(tokenizer.decode_bytes([i], after=i)),
        )
        for i in order
    )


def _samples(tokens: TokenStream, tokenizer: Tokenizer, places: Sequence[tuple[int, int]]) -> tuple[Sample, ...]:
    """The beginnings of the documents at these places; without any, stretches at the beginning, the middle and the end."""
    last = max(0, len(tokens) - _SAMPLE_TOKENS)
    stretches = [(start, len(tokens)) for start in sorted({0, len(tokens) // 2, last}) if start <= last]
    return tuple(
        Sample(
            token=start,
            begins_document=bool(places),
            text=_text(tokens.read(start, min(end - start, _SAMPLE_TOKENS)), tokenizer),
        )
        for start, end in places or stretches
    )


def _text(ids: Ids, tokenizer: Tokenizer) -> str:
    """The text of some tokens, without marks between documents and without characters of which a part is missing at either end."""
    marks = document_marks(tokenizer)
    if marks and ids[: len(marks)].tolist() == marks:
        ids = ids[len(marks) :]
    ids = ids[(ids < tokenizer.vocab_size) & (ids != (-1 if tokenizer.end_of_text is None else tokenizer.end_of_text))]
    return tokenizer.decode(ids).strip("\ufffd")
