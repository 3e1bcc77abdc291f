"""A byte-level BPE of one's own: GPT-2's splitting and GPT-2's order of ids, trained by the `tokenizers` library.

The library counts words, then merges the most frequent pair of neighbouring tokens again and again (Sennrich et al., 2016);
of pairs that are equally frequent, it takes that with the smallest ids. So the result depends on the text alone: neither on
threads nor on the order of the documents.
"""

import json
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

from glassgpt.config.schema import ReadingConfig
from glassgpt.data.sources import PreparedDataset, read_source, resolve
from glassgpt.tokenizers.base import END_OF_TEXT, byte_symbols, lone_surrogate
from glassgpt.tokenizers.builtin import BPETokenizer, load_tokenizer
from glassgpt.utils.errors import UserError
from glassgpt.utils.files import explain_os_errors, user_path, write_atomic
from glassgpt.utils.formatting import RemainingTime, format_bytes, format_duration
from glassgpt.utils.rng import seed_for

Log = Callable[[str], None]

VOCAB_SIZES = range(257, (1 << 20) + 1)
"""From no merge at all, to four times the largest vocabulary in use: the library reserves memory for as many at once."""
TEXT_BYTES = range(1, 1 << 31)
"""The library counts pairs in 32 bits, and wraps around without a word: no pair of a text this long can come up more often."""
MAX_BYTES = 200_000_000
"""Text to train on: more takes longer and cuts other text no better.

Of classic-books, 1, 3, 10, 30 and 100 % of 150 MB give 32,768 ids (19,226 at 1 %) that take 4.10, 4.28, 4.316, 4.319 and 4.319
bytes a token on its validation file. All of it takes 33 s of one core, and 350 MB, which grow with the number of distinct words.
"""
# A merge of a pair that comes up once would be a quotation, no pattern.
_LEAST_COUNT = 2
# Characters given to the library at once. It keeps what it made of a text until that is done: about 100 times its size.
_PIECE = 1 << 16
# Where GPT-2's splitting always ends a word, whatever stands around: before the first white space.
_CUT = re.compile(r"(?<!\s)[ \n]")
# Seconds between lines that tell how far it is.
_INTERVAL = 5.0


class Corpus:
    """The texts of a source, read anew each time; `reading` says how, of files of the user's own.

    Raises `UserError` for what is no source, and where one cannot be read.
    """

    def __init__(self, source: str, reading: ReadingConfig | None = None) -> None:
        found = resolve(source)
        if isinstance(found, PreparedDataset):
            raise UserError(
                f"{source} is a prepared dataset, so its text is tokens already: name the text that it was made from"
            )
        self.name = found.name
        self._source, self._reading = found, reading or ReadingConfig()

    def texts(self) -> Iterator[str]:
        """The documents, those without text left out."""
        parts = read_source(self._source, self._reading)
        return (part.text for part in parts if part.text.strip())

    @cached_property
    def size(self) -> int:
        """Bytes of the texts in UTF-8. Raises `UserError` where there are none: it reads them all."""
        total = sum(map(_size, self.texts()))
        if not total:
            raise UserError(f"{self.name} has no text in it: it is empty or only white space")
        return total

    def sample(self, max_bytes: int) -> Iterator[str]:
        """Pieces of the texts, about `max_bytes` in all: every one where that is enough, else a share of them from everywhere.

        A hash of its number decides on each piece, so that the sample is the same whenever it is drawn, and a smaller one is
        a part of a larger one.
        """
        threshold = int(max_bytes / self.size * (1 << 63))
        for number, piece in enumerate(pieces(self.texts())):
            if seed_for(0, "tokenizer", number) < threshold:
                yield piece


def pieces(texts: Iterable[str]) -> Iterator[str]:
    """The texts, long ones cut where GPT-2's splitting ends a word anyhow, so that the words are those of the whole texts."""
    for text in texts:
        start = 0
        while cut := _CUT.search(text, start + _PIECE):
            yield text[start : cut.start()]
            start = cut.start()
        yield text[start:]


def _size(text: str) -> int:
    try:
        return len(text.encode())
    except UnicodeEncodeError as error:
        raise lone_surrogate(text, error.start) from None


def train_bpe(texts: Iterable[str], vocab_size: int) -> BPETokenizer:
    """A tokenizer of `vocab_size` ids: the 256 bytes in GPT-2's order, the merges, `<|endoftext|>`.

    It has fewer where no further pair of tokens comes up twice in the texts. They are read one after the other, once; of one
    text, a piece of some 64 KB is in memory at a time, and all distinct words are. Raises `UserError` for a size that cannot be
    and for texts with half a surrogate pair; what `texts` raises comes through.
    """
    require_vocab_size(vocab_size)
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    # Without special tokens, which it would number first. The bytes it numbers by their symbols, which is GPT-2's order.
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1, min_frequency=_LEAST_COUNT, initial_alphabet=byte_symbols(), show_progress=False
    )
    stop = threading.Event()
    # In a thread of its own, so that Ctrl-C reaches this one: the library looks for no signals.
    with ThreadPoolExecutor(max_workers=1) as pool:
        try:
            pool.submit(library.train_from_iterator, _until(stop, pieces(texts)), trainer).result()
        finally:
            stop.set()
    model = json.loads(library.to_str())["model"]
    vocab = dict(sorted(model["vocab"].items(), key=lambda entry: entry[1]))
    return BPETokenizer.from_merges({**vocab, END_OF_TEXT: len(vocab)}, [" ".join(pair) for pair in model["merges"]])


def _until(stop: threading.Event, texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        if stop.is_set():
            raise KeyboardInterrupt
        _size(text)  # for the better error
        yield text


def train_tokenizer(
    corpus: Corpus, vocab_size: int, out: str | Path, *, max_bytes: int = MAX_BYTES, log: Log | None = None
) -> BPETokenizer:
    """Train on a corpus, or on a fair sample of about `max_bytes` of it, and write the file that `data.tokenizer` takes.

    `log` gets lines about how far it is. Raises `UserError` before the work where `out` may not be written, and as `train_bpe` does.
    """
    log = log or (lambda line: None)
    path = user_path(out)
    require_vocab_size(vocab_size)
    require_free(path)
    if max_bytes not in TEXT_BYTES:
        raise UserError(f"--max-bytes must be from {TEXT_BYTES[0]:,} to {TEXT_BYTES[-1]:,}, got {max_bytes:,}")
    used = min(corpus.size, max_bytes)
    of = "" if used == corpus.size else f", a sample of its {format_bytes(corpus.size)} (--max-bytes)"
    log(f"training on {format_bytes(used)} of {corpus.name}{of}")
    tokenizer = train_bpe(_told(corpus.sample(max_bytes), used, log), vocab_size)
    if tokenizer.vocab_size < vocab_size:
        log(
            f"the text gives {tokenizer.vocab_size:,} tokens, not {vocab_size:,}: no other pair of tokens comes up twice in it"
        )
    write_atomic(path, tokenizer.to_json())
    return tokenizer


def require_vocab_size(vocab_size: int) -> None:
    """Raise `UserError` for a size outside `VOCAB_SIZES`."""
    if vocab_size not in VOCAB_SIZES:
        least = f"{VOCAB_SIZES[0]:,} (the 256 bytes and end-of-text)"
        raise UserError(f"--vocab-size must be from {least} to {VOCAB_SIZES[-1]:,}, got {vocab_size:,}")


def require_free(path: Path) -> None:
    """Raise `UserError` where a trained tokenizer may not be written: what is no tokenizer, or a model's, is not replaced."""
    if path.suffix != ".json":
        raise UserError(f"--out must end in .json, by which --data.tokenizer knows a file, got {path}")
    with explain_os_errors("write", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise UserError(f"--out {path} is a directory: name a file")
        if not path.is_file() or not path.stat().st_size:
            return
        owner = next((name for name in ("manifest.json", "config.json") if path.with_name(name).is_file()), None)
    if owner is not None:
        raise UserError(
            f"--out {path} is the tokenizer of what is beside it ({owner}), whose ids it explains: name another file"
        )
    try:
        load_tokenizer(path)
    except UserError:
        raise UserError(f"--out {path} is there already and is no tokenizer: name another file") from None


def _told(texts: Iterable[str], total: int, log: Log) -> Iterator[str]:
    """The texts, with a line every few seconds on how much of them was taken."""
    pace, done, shown = RemainingTime(total, time.monotonic), 0, time.monotonic()
    pace.left(0)
    for text in texts:
        yield text
        done += _size(text)
        if time.monotonic() - shown >= _INTERVAL:
            shown = time.monotonic()
            log(f"  {format_bytes(done)} of {format_bytes(total)} read, {format_duration(pace.left(done))} left")
