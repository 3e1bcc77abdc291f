"""The parts of a split text join to the text, and tokenize to the same GPT-2 tokens."""

import itertools

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers.pre_tokenizers import ByteLevel

from glassgpt.data.text_files import split_point, split_text
from glassgpt.tokenizers.builtin import Tokenizer, gpt2_tokenizer


@pytest.fixture(scope="module")
def gpt2() -> Tokenizer:
    return gpt2_tokenizer()


WHITE = "\t\n\v\f\r \x85\xa0\u1680\u2003\u2028\u3000"
PIECES = st.sampled_from(
    [
        *WHITE,
        *WHITE,
        "\r\n",
        "  ",
        "\x1c",
        "\u200b",
        "a",
        "word",
        "é",
        "漢",
        "'s",
        "'",
        "12",
        "!?",
        "\U0001f600",
        "\ufeff",
    ]
)
MIXED = st.lists(PIECES, max_size=24).map("".join) | st.text(st.sampled_from("\r\n ab'"), max_size=40)


def parts_of(text: str, limit: int, piece: int = 7) -> list[str]:
    """Split a text that arrives in chunks of `piece` characters into parts of at most `limit`."""
    return list(split_text([text[i : i + piece] for i in range(0, len(text), piece)], limit))


@settings(max_examples=500)
@given(MIXED, st.integers(2, 12), st.integers(1, 9))
def test_parts_join_to_the_text_for_any_chunks(text: str, limit: int, piece: int) -> None:
    parts = parts_of(text, limit, piece)
    assert "".join(parts) == text
    assert all(0 < len(part) <= limit for part in parts) or parts == [""]
    assert not any(left.endswith("\r") and right.startswith("\n") for left, right in itertools.pairwise(parts))
    assert parts == list(split_text([text], limit))
    assert (len(parts) == 1) == (len(text) <= limit)


def gpt2_pieces(text: str) -> list[str]:
    """Split a text by GPT-2's pattern, with the `tokenizers` library."""
    return [text[start:end] for _, (start, end) in ByteLevel(add_prefix_space=False).pre_tokenize_str(text)]


def is_safe(text: str, place: int) -> bool:
    """Return whether GPT-2's pattern splits the text the same way if it is cut at `place`."""
    return gpt2_pieces(text[:place]) + gpt2_pieces(text[place:]) == gpt2_pieces(text)


@settings(max_examples=1000, deadline=None)
@given(MIXED, st.integers(2, 12))
@example("a\n\nb  c", 3)
@example("      ab", 7)
@example("!\x1c!\x1c!", 3)
def test_a_split_keeps_gpt2s_splitting_if_white_space_allows_it(text: str, limit: int) -> None:
    """If the chosen place changes GPT-2's splitting, then so does every other place at white space."""
    if len(text) <= limit or is_safe(text, split_point(text, 0, limit)):
        return
    # `split_point` makes no part of one character, looks at `limit` + 1 characters only, and keeps \r\n together.
    places = [
        place
        for place in range(2, limit)
        if {text[place - 1], text[place]} & set(WHITE) and text[place - 1 : place + 1] != "\r\n"
    ]
    assert not [place for place in places if is_safe(text, place)]


@settings(max_examples=300, deadline=None)
@given(text=MIXED, limit=st.integers(2, 12))
def test_a_split_that_keeps_gpt2s_splitting_keeps_the_tokens(gpt2: Tokenizer, text: str, limit: int) -> None:
    parts = parts_of(text, limit)
    if list(itertools.chain.from_iterable(map(gpt2_pieces, parts))) == gpt2_pieces(text):
        assert [i for part in parts for i in gpt2.encode(part)] == gpt2.encode(text).tolist()


@settings(max_examples=50, deadline=None)
@given(
    words=st.lists(st.sampled_from(["the", "it's", "1984", "x+y", "¿qué?", "漢字"]), min_size=1, max_size=60),
    data=st.data(),
)
def test_words_in_parts_have_the_tokens_of_the_whole_text(
    gpt2: Tokenizer, words: list[str], data: st.DataObject
) -> None:
    gaps = data.draw(
        st.lists(
            st.sampled_from([" ", "\n", "\n\n", "\r\n", "  ", "\n\t", "\u3000"]),
            min_size=len(words),
            max_size=len(words),
        )
    )
    text = "".join(itertools.chain.from_iterable(zip(words, gaps, strict=True)))
    parts = parts_of(text, 16)  # room for the longest word and white space on both sides
    assert [i for part in parts for i in gpt2.encode(part)] == gpt2.encode(text).tolist()


def test_a_split_prefers_the_end_of_a_line_then_of_a_word() -> None:
    assert parts_of("one two\nthree four five", 12) == ["one two\n", "three four", " five"]
    assert parts_of("a\nb" + " word" * 6, 16) == ["a\nb word word", " word word word", " word"]
    assert parts_of("x" * 9 + "\r\n" + "y", 10) == ["x" * 9, "\r\ny"]
    assert parts_of("\r\n" * 3, 3) == ["\r\n", "\r\n", "\r\n"]
