"""Training a byte-level BPE on a source of text, or on a sample of it, with GPT-2's splitting and order of ids.

The `tokenizers` library counts words, then repeatedly merges the most frequent pair of neighbouring tokens (Sennrich et
al., 2016); among equally frequent pairs, the one with the smallest ids. So the result depends on the text only, not on
threads or document order.
"""

import json
import re
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

from glassgpt.config.schema import ReadingConfig
from glassgpt.config.validation import check_ranges
from glassgpt.data.sources import LocalFiles, PreparedDataset, read_source, require_texts, resolve
from glassgpt.tokenizers.base import BYTE_OF, END_OF_TEXT, encode_text
from glassgpt.tokenizers.builtin import BPETokenizer, load_tokenizer
from glassgpt.utils.errors import UserError
from glassgpt.utils.files import require_writable, user_path, write_atomic
from glassgpt.utils.formatting import Log, ProgressLine, RemainingTime, format_bytes, format_duration
from glassgpt.utils.rng import seed_for

# From no merges to four times the largest vocabulary in use: the library reserves memory for as many.
VOCAB_SIZES = range(257, (1 << 20) + 1)
_MIN_COUNT = 2  # a merge of a pair that occurs once would be a quotation, not a pattern
_PIECE = 1 << 16  # characters given to the library at once, which uses about 100 times their size
# Characters of a word to count at once, such as DNA: the library needs time by the square of a word's length.
_LONG_WORD = 1 << 12
_ONE_WORD = re.compile(r"[^\W\d_]+|\d+|(?:[^\w\s]|_)+|\s+")  # much as GPT-2's splitting
_CUT = re.compile(r"(?<!\s)[ \n]")  # where GPT-2's splitting ends a word in any context: before white space
# The library counts pairs in 32 bits and overflows silently: no pair of a text this long can occur more often.
_MOST_BYTES = (1 << 31) - 1
# Bytes of text to train on. More takes longer without a better tokenizer: of classic-books, 1, 3, 10, 30 and 100 % of
# 150 MB give 4.10, 4.28, 4.316, 4.319 and 4.319 bytes per token on its validation file, with 32,768 ids.
MAX_BYTES = 200_000_000


class Corpus:
    """The texts of a source, read again each time. Raises `UserError` for a source that cannot be read."""

    def __init__(self, source: str, options: ReadingConfig | None = None) -> None:
        options = options or ReadingConfig()
        check_ranges(options)  # refuses an unknown encoding
        resolved = resolve(source)
        if isinstance(resolved, PreparedDataset):
            raise UserError(f"{source} is a prepared dataset, which holds tokens; name the text that it was made from")
        if isinstance(resolved, LocalFiles):
            require_texts(resolved, options)
        self.name, self._source, self._options = resolved.name, resolved, options

    def texts(self) -> Iterator[str]:
        """Yield the documents that are not blank."""
        return (part.text for _, part in read_source(self._source, self._options))

    @cached_property
    def size(self) -> int:
        """Bytes of the texts in UTF-8, which are all read. Raises `UserError` if there are none."""
        if total := sum(len(encode_text(text)) for text in self.texts()):
            return total
        raise UserError(f"{self.name} has no text: it is empty or only white space")

    def sample(self, max_bytes: int) -> Iterator[str]:
        """Yield pieces from all over the texts, about `max_bytes` in total. Shorter texts are yielded whole."""
        # A hash of its number decides on each piece: the sample is reproducible, and part of every larger one.
        threshold = int(max_bytes / self.size * (1 << 63))
        pieces = enumerate(split_long(self.texts()))
        return (piece for number, piece in pieces if seed_for(0, "tokenizer", number) < threshold)


def train_tokenizer(
    corpus: Corpus,
    vocab_size: int,
    out: str | Path,
    *,
    max_bytes: int = MAX_BYTES,
    overwrite: bool = False,
    log: Log = lambda line: None,
) -> BPETokenizer:
    """Train on a corpus, or on a sample of about `max_bytes` of it, and write the file that `data.tokenizer` takes.

    Raises `UserError`, before any work, for an invalid size, if `out` cannot be written, and if it exists, unless it is
    a tokenizer and `overwrite` is given.
    """
    path = user_path(out)
    if vocab_size not in VOCAB_SIZES:
        least = f"{VOCAB_SIZES[0]:,} (the 256 bytes and end-of-text)"
        raise UserError(f"--vocab-size must be from {least} to {VOCAB_SIZES[-1]:,}, got {vocab_size:,}")
    _require_writable(path, overwrite)
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


def _require_writable(path: Path, overwrite: bool) -> None:
    """Raise `UserError` if `path` may not be written: only a tokenizer on its own is replaced."""
    if path.suffix != ".json":
        raise UserError(f"--out must end in .json, by which --data.tokenizer recognises a file, got {path}")
    require_writable(path)
    if not path.is_file() or not path.stat().st_size:
        return
    for owner in ("manifest.json", "config.json"):
        if path.with_name(owner).is_file():
            raise UserError(f"--out {path} belongs to the dataset or model in its folder ({owner}); name another file")
    try:
        load_tokenizer(path)
    except UserError:
        raise UserError(f"--out {path} exists and is not a tokenizer; name another file") from None
    if not overwrite:
        raise UserError(f"--out {path} is a tokenizer already; name another file, or replace it with --overwrite")


def _with_progress(texts: Iterable[str], total: int, log: Log) -> Iterator[str]:
    progress, remaining, done = ProgressLine(log), RemainingTime(total, time.monotonic), 0
    remaining.left(0)
    warned = False
    for text in texts:
        yield text
        if not warned and len(text) >= _LONG_WORD and _ONE_WORD.fullmatch(text, len(text) - _LONG_WORD):
            warned = True
            advice = "they are cut for training; separate words by spaces, or train with data.tokenizer 'bytes'"
            log(f"the text has words of more than {_LONG_WORD:,} characters ({text[-20:]!r});\n{advice}")
        done += len(encode_text(text))
        left = format_duration(remaining.left(done))
        progress.update(f"  {format_bytes(done)} of {format_bytes(total)} read, {left} left")


def train_bpe(texts: Iterable[str], vocab_size: int) -> BPETokenizer:
    """Train a tokenizer of `vocab_size` ids: the 256 bytes in GPT-2's order, the merges, `<|endoftext|>`.

    It has fewer ids if no further pair of tokens occurs twice. `texts` are read once; all distinct words are in memory.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    # Without special tokens, which would come first. The bytes are numbered by their symbols, which is GPT-2's order.
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1, min_frequency=_MIN_COUNT, initial_alphabet=list(BYTE_OF), show_progress=False
    )
    stop = threading.Event()
    # In another thread, so that Ctrl-C reaches this one: the library does not check for signals.
    with ThreadPoolExecutor(max_workers=1) as pool:
        try:
            pool.submit(library.train_from_iterator, _until(stop, split_long(texts)), trainer).result()
        finally:
            stop.set()
    model = json.loads(library.to_str())["model"]
    vocab = dict(sorted(model["vocab"].items(), key=lambda entry: entry[1]))
    return BPETokenizer.from_merges({**vocab, END_OF_TEXT: len(vocab)}, [" ".join(pair) for pair in model["merges"]])


def _until(stop: threading.Event, texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        if stop.is_set():
            raise KeyboardInterrupt
        encode_text(text)  # raises a better error than the library
        yield text


def split_long(texts: Iterable[str]) -> Iterator[str]:
    """Yield the texts, long ones in pieces, cut where GPT-2's splitting ends a word, so that words stay the same.

    Only words of thousands of characters are cut themselves.
    """
    for text in texts:
        start = 0
        while cut := _CUT.search(text, start + _PIECE):
            yield from _cut_words(text[start : cut.start()])
            start = cut.start()
        yield from _cut_words(text[start:])


def _cut_words(text: str) -> Iterator[str]:
    start = 0
    for end in range(_LONG_WORD, len(text), _LONG_WORD):
        if _ONE_WORD.fullmatch(text, end - _LONG_WORD, end):
            yield text[start:end]
            start = end
    yield text[start:]
