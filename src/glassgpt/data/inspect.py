"""What is in a dataset: token counts, document lengths and samples, as `glassgpt data info` prints them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from glassgpt.data.dataset import MANIFEST, SOURCE_COUNTS, Dataset, Ids, TokenStream, files_of, open_dataset
from glassgpt.data.formats import project_of
from glassgpt.data.shards import SPLITS
from glassgpt.tokenizers.builtin import Tokenizer
from glassgpt.utils.formatting import Log, ProgressLine, escape_token, format_bytes, one_line

_FREQUENT = 20
_SAMPLE_TOKENS = 200


def dataset_facts(directory: Path, log: Log | None = None) -> dict[str, Any]:
    """Read a dataset once and return its facts as a JSON value. `log` receives progress lines.

    `splits`: per split the number of `shards`, `tokens`, `documents` that start in it, `tokens_before` the first one,
    `characters` and `bytes` of text. `lengths` of documents in tokens, with marks, and a `histogram` of (shortest,
    longest, documents) by powers of two. `unknown_tokens` are outside the vocabulary, as in damaged files. What is not
    known of another project's files is None. Raises `UserError` as `open_dataset` and `document_starts` do.
    """
    dataset = open_dataset(directory, check=False)  # also of a damaged one
    tokenizer, manifest, is_prepared = dataset.tokenizer, dataset.manifest, dataset.is_prepared
    progress = ProgressLine(log)
    contents = {split: _read_split(dataset, split, progress) for split in SPLITS}
    counts = contents["train"].counts + contents["validation"].counts
    lengths = [np.diff(content.starts, append=content.tokens) for content in contents.values()]
    files = [file.path for split in SPLITS for file in dataset.files[split]]
    if is_prepared:
        files = [directory / name for name in (MANIFEST, *files_of(manifest))]
    return {
        "directory": str(directory),
        "name": manifest["source"]["name"],
        "made_by": "glassgpt" if is_prepared else project_of(dataset.files["train"][0]),
        "source": manifest["request"]["source"] if is_prepared else None,
        "tokenizer": {**manifest["tokenizer"], "kind": tokenizer.kind, "vocab_size": tokenizer.vocab_size},
        "end_of_text": tokenizer.end_of_text,
        "dtype": manifest["dtype"],
        "disk_bytes": sum(path.stat().st_size for path in files),
        "fingerprint": dataset.fingerprint,
        "splits": {split: _split_facts(dataset, split, content) for split, content in contents.items()},
        "source_counts": {key: manifest[key] for key in SOURCE_COUNTS if key in manifest} if is_prepared else None,
        "lengths": length_facts(np.concatenate(lengths)),
        "frequent": _frequent(counts[:-1], tokenizer),
        "unused_ids": int((counts[:-1] == 0).sum()),
        "unknown_tokens": int(counts[-1]),
        "samples": _samples(dataset.train, tokenizer, contents["train"].starts),
    }


class _SplitContent(NamedTuple):
    """The result of reading a split."""

    tokens: int
    counts: Ids  # occurrences (vocab_size + 1,) of each id, and last of all tokens that are not an id
    starts: Ids  # the first token (documents,) of each document
    bytes: int  # of the tokens of another project's files


def _read_split(dataset: Dataset, split: str, progress: ProgressLine) -> _SplitContent:
    """Count the tokens and find the documents: by the index, otherwise by end-of-text tokens."""
    splits = {"train": dataset.train, "validation": dataset.validation}
    end_of_text, vocab_size = dataset.tokenizer.end_of_text, dataset.tokenizer.vocab_size
    # nanoGPT writes the token after each document, so that both splits end with one; others write it before.
    is_last = all(part.read(len(part) - 1, 1)[0] == end_of_text for part in splits.values())
    counts = np.zeros(vocab_size + 1, dtype=np.int64)
    marked = [np.zeros(int(is_last), dtype=np.int64)]
    position = size = 0
    last = -1
    for chunk in (chunk for file in dataset.files[split] for chunk in file.chunks()):
        # A flipped bit can make an id of four billion, for which `bincount` would need as many counts.
        is_small = vocab_size > np.iinfo(chunk.dtype).max
        known = chunk if is_small else np.minimum(chunk, chunk.dtype.type(vocab_size))
        counts += np.bincount(known, minlength=vocab_size + 1)
        if not dataset.is_prepared:
            ids = np.minimum(chunk.astype(np.int64), vocab_size - 1)
            size += int(dataset.tokenizer.text_bytes(ids, np.append(last, ids[:-1])).sum())
            last = int(ids[-1])
        if end_of_text is not None and not dataset.is_prepared:
            marked.append(np.flatnonzero(chunk == end_of_text) + position + is_last)
        position += len(chunk)
        progress.update(f"counted {position / 1e6:,.0f}M of {len(splits[split]) / 1e6:,.0f}M tokens for {split}")
    starts = splits[split].document_starts()
    if starts is None:
        starts = np.concatenate(marked)
        starts = starts[starts < position]
    return _SplitContent(position, counts, starts, size)


def _split_facts(dataset: Dataset, split: str, content: _SplitContent) -> dict[str, int | None]:
    recorded, documents = dataset.manifest["splits"][split], len(content.starts)
    is_known = dataset.is_prepared or documents > 0
    first = int(content.starts[0]) if documents else content.tokens
    token_bytes = None if content.counts[-1] else content.bytes
    return {
        "shards": len(recorded["shards"]),
        "tokens": content.tokens,
        "documents": documents if is_known else None,
        "tokens_before": first if is_known else None,
        "characters": recorded.get("characters"),
        "bytes": recorded.get("bytes", token_bytes),
    }


def length_facts(lengths: Ids) -> dict[str, Any] | None:
    """The facts of these lengths (documents,); None if there are none."""
    count = len(lengths)
    if not count:
        return None
    ordered = np.sort(lengths)
    powers = np.frexp(ordered.astype(np.float64))[1]  # 0 for 0, 1 for 1, 2 for 2 and 3, ...
    documents = np.bincount(powers)
    rows = range(int(powers[0]), len(documents))
    return {
        "histogram": [[(1 << power) >> 1, (1 << power) - 1, int(documents[power])] for power in rows],
        "median": int(ordered[(count + 1) // 2 - 1]),
        "percentile_90": int(ordered[-(-count * 9 // 10) - 1]),
        "longest": int(ordered[-1]),
    }


def _frequent(counts: Ids, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    frequent = []
    for i in np.argsort(-counts, kind="stable")[:_FREQUENT].tolist():
        if count := int(counts[i]):
            piece = escape_token(tokenizer.decode_bytes([i], after=i))
            frequent.append({"id": i, "count": count, "share": float(count / counts.sum()), "piece": piece})
    return frequent


def _samples(tokens: TokenStream, tokenizer: Tokenizer, starts: Ids) -> list[dict[str, Any]]:
    """The first document, the first in the second half, and the last; parts of the text if there is only one."""
    has_documents, total = len(starts) > 1, len(tokens)
    if has_documents:
        middle = min(int(np.searchsorted(starts, total // 2)), len(starts) - 1)
        ends = np.append(starts[1:], total)
        places = [(int(starts[i]), int(ends[i])) for i in sorted({0, middle, len(starts) - 1})]
    else:
        last = max(0, total - _SAMPLE_TOKENS)
        places = [(start, total) for start in sorted({0, min(total // 2, last), last})]
    samples = []
    for start, end in places:
        text = _sample_text(tokens.read(start, min(end - start, _SAMPLE_TOKENS)), tokenizer)
        samples.append({"token": start, "begins_document": has_documents, "text": text})
    return samples


def _sample_text(ids: Ids, tokenizer: Tokenizer) -> str:
    """The text of tokens, without marks between documents and without incomplete characters at either end."""
    marks = tokenizer.document_marks
    if marks and ids[: len(marks)].tolist() == marks:
        ids = ids[len(marks) :]
    ids = ids[(ids < tokenizer.vocab_size) & (ids != (-1 if tokenizer.end_of_text is None else tokenizer.end_of_text))]
    return tokenizer.decode(ids).strip("\ufffd")


_NAME, _FIGURE, _BAR, _SAMPLE = 18, 16, 40, 100  # widths


def facts_text(facts: Mapping[str, Any]) -> str:
    """The facts as plain text, in paragraphs."""
    tokenizer, end, samples = facts["tokenizer"], facts["end_of_text"], facts["samples"]
    end_of_text = "no end-of-text token" if end is None else f"end of text {end}"
    shards = sum(split["shards"] for split in facts["splits"].values())
    head = {
        "name": facts["name"],
        "format": facts["made_by"],
        "source": facts["source"],
        "tokenizer": f"{tokenizer['kind']}, {tokenizer['vocab_size']:,} tokens, {end_of_text}",
        "token type": facts["dtype"],
        "on disk": f"{format_bytes(facts['disk_bytes'])}, shards: {shards:,}",
        "fingerprint": facts["fingerprint"],
    }
    counts = facts["source_counts"] or {}
    frequent = ["most frequent tokens"]
    for token in facts["frequent"]:
        count, share = f"{token['count']:>{_FIGURE},}", f"{token['share']:>7.2%}"
        frequent.append(f"{token['id']:>{_NAME}}{count} {share}  {token['piece']}")
    frequent.append(f"{facts['unused_ids']:,} of {tokenizer['vocab_size']:,} ids never occur")
    if facts["unknown_tokens"]:
        frequent.append(f"{facts['unknown_tokens']:,} tokens are not ids of the tokenizer: a file is damaged")
    paragraphs = [
        [f"{name:<{_NAME}}{value}" for name, value in head.items() if value is not None],
        _split_lines(facts["splits"]),
        [f"{count:>{_NAME + _FIGURE},}  {SOURCE_COUNTS[key]}" for key, count in counts.items()],
        _length_lines(facts["lengths"]),
        frequent,
        ["documents in train" if samples[0]["begins_document"] else "text in train"],
    ]
    paragraphs[-1] += [f"token {each['token']:>{_NAME - 6},}  {one_line(each['text'], _SAMPLE)}" for each in samples]
    return "\n\n".join("\n".join(line.rstrip() for line in lines) for lines in paragraphs if lines)


def _split_lines(splits: Mapping[str, Mapping[str, Any]]) -> list[str]:
    rows = {"": list(splits)}
    for key in ("shards", "tokens", "documents", "characters", "bytes"):
        figures = ["unknown" if split[key] is None else f"{split[key]:,}" for split in splits.values()]
        rows["bytes of text" if key == "bytes" else key] = figures
    rows["bytes per token"] = [
        f"{split['bytes'] / split['tokens']:.3f}" if split["tokens"] and split["bytes"] else "unknown"
        for split in splits.values()
    ]
    lines = [f"{name:<{_NAME}}" + "".join(f"{cell:>{_FIGURE}}" for cell in cells) for name, cells in rows.items()]
    for name, split in splits.items():
        if before := split["tokens_before"]:
            lines.append(f"the first {before:,} tokens of {name} continue a document that started before")
    return lines


def _length_lines(lengths: Mapping[str, Any] | None) -> list[str]:
    if lengths is None:
        return ["document lengths are unknown: the files do not mark where documents start"]
    median, percentile_90, longest = lengths["median"], lengths["percentile_90"], lengths["longest"]
    lines = [f"tokens per document: median {median:,}, 90th percentile {percentile_90:,}, longest {longest:,}"]
    most = max(documents for _, _, documents in lengths["histogram"])
    for shortest, longest, documents in lengths["histogram"]:
        bar = "#" * -(-_BAR * documents // most)  # at least one mark if there is a document
        name = f"{shortest:,}" if shortest == longest else f"{shortest:,} to {longest:,}"
        lines.append(f"{name:>{_NAME + 6}}{documents:>{_FIGURE},}  {bar}")
    return lines
