"""Training of a byte-level BPE by the `tokenizers` library, with GPT-2's splitting and GPT-2's order of ids.

The library counts words, then repeatedly merges the most frequent pair of neighbouring tokens (Sennrich et al., 2016);
among equally frequent pairs, the one with the smallest ids. So the result depends on the text only, not on threads or
document order.
"""

import json
import re
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

from glassgpt.tokenizers.base import END_OF_TEXT, bytes_to_unicode, encode_utf8
from glassgpt.tokenizers.bpe import BPETokenizer
from glassgpt.utils.errors import UserError

VOCAB_SIZES = range(257, (1 << 20) + 1)
"""From no merges to four times the largest vocabulary in use: the library reserves memory for as many."""
# A merge of a pair that occurs once would be a quotation, not a pattern.
_MIN_COUNT = 2
# Characters given to the library at once, which uses about 100 times their size.
_PIECE = 1 << 16
# Where GPT-2's splitting ends a word in any context: before the first white space.
_CUT = re.compile(r"(?<!\s)[ \n]")


def train_bpe(texts: Iterable[str], vocab_size: int) -> BPETokenizer:
    """Train a tokenizer of `vocab_size` ids: the 256 bytes in GPT-2's order, the merges, `<|endoftext|>`.

    It has fewer ids if no further pair of tokens occurs twice. `texts` are read once; all distinct words are in memory.
    Raises `UserError` for an invalid size and for texts with half a surrogate pair.
    """
    require_vocab_size(vocab_size)
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    # Without special tokens, which would come first. The bytes are numbered by their symbols, which is GPT-2's order.
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1, min_frequency=_MIN_COUNT, initial_alphabet=bytes_to_unicode(), show_progress=False
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
        encode_utf8(text)  # raises a better error than the library
        yield text


def split_long(texts: Iterable[str]) -> Iterator[str]:
    """Yield the texts, long ones in pieces, cut where GPT-2's splitting ends a word, so that words stay the same."""
    for text in texts:
        start = 0
        while cut := _CUT.search(text, start + _PIECE):
            yield text[start : cut.start()]
            start = cut.start()
        yield text[start:]


def require_vocab_size(vocab_size: int) -> None:
    """Raise `UserError` for a size outside `VOCAB_SIZES`."""
    if vocab_size not in VOCAB_SIZES:
        least = f"{VOCAB_SIZES[0]:,} (the 256 bytes and end-of-text)"
        raise UserError(f"--vocab-size must be from {least} to {VOCAB_SIZES[-1]:,}, got {vocab_size:,}")
