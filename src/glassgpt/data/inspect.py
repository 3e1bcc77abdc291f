"""What is in a dataset: token counts, document lengths and samples, as `glassgpt data info` prints them.

Tokens are read a few million at a time; memory grows by a few dozen bytes per document. Shapes: `V` vocabulary.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from glassgpt.data.dataset import Dataset, Ids, TokenStream, open_dataset
from glassgpt.data.formats import project_of
from glassgpt.data.progress import Log, ProgressLine
from glassgpt.data.shards import SPLITS, TokenFile, index_path, read_index
from glassgpt.data.work_units import document_marks
from glassgpt.tokenizers.builtin import Tokenizer
from glassgpt.utils.errors import UserError
from glassgpt.utils.formatting import escape_token, format_bytes, one_line

_FREQUENT = 20
_SAMPLE_TOKENS = 200
# Counts of the source in the manifest, and how the table names them.
_SOURCE_COUNTS = {
    "documents": "documents with text in the source",
    "blank_documents": "blank documents, left out",
    "bad_rows": "rows without text, left out (--skip-bad)",
    "duplicates_removed": "duplicates, left out (--deduplicate)",
    "duplicates": "duplicates in the dataset",
    "validation_documents_in_train": "validation documents that are also in train",
}


@dataclass(frozen=True, kw_only=True)
class SplitFacts:
    """One split. For another project's files, what is not known is None."""

    shards: int
    tokens: int
    documents: int | None  # that start in this split
    tokens_before: int | None  # at the beginning, of a document that started elsewhere
    characters: int | None
    bytes: int | None  # of text in UTF-8; for another project's files, of the tokens


@dataclass(frozen=True, kw_only=True)
class LengthFacts:
    """Lengths of documents in tokens, with the marks before each."""

    histogram: tuple[tuple[int, int, int], ...]  # (shortest, longest, documents) by powers of two, without gaps
    median: int  # the shortest length that at least half of the documents do not exceed
    percentile_90: int
    longest: int


@dataclass(frozen=True, kw_only=True)
class FrequentToken:
    """A token, its count and its share of all tokens; `piece` as `tokenizer show` prints it."""

    id: int
    count: int
    share: float
    piece: str


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Text of the training split from this token on: the start of a document, if several are known, or any part."""

    token: int
    begins_document: bool
    text: str


@dataclass(frozen=True, kw_only=True)
class DatasetFacts:
    """All that `glassgpt data info` shows of a dataset."""

    directory: str
    name: str
    made_by: str
    source: str | None  # what was prepared: a name, a path or a hub id; None for another project's files
    tokenizer: Mapping[str, Any]  # `kind`, `vocab_size` and `sha256`
    end_of_text: int | None
    dtype: str
    disk_bytes: int
    fingerprint: str
    splits: Mapping[str, SplitFacts]
    source_counts: Mapping[str, int] | None  # as in the manifest; None for another project's files
    lengths: LengthFacts | None  # of both splits; None if nothing marks documents
    frequent: tuple[FrequentToken, ...]
    unused_ids: int
    unknown_tokens: int  # outside the vocabulary: only in damaged files
    samples: tuple[Sample, ...]


def dataset_facts(directory: Path, log: Log | None = None) -> DatasetFacts:
    """Read a dataset once and collect its facts. `log` receives progress lines.

    Raises `UserError` as `open_dataset` does, and for an index with unordered documents.
    """
    dataset = open_dataset(directory)
    tokenizer, manifest, is_prepared = dataset.tokenizer, dataset.manifest, dataset.is_prepared
    total, progress = len(dataset.train) + len(dataset.validation), ProgressLine(log)

    def report(read: int) -> None:
        progress.update(f"counted {read / 1e6:,.0f}M of {total / 1e6:,.0f}M tokens")

    train = _read_split(dataset, "train", report)
    validation = _read_split(dataset, "validation", lambda read: report(len(dataset.train) + read))
    counts = train.counts + validation.counts
    files = [file.path for split in SPLITS for file in dataset.files[split]]
    return DatasetFacts(
        directory=str(directory),
        name=manifest["source"]["name"],
        made_by="glassgpt" if is_prepared else project_of(dataset.files["train"][0]),
        source=manifest["request"]["source"] if is_prepared else None,
        tokenizer=manifest["tokenizer"],
        end_of_text=tokenizer.end_of_text,
        dtype=manifest["dtype"],
        disk_bytes=sum(path.stat().st_size for path in (directory.iterdir() if is_prepared else files)),
        fingerprint=dataset.fingerprint,
        splits={
            split: _split_facts(dataset, split, content)
            for split, content in (("train", train), ("validation", validation))
        },
        source_counts={key: manifest[key] for key in _SOURCE_COUNTS} if is_prepared else None,
        lengths=length_facts(np.concatenate([train.lengths(), validation.lengths()])),
        frequent=_frequent(counts[:-1], tokenizer),
        unused_ids=int((counts[:-1] == 0).sum()),
        unknown_tokens=int(counts[-1]),
        samples=_samples(dataset.train, tokenizer, train.starts),
    )


# --------------------------------------------------------------------------------------------------- tokens, documents


@dataclass(frozen=True)
class _SplitContent:
    """What one reading of a split finds."""

    tokens: int
    counts: Ids
    """Occurrences (V + 1,) of each id, and, last, of all tokens that are not an id."""
    starts: Ids
    """The first token (documents,) of each document."""

    def lengths(self) -> Ids:
        """The length (documents,) of each document."""
        return np.diff(self.starts, append=self.tokens) if len(self.starts) else self.starts


def _read_split(dataset: Dataset, split: str, report: Callable[[int], None]) -> _SplitContent:
    """Count the tokens and find the documents. Raises `UserError` for an index with unordered documents.

    Documents start where the index says. Without an index, they start at each end-of-text token, or after it if both
    splits end with one, as nanoGPT writes them.
    """
    end_of_text = None if dataset.is_prepared else dataset.tokenizer.end_of_text
    splits = (dataset.train, dataset.validation)
    is_last = end_of_text is not None and all(part.read(len(part) - 1, 1)[0] == end_of_text for part in splits)
    vocab_size = dataset.tokenizer.vocab_size
    counts = np.zeros(vocab_size + 1, dtype=np.int64)
    starts = [np.zeros(int(is_last), dtype=np.int64)]
    position = 0
    for file in dataset.files[split]:
        if dataset.is_prepared:
            starts.append(_indexed_starts(file) + position)
        for chunk in file.chunks():
            # A flipped bit can make an id of four billion, for which `bincount` would need as many counts.
            is_small = vocab_size > np.iinfo(chunk.dtype).max
            known = chunk if is_small else np.minimum(chunk, chunk.dtype.type(vocab_size))
            counts += np.bincount(known, minlength=vocab_size + 1)
            if end_of_text is not None:
                starts.append(np.flatnonzero(chunk == end_of_text) + position + is_last)
            position += len(chunk)
            report(position)
    documents = np.concatenate(starts)
    return _SplitContent(position, counts, documents if dataset.is_prepared else documents[documents < position])


def _indexed_starts(file: TokenFile) -> Ids:
    path = index_path(file.path)
    starts = read_index(path)["start"]
    if len(starts) and (starts[-1] > file.tokens or (starts[1:] < starts[:-1]).any()):
        raise UserError(f"dataset {path.parent} is damaged: {path.name} has unordered documents; prepare it again")
    return starts.astype(np.int64)


def _split_facts(dataset: Dataset, split: str, content: _SplitContent) -> SplitFacts:
    recorded, documents = dataset.manifest["splits"][split], len(content.starts)
    is_known = dataset.is_prepared or documents > 0
    token_bytes = None if content.counts[-1] else int(content.counts[:-1] @ dataset.tokenizer.byte_lengths())
    return SplitFacts(
        shards=len(recorded["shards"]),
        tokens=content.tokens,
        documents=documents if is_known else None,
        tokens_before=(int(content.starts[0]) if documents else content.tokens) if is_known else None,
        characters=recorded.get("characters"),
        bytes=recorded.get("bytes", token_bytes),
    )


def length_facts(lengths: Ids) -> LengthFacts | None:
    """The facts of these lengths (documents,); None if there are none."""
    count = len(lengths)
    if not count:
        return None
    ordered = np.sort(lengths)
    powers = np.frexp(ordered.astype(np.float64))[1]  # 0 for 0, 1 for 1, 2 for 2 and 3, ...
    documents = np.bincount(powers)
    rows = range(int(powers[0]), len(documents))
    return LengthFacts(
        histogram=tuple(((1 << power) >> 1, (1 << power) - 1, int(documents[power])) for power in rows),
        median=int(ordered[(count + 1) // 2 - 1]),
        percentile_90=int(ordered[-(-count * 9 // 10) - 1]),
        longest=int(ordered[-1]),
    )


def _frequent(counts: Ids, tokenizer: Tokenizer) -> tuple[FrequentToken, ...]:
    total = int(counts.sum())
    return tuple(
        FrequentToken(
            id=i,
            count=int(counts[i]),
            share=int(counts[i]) / total,
            piece=escape_token(tokenizer.decode_bytes([i], after=i)),
        )
        for i in np.argsort(-counts, kind="stable")[:_FREQUENT].tolist()
        if counts[i]
    )


def _samples(tokens: TokenStream, tokenizer: Tokenizer, starts: Ids) -> tuple[Sample, ...]:
    """The first document, the first in the second half, and the last; parts of the text if there is only one."""
    has_documents = len(starts) > 1
    if has_documents:
        middle = min(int(np.searchsorted(starts, len(tokens) // 2)), len(starts) - 1)
        ends = np.append(starts[1:], len(tokens))
        places = [(int(starts[i]), int(ends[i])) for i in sorted({0, middle, len(starts) - 1})]
    else:
        last = max(0, len(tokens) - _SAMPLE_TOKENS)
        places = [(start, len(tokens)) for start in sorted({0, len(tokens) // 2, last}) if start <= last]
    return tuple(
        Sample(
            token=start,
            begins_document=has_documents,
            text=_sample_text(tokens.read(start, min(end - start, _SAMPLE_TOKENS)), tokenizer),
        )
        for start, end in places
    )


def _sample_text(ids: Ids, tokenizer: Tokenizer) -> str:
    """The text of tokens, without marks between documents and without incomplete characters at either end."""
    marks = document_marks(tokenizer)
    if marks and ids[: len(marks)].tolist() == marks:
        ids = ids[len(marks) :]
    ids = ids[(ids < tokenizer.vocab_size) & (ids != (-1 if tokenizer.end_of_text is None else tokenizer.end_of_text))]
    return tokenizer.decode(ids).strip("\ufffd")


# ---------------------------------------------------------------------------------------------------------------- table

_NAME, _FIGURE, _BAR, _SAMPLE = 18, 16, 40, 100  # widths


def facts_text(facts: DatasetFacts) -> str:
    """The facts as plain text, in paragraphs."""
    paragraphs = (_head_lines, _split_lines, _source_lines, _length_lines, _frequent_lines, _sample_lines)
    texts = ["\n".join(line.rstrip() for line in lines(facts)) for lines in paragraphs]
    return "\n\n".join(text for text in texts if text)


def _head_lines(facts: DatasetFacts) -> Iterator[str]:
    kind, size = facts.tokenizer["kind"], facts.tokenizer["vocab_size"]
    shards = sum(split.shards for split in facts.splits.values())
    end = "no end-of-text token" if facts.end_of_text is None else f"end of text {facts.end_of_text}"
    for name, value in (
        ("name", facts.name),
        ("format", facts.made_by),
        ("source", facts.source),
        ("tokenizer", f"{kind}, {size:,} tokens, {end}"),
        ("token type", facts.dtype),
        ("on disk", f"{format_bytes(facts.disk_bytes)} in {shards:,} shard{'' if shards == 1 else 's'}"),
        ("fingerprint", facts.fingerprint),
    ):
        if value is not None:
            yield f"{name:<{_NAME}}{value}"


def _split_lines(facts: DatasetFacts) -> Iterator[str]:
    splits = [facts.splits[split] for split in SPLITS]
    ratios = ["unknown" if not s.tokens or s.bytes is None else f"{s.bytes / s.tokens:.3f}" for s in splits]
    rows: Sequence[tuple[str, Sequence[str]]] = (
        ("", SPLITS),
        ("shards", [f"{split.shards:,}" for split in splits]),
        ("tokens", [f"{split.tokens:,}" for split in splits]),
        ("documents", [_known(split.documents) for split in splits]),
        ("characters", [_known(split.characters) for split in splits]),
        ("bytes of text", [_known(split.bytes) for split in splits]),
        ("bytes per token", ratios),
    )
    for name, figures in rows:
        yield f"{name:<{_NAME}}" + "".join(f"{figure:>{_FIGURE}}" for figure in figures)
    for name, split in facts.splits.items():
        if split.tokens_before:
            yield f"the first {split.tokens_before:,} tokens of {name} continue a document that started before"


def _source_lines(facts: DatasetFacts) -> Iterator[str]:
    for key, count in (facts.source_counts or {}).items():
        yield f"{count:>{_NAME + _FIGURE},}  {_SOURCE_COUNTS[key]}"


def _length_lines(facts: DatasetFacts) -> Iterator[str]:
    lengths = facts.lengths
    if lengths is None:
        yield "document lengths are unknown: the files do not mark where documents start"
        return
    yield (
        f"tokens per document: median {lengths.median:,}, 90th percentile {lengths.percentile_90:,}, "
        f"longest {lengths.longest:,}"
    )
    most = max(documents for _, _, documents in lengths.histogram)
    for least, longest, documents in lengths.histogram:
        bar = "#" * -(-_BAR * documents // most)  # at least one mark if there is a document
        name = f"{least:,}" if least == longest else f"{least:,} to {longest:,}"
        yield f"{name:>{_NAME + 6}}{documents:>{_FIGURE},}  {bar}"


def _frequent_lines(facts: DatasetFacts) -> Iterator[str]:
    yield "most frequent tokens"
    for token in facts.frequent:
        yield f"{token.id:>{_NAME}}{token.count:>{_FIGURE},} {token.share:>7.2%}  {token.piece}"
    yield f"{facts.unused_ids:,} of {facts.tokenizer['vocab_size']:,} ids never occur"
    if facts.unknown_tokens:
        yield f"{facts.unknown_tokens:,} tokens are not ids of the tokenizer: a file is damaged"


def _sample_lines(facts: DatasetFacts) -> Iterator[str]:
    if facts.samples:
        yield "documents in train" if facts.samples[0].begins_document else "text in train"
    for sample in facts.samples:
        yield f"token {sample.token:>{_NAME - 6},}  {one_line(sample.text, _SAMPLE)}"


def _known(count: int | None) -> str:
    return "unknown" if count is None else f"{count:,}"
