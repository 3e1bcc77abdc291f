"""Lesson 1's functions against the library, on random texts."""

import random

import pytest

from glassgpt.data.tokenizer_training import train_bpe
from glassgpt.learn.catalog import find_lesson
from lesson_harness import load

LESSON = load(find_lesson("1").path)


@pytest.mark.parametrize("seed", range(20))
def test_bpe_equals_the_library(seed: int) -> None:
    generator = random.Random(seed)
    text, other = ("".join(generator.choices("aab b1'st.\n\t", k=400)) for _ in range(2))
    bpe = train_bpe([text], 257 + 20)
    merges = LESSON.learn_merges(text, bpe.vocab_size - 257)
    assert LESSON.encode(other, merges) == bpe.encode(other).tolist()
    assert len(LESSON.split(other)) == len(bpe.pre_tokenize(other))
    assert "".join(LESSON.split(other)) == other


def test_bytes_have_gpt2s_ids() -> None:
    assert LESSON.byte_ids("é 日") == tuple(train_bpe([], 257).encode("é 日").tolist())


def test_the_examples_of_the_text() -> None:
    assert LESSON.split("It's 1984.  Run!") == ["It", "'s", " 1984", ".", " ", " Run", "!"]
    assert [LESSON.byte_ids("!"), LESSON.byte_ids("a"), LESSON.byte_ids(" ")] == [(0,), (64,), (220,)]
