"""What a tokenizer is and how it cuts text, in lines of which nothing is invisible."""

import itertools
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from glassgpt.tokenizers.base import begin_of_text, byte_symbols
from glassgpt.tokenizers.builtin import BPETokenizer, Tokenizer, build_tokenizer, load_tokenizer, tokenizer_file
from glassgpt.utils.errors import UserError
from glassgpt.utils.files import user_path
from glassgpt.utils.formatting import escape_token

SAMPLE = "Hello, world! It's 1984: 12.5 % naïve café crème, Größe, Война и мир, 日本語, 🙂👍🏽.\n\tif x == 0:\n\t    return  None\n"
"""Words, numbers, accents, scripts, signs of several code points, and white space of each kind."""

_LONGEST = 8
# Characters encoded at once.
_GROUP = 1 << 22


def find_tokenizer(name: str) -> Tokenizer:
    """`gpt2` or `bytes`, a tokenizer's file, the tokenizer.json of a folder (a dataset, a checkpoint), or a model reference's.

    Raises `UserError` where there is none.
    """
    if name == "characters":
        raise UserError(
            "a tokenizer of characters is made from a text: name the run or the dataset whose tokenizer you want to see"
        )
    if name in ("gpt2", "bytes"):
        return build_tokenizer(name)
    path = tokenizer_file(name) or user_path(name) / "tokenizer.json"
    if tokenizer_file(name) is not None or path.is_file():
        return load_tokenizer(path)
    from glassgpt.interop import references as reference  # here, since it loads torch

    tokenizer = reference.read_reference(name, reference.tokenizer_of)
    if tokenizer is None:
        raise UserError(f"{name} has no tokenizer")
    return tokenizer


def describe(tokenizer: Tokenizer, text: str | None = None) -> str:
    """A few lines: kind, size, end of text, longest tokens, and a text in pieces (`SAMPLE` where none is given).

    Raises `UserError` for a given text that this tokenizer cannot encode.
    """
    names = {
        "bpe": "bpe (byte-level BPE)",
        "gpt2": "gpt2 (byte-level BPE)",
        "hf": "hf (as the tokenizers library reads it)",
    }
    width = 2 if tokenizer.vocab_size <= 1 << 16 else 4
    rows = [
        ("kind", names.get(tokenizer.kind, tokenizer.kind)),
        ("tokens", f"{tokenizer.vocab_size:,}, of {width} bytes each in a dataset"),
        ("end of text", _special(tokenizer, tokenizer.end_of_text)),
        ("a text begins with", _special(tokenizer, begin_of_text(tokenizer))),
        *(("longest tokens" if i == 0 else "", line) for i, line in enumerate(_longest(tokenizer))),
    ]
    try:
        rows += [
            ("" if i else "a text in pieces", line)
            for i, line in enumerate(split_visibly(tokenizer, SAMPLE if text is None else text))
        ]
    except UserError as error:
        if text is not None:
            raise
        rows.append(("a text in pieces", f"not the usual one: {str(error).splitlines()[0]}"))
    return "\n".join(f"{name:<22}{value}" for name, value in rows)


def _special(tokenizer: Tokenizer, token: int | None) -> str:
    return "none" if token is None else f"{escape_token(tokenizer.decode_bytes([token]))} (id {token})"


def _longest(tokenizer: Tokenizer) -> Iterator[str]:
    lengths = tokenizer.byte_lengths()
    for token in np.argsort(-lengths, kind="stable")[:_LONGEST].tolist():
        shown = escape_token(tokenizer.decode_bytes([token], after=token))
        yield f"{shown if len(shown) <= 80 else shown[:79] + '…'}  ({lengths[token]} bytes, id {token})"


def split_visibly(tokenizer: Tokenizer, text: str) -> list[str]:
    """The text in lines, a │ between its tokens, and a line that counts them. Raises `UserError` for text without ids."""
    ids = tokenizer.encode(text).tolist()
    pieces = [tokenizer.decode_bytes([i], after=before) for before, i in itertools.pairwise([None, *ids])]
    marked = "│".join(escape_token(piece).replace("⏎", "⏎\n") for piece in pieces)
    size = len(text.encode())
    each = f": {size / len(ids):.2f} bytes a token" if ids else ""
    return [*marked.replace("\n│", "│\n").rstrip("\n").split("\n"), f"{len(ids):,} tokens, {size:,} bytes{each}"]


def merge_states(tokenizer: BPETokenizer, text: str) -> list[list[bytes]]:
    """A text's pieces from single bytes to tokens, one merge after the other: at each the earliest in the tokenizer's list, everywhere.

    Merges never cross the words that the text is split into first. Raises `UserError` for text without ids.
    """
    tokenizer.encode(text)  # refuses what is no Unicode
    words = [list(word) for word in tokenizer.words(text)]
    ranks = {pair: rank for rank, pair in enumerate(tokenizer.merges())}
    byte_of = {symbol: bytes([byte]) for byte, symbol in enumerate(byte_symbols())}
    states = []
    while True:
        states.append([b"".join(byte_of[symbol] for symbol in part) for word in words for part in word])
        found = {pair for word in words for pair in itertools.pairwise(word)} & ranks.keys()
        if not found:
            return states
        words = [_merged(word, min(found, key=lambda pair: ranks[pair])) for word in words]


def _merged(word: list[str], pair: tuple[str, str]) -> list[str]:
    """A word's parts with each occurrence of a pair as one, from the left."""
    parts: list[str] = []
    for part in word:
        if parts and (parts[-1], part) == pair:
            parts[-1] += part
        else:
            parts.append(part)
    return parts


def bytes_per_token(tokenizers: Sequence[Tokenizer], texts: Iterable[str]) -> list[float]:
    """Mean bytes of text a token of each tokenizer, over all texts. Raises `UserError` where there is no text, or none of its ids."""
    total, tokens = 0, [0] * len(tokenizers)
    for group in _groups(texts):
        total += sum(len(text.encode()) for text in group)
        tokens = [
            count + len(tokenizer.encode_documents(group)[0])
            for count, tokenizer in zip(tokens, tokenizers, strict=True)
        ]
    if not total:
        raise UserError("there is no text to count tokens in")
    return [total / count for count in tokens]


def _groups(texts: Iterable[str]) -> Iterator[list[str]]:
    group: list[str] = []
    size = 0
    for text in texts:
        group.append(text)
        size += len(text)
        if size >= _GROUP:
            yield group
            group, size = [], 0
    if group:
        yield group


def compare_with_gpt2(tokenizer: Tokenizer, texts: Iterable[str]) -> str:
    """The bytes a token on a text in a line, beside GPT-2's, or with a word on why GPT-2's are not at hand. Errors as above."""
    others: list[Tokenizer] = []
    reason = ""
    if tokenizer.kind != "gpt2":
        try:
            others.append(build_tokenizer("gpt2"))
        except UserError as error:  # no network
            reason = f"; GPT-2's are not at hand: {str(error).splitlines()[0]}"
    own, *theirs = bytes_per_token([tokenizer, *others], texts)
    beside = "".join(
        f"; GPT-2's {other.vocab_size:,}: {figure:.3f}" for other, figure in zip(others, theirs, strict=True)
    )
    return f"{own:.3f}{beside}{reason}"
