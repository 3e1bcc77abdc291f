"""The facts of a dataset in lines of plain text."""

from collections.abc import Iterator, Sequence

from glassgpt.data.inspect import DatasetFacts, LengthFacts
from glassgpt.data.shards import SPLITS
from glassgpt.utils.formatting import one_line

_NAME = 18
_FIGURE = 16
_BAR = 40
_SAMPLE = 100


def facts_text(facts: DatasetFacts) -> str:
    """All facts, in paragraphs under a heading each."""
    paragraphs = [
        _head(facts),
        _splits(facts),
        list(_source_counts(facts)),
        list(_lengths(facts.lengths)),
        list(_frequent(facts)),
        list(_samples(facts)),
    ]
    return "\n\n".join("\n".join(line.rstrip() for line in lines) for lines in paragraphs if lines)


def _head(facts: DatasetFacts) -> list[str]:
    kind, size = facts.tokenizer["kind"], facts.tokenizer["vocab_size"]
    shards = sum(split.shards for split in facts.splits.values())
    end = "no end-of-text token" if facts.end_of_text is None else f"end of text {facts.end_of_text}"
    rows = (
        ("name", facts.name),
        ("made by", facts.made_by),
        *([] if facts.source is None else [("from", facts.source)]),
        ("tokenizer", f"{kind}, {size:,} tokens, {end}"),
        ("tokens are", facts.dtype),
        ("on disk", f"{_size(facts.disk_bytes)} in {_plural(shards, 'shard')}"),
        ("fingerprint", facts.fingerprint),
    )
    return [f"{name:<{_NAME}}{value}" for name, value in rows]


def _splits(facts: DatasetFacts) -> list[str]:
    splits = [facts.splits[split] for split in SPLITS]
    rows: Sequence[tuple[str, Sequence[str]]] = (
        ("", SPLITS),
        ("shards", [f"{split.shards:,}" for split in splits]),
        ("tokens", [f"{split.tokens:,}" for split in splits]),
        ("documents", [_known(split.documents) for split in splits]),
        ("characters", [_known(split.characters) for split in splits]),
        ("bytes of text", [_known(split.bytes) for split in splits]),
        (
            "bytes a token",
            ["not known" if not s.tokens or s.bytes is None else f"{s.bytes / s.tokens:.3f}" for s in splits],
        ),
    )
    lines = [f"{name:<{_NAME}}" + "".join(f"{figure:>{_FIGURE}}" for figure in figures) for name, figures in rows]
    within = [(name, split.tokens_before) for name, split in facts.splits.items() if split.tokens_before]
    return [
        *lines,
        *(f"the first {count:,} tokens of {name} belong to a document that began before" for name, count in within),
    ]


def _source_counts(facts: DatasetFacts) -> Iterator[str]:
    names = {
        "documents": "documents with text in the source",
        "blank_documents": "blank ones, left out",
        "bad_rows": "rows without text, left out (--skip-bad)",
        "duplicates_removed": "repeated ones, left out (--deduplicate)",
        "duplicates": "repeated ones that are in here",
        "validation_documents_in_train": "documents of validation that are in train too",
    }
    for key, count in (facts.source_counts or {}).items():
        yield f"{count:>{_NAME + _FIGURE},}  {names[key]}"


def _lengths(lengths: LengthFacts | None) -> Iterator[str]:
    if lengths is None:
        yield "document lengths are not known: nothing marks where documents begin"
        return
    yield f"tokens a document: median {lengths.median:,}, 90th percentile {lengths.percentile_90:,}, longest {lengths.longest:,}"
    most = max(documents for _, _, documents in lengths.histogram)
    for least, longest, documents in lengths.histogram:
        bar = "#" * -(-_BAR * documents // most)  # a document leaves a mark, however few they are
        name = f"{least:,}" if least == longest else f"{least:,} to {longest:,}"
        yield f"{name:>{_NAME + 6}}{documents:>{_FIGURE},}  {bar}"


def _frequent(facts: DatasetFacts) -> Iterator[str]:
    yield "most frequent tokens"
    for token in facts.frequent:
        yield f"{token.id:>{_NAME}}{token.count:>{_FIGURE},} {token.share:>7.2%}  {token.piece}"
    yield f"{facts.unused_ids:,} of {facts.tokenizer['vocab_size']:,} ids never occur"
    if facts.unknown_tokens:
        yield f"{facts.unknown_tokens:,} of the tokens in here are no ids of the tokenizer: a file is damaged"


def _samples(facts: DatasetFacts) -> Iterator[str]:
    if facts.samples:
        yield "documents in train" if facts.samples[0].begins_document else "text in train"
    for sample in facts.samples:
        yield f"token {sample.token:>{_NAME - 6},}  {one_line(sample.text, _SAMPLE)}"


def _known(count: int | None) -> str:
    return "not known" if count is None else f"{count:,}"


def _plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _size(count: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count} bytes"
