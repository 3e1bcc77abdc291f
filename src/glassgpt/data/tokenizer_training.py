"""Training a tokenizer on a source of text, or on a sample of it."""

import time
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path

from glassgpt.config.schema import ReadingConfig
from glassgpt.data.progress import Log, ProgressLine
from glassgpt.data.sources import PreparedDataset, read_source, resolve
from glassgpt.tokenizers.base import encode_utf8
from glassgpt.tokenizers.bpe import BPETokenizer
from glassgpt.tokenizers.builtin import load_tokenizer
from glassgpt.tokenizers.train import require_vocab_size, split_long, train_bpe
from glassgpt.utils.errors import UserError
from glassgpt.utils.files import explain_os_errors, user_path, write_atomic
from glassgpt.utils.formatting import RemainingTime, format_bytes, format_duration
from glassgpt.utils.rng import seed_for

# The library counts pairs in 32 bits and overflows silently: no pair of a text this long can occur more often.
_MOST_BYTES = (1 << 31) - 1
MAX_BYTES = 200_000_000
"""Bytes of text to train on; more takes longer without a better tokenizer: of classic-books, 1, 3, 10, 30 and 100 % of
150 MB give 4.10, 4.28, 4.316, 4.319 and 4.319 bytes per token on its validation file, at 32,768 ids."""


class Corpus:
    """The texts of a source, read again each time. Raises `UserError` for a source that cannot be read."""

    def __init__(self, source: str, options: ReadingConfig | None = None) -> None:
        resolved = resolve(source)
        if isinstance(resolved, PreparedDataset):
            raise UserError(f"{source} is a prepared dataset, which holds tokens; name the text that it was made from")
        self.name = resolved.name
        self._source, self._options = resolved, options or ReadingConfig()

    def texts(self) -> Iterator[str]:
        """Yield the documents that are not blank."""
        return (part.text for _, part in read_source(self._source, self._options))

    @cached_property
    def size(self) -> int:
        """Bytes of the texts in UTF-8, which are all read. Raises `UserError` if there are none."""
        total = sum(len(encode_utf8(text)) for text in self.texts())
        if not total:
            raise UserError(f"{self.name} has no text: it is empty or only white space")
        return total

    def sample(self, max_bytes: int) -> Iterator[str]:
        """Yield pieces of the texts from everywhere, about `max_bytes` in all, or all of them if they are no more.

        A hash of its number decides on each piece, so the sample is reproducible, and part of every larger sample.
        """
        threshold = int(max_bytes / self.size * (1 << 63))
        for number, piece in enumerate(split_long(self.texts())):
            if seed_for(0, "tokenizer", number) < threshold:
                yield piece


def train_tokenizer(
    corpus: Corpus, vocab_size: int, out: str | Path, *, max_bytes: int = MAX_BYTES, log: Log = lambda line: None
) -> BPETokenizer:
    """Train on a corpus, or on a sample of about `max_bytes` of it, and write the file that `data.tokenizer` takes.

    `log` gets progress lines. Raises `UserError`, before any work, if `out` cannot be written, and as `train_bpe` does.
    """
    path = user_path(out)
    require_vocab_size(vocab_size)
    _require_writable(path)
    if not 1 <= max_bytes <= _MOST_BYTES:
        raise UserError(f"--max-bytes must be from 1 to {_MOST_BYTES:,}, got {max_bytes:,}")
    used = min(corpus.size, max_bytes)
    whole = "" if used == corpus.size else f", a sample of its {format_bytes(corpus.size)} (--max-bytes)"
    log(f"training on {format_bytes(used)} of {corpus.name}{whole}")
    tokenizer = train_bpe(_with_progress(corpus.sample(max_bytes), used, log), vocab_size)
    if tokenizer.vocab_size < vocab_size:
        log(f"the text gives {tokenizer.vocab_size:,} tokens, not {vocab_size:,}: no other pair of tokens occurs twice")
    write_atomic(path, tokenizer.to_json())
    return tokenizer


def _require_writable(path: Path) -> None:
    """Raise `UserError` if `path` may not be written: only a tokenizer on its own is replaced."""
    if path.suffix != ".json":
        raise UserError(f"--out must end in .json, by which --data.tokenizer recognises a file, got {path}")
    with explain_os_errors("write", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise UserError(f"--out {path} is a directory; name a file")
        if not path.is_file() or not path.stat().st_size:
            return
    for owner in ("manifest.json", "config.json"):
        if path.with_name(owner).is_file():
            raise UserError(f"--out {path} belongs to the dataset or model in its folder ({owner}); name another file")
    try:
        load_tokenizer(path)
    except UserError:
        raise UserError(f"--out {path} exists and is not a tokenizer; name another file") from None


def _with_progress(texts: Iterable[str], total: int, log: Log) -> Iterator[str]:
    progress, remaining, done = ProgressLine(log), RemainingTime(total, time.monotonic), 0
    remaining.left(0)
    for text in texts:
        yield text
        done += len(encode_utf8(text))
        left = format_duration(remaining.left(done))
        progress.update(f"  {format_bytes(done)} of {format_bytes(total)} read, {left} left")
