"""What a tokenizer is and how it splits text, in lines in which every character is visible."""

import itertools
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from glassgpt.tokenizers.base import BYTE_OF, batches_by_size
from glassgpt.tokenizers.builtin import BPETokenizer, Tokenizer, build_tokenizer
from glassgpt.utils.errors import UserError
from glassgpt.utils.formatting import escape_token

SAMPLE = (
    "Hello, world! It's 1984: 12.5 % naïve café crème, Größe, Война и мир, 日本語, 🙂👍🏽.\n"
    "\tif x == 0:\n\t    return  None\n"
)
"""Words, numbers, accents, scripts, signs of several code points, and each kind of white space."""

_KINDS = {"bpe": "bpe (byte-level BPE)", "gpt2": "gpt2 (byte-level BPE)", "hf": "hf (read by the tokenizers library)"}
_LONGEST = 8  # tokens shown
_BATCH = 1 << 22  # characters encoded at once


def describe(tokenizer: Tokenizer, text: str | None = None) -> str:
    """Describe a tokenizer and a text's tokens (default: `SAMPLE`). Raises `UserError` if it cannot encode `text`."""
    width = 2 if tokenizer.vocab_size <= 1 << 16 else 4
    rows = [
        ("kind", _KINDS.get(tokenizer.kind, tokenizer.kind)),
        ("tokens", f"{tokenizer.vocab_size:,}, of {width} bytes each in a dataset"),
        ("end of text", _special(tokenizer, tokenizer.end_of_text)),
        ("a text begins with", _special(tokenizer, tokenizer.begin_of_text)),
    ]
    try:
        lines = show_tokens(tokenizer, SAMPLE if text is None else text)
    except UserError as error:
        if text is not None:
            raise
        lines = [f"the sample cannot be encoded: {str(error).splitlines()[0]}"]
    for name, values in (("longest tokens", _longest_tokens(tokenizer)), ("text in tokens", lines)):
        rows += zip(itertools.chain([name], itertools.repeat("")), values, strict=False)
    return "\n".join(f"{name:<22}{value}" for name, value in rows)


def _special(tokenizer: Tokenizer, token: int | None) -> str:
    return "none" if token is None else f"{escape_token(tokenizer.decode_bytes([token]))} (id {token})"


def _longest_tokens(tokenizer: Tokenizer) -> Iterator[str]:
    lengths = tokenizer.byte_lengths()
    for token in np.argsort(-lengths, kind="stable")[:_LONGEST].tolist():
        shown = escape_token(tokenizer.decode_bytes([token], after=token))
        yield f"{shown if len(shown) <= 80 else shown[:79] + '…'}  ({lengths[token]} bytes, id {token})"


def show_tokens(tokenizer: Tokenizer, text: str) -> list[str]:
    """Return the text's lines, │ between tokens, and a line of counts. Raises `UserError` for text without ids."""
    ids = tokenizer.encode(text).tolist()
    pieces = [tokenizer.decode_bytes([i], after=before) for before, i in itertools.pairwise([None, *ids])]
    marked = "│".join(escape_token(piece).replace("⏎", "⏎\n") for piece in pieces)
    size = len(text.encode())
    ratio = f": {size / len(ids):.2f} bytes per token" if ids else ""
    return [*marked.replace("\n│", "│\n").rstrip("\n").split("\n"), f"{len(ids):,} tokens, {size:,} bytes{ratio}"]


def merge_states(tokenizer: BPETokenizer, text: str) -> list[list[bytes]]:
    """Return a text's pieces before the first merge and after each one. Raises `UserError` for text without ids."""
    tokenizer.encode(text)  # refuses invalid Unicode
    words = [list(word) for word in tokenizer.pre_tokenize(text)]
    ranks = {pair: rank for rank, pair in enumerate(tokenizer.merges())}
    states = []
    while True:
        states.append([bytes(BYTE_OF[symbol] for symbol in part) for word in words for part in word])
        pairs = {pair for word in words for pair in itertools.pairwise(word)} & ranks.keys()
        if not pairs:
            return states
        words = [_merge(word, min(pairs, key=lambda pair: ranks[pair])) for word in words]


def _merge(word: list[str], pair: tuple[str, str]) -> list[str]:
    """Join each occurrence of a pair, from the left."""
    parts: list[str] = []
    for part in word:
        if parts and (parts[-1], part) == pair:
            parts[-1] += part
        else:
            parts.append(part)
    return parts


def bytes_per_token(tokenizers: Sequence[Tokenizer], texts: Iterable[str]) -> list[float]:
    """Return each tokenizer's mean bytes per token. Raises `UserError` if there is no text, or one cannot encode it."""
    total, tokens = 0, [0] * len(tokenizers)
    for batch in batches_by_size(texts, _BATCH):
        total += sum(len(text.encode()) for text in batch)
        for i, tokenizer in enumerate(tokenizers):
            tokens[i] += len(tokenizer.encode_documents(batch)[0])
    if not total:
        raise UserError("there is no text to count tokens in")
    return [total / count for count in tokens]


def compare_with_gpt2(tokenizer: Tokenizer, texts: Iterable[str]) -> str:
    """Return the bytes per token on a text, and GPT-2's if its files can be found. Raises as `bytes_per_token` does."""
    if tokenizer.kind == "gpt2":
        return f"{bytes_per_token([tokenizer], texts)[0]:.3f}"
    try:
        gpt2 = build_tokenizer("gpt2")
    except UserError as error:  # no network
        own = bytes_per_token([tokenizer], texts)[0]
        return f"{own:.3f}; GPT-2's is not available: {str(error).splitlines()[0]}"
    own, other = bytes_per_token([tokenizer, gpt2], texts)
    return f"{own:.3f}; GPT-2's {gpt2.vocab_size:,}: {other:.3f}"
