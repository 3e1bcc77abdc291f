"""Training of BPE against a plain trainer and three encoders; the result is reproducible."""

import itertools
import json
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import regex  # type: ignore[import-untyped]
import tiktoken
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers.pre_tokenizers import ByteLevel

from glassgpt.data import tokenizer_training as module
from glassgpt.data.tokenizer_training import split_long, train_bpe
from glassgpt.tokenizers.base import bytes_to_unicode
from glassgpt.tokenizers.builtin import BPETokenizer, gpt2_tokenizer
from glassgpt.utils.errors import UserError
from tokenizers import Tokenizer as Library

# As published with GPT-2 (encoder.py).
GPT2_SPLIT = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
WORDS = [
    "ab",
    "abab",
    "aaaa",
    "aaaaa",
    "ba",
    "bab",
    " ab",
    "é",
    "日本",
    "\U0001f600",
    "'s",
    " ",
    "  ",
    "\n",
    "1",
    "11",
    ".",
    "...",
]
TEXTS = st.lists(st.lists(st.sampled_from(WORDS), max_size=25).map("".join), max_size=5)
UNICODE = st.text(st.characters(codec="utf-8"), max_size=40) | st.lists(
    st.sampled_from([*WORDS, "<|endoftext|>"]), max_size=20
).map("".join)


def plain_bpe(texts: Sequence[str], merges: int) -> list[tuple[str, str]]:
    """Learn merges plainly: count all pairs each time and merge the most frequent; ties go to the smallest ids."""
    symbols = bytes_to_unicode()
    tokens = sorted(symbols)
    counts = Counter(word for text in texts for word in GPT2_SPLIT.findall(text))
    words = [([tokens.index(symbols[byte]) for byte in word.encode()], count) for word, count in counts.items()]
    learned = []
    for _ in range(merges):
        pairs: Counter[tuple[int, int]] = Counter()
        for ids, count in words:
            for pair in itertools.pairwise(ids):
                pairs[pair] += count
        best = min(pairs, key=lambda pair: (-pairs[pair], pair), default=None)
        if best is None or pairs[best] < 2:
            break
        learned.append((tokens[best[0]], tokens[best[1]]))
        tokens.append("".join(learned[-1]))
        words = [(merged(ids, best, len(tokens) - 1), count) for ids, count in words]
    return learned


def merged(ids: list[int], pair: tuple[int, int], new: int) -> list[int]:
    """Replace each occurrence of the pair by the id `new`, from left to right."""
    done: list[int] = []
    for i in ids:
        done.append(i)
        if tuple(done[-2:]) == pair:
            done[-2:] = [new]
    return done


def merges_of(tokenizer: BPETokenizer) -> list[tuple[str, str]]:
    return [tuple(merge.split(" ")) for merge in json.loads(tokenizer.to_json())["model"]["merges"]]


# Merges and ids


@settings(max_examples=60, deadline=None)
@given(TEXTS, st.integers(0, 40))
@example(["aaaaa aaaa aaa"], 5)
@example(["ab cd ef gh ab cd ef gh"], 4)  # all pairs are equally frequent
def test_the_merges_equal_those_of_a_plain_trainer(texts: list[str], merges: int) -> None:
    tokenizer = train_bpe(texts, 257 + merges)
    expected = plain_bpe(texts, merges)
    assert merges_of(tokenizer) == expected
    assert tokenizer.vocab_size == 257 + len(expected)


@pytest.mark.slow
def test_the_merges_of_a_real_text_equal_those_of_a_plain_trainer(english: str) -> None:
    text = english[:30_000]
    assert merges_of(train_bpe([text], 337)) == plain_bpe([text], 80)


def test_ids_are_in_gpt2s_order() -> None:
    """The bytes come first in GPT-2's order, then one token per merge, then end-of-text."""
    tokenizer = train_bpe(["low lower lowest " * 3], 300)
    vocab: dict[str, int] = json.loads(tokenizer.to_json())["model"]["vocab"]
    assert list(vocab.values()) == list(range(tokenizer.vocab_size))
    assert list(vocab)[256:-1] == ["".join(merge) for merge in merges_of(tokenizer)]
    assert (list(vocab)[-1], tokenizer.end_of_text, tokenizer.kind) == (
        "<|endoftext|>",
        tokenizer.vocab_size - 1,
        "bpe",
    )
    assert tokenizer.byte_lengths()[-1] == 0
    gpt2 = gpt2_tokenizer()
    assert [tokenizer.decode_bytes([i]) for i in range(256)] == [gpt2.decode_bytes([i]) for i in range(256)]


def test_three_encoders_give_the_same_ids(english: str) -> None:
    many = [" ".join([word] * 400) for word in WORDS]
    tokenizer = train_bpe([english[:300_000], *many], 2000)
    library = Library.from_str(tokenizer.to_json())
    library.encode_special_tokens = True
    ranks = {tokenizer.decode_bytes([i]): i for i in range(tokenizer.vocab_size - 1)}
    special = {"<|endoftext|>": tokenizer.vocab_size - 1}
    theirs = tiktoken.Encoding("trained", pat_str=GPT2_SPLIT.pattern, mergeable_ranks=ranks, special_tokens=special)

    @settings(max_examples=300, deadline=None)
    @given(UNICODE)
    @example("KING HENRY's  horse,\n\n\tnaïve  日本語 <|endoftext|> \r\n")
    def same(text: str) -> None:
        ids = tokenizer.encode(text).tolist()
        assert ids == library.encode(text).ids == theirs.encode_ordinary(text)
        assert tokenizer.decode(ids) == text

    same()


# Reproducibility


@settings(max_examples=20, deadline=None)
@given(TEXTS, st.randoms())
def test_the_order_of_the_texts_makes_no_difference(texts: list[str], random: Any) -> None:
    shuffled = random.sample(texts, len(texts))
    assert train_bpe(iter(shuffled), 280).to_json() == train_bpe(texts, 280).to_json()


SPACES = [" ", "  ", "\n", "\r\n", "\t", "\u00a0", "\u3000", "\u2028", "\x1c", "\x85", "a", "'s", "12", "!", "日"]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.lists(st.sampled_from(SPACES), max_size=40).map("".join), max_size=3), st.integers(1, 6))
def test_a_long_text_is_cut_between_words(texts: list[str], piece: int) -> None:
    """The `tokenizers` library, which is independent of our splitting, finds the same words before and after."""
    split = ByteLevel(add_prefix_space=False).pre_tokenize_str

    def words(parts: Sequence[str]) -> list[str]:
        return [word for part in parts for word, _ in split(part)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_PIECE", piece)
        cut = list(split_long(texts))
    assert "".join(cut) == "".join(texts)
    assert words(cut) == words(texts)


def test_a_long_text_comes_in_small_pieces() -> None:
    sizes = [len(piece) for piece in split_long(["word " * 100_000])]
    assert sum(sizes) == 500_000
    assert max(sizes) <= module._PIECE + 5


@pytest.mark.parametrize("unit", ["acgt", "a", "你好", "7", "=-", " ", "\n", "Zm9v"])
def test_words_of_many_thousand_characters_are_cut(unit: str) -> None:
    """Uncut, a million characters would take hours: the time grows with the square of a word's length."""
    text = "before " + unit * (1_000_000 // len(unit)) + " after"
    pieces = list(split_long([text]))
    assert "".join(pieces) == text
    longest = max(len(word) for piece in pieces for word in regex.findall(r"\p{L}+|\p{N}+|[^\s\p{L}\p{N}]+|\s+", piece))
    assert longest <= 2 * module._LONG_WORD


def test_training_on_one_long_word_ends() -> None:
    assert train_bpe(["".join(random.Random(0).choices("acgt", k=200_000))], 300).vocab_size == 300


# Errors and interrupts


def test_errors_of_the_texts_are_raised() -> None:
    def broken() -> Iterator[str]:
        yield "text"
        raise UserError("the third file is damaged")

    with pytest.raises(UserError, match="the third file is damaged"):
        train_bpe(broken(), 300)
    with pytest.raises(UserError, match=r"U\+D800.*offset 1 "):
        train_bpe(["a\ud800"], 300)


def test_an_interrupt_ends_the_training() -> None:
    def endless() -> Iterator[str]:
        # The signal comes after the main thread has begun to wait: Python loses one that comes just before.
        ends = time.monotonic() + 20
        timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        while time.monotonic() < ends:
            yield "text"

    with pytest.raises(KeyboardInterrupt):
        train_bpe(endless(), 300)
